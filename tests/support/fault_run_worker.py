"""One worker process of a randomised fault run: threads that make guarded calls and record what they see.

Half of the slots of a process are threads that last, half start a new thread for each call, as a web server may do.
Each slot has an unmodified `pybreaker.CircuitBreaker` of each circuit, so that the slots run in parallel.  The slots
take turns between two storages of each circuit.

The process makes calls from its start until its standard input ends, and then writes what it saw.

Knows: pybreaker, the storage under test.  Does not know: faults, rules.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import mmap
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pybreaker

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._circuits.probes import PROBE_TOKENS, ProbeTokens
from tests.support.clock import waited
from tests.support.fault_run import CIRCUITS
from tests.support.faults import USER
from tests.support.history import HALF_OPEN, SAME, Limits
from tests.support.places import LIBRARY, PREFIX

#: Seconds within which this process must be ready.
PATIENCE = 30

#: Seconds between two looks at whether this process could run.
TICK = 0.005

#: Seconds without running that are a stall.
STALL = 0.03

#: Seconds after which the log notes where a call is.
LONG = Limits.timeout + Limits.longest_call + 0.1

#: Lines of the log that are kept.
MOST_LINES = 20_000


class Down(Exception):
    """The dependency is down."""


class Recorder(logging.Handler):
    """Everything that this process saw.

    Attributes:
        calls: Fields of `tests.support.history.Call`.
        stalls: Spells in which this process could not run.
        lines: Times and lines of the log.
        released: Times at which the calls that held a probe ended, by the probe's token.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.calls: list[tuple[Any, ...]] = []
        self.stalls: list[tuple[float, float]] = []
        self.lines: list[tuple[float, str]] = []
        self.released: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line of the log."""
        if len(self.lines) < MOST_LINES:
            self.lines.append((time.monotonic(), f"{record.levelname} {record.getMessage()}"))

    def watch_probes(self, probes: ProbeTokens) -> None:
        """Record from when on no call holds a probe."""
        release = probes.release

        def released(token: str) -> None:
            self.released.setdefault(token, time.monotonic())
            release(token)

        probes.release = released  # type: ignore[method-assign]

    def watch(self, over: threading.Event, slots: Sequence[Slot]) -> None:
        """Record spells in which this process could not run, and where calls are that take too long."""
        told: set[float] = set()
        while not over.is_set():
            before = time.monotonic()
            time.sleep(TICK)
            now = time.monotonic()
            if now - before > TICK + STALL:
                self.stalls.append((before, now))
            for slot in slots:
                thread, began = slot.calling
                if began and now - began > LONG and began not in told:
                    told.add(began)
                    self.lines.append((now, f"a call takes long: {slot}\n{_stack(thread)}"))

    def error_in_a_thread(self, process: int, error: BaseException | None) -> None:
        """Record that a thread of this process, ended by an error."""
        now = time.monotonic()
        what = "".join(traceback.format_exception(error)) if error else "?"
        self.calls.append((process, -1, next(iter(CIRCUITS)), now, now, "error", f"in a thread: {what}"))


class Slot:
    """Guarded calls, one after the other.

    Args:
        words: What this process was given.
        number: Of the slot.
        storages: By circuit.
        up: Of each dependency, in the order of the circuits.
        recorder: Takes what is seen.

    Attributes:
        calling: Identity of the thread that makes a call, and since when, monotonic seconds; 0.0: no call is made.
    """

    def __init__(
        self, words: dict[str, Any], number: int, storages: dict[str, Any], up: mmap.mmap, recorder: Recorder
    ) -> None:
        self._process = words["process"]
        self._number = number
        self.calling = 0, 0.0
        self._storages = storages
        self._up = up
        self._recorder = recorder
        self._chance = random.Random(f"{words['seed']} {self._process} {number}")
        self._is_fresh = number >= words["threads"] // 2
        self._breakers = {
            name: pybreaker.CircuitBreaker(
                reset_timeout=Limits.reset_timeout, state_storage=storages[name], name=name, **CIRCUITS[name]
            )
            for name in CIRCUITS
        }

    def __str__(self) -> str:
        return f"process {self._process}, thread {self._number}"

    def run(self, over: threading.Event) -> None:
        """Make calls until it is over."""
        while not over.wait(self._chance.uniform(0.002, 0.02)):
            circuit = self._chance.choice(list(CIRCUITS))
            if self._is_fresh:
                thread = threading.Thread(target=self.call, args=(circuit,))
                thread.start()
                thread.join()
            else:
                self.call(circuit)

    def call(self, circuit: str) -> None:
        """Make one guarded call and record it."""
        breaker, storage = self._breakers[circuit], self._storages[circuit]
        seen: dict[str, Any] = {}

        def dependency() -> None:
            seen["reached"] = time.monotonic()
            seen["admitted"] = breaker._state.name
            is_up = self._up[list(CIRCUITS).index(circuit)]
            if seen["admitted"] == HALF_OPEN:
                seen["own"] = _own(storage)
                # Long enough that a second probe would overlap.
                time.sleep(self._chance.uniform(0.2, 1.0) * Limits.longest_call)
            elif not is_up:
                time.sleep(self._chance.uniform(0.0, 0.02))
            seen["left"] = time.monotonic()
            if not is_up:
                raise Down

        own, waited_before, what = _own(storage), waited(), ""
        began = time.monotonic()
        self.calling = threading.get_ident(), began
        try:
            breaker.call(dependency)
            outcome = "ok"
        except Down:
            outcome = "failed"
        except pybreaker.CircuitBreakerError as error:
            # Of the call that trips the circuit it is the new error.
            outcome, what = "failed" if "reached" in seen else "rejected", str(error)
        except BaseException:  # noqa: BLE001
            outcome, what = "error", traceback.format_exc()
        ended = time.monotonic()
        self.calling = 0, 0.0
        then = seen.get("own", own)
        self._recorder.calls.append(
            (
                *(self._process, self._number, circuit, began, ended, outcome, what),
                *(seen.get("reached"), seen.get("left"), seen.get("admitted", "")),
                *(_throughout(own, then), then[1], waited() - waited_before, then[2]),
            )
        )


def _stack(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "the thread has ended"


def _own(storage: CircuitRedisStorage) -> tuple[bool, float, int]:
    """Return whether this process uses its local circuit, since when Redis has been as it is, and which one it is."""
    health = storage.health()
    since = 0.0 if health.since is None else health.since.timestamp() - time.time() + time.monotonic()
    return health.is_own, since, storage._core.local._ledger.begun.generation


def _throughout(first: tuple[bool, float, int], last: tuple[bool, float, int]) -> bool | None:
    """Return which circuit was used from the first look to the last; ``None`` if that changed."""
    changed = first[0] != last[0] or abs(first[1] - last[1]) > SAME
    changed = changed or (last[0] and first[2] != last[2])
    return None if changed else last[0]


def main() -> None:
    """Run until the standard input ends, then write what was seen."""
    words: dict[str, Any] = json.loads(sys.argv[1])
    # Whatever becomes of the test, this process ends.
    signal.alarm(PATIENCE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder()
    logger = logging.getLogger("pybreaker_redis")
    logger.addHandler(recorder)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    recorder.watch_probes(PROBE_TOKENS)
    threading.excepthook = lambda args: recorder.error_in_a_thread(words["process"], args.exc_value)

    make = getattr(importlib.import_module(LIBRARY), PREFIX)
    client = make(host="127.0.0.1", port=words["port"], username=USER, password="any")
    storages = [
        {
            name: CircuitRedisStorage(
                "closed",
                client,
                name,
                probe_lease=Limits.probe_lease,
                max_staleness=Limits.max_staleness,
                timeout=Limits.timeout,
            )
            for name in CIRCUITS
        }
        for _ in range(2)
    ]
    over = threading.Event()
    with Path(words["dependencies"]).open("r+b") as file, mmap.mmap(file.fileno(), 0) as up:
        slots = [Slot(words, number, storages[number % 2], up, recorder) for number in range(words["threads"])]
        for slot in slots:
            for circuit in CIRCUITS:
                slot.call(circuit)
        threads = [threading.Thread(target=recorder.watch, args=(over, slots), daemon=True)]
        threads += [threading.Thread(target=slot.run, args=(over,), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        signal.alarm(words["lifetime"])
        print("ready", flush=True)
        with contextlib.suppress(OSError):
            sys.stdin.buffer.read()
        over.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a guarded call does not end"
    seen = {"calls": recorder.calls, "stalls": recorder.stalls, "log": recorder.lines, "released": recorder.released}
    Path(words["result"]).write_bytes(pickle.dumps(seen))


if __name__ == "__main__":
    main()
