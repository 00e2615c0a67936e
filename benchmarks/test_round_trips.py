"""Benchmark: round trips of each step of a circuit, counted at the server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from benchmarks.calls import ACTIONS, Down, Entrant, Unexpected, down, entrant, guard_of, settle, up
from benchmarks.contenders import Contender, at_hand
from benchmarks.figures import percentile, table
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.round_trips import Meter

T = TypeVar("T")

#: Steps that are counted, in the order of the table.
STEPS = (*ACTIONS, "trip", "recovery")

#: Reset timeout of circuits that recover, in whole seconds, because lasier accepts no fractions.
RESET_TIMEOUT_S = 1.0

#: Seconds within which these circuits must recover.
DEADLINE_S = 10.0

#: Seconds of use before a circuit is tripped: interlock's thread connects after one second.
USE_S = 1.2

#: Seconds after a step in which round trips of background threads count, too: interlock's thread writes later.
AFTERMATH_S = 0.03


def test_round_trips(quick: bool, server: PrivateServer, show: Callable[[str], None]) -> None:
    """The figures are medians, because a heartbeat or a poll may fall into a step now and then."""
    calls, lives = (5, 3) if quick else (15, 7)
    # Each contender takes a few seconds until its circuit has settled.
    contenders = [item for item in at_hand(sharing=True) if not quick or item.is_own]
    costs = {
        item.name: counted_calls(item, server, calls) | counted_changes(item, server, lives) for item in contenders
    }
    rows = [[name, *(str(round(percentile(cost[step], 50))) for step in STEPS)] for name, cost in costs.items()]
    show(table("Round trips, counted at the server", ["", *STEPS], rows))


def counted_calls(contender: Contender, server: PrivateServer, times: int) -> dict[str, list[int]]:
    """Return the round trips of calls that change no state."""
    costs: dict[str, list[int]] = {}
    for action in ACTIONS:
        with entrant(contender, action, server) as made, contextlib.closing(Meter(server)) as meter:
            costs[action] = [cost(meter, partial(made.run, 1))[0] for _ in range(times)]
    return costs


@dataclass
class Life:
    """Circuit that the next failure opens.

    Attributes:
        succeed: Function that calls the healthy dependency.
        fail: Function that calls the dependency while it is down.
        rejection: Exception of a rejected call.
    """

    succeed: Callable[[], object]
    fail: Callable[[], object]
    rejection: type[Exception]

    def trip(self) -> None:
        """Fail once.  Some packages raise the dependency's exception, others a rejection."""
        try:
            self.fail()
        except (Down, self.rejection):
            return
        raise Unexpected("the failure was not raised")

    def try_call(self) -> bool:
        """Call once, and return whether the call reached the dependency."""
        try:
            self.succeed()
        except self.rejection:
            return False
        return True


@contextlib.contextmanager
def life(contender: Contender, server: PrivateServer) -> Iterator[Life]:
    """Yield a new circuit that has settled."""
    with guard_of(contender, server.client, fail_max=1, reset_timeout=RESET_TIMEOUT_S) as guard:
        made = Life(guard.around(up), guard.around(down), guard.rejection)
        settle(Entrant(contender.name, "success", made.succeed, None), server)
        yield made


def counted_changes(contender: Contender, server: PrivateServer, lives: int) -> dict[str, list[int]]:
    """Return the round trips of trips, and of the first calls that are admitted again."""
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(life(contender, server)) for _ in range(lives)]
        meter = stack.enter_context(contextlib.closing(Meter(server)))
        until = time.monotonic() + USE_S
        while time.monotonic() < until:
            for circuit in waiting:
                circuit.succeed()
            time.sleep(AFTERMATH_S)
        trips = [cost(meter, circuit.trip)[0] for circuit in waiting]
        recoveries = []
        until = time.monotonic() + DEADLINE_S
        while waiting:
            for circuit in list(waiting):
                round_trips, admitted = cost(meter, circuit.try_call)
                if admitted:
                    recoveries.append(round_trips)
                    waiting.remove(circuit)
            if time.monotonic() > until:
                raise Unexpected(f"{contender.name}: {len(waiting)} of {lives} circuits did not recover")
        return {"trip": trips, "recovery": recoveries}


def cost(meter: Meter, step: Callable[[], T]) -> tuple[int, T]:
    """Return the round trips of a step and its aftermath, and the result of the step."""
    returned: list[T] = []

    def watched() -> None:
        returned.append(step())
        time.sleep(AFTERMATH_S)

    return meter.cost(watched), returned[0]
