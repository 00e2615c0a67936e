"""Error classification: the kind of each error, for all clients and servers."""

from __future__ import annotations

import socket
import ssl

import pytest
import redis
import valkey
from redis.exceptions import ResponseError

from pybreaker_redis._redis.classify import ErrorKind, error_kind

UNREACHABLE, READ_ONLY, FORBIDDEN, UNUSABLE = (
    ErrorKind.UNREACHABLE,
    ErrorKind.READ_ONLY,
    ErrorKind.FORBIDDEN,
    ErrorKind.UNUSABLE,
)


MIGRATING, CONTENDED = ErrorKind.MIGRATING, ErrorKind.CONTENDED


#: Classes of redis-py and valkey-py, with the text that the client leaves of the server's error.
CLASSES = {
    "ConnectionError": ("Connection refused.", UNREACHABLE),
    "TimeoutError": ("Timeout reading from socket", UNREACHABLE),
    "BusyLoadingError": ("Redis is loading the dataset in memory", UNREACHABLE),
    "MaxConnectionsError": ("max number of clients reached", UNREACHABLE),
    "AuthenticationError": ("Authentication required.", UNREACHABLE),
    "AuthorizationError": ("", UNREACHABLE),
    "ClusterError": ("TTL exhausted.", UNREACHABLE),
    "ClusterDownError": ("Hash slot not served", UNREACHABLE),
    "MasterDownError": ("Link with MASTER is down and replica-serve-stale-data is set to 'no'.", UNREACHABLE),
    "RedisClusterException": ("Redis Cluster cannot be connected.", UNREACHABLE),
    "ValkeyClusterException": ("Valkey Cluster cannot be connected.", UNREACHABLE),
    "SlotNotCoveredError": ('Slot "1" is not covered by the cluster.', UNREACHABLE),
    "TryAgainError": ("Multiple keys request during rehashing of slot", MIGRATING),
    "WatchError": ("Watched variable changed.", CONTENDED),
    "ReadOnlyError": ("You can't write against a read only replica.", READ_ONLY),
    "OutOfMemoryError": ("command not allowed when used memory > 'maxmemory'.", READ_ONLY),
    "NoPermissionError": ("User shop has no permissions to run the 'evalsha' command", FORBIDDEN),
    "ResponseError": ("WRONGTYPE Operation against a key holding the wrong kind of value", UNUSABLE),
    "NoScriptError": ("No matching script. Please use EVAL.", UNUSABLE),
    "ClusterCrossSlotError": ("Keys in request don't hash to the same slot", UNUSABLE),
    "InvalidResponse": ("Protocol Error: b'HTTP/1.1 400 Bad Request'", UNUSABLE),
    "DataError": ("Invalid input of type: 'NoneType'.", UNUSABLE),
}


LIBRARIES = {"redis-py": redis.exceptions, "valkey-py": valkey.exceptions}


#: Classes of `CLASSES` that the installed releases have.
HAD = [(library, name) for library, module in LIBRARIES.items() for name in CLASSES if hasattr(module, name)]


@pytest.mark.parametrize(("library", "name"), HAD)
def test_class_of_any_client_has_the_kind_of_its_name(library: str, name: str) -> None:
    """The name of the class decides about the kind, whichever client raises the error."""
    text, kind = CLASSES[name]
    assert error_kind(getattr(LIBRARIES[library], name)(text)) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("raw"), UNREACHABLE),
        (ConnectionResetError("by peer"), UNREACHABLE),
        (socket.timeout("timed out"), UNREACHABLE),  # noqa: UP041 (as libraries still call it)
        (TimeoutError("timed out"), UNREACHABLE),
        (socket.gaierror(-2, "Name or service not known"), UNREACHABLE),
        (ssl.SSLError("handshake failed"), UNREACHABLE),
        (type("RedisClusterException", (Exception,), {})("redis-py-cluster's own"), UNREACHABLE),
        (type("ClusterError", (Exception,), {})("redis-py-cluster's own"), UNREACHABLE),
        (TypeError("'NoneType' object is not callable"), UNUSABLE),
        (ModuleNotFoundError("No module named 'settings'"), UNUSABLE),
        (KeyError("REDIS_URL"), UNUSABLE),
        (Exception("of an application"), UNUSABLE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_a_socket_is_an_outage_and_any_other_a_fault(error: Exception, kind: ErrorKind) -> None:
    """Socket errors are outages. Errors of a client factory are faults of one circuit."""
    assert error_kind(error) is kind


def test_subclass_of_a_known_class_has_its_kind() -> None:
    """Applications subclass clients, and their errors as well."""

    class Away(redis.ConnectionError):
        """Subclass of an application."""

    class Denied(redis.exceptions.NoPermissionError):
        """Subclass of an application."""

    assert error_kind(Away()) is UNREACHABLE
    assert error_kind(Denied()) is FORBIDDEN


#: Errors as servers send them, with their codes.
SERVER_ERRORS = [
    ("READONLY You can't write against a read only replica.", READ_ONLY),
    ("OOM command not allowed when used memory > 'maxmemory'.", READ_ONLY),
    ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", READ_ONLY),
    ("NOREPLICAS Not enough good replicas to write.", READ_ONLY),
    ("NOPERM this user has no permissions to run the 'set' command or its subcommand", FORBIDDEN),
    ("LOADING Redis is loading the dataset in memory", UNREACHABLE),
    ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", UNREACHABLE),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", UNREACHABLE),
    ("CLUSTERDOWN The cluster is down", UNREACHABLE),
    ("CLUSTERDOWN Hash slot not served", UNREACHABLE),
    ("TRYAGAIN Multiple keys request during rehashing of slot", MIGRATING),
    ("ASK 3999 127.0.0.1:6381", MIGRATING),
    ("MOVED 3999 127.0.0.1:6381", MIGRATING),
    ("NOAUTH Authentication required.", UNREACHABLE),
    ("WRONGPASS invalid username-password pair or user is disabled.", UNREACHABLE),
]


#: Sentences with a code, either at the beginning or with its position in a script.
SENTENCES = {
    "plain": "{}",
    "annotated": "{} script: 60be534429818f2a26358999ba8610407da0b931, on @user_script:192.",
    "before 7": "Error running script (call to f_60be53): @user_script:192: @user_script: 192: -{}",
    "ERR": "ERR Error running script (call to f_ab): @user_script:1: -{}",
    "at": "ERR Error running script (call to f_ab): @user_script:1: @{}",
    "pipeline": "Command # 2 (SET shop:pybreaker:state open) of pipeline caused error: {}",
}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(("text", "kind"), SERVER_ERRORS, ids=[text.partition(" ")[0] for text, _ in SERVER_ERRORS])
@pytest.mark.parametrize("library", LIBRARIES)
def test_error_code_counts_wherever_it_stands(text: str, kind: ErrorKind, sentence: str, library: str) -> None:
    """Older servers put the error code of a command in a script into a sentence. Older clients parse no codes."""
    error = LIBRARIES[library].ResponseError(SENTENCES[sentence].format(text))
    assert error_kind(error) is kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ACL failure in script: User ro has no permissions to run the 'set' command", FORBIDDEN),
        ("The user executing the script can't access at least one of the keys mentioned", FORBIDDEN),
        ("Error running script (call to f_60): The user executing the script can't run this command", FORBIDDEN),
        ("ERR unknown command 'EVALSHA'", UNUSABLE),
        ("Script killed by user with SCRIPT KILL.", UNUSABLE),
        ("a key named busy, or oom, or loading", UNUSABLE),
    ],
)
def test_error_without_a_code_is_classified_by_its_text(text: str, kind: ErrorKind) -> None:
    """A command that an ACL forbids inside a script has no error code of its own."""
    assert error_kind(ResponseError(text)) is kind


@pytest.mark.parametrize("user", ["READONLY", "LOADING"])
def test_name_of_a_user_is_not_parsed_as_a_code(user: str) -> None:
    """The class decides about the kind. The rest of the text may contain names that users chose."""
    text = f"User {user} has no permissions to run the 'set' command"
    assert error_kind(redis.exceptions.NoPermissionError(text)) is FORBIDDEN
    assert error_kind(ResponseError(f"ACL failure in script: {text}")) is FORBIDDEN
