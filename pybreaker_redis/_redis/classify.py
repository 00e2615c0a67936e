"""Classification of errors: kinds of errors, of any client library, and features that a server may not have.

Classes are compared by name, because valkey's client and redis-py-cluster have their own classes with redis-py's names.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterator

from pybreaker_redis import _log
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import describe_error
from pybreaker_redis.errors import PybreakerRedisError


class MissingFeature(enum.Enum):
    """Feature that a server does not have, or forbids to this user, and that circuits can do without.

    The values appear in the log records of the missing feature.
    """

    SCRIPTS = "scripts"
    """EVAL: circuits use transactions."""
    EVALSHA = "names"
    """EVALSHA: each call sends the source of its script."""
    PUBLISH = "publishing"
    """PUBLISH: other processes notice transitions at their next poll."""
    PRELOADING = "preloading"
    """SCRIPT: the first use of each script on a server sends its source."""
    TRACKING = "tracking"
    """CLIENT TRACKING: the server does not push what other clients than this package write."""


class ErrorKind(enum.Enum):
    """Kind of an error, and whether the error concerns the server, the circuit or a single report."""

    UNREACHABLE = "unreachable"
    """The server does not answer, or not yet.  Concerns the server."""
    READ_ONLY = "read-only"
    """The server answers, and takes no writes at present.  Concerns the server."""
    FORBIDDEN = "forbidden"
    """The user has no right to a command or a key.  Concerns the circuit."""
    CONTENDED = "contended"
    """The server answers, and other writers were faster.  Concerns a single report."""
    MIGRATING = "migrating"
    """The circuit's slot of a cluster migrates from one node to another.  Concerns the circuit."""
    UNUSABLE = "unusable"
    """The request or the reply is unusable, or the client source failed.  Concerns the circuit."""


#: Kind by the name of an error class.  The first known name among a class and its ancestors decides.
_KIND_BY_CLASS = {
    "ReadOnlyError": ErrorKind.READ_ONLY,
    "OutOfMemoryError": ErrorKind.READ_ONLY,
    "NoPermissionError": ErrorKind.FORBIDDEN,
    # Subclasses: a server that is loading, a pool without a free connection, a wrong password.
    "ConnectionError": ErrorKind.UNREACHABLE,
    "TimeoutError": ErrorKind.UNREACHABLE,
    "ClusterError": ErrorKind.UNREACHABLE,
    # redis-py's class for MOVED is a subclass of the one for ASK.
    "AskError": ErrorKind.MIGRATING,
    "TryAgainError": ErrorKind.MIGRATING,
    "RedisClusterException": ErrorKind.UNREACHABLE,
    "ValkeyClusterException": ErrorKind.UNREACHABLE,
    "WatchError": ErrorKind.CONTENDED,
    "OSError": ErrorKind.UNREACHABLE,
}


#: Kind by the first word of a server's error, where the client has no class for the error.
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


#: Kind by a part of the text of errors that have no code: errors of commands in scripts, and errors before AUTH.
_KIND_BY_PHRASE = {
    "permission": ErrorKind.FORBIDDEN,
    "can't access": ErrorKind.FORBIDDEN,
    "can't run this command": ErrorKind.FORBIDDEN,
    "unauthenticated": ErrorKind.UNREACHABLE,
}


#: Code of an error: its first word, or the first word of the command's error inside the error of a script.
_ERROR_CODE = re.compile(r"(?:^|[-@])([A-Z]+)\b")


#: End of the text that redis-py puts before the error of a command in a pipeline.
_PIPELINE_PREFIX = "of pipeline caused error: "


#: Parts of the errors with which servers and proxies refuse a command that they do not have.
_UNKNOWN = ("unknown command", "unsupported", "not supported")


#: Parts of the errors about a command that a script has called.
_IN_SCRIPT = ("from script", "user_script", "executing the script")


class ScriptingUnavailableError(PybreakerRedisError):
    """Refusal of scripts, by the server or for this user."""


class PushUnavailableError(PybreakerRedisError):
    """Refusal of a push connection: the server has no channels, or this user has no right to them."""


def error_kind(error: BaseException) -> ErrorKind:
    """Return the kind of an error of any client library."""
    for cls in type(error).__mro__:
        if cls.__name__ in _KIND_BY_CLASS:
            return _KIND_BY_CLASS[cls.__name__]
    if is_instance_of_named(error, "ResponseError"):
        text = str(error).rpartition(_PIPELINE_PREFIX)[2]
        for code in _ERROR_CODE.findall(text):
            if code in _KIND_BY_CODE:
                return _KIND_BY_CODE[code]
        for phrase, kind in _KIND_BY_PHRASE.items():
            if phrase in text:
                return kind
    return ErrorKind.UNUSABLE


@contextlib.contextmanager
def suppress_except(*kinds: ErrorKind) -> Iterator[None]:
    """Suppress and log an error, unless the error is of one of these kinds.

    Args:
        kinds: Kinds of errors that are raised.
    """
    try:
        yield
    except Exception as error:
        if error_kind(error) in kinds:
            raise
        emit(_log.detail("circuit not reconciled (%s)", describe_error(error)))


def is_instance_of_named(error: BaseException, name: str) -> bool:
    """Return whether an error's class, or one of its ancestors, has this name."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def is_authentication_error(error: BaseException) -> bool:
    """Return whether a server rejects the credentials of a connection, or misses them."""
    if is_instance_of_named(error, "AuthenticationError") or is_instance_of_named(
        error, "AuthenticationWrongNumberOfArgsError"
    ):
        return True
    return is_instance_of_named(error, "ResponseError") and any(code in str(error) for code in ("NOAUTH", "WRONGPASS"))


def is_moved_error(error: BaseException) -> bool:
    """Return whether a node of a cluster redirects to the node that serves the slot."""
    # In redis-py, `AskError` is the ancestor of `MovedError`.  redis-py 3 has neither.
    return is_instance_of_named(error, "MovedError") or str(error).startswith("MOVED ")


def is_slot_unserved(error: BaseException) -> bool:
    """Return whether a node of a cluster finds no node for the slot: none serves the slot, or this node was removed."""
    return "Hash slot not served" in str(error)


def may_have_executed(error: BaseException) -> bool:
    """Return whether the server may have executed the command that ended with this error."""
    cause = error.__cause__ if is_instance_of_named(error, "WatchError") else error
    return cause is not None and is_instance_of_named(cause, "TimeoutError")


def is_unsupported_command(error: BaseException, *commands: str) -> bool:
    """Return whether a server does not have a command, or forbids the command to this user.

    Args:
        error: Error reply of the server.
        commands: Names of the commands that were sent.  A refusal for want of rights counts if it names one of them,
            and not only a key.
    """
    if not is_instance_of_named(error, "ResponseError"):
        return False
    text = str(error).lower()
    if is_instance_of_named(error, "NoPermissionError"):
        return any(f"{quote}{command}{quote}" in text for command in commands for quote in "'`")
    return any(words in text for words in _UNKNOWN) and not any(words in text for words in _IN_SCRIPT)
