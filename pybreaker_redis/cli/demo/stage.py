"""Processes of the demo, and the events that they have reported.

The stage starts, kills and switches processes, and waits for events.  The acts in ``scenario`` decide what must happen.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pybreaker_redis.cli.demo.events import Event, parse
from pybreaker_redis.cli.demo.worker import CALL_TIMEOUT_S, PROBE_LEASE_S, WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pybreaker_redis.cli.demo.events import Kind
    from pybreaker_redis.cli.demo.interruption import Interruption
    from pybreaker_redis.cli.demo.show import Display
    from pybreaker_redis.testing.servers import PrivateServer

#: Number of worker processes.
WORKERS = 3

#: Consecutive failures, of all workers together, that open the circuit.
FAIL_MAX = 5

#: Duration of the acts that do not kill the server, in beats.
ACT_BEATS = 8

#: Further seconds of these acts: processes start, hanging calls reach their timeout, a dead prober's lease ends.
ACT_FIXED_S = PROBE_LEASE_S + 4 * CALL_TIMEOUT_S

#: Duration of the act that kills the server, in beats and further seconds: each worker detects outage and return.
OUTAGE_BEATS, OUTAGE_FIXED_S = 3, 2.5

#: Shortest beat, in seconds.  Shorter beats are too fast to follow.
BEAT_MIN_S = 0.25

#: Longest pause between two checks of an act's condition, in seconds.
POLL_INTERVAL_S = 0.05

#: Seconds beyond the expected time after which a promise counts as broken, for a busy machine.
PROMISE_GRACE_S = 15.0

#: Seconds that a process has for a clean exit.
EXIT_TIMEOUT_S = 3.0


class BrokenPromise(Exception):
    """Violation of a promise: an expected event is missing, or a forbidden one happened.  The message names it."""


class ChildProcess:
    """Process of the demo that reports on standard output, and ends when its standard input ends.

    Standard input also ends when the demo is killed.

    Args:
        module: Name of the module to run, in this package.
        argument: Command line of the process.
        inbox: Queue that receives the events.
    """

    def __init__(self, module: str, argument: str, inbox: queue.Queue[Event]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A new session does not receive Ctrl-C of the terminal.
            start_new_session=True,
        )
        self._inbox = inbox
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as reports:
            for line in reports:
                self._inbox.put(parse(line))

    def send_line(self, word: str) -> None:
        """Write a line to the standard input of the process."""
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait until all its events are in the inbox."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def close_input(self) -> None:
        """Close the standard input of the process, which ends it."""
        assert self._process.stdin
        self._process.stdin.close()

    def join(self) -> None:
        """Wait until the process ends, and kill it after `EXIT_TIMEOUT_S`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)
        self.kill()


class Stage:
    """A dependency, workers that call it through one circuit, and the events of all of them.

    Args:
        url: URL of the server that holds the circuit.
        namespace: Namespace of the circuit.
        seconds: Approximate duration of the whole run, in seconds.
        display: Output that receives every event.
        interruption: Record of signals that end the demo early.
        server: The same server, if the demo may kill it.

    Attributes:
        beat: Unit of time of the acts, in seconds.
        reset_timeout: Seconds that the circuit stays open.
        names: Names of the workers that are alive.
        findings: Label and value of each measurement of the acts.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        seconds: float,
        display: Display,
        *,
        interruption: Interruption,
        server: PrivateServer | None = None,
    ) -> None:
        beats, fixed = (ACT_BEATS + OUTAGE_BEATS, ACT_FIXED_S + OUTAGE_FIXED_S) if server else (ACT_BEATS, ACT_FIXED_S)
        self.beat = max(BEAT_MIN_S, (seconds - fixed) / beats)
        self.reset_timeout = self.beat
        self.names = [f"worker {number}" for number in range(1, WORKERS + 1)]
        self.findings: list[tuple[str, str]] = []
        self._url = url
        self._namespace = namespace
        self._display = display
        self._interruption = interruption
        self._server = server
        self._events: list[Event] = []
        self._inbox: queue.Queue[Event] = queue.Queue()
        #: Processes by name, including those that were killed.
        self._children: dict[str, ChildProcess] = {}
        self._port = 0

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self._children["dependency"] = ChildProcess("dependency", "", self._inbox)
            self._port = self.wait_until("the dependency starts", lambda: self.seen("ready"))[0].port
            for name in self.names:
                self._start_worker(name)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.close_input()
        for child in self._children.values():
            child.join()

    def _start_worker(self, name: str) -> None:
        settings = WorkerSettings(name, self._url, self._namespace, self._port, FAIL_MAX, self.reset_timeout)
        self._children[name] = ChildProcess("worker", json.dumps(asdict(settings)), self._inbox)

    def replace(self, name: str) -> Event:
        """Kill a worker with SIGKILL, start another worker in its place, and return the event of the kill."""
        killed = Event(name, "killed", time.monotonic(), state="killed")
        self._children[name].kill()
        self._inbox.put(killed)
        # The dependency is one of the children, so the length is the next worker's number.
        successor = f"worker {len(self._children)}"
        self.names[self.names.index(name)] = successor
        self._start_worker(successor)
        return killed

    def switch(self, health: str) -> Event:
        """Set the dependency's health to ``up``, ``down`` or ``hanging``, and return its confirmation."""
        requested = time.monotonic()
        self._children["dependency"].send_line(health)
        return self.wait_until(f"the dependency goes {health}", lambda: self.seen("health", since=requested))[0]

    def kill_server(self) -> Event:
        """Kill the server that holds the circuit with SIGKILL, and return an event with the time before the kill."""
        assert self._server
        killed = Event("the server", "server", time.monotonic(), state="killed")
        self._server.kill()
        self._inbox.put(killed)
        return killed

    def start_server(self) -> Event:
        """Start the server again, empty and at the same address, and return an event with the time before."""
        assert self._server
        started = Event("the server", "server", time.monotonic(), state="started")
        self._server.restart(keep_data=False)
        self._inbox.put(started)
        return started

    def recorded(self, state: str) -> list[Event]:
        """Read the circuit in the server, and return an event if the circuit is in this state."""
        assert self._server
        with contextlib.closing(self._server.client(decode_responses=True)) as client:
            found = client.get(f"{self._namespace}:pybreaker:state")
        return [Event("the server", "server", time.monotonic(), state=state)] if found == state else []

    def seen(
        self, kind: Kind, *, source: str = "", state: str = "", since: float = 0.0, within: float = math.inf
    ) -> list[Event]:
        """Return the matching events so far.

        Args:
            kind: Kind of the events.
            source: Name of the process.  An empty text matches all processes.
            state: State of the events.  An empty text matches all states.
            since: Earliest time of the events, in seconds of the monotonic clock.
            within: Greatest age of the events, in seconds.
        """
        since = max(since, time.monotonic() - within)
        return [
            event
            for event in self._events
            if event.kind == kind and source in ("", event.source) and state in ("", event.state) and event.at >= since
        ]

    def each_worker(self, kind: Kind, *, since: float, times: int = 1) -> list[Event]:
        """Return each worker's call number `times` of a kind, or nothing until every worker has made that many."""
        calls = [self.seen(kind, source=name, since=since) for name in self.names]
        return [of_worker[times - 1] for of_worker in calls] if all(len(each) >= times for each in calls) else []

    def wait_until(
        self, promise: str, find: Callable[[], list[Event]], *, at_least: float = 0.0, expected: float = 0.0
    ) -> list[Event]:
        """Collect events until `find` returns some.

        Args:
            promise: Text that names the expected events.
            find: Function that returns the events that keep the promise, or an empty list.
            at_least: Seconds to wait in any case.
            expected: Seconds that the events may take, in addition to `PROMISE_GRACE_S`.

        Returns:
            The events that `find` returned.

        Raises:
            BrokenPromise: The events did not happen in time, or a worker's call raised an error of the storage.
            KeyboardInterrupt: A signal ends the demo.
        """
        start = time.monotonic()
        while not (events := find()) or time.monotonic() < start + at_least:
            self._interruption.check()
            if time.monotonic() > start + max(at_least, expected) + PROMISE_GRACE_S:
                raise BrokenPromise(f"did not happen in time: {promise}")
            # The inbox is emptied before the next check, because checks take longer the more events there are.
            with contextlib.suppress(queue.Empty):
                self._take(self._inbox.get(timeout=POLL_INTERVAL_S))
                while True:
                    self._take(self._inbox.get_nowait())
        return events

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._display.add_event(event)
        if event.kind == "leaked":
            raise BrokenPromise(f"a call of {event.source} ended with {event.error}")

    def note(self, label: str, value: str) -> None:
        """Add a line to the summary."""
        self.findings.append((label, value))
