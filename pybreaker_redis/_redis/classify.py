"""Kinds of errors of clients and servers.

Knows: classes and texts of errors.  Does not know: what to do about them.
"""

from __future__ import annotations

import enum
import re

from pybreaker_redis.errors import PybreakerRedisError


class MissingFeature(enum.Enum):
    """What a server may not have, or not for this user, and circuits can do without."""

    SCRIPTS = "scripts"
    """Circuits are moved by transactions."""
    EVALSHA = "names"
    """Of scripts: each is sent as a whole."""
    PUBLISH = "publishing"
    """Nobody is told when a circuit moves."""
    TRACKING = "tracking"
    """Nobody is told of what others than these scripts do."""


def is_moved_error(error: BaseException) -> bool:
    """Whether a node says that it does not serve the slot, and who does."""
    # Of redis-py's classes `AskError` is the ancestor of `MovedError`; redis-py 3 has neither.
    return is_instance_of_named(error, "MovedError") or str(error).startswith("MOVED ")


def is_slot_unserved(error: BaseException) -> bool:
    """Whether a node says that it knows of nobody who serves the slot: there is none, or it was taken out itself."""
    return "Hash slot not served" in str(error)


class ErrorKind(enum.Enum):
    """What an error says."""

    UNREACHABLE = "away"
    """Nobody answers, or not yet: of the server."""
    READ_ONLY = "read-only"
    """It answers, and takes no writes at present: of the server."""
    FORBIDDEN = "forbidden"
    """This user may not do this: of the circuit."""
    CONTENDED = "contended"
    """The server answers, and other writers were faster: of a single report."""
    MIGRATING = "migrating"
    """Its slot of a cluster is under way from one node to another: of the circuit."""
    UNUSABLE = "fault"
    """What was sent or what came back makes no sense, or what was to give a client failed: of the circuit."""


#: Names of error classes, and what they mean; of a class's own and its ancestors' names the first that stands here
#: decides.  By name, because valkey's client and redis-py-cluster have classes of their own, called alike.
_KIND_BY_CLASS = {
    "ReadOnlyError": ErrorKind.READ_ONLY,
    "OutOfMemoryError": ErrorKind.READ_ONLY,
    "NoPermissionError": ErrorKind.FORBIDDEN,
    # A server that is loading, a pool without a connection to spare, a wrong password: all of these are this, too.
    "ConnectionError": ErrorKind.UNREACHABLE,
    "TimeoutError": ErrorKind.UNREACHABLE,
    "ClusterError": ErrorKind.UNREACHABLE,
    # redis-py's class for MOVED is one of this kind, too.
    "AskError": ErrorKind.MIGRATING,
    "TryAgainError": ErrorKind.MIGRATING,
    "RedisClusterException": ErrorKind.UNREACHABLE,
    "ValkeyClusterException": ErrorKind.UNREACHABLE,
    "WatchError": ErrorKind.CONTENDED,
    "OSError": ErrorKind.UNREACHABLE,
}


#: First words of the server's own errors, and what they mean, where the client has no class for them.
_KIND_BY_CODE = {
    "READONLY": ErrorKind.READ_ONLY,
    "OOM": ErrorKind.READ_ONLY,
    "MISCONF": ErrorKind.READ_ONLY,
    "NOREPLICAS": ErrorKind.READ_ONLY,
    "NOPERM": ErrorKind.FORBIDDEN,
    "BUSY": ErrorKind.UNREACHABLE,
    "LOADING": ErrorKind.UNREACHABLE,
    "MASTERDOWN": ErrorKind.UNREACHABLE,
    "CLUSTERDOWN": ErrorKind.UNREACHABLE,
    "ASK": ErrorKind.MIGRATING,
    "MOVED": ErrorKind.MIGRATING,
    "TRYAGAIN": ErrorKind.MIGRATING,
    "NOAUTH": ErrorKind.UNREACHABLE,
    "WRONGPASS": ErrorKind.UNREACHABLE,
}


#: Parts of what servers say in their own words, and what they mean: of commands in scripts, and before any password.
_KIND_BY_PHRASE = {
    "permission": ErrorKind.FORBIDDEN,
    "can't access": ErrorKind.FORBIDDEN,
    "can't run this command": ErrorKind.FORBIDDEN,
    "unauthenticated": ErrorKind.UNREACHABLE,
}


#: A code begins an error, or, inside that of a script, the error of a command.
_ERROR_CODE = re.compile(r"(?:^|[-@])([A-Z]+)\b")


#: What redis-py puts before the error of a command in a pipeline, with the command, ends like this.
_PIPELINE_PREFIX = "of pipeline caused error: "


def error_kind(error: BaseException) -> ErrorKind:
    """What an error means, of whatever client library."""
    for cls in type(error).__mro__:
        if cls.__name__ in _KIND_BY_CLASS:
            return _KIND_BY_CLASS[cls.__name__]
    if is_instance_of_named(error, "ResponseError"):
        said = str(error).rpartition(_PIPELINE_PREFIX)[2]
        for code in _ERROR_CODE.findall(said):
            if code in _KIND_BY_CODE:
                return _KIND_BY_CODE[code]
        for phrase, meaning in _KIND_BY_PHRASE.items():
            if phrase in said:
                return meaning
    return ErrorKind.UNUSABLE


def is_authentication_error(error: BaseException) -> bool:
    """Whether a server does not accept the credentials of a connection, or misses them."""
    if is_instance_of_named(error, "AuthenticationError") or is_instance_of_named(
        error, "AuthenticationWrongNumberOfArgsError"
    ):
        return True
    return is_instance_of_named(error, "ResponseError") and any(code in str(error) for code in ("NOAUTH", "WRONGPASS"))


class ScriptingUnavailableError(PybreakerRedisError):
    """The server does not run scripts, or not for this user."""


class PushUnavailableError(PybreakerRedisError):
    """The server has no channels, or this user may not hear them."""


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
