"""A host that serves the application, the dependency behind it, and a crowd of callers.

A test sets the condition of the dependency, and lets the crowd send requests until its answers suffice.  Everything has
a deadline, and the error about a missed one contains the host's log.
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

#: Parallel requests of the crowd while answers arrive.
AT_ONCE = 8

#: Most requests that may wait for an answer.
CROWD_MAX = 64

#: Seconds without any answer after which the crowd sends further requests beside the waiting ones.
NO_ANSWER_S = 0.05


class ShopFailed(Exception):
    """The host did not start, or a condition missed its deadline.  The message ends with the host's log."""


@dataclass(frozen=True)
class Answer:
    """Answer to one request of the crowd.

    Attributes:
        pid: Process that answered.
        began: Monotonic seconds at the request.
        ended: Monotonic seconds at the answer.
        outcome: Outcome of a guarded call: ``ok``, ``failed`` or ``rejected``.
        state: State of the circuit, for requests ``look``.
        threads: Names of the process's threads, for requests ``look``.
        gevent: Whether the threads are greenlets.
        page: Page of metrics, for scrapes.
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
        pid: Process of the call.
        began: Monotonic seconds.
    """

    pid: int
    began: float


class Shop:
    """One host, started and answering, as a context manager that ends every process.

    Args:
        kind: Kind of the host.
        server: Server that holds the circuit.
        directory: Directory for logs and the dependency's file.
        reset_timeout: Reset timeout of the breaker, seconds.
        recycle: Whether workers end after some requests.
        call_at_import: Whether a process that loads the application makes a guarded call.
        storage: Further arguments of the storage.
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
        # A slow answer of a busy machine is no outage.
        self._storage = {"timeout": 10.0, **storage}
        self._condition_file = directory / "dependency"
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
            self._crowd = ThreadPoolExecutor(CROWD_MAX)
            stack.callback(self._crowd.shutdown, cancel_futures=True)
            self.set_dependency("up")
            for number in range(self.kind.nodes):
                values = {"socket": unix_socket, "node": f"node{number}", "directory": self._directory}
                parts = self.kind.command + (self.kind.recycle if self._recycle else ())
                command = [part.format_map(values) for part in parts]
                node = Node(command, self._directory / f"node{number}.log", self._environment())
                stack.callback(node.close)
                self.nodes.append(node)
            self._wait_until_ready()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Release calls that the test has left waiting.
        self.set_dependency("down")
        self._closing.close()

    def _make_door(self, unix_socket: str) -> Door:
        return BrokerDoor(self._server) if self.kind.by_broker else HttpDoor(unix_socket)

    def _environment(self) -> dict[str, str]:
        return {
            "SHOP_UNIX_SOCKET": self._server.unix_socket,
            "SHOP_BROKER": broker_of(self._server),
            "SHOP_DEPENDENCY": str(self._condition_file),
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
                self.request("ready")
                answered = True
            except NoAnswer:
                time.sleep(0.02)

    # The processes ------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """Output of the host."""
        return "\n".join(node.log for node in self.nodes)

    def workers(self) -> set[int]:
        """Return the answering processes."""
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

    def set_dependency(self, condition: str) -> float:
        """Set the dependency to ``up``, ``down`` or ``held``, and return the monotonic time of the change."""
        new = self._condition_file.with_suffix(".new")
        new.write_text(condition)
        new.replace(self._condition_file)
        return time.monotonic()

    def visits(self, since: float) -> list[Visit]:
        """Return the calls that reached the dependency since a monotonic time."""
        lines = self._visits.read_text().splitlines() if self._visits.exists() else []
        return [visit for line in lines if (visit := Visit(*json.loads(line))).began >= since]

    def idle(self) -> bool:
        """Return whether the host itself counts every request as answered."""
        return self._door.idle()

    # The crowd ----------------------------------------------------------------------------------------------------

    def request(self, what: str) -> Answer:
        """Send one request."""
        began = time.monotonic()
        reply = self._door.request(what)
        reply["threads"] = tuple(reply.get("threads", ()))
        return Answer(began=began, ended=time.monotonic(), **reply)

    def request_until(self, what: str, enough: Callable[[list[Answer]], bool], *, leave: bool = False) -> list[Answer]:
        """Let the crowd send requests in parallel until the answers suffice.

        Args:
            what: Name of the request.
            enough: Function that decides whether these answers suffice.
            leave: Whether to return without the answers that are still due.  The next crowd receives them first.

        Returns:
            All answers.

        Raises:
            NoAnswer: A request failed.
            ShopFailed: The answers never sufficed.
        """
        answers: list[Answer] = []
        until = time.monotonic() + DEADLINE
        at_once = AT_ONCE
        while not enough(answers):
            if time.monotonic() > until:
                raise ShopFailed(f"{what}: never enough; {_summary(answers)}; the host's log:\n{self.log}")
            for _ in range(at_once - len(self._waiting)):
                self._waiting.add(self._crowd.submit(self.request, what))
            if not self._receive(answers, NO_ANSWER_S):
                at_once = min(len(self._waiting) + AT_ONCE, CROWD_MAX)
            time.sleep(self.rest)
        while self._waiting and not leave:
            self._receive(answers, DEADLINE)
        return answers

    def _receive(self, answers: list[Answer], within: float) -> int:
        done, self._waiting = wait(self._waiting, within, FIRST_COMPLETED)
        answers += (future.result() for future in done)
        return len(done)

    def answers_of_all(self, what: str, condition: Callable[[Answer], bool], *, leave: bool = False) -> list[Answer]:
        """Let the crowd send requests until each present worker has given such an answer."""

        def enough(answers: list[Answer]) -> bool:
            workers = self.workers()
            answered = {answer.pid for answer in answers if condition(answer)}
            return len(workers) == self.kind.workers and workers <= answered

        return self.request_until(what, enough, leave=leave)

    def call_all(self, outcome: str) -> list[Answer]:
        """Let the crowd make calls until each present worker has had this outcome."""
        return self.answers_of_all("call", lambda answer: answer.outcome == outcome)

    def look_all(self) -> dict[int, Answer]:
        """Return one look at each present worker."""
        return {answer.pid: answer for answer in self.answers_of_all("look", lambda _: True)}

    def hold_probe(self) -> tuple[float, Visit]:
        """Hold the dependency's callers, make calls until one waits, and return the time of the hold and that call."""
        held = self.set_dependency("held")
        self.request_until("call", lambda _: bool(self.visits(since=held)), leave=True)
        return held, self.visits(since=held)[0]

    def trip(self) -> float:
        """Let the dependency die, make calls until the circuit must be open, and return that monotonic time."""
        self.set_dependency("down")
        outcomes = [self.request("call").outcome for _ in range(FAIL_MAX)]
        if outcomes != ["failed"] * FAIL_MAX:
            raise ShopFailed(f"calls of a closed circuit: {outcomes}; the host's log:\n{self.log}")
        return time.monotonic()

    def trip_elsewhere(self) -> float:
        """Open the circuit from this process, which is none of the host's, and return the monotonic time."""
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
