"""What can go wrong, by name.

Knows: names.  Does not know: who raises them.
"""

from __future__ import annotations


class PybreakerRedisError(Exception):
    """Root of this package's own errors."""


class ScriptingUnavailable(PybreakerRedisError):
    """The server does not run scripts, or not for this user."""


class PushUnavailable(PybreakerRedisError):
    """The server has no channels, or this user may not hear them."""


def is_a(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of that name: valkey's client has classes of its own, called like redis-py's."""
    return any(cls.__name__ == name for cls in type(error).__mro__)
