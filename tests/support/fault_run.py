"""Randomised fault runs: processes that share circuits while a seeded schedule breaks Redis and the way to it.

The parts of a run:

- one private server, with the project's proxy in front of it
- worker processes (`fault_run_worker.py`), which only use the proxy
- a monitor, which bypasses the proxy and records each write of a circuit in the server's order.

A run is a sequence of steps.  In each step the dependencies flap, faults follow one another, and all faults end.  The
calm after them is long enough to show whether every process recovers.  `run` returns a `History`, which
`tests/support/history.py` checks.

``python -m tests.support.fault_run --seconds 600 --seed 7`` makes a long run and prints the report.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import mmap
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import redis

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.faults import USER, Site
from tests.support.history import Call, History, Interval, Limits, Loss, Write, check, describe
from tests.support.wait import wait_for

#: Environment variables that override seed, length and engine of the slow test.
SEED_VARIABLE = "PYBREAKER_REDIS_CHAOS_SEED"
SECONDS_VARIABLE = "PYBREAKER_REDIS_CHAOS_SECONDS"
ENGINE_VARIABLE = "PYBREAKER_REDIS_CHAOS_ENGINE"

#: Lua scripts, or WATCH transactions where the user may run no scripts.
Engine = Literal["lua", "watch"]

#: Rights of the workers' user by engine.
RIGHTS: dict[Engine, tuple[str, ...]] = {"lua": ("+@all",), "watch": ("+@all", "-@scripting")}

#: Circuits by name.  One closes after its first successful probe, one after three, one trips early.
CIRCUITS: dict[str, dict[str, int]] = {
    "once": {"fail_max": 3, "success_threshold": 1},
    "thrice": {"fail_max": 3, "success_threshold": 3},
    "early": {"fail_max": 2, "success_threshold": 1},
}

#: Seconds of a calm after the bound of the slowest circuit.  In this time every call must succeed.
BEYOND = 1.0

#: Seconds within which a worker must be ready, and within which it must end.
PATIENCE = 30.0


def limits() -> dict[str, Limits]:
    """Return the limits of each circuit."""
    return {name: Limits(probes=values["success_threshold"]) for name, values in CIRCUITS.items()}


# -- the schedule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Some faults and the calm after them.  All lengths are seconds.

    Attributes:
        seed: Seed of the dependencies' flapping.
        lead: Length of the flapping before the first fault.
        faults: Names of faults, and the length of each.
        pause: Length of the flapping between two faults.
        down: Names of circuits with a dead dependency at the begin of the calm.
        down_for: Length of the time until these dependencies come up.
    """

    seed: int
    lead: float
    faults: tuple[tuple[str, float], ...]
    pause: float
    down: tuple[str, ...]
    down_for: float

    @property
    def seconds(self) -> float:
        """Length of the step, without the start of servers."""
        faults = sum(seconds for _, seconds in self.faults) + self.pause * (len(self.faults) - 1)
        return self.lead + faults + self.down_for + calm_seconds()


def calm_seconds() -> float:
    """Return the length of the calm after the last fault of a step."""
    return max(limit.recovery for limit in limits().values()) + BEYOND


def plan(seed: int, seconds: float) -> tuple[Step, ...]:
    """Return steps of at least this length in all, the same ones for the same seed.

    Every fault is drawn once before any is drawn again.
    """
    chance = random.Random(seed)
    names: list[str] = []
    steps: list[Step] = []
    while not steps or sum(step.seconds for step in steps) < seconds:
        drawn = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            if not names:
                names = sorted(FAULTS)
                chance.shuffle(names)
            drawn.append((names.pop(), chance.uniform(0.2, 1.5)))
        steps.append(
            Step(
                seed=chance.getrandbits(32),
                lead=chance.uniform(0.2, 1.0),
                faults=tuple(drawn),
                pause=chance.uniform(0.0, 0.4),
                down=tuple(chance.sample(sorted(CIRCUITS), chance.randint(0, len(CIRCUITS)))),
                down_for=chance.uniform(0.0, 0.8),
            )
        )
    return tuple(steps)


# -- what is recorded --------------------------------------------------------------------------------------------------


class Monitor:
    """Recorder of each write of a circuit's hash and each loss of data, in the order in which the server executed them.

    ``MONITOR`` shows FLUSHALL and the commands of scripts and transactions, whatever is published.

    Attributes:
        trace: Everything recorded so far.
    """

    _LINE = re.compile(rb'^\+(\d+)\.(\d+) \[[^\]]*\] "(?i:hset|hmset)" "([^"]*):pybreaker:circuit" (.*)$')
    _WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')

    def __init__(self, server: PrivateServer) -> None:
        self.trace: list[Write | Loss] = []
        self._server = server
        self._fields: dict[str, dict[str, str]] = {}
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        """Record what the server executes from now on."""
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(PATIENCE)
        self._connection.connect(self._server.unix_socket)
        self._connection.sendall(b"MONITOR\r\n")
        assert self._connection.recv(5) == b"+OK\r\n"
        self._connection.settimeout(None)
        self._thread = threading.Thread(target=self._read, args=(self._connection,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise an error if the monitor records no more, although its server runs."""
        assert self._thread
        assert self._thread.is_alive(), "the monitor has lost its connection"

    def ended(self) -> None:
        """Wait until everything is recorded that the server executed before it died."""
        if self._thread:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive(), "the monitor's connection outlived its server"

    def lost(self, what: str) -> None:
        """Record that the dead server lost data."""
        self._fields.clear()
        self.trace.append(Loss(time.monotonic(), what))

    def close(self) -> None:
        """Close the connection and end the thread."""
        if self._connection:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self.ended()
            self._connection.close()

    def _read(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                if b"pybreaker:circuit" in line:
                    self._note(line.rstrip())
                elif b'"FLUSHALL"' in line:
                    self.lost("flushed")

    def _note(self, line: bytes) -> None:
        found = self._LINE.match(line)
        if not found:
            return
        seconds, micros, circuit, rest = found.groups()
        values = [word.decode() for word in self._WORD.findall(rest)]
        name = circuit.decode()
        fields = self._fields.setdefault(name, {})
        fields.update(zip(values[::2], values[1::2], strict=True))
        offset = time.time() - time.monotonic()
        self.trace.append(
            Write(
                at=int(seconds) + int(micros) / 1e6 - offset,
                circuit=name,
                generation=int(fields.get("generation") or 0),
                state=fields.get("state", ""),
                token=fields.get("probe_token", ""),
                until=int(fields.get("probe_until_ms") or 0) / 1000 - offset,
            )
        )


class Dependencies:
    """Health of each circuit's dependency, in a file of one byte for each, which all processes map into memory.

    Attributes:
        path: Path of the file.
        down: Intervals in which a dependency was down, by circuit, each a little longer than in truth.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.down: dict[str, list[Interval]] = {name: [] for name in CIRCUITS}
        self.since: dict[str, float] = {}
        path.write_bytes(b"\1" * len(CIRCUITS))
        with path.open("r+b") as file:
            self._up = mmap.mmap(file.fileno(), 0)

    def set(self, circuit: str, *, up: bool) -> None:
        """Let a dependency go down or come up."""
        if not up:
            self.since.setdefault(circuit, time.monotonic())
        self._up[list(CIRCUITS).index(circuit)] = up
        if up and circuit in self.since:
            self.down[circuit].append((self.since.pop(circuit), time.monotonic()))

    def close(self) -> None:
        """Let all dependencies come up, and close the file."""
        for circuit in CIRCUITS:
            self.set(circuit, up=True)
        self._up.close()

    @contextlib.contextmanager
    def flapping(self, seed: int) -> Iterator[None]:
        """Let each dependency go down and come up at random, and leave it in its last state."""
        over = threading.Event()
        threads = [
            threading.Thread(target=self._flap, args=(over, circuit, random.Random(f"{seed}{circuit}")))
            for circuit in CIRCUITS
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _flap(self, over: threading.Event, circuit: str, chance: random.Random) -> None:
        up = True
        while not over.wait(chance.uniform(0.05, 0.5)):
            up = not up
            self.set(circuit, up=up)


class Crew:
    """Worker processes, started together and always ended.

    Args:
        site: Server with its proxy.
        dependencies: Dependencies that the workers guard.
        directory: Directory for the workers' results.
        processes: Number of processes.
        threads: Number of threads in each process.
        seed: Seed of the workers' random choices.
        seconds: Length of the run in seconds.  Long after that the workers end themselves.
    """

    def __init__(
        self,
        site: Site,
        dependencies: Dependencies,
        directory: Path,
        *,
        processes: int,
        threads: int,
        seed: int,
        seconds: float,
    ) -> None:
        self._results = [directory / f"worker-{number}.pickle" for number in range(processes)]
        self.workers: list[subprocess.Popen[bytes]] = []
        try:
            for number, result in enumerate(self._results):
                values = {
                    "process": number,
                    "threads": threads,
                    "port": site.proxy.port,
                    "dependencies": str(dependencies.path),
                    "result": str(result),
                    "seed": seed,
                    "lifetime": int(2 * seconds + 4 * PATIENCE),
                }
                command = [sys.executable, "-m", "tests.support.fault_run_worker", json.dumps(values)]
                path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
                environment = {**os.environ, "PYTHONPATH": path}
                self.workers.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                )
            for worker in self.workers:
                assert worker.stdout
                # A worker that fails or is killed by its alarm closes the pipe.
                assert worker.stdout.readline() == b"ready\n", "a worker did not start; its error stands above"
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise an error if a worker has ended."""
        ended = [worker.returncode for worker in self.workers if worker.poll() is not None]
        assert not ended, f"workers ended early, exit codes {ended}"

    def finish(self) -> list[dict[str, Any]]:
        """End all workers and return the result of each."""
        for worker in self.workers:
            assert worker.stdin
            worker.stdin.close()
        codes = [worker.wait(PATIENCE) for worker in self.workers]
        assert not any(codes), f"workers failed, exit codes {codes}; their errors stand above"
        return [pickle.loads(result.read_bytes()) for result in self._results]

    def close(self) -> None:
        """Kill all remaining workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe:
                    pipe.close()


# -- the faults --------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Everything that a fault may act on."""

    site: Site
    monitor: Monitor

    @property
    def server(self) -> PrivateServer:
        """Server of the run."""
        return self.site.server

    @property
    def administrator(self) -> redis.Redis:
        """Client that bypasses the proxy."""
        return self.site.administrator

    def restart(self, *, keep_data: bool, lost: str) -> None:
        """Start the dead server, so that the monitor reaches it before any worker.

        Args:
            keep_data: Whether the server loads its last snapshot.
            lost: How data was lost, or ``""`` without a loss.
        """
        self.site.proxy.refuse()
        self.monitor.ended()
        if lost:
            self.monitor.lost(lost)
        self.site.restart(keep_data=keep_data)
        self.monitor.attach()
        self.site.proxy.listen()


#: A fault makes something fail for so many seconds, and returns when all works again.
FaultFunction = Callable[[Stage, float], None]


def _killed_and_empty(stage: Stage, seconds: float) -> None:
    stage.server.kill()
    time.sleep(seconds)
    stage.restart(keep_data=False, lost="killed, empty")


def _killed_after_a_snapshot(stage: Stage, seconds: float) -> None:
    stage.administrator.save()
    time.sleep(seconds)
    stage.server.kill()
    time.sleep(seconds / 2)
    stage.restart(keep_data=True, lost="killed, older snapshot")


def _shut_down_and_whole(stage: Stage, seconds: float) -> None:
    # The server saves at last, so no executed command is lost.
    with contextlib.suppress(redis.ConnectionError):
        stage.administrator.execute_command("SHUTDOWN", "SAVE")
    wait_for(lambda: stage.server.pid is None, "the server ends", PATIENCE)
    time.sleep(seconds)
    stage.restart(keep_data=True, lost="")


def _frozen(stage: Stage, seconds: float) -> None:
    stage.server.pause()
    try:
        time.sleep(seconds)
    finally:
        stage.server.resume()


def _flickering(stage: Stage, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _frozen(stage, 0.3)
        time.sleep(0.05)


def _paused(kind: str) -> FaultFunction:
    def paused(stage: Stage, seconds: float) -> None:
        stage.administrator.execute_command("CLIENT", "PAUSE", int(seconds * 1000), kind)
        time.sleep(seconds)
        # PING is answered after the pause.
        wait_for(lambda: _answers(stage), "the server answers", PATIENCE)

    return paused


def _answers(stage: Stage) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(stage.administrator.ping())
    return False


def _emptied(stage: Stage, seconds: float) -> None:
    stage.administrator.flushall()
    time.sleep(seconds / 2)
    stage.administrator.flushall()
    time.sleep(seconds / 2)


def _out_of_memory(stage: Stage, seconds: float) -> None:
    stage.administrator.config_set("maxmemory", 1)
    time.sleep(seconds)
    stage.administrator.config_set("maxmemory", 0)


def _permitted(*rights: str) -> FaultFunction:
    def permitted(stage: Stage, seconds: float) -> None:
        stage.site.permit(*rights)
        time.sleep(seconds)
        stage.site.permit(*stage.site.rights)

    return permitted


def _proxied(manner: Any, delay: tuple[float, float] = (0.0, 0.0)) -> FaultFunction:
    def proxied(stage: Stage, seconds: float) -> None:
        proxy = stage.site.proxy
        proxy.delay = delay
        proxy.manner = manner
        time.sleep(seconds)
        proxy.manner = "pass"

    return proxied


def _refused(stage: Stage, seconds: float) -> None:
    stage.site.proxy.refuse()
    time.sleep(seconds)
    stage.site.proxy.listen()


def _repeated(act: Callable[[Stage], Any], pause: float) -> FaultFunction:
    def repeated(stage: Stage, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            act(stage)
            time.sleep(pause)

    return repeated


def _forgotten(stage: Stage, seconds: float) -> None:
    stage.site.proxy.drop_silently()
    time.sleep(seconds)


FAULTS: dict[str, FaultFunction] = {
    "killed, empty": _killed_and_empty,
    "killed, older snapshot": _killed_after_a_snapshot,
    "shut down, whole": _shut_down_and_whole,
    "frozen": _frozen,
    "frozen again and again": _flickering,
    "paused": _paused("ALL"),
    "writes paused": _paused("WRITE"),
    "emptied": _emptied,
    "out of memory": _out_of_memory,
    "may do nothing": _permitted("-@all"),
    "may not write": _permitted("+@all", "-@write"),
    "latency": _proxied("slow", (0.005, 0.06)),
    "latency around the timeout": _proxied("slow", (0.1, 0.35)),
    "silent": _proxied("silent"),
    "half answers": _proxied("half"),
    "byte by byte": _proxied("dribble"),
    "refused": _refused,
    "reset": _repeated(lambda stage: stage.site.proxy.reset(), 0.05),
    "hung up": _repeated(lambda stage: stage.site.proxy.close_connections(), 0.02),
    "connections killed": _repeated(
        # The monitor has another user.
        lambda stage: stage.administrator.execute_command("CLIENT", "KILL", "USER", USER),
        0.05,
    ),
    "forgotten": _forgotten,
}


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Result of a run.

    Attributes:
        history: Recorded history.
        steps: Planned steps.
        log: Lines of the workers' logs: time, process, text.
    """

    history: History
    steps: Sequence[Step]
    log: list[tuple[float, int, str]] = field(default_factory=list)


def run(
    binary: str,
    directory: Path,
    *,
    seed: int,
    seconds: float,
    engine: Engine = "lua",
    processes: int = 2,
    threads: int = 4,
    only: Sequence[str] = (),
    report_step: Callable[[str], object] = lambda text: None,
) -> Run:
    """Make one run and end every process that it started.

    Args:
        binary: Path of the server's binary.
        directory: Directory for files.
        seed: Seed of the schedule and of the workers' random choices.
        seconds: Length of the schedule in seconds.  The last step is finished.
        engine: Engine of the circuits.
        processes: Number of worker processes.
        threads: Number of threads in each process.
        only: Names of faults that replace the drawn ones, in turn.
        report_step: Called with a line for each step.
    """
    steps = plan(seed, seconds)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PrivateServer(binary))
        site = stack.enter_context(contextlib.closing(Site(server, RIGHTS[engine])))
        # A frozen server does not end by itself.
        stack.callback(server.resume)
        monitor = stack.enter_context(contextlib.closing(Monitor(server)))
        monitor.attach()
        dependencies = stack.enter_context(contextlib.closing(Dependencies(directory / "dependencies")))
        values: dict[str, Any] = {"processes": processes, "threads": threads, "seed": seed, "seconds": seconds}
        crew = stack.enter_context(contextlib.closing(Crew(site, dependencies, directory, **values)))
        history = History(time.monotonic(), 0.0, limits())
        stage = Stage(site, monitor)
        chosen = itertools.cycle(only) if only else iter(())
        for number, step in enumerate(steps):
            with dependencies.flapping(step.seed):
                time.sleep(step.lead)
                for index, (drawn, length) in enumerate(step.faults):
                    name = next(chosen, drawn)
                    report_step(f"{time.monotonic() - history.began:7.2f} s, step {number + 1} of {len(steps)}: {name}")
                    if index:
                        time.sleep(step.pause)
                    begun = time.monotonic()
                    FAULTS[name](stage, length)
                    history.faults.append((begun, time.monotonic(), name))
            for circuit in CIRCUITS:
                dependencies.set(circuit, up=circuit not in step.down)
            time.sleep(step.down_for)
            for circuit in step.down:
                dependencies.set(circuit, up=True)
            crew.check()
            monitor.check()
            time.sleep(calm_seconds())
        history.ended = time.monotonic()
        seen = crew.finish()
        _settle(site, monitor)
    history.trace = monitor.trace
    history.down = dependencies.down
    log: list[tuple[float, int, str]] = []
    for number, result in enumerate(seen):
        history.calls += [Call(*values) for values in result["calls"]]
        history.stalls += result["stalls"]
        history.released |= result["released"]
        log += [(at, number, text) for at, text in result["log"]]
    return Run(history, steps, sorted(log))


def _settle(site: Site, monitor: Monitor) -> None:
    """Wait until the monitor has recorded the last write of each circuit, and therefore all writes."""

    def generation(circuit: str) -> int:
        return int(site.administrator.hget(f"{circuit}:pybreaker:circuit", "generation") or 0)

    def recorded(circuit: str) -> int:
        for item in reversed(monitor.trace):
            if isinstance(item, Loss):
                break
            if item.circuit == circuit:
                return item.generation
        # The record is unchanged since the last loss, or comes from a snapshot.
        return generation(circuit)

    for circuit in CIRCUITS:
        wait_for(lambda: generation(circuit) == recorded(circuit), f"the last write of {circuit}")  # noqa: B023


def main() -> None:
    """Make one run on the preferred server, print the report, and exit with 1 if a rule was broken."""
    from tests.support.servers import at_hand

    parser = argparse.ArgumentParser(prog="python -m tests.support.fault_run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--engine", choices=list(RIGHTS), default="lua")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), default=[])
    parser.add_argument("--keep", type=Path, help="file for the history, as a pickle")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    # An interrupted run ends its server and its workers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as directory:
        made = run(
            at_hand()[0].binary,
            Path(directory),
            seed=options.seed,
            seconds=options.seconds,
            engine=options.engine,
            processes=options.processes,
            threads=options.threads,
            only=options.only,
            report_step=lambda text: print(text, flush=True),
        )
    if options.keep:
        options.keep.write_bytes(pickle.dumps(made))
    problems = check(made.history)
    print(describe(made.history, problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    # A pickled history names the classes of this module, not of "__main__".
    importlib.import_module("tests.support.fault_run").main()
