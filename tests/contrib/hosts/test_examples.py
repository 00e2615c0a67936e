"""The examples under their servers: a trip in one worker rejects calls in all, one call probes, Redis may die."""

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
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

#: Seconds after which every worker must follow a transition.
MAX_STALENESS = 1.0

#: Seconds that anything of Celery's may take.
PATIENCE = 30.0

on_every_web_example = pytest.mark.parametrize("kind", WEB, ids=operator.attrgetter("name"))


@pytest.fixture
def payments() -> Iterator[Payments]:
    """Service that the examples depend on."""
    with Payments() as payments:
        yield payments


@pytest.fixture
def open_example(
    kind: Kind, killable_server: PrivateServer, payments: Payments, tmp_path: Path
) -> Iterator[Callable[..., Example]]:
    """Function that starts the example of this test.  The workers must print no traceback."""
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
def test_trip_in_one_worker_is_a_fast_503_in_all(open_example):
    """Failures of any workers open the circuit, and then each worker rejects calls quickly."""
    example = open_example(reset_timeout=60.0)
    example.call_all("ok")
    tripped = example.trip()
    # A worker with an old view would continue with successes, and therefore not notice by itself.
    example.set_dependency("up")
    example.call_all("rejected")
    example.wait_for("every view is fresh", lambda: time.monotonic() > tripped + MAX_STALENESS)
    answers = example.call_all("rejected")
    assert {answer.outcome for answer in answers} == {"rejected"}
    assert not example.visits(since=tripped + MAX_STALENESS)
    answers += example.request_until("call", lambda got: len(got) >= 10 * AT_ONCE)
    fastest = {one.pid: min(each.ended - each.began for each in answers if each.pid == one.pid) for one in answers}
    assert max(fastest.values()) < SLOW


@on_every_web_example
def test_recovery_takes_one_probe(open_example):
    """While one request probes the service all others are rejected, and after it all are admitted."""
    example = open_example(reset_timeout=0.5)
    example.call_all("ok")
    example.trip()
    example.call_all("rejected")
    held, probe = example.hold_probe()

    def others_rejected(answers: list[Answer]) -> bool:
        rejected = [item.pid for item in answers if item.began > probe.began and item.outcome == "rejected"]
        # The fourth worker makes the probe.
        return len(rejected) > 4 * AT_ONCE and len(set(rejected)) >= example.kind.workers - 1

    example.request_until("call", others_rejected, leave=True)
    assert example.visits(since=held) == [probe]
    example.set_dependency("up")
    example.call_all("ok")


@on_every_web_example
def test_killed_redis_leads_to_no_error_page(open_example, killable_server: PrivateServer):
    """Without Redis an open circuit stays open, each worker recovers by itself, and no request gets an error page."""
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

#: A line of Celery about the outcome of a task in a child.
LINE = re.compile(r"ForkPoolWorker-(\d+)\] Task tasks\.pay\[[\w-]+\] (succeeded|retry|raised)")


#: Seconds for which the circuit of the tasks stays open.
RESET_TIMEOUT = 2.0

#: Number of the example's child processes.
CHILDREN = 4


class Worker:
    """The example's worker, and a client that sends tasks to it."""

    def __init__(self, broker: PrivateServer, node: Node, payments: Payments) -> None:
        self._node = node
        self._payments = payments
        self._celery = Celery(broker=broker_of(broker), backend=broker_of(broker), set_as_current=False)

    def close(self) -> None:
        """End the worker and close all connections."""
        self._node.close()
        self._celery.close()
        pools.reset()

    def pay(self, count: int) -> list[Any]:
        """Send so many payments, and return their results."""
        return [self._celery.send_task("tasks.pay") for _ in range(count)]

    def outcomes(self) -> list[tuple[str, str]]:
        """Return child and outcome of each task so far, in order."""
        return LINE.findall(self._node.log)

    def pay_until_all(self, have: str, except_count: int = 0) -> list[Any]:
        """Send payments until each child, except `except_count`, has had this outcome, and return the results."""
        begin = len(self.outcomes())
        results: list[Any] = []

        def all_have() -> bool:
            outcomes = self.outcomes()[begin:]
            # One of the tasks may be held.
            if len(outcomes) >= len(results) - 1:
                results.extend(self.pay(AT_ONCE))
            return len({child for child, done in outcomes if done == have}) >= CHILDREN - except_count

        self.wait_for(all_have, f"{have} in each child")
        return results

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until a condition holds, and raise an error with the log if it never does."""
        try:
            wait_for(condition, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._node.log}") from None

    def all_pay(self) -> None:
        """Make each child complete a payment, and assert that all payments succeed."""
        results = self.pay_until_all("succeeded")
        assert {self.ended(result) for result in results} == {"SUCCESS"}, self._node.log

    def trip(self) -> float:
        """Let the service die, pay until the circuit must be open, and return that monotonic time."""
        self._payments.condition = "down"
        states = [self.ended(result) for _ in range(FAIL_MAX) for result in self.pay(1)]
        assert states == ["FAILURE"] * FAIL_MAX, self._node.log
        return time.monotonic()

    def ended(self, result: Any) -> str:
        """Wait until a payment has ended, and return its state."""
        self.wait_for(result.ready, "a payment ends")
        state: str = result.state
        return state


@pytest.fixture
def worker(
    server: PrivateServer, killable_server: PrivateServer, payments: Payments, tmp_path: Path
) -> Iterator[Worker]:
    """The example's worker with four children, on a broker that is not the Redis of the circuit."""
    where = environment(killable_server, payments, RESET_TIMEOUT)
    node = Node(CELERY, tmp_path / "celery.log", {**where, "BROKER_URL": broker_of(server), "PROBE_LEASE": "6"})
    with contextlib.closing(Worker(server, node, payments)) as worker:
        yield worker
        print(node.log)


def test_rejected_tasks_are_retried_and_one_of_them_probes(worker: Worker, payments: Payments):
    """After three failed payments no child calls the service.  Later one task probes, and then the others pay."""
    worker.all_pay()
    tripped = worker.trip()
    payments.condition = "held"
    rejected = worker.pay_until_all("retry", except_count=1)
    worker.wait_for(lambda: payments.since(tripped), "a probe")
    (probe,) = payments.since(tripped)
    assert probe > tripped + RESET_TIMEOUT / 2
    rejected += worker.pay_until_all("retry", except_count=1)
    assert payments.since(tripped) == [probe]
    payments.condition = "up"
    worker.all_pay()
    worker.wait_for(lambda: any(result.successful() for result in rejected), "a rejected payment is made")
    assert not [result for result in rejected if result.failed()]


def test_killed_redis_fails_no_task(worker: Worker, payments: Payments, killable_server: PrivateServer):
    """Without Redis each child's circuit is open, then closed, and rejected tasks are retried until they pay."""
    worker.all_pay()
    worker.trip()
    killable_server.kill()
    payments.condition = "up"
    before = len(worker.outcomes())
    results = worker.pay(16)
    assert {worker.ended(result) for result in results} == {"SUCCESS"}
    assert "retry" in {done for _, done in worker.outcomes()[before:]}
    worker.all_pay()
