"""Fleets of real processes that guard one dependency with one circuit.

A test controls each step of its workers.  It starts a function in a worker, waits until a call has *reached* the
dependency, and decides when and how that call ends.  The test thus chooses the order of events, and needs no sleep.
Every step has a deadline, and a worker that misses it is killed.  An exception of a worker is raised in the test with
its traceback.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import pybreaker

from pybreaker_redis import CircuitOpenError, CircuitRedisStorage
from tests.support.places import client_at
from tests.support.ways import settles_calls

#: Seconds that a step of a worker may take before the test fails and the fleet is killed.
DEADLINE = 30.0

#: Seconds for the end of a fleet after the test, before the fleet is killed.
PATIENCE = 5.0

#: Seconds after which a worker ends itself, even if the test process is gone.
LIFETIME = 120

#: Modules that the fork server imports once, so that a worker starts in milliseconds.  ``pytest`` is among them because
#: every worker imports the main module of the test process again.
PRELOAD = ["pytest", "redis", "pybreaker", "pybreaker_redis", "time_machine", "tests.support.fleet"]

#: Errors of rejected calls: of pybreaker's breaker, and of ours where our breaker settles the calls.
REJECTIONS = frozenset(("CircuitBreakerError", "CircuitOpenError"))

#: Origin of the storage under test: this package, or pybreaker's stock storage.
Make = Literal["ours", "stock"]

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()


class WorkerFailed(Exception):
    """A worker raised, died or missed its deadline.  The message carries its traceback."""


class DependencyDown(Exception):
    """The dependency's own error, raised while it is down."""


class ListenerFailed(Exception):
    """Error of a careless listener."""


# -- parts of a worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One worker's client, storage and breaker, as values that can be sent to another process.

    Attributes:
        make: Origin of the storage.
        place: Path of the server's unix socket, or an argument of `places.client_at`.
        log: File in which the dependency records its calls, one for the fleet.
        namespace: Namespace of the circuit.
        fail_max: As in ``pybreaker.CircuitBreaker``.
        reset_timeout: As in ``pybreaker.CircuitBreaker``, seconds.
        success_threshold: As in ``pybreaker.CircuitBreaker``.
        probe_lease: Seconds, for storages of this package only.
        max_staleness: Seconds, for storages of this package only.
        timeout: Seconds, for storages of this package only.  A fleet has more processes than the machine has cores, so
            the value is long: a slow answer must not count as an outage.
        fallback: As in ``pybreaker.CircuitRedisStorage``.
        clock_skew: Seconds by which this worker's wall clock is ahead.
        listener: ``record`` records each transition, ``look`` also reads ``current_state``, ``raise`` raises.
    """

    make: Make
    place: str
    log: str
    namespace: str = "fleet"
    fail_max: int = 5
    reset_timeout: float = 60.0
    success_threshold: int = 1
    probe_lease: float | None = None
    max_staleness: float | None = None
    timeout: float = 10.0
    fallback: str = "closed"
    clock_skew: float = 0.0
    listener: Literal["record", "look", "raise"] = "record"


@dataclass(frozen=True)
class Transition:
    """A transition that a worker's listener received.

    Attributes:
        worker: Number of the worker.
        at: Monotonic seconds, on the clock that all processes of a machine share.
        old: State before.
        new: State after.
        current: ``breaker.current_state`` at that moment, if the listener read it.
        noticed: Whether another breaker made the transition.  ``None``: unknown, by an unmodified breaker.
    """

    worker: int
    at: float
    old: str
    new: str
    current: str | None = None
    noticed: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """One guarded call, as its caller saw it.

    Attributes:
        worker: Number of the worker.
        began: Monotonic seconds at the begin of the call.
        ended: Monotonic seconds at the end of the call.
        reached: Whether the dependency was called.
        error: Name of the exception's type, or ``""``.
        message: Text of the exception.
    """

    worker: int
    began: float
    ended: float
    reached: bool
    error: str = ""
    message: str = ""

    @property
    def rejected(self) -> bool:
        """Whether the breaker refused the call without calling the dependency."""
        return self.error in REJECTIONS and not self.reached

    @property
    def tripped(self) -> bool:
        """Whether this call opened a closed circuit, according to its error."""
        return "Failures threshold reached" in self.message


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        mode = self._worker.spec.listener
        current = cb.current_state if mode == "look" else None
        self._worker.transitions.append(
            Transition(self._worker.index, time.monotonic(), getattr(old_state, "name", ""), new_state.name, current)
        )
        if mode == "raise":
            raise ListenerFailed(f"on the way to {new_state.name}")

    def transition(self, cb: Any, event: Any) -> None:
        """Record whether another breaker made the last transition.  Our breaker calls this after `state_change`."""
        self._worker.transitions[-1] = replace(self._worker.transitions[-1], noticed=event.noticed)


class Worker:
    """Breaker of a worker process, and its connection to the test."""

    def __init__(self, index: int, spec: Spec, line: Any) -> None:
        self.index = index
        self.spec = spec
        self.transitions: list[Transition] = []
        # Stock's only timeout is the client's: with retries a worker would hardly make a call in an outage.
        self.client = client_at(spec.place if ":" in spec.place else f"unix:{spec.place}")
        self.storage = make_storage(spec, self.client)
        self.breaker = pybreaker.CircuitBreaker(
            fail_max=spec.fail_max,
            reset_timeout=spec.reset_timeout,
            success_threshold=spec.success_threshold,
            listeners=[_Listener(self)],
            state_storage=self.storage,
        )
        self._line = line
        self._log = os.open(spec.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._reached = 0

    def report(self, word: str) -> None:
        """Report to the test that this worker has reached a step."""
        self._line.send(("report", word))

    @property
    def dismissed(self) -> bool:
        """Whether the test is over or gone, so that a loop should end early."""
        over: bool = self._line.poll()
        return over

    def wait_for_release(self) -> Any:
        """Wait until the test releases this worker, and return the value that it sent."""
        if not self._line.poll(DEADLINE):
            raise TimeoutError("the test did not release this worker in time")
        kind, value = self._line.recv()
        assert kind == "release", kind
        return value

    @contextlib.contextmanager
    def in_dependency(self) -> Iterator[None]:
        """Record begin and end of a call that reached the dependency, for all processes to see."""
        self._reached += 1
        call = f"{self.index}:{self._reached}"
        self.note(call, "begin")
        try:
            yield
        finally:
            self.note(call, "end")

    def note(self, call: str, what: str) -> None:
        """Record that a call reached the dependency or left it."""
        # One write of one short line to a file opened for appending is atomic.
        line = json.dumps([call, self.index, what, time.monotonic()]) + "\n"
        os.write(self._log, line.encode())

    def guarded(self, function: Callable[[], Any]) -> Outcome:
        """Make one guarded call and return its outcome, without raising an error of the breaker or the dependency."""
        before, began = self._reached, time.monotonic()
        error = message = ""
        try:
            self.breaker.call(function)
        except (pybreaker.CircuitBreakerError, DependencyDown, ListenerFailed) as exc:
            error, message = type(exc).__name__, str(exc)
            if error in REJECTIONS and isinstance(exc, CircuitOpenError) != settles_calls(self.breaker):
                raise WorkerFailed(f"{error} is the error of the other breaker") from exc
        return Outcome(self.index, began, time.monotonic(), self._reached > before, error, message)


def make_storage(spec: Spec, client: Any) -> Any:
    """Return a new storage for this worker."""
    if spec.make == "stock":
        return pybreaker.CircuitRedisStorage("closed", client, spec.namespace, spec.fallback)
    limits = {"probe_lease": spec.probe_lease, "max_staleness": spec.max_staleness, "timeout": spec.timeout}
    extra: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    return CircuitRedisStorage("closed", client, spec.namespace, spec.fallback, **extra)


# -- functions that a worker can run -----------------------------------------------------------------------------------


def call(worker: Worker, *, fail: bool = False, seconds: float = 0.0) -> Outcome:
    """Make one guarded call of this length."""

    def dependency() -> None:
        with worker.in_dependency():
            if seconds:
                time.sleep(seconds)
            if fail:
                raise DependencyDown

    return worker.guarded(dependency)


def calls(worker: Worker, count: int, *, fail: bool = False) -> list[Outcome]:
    """Make `count` guarded calls in a row."""
    return [call(worker, fail=fail) for _ in range(count)]


def uncounted_failures(worker: Worker, count: int) -> int:
    """Make `count` failing calls without a record, and return how many raised the dependency's own error."""

    def dependency() -> None:
        raise DependencyDown

    failures = 0
    for _ in range(count):
        try:
            worker.breaker.call(dependency)
        except DependencyDown:
            failures += 1
    return failures


def held_call(worker: Worker) -> Outcome:
    """Make one guarded call that reports ``reached`` and ends as the test decides: True is success."""

    def dependency() -> None:
        with worker.in_dependency():
            worker.report("reached")
            if not worker.wait_for_release():
                raise DependencyDown

    return worker.guarded(dependency)


def held_call_when_admitted(worker: Worker, within: float, every: float = 0.01) -> Outcome:
    """Make a held call, repeated while it is rejected, for at most `within` seconds."""
    until = time.monotonic() + within
    while True:
        outcome = held_call(worker)
        if not outcome.rejected or time.monotonic() > until or worker.dismissed:
            return outcome
        time.sleep(every)


def call_when_admitted(
    worker: Worker, within: float, every: float = 0.01, *, fail: bool = False, seconds: float = 0.0
) -> Outcome:
    """Make a guarded call, repeated while it is rejected, for at most `within` seconds."""
    until = time.monotonic() + within
    while True:
        outcome = call(worker, fail=fail, seconds=seconds)
        if not outcome.rejected or time.monotonic() > until or worker.dismissed:
            return outcome
        time.sleep(every)


def flood(worker: Worker, until: float, *, every: float, dead: Sequence[tuple[float, float]], seconds: float) -> int:
    """Make a call every few milliseconds until a monotonic time, and return the number of calls.

    Args:
        worker: This worker.
        until: Monotonic time of the end.
        every: Pause between calls, seconds.
        dead: Intervals in which the dependency is down, monotonic times.  A call that begins in one fails.
        seconds: Length of a call while the dependency is down.
    """

    def dependency() -> None:
        with worker.in_dependency():
            now = time.monotonic()
            if any(begin <= now < end for begin, end in dead):
                time.sleep(seconds)
                raise DependencyDown

    made = 0
    while time.monotonic() < until and not worker.dismissed:
        worker.guarded(dependency)
        made += 1
        time.sleep(every)
    return made


def recover(worker: Worker, at: float, *, threads: int, seconds: float, patience: float) -> float:
    """Make successful calls, each on a new thread, until the circuit is closed.

    Args:
        worker: This worker.
        at: Monotonic time of the first call.
        threads: Number of parallel callers, each with its own breaker.
        seconds: Length of a call.
        patience: Seconds after which the callers give up.

    Returns:
        The monotonic time at which the last caller saw a closed circuit.
    """

    def dependency() -> None:
        call = f"{worker.index}:{threading.get_ident()}:{time.monotonic_ns()}"
        worker.note(call, "begin")
        time.sleep(seconds)
        worker.note(call, "end")

    def request(breaker: pybreaker.CircuitBreaker) -> None:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(dependency)

    def requests() -> None:
        spec = worker.spec
        breaker = pybreaker.CircuitBreaker(
            reset_timeout=spec.reset_timeout, success_threshold=spec.success_threshold, state_storage=worker.storage
        )
        time.sleep(max(0.0, at - time.monotonic()))
        while breaker.current_state != "closed" and time.monotonic() < at + patience:
            thread = threading.Thread(target=request, args=(breaker,))
            thread.start()
            thread.join()
            time.sleep(0.002)

    running = [threading.Thread(target=requests) for _ in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return time.monotonic()


def monitor(worker: Worker, until: float) -> int:
    """Read every property of a breaker in a loop until a monotonic time, and return the number of rounds."""
    rounds = 0
    breaker = worker.breaker
    while time.monotonic() < until and not worker.dismissed:
        _ = breaker.state, breaker.current_state, breaker.fail_counter, breaker.success_counter
        _ = worker.storage.opened_at
        rounds += 1
        time.sleep(0.001)
    return rounds


def read_state(worker: Worker, times: int = 1) -> str:
    """Read ``breaker.state.name`` several times, as a health endpoint does, which may announce a transition."""
    for _ in range(times):
        name: str = worker.breaker.state.name
    return name


def operator(worker: Worker, verb: Literal["open", "half_open", "close"]) -> float:
    """Call ``breaker.open()`` or another command of an operator, and return the monotonic time at its end."""
    getattr(worker.breaker, verb)()
    return time.monotonic()


def transitions_of(worker: Worker) -> list[Transition]:
    """Return the transitions that this worker's listener has received so far."""
    return list(worker.transitions)


# -- the worker process ------------------------------------------------------------------------------------------------


def _serve(index: int, spec: Spec, line: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIFETIME)
    logging.disable(logging.CRITICAL)
    try:
        _skew_clock(spec.clock_skew)
        worker = Worker(index, spec, line)
        line.send(("result", None))
        while True:
            kind, value = line.recv()
            if kind == "stop":
                return
            function, args, kwargs = value
            if kind == "arm":
                line.send(("report", "armed"))
                time.sleep(max(0.0, worker.wait_for_release() - time.monotonic()))
            line.send(("result", function(worker, *args, **kwargs)))
    except EOFError:  # the test is gone
        return
    except BaseException:  # noqa: BLE001  # whatever it is, the test must see it
        with contextlib.suppress(OSError):
            line.send(("error", traceback.format_exc()))


def _skew_clock(seconds: float) -> None:
    if seconds:
        import time_machine

        # As a wrongly set clock: moves time.time and datetime.now, and not the monotonic clock.
        time_machine.travel(time.time() + seconds, tick=True).start()


class WorkerHandle:
    """One worker process, as the test sees it."""

    def __init__(self, index: int, spec: Spec) -> None:
        self.index = index
        self.spec = spec
        self.line, far = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(index, spec, far), daemon=True)
        self.process.start()
        far.close()
        self._reports: list[str] = []

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start `function` in the worker, and return at once."""
        self.line.send(("do", (function, args, kwargs)))

    def arm(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Prepare the worker to start `function` at the instant that `release` sends."""
        self.line.send(("arm", (function, args, kwargs)))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` in the worker and return its result."""
        self.begin(function, *args, **kwargs)
        return self.result()

    def release(self, value: Any) -> None:
        """Send a value to a worker that waits in `Worker.wait_for_release`."""
        self.line.send(("release", value))

    def wait_for(self, word: str, within: float = DEADLINE) -> None:
        """Wait until the worker has reported `word`."""
        until = time.monotonic() + within
        while word not in self._reports:
            kind, value = self._receive(until, f"report {word!r}")
            if kind != "report":
                raise WorkerFailed(f"worker {self.index} was to report {word!r} but returned {value!r}")
            self._reports.append(value)
        self._reports.remove(word)

    def report_or_result(self, word: str, until: float) -> tuple[bool, Any]:
        """Wait for `word` or the function's end, and return ``(True, None)`` or ``(False, result)``."""
        kind, value = self._receive(until, f"report {word!r} or return")
        return (True, None) if (kind, value) == ("report", word) else (False, value)

    def result(self, within: float = DEADLINE) -> Any:
        """Return the result of the last function that was started in the worker."""
        until = time.monotonic() + within
        while True:
            kind, value = self._receive(until, "return")
            if kind == "result":
                return value
            self._reports.append(value)

    def _receive(self, until: float, what: str) -> tuple[str, Any]:
        if not self.line.poll(max(0.0, until - time.monotonic())):
            raise WorkerFailed(f"worker {self.index} did not {what} in time")
        try:
            kind, value = self.line.recv()
        except (EOFError, ConnectionResetError) as exc:
            self.process.join(1)
            raise WorkerFailed(f"worker {self.index} died, exit code {self.process.exitcode}") from exc
        if kind == "error":
            raise WorkerFailed(f"worker {self.index} raised:\n{value}")
        return kind, value

    def kill(self) -> float:
        """Kill the worker, and return the monotonic time at which it was dead."""
        self.process.kill()
        self.process.join(DEADLINE)
        return time.monotonic()

    def stop(self, until: float) -> None:
        """Wait for the end of the worker until a monotonic time, then kill it."""
        self.line.close()
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(DEADLINE)
        self.process.close()


class Fleet:
    """Some workers, as the test sees them, started together and always ended."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self.specs = list(specs)
        self.workers: list[WorkerHandle] = []

    def __enter__(self) -> Fleet:  # typing.Self is new in 3.11
        start_fork_server()
        try:
            self.workers += [WorkerHandle(index, spec) for index, spec in enumerate(self.specs)]
            for worker in self.workers:
                worker.result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.line.send(("stop", None))
        until = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.stop(until)

    def __getitem__(self, index: int) -> WorkerHandle:
        return self.workers[index]

    def __len__(self) -> int:
        return len(self.workers)

    def begin(
        self,
        function: Callable[..., Any],
        *args: Any,
        at: float | None = None,
        only: Sequence[WorkerHandle] | None = None,
        **kwargs: Any,
    ) -> float:
        """Start `function` at one instant in all workers, or in `only` some, and return that monotonic time."""
        workers = self.workers if only is None else only
        for worker in workers:
            worker.arm(function, *args, **kwargs)
        for worker in workers:
            worker.wait_for("armed")
        at = max(at or 0.0, time.monotonic() + 0.02)
        for worker in workers:
            worker.release(at)
        return at

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        at: float | None = None,
        only: Sequence[WorkerHandle] | None = None,
        within: float = DEADLINE,
        **kwargs: Any,
    ) -> list[Any]:
        """Start `function` as `begin` does, and return the results of all workers."""
        self.begin(function, *args, at=at, only=only, **kwargs)
        return [worker.result(within) for worker in (self.workers if only is None else only)]

    def hold(
        self,
        *,
        at: float | None = None,
        only: Sequence[WorkerHandle] | None = None,
        within: float = DEADLINE,
    ) -> tuple[list[WorkerHandle], list[Outcome]]:
        """Make one call in each worker at one instant, and wait until each has reached the dependency or has ended.

        Returns:
            The workers that are now inside the dependency, and the outcomes of the others.
        """
        workers = list(self.workers if only is None else only)
        begun = self.begin(held_call, at=at, only=workers)
        until = max(begun, time.monotonic()) + within
        inside, outcomes = [], []
        for worker in workers:
            reached, outcome = worker.report_or_result("reached", until)
            if reached:
                inside.append(worker)
            else:
                outcomes.append(outcome)
        return inside, outcomes

    def release(self, workers: Sequence[WorkerHandle], success: bool) -> list[Outcome]:
        """End held calls at the same time, and return their outcomes."""
        for worker in workers:
            worker.release(success)
        return [worker.result() for worker in workers]

    def transitions(self, excluding: Sequence[WorkerHandle] = ()) -> list[Transition]:
        """Return the transitions that the fleet's listeners received, `excluding` workers in the dependency."""
        transitions = [
            item for worker in self.workers if worker not in excluding for item in worker.run(transitions_of)
        ]
        return sorted(transitions, key=lambda item: item.at)


def wait_until(at: float) -> None:
    """Sleep until a monotonic time that the test has computed."""
    time.sleep(max(0.0, at - time.monotonic()))


def start_fork_server() -> None:
    """Start the process that forks workers."""
    # Python up to 3.13 does not pass sys.path to the fork server, which reads PYTHONPATH only.
    with _starting:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        try:
            _context.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


# -- calls at the dependency -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A call that reached the dependency.

    Attributes:
        worker: Number of the worker.
        begin: Monotonic seconds.
        end: Monotonic seconds, or infinity if the caller died inside.
    """

    worker: int
    begin: float
    end: float = float("inf")


@dataclass
class Visits:
    """All calls that reached a fleet's dependency, read from its log."""

    log: str | Path
    items: list[Visit] = field(default_factory=list)

    def read(self) -> list[Visit]:
        """Return all calls so far, by begin."""
        begun: dict[str, Visit] = {}
        path = Path(self.log)
        for line in path.read_text().splitlines() if path.exists() else []:
            name, worker, what, at = json.loads(line)
            if what == "begin":
                begun[name] = Visit(worker, at)
            else:
                begun[name] = replace(begun[name], end=at)
        self.items = sorted(begun.values(), key=lambda visit: visit.begin)
        return self.items

    def since(self, begin: float, end: float = float("inf")) -> list[Visit]:
        """Return the calls that began in this interval."""
        return [visit for visit in self.read() if begin <= visit.begin < end]


def most_at_once(visits: Iterable[Visit]) -> int:
    """Return the highest number of these calls that were in the dependency at the same time."""
    visits = list(visits)
    steps = sorted([(visit.begin, 1) for visit in visits] + [(visit.end, -1) for visit in visits])
    worst = now = 0
    for _, step in steps:
        now += step
        worst = max(worst, now)
    return worst


# -- the record on the server ------------------------------------------------------------------------------------------


class Shared:
    """Shared record of a circuit, read as an operator does with a command line client."""

    def __init__(self, client: Any, namespace: str = "fleet") -> None:
        self._client = client
        self._prefix = f"{namespace}:pybreaker:"

    def _text(self, value: bytes | str | None) -> str:
        return "" if value is None else value.decode() if isinstance(value, bytes) else value

    @property
    def state(self) -> str:
        """``closed``, ``open``, ``half-open``, or ``""`` without a record."""
        return self._text(self._client.get(self._prefix + "state"))

    @property
    def failures(self) -> int:
        """Failure counter."""
        return int(self._text(self._client.get(self._prefix + "fail_counter")) or 0)

    @property
    def successes(self) -> int:
        """Success counter."""
        return int(self._text(self._client.get(self._prefix + "success_counter")) or 0)

    @property
    def generation(self) -> int:
        """Number of transitions, for storages of this package only."""
        return int(self._text(self._client.hget(self._prefix + "circuit", "generation")) or 0)


def trip(worker: WorkerHandle) -> Outcome:
    """Make failing calls in `worker` until the circuit opens, and return the outcome of the last one."""
    outcomes: list[Outcome] = worker.run(calls, worker.spec.fail_max, fail=True)
    assert outcomes[-1].tripped, outcomes
    return outcomes[-1]
