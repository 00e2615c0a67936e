"""What can go wrong, by name.

Knows: names.  Does not know: who raises them.
"""

from __future__ import annotations


class PybreakerRedisError(Exception):
    """Root of this package's own errors."""


class ScriptingUnavailable(PybreakerRedisError):
    """The server does not run scripts, or not for this user."""
