"""Exceptions that users meet: what they carry, and what their text says."""

from __future__ import annotations

import pickle
import threading

import pytest
import redis

from pybreaker_redis.errors import PybreakerRedisError, StorageUnavailableError

SERVER = "localhost:6379/0"


def error(
    *circuits: str, server: str = SERVER, timeout: float | None = 2.0, cause: Exception | None = None
) -> StorageUnavailableError:
    """An error about these circuits."""
    return StorageUnavailableError(circuits, server, timeout, cause or redis.TimeoutError("no reply"))


@pytest.mark.parametrize(
    ("circuits", "expected"),
    [
        (("payments",), "circuit 'payments': "),
        (("payments", "stock"), "circuit 'payments' and 1 other: "),
        (("payments", "stock", "mail"), "circuit 'payments' and 2 others: "),
    ],
)
def test_text_names_circuits_server_limit_cause_and_remedy(circuits: tuple[str, ...], expected: str) -> None:
    """An operator sees in one line what was not executed, and where to look."""
    assert str(error(*circuits)) == (
        f"{expected}Redis at {SERVER} did not execute the command (limit 2 s, TimeoutError: no reply); check health()"
    )


def test_text_leaves_out_what_is_not_known() -> None:
    """A client source may fail before the server is known, and a client may have no timeout."""
    text = str(error("payments", server="", timeout=None, cause=KeyError("url")))
    assert text == "circuit 'payments': Redis did not execute the command (KeyError: 'url'); check health()"


def test_text_masks_the_secrets_of_its_cause() -> None:
    """Operators' tools print errors, and logs keep them."""
    assert "hidden" not in str(error("payments", cause=redis.ConnectionError("redis://shop:hidden@there:1/0")))


def test_error_carries_its_data() -> None:
    """Code decides by attributes, and not by texts."""
    cause = redis.TimeoutError("no reply")
    raised = error("payments", "stock", cause=cause)
    assert isinstance(raised, PybreakerRedisError)
    assert (raised.circuit, raised.circuits) == ("payments", ("payments", "stock"))
    assert (raised.server, raised.timeout, raised.cause) == (SERVER, 2.0, cause)


def test_error_survives_a_pickle() -> None:
    """A task queue stores the error of a task."""
    raised = error("payments", "stock")
    copy = pickle.loads(pickle.dumps(raised))
    assert str(copy) == str(raised)
    assert (copy.circuits, copy.server, copy.timeout) == (raised.circuits, raised.server, raised.timeout)
    assert isinstance(copy.cause, redis.TimeoutError)


def test_error_with_a_cause_that_cannot_be_pickled_keeps_the_text_of_the_cause() -> None:
    """Errors of clients may hold connections."""
    cause = redis.ConnectionError("gone")
    cause.connection = threading.Lock()  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(error("payments", cause=cause)))
    assert "ConnectionError: gone" in str(copy)
