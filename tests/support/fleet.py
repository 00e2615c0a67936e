"""Fleets of real processes that guard one dependency with one circuit.

A test drives its workers like a puppeteer: it tells each what to do, sees when a call has *reached* the dependency, and
decides when and how that call ends. So the order of events is chosen, not hoped for, and no test sleeps to let
something happen. Everything has a deadline; a worker that misses it is killed, a worker's exception is raised in the
test with its traceback.

Knows: processes, pipes, pybreaker.  Does not know: pytest, which promise is being tested.
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

from tests.support.places import client_at

#: Seconds that a step of a worker may take before the test fails and the fleet is killed.
DEADLINE = 30.0

#: Seconds that a fleet has to end when the test is over, before it is killed.
PATIENCE = 5.0

#: Seconds after which a worker ends itself, whatever became of the test process.
LIFETIME = 120

#: Imported once by the fork server, so that a worker starts in milliseconds. ``pytest`` is here because every worker
#: imports the main module of the test process again.
PRELOAD = ["pytest", "redis", "pybreaker", "pybreaker_redis", "time_machine", "tests.support.fleet"]

#: What the storage under test is made of: this package's, or the one that comes with pybreaker.
Make = Literal["ours", "stock"]

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()


class WorkerFailed(Exception):
    """A worker raised, died or missed its deadline; the message carries its traceback."""


class DependencyDown(Exception):
    """What the guarded dependency raises when it is down: the user's own exception."""


class ListenerFailed(Exception):
    """What a careless listener raises."""


# -- what a worker is made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One worker's client, storage and breaker, in words that can be sent to another process.

    Attributes:
        make: Whose storage.
        place: Of the server: the path of its unix socket, or what `places.client_at` takes.
        log: File in which the dependency notes its calls, one for the fleet.
        namespace: The circuit.
        fail_max: As in ``pybreaker.CircuitBreaker``.
        reset_timeout: As in ``pybreaker.CircuitBreaker``, seconds.
        success_threshold: As in ``pybreaker.CircuitBreaker``.
        probe_lease: Seconds; for our storage only.
        max_staleness: Seconds; for our storage only.
        timeout: Seconds; for our storage only.  Longer than usual, because fleets have more processes than the machine
            has cores: where Redis is not the subject it shall not be taken for away.
        fallback: As in ``pybreaker.CircuitRedisStorage``.
        clock_skew: Seconds by which this worker's wall clock is ahead.
        listener: ``record`` notes each change of state, ``look`` also reads ``current_state`` in it, ``raise`` raises.
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
class Heard:
    """A change of state, as a worker's listener was told of it.

    Attributes:
        worker: Which worker.
        at: When, seconds on the monotonic clock that all processes of a machine share.
        old: State before.
        new: State now.
        current: ``breaker.current_state`` at that moment, if the listener looked.
    """

    worker: int
    at: float
    old: str
    new: str
    current: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One guarded call, as its caller saw it.

    Attributes:
        worker: Which worker.
        began: When it was made, monotonic seconds.
        ended: When the caller had its answer, monotonic seconds.
        reached: Whether the dependency was called.
        error: Name of the exception's type, or ``""``.
        message: The exception's text.
    """

    worker: int
    began: float
    ended: float
    reached: bool
    error: str = ""
    message: str = ""

    @property
    def rejected(self) -> bool:
        """The breaker refused without calling the dependency."""
        return self.error == "CircuitBreakerError" and not self.reached

    @property
    def tripped(self) -> bool:
        """This call was told that it opened a closed circuit."""
        return "Failures threshold reached" in self.message


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        mode = self._worker.spec.listener
        current = cb.current_state if mode == "look" else None
        self._worker.heard.append(
            Heard(self._worker.index, time.monotonic(), getattr(old_state, "name", ""), new_state.name, current)
        )
        if mode == "raise":
            raise ListenerFailed(f"on the way to {new_state.name}")


class Worker:
    """Inside a worker process: its breaker, and the line to the test."""

    def __init__(self, index: int, spec: Spec, line: Any) -> None:
        self.index = index
        self.spec = spec
        self.heard: list[Heard] = []
        # pybreaker's storage has no timeout but the client's: with retries it would hardly make a call in an outage.
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

    def say(self, word: str) -> None:
        """Tell the test that this worker has come so far."""
        self._line.send(("said", word))

    @property
    def dismissed(self) -> bool:
        """The test is over, or gone: a loop should end early."""
        over: bool = self._line.poll()
        return over

    def hear(self) -> Any:
        """Wait until the test says how to go on."""
        if not self._line.poll(DEADLINE):
            raise TimeoutError("the test did not say how to go on")
        kind, value = self._line.recv()
        assert kind == "release", kind
        return value

    @contextlib.contextmanager
    def in_dependency(self) -> Iterator[None]:
        """Note begin and end of a call that reached the dependency, for all processes to see."""
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
        """Make one guarded call and describe it; no exception of the breaker or the dependency escapes."""
        before, began = self._reached, time.monotonic()
        error = message = ""
        try:
            self.breaker.call(function)
        except (pybreaker.CircuitBreakerError, DependencyDown, ListenerFailed) as exc:
            error, message = type(exc).__name__, str(exc)
        return Outcome(self.index, began, time.monotonic(), self._reached > before, error, message)


def make_storage(spec: Spec, client: Any) -> Any:
    """The storage that `spec` asks for."""
    if spec.make == "stock":
        return pybreaker.CircuitRedisStorage("closed", client, spec.namespace, spec.fallback)
    # Stock cases must run where the package itself cannot be imported, for example while it is being changed.
    from pybreaker_redis import CircuitRedisStorage

    given = {"probe_lease": spec.probe_lease, "max_staleness": spec.max_staleness, "timeout": spec.timeout}
    extra: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return CircuitRedisStorage("closed", client, spec.namespace, spec.fallback, **extra)


# -- what a worker can be told to do -----------------------------------------------------------------------------------


def call(worker: Worker, *, fail: bool = False, seconds: float = 0.0) -> Outcome:
    """One guarded call that takes `seconds` and fails or not."""

    def dependency() -> None:
        with worker.in_dependency():
            if seconds:
                time.sleep(seconds)
            if fail:
                raise DependencyDown

    return worker.guarded(dependency)


def calls(worker: Worker, count: int, *, fail: bool = False) -> list[Outcome]:
    """`count` guarded calls, one after the other."""
    return [call(worker, fail=fail) for _ in range(count)]


def uncounted_failures(worker: Worker, count: int) -> int:
    """`count` guarded failures as fast as possible, without notes; how many came back as the user's own exception."""

    def dependency() -> None:
        raise DependencyDown

    own = 0
    for _ in range(count):
        try:
            worker.breaker.call(dependency)
        except DependencyDown:
            own += 1
    return own


def held_call(worker: Worker) -> Outcome:
    """One guarded call that says ``reached`` in the dependency and ends as the test says: True is success."""

    def dependency() -> None:
        with worker.in_dependency():
            worker.say("reached")
            if not worker.hear():
                raise DependencyDown

    return worker.guarded(dependency)


def held_call_when_admitted(worker: Worker, within: float, every: float = 0.01) -> Outcome:
    """As `held_call`, but tried again and again while rejected, `within` so many seconds."""
    until = time.monotonic() + within
    while True:
        outcome = held_call(worker)
        if not outcome.rejected or time.monotonic() > until or worker.dismissed:
            return outcome
        time.sleep(every)


def call_when_admitted(
    worker: Worker, within: float, every: float = 0.01, *, fail: bool = False, seconds: float = 0.0
) -> Outcome:
    """As `call`, but tried again and again while rejected, `within` so many seconds."""
    until = time.monotonic() + within
    while True:
        outcome = call(worker, fail=fail, seconds=seconds)
        if not outcome.rejected or time.monotonic() > until or worker.dismissed:
            return outcome
        time.sleep(every)


def flood(worker: Worker, until: float, *, every: float, dead: Sequence[tuple[float, float]], seconds: float) -> int:
    """Calls `every` so many seconds `until` a monotonic time; how many were made.

    Args:
        worker: This worker.
        until: Monotonic time of the end.
        every: Pause between calls, seconds.
        dead: Spells in which the dependency is down, monotonic times; a call that begins in one fails.
        seconds: What a call takes while the dependency is down.
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
    """Successful calls, each on a thread of its own, from a time on until the circuit is closed.

    Args:
        worker: This worker.
        at: Monotonic time of the first call.
        threads: How many call at the same time, with as many breakers.
        seconds: What a call takes.
        patience: Seconds after which the threads give up.

    Returns:
        When the last of them saw that the circuit is closed, monotonic seconds.
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
    """Read all that a breaker offers to read, in a loop, until a monotonic time; how many rounds were read."""
    rounds = 0
    breaker = worker.breaker
    while time.monotonic() < until and not worker.dismissed:
        _ = breaker.state, breaker.current_state, breaker.fail_counter, breaker.success_counter
        _ = worker.storage.opened_at
        rounds += 1
        time.sleep(0.001)
    return rounds


def read_state(worker: Worker, times: int = 1) -> str:
    """``breaker.state.name``, read `times` times as a health endpoint does; noticing a transition is part of it."""
    for _ in range(times):
        name: str = worker.breaker.state.name
    return name


def operator(worker: Worker, verb: Literal["open", "half_open", "close"]) -> float:
    """An operator's ``breaker.open()`` and so on; the monotonic time at which it was done."""
    getattr(worker.breaker, verb)()
    return time.monotonic()


def heard(worker: Worker) -> list[Heard]:
    """What this worker's listener was told so far."""
    return list(worker.heard)


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
                line.send(("said", "armed"))
                time.sleep(max(0.0, worker.hear() - time.monotonic()))
            line.send(("result", function(worker, *args, **kwargs)))
    except EOFError:  # the test is gone
        return
    except BaseException:  # noqa: BLE001  # whatever it is, the test must see it
        with contextlib.suppress(OSError):
            line.send(("error", traceback.format_exc()))


def _skew_clock(seconds: float) -> None:
    if seconds:
        import time_machine

        # Moves time.time and datetime.now, not the monotonic clock: as a wrongly set clock does.
        time_machine.travel(time.time() + seconds, tick=True).start()


class Puppet:
    """In the test: one worker process."""

    def __init__(self, index: int, spec: Spec) -> None:
        self.index = index
        self.spec = spec
        self.line, far = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(index, spec, far), daemon=True)
        self.process.start()
        far.close()
        self._said: list[str] = []

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Let it do `function`, and do not wait."""
        self.line.send(("do", (function, args, kwargs)))

    def arm(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Let it stand ready to do `function` at the instant that `release` names."""
        self.line.send(("arm", (function, args, kwargs)))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let it do `function`; its result."""
        self.begin(function, *args, **kwargs)
        return self.result()

    def release(self, value: Any) -> None:
        """Answer a worker that waits in `Worker.hear`."""
        self.line.send(("release", value))

    def wait_for(self, word: str, within: float = DEADLINE) -> None:
        """Wait until it has said `word`."""
        until = time.monotonic() + within
        while word not in self._said:
            kind, value = self._receive(until, f"say {word!r}")
            if kind != "said":
                raise WorkerFailed(f"worker {self.index} was to say {word!r} but returned {value!r}")
            self._said.append(value)
        self._said.remove(word)

    def said_or_done(self, word: str, until: float) -> tuple[bool, Any]:
        """``(True, None)`` when it has said `word`, ``(False, result)`` when it is done without."""
        kind, value = self._receive(until, f"say {word!r} or return")
        return (True, None) if (kind, value) == ("said", word) else (False, value)

    def result(self, within: float = DEADLINE) -> Any:
        """What the last thing it was told to do returned."""
        until = time.monotonic() + within
        while True:
            kind, value = self._receive(until, "return")
            if kind == "result":
                return value
            self._said.append(value)

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
        """SIGKILL it; the monotonic time at which it was dead."""
        self.process.kill()
        self.process.join(DEADLINE)
        return time.monotonic()

    def stop(self, until: float) -> None:
        """Let it go until a monotonic time, then make it."""
        self.line.close()
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(DEADLINE)
        self.process.close()


class Fleet:
    """In the test: some workers, started together and never left behind."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self.specs = list(specs)
        self.workers: list[Puppet] = []

    def __enter__(self) -> Fleet:  # typing.Self is new in 3.11
        start_fork_server()
        try:
            self.workers += [Puppet(index, spec) for index, spec in enumerate(self.specs)]
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

    def __getitem__(self, index: int) -> Puppet:
        return self.workers[index]

    def __len__(self) -> int:
        return len(self.workers)

    def begin(
        self,
        function: Callable[..., Any],
        *args: Any,
        at: float | None = None,
        only: Sequence[Puppet] | None = None,
        **kwargs: Any,
    ) -> float:
        """All (or `only` some) begin `function` at one instant (default: now, monotonic); that instant."""
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
        only: Sequence[Puppet] | None = None,
        within: float = DEADLINE,
        **kwargs: Any,
    ) -> list[Any]:
        """As `begin`, and wait for all their results."""
        self.begin(function, *args, at=at, only=only, **kwargs)
        return [worker.result(within) for worker in (self.workers if only is None else only)]

    def hold(
        self,
        *,
        at: float | None = None,
        only: Sequence[Puppet] | None = None,
        within: float = DEADLINE,
    ) -> tuple[list[Puppet], list[Outcome]]:
        """All make one call at one instant; wait until each has either reached the dependency or been answered.

        Returns:
            The workers that are now inside the dependency, and the outcomes of the others.
        """
        workers = list(self.workers if only is None else only)
        begun = self.begin(held_call, at=at, only=workers)
        until = max(begun, time.monotonic()) + within
        inside, outcomes = [], []
        for worker in workers:
            reached, outcome = worker.said_or_done("reached", until)
            if reached:
                inside.append(worker)
            else:
                outcomes.append(outcome)
        return inside, outcomes

    def release(self, workers: Sequence[Puppet], success: bool) -> list[Outcome]:
        """Let held calls end, all at once; their outcomes."""
        for worker in workers:
            worker.release(success)
        return [worker.result() for worker in workers]

    def heard(self, but: Sequence[Puppet] = ()) -> list[Heard]:
        """What the fleet's listeners were told so far, in order; `but` for workers that are in the dependency."""
        told = [item for worker in self.workers if worker not in but for item in worker.run(heard)]
        return sorted(told, key=lambda item: item.at)


def wait_until(at: float) -> None:
    """Sleep until a monotonic time: for instants that the test computes, not for things to happen."""
    time.sleep(max(0.0, at - time.monotonic()))


def start_fork_server() -> None:
    """Start the process that forks workers."""
    # The fork server gets its modules from PYTHONPATH alone: Python up to 3.13 does not hand it sys.path.
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


# -- what the dependency saw -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A call that reached the dependency.

    Attributes:
        worker: Whose.
        begin: Monotonic seconds.
        end: Monotonic seconds; infinite if the caller died in it.
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
        """Everything up to now, by begin."""
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
        """Those that began in this spell."""
        return [visit for visit in self.read() if begin <= visit.begin < end]


def most_at_once(visits: Iterable[Visit]) -> int:
    """How many of these calls were in the dependency at the same time, at worst."""
    visits = list(visits)
    steps = sorted([(visit.begin, 1) for visit in visits] + [(visit.end, -1) for visit in visits])
    worst = now = 0
    for _, step in steps:
        now += step
        worst = max(worst, now)
    return worst


# -- what the server holds ---------------------------------------------------------------------------------------------


class Shared:
    """The shared record of a circuit, read as an operator would with a command line client."""

    def __init__(self, client: Any, namespace: str = "fleet") -> None:
        self._client = client
        self._prefix = f"{namespace}:pybreaker:"

    def _text(self, value: bytes | str | None) -> str:
        return "" if value is None else value.decode() if isinstance(value, bytes) else value

    @property
    def state(self) -> str:
        """``closed``, ``open``, ``half-open``, or ``""`` if there is none."""
        return self._text(self._client.get(self._prefix + "state"))

    @property
    def failures(self) -> int:
        """The failure counter."""
        return int(self._text(self._client.get(self._prefix + "fail_counter")) or 0)

    @property
    def successes(self) -> int:
        """The success counter."""
        return int(self._text(self._client.get(self._prefix + "success_counter")) or 0)

    @property
    def generation(self) -> int:
        """How many transitions were made; our storage only."""
        return int(self._text(self._client.hget(self._prefix + "circuit", "generation")) or 0)


def trip(worker: Puppet) -> Outcome:
    """Let `worker` fail until the circuit opens; the call that opened it."""
    outcomes: list[Outcome] = worker.run(calls, worker.spec.fail_max, fail=True)
    assert outcomes[-1].tripped, outcomes
    return outcomes[-1]
