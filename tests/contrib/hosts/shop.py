"""A host that serves the application, the dependency behind it, and a crowd in front of it.

A test sets how the dependency does, and has the crowd ask until it has heard enough.  Everything has a deadline; who
misses it is shown the host's log.

Knows: nodes, doors, what the application answers.  Does not know: pytest, which promise is being tested.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybreaker

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.testing.scratch import Scratch
from pybreaker_redis.testing.servers import PrivateServer
from tests.contrib.hosts.doors import BrokerDoor, Door, HttpDoor, NoAnswer, broker_of
from tests.contrib.hosts.kinds import Kind
from tests.contrib.hosts.node import Node

#: Seconds that anything may take before the test fails.
DEADLINE = 30.0

#: Failures that open the circuit.
FAIL_MAX = 3

#: How many of the crowd ask at the same time, as long as they are answered.
AT_ONCE = 8

#: The most that may be waiting for an answer.
CROWD = 64

#: Seconds without any answer after which somebody else asks: those who are held up do not hold up the others.
IMPATIENCE = 0.05


class ShopFailed(Exception):
    """The host did not start, or something did not come true in time; the message ends with its log."""


@dataclass(frozen=True)
class Answer:
    """What somebody in the crowd was told.

    Attributes:
        pid: The process that answered.
        began: When it was asked, monotonic seconds.
        ended: When it had answered.
        outcome: Of a guarded call: ``ok``, ``failed`` or ``rejected``; the last did not reach the dependency.
        state: Of the circuit, to one that looks.
        threads: Names of the process's threads, to one that looks.
        gevent: Whether they are greenlets.
        page: Of metrics, to one that scrapes.
    """

    pid: int
    began: float
    ended: float
    outcome: str = ""
    state: str = ""
    threads: tuple[str, ...] = ()
    gevent: bool = False
    page: str = ""


@dataclass(frozen=True)
class Visit:
    """A call that reached the dependency.

    Attributes:
        pid: Whose.
        began: Monotonic seconds.
    """

    pid: int
    began: float


class Shop:
    """One host, started and answering; a context manager that leaves nothing behind.

    Args:
        kind: Which.
        server: Where the circuit lies.
        directory: For logs, and for the file that is the dependency.
        reset_timeout: Of the breaker, seconds.
        recycle: Let workers end after some requests.
        call_at_import: Let whoever loads the application make a guarded call.
        storage: Further parameters of the storage.
    """

    def __init__(
        self,
        kind: Kind,
        server: PrivateServer,
        directory: Path,
        *,
        reset_timeout: float = 60.0,
        recycle: bool = False,
        call_at_import: bool = False,
        **storage: float,
    ) -> None:
        self.kind = kind
        self._server = server
        self._directory = directory
        self._reset_timeout = reset_timeout
        self._recycle = recycle
        self._call_at_import = call_at_import
        # A busy machine is no outage.
        self._storage = {"timeout": 10.0, **storage}
        self._mood = directory / "dependency"
        self._visits = directory / "visits"
        self._waiting: set[Future[Answer]] = set()
        self._closing = contextlib.ExitStack()
        #: Seconds for which the crowd rests after each answer.
        self.rest = 0.0
        self._door: Door
        self.nodes: list[Node] = []

    # From start to end --------------------------------------------------------------------------------------------

    def __enter__(self) -> Shop:  # typing.Self is new in 3.11
        with contextlib.ExitStack() as stack:
            # Not pytest's tmp_path: the path of a unix socket has at most 107 bytes.
            scratch = Scratch()
            stack.callback(scratch.remove)
            unix_socket = str(scratch.path / "host.sock")
            self._door = self._make_door(unix_socket)
            stack.callback(self._door.close)
            self._crowd = ThreadPoolExecutor(CROWD)
            stack.callback(self._crowd.shutdown, cancel_futures=True)
            self.set_dependency("up")
            for number in range(self.kind.nodes):
                words = {"socket": unix_socket, "node": f"node{number}", "directory": self._directory}
                parts = self.kind.command + (self.kind.recycle if self._recycle else ())
                command = [part.format_map(words) for part in parts]
                node = Node(command, self._directory / f"node{number}.log", self._environment())
                stack.callback(node.close)
                self.nodes.append(node)
            self._wait_until_ready()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Nobody waits any longer for a call that the test has left held.
        self.set_dependency("down")
        self._closing.close()

    def _make_door(self, unix_socket: str) -> Door:
        return BrokerDoor(self._server) if self.kind.by_broker else HttpDoor(unix_socket)

    def _environment(self) -> dict[str, str]:
        return {
            "SHOP_UNIX_SOCKET": self._server.unix_socket,
            "SHOP_BROKER": broker_of(self._server),
            "SHOP_DEPENDENCY": str(self._mood),
            "SHOP_VISITS": str(self._visits),
            "SHOP_FAIL_MAX": str(FAIL_MAX),
            "SHOP_RESET_TIMEOUT": str(self._reset_timeout),
            "SHOP_CALL_AT_IMPORT": "yes" if self._call_at_import else "no",
            "SHOP_STORAGE": json.dumps(self._storage),
        }

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + DEADLINE
        answered = False
        while not answered or len(self.workers()) < self.kind.workers:
            if time.monotonic() > until or not all(node.runs for node in self.nodes):
                raise ShopFailed(f"{self.kind.name} did not start; its log:\n{self.log}")
            try:
                self.ask("ready")
                answered = True
            except NoAnswer:
                time.sleep(0.02)

    # The processes ------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """What the host has printed."""
        return "\n".join(node.log for node in self.nodes)

    def workers(self) -> set[int]:
        """The processes that answer."""
        if not self.kind.forks:
            return {node.pid for node in self.nodes}
        return {child for node in self.nodes for child in node.children()}

    def wait_for(self, what: str, condition: Callable[[], bool], within: float = DEADLINE) -> None:
        """Wait until `condition` is true."""
        until = time.monotonic() + within
        while not condition():
            if time.monotonic() > until:
                raise ShopFailed(f"{what}: not within {within:.0f} s; the host's log:\n{self.log}")
            time.sleep(0.01)

    # The dependency -----------------------------------------------------------------------------------------------

    def set_dependency(self, mood: str) -> float:
        """From now on, which is returned in monotonic seconds, it is ``up``, ``down`` or ``held``."""
        new = self._mood.with_suffix(".new")
        new.write_text(mood)
        new.replace(self._mood)
        return time.monotonic()

    def visits(self, since: float) -> list[Visit]:
        """The calls that have reached it since a monotonic time."""
        lines = self._visits.read_text().splitlines() if self._visits.exists() else []
        return [visit for line in lines if (visit := Visit(*json.loads(line))).began >= since]

    def idle(self) -> bool:
        """Whether the host knows that it has answered everybody."""
        return self._door.idle()

    # The crowd ----------------------------------------------------------------------------------------------------

    def ask(self, what: str) -> Answer:
        """Ask once."""
        began = time.monotonic()
        said = self._door.ask(what)
        said["threads"] = tuple(said.get("threads", ()))
        return Answer(began=began, ended=time.monotonic(), **said)

    def ask_until(self, what: str, enough: Callable[[list[Answer]], bool], *, leave: bool = False) -> list[Answer]:
        """Have the crowd ask, several at once and without a pause, until it has heard enough.

        Args:
            what: To ask for.
            enough: Whether these answers are.
            leave: Do not wait for the answers that are then still to come; the next crowd hears them first.

        Returns:
            All answers.

        Raises:
            NoAnswer: One of them was none.
            ShopFailed: It was never enough.
        """
        answers: list[Answer] = []
        until = time.monotonic() + DEADLINE
        at_once = AT_ONCE
        while not enough(answers):
            if time.monotonic() > until:
                raise ShopFailed(f"{what}: never enough; {_summary(answers)}; the host's log:\n{self.log}")
            for _ in range(at_once - len(self._waiting)):
                self._waiting.add(self._crowd.submit(self.ask, what))
            if not self._hear(answers, IMPATIENCE):
                at_once = min(len(self._waiting) + AT_ONCE, CROWD)
            time.sleep(self.rest)
        while self._waiting and not leave:
            self._hear(answers, DEADLINE)
        return answers

    def _hear(self, answers: list[Answer], within: float) -> int:
        done, self._waiting = wait(self._waiting, within, FIRST_COMPLETED)
        answers += (future.result() for future in done)
        return len(done)

    def hear_all(self, what: str, condition: Callable[[Answer], bool], *, leave: bool = False) -> list[Answer]:
        """Have the crowd ask until each worker that is there has given an answer like this."""

        def enough(answers: list[Answer]) -> bool:
            workers = self.workers()
            heard = {answer.pid for answer in answers if condition(answer)}
            return len(workers) == self.kind.workers and workers <= heard

        return self.ask_until(what, enough, leave=leave)

    def call_all(self, outcome: str) -> list[Answer]:
        """Have the crowd call until each worker that is there has had this outcome."""
        return self.hear_all("call", lambda answer: answer.outcome == outcome)

    def look_all(self) -> dict[int, Answer]:
        """One look at each worker that is there."""
        return {answer.pid: answer for answer in self.hear_all("look", lambda _: True)}

    def hold_probe(self) -> tuple[float, Visit]:
        """Let the dependency keep callers waiting, and call until one waits; since when it does, and the one."""
        held = self.set_dependency("held")
        self.ask_until("call", lambda _: bool(self.visits(since=held)), leave=True)
        return held, self.visits(since=held)[0]

    def trip(self) -> float:
        """Let the dependency die, and call until the circuit must be open; when that was, monotonic seconds."""
        self.set_dependency("down")
        outcomes = [self.ask("call").outcome for _ in range(FAIL_MAX)]
        if outcomes != ["failed"] * FAIL_MAX:
            raise ShopFailed(f"calls of a closed circuit: {outcomes}; the host's log:\n{self.log}")
        return time.monotonic()

    def trip_elsewhere(self) -> float:
        """Have a process that is not of this host open the circuit: this one; when that was, monotonic seconds."""
        with contextlib.closing(self._server.client()) as client:
            storage = CircuitRedisStorage("closed", client, namespace="shop", max_staleness=0, timeout=10)
            pybreaker.CircuitBreaker(state_storage=storage).open()
        return time.monotonic()


def _summary(answers: list[Answer]) -> dict[int, dict[str, int]]:
    counts: dict[int, dict[str, Any]] = {}
    for answer in answers:
        of_worker = counts.setdefault(answer.pid, {})
        of_worker[answer.outcome] = of_worker.get(answer.outcome, 0) + 1
    return counts
