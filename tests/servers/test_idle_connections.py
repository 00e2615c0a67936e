"""Idle connections: those unused for a while, and those that turn out to be lost when they are used again."""

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
from tests.support.inspect import connections_of, pools_of, storage_of, wrap_socket
from tests.support.logs import messages_of
from tests.support.proxy import Proxy
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners")


@pytest.fixture
def balancer(server: PrivateServer) -> Iterator[Proxy]:
    """Yield a proxy between the process and the server."""
    with contextlib.closing(Proxy(server.unix_socket)) as proxy:
        yield proxy


@pytest.fixture
def added_age(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds by which idle connections appear older."""
    shift = [0.0]
    monkeypatch.setattr(deadline, "monotonic", lambda: time.monotonic() + shift[0])
    return shift


def guarded_breaker(balancer: Proxy, **options: Any) -> pybreaker.CircuitBreaker:
    """Return a breaker that has made a call, and reads the circuit each time."""
    client = redis.Redis(port=balancer.port, **options)
    storage = CircuitRedisStorage("closed", client, namespace="idle", max_staleness=0, timeout=1.0)
    breaker = pybreaker.CircuitBreaker(fail_max=9, state_storage=storage)
    breaker.call(up)
    return breaker


def fails(breaker: pybreaker.CircuitBreaker) -> None:
    """Make a call that fails."""
    with pytest.raises(Down):
        breaker.call(down)


def outage_lines(caplog: pytest.LogCaptureFixture, balancer: Proxy) -> list[str]:
    """Return the log lines about outages."""
    return messages_of(caplog, balancer, "circuit 'idle'", level=logging.INFO)


@pytest.mark.parametrize(
    ("options", "seconds"), [({}, IDLE_MAX_S), ({"health_check_interval": 5}, 5), ({"health_check_interval": 60}, 30)]
)
def test_connection_beyond_the_idle_limit_is_not_used_again(  # noqa: PLR0917
    options: dict[str, Any],
    seconds: float,
    balancer: Proxy,
    added_age: list[float],
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A load balancer may have dropped the connection silently, and would never answer."""
    breaker = guarded_breaker(balancer, **options)
    balancer.drop_silently()
    added_age[0] += seconds + 0.1
    fails(breaker)
    assert client.get("idle:pybreaker:fail_counter") == b"1"
    assert outage_lines(caplog, balancer) == []


def test_connection_below_the_idle_limit_is_used_again(
    balancer: Proxy, added_age: list[float], client: redis.Redis
) -> None:
    """A connect costs round trips."""
    breaker = guarded_breaker(balancer)
    before = client.info("stats")["total_connections_received"]
    for _ in range(3):
        added_age[0] += IDLE_MAX_S - 5
        breaker.call(up)
    assert client.info("stats")["total_connections_received"] == before


@pytest.mark.parametrize("state", ["closed", "open"])
def test_reused_connection_that_is_reset_at_once_is_no_outage(
    state: str, balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A balancer that answers with a reset has forwarded nothing. A read or a claim is sent again."""
    breaker = guarded_breaker(balancer)
    breaker.reset_timeout = 0
    if state == "open":
        breaker.open()
    balancer.failing_requests = 1
    assert breaker.call(up) == "answer"
    assert client.get("idle:pybreaker:state") == b"closed"
    assert outage_lines(caplog, balancer) == []


def test_second_reset_is_an_outage(balancer: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """A server that also closes new connections is unreachable."""
    breaker = guarded_breaker(balancer)
    caplog.set_level(logging.INFO, "pybreaker_redis")
    balancer.failing_requests = 2
    assert breaker.call(up) == "answer"
    assert "is unreachable" in outage_lines(caplog, balancer)[0]
    wait_for(lambda: "is available again" in outage_lines(caplog, balancer)[-1], "the end of the outage")


def test_report_without_an_answer_is_not_sent_twice(
    balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The sent failure may have been counted, so it is reported like a failure of an outage."""
    breaker = guarded_breaker(balancer)

    def reset_and_fail() -> None:
        balancer.failing_requests = 1
        raise Down

    with pytest.raises(Down):
        breaker.call(reset_and_fail)
    assert "is unreachable" in outage_lines(caplog, balancer)[0]
    wait_for(lambda: client.get("idle:pybreaker:fail_counter") == b"1", "the counted failure")


class BrokenSocket:
    """Socket with a closed peer."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def sendall(self, *arguments: Any) -> None:
        """Raise, because nothing can be sent."""
        raise BrokenPipeError


def test_report_that_could_not_be_sent_is_sent_again(
    balancer: Proxy, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing was executed, so the failure cannot count twice."""
    breaker = guarded_breaker(balancer)

    def break_and_fail() -> None:
        storage: Any = storage_of(breaker)
        (pool,) = pools_of(storage).values()
        for made in connections_of(pool):
            wrap_socket(made._sock, BrokenSocket)
        raise Down

    with pytest.raises(Down):
        breaker.call(break_and_fail)
    assert client.get("idle:pybreaker:fail_counter") == b"1"
    assert outage_lines(caplog, balancer) == []


def test_lost_connection_is_noted_only_with_a_deadline() -> None:
    """Without a deadline, no operation is repeated."""
    assert deadline.take_lost_connection() is None
    with deadline.deadline(1.0):
        assert deadline.take_lost_connection() is None


class EndingSocket:
    """Socket that ends or breaks."""

    def __init__(self, answer: bytes | Exception) -> None:
        self._answer = answer

    def settimeout(self, seconds: float | None) -> None:
        """Accept any timeout."""

    def recv(self, size: int) -> bytes:
        """Return the scripted answer, or raise the scripted error."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer[:size]


@pytest.mark.parametrize("answer", [b"", b"+OK", ConnectionResetError()], ids=["end", "answer", "reset"])
@pytest.mark.parametrize("is_reused", [True, False])
@pytest.mark.parametrize("has_deadline", [True, False])
def test_lost_connection_is_an_unanswered_end_of_a_reused_connection(
    answer: bytes | Exception, is_reused: bool, has_deadline: bool
) -> None:
    """A new connection that ends is an outage, and so is an end in the middle of an answer."""
    made = deadline.DeadlineSocket(EndingSocket(answer), None, None)  # type: ignore[arg-type]
    made.is_reused = is_reused
    with deadline.deadline(1.0 if has_deadline else None):
        with contextlib.suppress(ConnectionResetError):
            made.recv(10)
        expected = deadline.LostConnection.UNANSWERED if is_reused and has_deadline and answer != b"+OK" else None
        assert deadline.take_lost_connection() is expected
        if answer == b"+OK":
            wrap_socket(made, lambda _: EndingSocket(b""))
            assert made.recv(10) == b""
            assert deadline.take_lost_connection() is None
