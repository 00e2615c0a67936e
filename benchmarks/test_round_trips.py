"""How many round trips does each step of a circuit make, counted at the server?"""

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

#: What is counted, in the order of the table.
STEPS = (*ACTIONS, "trip", "recovery")

#: Of the circuits that recover, seconds.  A whole number: lasier knows no others.
RESET_TIMEOUT = 1.0

#: Seconds in which they have to recover.
DEADLINE = 10.0

#: Seconds for which they are in use before they trip: interlock's thread connects after one.
USE = 1.2

#: Seconds after a step in which what it makes others do is counted, too: interlock's thread writes behind its back.
AFTERMATH = 0.03


def test_round_trips(quick: bool, server: PrivateServer, show: Callable[[str], None]) -> None:
    """Medians: of a heartbeat or a poll, which come once or twice a second, now and then one falls into a step."""
    calls, lives = (5, 3) if quick else (15, 7)
    costs = {
        item.name: counted_calls(item, server, calls) | counted_changes(item, server, lives)
        for item in at_hand(sharing=True)
    }
    rows = [[name, *(str(round(percentile(cost[step], 50))) for step in STEPS)] for name, cost in costs.items()]
    show(table("Round trips, counted at the server", ["", *STEPS], rows))


def counted_calls(contender: Contender, server: PrivateServer, times: int) -> dict[str, list[int]]:
    """What calls cost that change no state."""
    costs: dict[str, list[int]] = {}
    for action in ACTIONS:
        with entrant(contender, action, server) as made, contextlib.closing(Meter(server)) as meter:
            costs[action] = [cost(meter, partial(made.run, 1))[0] for _ in range(times)]
    return costs


@dataclass
class Life:
    """A circuit that the next failure trips.

    Attributes:
        succeed: A call of the dependency while it is well.
        fail: One while it is down.
        rejection: What is raised instead.
    """

    succeed: Callable[[], object]
    fail: Callable[[], object]
    rejection: type[Exception]

    def trip(self) -> None:
        """One failure.  Some answer it with the dependency's exception, some with a rejection."""
        try:
            self.fail()
        except (Down, self.rejection):
            return
        raise Unexpected("the failure was not raised")

    def is_admitted(self) -> bool:
        """One call; whether it reached the dependency."""
        try:
            self.succeed()
        except self.rejection:
            return False
        return True


@contextlib.contextmanager
def life(contender: Contender, server: PrivateServer) -> Iterator[Life]:
    """A new circuit, settled."""
    with guard_of(contender, server, fail_max=1, reset_timeout=RESET_TIMEOUT) as guard:
        made = Life(guard.around(up), guard.around(down), guard.rejection)
        settle(Entrant(contender.name, "success", made.succeed, None), server)
        yield made


def counted_changes(contender: Contender, server: PrivateServer, lives: int) -> dict[str, list[int]]:
    """What a trip costs, and what the first call does that is admitted again; circuits are called all the time."""
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(life(contender, server)) for _ in range(lives)]
        meter = stack.enter_context(contextlib.closing(Meter(server)))
        until = time.monotonic() + USE
        while time.monotonic() < until:
            for circuit in waiting:
                circuit.succeed()
            time.sleep(AFTERMATH)
        trips = [cost(meter, circuit.trip)[0] for circuit in waiting]
        recoveries = []
        until = time.monotonic() + DEADLINE
        while waiting:
            for circuit in list(waiting):
                round_trips, admitted = cost(meter, circuit.is_admitted)
                if admitted:
                    recoveries.append(round_trips)
                    waiting.remove(circuit)
            if time.monotonic() > until:
                raise Unexpected(f"{contender.name}: {len(waiting)} of {lives} circuits do not recover")
        return {"trip": trips, "recovery": recoveries}


def cost(meter: Meter, step: Callable[[], T]) -> tuple[int, T]:
    """Round trips of a step and its aftermath, and what it returned."""
    returned: list[T] = []

    def watched() -> None:
        returned.append(step())
        time.sleep(AFTERMATH)

    return meter.cost(watched), returned[0]
