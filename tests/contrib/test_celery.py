"""Celery: a task that was rejected comes back when the circuit may be tried again."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery
from celery.app import trace
from kombu.transport import TRANSPORT_ALIASES, virtual
from pybreaker import CircuitBreakerError

from pybreaker_redis.contrib.celery import BreakerTask
from pybreaker_redis.registry import BreakerRegistry
from tests.support.breakers import Down, down, up

#: Seconds for which the circuit stays open.
RESET_TIMEOUT = 40.0


class LikeSQS(virtual.Transport):
    """A broker whose default has another name, as Amazon's has in kombu; its own needs a library of Amazon's."""

    class Channel(virtual.Channel):
        """What the broker can do."""

        default_visibility_timeout = 1800

        @property
        def visibility_timeout(self) -> float:
            """What it was told, or the default."""
            raise NotImplementedError


@dataclass(frozen=True)
class Ended:
    """What has become of a task that a worker has run.

    Attributes:
        state: Celery's word for it.
        error: What was raised, inside of a `Retry` too.
        retries: How often it will have been retried, if it comes back.
        wait: Seconds until then.
    """

    state: str
    error: Exception | None = None
    retries: int | None = None
    wait: float = 0.0


class Shop:
    """An application of Celery, its circuit, and a worker for its tasks."""

    def __init__(self, **breaker: Any) -> None:
        self.celery = Celery("shop", broker="memory://", set_as_current=False)
        self.celery.conf.task_default_queue = str(uuid.uuid4())
        self.breaker = BreakerRegistry(**{"fail_max": 1, "reset_timeout": RESET_TIMEOUT, **breaker}).get("payments")
        self.runs = 0

    def task(self, **options: Any) -> Any:
        """A task that needs the dependency, which is down."""

        @self.celery.task(base=BreakerTask, name=str(uuid.uuid4()), **options)
        def pay(answer: Any = down) -> str:
            self.runs += 1
            return self.breaker.call(answer)

        return pay

    def work(self, task: Any, *args: Any, retries: int = 0) -> Ended:
        """Run the task as a worker does that is told that it has been retried so often already."""
        tracer = trace.build_tracer(task.name, task, app=self.celery)
        request = {"id": "1", "retries": retries, "delivery_info": {"routing_key": self.celery.conf.task_default_queue}}
        # As a worker does, for older ones: a task called by its class is a function that somebody calls, else.
        trace._install_stack_protection()
        try:
            info = tracer("1", args, {}, request).info
        finally:
            trace.reset_worker_optimizations(self.celery)
        if info is None:
            return Ended("SUCCESS")
        if info.state != "RETRY":
            return Ended(info.state, info.retval)
        with self.celery.connection_for_read() as connection:
            headers = connection.SimpleQueue(self.celery.conf.task_default_queue).get(block=False).headers
        wait = datetime.fromisoformat(headers["eta"]) - datetime.now(timezone.utc)
        return Ended(info.state, info.retval.exc, headers["retries"], wait.total_seconds())


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A shop with an open circuit."""
    shop = Shop()
    shop.breaker.open()
    with contextlib.closing(shop.celery):
        yield shop


def test_rejected_task_comes_back_when_the_circuit_may_be_tried(shop: Shop):
    """Not before, which would be in vain; and not all at the same time."""
    task = shop.task()
    ended = [shop.work(task) for _ in range(10)]
    assert {item.state for item in ended} == {"RETRY"}
    assert all(isinstance(item.error, CircuitBreakerError) for item in ended)
    assert all(RESET_TIMEOUT - 5 < item.wait <= 1.5 * RESET_TIMEOUT for item in ended)
    assert len({item.wait for item in ended}) == 10


def test_task_that_is_not_rejected_is_left_alone(shop: Shop):
    """Success is success, and failures are those of the task."""
    shop.breaker.close()
    task = shop.task()
    assert shop.work(task, up).state == "SUCCESS"
    shop.breaker._throw_new_error_on_trip = False
    ended = shop.work(task)
    assert ended.state == "FAILURE"
    assert isinstance(ended.error, Down)


def test_rejections_use_up_the_retries(shop: Shop):
    """As with every other retry of Celery: at the end the task fails with the error of its last rejection."""
    task = shop.task(max_retries=2)
    assert [shop.work(task, retries=had).retries for had in (0, 1)] == [1, 2]
    ended = shop.work(task, retries=2)
    assert ended.state == "FAILURE"
    assert isinstance(ended.error, CircuitBreakerError)


def test_rejections_need_not_count(shop: Shop):
    """A task that has not called may wait for as long as it takes, and has all its retries when it calls."""
    task = shop.task(max_retries=2, rejections_count=False)
    assert [shop.work(task, retries=had).retries for had in (0, 1, 2)] == [0, 1, 2]


def test_handlers_of_the_task_see_how_often_it_was_retried(shop: Shop):
    """Not what is sent in its place, so that it need not count."""
    seen = []
    task = shop.task(rejections_count=False, on_retry=lambda *_: seen.append(task.request.retries))
    shop.work(task, retries=2)
    assert seen == [2]


def test_call_that_opens_the_circuit_counts_as_told(shop: Shop):
    """With pybreaker's default the error of that call is a circuit's, and the task comes back; else it is its own."""
    shop.breaker.close()
    task = shop.task()
    ended = shop.work(task)
    assert ended.state == "RETRY"
    assert ended.wait > RESET_TIMEOUT - 5
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = False
    assert shop.work(task).state == "FAILURE"


def test_autoretry_is_for_other_errors(shop: Shop):
    """`autoretry_for` everything does not take rejections: its waits are made up."""
    task = shop.task(autoretry_for=(Exception,), retry_backoff=1, retry_jitter=False)
    assert shop.work(task).wait > RESET_TIMEOUT - 5
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = False
    ended = shop.work(task)
    assert isinstance(ended.error, Down)
    assert ended.wait < 5


@pytest.mark.parametrize("options", [{"dont_autoretry_for": (KeyError,)}, {"dont_autoretry_for": ()}])
@pytest.mark.parametrize("counts", [True, False])
def test_autoretry_leaves_rejections_alone_whatever_else_it_leaves(shop: Shop, options: dict[str, Any], counts: bool):
    """A task's own exceptions from `autoretry_for` are for its own errors."""
    task = shop.task(autoretry_for=(Exception,), default_retry_delay=1, rejections_count=counts, **options)
    ended = shop.work(task)
    assert isinstance(ended.error, CircuitBreakerError)
    assert ended.retries == int(counts)
    assert ended.wait > RESET_TIMEOUT - 5
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = False
    ended = shop.work(task)
    assert isinstance(ended.error, Down)
    assert ended.wait < 5


def test_autoretry_leaves_rejections_of_a_class_alone(shop: Shop):
    """Where the task is a class that is registered as well."""

    class Pay(BreakerTask):
        name = "pay"
        autoretry_for = (Exception,)
        dont_autoretry_for = (KeyError,)
        default_retry_delay = 1

        def run(self) -> str:
            return shop.breaker.call(up)

    assert shop.work(shop.celery.register_task(Pay())).wait > RESET_TIMEOUT - 5


def test_autoretry_may_leave_any_other_error_alone():
    """A type checker lets a class say which, rather than holding it to what stands here."""
    assert BreakerTask.__annotations__["dont_autoretry_for"] == "tuple[type[BaseException], ...]"


def test_eager_task_is_not_autoretried(shop: Shop):
    """Nor is one that is called as a function: its caller hears of the rejection."""
    shop.celery.conf.task_always_eager = True
    task = shop.task(autoretry_for=(Exception,), dont_autoretry_for=(KeyError,), default_retry_delay=0)
    for call in (lambda: task.delay().get(), task):
        with pytest.raises(CircuitBreakerError):
            call()
    assert shop.runs == 2


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,), "dont_autoretry_for": (KeyError,)}])
def test_task_may_retry_rejections_itself(shop: Shop, options: dict[str, Any]):
    """What it catches and has retried in its own manner is no business of the class, whatever is retried besides."""

    @shop.celery.task(base=BreakerTask, name="pay", bind=True, **options)
    def pay(self: Any) -> str:
        try:
            return shop.breaker.call(up)
        except CircuitBreakerError as error:
            raise self.retry(None, None, error, countdown=500)  # noqa: B904

    assert 490 < shop.work(pay).wait <= 500


def test_rejection_that_was_never_raised_may_be_retried(shop: Shop):
    """It has no traceback that would tell whose it is."""

    @shop.celery.task(base=BreakerTask, name="pay", bind=True)
    def pay(self: Any) -> None:
        self.retry(exc=CircuitBreakerError("not now"), countdown=500)

    assert 490 < shop.work(pay).wait <= 500


@pytest.mark.parametrize(
    ("broker", "longest"), [("memory://", None), ("amqp://", None), ("redis://", 3600), ("queues://", 1800)]
)
def test_wait_ends_before_the_broker_takes_the_task_for_lost(
    broker: str, longest: float | None, monkeypatch: pytest.MonkeyPatch
):
    """A worker holds the task while it waits; the broker would hand it to another one, too."""
    monkeypatch.setitem(TRANSPORT_ALIASES, "queues", f"{__name__}:LikeSQS")
    shop = Shop(reset_timeout=100_000)
    shop.breaker.open()
    shop.celery.conf.broker_url = broker
    task = shop.task()
    assert task.broker_visibility_timeout() == longest
    error = rejection(shop)
    if longest is None:
        assert task.countdown(error) > 99_000
    else:
        assert longest / 2 <= task.countdown(error) <= 0.75 * longest
    shop.celery.conf.broker_transport_options = {"visibility_timeout": 600}
    assert 300 <= task.countdown(error) <= 450
    # However widely they are to be scattered.
    task.rejection_jitter = 10.0
    assert all(300 <= task.countdown(error) <= 450 for _ in range(20))


def rejection(shop: Shop) -> CircuitBreakerError:
    """What a call of the open circuit raises."""
    with pytest.raises(CircuitBreakerError) as raised:
        shop.breaker.call(up)
    return raised.value


def test_little_wait_is_scattered_too(shop: Shop):
    """When the circuit may be tried at once, one call may; the others had better not be there all together."""
    task = shop.task()
    waits = {task.countdown(CircuitBreakerError("from elsewhere")) for _ in range(10)}
    assert len(waits) == 10
    assert all(0 <= wait <= 0.5 for wait in waits)
    assert shop.task(rejection_jitter=0).countdown(CircuitBreakerError("from elsewhere")) == 0


@pytest.mark.parametrize("counts", [True, False])
def test_eager_task_is_rejected_at_once(shop: Shop, counts: bool):
    """Where tasks run in place of being sent nobody waits, and nothing is tried again and again."""
    shop.celery.conf.task_always_eager = True
    task = shop.task(rejections_count=counts)
    began = time.monotonic()
    with pytest.raises(CircuitBreakerError):
        task.delay().get()
    assert shop.runs == 1
    assert time.monotonic() - began < RESET_TIMEOUT / 4
    shop.celery.conf.task_eager_propagates = True
    with pytest.raises(CircuitBreakerError):
        task.delay()
    shop.breaker.close()
    assert task.apply([up]).get() == "answer"


def test_task_that_is_called_as_a_function_raises(shop: Shop):
    """It is a function then, and its caller hears of the rejection."""
    task = shop.task()
    with pytest.raises(CircuitBreakerError):
        task()
    shop.breaker.close()
    assert task(up) == "answer"
