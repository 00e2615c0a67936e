"""Scenarios of a breaker, alike on every engine and on pybreaker's memory storage.

They are those of the unmodified breaker, and of ours with ``PYBREAKER_REDIS_WAY=breaker``, see tests/support/ways.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pybreaker
import pytest
import time_machine
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

from tests.support.breakers import Down, down
from tests.support.engines import ENGINE_CASES, EngineCase, MakeStorage
from tests.support.ways import settles_calls

#: ``reset_timeout`` of scenarios that wait for its end, seconds. Longer than a few round trips on a busy machine.
SHORT_TIMEOUT_S = 0.2


class NotFound(LookupError):
    """An answer of a healthy dependency."""


class NotificationRecorder(CircuitBreakerListener):
    """Listener that records every notification, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        """Record that a call is about to be made."""
        self.entries.append("before")

    def success(self, cb: Any) -> None:
        """Record that a call succeeded."""
        self.entries.append("success")

    def failure(self, cb: Any, exc: BaseException) -> None:
        """Record that a call failed."""
        self.entries.append(f"failure {type(exc).__name__}")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record a transition."""
        self.entries.append(f"{old_state.name} -> {new_state.name}")

    def changes(self) -> list[str]:
        """Return the transitions only."""
        return [entry for entry in self.entries if "->" in entry]


def up(value: Any = "answer") -> Any:
    """Return the answer of a healthy dependency."""
    return value


@pytest.fixture(params=ENGINE_CASES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> EngineCase:
    """Return each engine."""
    engine_case: EngineCase = request.param
    return engine_case


@pytest.fixture
def make_storage(engine: EngineCase, empty_server: Any) -> Iterator[MakeStorage]:
    """Yield a factory of storages on this engine: ``make_storage(state, namespace)``."""
    with engine.opened(empty_server) as make:
        yield make


@pytest.fixture
def breaker_of(make_storage: MakeStorage) -> Callable[..., CircuitBreaker]:
    """Return a factory of breakers on this engine, with the arguments of pybreaker."""

    def build(state: str = "closed", **words: Any) -> CircuitBreaker:
        return CircuitBreaker(state_storage=make_storage(state, "scenario"), **words)

    return build


def trip(breaker: CircuitBreaker) -> None:
    """Fail until the circuit is open."""
    for _ in range(breaker.fail_max - 1):
        with pytest.raises(Down):
            breaker.call(down)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert breaker.current_state == "open"


def when_admitted(breaker: CircuitBreaker, function: Callable[[], Any], within: float = 5.0) -> Any:
    """Call until the breaker admits the call."""
    until = time.monotonic() + within
    while True:
        try:
            return breaker.call(function)
        except CircuitBreakerError as exc:
            if "Timeout not elapsed" not in str(exc) or time.monotonic() > until:
                raise
        time.sleep(0.01)


def counted(breaker: CircuitBreaker) -> tuple[str, int, int]:
    """Return the state, the failures and the successes."""
    return breaker.current_state, breaker.fail_counter, breaker.success_counter


def test_new_circuit_is_closed_and_counts_nothing(breaker_of):
    """A circuit starts in the state that its storage was created with."""
    assert counted(breaker_of()) == ("closed", 0, 0)


@pytest.mark.parametrize("state", ["open", "half-open"])
def test_circuit_begins_in_the_state_asked_for(breaker_of, state):
    """The first argument of a storage is the state of a circuit that does not exist yet."""
    breaker = breaker_of(state)
    assert breaker.current_state == state
    assert breaker.state.name == state


def test_success_returns_the_answer_and_stays_closed(breaker_of):
    """While the dependency works, the breaker passes on arguments and results."""
    breaker = breaker_of()
    assert breaker.call(up, "a") == "a"
    assert breaker.call(up, value="b") == "b"
    assert counted(breaker) == ("closed", 0, 0)


def test_failure_is_counted_and_raised_as_it_is(breaker_of):
    """The caller gets the same exception object that the dependency raised."""
    breaker, error = breaker_of(), Down("it")

    def fail() -> None:
        raise error

    with pytest.raises(Down) as caught:
        breaker.call(fail)
    assert caught.value is error
    assert counted(breaker) == ("closed", 1, 0)


def test_success_forgets_failures(breaker_of):
    """Failures count while they are consecutive."""
    breaker = breaker_of(fail_max=3)
    for _ in range(3):
        for _ in range(2):
            with pytest.raises(Down):
                breaker.call(down)
        assert breaker.fail_counter == 2
        breaker.call(up)
        assert counted(breaker) == ("closed", 0, 0)


def test_decorated_function_is_guarded(breaker_of):
    """The breaker works as a decorator."""
    breaker = breaker_of(fail_max=2)
    guarded = breaker(down)
    assert guarded.__name__ == "down"
    with pytest.raises(Down):
        guarded()
    with pytest.raises(CircuitBreakerError):
        guarded()


def test_fail_max_failures_open_the_circuit(breaker_of):
    """The fifth failure trips: not the fourth, not the sixth."""
    breaker = breaker_of()
    for number in range(1, 5):
        with pytest.raises(Down):
            breaker.call(down)
        assert counted(breaker) == ("closed", number, 0)
    with pytest.raises(CircuitBreakerError, match="Failures threshold reached"):
        breaker.call(down)
    assert counted(breaker) == ("open", 5, 0)


def test_fail_max_1_opens_at_once(breaker_of):
    """The smallest threshold is one."""
    breaker = breaker_of(fail_max=1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert breaker.current_state == "open"


def test_trip_shows_the_cause(breaker_of):
    """The new error carries the dependency's error."""
    breaker = breaker_of(fail_max=1)
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(down)
    assert isinstance(caught.value.__context__, Down)


@pytest.mark.parametrize("state", ["closed", "half-open"])
def test_trip_without_new_error_raises_the_cause(breaker_of, state):
    """With ``throw_new_error_on_trip=False``, a call that was made never raises the breaker's error."""
    breaker = breaker_of(fail_max=1, throw_new_error_on_trip=False)
    if state == "half-open":
        breaker.half_open()
    with pytest.raises(Down):
        breaker.call(down)
    assert breaker.current_state == "open"
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)


def test_open_circuit_rejects_without_calling(breaker_of):
    """No call reaches the dependency, and no failure is counted."""
    breaker, reached = breaker_of(fail_max=2), []
    trip(breaker)
    for _ in range(3):
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            breaker.call(reached.append, 1)
    assert not reached
    assert counted(breaker) == ("open", 2, 0)


def test_success_after_reset_timeout_closes(breaker_of):
    """One successful trial, made once, closes the circuit."""
    breaker, reached = breaker_of(fail_max=2, reset_timeout=SHORT_TIMEOUT_S), []
    trip(breaker)
    when_admitted(breaker, lambda: reached.append(1))
    assert reached == [1]
    assert counted(breaker) == ("closed", 0, 0)


def test_failed_trial_opens_again_for_reset_timeout(breaker_of):
    """The trial is counted as a failure, and the reset timeout starts with it."""
    breaker = breaker_of(fail_max=3, reset_timeout=SHORT_TIMEOUT_S)
    began = []

    def trial() -> None:
        began.append(time.monotonic())
        down()

    trip(breaker)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        when_admitted(breaker, trial)
    assert counted(breaker) == ("open", 4, 0)
    when_admitted(breaker, up)
    assert time.monotonic() - began[0] > SHORT_TIMEOUT_S - 0.05
    assert counted(breaker) == ("closed", 0, 0)


def test_success_threshold_counts_successful_trials(breaker_of):
    """With a threshold of 3, the first two successes leave the circuit half-open for the prober."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT_TIMEOUT_S, success_threshold=3)
    trip(breaker)
    when_admitted(breaker, up)
    assert counted(breaker) == ("half-open", 0, 1)
    breaker.call(up)
    assert counted(breaker) == ("half-open", 0, 2)
    breaker.call(up)
    assert counted(breaker) == ("closed", 0, 0)


def test_failure_among_trials_starts_them_again(breaker_of):
    """Successful trials count while they are consecutive."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT_TIMEOUT_S, success_threshold=3)
    trip(breaker)
    when_admitted(breaker, up)
    breaker.call(up)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        breaker.call(down)
    assert breaker.current_state == "open"
    assert breaker.success_counter == 0
    when_admitted(breaker, up)
    assert counted(breaker) == ("half-open", 0, 1)


def test_many_outages_count_alike(breaker_of):
    """The fifth outage behaves like the first."""
    recorder = NotificationRecorder()
    breaker = breaker_of(fail_max=2, reset_timeout=0.05, listeners=[recorder])
    for _ in range(5):
        trip(breaker)
        when_admitted(breaker, up)
    assert recorder.changes() == ["closed -> open", "open -> half-open", "half-open -> closed"] * 5


def test_moved_clock_lets_reset_timeout_elapse(breaker_of):
    """Tests of applications move the clock, and see the time elapse, also after a failed trial."""
    with time_machine.travel(datetime.now(timezone.utc), tick=True) as clock:
        breaker = breaker_of(fail_max=2, reset_timeout=60)
        trip(breaker)
        clock.shift(50)
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
        clock.shift(11)
        with pytest.raises(CircuitBreakerError, match="Trial call failed"):
            breaker.call(down)
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            breaker.call(up)
        clock.shift(61)
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"


def test_operator_opens_and_closes(breaker_of):
    """After ``open()``, calls are rejected. After ``close()``, they are admitted, and the failures are reset."""
    breaker = breaker_of(fail_max=3)
    with pytest.raises(Down):
        breaker.call(down)
    breaker.open()
    assert breaker.current_state == "open"
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    breaker.close()
    assert counted(breaker) == ("closed", 0, 0)
    assert breaker.call(up) == "answer"


def test_operator_closes_a_circuit_opened_by_failures(breaker_of):
    """A ``close()`` does not wait for ``reset_timeout``. The next trip takes ``fail_max`` failures again."""
    breaker = breaker_of(fail_max=2)
    trip(breaker)
    breaker.close()
    assert counted(breaker) == ("closed", 0, 0)
    trip(breaker)


def test_operators_open_lasts_reset_timeout(breaker_of):
    """A circuit that an operator opened recovers like any other."""
    breaker = breaker_of(reset_timeout=60)
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = SHORT_TIMEOUT_S
    assert when_admitted(breaker, up) == "answer"
    assert breaker.current_state == "closed"


@pytest.mark.parametrize(("function", "state", "failures"), [(up, "closed", 0), (down, "open", 1)])
def test_call_after_half_open_by_hand_is_the_trial(breaker_of, function, state, failures):
    """After ``half_open()``, the next call of the same thread decides."""
    breaker = breaker_of()
    breaker.half_open()
    assert counted(breaker) == ("half-open", 0, 0)
    if function is down:
        with pytest.raises(CircuitBreakerError):
            breaker.call(function)
    else:
        breaker.call(function)
    assert counted(breaker) == (state, failures, 0)


def test_listeners_are_notified_of_direct_transitions(breaker_of):
    """Each transition is notified once, with the state before and the state after."""
    recorder = NotificationRecorder()
    breaker = breaker_of(listeners=[recorder])
    breaker.open()
    breaker.half_open()
    breaker.close()
    assert recorder.entries == ["closed -> open", "open -> half-open", "half-open -> closed"]


def test_listeners_are_notified_in_order(breaker_of):
    """Listeners get the call's begin, its end, then the transition.

    A trial's success follows the transition to closed.
    """
    recorder = NotificationRecorder()
    breaker = breaker_of(fail_max=2, reset_timeout=60, listeners=[recorder])
    breaker.call(up)
    trip(breaker)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = SHORT_TIMEOUT_S
    when_admitted(breaker, up)
    assert recorder.entries == [
        *("before", "success"),
        *("before", "failure Down"),
        *("before", "failure Down", "closed -> open"),
        *("open -> half-open", "before", "half-open -> closed", "success"),
    ]


def test_failed_trial_notifies_of_failure_then_open(breaker_of):
    """The trial meets a failed dependency."""
    recorder = NotificationRecorder()
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT_TIMEOUT_S, listeners=[recorder])
    trip(breaker)
    del recorder.entries[:]
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        when_admitted(breaker, down)
    assert recorder.entries == ["open -> half-open", "before", "failure Down", "half-open -> open"]


def test_added_listener_is_notified_and_removed_one_is_not(breaker_of):
    """A breaker notifies the listeners that it has at that time."""
    first, second = NotificationRecorder(), NotificationRecorder()
    breaker = breaker_of(listeners=[first])
    breaker.add_listener(second)
    breaker.call(up)
    breaker.remove_listener(first)
    breaker.call(up)
    assert (len(first.entries), len(second.entries)) == (2, 4)


def test_listener_may_read_everything(breaker_of):
    """Reads in a listener disturb nothing."""

    class ReadingListener(NotificationRecorder):
        def _read(self, cb: CircuitBreaker) -> None:
            self.entries.append(str((cb.current_state, cb.fail_counter, cb.success_counter)))

        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            self._read(cb)

        def failure(self, cb: Any, exc: BaseException) -> None:
            self._read(cb)

        def success(self, cb: Any) -> None:
            self._read(cb)

    reader = ReadingListener()
    breaker = breaker_of(fail_max=3, reset_timeout=SHORT_TIMEOUT_S, success_threshold=2, listeners=[reader])
    trip(breaker)
    assert reader.entries == [
        *("('closed', 0, 0)", "('closed', 1, 0)"),
        *("('closed', 1, 0)", "('closed', 2, 0)"),
        # Our breaker counts and trips in one step, before it calls the listeners.
        *("('closed', 2, 0)", f"('{'open' if settles_calls(breaker) else 'closed'}', 3, 0)", "closed -> open"),
    ]
    del reader.entries[:]
    when_admitted(breaker, up)
    breaker.call(up)
    assert reader.entries == [
        *("open -> half-open", "('half-open', 3, 0)", "('half-open', 0, 1)"),
        *("('half-open', 0, 1)", "half-open -> closed", "('closed', 0, 0)"),
    ]


def found_nothing() -> None:
    """Raise an exception that is the answer of a healthy dependency."""
    raise NotFound("number 42")


@pytest.mark.parametrize(
    "exclude",
    [[NotFound], [LookupError], [lambda exc: "42" in str(exc)], [ZeroDivisionError, lambda exc: "42" in str(exc)]],
    ids=["type", "base", "callable", "both"],
)
def test_excluded_exception_is_a_success(breaker_of, exclude):
    """The dependency answered: the caller gets the exception, and the breaker counts a success."""
    recorder = NotificationRecorder()
    breaker = breaker_of(fail_max=2, exclude=exclude, listeners=[recorder])
    with pytest.raises(Down):
        breaker.call(down)
    with pytest.raises(NotFound):
        breaker.call(found_nothing)
    assert counted(breaker) == ("closed", 0, 0)
    assert recorder.entries[-2:] == ["before", "success"]


def test_excluded_exception_in_a_trial_closes(breaker_of):
    """An excluded exception shows that the dependency has recovered."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT_TIMEOUT_S, exclude=[NotFound])
    trip(breaker)
    with pytest.raises(NotFound):
        when_admitted(breaker, found_nothing)
    assert counted(breaker) == ("closed", 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_call_is_no_answer(breaker_of, error):
    """An exception that ends a process is raised unchanged.  pybreaker counts a failure, and our breaker nothing."""
    breaker = breaker_of()

    def interrupted() -> None:
        raise error

    with pytest.raises(error):
        breaker.call(interrupted)
    assert counted(breaker) == ("closed", 0 if settles_calls(breaker) else 1, 0)


def test_generator_that_ends_is_a_success(breaker_of):
    """Values pass in both directions, and the outcome counts when the generator ends."""
    breaker = breaker_of()

    @breaker
    def conversation() -> Any:
        received = yield "first"
        yield received

    with pytest.raises(Down):
        breaker.call(down)
    talk = conversation()
    assert next(talk) == "first"
    assert talk.send("second") == "second"
    assert breaker.fail_counter == 1
    with pytest.raises(StopIteration):
        next(talk)
    assert counted(breaker) == ("closed", 0, 0)


def test_generator_that_raises_is_a_failure(breaker_of):
    """A generator is guarded up to its end, not up to its first value."""
    breaker = breaker_of(fail_max=2)

    @breaker
    def broken() -> Any:
        yield "first"
        raise Down

    with pytest.raises(Down):
        list(broken())
    assert counted(breaker) == ("closed", 1, 0)
    with pytest.raises(CircuitBreakerError):
        list(broken())
    assert counted(breaker) == ("open", 2, 0)


def test_generator_of_an_open_circuit_is_rejected(breaker_of):
    """The generator is rejected before it starts."""
    breaker, started = breaker_of(fail_max=1), []

    @breaker
    def stream() -> Any:
        started.append(1)
        yield 1

    trip(breaker)
    with pytest.raises(CircuitBreakerError):
        list(stream())
    assert not started


def test_block_is_guarded(breaker_of):
    """A block ``with breaker.calling():`` counts failures, trips, rejects and recovers."""
    breaker, reached = breaker_of(fail_max=2, reset_timeout=60), []
    with pytest.raises(Down), breaker.calling():
        raise Down
    assert counted(breaker) == ("closed", 1, 0)
    with pytest.raises(CircuitBreakerError), breaker.calling():
        raise Down
    assert counted(breaker) == ("open", 2, 0)
    with pytest.raises(CircuitBreakerError), breaker.calling():
        reached.append(1)
    assert not reached

    breaker.reset_timeout = SHORT_TIMEOUT_S
    until = time.monotonic() + 5.0
    while not reached and time.monotonic() < until:
        try:
            with breaker.calling():
                reached.append(2)
        except CircuitBreakerError:
            time.sleep(0.01)
    assert reached == [2]
    assert counted(breaker) == ("closed", 0, 0)


def test_guarded_call_inside_a_guarded_call_counts_both(breaker_of):
    """One breaker may guard two layers of one dependency."""
    breaker = breaker_of(fail_max=3)
    with pytest.raises(Down):
        breaker.call(breaker.call, down)
    assert counted(breaker) == ("closed", 2, 0)
    assert breaker.call(breaker.call, up) == "answer"
    assert counted(breaker) == ("closed", 0, 0)


def test_failures_of_threads_add_up(breaker_of):
    """One breaker that many threads use loses no failure."""
    breaker = breaker_of(fail_max=10**6)

    def fail() -> None:
        for _ in range(50):
            with pytest.raises(Down):
                breaker.call(down)

    threads = [threading.Thread(target=fail) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counted(breaker) == ("closed", 400, 0)


def test_failures_of_breakers_on_one_storage_add_up(make_storage):
    """Two breakers with one storage are one circuit."""
    storage = make_storage("closed", "common")
    first, second = (CircuitBreaker(fail_max=3, state_storage=storage) for _ in range(2))
    for breaker in (first, second):
        with pytest.raises(Down):
            breaker.call(down)
    with pytest.raises(CircuitBreakerError):
        first.call(down)
    with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
        second.call(up)


def test_second_breaker_resets_no_failures(make_storage):
    """A new breaker on a circuit in use changes nothing."""
    storage = make_storage("closed", "common")
    breaker = CircuitBreaker(state_storage=storage)
    with pytest.raises(Down):
        breaker.call(down)
    assert CircuitBreaker(state_storage=storage).fail_counter == 1


def test_storages_of_one_namespace_are_one_circuit(make_storage, engine):
    """Storages of one namespace share counts and trips. In memory, every storage is a separate circuit."""
    first, second, other = (
        CircuitBreaker(fail_max=2, state_storage=make_storage("closed", namespace)) for namespace in ("a", "a", "b")
    )
    with pytest.raises(Down):
        first.call(down)
    with pytest.raises(CircuitBreakerError if engine.shared else Down):
        second.call(down)
    assert other.call(up) == "answer"
    states = tuple(breaker.current_state for breaker in (first, second, other))
    assert states == (("open", "open", "closed") if engine.shared else ("closed",) * 3)


def test_direct_counts_are_literal(make_storage):
    """Direct calls of the storage's methods count literally."""
    storage = make_storage("closed", "by-hand")
    storage.increment_counter()
    storage.increment_counter()
    storage.increment_success_counter()
    assert (storage.counter, storage.success_counter) == (2, 1)
    storage.reset_counter()
    storage.reset_success_counter()
    assert (storage.counter, storage.success_counter) == (0, 0)


@pytest.mark.parametrize("state", ["open", "half-open", "closed"])
def test_direct_state_is_read_back(make_storage, state):
    """A state that is set directly is read back."""
    storage = make_storage("closed", "by-hand")
    storage.state = state
    assert storage.state == state
    assert pybreaker.CircuitBreaker(state_storage=storage).current_state == state


def test_direct_opening_time_is_read_back(make_storage):
    """The opening time is ``None`` until set, and then an aware datetime within a second of the set value."""
    storage = make_storage("open", "by-hand")
    storage.state = "open"
    now = datetime.now(timezone.utc)
    storage.opened_at = now
    assert storage.opened_at is not None
    assert storage.opened_at.tzinfo is not None
    assert abs(storage.opened_at - now) < timedelta(seconds=1)
