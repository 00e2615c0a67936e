"""Idle connections: those unused for a while, and those that turn out to be lost when they are used again."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.connections import deadline
from pybreaker_redis._redis.connections.pool import IDLE_MAX_S, POOL_CONNECTIONS_MAX, bounded_client
from pybreaker_redis._redis.connections.spare import SPARE_CONNECTIONS_MAX
from pybreaker_redis.testing.binaries import FoundServer
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import Down, down, up
from tests.support.inspect import connections_of, pools_of, spare_count, storage_of, wrap_socket
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


def test_spare_connections_are_few(client: redis.Redis) -> None:
    """A burst of threads leaves no more connections on the stack than later calls need.  The pool has the others."""
    bounded: Any = bounded_client(client, 2.0)
    spare = bounded.connection_pool.spare_connections
    together = threading.Barrier(2 * SPARE_CONNECTIONS_MAX)

    def use_one() -> None:
        together.wait(20)
        assert spare.execute("EVAL", "local n = 0 for i = 1, 10^5 do n = n + i end return n", 0)

    with ThreadPoolExecutor(2 * SPARE_CONNECTIONS_MAX) as threads:
        for done in [threads.submit(use_one) for _ in range(2 * SPARE_CONNECTIONS_MAX)]:
            done.result(20)
    assert 0 < spare_count(spare) <= SPARE_CONNECTIONS_MAX
    spare.release_all()
    assert spare_count(spare) == 0
    bounded.connection_pool.disconnect()


@pytest.fixture
def server_with_port(preferred: FoundServer) -> Iterator[PrivateServer]:
    """Yield a server with a port: over a unix socket a closed connection shows at once."""
    with PrivateServer(preferred.binary, port=free_port()) as server:
        yield server


@pytest.fixture
def tcp_pool(server_with_port: PrivateServer) -> Iterator[Any]:
    """Yield a pool of this package for a TCP port."""
    with contextlib.closing(redis.Redis(port=server_with_port.port)) as client:
        pool: Any = bounded_client(client, 2.0).connection_pool
        yield pool
        pool.disconnect()


def test_closed_spare_connection_is_replaced(tcp_pool: Any, server_with_port: PrivateServer) -> None:
    """A server or a load balancer closes silent connections.  The next report must not be an outage."""
    spare = tcp_pool.spare_connections
    assert spare.execute("ECHO", "one") == b"one"
    with contextlib.closing(server_with_port.client()) as operator:
        assert operator.client_kill_filter(_type="normal", skipme=True)
    time.sleep(2 * deadline.DOUBT_AFTER_S)
    assert spare.execute("ECHO", "two") == b"two"


def test_caller_that_waits_for_a_connection_gets_the_first_that_is_free(tcp_pool: Any) -> None:
    """The stack takes no connection while the pool has none left."""
    spare = tcp_pool.spare_connections
    taken = [tcp_pool.get_connection(*spare.arguments) for _ in range(POOL_CONNECTIONS_MAX - 1)]
    assert spare.execute("ECHO", "one") == b"one"
    assert spare_count(spare) == 0
    for connection in taken:
        tcp_pool.release(connection)
    assert spare.execute("ECHO", "two") == b"two"
    assert spare_count(spare) == 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, TimeoutError])
def test_connection_with_an_unread_reply_is_not_used_again(
    tcp_pool: Any, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    """The reply would be taken for the reply to the next command."""
    spare = tcp_pool.spare_connections
    assert spare.execute("ECHO", "one") == b"one"

    def interrupt(*_: Any) -> None:
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr(tcp_pool.connection_class, "read_response", interrupt)
        with pytest.raises((interruption, redis.RedisError)):
            spare.execute("ECHO", "two")
    assert spare.execute("ECHO", "three") == b"three"
