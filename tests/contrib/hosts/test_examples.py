"""The examples as people run them: one worker's trip is everybody's 503, recovery is one probe, Redis may be killed."""

from __future__ import annotations

import contextlib
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import pools

from pybreaker_redis.testing.servers import PrivateServer
from tests.contrib.hosts.doors import broker_of
from tests.contrib.hosts.examples import CELERY, SLOW, WEB, Example, Payments, environment
from tests.contrib.hosts.kinds import Kind
from tests.contrib.hosts.node import Node
from tests.contrib.hosts.shop import AT_ONCE, FAIL_MAX, Answer
from tests.support.logs import ALARMS
from tests.support.wait import wait_for

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

#: Seconds after which every worker must know what one of them has done.
MAX_STALENESS = 1.0

#: Seconds that anything of Celery's may take.
PATIENCE = 30.0

on_every_web_example = pytest.mark.parametrize("kind", WEB, ids=operator.attrgetter("name"))


@pytest.fixture
def payments() -> Iterator[Payments]:
    """What the examples depend on."""
    with Payments() as payments:
        yield payments


@pytest.fixture
def open_example(
    kind: Kind, killable_server: PrivateServer, payments: Payments, tmp_path: Path
) -> Iterator[Callable[..., Example]]:
    """Start the example that the test is about; no worker of it may print a traceback."""
    if kind.missing():
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {kind.missing()}")
        pytest.skip(f"not installed: {kind.missing()}")
    examples: list[Example] = []
    with contextlib.ExitStack() as stack:

        def start(reset_timeout: float) -> Example:
            examples.append(Example(kind, killable_server, tmp_path, payments, reset_timeout=reset_timeout))
            return stack.enter_context(examples[-1])

        yield start
    for example in examples:
        print(example.log)
        assert not [line for line in example.log.splitlines() if any(alarm in line for alarm in ALARMS)]


@on_every_web_example
def test_trip_in_one_worker_is_a_fast_503_by_all(open_example):
    """Failures, whoever saw them, open the circuit; then nobody calls, and nobody waits for what would fail."""
    example = open_example(reset_timeout=60.0)
    example.call_all("ok")
    tripped = example.trip()
    # A worker that does not know would go on with success, and so never find out by itself.
    example.set_dependency("up")
    example.call_all("rejected")
    example.wait_for("all must know", lambda: time.monotonic() > tripped + MAX_STALENESS)
    answers = example.call_all("rejected")
    assert {answer.outcome for answer in answers} == {"rejected"}
    assert not example.visits(since=tripped + MAX_STALENESS)
    answers += example.ask_until("call", lambda got: len(got) >= 10 * AT_ONCE)
    fastest = {one.pid: min(each.ended - each.began for each in answers if each.pid == one.pid) for one in answers}
    assert max(fastest.values()) < SLOW


@on_every_web_example
def test_recovery_is_one_probe(open_example):
    """While one request tries the service nobody else reaches it; then all may."""
    example = open_example(reset_timeout=0.5)
    example.call_all("ok")
    example.trip()
    example.call_all("rejected")
    held, probe = example.hold_probe()

    def others_rejected(answers: list[Answer]) -> bool:
        rejected = [item.pid for item in answers if item.began > probe.began and item.outcome == "rejected"]
        # The fourth worker is the one that tries.
        return len(rejected) > 4 * AT_ONCE and len(set(rejected)) >= example.kind.workers - 1

    example.ask_until("call", others_rejected, leave=True)
    assert example.visits(since=held) == [probe]
    example.set_dependency("up")
    example.call_all("ok")


@on_every_web_example
def test_redis_that_is_killed_shows_nobody_an_error_page(open_example, killable_server: PrivateServer):
    """An open circuit stays open without Redis, then each worker recovers by itself: no other answer but these."""
    example = open_example(reset_timeout=2.0)
    example.call_all("ok")
    example.trip()
    example.call_all("rejected")
    killable_server.kill()
    example.call_all("rejected")
    example.set_dependency("up")
    example.call_all("ok")
    killable_server.start()
    example.call_all("ok")


# -- Celery ------------------------------------------------------------------------------------------------------------

#: A line of Celery's that says which child has done what with a task.
LINE = re.compile(r"ForkPoolWorker-(\d+)\] Task tasks\.pay\[[\w-]+\] (succeeded|retry|raised)")


#: Seconds for which the circuit of the tasks stays open.
RESET_TIMEOUT = 2.0

#: The example's processes.
CHILDREN = 4


class Worker:
    """The example's worker, and who sends tasks to it."""

    def __init__(self, broker: PrivateServer, node: Node, payments: Payments) -> None:
        self._node = node
        self._payments = payments
        self._celery = Celery(broker=broker_of(broker), backend=broker_of(broker), set_as_current=False)

    def close(self) -> None:
        """End the worker, and give all connections back."""
        self._node.close()
        self._celery.close()
        pools.reset()

    def pay(self, count: int) -> list[Any]:
        """Send so many payments; their results."""
        return [self._celery.send_task("tasks.pay") for _ in range(count)]

    def said(self) -> list[tuple[str, str]]:
        """Which child has done what, in order."""
        return LINE.findall(self._node.log)

    def pay_until_all(self, have: str, but: int = 0) -> list[Any]:
        """Send payments until each child, all but so many, has done that with one of them since now; their results."""
        begin = len(self.said())
        results: list[Any] = []

        def all_have() -> bool:
            said = self.said()[begin:]
            # One of them may be held.
            if len(said) >= len(results) - 1:
                results.extend(self.pay(AT_ONCE))
            return len({child for child, done in said if done == have}) >= CHILDREN - but

        self.wait_for(all_have, f"{have} in each child")
        return results

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until a condition holds; if it never does, show the log."""
        try:
            wait_for(condition, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._node.log}") from None

    def all_pay(self) -> None:
        """See each child make a payment, and all that was sent for that succeed."""
        results = self.pay_until_all("succeeded")
        assert {self.ended(result) for result in results} == {"SUCCESS"}, self._node.log

    def trip(self) -> float:
        """Let the service die, and pay until the circuit must be open; when that was, monotonic seconds."""
        self._payments.mood = "down"
        states = [self.ended(result) for _ in range(FAIL_MAX) for result in self.pay(1)]
        assert states == ["FAILURE"] * FAIL_MAX, self._node.log
        return time.monotonic()

    def ended(self, result: Any) -> str:
        """Wait until a payment has ended; how."""
        self.wait_for(result.ready, "a payment ends")
        state: str = result.state
        return state


@pytest.fixture
def worker(
    server: PrivateServer, killable_server: PrivateServer, payments: Payments, tmp_path: Path
) -> Iterator[Worker]:
    """The example's worker with four children; its broker is not the Redis of the circuit."""
    where = environment(killable_server, payments, RESET_TIMEOUT)
    node = Node(CELERY, tmp_path / "celery.log", {**where, "BROKER_URL": broker_of(server), "PROBE_LEASE": "6"})
    with contextlib.closing(Worker(server, node, payments)) as worker:
        yield worker
        print(node.log)


def test_rejected_tasks_come_back_and_one_of_them_probes(worker: Worker, payments: Payments):
    """When three payments have failed no child calls; later one task tries, and if that goes well the others pay."""
    worker.all_pay()
    tripped = worker.trip()
    payments.mood = "held"
    rejected = worker.pay_until_all("retry", but=1)
    worker.wait_for(lambda: payments.since(tripped), "a probe")
    (probe,) = payments.since(tripped)
    assert probe > tripped + RESET_TIMEOUT / 2
    rejected += worker.pay_until_all("retry", but=1)
    assert payments.since(tripped) == [probe]
    payments.mood = "up"
    worker.all_pay()
    worker.wait_for(lambda: any(result.successful() for result in rejected), "a rejected payment is made")
    assert not [result for result in rejected if result.failed()]


def test_redis_that_is_killed_fails_no_task(worker: Worker, payments: Payments, killable_server: PrivateServer):
    """A circuit that is out of reach goes on in each child: open, then closed; rejected tasks come back and pay."""
    worker.all_pay()
    worker.trip()
    killable_server.kill()
    payments.mood = "up"
    before = len(worker.said())
    results = worker.pay(16)
    assert {worker.ended(result) for result in results} == {"SUCCESS"}
    assert "retry" in {done for _, done in worker.said()[before:]}
    worker.all_pay()
