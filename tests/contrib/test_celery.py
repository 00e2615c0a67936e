"""Celery: a rejected task is retried when the circuit may be probed."""

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
    """Broker with another name for its default visibility timeout, as SQS in kombu, without Amazon's library."""

    class Channel(virtual.Channel):
        """Channel with the broker's settings."""

        default_visibility_timeout = 1800

        @property
        def visibility_timeout(self) -> float:
            """Timeout of a connected broker, which this stand-in does not have."""
            raise NotImplementedError


@dataclass(frozen=True)
class Ended:
    """Outcome of a task in a worker.

    Attributes:
        state: Celery's name of the state.
        error: Error of the task, also the one inside a `Retry`.
        retries: Number of retries after this one, if the task is retried.
        wait: Seconds until the retry.
    """

    state: str
    error: Exception | None = None
    retries: int | None = None
    wait: float = 0.0


class Shop:
    """Application of Celery with its circuit and a worker for its tasks."""

    def __init__(self, **breaker: Any) -> None:
        self.celery = Celery("shop", broker="memory://", set_as_current=False)
        self.celery.conf.task_default_queue = str(uuid.uuid4())
        self.breaker = BreakerRegistry(**{"fail_max": 1, "reset_timeout": RESET_TIMEOUT, **breaker}).get("payments")
        self.runs = 0

    def task(self, **options: Any) -> Any:
        """Return a task that needs the dependency, which is down."""

        @self.celery.task(base=BreakerTask, name=str(uuid.uuid4()), **options)
        def pay(answer: Any = down) -> str:
            self.runs += 1
            return self.breaker.call(answer)

        return pay

    def work(self, task: Any, *args: Any, retries: int = 0) -> Ended:
        """Run the task as a worker does, after so many retries."""
        tracer = trace.build_tracer(task.name, task, app=self.celery)
        request = {"id": "1", "retries": retries, "delivery_info": {"routing_key": self.celery.conf.task_default_queue}}
        # As older workers do, because otherwise a task called by its class counts as a plain function.
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


def test_rejected_task_is_retried_when_the_circuit_may_be_probed(shop: Shop):
    """A rejected task is retried after the reset timeout, and retries of many tasks are spread."""
    task = shop.task()
    ended = [shop.work(task) for _ in range(10)]
    assert {item.state for item in ended} == {"RETRY"}
    assert all(isinstance(item.error, CircuitBreakerError) for item in ended)
    assert all(RESET_TIMEOUT - 5 < item.wait <= 1.5 * RESET_TIMEOUT for item in ended)
    assert len({item.wait for item in ended}) == 10


def test_task_without_a_rejection_is_unchanged(shop: Shop):
    """Without a rejection a task succeeds or fails as usual."""
    shop.breaker.close()
    task = shop.task()
    assert shop.work(task, up).state == "SUCCESS"
    shop.breaker._throw_new_error_on_trip = False
    ended = shop.work(task)
    assert ended.state == "FAILURE"
    assert isinstance(ended.error, Down)


def test_rejections_count_as_retries(shop: Shop):
    """Rejections count as retries, so at last the task fails with the error of its last rejection."""
    task = shop.task(max_retries=2)
    assert [shop.work(task, retries=had).retries for had in (0, 1)] == [1, 2]
    ended = shop.work(task, retries=2)
    assert ended.state == "FAILURE"
    assert isinstance(ended.error, CircuitBreakerError)


def test_uncounted_rejections_use_up_no_retries(shop: Shop):
    """Uncounted rejections leave a task all its retries."""
    task = shop.task(max_retries=2, rejections_count=False)
    assert [shop.work(task, retries=had).retries for had in (0, 1, 2)] == [0, 1, 2]


def test_only_failures_use_up_retries_beside_uncounted_rejections(shop: Shop):
    """With `autoretry_for` the call that opens the circuit is retried, and a task survives many rejections."""
    task = shop.task(rejections_count=False, autoretry_for=(Down,), retry_backoff=1, retry_jitter=False, max_retries=2)
    shop.breaker._throw_new_error_on_trip = False
    for had in (0, 1):
        assert [shop.work(task, retries=had).retries for _ in range(5)] == [had] * 5
        shop.breaker.close()
        ended = shop.work(task, retries=had)
        assert isinstance(ended.error, Down)
        assert ended.retries == had + 1
        assert shop.breaker.current_state == "open"
    shop.breaker.close()
    ended = shop.work(task, retries=2)
    assert ended.state == "FAILURE"
    assert isinstance(ended.error, Down)


def test_handlers_of_the_task_see_the_number_of_retries(shop: Shop):
    """Handlers see the real number of retries, and not the number that is sent to the broker."""
    seen = []
    task = shop.task(rejections_count=False, on_retry=lambda *_: seen.append(task.request.retries))
    shop.work(task, retries=2)
    assert seen == [2]


def test_call_that_opens_the_circuit_is_retried_if_it_raises_the_breakers_error(shop: Shop):
    """The call that opens the circuit is retried if it raises the breaker's error, pybreaker's default and not ours."""
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = True
    task = shop.task()
    ended = shop.work(task)
    assert ended.state == "RETRY"
    assert ended.wait > RESET_TIMEOUT - 5
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = False
    assert shop.work(task).state == "FAILURE"


def test_autoretry_does_not_apply_to_rejections(shop: Shop):
    """`autoretry_for` does not apply to rejections, because their waits follow from the circuit."""
    task = shop.task(autoretry_for=(Exception,), retry_backoff=1, retry_jitter=False)
    assert shop.work(task).wait > RESET_TIMEOUT - 5
    shop.breaker.close()
    shop.breaker._throw_new_error_on_trip = False
    ended = shop.work(task)
    assert isinstance(ended.error, Down)
    assert ended.wait < 5


@pytest.mark.parametrize("options", [{"dont_autoretry_for": (KeyError,)}, {"dont_autoretry_for": ()}])
@pytest.mark.parametrize("counts", [True, False])
def test_autoretry_does_not_apply_to_rejections_beside_other_exceptions(
    shop: Shop, options: dict[str, Any], counts: bool
):
    """`dont_autoretry_for` of a task still applies to the task's own errors."""
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


def test_autoretry_does_not_apply_to_rejections_of_a_task_class(shop: Shop):
    """The same holds for a task that is a registered class."""

    class Pay(BreakerTask):
        name = "pay"
        autoretry_for = (Exception,)
        dont_autoretry_for = (KeyError,)
        default_retry_delay = 1

        def run(self) -> str:
            return shop.breaker.call(up)

    assert shop.work(shop.celery.register_task(Pay())).wait > RESET_TIMEOUT - 5


def test_annotation_permits_other_exceptions_from_autoretry():
    """A type checker accepts a class with its own `dont_autoretry_for`."""
    assert BreakerTask.__annotations__["dont_autoretry_for"] == "tuple[type[BaseException], ...]"


def test_eager_task_is_not_autoretried(shop: Shop):
    """A task that runs eagerly or is called as a function raises the rejection to its caller."""
    shop.celery.conf.task_always_eager = True
    task = shop.task(autoretry_for=(Exception,), dont_autoretry_for=(KeyError,), default_retry_delay=0)
    for call in (lambda: task.delay().get(), task):
        with pytest.raises(CircuitBreakerError):
            call()
    assert shop.runs == 2


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,), "dont_autoretry_for": (KeyError,)}])
def test_task_may_retry_rejections_itself(shop: Shop, options: dict[str, Any]):
    """A task may retry rejections itself, with its own wait."""

    @shop.celery.task(base=BreakerTask, name="pay", bind=True, **options)
    def pay(self: Any) -> str:
        try:
            return shop.breaker.call(up)
        except CircuitBreakerError as error:
            raise self.retry(None, None, error, countdown=500)  # noqa: B904

    assert 490 < shop.work(pay).wait <= 500


def test_rejection_that_was_never_raised_may_be_retried(shop: Shop):
    """A `CircuitBreakerError` without a traceback can be retried, too."""

    @shop.celery.task(base=BreakerTask, name="pay", bind=True)
    def pay(self: Any) -> None:
        self.retry(exc=CircuitBreakerError("not now"), countdown=500)

    assert 490 < shop.work(pay).wait <= 500


@pytest.mark.parametrize(
    ("broker", "longest"), [("memory://", None), ("amqp://", None), ("redis://", 3600), ("queues://", 1800)]
)
def test_wait_ends_before_the_broker_delivers_the_task_again(
    broker: str, longest: float | None, monkeypatch: pytest.MonkeyPatch
):
    """The wait ends in time, because after the visibility timeout the broker would deliver the task again."""
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
    # The limit also holds for the widest jitter.
    task.rejection_jitter = 10.0
    assert all(300 <= task.countdown(error) <= 450 for _ in range(20))


def rejection(shop: Shop) -> CircuitBreakerError:
    """Return the error of a rejected call."""
    with pytest.raises(CircuitBreakerError) as raised:
        shop.breaker.call(up)
    return raised.value


def test_short_wait_is_spread_too(shop: Shop):
    """Retries are spread even if the circuit may be probed at once, because only one call is admitted."""
    task = shop.task()
    waits = {task.countdown(CircuitBreakerError("foreign")) for _ in range(10)}
    assert len(waits) == 10
    assert all(0 <= wait <= 0.5 for wait in waits)
    assert shop.task(rejection_jitter=0).countdown(CircuitBreakerError("foreign")) == 0


@pytest.mark.parametrize("counts", [True, False])
def test_eager_task_is_rejected_at_once(shop: Shop, counts: bool):
    """An eager task is not retried, because its caller waits."""
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
    """A task that is called as a function raises the rejection to its caller."""
    task = shop.task()
    with pytest.raises(CircuitBreakerError):
        task()
    shop.breaker.close()
    assert task(up) == "answer"
