"""Time of a guarded call, for several contenders in turn.

The contenders run in rounds, A B C A B C …, a short leg each.  A disturbance of the machine affects all of them, and
compared figures come from the same second.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import redis

from benchmarks.contenders import NEVER, Contender, Guard, Terms
from pybreaker_redis.testing.servers import PrivateServer

Action = Literal["success", "rejected", "failure"]
ACTIONS: tuple[Action, ...] = ("success", "rejected", "failure")

#: Seconds within which a circuit must open, and the threads of a leg must end.
DEADLINE_S = 30.0

#: Seconds within which a circuit must settle.
WARM_UP_S = 2.0

#: Bursts in a row that must cost the same until a circuit has settled.
_SETTLED_BURSTS = 4

#: As many bursts if calls cost round trips: a listener may take half a second until it notices a new circuit.
_BUSY_BURSTS = 12

#: Duration of a burst, in seconds.
_BURST_S = 0.05

_circuits = itertools.count()


class Down(Exception):
    """Error of the dependency while it is down."""


class Unexpected(Exception):
    """Result of a call that contradicts its action, so the measurement is invalid."""


def up() -> None:
    """Succeed, as a healthy dependency."""


def down() -> None:
    """Fail, as a dependency that is down."""
    raise Down


@dataclass(frozen=True, slots=True)
class Span:
    """Time that some calls of one thread took.

    Attributes:
        began: Time of the begin, in seconds.
        ended: Time of the end, in seconds.
        cpu: CPU time of the thread, in seconds.
    """

    began: float
    ended: float
    cpu: float


@dataclass
class Entrant:
    """Contender with a circuit that is ready for one action.

    Attributes:
        name: Name of the contender.
        action: Result of each call.
        call: Function that makes one guarded call.
        ends_with: Exception that each call raises, or ``None``.
        calls: Number of calls of a thread in one leg.
        seconds: Time per call of each leg, in seconds.
        cpu_seconds: CPU time of the calling threads per call of each leg, in seconds.
    """

    name: str
    action: Action
    call: Callable[[], Any]
    ends_with: type[Exception] | None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def run(self, calls: int) -> Span:
        """Make a number of calls, and return the times of begin and end."""
        call, ends_with = self.call, self.ends_with
        cpu_before, began = time.thread_time(), time.perf_counter()
        if ends_with is None:
            for _ in range(calls):
                call()
        else:
            for _ in range(calls):
                try:
                    call()
                except ends_with:
                    continue
                raise Unexpected(f"{self.name}: a call did not end as {self.action}")
        return Span(began, time.perf_counter(), time.thread_time() - cpu_before)


#: Function that creates a client.
Connect = Callable[[], redis.Redis]


@contextlib.contextmanager
def guard_of(contender: Contender, connect: Connect, **terms: Any) -> Iterator[Guard]:
    """Yield a guard with a new circuit and a new client."""
    with contextlib.closing(connect()) as client:
        guard = contender.make(Terms(f"benchmark-{next(_circuits)}", **terms), client)
        try:
            yield guard
        finally:
            guard.close()


@contextlib.contextmanager
def entrant(
    contender: Contender, action: Action, server: PrivateServer, connect: Connect | None = None
) -> Iterator[Entrant]:
    """Yield an entrant with a settled circuit, which is open for the action ``rejected``.

    Args:
        contender: Way to guard the call.
        action: Result of each call.
        server: Server that has the circuit.
        connect: Function that creates a client of that server.  ``None``: a usual client.
    """
    with guard_of(contender, connect or server.client, fail_max=1 if action == "rejected" else NEVER) as guard:
        call = guard.around(down if action == "failure" else up)
        if action == "rejected":
            open_circuit(guard, call)
        ends_with = {"success": None, "rejected": guard.rejection, "failure": Down}[action]
        made = Entrant(contender.name, action, call, ends_with)
        if contender.shares:
            settle(made, server)
        yield made


def open_circuit(guard: Guard, call: Callable[[], Any]) -> None:
    """Fail until the circuit rejects calls."""
    failing = guard.around(down)
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        with contextlib.suppress(Down, guard.rejection):
            failing()
        try:
            call()
        except guard.rejection:
            return
    raise Unexpected("the circuit did not open")


def settle(entrant: Entrant, server: PrivateServer) -> None:
    """Call until bursts of calls cost the server the same, for `WARM_UP_S` at most.

    A circuit that subscribes to changes queries the server until the subscription is active.
    """
    with contextlib.closing(server.client()) as client:

        def reads() -> int:
            return int(client.info("stats")["total_reads_processed"])

        costs: list[float] = []
        until = time.monotonic() + WARM_UP_S
        while time.monotonic() < until:
            burst_until, before, calls = time.monotonic() + _BURST_S, reads(), 0
            while time.monotonic() < burst_until:
                entrant.run(1)
                calls += 1
            costs.append((reads() - before) / calls)
            last = costs[-_SETTLED_BURSTS:]
            is_free = max(last) < 0.1
            if len(costs) >= (_SETTLED_BURSTS if is_free else _BUSY_BURSTS) and max(last) - min(last) < 0.1:
                return


class Race:
    """Rounds in which all entrants run in turn.

    Usable as a context manager, which ends the threads.

    Args:
        entrants: Entrants, in the order in which they run.
        threads: Number of threads that share each circuit.
        leg: Approximate duration of an entrant's leg, in seconds.
    """

    def __init__(self, entrants: Sequence[Entrant], *, threads: int, leg: float) -> None:
        self.entrants = list(entrants)
        self._threads = threads
        self._start = threading.Barrier(threads)
        self._crew = ThreadPoolExecutor(threads)
        for runner in self.entrants:
            self._find_calls(runner, leg)

    def round(self) -> None:
        """Run one leg of each entrant."""
        for runner in self.entrants:
            seconds, cpu_seconds = self._leg(runner)
            runner.seconds.append(seconds)
            runner.cpu_seconds.append(cpu_seconds)

    def _leg(self, runner: Entrant) -> tuple[float, float]:
        """Run a leg, and return wall time and CPU time per call over all threads, in seconds."""
        if self._threads == 1:
            spans = [runner.run(runner.calls)]
        else:
            legs = [self._crew.submit(self._run_together, runner) for _ in range(self._threads)]
            spans = [leg.result(DEADLINE_S) for leg in legs]
        seconds = max(span.ended for span in spans) - min(span.began for span in spans)
        calls = runner.calls * self._threads
        return seconds / calls, sum(span.cpu for span in spans) / calls

    def _run_together(self, runner: Entrant) -> Span:
        self._start.wait(DEADLINE_S)
        return runner.run(runner.calls)

    def _find_calls(self, runner: Entrant, leg: float) -> None:
        while (seconds := self._leg(runner)[0] * runner.calls * self._threads) < leg / 2:
            runner.calls *= 2
        runner.calls = max(1, round(runner.calls * leg / seconds))

    def __enter__(self) -> Race:
        # Objects of pytest are excluded from garbage collections during the legs.
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        self._crew.shutdown()


@contextlib.contextmanager
def race_of(
    runners: Iterable[tuple[Contender, Action]],
    server: PrivateServer,
    *,
    threads: int = 1,
    leg: float,
    connect: Connect | None = None,
) -> Iterator[Race]:
    """Yield a race of contenders.

    Args:
        runners: Contenders, each with the result of its calls, in the order in which they run.
        server: Server that has the circuits.
        threads: Number of threads that share each circuit.
        leg: Approximate duration of an entrant's leg, in seconds.
        connect: Function that creates a client of that server.  ``None``: a usual client.
    """
    with contextlib.ExitStack() as stack:
        entrants = [stack.enter_context(entrant(item, action, server, connect)) for item, action in runners]
        yield stack.enter_context(Race(entrants, threads=threads, leg=leg))
