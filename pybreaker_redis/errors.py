"""What can go wrong, by name.

Knows: names.  Does not know: who raises them.
"""

from __future__ import annotations


class PybreakerRedisError(Exception):
    """Root of this package's own errors."""


class ScriptingUnavailableError(PybreakerRedisError):
    """The server does not run scripts, or not for this user."""


class PushUnavailableError(PybreakerRedisError):
    """The server has no channels, or this user may not hear them."""


class UnusableReplyError(PybreakerRedisError):
    """An answer that no server of ours gives: a client swallows errors, or something between changes answers."""


#: What servers say, and proxies before them, to a command that they do not have.
_UNKNOWN = ("unknown command", "unsupported", "not supported")

#: The same, of a command that a script has called.
_IN_SCRIPT = ("from script", "user_script", "executing the script")


def is_instance_of_named(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of that name: valkey's client has classes of its own, called like redis-py's."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def may_have_executed(error: BaseException) -> bool:
    """Whether the server may have executed what got this error instead of an answer."""
    cause = error.__cause__ if is_instance_of_named(error, "WatchError") else error
    return cause is not None and is_instance_of_named(cause, "TimeoutError")


def is_unsupported_command(error: BaseException, *commands: str) -> bool:
    """Whether a server says that it does not have a command, or not for this user.

    Args:
        error: What it has answered.
        commands: What was asked for; who may not use it is told its name, and not only that of a key.
    """
    if not is_instance_of_named(error, "ResponseError"):
        return False
    said = str(error).lower()
    if is_instance_of_named(error, "NoPermissionError"):
        return any(f"{quote}{command}{quote}" in said for command in commands for quote in "'`")
    return any(words in said for words in _UNKNOWN) and not any(words in said for words in _IN_SCRIPT)
