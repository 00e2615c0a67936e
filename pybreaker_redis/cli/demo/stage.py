"""The processes of the demo, and everything that they have reported.

Knows: processes, pipes, the server if it is ours, the events so far.  Does not know: what ought to happen (the acts
do), how it is shown.
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

#: How many worker processes there are.
WORKERS = 3

#: Consecutive failures, of all workers together, that open the circuit.
FAIL_MAX = 5

#: Beats that the acts take, all together but for those without the server.
ACT_BEATS = 8

#: Seconds that the run takes beyond them: processes start, calls that hang give up, the lease of a dead prober ends.
ACT_FIXED_S = PROBE_LEASE_S + 4 * CALL_TIMEOUT_S

#: The same of those acts: each worker finds out that the dependency is dead, and later that the server is back.
OUTAGE_BEATS, OUTAGE_FIXED_S = 3, 2.5

#: Seconds of a beat, at least: less than this nobody could follow.
BEAT_MIN_S = 0.25

#: Seconds, at most, between two looks at whether what an act waits for has come.
POLL_INTERVAL_S = 0.05

#: Seconds beyond what is expected before a promise counts as broken: a machine may be busy.
PROMISE_GRACE_S = 15.0

#: Seconds that a process has to end in good order.
EXIT_TIMEOUT_S = 3.0


class BrokenPromise(Exception):
    """Something that is promised did not happen, or something happened that never should; the message says what."""


class ChildProcess:
    """A process of the demo: it reports on its standard output, and ends when its standard input does.

    So it ends with us even if we are killed.

    Args:
        module: Which one, of this package.
        argument: Its command line.
        inbox: Where its reports go.
    """

    def __init__(self, module: str, argument: str, inbox: queue.Queue[Event]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in the terminal is for the demo alone.
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
        """Write a line to its standard input."""
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it without warning, and wait until everything that it has reported is in the inbox."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def close_input(self) -> None:
        """Ask it to end."""
        assert self._process.stdin
        self._process.stdin.close()

    def join(self) -> None:
        """Wait until it has ended, and see to it that it does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)
        self.kill()


class Stage:
    """A dependency, workers that call it through one circuit, and what they have reported.

    Args:
        url: The server that holds the circuit.
        namespace: The circuit.
        seconds: How long the whole run is to last, roughly.
        show: Is told everything.
        interruption: May end it early.
        server: The same server, if it may be killed.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        seconds: float,
        show: Display,
        *,
        interruption: Interruption,
        server: PrivateServer | None = None,
    ) -> None:
        beats, fixed = (ACT_BEATS + OUTAGE_BEATS, ACT_FIXED_S + OUTAGE_FIXED_S) if server else (ACT_BEATS, ACT_FIXED_S)
        #: The time, in seconds, that the acts count in.
        self.beat = max(BEAT_MIN_S, (seconds - fixed) / beats)
        #: Seconds that the circuit stays open.
        self.reset_timeout = self.beat
        #: Those of the workers that are alive.
        self.names = [f"worker {number}" for number in range(1, WORKERS + 1)]
        #: What the acts found out: a label and a value each.
        self.findings: list[tuple[str, str]] = []
        self._url = url
        self._namespace = namespace
        self._show = show
        self._interruption = interruption
        self._server = server
        self._events: list[Event] = []
        self._inbox: queue.Queue[Event] = queue.Queue()
        #: By name; also those that were killed.
        self._children: dict[str, ChildProcess] = {}
        self._port = 0

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as undo:
            undo.push(self)
            self._children["dependency"] = ChildProcess("dependency", "", self._inbox)
            self._port = self.until("the dependency starts", lambda: self.seen("ready"))[0].port
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
        """Kill a worker without warning and start another one in its place; returns the moment of the kill."""
        killed = Event(name, "killed", time.monotonic(), state="killed")
        self._children[name].kill()
        self._inbox.put(killed)
        successor = f"worker {len(self._children)}"  # the dependency is one of them
        self.names[self.names.index(name)] = successor
        self._start_worker(successor)
        return killed

    def switch(self, health: str) -> Event:
        """Make the dependency ``up``, ``down`` or ``hanging``; returns its confirmation."""
        asked = time.monotonic()
        self._children["dependency"].send_line(health)
        return self.until(f"the dependency goes {health}", lambda: self.seen("health", since=asked))[0]

    def kill_server(self) -> Event:
        """Kill the server that holds the circuit, without warning; returns the moment before."""
        assert self._server
        killed = Event("the server", "server", time.monotonic(), state="killed")
        self._server.kill()
        self._inbox.put(killed)
        return killed

    def start_server(self) -> Event:
        """Start it again, at the same address and with nothing in it; returns the moment before."""
        assert self._server
        started = Event("the server", "server", time.monotonic(), state="started")
        self._server.restart(keep_data=False)
        self._inbox.put(started)
        return started

    def recorded(self, state: str) -> list[Event]:
        """The server's own word for it, if the circuit in it is in this state."""
        assert self._server
        with contextlib.closing(self._server.client(decode_responses=True)) as client:
            found = client.get(f"{self._namespace}:pybreaker:state")
        return [Event("the server", "server", time.monotonic(), state=state)] if found == state else []

    def seen(
        self, kind: Kind, *, source: str = "", state: str = "", since: float = 0.0, within: float = math.inf
    ) -> list[Event]:
        """What has been reported so far.

        Args:
            kind: What happened.
            source: In which process; in any if empty.
            state: With which state; any if empty.
            since: Not before this time.
            within: Not longer ago than so many seconds.
        """
        since = max(since, time.monotonic() - within)
        return [
            event
            for event in self._events
            if event.kind == kind and source in ("", event.source) and state in ("", event.state) and event.at >= since
        ]

    def each_worker(self, kind: Kind, *, since: float, times: int = 1) -> list[Event]:
        """Each worker's call number *times* of this kind; empty until every worker has made that many."""
        calls = [self.seen(kind, source=name, since=since) for name in self.names]
        return [of_one[times - 1] for of_one in calls] if all(len(of_one) >= times for of_one in calls) else []

    def until(
        self, promise: str, found: Callable[[], list[Event]], *, at_least: float = 0.0, expected: float = 0.0
    ) -> list[Event]:
        """Go on until something has happened.

        Args:
            promise: What is to happen, in words.
            found: Returns the events that show it, or nothing.
            at_least: Go on for so many seconds in any case.
            expected: It may take so many seconds, and :data:`GRACE`.

        Returns:
            What *found* returned.

        Raises:
            BrokenPromise: It did not happen in time, or a worker's call ended with an error that it must not see.
            KeyboardInterrupt: The demo is to end.
        """
        start = time.monotonic()
        while not (events := found()) or time.monotonic() < start + at_least:
            self._interruption.check()
            if time.monotonic() > start + max(at_least, expected) + PROMISE_GRACE_S:
                raise BrokenPromise(f"did not happen in time: {promise}")
            # All that is there before the next look: a look takes the longer the more has been reported.
            with contextlib.suppress(queue.Empty):
                self._take(self._inbox.get(timeout=POLL_INTERVAL_S))
                while True:
                    self._take(self._inbox.get_nowait())
        return events

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._show.event(event)
        if event.kind == "leaked":
            raise BrokenPromise(f"a call of {event.source} ended with {event.error}")

    def note(self, label: str, value: str) -> None:
        """Add a line to the summary."""
        self.findings.append((label, value))
