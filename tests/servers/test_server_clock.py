"""The server's clock is set, or a server with another clock takes over: timeouts and leases keep their lengths."""

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

#: Seconds.
RESET_TIMEOUT = 1.5
LEASE = 1.5

#: Seconds; far less than any step, and more than a busy machine is late.
LATE = 6.0

#: Seconds by which a clock is set forward or back.
STEPS = but_for((20.0,), (20.0, -20.0))

KEYS = circuit_keys("clock", needs_one_slot=False)

Start = Callable[..., ShiftedServer]


@pytest.fixture
def start(preferred: FoundServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers with clocks of their own."""
    folder = tmp_path_factory.getbasetemp()
    with contextlib.ExitStack() as stack:

        def started(**words: Any) -> ShiftedServer:
            server = ShiftedServer(preferred.binary, folder, args=["--repl-diskless-sync-delay", "0"], **words)
            stack.enter_context(contextlib.closing(server))
            return server.start()

        yield started


@pytest.fixture(params=but_for((1.0,), (1.0, 0)), ids=["listens", "asks"])
def max_staleness(request: pytest.FixtureRequest) -> float:
    """Whether the process that waits listens for changes, or asks the server at each look."""
    return float(request.param)


def breaker_of(client: Any, max_staleness: float) -> CircuitBreaker:
    """A breaker that has made a call, and needs no round trip for the next one if it listens."""
    storage = CircuitRedisStorage(CLOSED, client, "clock", max_staleness=max_staleness)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=storage)
    if max_staleness:
        return settled(breaker)
    assert passes(breaker)
    return breaker


def passes(breaker: CircuitBreaker) -> bool:
    """Whether a call passes."""
    with contextlib.suppress(CircuitBreakerError):
        return bool(breaker.call(lambda: True))
    return False


def other_process(server: ShiftedServer, *intents: Any) -> None:
    """What another process does to the circuit, which ends with that."""
    with contextlib.closing(server.client()) as client:
        engine = LuaEngine(client, KEYS, channel_of(KEYS, 0))
        for intent in intents:
            assert engine.execute(intent, None, CLOSED).accepted


def is_rejected(breaker: CircuitBreaker) -> None:
    """The process has noticed that the circuit is open."""
    wait_for(lambda: not passes(breaker), "a rejection", within=RESET_TIMEOUT)


def probes_after(breaker: CircuitBreaker, began: float, *, least: float, most: float) -> None:
    """A call passes so many seconds after the trip, and not before."""
    wait_for(lambda: passes(breaker), "a probe", within=60)
    assert least <= time.monotonic() - began < most + LATE


@pytest.mark.parametrize("step", STEPS)
def test_clock_set_before_a_trip_moves_no_gate(start: Start, max_staleness: float, step: float) -> None:
    """The process that waits has learned the clock as it was before; the trip of another one has the new time."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        server.set_clock(step)
        began = time.monotonic()
        # The failure is published, too, and is the first that has the new time.
        other_process(server, RecordFailure(None, "", 1000), Trip(None, ""))
        is_rejected(breaker)
        probes_after(breaker, began, least=RESET_TIMEOUT, most=RESET_TIMEOUT)


@pytest.mark.parametrize("tripper", ["own", "other"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.full
def test_clock_set_while_open_moves_no_gate(start: Start, max_staleness: float, step: float, tripper: str) -> None:
    """The time in the record is from before: the process that waits goes on waiting for the rest of the timeout."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        if tripper == "own":
            with pytest.raises(CircuitBreakerError):
                breaker.call(lambda: 1 / 0)
        else:
            other_process(server, Trip(None, ""))
        is_rejected(breaker)
        server.set_clock(step)
        probes_after(breaker, began, least=RESET_TIMEOUT, most=RESET_TIMEOUT)


@pytest.mark.full
def test_clock_set_back_does_not_prolong_the_lease_of_a_dead_prober(start: Start, max_staleness: float) -> None:
    """No probe before the lease is over; the next one after a second lease at most."""
    server = start()
    with contextlib.closing(server.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        other_process(server, Trip(None, ""), ClaimProbe(1, "a0", round(LEASE * 1000)))
        is_rejected(breaker)
        server.set_clock(-20)
        probes_after(breaker, began, least=LEASE, most=2 * LEASE)


@pytest.mark.full
def test_clock_set_back_leaves_a_record_that_newcomers_read(start: Start) -> None:
    """A process that never saw the circuit waits for one timeout from then on."""
    server = start()
    with contextlib.closing(server.client()) as client:
        other_process(server, Load(), Trip(None, ""))
        server.set_clock(-20)
        storage = CircuitRedisStorage(CLOSED, client, "clock", max_staleness=0)
        newcomer = CircuitBreaker(reset_timeout=RESET_TIMEOUT, state_storage=storage)
        began = time.monotonic()
        assert newcomer.current_state == OPEN
        probes_after(newcomer, began, least=RESET_TIMEOUT, most=RESET_TIMEOUT)


# -- a server with another clock ---------------------------------------------------------------------------------------


class Pair:
    """A master, its replica with another clock, and the address at which clients find the one that serves.

    Args:
        start: Starts servers.
        ahead: Seconds by which the replica's clock is ahead.
    """

    def __init__(self, start: Start, ahead: float) -> None:
        self.master = start(port=free_port())
        self.replica = start(port=free_port())
        self._ahead = ahead
        self.proxy = Proxy(self.master.unix_socket)
        with contextlib.closing(self.replica.client()) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self.master.port))
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows", within=30)

    def client(self) -> redis.Redis:
        """A client of the server that serves."""
        return redis.Redis(host="127.0.0.1", port=self.proxy.port)

    def fail_over(self) -> None:
        """The replica has all that the master has, and serves from now on."""
        with contextlib.closing(self.master.client()) as master, contextlib.closing(self.replica.client()) as replica:
            master.set("last", "write")
            wait_for(lambda: replica.get("last"), "the last write")
            # Not earlier: to set the clock of a replica delays that it begins to follow.
            self.replica.set_clock(self._ahead)
            replica.execute_command("REPLICAOF", "NO", "ONE")
        self.proxy.serve(self.replica.unix_socket)
        self.master.stop()


@pytest.mark.parametrize("ahead", [-5.0, -60.0, 60.0])
@pytest.mark.full
def test_failover_to_another_clock_moves_no_gate(start: Start, max_staleness: float, ahead: float) -> None:
    """Open on the one server, and open for the rest of the timeout on the other."""
    pair = Pair(start, ahead)
    with contextlib.closing(pair.proxy), contextlib.closing(pair.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        with pytest.raises(CircuitBreakerError):
            breaker.call(lambda: 1 / 0)
        pair.fail_over()
        probes_after(breaker, began, least=RESET_TIMEOUT, most=RESET_TIMEOUT)


@pytest.mark.full
def test_failover_to_a_slower_clock_does_not_prolong_a_lease(start: Start, max_staleness: float) -> None:
    """A lease is waited for twice at most, however far the clock is behind."""
    pair = Pair(start, -60)
    with contextlib.closing(pair.proxy), contextlib.closing(pair.client()) as client:
        breaker = breaker_of(client, max_staleness)
        began = time.monotonic()
        other_process(pair.master, Trip(None, ""), ClaimProbe(1, "a0", round(LEASE * 1000)))
        is_rejected(breaker)
        pair.fail_over()
        probes_after(breaker, began, least=LEASE, most=2 * LEASE)
