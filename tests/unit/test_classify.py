"""Do errors of all clients and servers mean what the table says?"""

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


#: Classes that redis-py and valkey's client have, as far as they have them, and what the client leaves of the text.
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


#: Those classes that the installed releases have.
HAD = [(library, name) for library, module in LIBRARIES.items() for name in CLASSES if hasattr(module, name)]


@pytest.mark.parametrize(("library", "name"), HAD)
def test_class_of_any_client_means_the_same(library: str, name: str) -> None:
    """Whichever client raises it: what an error means follows from the name of its class."""
    text, meaning = CLASSES[name]
    assert error_kind(getattr(LIBRARIES[library], name)(text)) is meaning


@pytest.mark.parametrize(
    ("error", "meaning"),
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
        (Exception("of somebody's own"), UNUSABLE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_no_client_is_away_if_it_is_of_a_socket_and_else_a_fault(error: Exception, meaning: ErrorKind) -> None:
    """A network that fails is nobody's fault; a callable that returns no client is that circuit's own."""
    assert error_kind(error) is meaning


def test_own_subclass_of_a_known_class_means_what_that_means() -> None:
    """Clients are subclassed, and so are their errors."""

    class Away(redis.ConnectionError):
        """Somebody's own."""

    class Denied(redis.exceptions.NoPermissionError):
        """Somebody's own."""

    assert error_kind(Away()) is UNREACHABLE
    assert error_kind(Denied()) is FORBIDDEN


#: What servers say, with its code.
SAID = [
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


#: Where they say it: at the beginning, or in a sentence that says where in a script it was.
SENTENCES = {
    "plain": "{}",
    "annotated": "{} script: 60be534429818f2a26358999ba8610407da0b931, on @user_script:192.",
    "before 7": "Error running script (call to f_60be53): @user_script:192: @user_script: 192: -{}",
    "ERR": "ERR Error running script (call to f_ab): @user_script:1: -{}",
    "at": "ERR Error running script (call to f_ab): @user_script:1: @{}",
    "pipeline": "Command # 2 (SET shop:pybreaker:state open) of pipeline caused error: {}",
}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(("said", "meaning"), SAID, ids=[said.partition(" ")[0] for said, _ in SAID])
@pytest.mark.parametrize("library", LIBRARIES)
def test_code_of_the_server_counts_wherever_it_stands(
    said: str, meaning: ErrorKind, sentence: str, library: str
) -> None:
    """Inside scripts, older servers put the code of a command's error into a sentence; older clients know no code."""
    error = LIBRARIES[library].ResponseError(SENTENCES[sentence].format(said))
    assert error_kind(error) is meaning


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ACL failure in script: User ro has no permissions to run the 'set' command", FORBIDDEN),
        ("The user executing the script can't access at least one of the keys mentioned", FORBIDDEN),
        ("Error running script (call to f_60): The user executing the script can't run this command", FORBIDDEN),
        ("ERR unknown command 'EVALSHA'", UNUSABLE),
        ("Script killed by user with SCRIPT KILL.", UNUSABLE),
        ("a key named busy, or oom, or loading", UNUSABLE),
    ],
)
def test_sentence_without_a_code_counts_by_what_it_says(said: str, meaning: ErrorKind) -> None:
    """What an ACL forbids inside a script has no code of its own."""
    assert error_kind(ResponseError(said)) is meaning


@pytest.mark.parametrize("user", ["READONLY", "LOADING"])
def test_name_of_a_user_is_not_taken_for_a_code(user: str) -> None:
    """The class has said what it means; the rest of the text is the user's own words."""
    said = f"User {user} has no permissions to run the 'set' command"
    assert error_kind(redis.exceptions.NoPermissionError(said)) is FORBIDDEN
    assert error_kind(ResponseError(f"ACL failure in script: {said}")) is FORBIDDEN
