"""How long after a transition in one process do the others see it?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.contenders import STORAGES
from benchmarks.figures import percentile, short, table
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import Fleet, Make, Spec, Worker

#: Processes that look.
OBSERVERS = 4

#: Pause between two looks, seconds: short beside what is measured, long enough that nobody is short of CPU.
GLANCE = 0.0002

#: Pause before a transition, seconds: a listener reads changed circuits 100 times a second at most.
PAUSE = 0.03

#: Seconds in which a transition must be seen.
DEADLINE = 10.0


def begin(worker: Worker) -> None:
    """Two guarded calls, with which listening begins, and time for it to begin."""
    for _ in range(2):
        worker.breaker.call(lambda: None)
    time.sleep(0.5)


def see(worker: Worker, state: str) -> float:
    """Look until the circuit is seen in `state`; the monotonic time of that."""
    worker.report("looking")
    until = time.monotonic() + DEADLINE
    while worker.breaker.current_state != state:
        if time.monotonic() > until:
            raise TimeoutError(f"the circuit is not seen {state}")
        time.sleep(GLANCE)
    return time.monotonic()


def turn(worker: Worker, verb: Literal["open", "close"]) -> tuple[float, float]:
    """An operator's ``breaker.open()`` or ``close()``; the monotonic times at which it began and returned."""
    began = time.monotonic()
    getattr(worker.breaker, verb)()
    return began, time.monotonic()


def pings(worker: Worker, times: int) -> list[float]:
    """What a round trip takes, seconds."""
    spans = []
    for _ in range(times):
        began = time.monotonic()
        worker.client.ping()
        spans.append(time.monotonic() - began)
        time.sleep(GLANCE)
    return spans


@dataclass
class Seen:
    """What was measured, seconds.

    Attributes:
        call: What the call that made the transition took.
        since_begin: From its beginning until an observer saw the transition.
        since_return: From its return; negative where the observer was earlier than the one who called.
    """

    call: list[float] = field(default_factory=list)
    since_begin: list[float] = field(default_factory=list)
    since_return: list[float] = field(default_factory=list)

    def add(self, began: float, returned: float, seen: Sequence[float]) -> None:
        """One transition."""
        self.call.append(returned - began)
        self.since_begin += [at - began for at in seen]
        self.since_return += [at - returned for at in seen]

    def figures(self) -> dict[str, float]:
        """The columns of the table, seconds."""
        return {
            "the call": percentile(self.call, 50),
            "seen, p50": percentile(self.since_begin, 50),
            "p99": percentile(self.since_begin, 99),
            "max": max(self.since_begin),
            "from its return, p50": percentile(self.since_return, 50),
            "from its return, p99": percentile(self.since_return, 99),
        }


def test_propagation(
    quick: bool, server: PrivateServer, tmp_path: Path, benchmark: Any, show: Callable[[str], None]
) -> None:
    """The call that makes a transition makes several round trips, and with one of them the transition is true."""
    transitions = 40 if quick else 400
    seen: dict[Make, Seen] = {make: Seen() for make in STORAGES}
    fleets: dict[Make, Fleet] = {}

    def transition(verb: Literal["open", "close"], state: str) -> None:
        for make, fleet in fleets.items():
            operator, *observers = fleet.workers
            for observer in observers:
                observer.begin(see, state)
            for observer in observers:
                observer.wait_for("looking")
            time.sleep(PAUSE)
            began, returned = operator.run(turn, verb)
            seen[make].add(began, returned, [observer.result() for observer in observers])

    def there_and_back() -> None:
        transition("open", "open")
        transition("close", "closed")

    with contextlib.ExitStack() as stack:
        for make in STORAGES:
            spec = Spec(make, server.unix_socket, str(tmp_path / make), namespace=make)
            fleets[make] = stack.enter_context(Fleet([spec] * (1 + OBSERVERS)))
            fleets[make].run(begin)
        benchmark.pedantic(there_and_back, rounds=transitions // 2)
        ping = percentile(fleets["stock"][0].run(pings, transitions), 50)
    figures = {make: seen[make].figures() for make in STORAGES}
    benchmark.extra_info.update(figures, ping=ping)
    show(
        table(
            f"A transition as seen by {OBSERVERS} other processes that look every {GLANCE * 1000} ms, milliseconds; "
            f"{transitions} transitions",
            ["", *figures["ours"], "p50, in PINGs"],
            [
                [STORAGES[make], *(short(value * 1000) for value in of.values()), short(of["seen, p50"] / ping)]
                for make, of in figures.items()
            ],
            "Measured from the beginning of the ``open()`` or ``close()`` that makes the transition, and from its "
            f"return; below zero: before it. A PING takes {short(ping * 1000)} ms.",
        )
    )
