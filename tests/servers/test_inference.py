"""Inference from an unmodified pybreaker: the storage recognises calls, whatever other callers do meanwhile."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import count
from typing import Any

import fakeredis
import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener
from pybreaker import CircuitMemoryStorage as StockMemoryStorage

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage, retry_after
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import CLOSED, Circuit, new_circuit
from pybreaker_redis._model.intents import Load
from pybreaker_redis._runtime import fork
from tests.support import inspect
from tests.support.breakers import Down, down, up
from tests.support.inspect import (
    after_next_look,
    lock_of,
    record_replies,
    replace_fork_registry,
    replace_renewal_lock,
    reset_in_child,
    set_memory_engine,
)
from tests.support.wait import wait_for

pytestmark = [pytest.mark.unmodified, pytest.mark.usefixtures("patient")]


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    """Make calls that fail, whether the breaker raises or the dependency does."""
    for _ in range(times):
        with pytest.raises((Down, CircuitBreakerError)):
            breaker.call(down)


@pytest.fixture(params=["memory", "redis"])
def storage_of(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., Any]:
    """Return a factory of storages. With Redis, all its storages share a circuit."""
    if request.param == "memory":
        return lambda state="closed", **options: CircuitMemoryStorage(state, **options)
    return lambda state="closed", **options: CircuitRedisStorage(
        state, client, namespace="adapter", max_staleness=0, **options
    )


@contextmanager
def elsewhere(action: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run an action in another thread, and assert that the thread ends."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - shown below, in the thread that can fail the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.001)


def in_thread(action: Callable[[], Any]) -> Any:
    """Return the result of an action in another thread."""
    answers: list[Any] = []
    with elsewhere(lambda: answers.append(action())):
        pass
    return answers[0]


def test_both_resets_by_hand_close_nothing(storage_of):
    """The calls `reset_success_counter()` and `reset_counter()` in a row are a close only when `close()` makes them."""
    storage = storage_of("open")
    storage.increment_counter()
    storage.increment_success_counter()
    storage.reset_success_counter()
    storage.reset_counter()
    assert (storage.state, storage.counter, storage.success_counter) == ("open", 0, 0)


def test_opened_at_and_reset_by_hand_open_nothing(storage_of):
    """Setting `opened_at` and resetting the successes is a trip only when `open()` does both."""
    storage = storage_of()
    storage.opened_at = datetime.now(timezone.utc)
    storage.reset_success_counter()
    assert storage.state == "closed"


def test_reading_opened_at_and_reset_by_hand_claim_nothing(storage_of):
    """Reading `opened_at` and resetting the successes is a claim only when an open state does both."""
    storage = storage_of("open")
    assert storage.opened_at is not None
    storage.reset_success_counter()
    assert storage.state == "open"


def test_count_and_reset_after_a_probe_by_hand_close_nothing(storage_of):
    """Between two probes, the successes may be read and reset without closing the circuit."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    assert storage.success_counter == 1
    storage.reset_success_counter()
    assert (storage.state, storage.success_counter) == ("half-open", 0)


def test_counting_by_hand_in_an_old_thread_counts(storage_of):
    """A direct count is no report of a call, even generations after the last call of the thread."""
    storage = storage_of()
    breaker = CircuitBreaker(state_storage=storage)
    breaker.call(up)
    in_thread(breaker.open)
    in_thread(breaker.close)
    storage.increment_counter()
    assert storage.counter == 1
    storage.reset_counter()
    assert storage.counter == 0


def test_counting_by_hand_in_an_exception_handler_counts(storage_of):
    """A direct count during an exception is no report of a call."""
    storage = storage_of("open")
    try:
        down()
    except Down:
        storage.increment_counter()
    assert storage.counter == 1


def test_counting_by_hand_in_a_guarded_function_counts(storage_of):
    """The guarded function's own use of the storage is no report of its call."""
    storage = storage_of()
    breaker = CircuitBreaker(state_storage=storage)
    counted = []

    def by_hand() -> None:
        storage.increment_counter()
        counted.append(storage.counter)
        storage.reset_counter()
        counted.append(storage.counter)
        storage.increment_counter()

    breaker.call(by_hand)
    assert (counted, storage.counter) == ([1, 0], 0)


def test_operator_opens_while_handling_the_reported_exception(storage_of):
    """A direct `open()` is never refused, not even in the handler of a failure that was."""
    storage = storage_of()
    breaker = CircuitBreaker(state_storage=storage)

    def fail_late() -> None:
        in_thread(breaker.current_state.upper)
        other.open()
        other.close()
        raise Down

    other = CircuitBreaker(state_storage=storage)
    try:
        breaker.call(fail_late)
    except Down:
        assert storage.counter == 0
        breaker.open()
    assert storage.state == "open"


def test_half_open_by_hand_forgets_collected_successes(storage_of):
    """A direct half-open starts the threshold again, and successes count from one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    breaker.half_open()
    assert storage.success_counter == 0
    breaker.call(up)
    assert (storage.state, storage.success_counter) == ("half-open", 1)


def test_direct_close_after_a_fenced_probe_is_accepted(storage_of):
    """A direct `close()` was once refused if the last action of the thread was a counted probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    breaker.call(up)
    in_thread(breaker.half_open)
    breaker.close()
    assert storage.state == "closed"


@pytest.mark.parametrize("state", ["ajar", "", None, 1, b"open"])
def test_unknown_state_is_refused_and_nothing_lost(storage_of, state):
    """An unknown state raises at once, and the circuit does not change."""
    storage = storage_of("open")
    with pytest.raises(ValueError, match="state must be one of 'closed', 'open', 'half-open', not"):
        storage.state = state
    assert storage.state == "open"


@pytest.mark.parametrize("at", [None, 1700000000, "2030-01-01"])
def test_opened_at_that_is_no_datetime_is_refused(storage_of, at):
    """The error contains the invalid value."""
    storage = storage_of()
    if storage.name == "memory" and at is None:
        storage.opened_at = at
        assert storage.opened_at is None, "pybreaker's own class accepts None, too"
        return
    with pytest.raises(TypeError, match="opened_at must be a datetime, not"):
        storage.opened_at = at


@pytest.mark.parametrize(
    ("lease", "error"),
    [
        ("30", TypeError),
        (None, TypeError),
        (True, TypeError),
        (0, ValueError),
        (-1, ValueError),
        (86401, ValueError),
        (float("nan"), ValueError),
    ],
)
def test_bad_probe_lease_is_refused(lease, error):
    """The error contains the argument's name, its value and the accepted range."""
    with pytest.raises(error, match=f"probe_lease must .*not {lease!r}"):
        CircuitMemoryStorage("closed", probe_lease=lease)


def test_read_before_a_call_does_not_hide_its_success(storage_of):
    """A call after `if breaker.current_state == "closed":` is a success like any other."""
    storage = storage_of("open")
    breaker = CircuitBreaker(state_storage=storage)
    storage.state = "closed"
    storage.increment_counter()
    assert breaker.current_state == "closed"
    assert breaker.current_state == "closed"
    breaker.call(up)
    assert storage.counter == 0


def test_second_breaker_that_notices_resets_no_counter(storage_of):
    """Two breakers may share a storage. A transition that the second one notices is no success."""
    storage = storage_of()
    breakers = [CircuitBreaker(fail_max=2, reset_timeout=0, state_storage=storage) for _ in range(3)]
    fail(breakers[0], 2)
    assert [breaker.state.name for breaker in breakers] == ["open"] * 3
    breakers[0].call(up)
    fail(breakers[0])
    assert [breaker.state.name for breaker in breakers] == ["closed"] * 3
    assert storage.counter == 1


def test_noticing_again_after_a_listener_raised_resets_no_counter(storage_of):
    """After an error in a listener, the breaker notices the transition repeatedly, and must not reset the counter."""

    class Raising(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            raise RuntimeError

    storage = storage_of("open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[Raising()])
    storage.state = "closed"
    storage.increment_counter()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            breaker.state  # noqa: B018
    assert storage.counter == 1


def test_constant_reads_disturb_no_call(storage_of):
    """Health checks may read at any time: every count, trip, probe and close happens as without them."""
    storage = storage_of()
    slow = SlowListener()
    breaker = CircuitBreaker(fail_max=5, reset_timeout=0, success_threshold=2, state_storage=storage, listeners=[slow])
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            _ = breaker.state.name, breaker.current_state, breaker.fail_counter, breaker.success_counter
            _ = storage.opened_at, storage.state

    with elsewhere(hammer), elsewhere(hammer):
        try:
            for _ in range(25):
                for count in range(1, 5):
                    fail(breaker)
                    assert storage.counter == count
                with pytest.raises(CircuitBreakerError):
                    breaker.call(down)
                assert storage.counter == 5
                breaker.call(up)
                assert storage.success_counter == 1
                breaker.call(up)
                assert (storage.state, storage.counter, storage.success_counter) == ("closed", 0, 0)
                fail(breaker, 2)
                breaker.call(up)
                assert storage.counter == 0
        finally:
            stop.set()


class SlowListener(CircuitBreakerListener):
    """Listener that keeps a breaker in the middle of a notification for a while."""

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Give other threads a chance to run."""
        time.sleep(0.001)


class StateRecorder(CircuitBreakerListener):
    """Listener that reads all available states at every transition."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record the notified state, the state of the storage and the state of the breaker."""
        self.seen.append((new_state.name, cb.current_state, cb.state.name))


def test_listener_may_read_the_breakers_state(storage_of):
    """Reading `breaker.state` in `state_change` neither recurses nor repeats. The storage already has the new state."""
    listener = StateRecorder()
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage_of(), listeners=[listener])
    fail(breaker)
    breaker.call(up)
    breaker.open()
    breaker.half_open()
    breaker.close()
    assert listener.seen == [
        ("open", "open", "closed"),
        ("half-open", "half-open", "open"),
        ("closed", "closed", "half-open"),
        ("open", "open", "closed"),
        ("half-open", "half-open", "open"),
        ("closed", "closed", "half-open"),
    ]


def test_listener_may_read_the_state_after_a_transition_of_another_breaker(storage_of):
    """A breaker that only notices a transition behaves alike.

    With stock storages, this recurses up to Python's limit.
    """
    storage = storage_of()
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    other = CircuitBreaker(reset_timeout=0, state_storage=storage)
    in_thread(other.open)
    assert breaker.state.name == "open"
    in_thread(other.close)
    assert breaker.call(up) == "answer"
    assert listener.seen == [("open", "open", "closed"), ("closed", "closed", "open")]


@pytest.mark.parametrize("notified", ["open", "half-open", "closed"])
def test_raising_listener_loses_no_transition(storage_of, notified):
    """Trip, claim and close are stored before listeners run."""

    class Raising(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            if new_state.name == notified:
                raise RuntimeError(notified)

    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage, listeners=[Raising()])
    with pytest.raises((RuntimeError, CircuitBreakerError)):
        breaker.call(down)
    if notified != "open":
        with pytest.raises(RuntimeError):
            breaker.call(up)
    assert storage.state == notified
    # No later assignment is swallowed, and the state stays visible.
    storage.state = "open"
    assert breaker.current_state == "open"


@pytest.mark.parametrize("action", ["open", "half_open", "close"])
def test_raising_listener_does_not_stop_the_operator(storage_of, action):
    """The transition is stored before listeners run."""

    class Raising(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            raise RuntimeError

    storage = storage_of("closed" if action == "open" else "open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[Raising()])
    with pytest.raises(RuntimeError):
        getattr(breaker, action)()
    assert storage.state == {"open": "open", "half_open": "half-open", "close": "closed"}[action]


def test_others_are_rejected_while_a_block_probes(storage_of):
    """The block `calling()` holds no lock, so calls of other threads are possible, and rejected at once."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    with breaker.calling():
        assert storage.state == "half-open"
        for _ in range(3):
            with pytest.raises(CircuitBreakerError):
                in_thread(lambda: breaker.call(up))
    assert storage.state == "closed"


def test_refused_claim_notifies_no_listener(storage_of, monkeypatch):
    """Listeners of the second caller are not notified of half-open."""
    storage = storage_of("open")
    first = CircuitBreaker(reset_timeout=0, state_storage=storage)
    listener = StateRecorder()
    second = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    probe = first.calling()
    opened_at = type(storage).opened_at

    def read_and_lose_the_race(self: Any) -> Any:
        monkeypatch.undo()
        at = opened_at.fget(self)
        in_thread(probe.__enter__)
        return at

    # An override of the same name is skipped, so the storage still recognises its caller.
    read_and_lose_the_race.__code__ = read_and_lose_the_race.__code__.replace(co_name="opened_at")
    monkeypatch.setattr(type(storage), "opened_at", property(read_and_lose_the_race, opened_at.fset))
    with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        second.call(up)
    assert listener.seen == []
    in_thread(lambda: probe.__exit__(None, None, None))


def test_expired_lease_is_claimed_by_another_thread(storage_of):
    """A prober that never reports blocks the circuit only for its lease. A late report is ignored."""
    storage = storage_of("open", probe_lease=1.0)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, success_threshold=2)
    with breaker.calling():
        assert in_thread(lambda: storage.opened_at) is not None
        wait_until(lambda: in_thread(lambda: storage.opened_at) is None)
        assert in_thread(lambda: breaker.call(up)) == "answer"
        assert storage.success_counter == 1
    assert storage.success_counter == 1
    assert in_thread(lambda: storage.state) == "open"


def test_slow_probe_counts_without_another_claim(storage_of):
    """A probe that outlasts its lease stays the probe until another call claims."""
    storage = storage_of("open", probe_lease=0.001)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    breaker.call(lambda: time.sleep(0.02))
    assert storage.state == "closed"


def test_probe_whose_lease_has_ended_is_claimed_again_and_no_listener_is_called(storage_of):
    """A probe without a report blocks for its lease. Then the next call claims, without a transition for listeners."""
    storage = storage_of("open", probe_lease=0.03)
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage, listeners=[listener])
    breaker.call(up)
    lost = breaker.calling()
    lost.__enter__()
    wait_until(lambda: storage.state == "open")
    breaker.call(up)
    assert storage.state == "closed"
    assert [notified for notified, _, _ in listener.seen] == ["half-open", "closed"]
    lost.__exit__(None, None, None)


def test_reset_timeout_zero_with_the_shortest_lease_does_not_recurse(storage_of):
    """A claim that a thread has just won admits its call, however late the call comes."""
    storage = storage_of("open", probe_lease=0.001)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    for _ in range(20):
        with pytest.raises(CircuitBreakerError, match="Trial call failed"):
            breaker.call(down)


@pytest.mark.parametrize("threshold", [2, 3, 5])
def test_threshold_counts_successes_of_all_threads(storage_of, threshold):
    """With a thread for each request, every call is admitted, and listeners are not notified in between."""
    storage = storage_of("open")
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=threshold, state_storage=storage, listeners=[listener])
    for made in range(threshold):
        assert storage.success_counter == made
        assert in_thread(lambda: breaker.call(up)) == "answer"
    assert (storage.state, storage.counter, storage.success_counter) == ("closed", 0, 0)
    assert [notified for notified, _, _ in listener.seen] == ["half-open", "closed"]


def test_failure_of_a_later_probe_opens(storage_of):
    """A probe by another thread decides like the first one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    assert in_thread(lambda: breaker.call(up)) == "answer"
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        in_thread(lambda: breaker.call(down))
    assert (storage.state, storage.success_counter) == ("open", 0)


def test_refused_claim_between_two_probes_notifies_no_listener(storage_of):
    """While another breaker holds the next probe, the call is rejected, and listeners still see half-open."""
    storage = storage_of("open")
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage, listeners=[listener])
    breaker.call(up)
    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    with other.calling(), pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        in_thread(lambda: breaker.call(up))
    breaker.call(up)
    assert storage.state == "closed"
    assert [notified for notified, _, _ in listener.seen] == ["half-open", "closed"]


@pytest.mark.parametrize("moved", ["open", "close"])
def test_claim_after_a_transition_of_another_breaker_follows_it(storage_of, moved, monkeypatch):
    """A transition between the read and the claim is noticed at once, and is no rejected probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3, state_storage=storage)
    breaker.half_open()
    breaker.call(up)
    other = CircuitBreaker(state_storage=storage)
    after_next_look(monkeypatch, storage, lambda: in_thread(getattr(other, moved)))
    if moved == "open":
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            breaker.call(up)
    else:
        assert breaker.call(up) == "answer"
    assert breaker.state.name == storage.state == {"open": "open", "close": "closed"}[moved]


def test_claim_that_finds_another_prober_is_rejected(storage_of, monkeypatch):
    """Two calls see the same free probe, and one of them gets the probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    probe = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage).calling()
    after_next_look(monkeypatch, storage, lambda: in_thread(probe.__enter__))
    with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        breaker.call(up)
    probe.__exit__(None, None, None)
    assert storage.success_counter == 2


def test_child_of_a_fork_does_not_hold_the_probe_of_its_parent():
    """A child that is forked in the middle of a probe does not hold the probe."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    with breaker.calling():
        pid = os.fork()
        if not pid:
            os._exit(0 if storage.state == "open" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert storage.state == "half-open"


def test_operators_question_in_a_child_without_hooks_finds_the_probe_held_elsewhere():
    """UWSGI forks without Python's hooks, and the first use in a child may be a question, and no call."""
    breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitMemoryStorage("open"))
    with breaker.calling():
        pid = ctypes.PyDLL(None).fork()
        if not pid:
            os._exit(0 if retry_after(breaker) > 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert retry_after(breaker) == 0


def test_any_thread_may_claim_after_half_open_by_hand(storage_of):
    """After a direct half-open, one call is admitted: that of the same thread, or the first that claims."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=2, state_storage=storage)
    breaker.half_open()
    assert storage.state == "half-open"
    assert in_thread(lambda: (storage.state, storage.opened_at)) == ("open", None)
    assert in_thread(lambda: breaker.call(up)) == "answer"
    assert storage.state == "open"
    assert breaker.call(up) == "answer"
    assert storage.state == "closed"


def test_second_half_open_by_hand_takes_the_trial_from_the_first(storage_of):
    """Two operators that set half-open used to get a trial each."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.half_open()
    assert in_thread(lambda: (breaker.half_open(), storage.state)[1]) == "half-open"
    assert storage.state == "open"


def test_read_in_a_guarded_function_is_no_new_admission(storage_of):
    """The guarded function may read its breaker. Its result still belongs to the generation of its admission."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    other = CircuitBreaker(fail_max=2, state_storage=storage)

    def fail_late() -> None:
        in_thread(other.open)
        in_thread(other.close)
        assert breaker.state.name == breaker.current_state == storage.state == "closed"
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    assert storage.counter == 0


def test_late_failure_is_raised_and_trips_nothing(storage_of):
    """A late failure reaches the caller as the dependency's own error, even as the last one before `fail_max`."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    other = CircuitBreaker(fail_max=1, state_storage=storage)

    def fail_late() -> None:
        in_thread(other.open)
        in_thread(other.close)
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)


@pytest.mark.parametrize("throw_new_error", [True, False])
def test_late_failure_of_a_probe_is_raised_and_opens_nothing(storage_of, throw_new_error):
    """The late prober gets its own exception, whatever the breaker would have raised."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, throw_new_error_on_trip=throw_new_error)

    def fail_late() -> None:
        in_thread(CircuitBreaker(state_storage=storage).close)
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)


def test_late_success_of_a_probe_closes_nothing(storage_of):
    """The late success of a prober changes nothing."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    assert breaker.call(lambda: in_thread(CircuitBreaker(state_storage=storage).open)) is True
    assert (storage.state, storage.success_counter) == ("open", 0)


def test_failure_through_nested_calls_trips_once(storage_of):
    """One failure that passes through two guarded calls of one circuit opens the circuit once."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage, throw_new_error_on_trip=False)
    moments: list[Any] = []

    def outer() -> None:
        try:
            breaker.call(down)
        finally:
            moments.append(storage.opened_at)

    with pytest.raises(Down):
        breaker.call(outer)
    assert storage.counter == 1
    assert [storage.opened_at] == moments


def test_generator_finished_by_a_thread_without_calls_counts_while_closed(storage_of):
    """A storage cannot recognise where a generator began. On a thread without calls, its end counts as of now."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage, throw_new_error_on_trip=False)

    def numbers() -> Iterator[int]:
        yield 1
        raise Down

    def finish(generator: Iterator[int]) -> None:
        with pytest.raises(Down):
            next(generator)

    generators = [breaker.call(numbers) for _ in range(2)]
    assert [next(generator) for generator in generators] == [1, 1]
    in_thread(lambda: finish(generators[0]))
    assert storage.counter == 1
    breaker.open()
    before = storage.opened_at
    in_thread(lambda: finish(generators[1]))
    assert (storage.state, storage.counter, storage.opened_at) == ("open", 1, before)


def test_abandoned_generator_is_a_failure(storage_of):
    """A generator that is closed half-way counts as failed, as with stock storages."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)
    generator = breaker.call(lambda: (number for number in range(2)))
    assert next(generator) == 0
    generator.close()
    assert storage.counter == 1


def test_storage_subclass_that_overrides_operations_works(server):
    """A subclass of the storage may override operations.

    Frames of an override are skipped when the caller is determined.
    """

    class Counting(CircuitMemoryStorage):
        calls = 0

        def reset_counter(self) -> None:
            type(self).calls += 1
            super().reset_counter()

        def reset_success_counter(self) -> None:
            super().reset_success_counter()

    storage = Counting("closed")
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    fail(breaker)
    breaker.call(up)
    assert (storage.state, storage.counter, Counting.calls) == ("closed", 0, 2)


def test_breaker_subclass_that_overrides_call_works(storage_of):
    """A breaker may override `call()`, for example to avoid the lock, and is admitted and fenced like the original."""

    class Unlocked(CircuitBreaker):
        def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            return self.state.call(func, *args, **kwargs)

    storage = storage_of()
    breaker = Unlocked(fail_max=1, state_storage=storage)

    def fail_late() -> None:
        in_thread(breaker.open)
        in_thread(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)


class Passing(CircuitBreaker):
    """Breaker that overrides methods and calls the originals."""

    def half_open(self) -> None:
        """Call the original."""
        super().half_open()

    def open(self) -> bool:
        """Call the original."""
        return super().open()

    def close(self) -> None:
        """Call the original."""
        super().close()

    @property
    def current_state(self) -> str:
        """Return the original."""
        return super().current_state

    def _create_new_state(self, *args: Any, **options: Any) -> Any:
        return super()._create_new_state(*args, **options)

    def _inc_counter(self) -> None:
        inspect.storage_of(self).increment_counter()


class Direct(CircuitBreaker):
    """Breaker with its own way to make a call."""

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Call through another method."""
        return self.guarded(func)

    def guarded(self, func: Any) -> Any:
        """Call without the lock."""
        return self.state.call(func)


class Wrapped(CircuitMemoryStorage):
    """Storage as a monitoring agent wraps it."""


for _name in ("increment_counter", "reset_counter", "increment_success_counter", "reset_success_counter"):

    def _wrap(method: Any) -> Any:
        @functools.wraps(method)
        def timed(*args: Any) -> Any:
            return method(*args)

        return timed

    setattr(Wrapped, _name, _wrap(getattr(CircuitMemoryStorage, _name)))


@pytest.mark.parametrize(
    ("breaker_class", "storage_class"),
    [(Passing, CircuitMemoryStorage), (Direct, CircuitMemoryStorage), (CircuitBreaker, Wrapped)],
)
def test_extended_and_wrapped_classes_work(breaker_class, storage_class):
    """One more frame between breaker and storage must not cost a trip, a fence or the only probe."""
    storage = storage_class("closed")
    breaker = breaker_class(fail_max=3, reset_timeout=0, success_threshold=2, state_storage=storage)
    for _ in range(2):
        fail(breaker, 2)
        assert (storage.state, storage.counter) == ("closed", 2)
        fail(breaker)
        assert (storage.state, storage.counter) == ("open", 3)
        assert breaker.call(up) == "answer"
        assert (storage.state, storage.success_counter) == ("half-open", 1)

        def probe() -> str:
            with pytest.raises(CircuitBreakerError):
                in_thread(lambda: lockless(breaker).call(up))
            return "answer"

        assert breaker.call(probe) == "answer"
        assert (storage.state, storage.counter) == ("closed", 0)


def lockless(breaker: CircuitBreaker) -> CircuitBreaker:
    """Return a breaker of the same kind on the same storage, with its own lock."""
    return type(breaker)(reset_timeout=0, success_threshold=2, state_storage=inspect.storage_of(breaker))


def test_two_breakers_and_a_listener_that_reads_both(storage_of):
    """A breaker that notifies its listeners shows them its old state."""
    storage = storage_of()
    breakers: list[CircuitBreaker] = []
    notified = []

    class ReadsBoth(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            notified.append(new_state.name)
            assert [breaker.state.name for breaker in breakers]

    listener = ReadsBoth()
    breakers += [CircuitBreaker(fail_max=1, state_storage=storage, listeners=[listener]) for _ in range(2)]
    with pytest.raises(CircuitBreakerError):
        breakers[0].call(down)
    assert notified == ["open", "open"]


def test_rejections_during_a_probe_notify_no_listener(storage_of):
    """Threads share the breaker, but not the probe. Without a transition, no listener is notified."""
    storage = storage_of("open")
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=20, state_storage=storage, listeners=[listener])
    for _ in range(19):
        with breaker.calling():
            with pytest.raises(CircuitBreakerError):
                in_thread(lambda: breaker.call(up))
            assert in_thread(lambda: breaker.state.name) == "half-open"
    assert [notified for notified, _, _ in listener.seen] == ["half-open"]


def test_claim_without_a_call_ends_with_its_lease(storage_of):
    """A claim admits one call. After the end of its lease, it admits none."""

    class RaisesOnce(CircuitBreakerListener):
        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            cb.remove_listener(self)
            raise RuntimeError

    storage = storage_of("open", probe_lease=0.02)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[RaisesOnce()])
    with pytest.raises(RuntimeError):
        breaker.call(up)
    wait_until(lambda: storage.opened_at is None)
    assert storage.state == "open"


def test_child_of_a_fork_does_not_share_a_trial_by_hand():
    """Half-open in a master process is no trial for each of its workers."""
    storage = CircuitMemoryStorage("half-open")
    assert storage.state == "half-open"
    pid = os.fork()
    if not pid:
        os._exit(0 if storage.state == "open" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_listener_that_opens_the_breaker_itself_opens_it_once(storage_of):
    """The trip of a failure is fenced by that failure, whatever listeners do."""

    class Opens(CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            cb.open()

    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[Opens()])
    replies = record_replies(storage)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert max(reply.circuit.generation for reply in replies) == 1


@pytest.mark.parametrize(("make", "admitted"), [(StockMemoryStorage, 3), (CircuitMemoryStorage, 0)])
def test_memory_storage_admits_one_probe_where_stock_admits_all(make, admitted):
    """The block `calling()` holds no lock, so stock's memory storage admits every thread while half-open."""
    storage = make("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    entered = []

    def enter() -> None:
        block = breaker.calling()
        with suppress(CircuitBreakerError):
            block.__enter__()
            entered.append(block)

    with breaker.calling():
        for _ in range(3):
            in_thread(enter)
        assert len(entered) == admitted
        for block in entered:
            block.__exit__(None, None, None)


@pytest.mark.parametrize("lease", [0.001, 86400, 86400.0])
def test_lease_at_either_limit_is_accepted(lease):
    """The limits that the error contains are accepted."""
    storage = CircuitMemoryStorage("open", probe_lease=lease)
    CircuitBreaker(reset_timeout=0, state_storage=storage).call(up)
    assert storage.state == "closed"


@pytest.mark.parametrize("lease", [0.0001, 86400.001])
def test_lease_beyond_a_limit_is_refused_and_both_limits_named(lease):
    """The error contains both limits."""
    with pytest.raises(ValueError, match=r"must lie between 0\.001 and 86400 seconds"):
        CircuitMemoryStorage("closed", probe_lease=lease)


def test_late_success_of_a_probe_notifies_no_listener(storage_of):
    """Listeners are not notified of a close that was refused."""
    storage = storage_of("open")
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    assert breaker.call(lambda: in_thread(CircuitBreaker(state_storage=storage).open)) is True
    assert [notified for notified, _, _ in listener.seen] == ["half-open"]


@pytest.mark.parametrize("state", ["closed", "open"])
def test_late_failure_is_raised_as_the_same_exception(storage_of, state):
    """The exception carries the dependency's answer, so the caller gets the same object."""
    storage = storage_of(state)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    error = Down("it")

    def fail_late() -> None:
        in_thread(CircuitBreaker(state_storage=storage).open)
        raise error

    with pytest.raises(Down) as caught:
        breaker.call(fail_late)
    assert caught.value is error


def memory_at(clock: Callable[[], float], **options: Any) -> CircuitMemoryStorage:
    """Return an open circuit in memory with its own clock, in milliseconds."""
    storage = CircuitMemoryStorage("open", **options)
    set_memory_engine(storage, MemoryEngine(new_circuit("open", clock()), clock))
    return storage


def test_claim_admits_its_call_although_the_lease_is_over():
    """On a machine where every read of the clock takes longer than the lease, calls are still admitted."""
    storage = memory_at(count(0, 1_000_000).__next__, probe_lease=1)
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    assert breaker.call(up) == "answer"
    assert storage.success_counter == 1
    assert breaker.call(up) == "answer"
    assert storage.state == "closed"


def test_lease_ends_at_the_instant_at_which_others_may_claim():
    """At no instant does one thread hold the probe while another may claim the probe."""
    now = 1_000_000.0
    storage = memory_at(lambda: now, probe_lease=1)
    with CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage).calling():
        now += 999
        assert storage.state == "half-open"
        assert in_thread(lambda: storage.opened_at) is not None
        now += 1
        assert storage.state == "open"
        assert in_thread(lambda: storage.opened_at) is None


@pytest.mark.parametrize("before", [None, up, down])
def test_call_through_the_state_counts_for_its_own_generation(storage_of, before):
    """A direct `breaker.state.call(f)` is a call, too, whatever this thread called before."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)
    if before:
        with suppress(Down):
            breaker.call(before)
        in_thread(breaker.open)
        in_thread(breaker.close)
    with pytest.raises(Down):
        breaker.state.call(down)
    assert storage.counter == 1


def test_call_through_the_state_is_fenced(storage_of):
    """A late failure of such a call counts no more than that of any other call."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)

    def fail_late() -> None:
        in_thread(breaker.open)
        in_thread(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.state.call(fail_late)
    assert storage.counter == 0


@pytest.mark.parametrize("last", [up, down])
def test_call_through_the_state_is_admitted_again_after_a_transition(storage_of, last):
    """A direct `breaker.state.call(f)` is admitted again after a transition since the thread's last call."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=2, reset_timeout=0, state_storage=storage)
    with suppress(Down):
        breaker.call(last)
    in_thread(breaker.open)
    in_thread(breaker.close)
    for expected in (1, 2):
        with pytest.raises((Down, CircuitBreakerError)):
            breaker.state.call(down)
        assert storage.counter == expected
    assert storage.state == "open"


def test_child_of_a_fork_does_not_wait_for_a_lock_of_its_parent() -> None:
    """In the child, no thread would ever release the lock."""
    engine = MemoryEngine(Circuit())
    lock_of(engine).acquire()
    reset_in_child(engine)
    assert engine.execute(Load()).circuit.state == CLOSED


@pytest.mark.parametrize("given", [-1, 0.001, 61, float("nan"), float("inf")])
def test_staleness_out_of_range_is_refused_at_once(given: float) -> None:
    """The error contains the argument's name, its value and the accepted range."""
    with pytest.raises(ValueError, match=r"max_staleness must be 0 or lie between 0\.01 and 60 seconds, not"):
        CircuitRedisStorage("closed", fakeredis.FakeStrictRedis(), max_staleness=given)


@pytest.mark.parametrize("given", ["1", None, True])
def test_staleness_that_is_no_number_is_refused_at_once(given: object) -> None:
    """The error contains the argument's name and its value."""
    with pytest.raises(TypeError, match="max_staleness must be a number of seconds, not"):
        CircuitRedisStorage("closed", fakeredis.FakeStrictRedis(), max_staleness=given)  # type: ignore[arg-type]


def test_living_objects_are_renewed_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of these objects keeps none of them alive."""
    replace_fork_registry(monkeypatch)
    renewed: list[str] = []

    class Inherited(fork.ForkSafe):
        def __init__(self, name: str) -> None:
            self.name = name
            super().__init__()

        def _reset_in_child(self) -> None:
            renewed.append(self.name)

    living, collected = Inherited("living"), Inherited("collected")
    lock = lock_of(living)
    del collected
    fork.renew()
    fork.renew()
    assert renewed == ["living"], "once in each process"
    assert lock_of(living) is not lock


def test_threads_that_notice_the_same_fork_renew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waited for another one's renewal must not renew again: calls may already use the objects."""
    replace_fork_registry(monkeypatch)
    renewed: list[int] = []

    class Inherited(fork.ForkSafe):
        def _reset_in_child(self) -> None:
            renewed.append(threading.get_ident())

    class ObservedLock:
        def __init__(self) -> None:
            self.lock = threading.RLock()
            self.waiting: list[int] = []

        def __enter__(self) -> None:
            self.waiting.append(threading.get_ident())
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    observed, living = ObservedLock(), Inherited()
    replace_renewal_lock(monkeypatch, observed)
    threads = [threading.Thread(target=fork.renew, daemon=True) for _ in range(3)]
    with observed.lock:
        for thread in threads:
            thread.start()
        wait_for(lambda: {thread.ident for thread in threads} <= set(observed.waiting), "all threads at the lock")
    for thread in threads:
        thread.join(5)
    assert len(renewed) == 1
    assert lock_of(living).acquire(blocking=False)


def test_first_call_of_a_child_without_hooks_waits_for_no_lock_of_its_parent() -> None:
    """UWSGI forks without Python's hooks, so the first call of a process renews all objects first."""
    storage, engine = CircuitMemoryStorage("closed"), MemoryEngine(Circuit())
    inspect.set_memory_engine(storage, engine)
    breaker = CircuitBreaker(state_storage=storage)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(engine):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            code = 1
            try:
                # The signal ends a child that waits.
                signal.alarm(20)
                with suppress(Down):
                    breaker.call(down)
                code = breaker.fail_counter != 1
            finally:
                os._exit(code)
    finally:
        done.set()
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
