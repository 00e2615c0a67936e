"""The server's clock: after a step, or a failover to another clock, timeouts and leases keep their lengths."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._model.circuit import CLOSED, OPEN
from pybreaker_redis._model.intents import ClaimProbe, Load, RecordFailure, Trip
from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis.testing.servers import free_port
from tests.support.breakers import settled
from tests.support.proxy import Proxy
from tests.support.selection import but_for
from tests.support.servers import FoundServer
from tests.support.shifted_server import ShiftedServer
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("patient")

#: Reset timeout and probe lease, seconds.
RESET_TIMEOUT_S = 1.5
LEASE_S = 1.5

#: Tolerance for a busy machine, seconds: far less than any step of a clock.
TOLERANCE_S = 6.0

#: Steps of the server's clock, seconds.
CLOCK_STEPS_S = [20.0, -20.0]

KEYS = circuit_keys("clock", needs_one_slot=False)

Start = Callable[..., ShiftedServer]


@pytest.fixture
def start(preferred: FoundServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Yield a function that starts servers with their own clocks."""
    folder = tmp_path_factory.getbasetemp()
    with contextlib.ExitStack() as stack:

        def start_server(**options: Any) -> ShiftedServer:
            server = ShiftedServer(preferred.binary, folder, args=["--repl-diskless-sync-delay", "0"], **options)
            stack.enter_context(contextlib.closing(server))
            return server.start()

        yield start_server


@pytest.fixture(params=but_for((1.0,), (1.0, 0)), ids=["listens", "asks"])
def max_staleness(request: pytest.FixtureRequest) -> float:
    """Return the staleness of a process that subscribes to changes, and of one that reads the server each time."""
    return float(request.param)


def breaker_of(client: Any, max_staleness: float) -> CircuitBreaker:
    """Return a breaker that has made a call. With a subscription, the next call needs no round trip."""
    storage = CircuitRedisStorage(CLOSED, client, "clock", max_staleness=max_staleness)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=storage)
    if max_staleness:
        return settled(breaker)
    assert is_admitted(breaker)
    return breaker


def is_admitted(breaker: CircuitBreaker) -> bool:
    """Return whether a call is admitted."""
    with contextlib.suppress(CircuitBreakerError):
        return bool(breaker.call(lambda: True))
    return False


def apply_elsewhere(server: ShiftedServer, *intents: Any) -> None:
    """Apply intents to the circuit as another process, which ends afterwards."""
    with contextlib.closing(server.client()) as client:
        engine = LuaEngine(client, KEYS, channel_of(KEYS, 0))
        for intent in intents:
            assert engine.execute(intent, None, CLOSED).accepted


def wait_for_rejection(breaker: CircuitBreaker) -> None:
    """Wait until the process notices that the circuit is open."""
    wait_for(lambda: not is_admitted(breaker), "a rejection", within=RESET_TIMEOUT_S)


def assert_probe_after(breaker: CircuitBreaker, began: float, *, least: float, most: float) -> None:
    """Assert that a call is admitted within a range of seconds after the trip."""
    wait_for(lambda: is_admitted(breaker), "a probe", within=60)
    assert least <= time.monotonic() - began < most + TOLERANCE_S


@pytest.mark.parametrize("step", but_for((20.0,), CLOCK_STEPS_S))
def test_clock_step_before_a_trip_keeps_the_reset_timeout(start: Start, max_staleness: float, step: float) -> None:
    """The waiting process has measured the old clock, and the trip of another process has the new time."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        server.set_clock(step)
        began = time.monotonic()
        # The failure is published, too, and is the first message with the new time.
        apply_elsewhere(server, RecordFailure(None, "", 1000), Trip(None, ""))
        wait_for_rejection(breaker)
        assert_probe_after(breaker, began, least=RESET_TIMEOUT_S, most=RESET_TIMEOUT_S)


@pytest.mark.parametrize("tripping", ["own", "other"])
@pytest.mark.parametrize("step", but_for((20.0,), CLOCK_STEPS_S))
@pytest.mark.full
def test_clock_step_while_open_keeps_the_reset_timeout(
    start: Start, max_staleness: float, step: float, tripping: str
) -> None:
    """The record has a time of the old clock. The waiting process waits for the rest of the timeout."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        if tripping == "own":
            with pytest.raises(CircuitBreakerError):
                breaker.call(lambda: 1 / 0)
        else:
            apply_elsewhere(server, Trip(None, ""))
        wait_for_rejection(breaker)
        server.set_clock(step)
        assert_probe_after(breaker, began, least=RESET_TIMEOUT_S, most=RESET_TIMEOUT_S)


@pytest.mark.full
def test_clock_set_back_does_not_prolong_the_lease_of_a_dead_prober(start: Start, max_staleness: float) -> None:
    """No probe is admitted before the end of the lease, and one is admitted within a second lease."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        apply_elsewhere(server, Trip(None, ""), ClaimProbe(1, "a0", round(LEASE_S * 1000)))
        wait_for_rejection(breaker)
        server.set_clock(-20)
        assert_probe_after(breaker, began, least=LEASE_S, most=2 * LEASE_S)


@pytest.mark.full
def test_clock_set_back_leaves_a_record_that_new_processes_read(start: Start) -> None:
    """A process that never saw the circuit waits for one reset timeout."""
    server = start()
    with contextlib.closing(server.client()) as client:
        apply_elsewhere(server, Load(), Trip(None, ""))
        server.set_clock(-20)
        storage = CircuitRedisStorage(CLOSED, client, "clock", max_staleness=0)
        new_breaker = CircuitBreaker(reset_timeout=RESET_TIMEOUT_S, state_storage=storage)
        began = time.monotonic()
        assert new_breaker.current_state == OPEN
        assert_probe_after(new_breaker, began, least=RESET_TIMEOUT_S, most=RESET_TIMEOUT_S)


class FailoverPair:
    """A master, its replica with another clock, and a proxy to the server in use.

    Args:
        start: Function that starts servers.
        ahead: Seconds by which the replica's clock is ahead.
    """

    def __init__(self, start: Start, ahead: float) -> None:
        self.master = start(port=free_port())
        self.replica = start(port=free_port())
        self._ahead = ahead
        self.proxy = Proxy(self.master.unix_socket)
        with contextlib.closing(self.replica.client()) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self.master.port))
            wait_for(
                lambda: client.info("replication")["master_link_status"] == "up", "the link to the master", within=30
            )

    def client(self) -> redis.Redis:
        """Return a client of the server in use."""
        return redis.Redis(host="127.0.0.1", port=self.proxy.port)

    def fail_over(self) -> None:
        """Make the replica the server in use, with everything that the master has."""
        with contextlib.closing(self.master.client()) as master, contextlib.closing(self.replica.client()) as replica:
            master.set("last", "write")
            wait_for(lambda: replica.get("last"), "the last write")
            # An earlier step of a replica's clock would delay its replication.
            self.replica.set_clock(self._ahead)
            replica.execute_command("REPLICAOF", "NO", "ONE")
        self.proxy.serve(self.replica.unix_socket)
        self.master.stop()


@pytest.mark.parametrize("ahead", [-5.0, -60.0, 60.0])
@pytest.mark.full
def test_failover_to_another_clock_keeps_the_reset_timeout(start: Start, max_staleness: float, ahead: float) -> None:
    """An open circuit stays open for the rest of the reset timeout on the new server."""
    pair = FailoverPair(start, ahead)
    with contextlib.closing(pair.proxy), contextlib.closing(pair.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        with pytest.raises(CircuitBreakerError):
            breaker.call(lambda: 1 / 0)
        pair.fail_over()
        assert_probe_after(breaker, began, least=RESET_TIMEOUT_S, most=RESET_TIMEOUT_S)


@pytest.mark.full
def test_failover_to_a_slower_clock_does_not_prolong_a_lease(start: Start, max_staleness: float) -> None:
    """A process waits for at most two leases, however far the new clock is behind."""
    pair = FailoverPair(start, -60)
    with contextlib.closing(pair.proxy), contextlib.closing(pair.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        apply_elsewhere(pair.master, Trip(None, ""), ClaimProbe(1, "a0", round(LEASE_S * 1000)))
        wait_for_rejection(breaker)
        pair.fail_over()
        assert_probe_after(breaker, began, least=LEASE_S, most=2 * LEASE_S)
