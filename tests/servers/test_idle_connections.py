"""Connections that were not used for a while, and those that turn out to be gone when they are used again."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis import deadline
from pybreaker_redis._redis.pool import IDLE_MAX_S
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.proxy import Proxy
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens")


@pytest.fixture
def balancer(server: PrivateServer) -> Iterator[Proxy]:
    """Between the process and the server."""
    with contextlib.closing(Proxy(server.unix_socket)) as proxy:
        yield proxy


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which connections have grown older than they look."""
    shift = [0.0]
    monkeypatch.setattr(deadline, "monotonic", lambda: time.monotonic() + shift[0])
    return shift


def guarded(balancer: Proxy, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that has made a call, and asks at every look."""
    client = redis.Redis(port=balancer.port, **words)
    storage = CircuitRedisStorage("closed", client, namespace="idle", max_staleness=0, timeout=1.0)
    breaker = pybreaker.CircuitBreaker(fail_max=9, state_storage=storage)
    breaker.call(up)
    return breaker


def fails(breaker: pybreaker.CircuitBreaker) -> None:
    """A call that fails."""
    with pytest.raises(Down):
        breaker.call(down)


def outages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines about one."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


@pytest.mark.parametrize(
    ("words", "seconds"), [({}, IDLE_MAX_S), ({"health_check_interval": 5}, 5), ({"health_check_interval": 60}, 30)]
)
def test_connection_that_was_idle_for_long_is_not_used_again(  # noqa: PLR0917
    words: dict[str, Any],
    seconds: float,
    balancer: Proxy,
    later: list[float],
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A load balancer may have dropped it silently: what is sent on it is never answered."""
    breaker = guarded(balancer, **words)
    balancer.forget()
    later[0] += seconds + 0.1
    fails(breaker)
    assert client.get("idle:pybreaker:fail_counter") == b"1"
    assert outages(caplog) == []


def test_connection_that_was_idle_for_less_is_used_again(
    balancer: Proxy, later: list[float], client: redis.Redis
) -> None:
    """To connect takes round trips."""
    breaker = guarded(balancer)
    before = client.info("stats")["total_connections_received"]
    for _ in range(3):
        later[0] += IDLE_MAX_S - 5
        breaker.call(up)
    assert client.info("stats")["total_connections_received"] == before


@pytest.mark.parametrize("state", ["closed", "open"])
def test_reused_connection_that_is_reset_at_once_is_no_outage(
    state: str, balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A balancer that answers with a reset has passed nothing on: a look or a claim is made once more."""
    breaker = guarded(balancer)
    breaker.reset_timeout = 0
    if state == "open":
        breaker.open()
    balancer.doomed = 1
    assert breaker.call(up) == "answer"
    assert client.get("idle:pybreaker:state") == b"closed"
    assert outages(caplog) == []


def test_second_reset_is_an_outage(balancer: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Who hangs up on new connections, too, is away."""
    breaker = guarded(balancer)
    caplog.set_level(logging.INFO, "pybreaker_redis")
    balancer.doomed = 2
    assert breaker.call(up) == "answer"
    assert "is unreachable" in outages(caplog)[0]
    wait_for(lambda: "is available again" in outages(caplog)[-1], "it is back")


def test_report_without_an_answer_is_not_simply_made_twice(
    balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure that was sent may have been counted: it is brought back as after any outage."""
    breaker = guarded(balancer)

    def dooms() -> None:
        balancer.doomed = 1
        raise Down

    with pytest.raises(Down):
        breaker.call(dooms)
    assert "is unreachable" in outages(caplog)[0]
    wait_for(lambda: client.get("idle:pybreaker:fail_counter") == b"1", "it is counted")


class Torn:
    """A socket whose peer has gone when something is sent."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def sendall(self, *arguments: Any) -> None:
        """Nothing of it arrives."""
        raise BrokenPipeError


def test_report_that_could_not_be_sent_is_made_once_more(
    balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing was done, so it cannot be counted twice."""
    breaker = guarded(balancer)

    def tears() -> None:
        storage: Any = breaker._state_storage
        (pool,) = storage._core.server._connections._pools.values()
        for made in pool._connections:
            made._sock._wrapped = Torn(made._sock._wrapped)
        raise Down

    with pytest.raises(Down):
        breaker.call(tears)
    assert client.get("idle:pybreaker:fail_counter") == b"1"
    assert outages(caplog) == []


def test_drop_is_of_an_operation_with_a_deadline() -> None:
    """Without one nothing is tried again."""
    assert deadline.take_lost_connection() is None
    with deadline.deadline(1.0):
        assert deadline.take_lost_connection() is None


class Ends:
    """A socket that ends, or breaks."""

    def __init__(self, answer: bytes | Exception) -> None:
        self._answer = answer

    def settimeout(self, seconds: float | None) -> None:
        """It does not wait."""

    def recv(self, size: int) -> bytes:
        """What there is."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer[:size]


@pytest.mark.parametrize("answer", [b"", b"+OK", ConnectionResetError()], ids=["end", "answer", "reset"])
@pytest.mark.parametrize("is_reused", [True, False])
@pytest.mark.parametrize("has_deadline", [True, False])
def test_drop_is_an_end_without_an_answer_of_a_reused_connection(
    answer: bytes | Exception, is_reused: bool, has_deadline: bool
) -> None:
    """A new connection that ends is an outage, and so is one that ends in the middle of an answer."""
    made = deadline.DeadlineSocket(Ends(answer), None, None)  # type: ignore[arg-type]
    made.is_reused = is_reused
    with deadline.deadline(1.0 if has_deadline else None):
        with contextlib.suppress(ConnectionResetError):
            made.recv(10)
        expected = deadline.LostConnection.UNANSWERED if is_reused and has_deadline and answer != b"+OK" else None
        assert deadline.take_lost_connection() is expected
        if answer == b"+OK":
            made._wrapped = Ends(b"")  # type: ignore[assignment]
            assert made.recv(10) == b""
            assert deadline.take_lost_connection() is None
