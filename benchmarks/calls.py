"""How long does a guarded call take, for several contenders in turn?

Knows: contenders, clocks, threads, when a circuit has settled.  Does not know: pytest, tables.

The contenders run in rounds, A B C A B C …, a short leg each: whatever disturbs the machine disturbs them all, and what
is compared was measured within the same second.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.contenders import NEVER, Contender, Guard, Terms
from pybreaker_redis.testing.servers import PrivateServer

Action = Literal["success", "rejected", "failure"]
ACTIONS: tuple[Action, ...] = ("success", "rejected", "failure")

#: Seconds after which a circuit has to be open, and a crew back from its leg.
DEADLINE = 30.0

#: Longest time that a circuit has to settle, seconds.
WARM_UP = 2.0

# A circuit has settled when so many bursts in a row cost the same.
_BURSTS = 4
_BURST = 0.05

_circuits = itertools.count()


class Down(Exception):
    """What the dependency raises when it is down."""


class Unexpected(Exception):
    """A call ended otherwise than the action says: what was measured is something else."""


def up() -> None:
    """The dependency, well."""


def down() -> None:
    """The dependency, down."""
    raise Down


@dataclass
class Entrant:
    """A contender whose circuit is ready for one action.

    Attributes:
        name: Of the contender.
        action: What each call is.
        call: One guarded call.
        ends_with: The exception that each call ends with, if any.
        calls: How many make up a leg, for each thread.
        seconds: What a call took, leg by leg.
    """

    name: str
    action: Action
    call: Callable[[], Any]
    ends_with: type[Exception] | None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    def run(self, calls: int) -> tuple[float, float]:
        """Call so often; when it began and ended."""
        call, ends_with = self.call, self.ends_with
        began = time.perf_counter()
        if ends_with is None:
            for _ in range(calls):
                call()
        else:
            for _ in range(calls):
                try:
                    call()
                except ends_with:
                    continue
                raise Unexpected(f"{self.name}: a call that was to be a {self.action} was none")
        return began, time.perf_counter()


@contextlib.contextmanager
def guard_of(contender: Contender, server: PrivateServer, **terms: Any) -> Iterator[Guard]:
    """A new circuit, with a client of its own."""
    with contextlib.closing(server.client()) as client:
        guard = contender.make(Terms(f"benchmark-{next(_circuits)}", **terms), client)
        try:
            yield guard
        finally:
            guard.close()


@contextlib.contextmanager
def entrant(contender: Contender, action: Action, server: PrivateServer) -> Iterator[Entrant]:
    """A contender's circuit, open if calls are to be rejected, and settled."""
    with guard_of(contender, server, fail_max=1 if action == "rejected" else NEVER) as guard:
        call = guard.around(down if action == "failure" else up)
        if action == "rejected":
            open_circuit(guard, call)
        ends_with = {"success": None, "rejected": guard.rejection, "failure": Down}[action]
        made = Entrant(contender.name, action, call, ends_with)
        if contender.shares:
            settle(made, server)
        yield made


def open_circuit(guard: Guard, call: Callable[[], Any]) -> None:
    """Let the dependency fail until calls are rejected."""
    failing = guard.around(down)
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        with contextlib.suppress(Down, guard.rejection):
            failing()
        try:
            call()
        except guard.rejection:
            return
    raise Unexpected("the circuit does not open")


def settle(entrant: Entrant, server: PrivateServer) -> None:
    """Call until the calls of a burst cost the server as much as those before; for `WARM_UP` at most.

    A circuit that is told of changes has to subscribe first, and asks until it has.
    """
    with contextlib.closing(server.client()) as client:

        def reads() -> int:
            return int(client.info("stats")["total_reads_processed"])

        costs: list[float] = []
        until = time.monotonic() + WARM_UP
        while time.monotonic() < until:
            burst_until, before, calls = time.monotonic() + _BURST, reads(), 0
            while time.monotonic() < burst_until:
                entrant.run(1)
                calls += 1
            costs.append((reads() - before) / calls)
            last = costs[-_BURSTS:]
            if len(last) == _BURSTS and max(last) - min(last) < 0.1:
                return


class Race:
    """Rounds of all entrants.

    Usable as a context manager, which ends the threads.

    Args:
        entrants: Who runs, in this order.
        threads: How many share each circuit.
        leg: How long each entrant runs in a round, seconds, more or less.
    """

    def __init__(self, entrants: Sequence[Entrant], *, threads: int, leg: float) -> None:
        self.entrants = list(entrants)
        self._threads = threads
        self._start = threading.Barrier(threads)
        self._crew = ThreadPoolExecutor(threads)
        for runner in self.entrants:
            self._find_calls(runner, leg)

    def round(self) -> None:
        """One leg of each."""
        for runner in self.entrants:
            runner.seconds.append(self._leg(runner))

    def _leg(self, runner: Entrant) -> float:
        """Seconds per call: of wall time, over the calls of all threads."""
        if self._threads == 1:
            spans = [runner.run(runner.calls)]
        else:
            legs = [self._crew.submit(self._run_together, runner) for _ in range(self._threads)]
            spans = [leg.result(DEADLINE) for leg in legs]
        seconds = max(ended for _, ended in spans) - min(began for began, _ in spans)
        return seconds / (runner.calls * self._threads)

    def _run_together(self, runner: Entrant) -> tuple[float, float]:
        self._start.wait(DEADLINE)
        return runner.run(runner.calls)

    def _find_calls(self, runner: Entrant, leg: float) -> None:
        while (seconds := self._leg(runner) * runner.calls * self._threads) < leg / 2:
            runner.calls *= 2
        runner.calls = max(1, round(runner.calls * leg / seconds))

    def __enter__(self) -> Race:
        # What pytest has allocated is not to be searched for garbage in somebody's leg.
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        self._crew.shutdown()
