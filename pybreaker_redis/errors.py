"""What can go wrong, by name.

Knows: names.  Does not know: who raises them.
"""

from __future__ import annotations


class PybreakerRedisError(Exception):
    """Root of this package's own errors."""


class UnusableReplyError(PybreakerRedisError):
    """An answer that no server of ours gives: a client swallows errors, or something between changes answers."""
