"""Benchmark: time from a transition in one process until other processes see it."""

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

#: Number of processes that observe the circuit.
OBSERVERS = 4

#: Pause between two reads, in seconds: short compared with the results, long enough to leave the CPU free.
READ_INTERVAL_S = 0.0002

#: Pause before a transition, in seconds: a listener reads changed circuits 100 times a second at most.
PAUSE_S = 0.03

#: Seconds within which each observer must see a transition.
DEADLINE_S = 10.0


def begin(worker: Worker) -> None:
    """Start the listener by two guarded calls, and wait for its subscription."""
    for _ in range(2):
        worker.breaker.call(lambda: None)
    time.sleep(0.5)


def see(worker: Worker, state: str) -> float:
    """Read the circuit until it is in `state`, and return the monotonic time of that read."""
    worker.report("looking")
    until = time.monotonic() + DEADLINE_S
    while worker.breaker.current_state != state:
        if time.monotonic() > until:
            raise TimeoutError(f"the circuit did not become {state} within {DEADLINE_S} s")
        time.sleep(READ_INTERVAL_S)
    return time.monotonic()


def turn(worker: Worker, verb: Literal["open", "close"]) -> tuple[float, float]:
    """Call ``breaker.open()`` or ``close()``, and return the monotonic times of begin and return."""
    began = time.monotonic()
    getattr(worker.breaker, verb)()
    return began, time.monotonic()


def pings(worker: Worker, times: int) -> list[float]:
    """Measure round trips, in seconds."""
    spans = []
    for _ in range(times):
        began = time.monotonic()
        worker.client.ping()
        spans.append(time.monotonic() - began)
        time.sleep(READ_INTERVAL_S)
    return spans


@dataclass
class Seen:
    """Measured times, in seconds.

    Attributes:
        call: Durations of the calls that made a transition.
        since_begin: Times from the begin of such a call until an observer saw the transition.
        since_return: Times from its return.  Negative values come from observers that were earlier than the caller.
    """

    call: list[float] = field(default_factory=list)
    since_begin: list[float] = field(default_factory=list)
    since_return: list[float] = field(default_factory=list)

    def add(self, began: float, returned: float, seen: Sequence[float]) -> None:
        """Add the times of one transition."""
        self.call.append(returned - began)
        self.since_begin += [at - began for at in seen]
        self.since_return += [at - returned for at in seen]

    def figures(self) -> dict[str, float]:
        """Return the columns of the table, in seconds."""
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
    """A call that makes a transition needs several round trips, and one of them commits the transition."""
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
            time.sleep(PAUSE_S)
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
            f"A transition as seen by {OBSERVERS} other processes that read every {READ_INTERVAL_S * 1000} ms, "
            f"milliseconds; {transitions} transitions",
            ["", *figures["ours"], "p50, in PINGs"],
            [
                [STORAGES[make], *(short(value * 1000) for value in of.values()), short(of["seen, p50"] / ping)]
                for make, of in figures.items()
            ],
            "Measured from the beginning of the ``open()`` or ``close()`` that makes the transition, and from its "
            f"return; below zero: before it. A PING takes {short(ping * 1000)} ms.",
        )
    )
