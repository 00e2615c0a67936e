"""An unmodified ``pybreaker.CircuitBreaker`` behaves the same on every carrier, pybreaker's own memory included."""

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

from tests.support.engines import ENGINE_CASES, EngineCase, MakeStorage

#: ``reset_timeout`` of scenarios that wait for it, seconds: longer than a few round trips on a busy machine.
SHORT = 0.2


class Down(Exception):
    """The dependency is down."""


class NotFound(LookupError):
    """An answer of a healthy dependency."""


class Diary(CircuitBreakerListener):
    """Everything a breaker says, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        """A call is about to be made."""
        self.said.append("before")

    def success(self, cb: Any) -> None:
        """A call succeeded."""
        self.said.append("success")

    def failure(self, cb: Any, exc: BaseException) -> None:
        """A call failed."""
        self.said.append(f"failure {type(exc).__name__}")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """The circuit moved, or was seen to have moved."""
        self.said.append(f"{old_state.name} -> {new_state.name}")

    def changes(self) -> list[str]:
        """The transitions only."""
        return [entry for entry in self.said if "->" in entry]


def up(value: Any = "answer") -> Any:
    """A call to the healthy dependency."""
    return value


def down() -> None:
    """A call to the dead dependency."""
    raise Down


@pytest.fixture(params=ENGINE_CASES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> EngineCase:
    """Each way to hold a circuit."""
    carried: EngineCase = request.param
    return carried


@pytest.fixture
def make_storage(engine: EngineCase, empty_server: Any) -> Iterator[MakeStorage]:
    """Make a storage on this carrier: ``make_storage(state, namespace)``."""
    with engine.opened(empty_server) as make:
        yield make


@pytest.fixture
def breaker_of(make_storage: MakeStorage) -> Callable[..., CircuitBreaker]:
    """Make a breaker on this carrier: the arguments are pybreaker's."""

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
    """Call again and again until the breaker lets it through."""
    until = time.monotonic() + within
    while True:
        try:
            return breaker.call(function)
        except CircuitBreakerError as exc:
            if "Timeout not elapsed" not in str(exc) or time.monotonic() > until:
                raise
        time.sleep(0.01)


def counted(breaker: CircuitBreaker) -> tuple[str, int, int]:
    """State, failures and successes."""
    return breaker.current_state, breaker.fail_counter, breaker.success_counter


# -- closed ------------------------------------------------------------------------------------------------------------


def test_new_circuit_is_closed_and_counts_nothing(breaker_of):
    """A circuit begins in the state that its storage was made with."""
    assert counted(breaker_of()) == ("closed", 0, 0)


@pytest.mark.parametrize("state", ["open", "half-open"])
def test_circuit_begins_in_the_state_asked_for(breaker_of, state):
    """The first argument of a storage is the state of a circuit that does not exist yet."""
    breaker = breaker_of(state)
    assert breaker.current_state == state
    assert breaker.state.name == state


def test_success_returns_the_answer_and_stays_closed(breaker_of):
    """The breaker is invisible while all is well; arguments go through."""
    breaker = breaker_of()
    assert breaker.call(up, "a") == "a"
    assert breaker.call(up, value="b") == "b"
    assert counted(breaker) == ("closed", 0, 0)


def test_failure_is_counted_and_raised_as_it_is(breaker_of):
    """The caller sees the very exception that the dependency raised."""
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
    """The breaker as a decorator."""
    breaker = breaker_of(fail_max=2)
    guarded = breaker(down)
    assert guarded.__name__ == "down"
    with pytest.raises(Down):
        guarded()
    with pytest.raises(CircuitBreakerError):
        guarded()


# -- the trip ----------------------------------------------------------------------------------------------------------


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
    """The smallest threshold."""
    breaker = breaker_of(fail_max=1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert breaker.current_state == "open"


def test_trip_shows_the_cause(breaker_of):
    """The new error carries what the dependency raised."""
    breaker = breaker_of(fail_max=1)
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(down)
    assert isinstance(caught.value.__context__, Down)


@pytest.mark.parametrize("state", ["closed", "half-open"])
def test_trip_without_new_error_raises_the_cause(breaker_of, state):
    """``throw_new_error_on_trip=False``: callers never see the breaker's error for a call that was made."""
    breaker = breaker_of(fail_max=1, throw_new_error_on_trip=False)
    if state == "half-open":
        breaker.half_open()
    with pytest.raises(Down):
        breaker.call(down)
    assert breaker.current_state == "open"
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)


def test_open_circuit_rejects_without_calling(breaker_of):
    """No call reaches the dependency, and nothing is counted."""
    breaker, reached = breaker_of(fail_max=2), []
    trip(breaker)
    for _ in range(3):
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            breaker.call(reached.append, 1)
    assert not reached
    assert counted(breaker) == ("open", 2, 0)


# -- the trial ---------------------------------------------------------------------------------------------------------


def test_success_after_reset_timeout_closes(breaker_of):
    """One successful trial, made once, closes the circuit."""
    breaker, reached = breaker_of(fail_max=2, reset_timeout=SHORT), []
    trip(breaker)
    when_admitted(breaker, lambda: reached.append(1))
    assert reached == [1]
    assert counted(breaker) == ("closed", 0, 0)


def test_failed_trial_opens_again_for_reset_timeout(breaker_of):
    """The trial is counted as a failure, and the time runs from it."""
    breaker = breaker_of(fail_max=3, reset_timeout=SHORT)
    began = []

    def trial() -> None:
        began.append(time.monotonic())
        down()

    trip(breaker)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        when_admitted(breaker, trial)
    assert counted(breaker) == ("open", 4, 0)
    when_admitted(breaker, up)
    assert time.monotonic() - began[0] > SHORT - 0.05
    assert counted(breaker) == ("closed", 0, 0)


def test_success_threshold_counts_successful_trials(breaker_of):
    """With a threshold of 3 the first two leave the circuit half-open, for the one that probes."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT, success_threshold=3)
    trip(breaker)
    when_admitted(breaker, up)
    assert counted(breaker) == ("half-open", 0, 1)
    breaker.call(up)
    assert counted(breaker) == ("half-open", 0, 2)
    breaker.call(up)
    assert counted(breaker) == ("closed", 0, 0)


def test_failure_among_trials_starts_them_again(breaker_of):
    """Successful trials count while they are consecutive."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT, success_threshold=3)
    trip(breaker)
    when_admitted(breaker, up)
    breaker.call(up)
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        breaker.call(down)
    assert breaker.current_state == "open"
    assert breaker.success_counter == 0
    when_admitted(breaker, up)
    assert counted(breaker) == ("half-open", 0, 1)


def test_many_cycles_count_alike(breaker_of):
    """The fifth outage is like the first."""
    diary = Diary()
    breaker = breaker_of(fail_max=2, reset_timeout=0.05, listeners=[diary])
    for _ in range(5):
        trip(breaker)
        when_admitted(breaker, up)
    assert diary.changes() == ["closed -> open", "open -> half-open", "half-open -> closed"] * 5


def test_moved_clock_lets_reset_timeout_elapse(breaker_of):
    """Tests that move the clock, as users' own do, see the time elapse, also after a failed trial."""
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


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_operator_opens_and_closes(breaker_of):
    """``open()`` rejects from then on, ``close()`` lets through again and forgets the failures."""
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


def test_operator_closes_what_failures_have_opened(breaker_of):
    """``close()`` does not wait for ``reset_timeout``; the next trip takes ``fail_max`` failures again."""
    breaker = breaker_of(fail_max=2)
    trip(breaker)
    breaker.close()
    assert counted(breaker) == ("closed", 0, 0)
    trip(breaker)


def test_operators_open_lasts_reset_timeout(breaker_of):
    """A circuit opened by hand recovers as any other."""
    breaker = breaker_of(reset_timeout=60)
    breaker.open()
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = SHORT
    assert when_admitted(breaker, up) == "answer"
    assert breaker.current_state == "closed"


@pytest.mark.parametrize(("function", "state", "failures"), [(up, "closed", 0), (down, "open", 1)])
def test_call_after_half_open_by_hand_is_the_trial(breaker_of, function, state, failures):
    """``half_open()``: the next call of the same thread decides."""
    breaker = breaker_of()
    breaker.half_open()
    assert counted(breaker) == ("half-open", 0, 0)
    if function is down:
        with pytest.raises(CircuitBreakerError):
            breaker.call(function)
    else:
        breaker.call(function)
    assert counted(breaker) == (state, failures, 0)


def test_listeners_hear_of_transitions_by_hand(breaker_of):
    """Each once, with the state before and the state now."""
    diary = Diary()
    breaker = breaker_of(listeners=[diary])
    breaker.open()
    breaker.half_open()
    breaker.close()
    assert diary.said == ["closed -> open", "open -> half-open", "half-open -> closed"]


# -- listeners ---------------------------------------------------------------------------------------------------------


def test_listeners_hear_everything_in_order(breaker_of):
    """Before the call, then its end, then what follows from it; a success of a trial after the circuit has closed."""
    diary = Diary()
    breaker = breaker_of(fail_max=2, reset_timeout=60, listeners=[diary])
    breaker.call(up)
    trip(breaker)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = SHORT
    when_admitted(breaker, up)
    assert diary.said == [
        *("before", "success"),
        *("before", "failure Down"),
        *("before", "failure Down", "closed -> open"),
        *("open -> half-open", "before", "half-open -> closed", "success"),
    ]


def test_failed_trial_is_heard_as_failure_then_open(breaker_of):
    """The trial of a dead dependency."""
    diary = Diary()
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT, listeners=[diary])
    trip(breaker)
    del diary.said[:]
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        when_admitted(breaker, down)
    assert diary.said == ["open -> half-open", "before", "failure Down", "half-open -> open"]


def test_listener_added_later_hears_and_removed_one_does_not(breaker_of):
    """Listeners come and go."""
    first, second = Diary(), Diary()
    breaker = breaker_of(listeners=[first])
    breaker.add_listener(second)
    breaker.call(up)
    breaker.remove_listener(first)
    breaker.call(up)
    assert (len(first.said), len(second.said)) == (2, 4)


def test_listener_may_read_everything(breaker_of):
    """What a listener reads disturbs nothing."""

    class Curious(Diary):
        def _look(self, cb: CircuitBreaker) -> None:
            self.said.append(str((cb.current_state, cb.fail_counter, cb.success_counter)))

        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            self._look(cb)

        def failure(self, cb: Any, exc: BaseException) -> None:
            self._look(cb)

        def success(self, cb: Any) -> None:
            self._look(cb)

    curious = Curious()
    breaker = breaker_of(fail_max=3, reset_timeout=SHORT, success_threshold=2, listeners=[curious])
    trip(breaker)
    assert curious.said == [
        *("('closed', 0, 0)", "('closed', 1, 0)"),
        *("('closed', 1, 0)", "('closed', 2, 0)"),
        *("('closed', 2, 0)", "('closed', 3, 0)", "closed -> open"),
    ]
    del curious.said[:]
    when_admitted(breaker, up)
    breaker.call(up)
    assert curious.said == [
        *("open -> half-open", "('half-open', 3, 0)", "('half-open', 0, 1)"),
        *("('half-open', 0, 1)", "half-open -> closed", "('closed', 0, 0)"),
    ]


# -- which exceptions count --------------------------------------------------------------------------------------------


def found_nothing() -> None:
    """A healthy dependency's answer, as an exception."""
    raise NotFound("number 42")


@pytest.mark.parametrize(
    "exclude",
    [[NotFound], [LookupError], [lambda exc: "42" in str(exc)], [ZeroDivisionError, lambda exc: "42" in str(exc)]],
    ids=["type", "base", "callable", "both"],
)
def test_excluded_exception_is_a_success(breaker_of, exclude):
    """The dependency answered: the caller sees the exception, the breaker a success."""
    diary = Diary()
    breaker = breaker_of(fail_max=2, exclude=exclude, listeners=[diary])
    with pytest.raises(Down):
        breaker.call(down)
    with pytest.raises(NotFound):
        breaker.call(found_nothing)
    assert counted(breaker) == ("closed", 0, 0)
    assert diary.said[-2:] == ["before", "success"]


def test_excluded_exception_in_a_trial_closes(breaker_of):
    """The dependency is back."""
    breaker = breaker_of(fail_max=1, reset_timeout=SHORT, exclude=[NotFound])
    trip(breaker)
    with pytest.raises(NotFound):
        when_admitted(breaker, found_nothing)
    assert counted(breaker) == ("closed", 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_call_counts_as_failure(breaker_of, error):
    """What ends a process is raised as it is, and is not taken for an answer of the dependency."""
    breaker = breaker_of()

    def interrupted() -> None:
        raise error

    with pytest.raises(error):
        breaker.call(interrupted)
    assert counted(breaker) == ("closed", 1, 0)


# -- generators and blocks ---------------------------------------------------------------------------------------------


def test_generator_that_ends_is_a_success(breaker_of):
    """What it yields and what it is sent go through; it is settled when it ends."""
    breaker = breaker_of()

    @breaker
    def conversation() -> Any:
        heard = yield "first"
        yield heard

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
    """It is guarded up to its end, not up to its first value."""
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
    """Before it has begun."""
    breaker, begun = breaker_of(fail_max=1), []

    @breaker
    def stream() -> Any:
        begun.append(1)
        yield 1

    trip(breaker)
    with pytest.raises(CircuitBreakerError):
        list(stream())
    assert not begun


def test_block_is_guarded(breaker_of):
    """``with breaker.calling():`` counts failures, trips, rejects and recovers."""
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

    breaker.reset_timeout = SHORT
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
    """One breaker around two layers of one dependency."""
    breaker = breaker_of(fail_max=3)
    with pytest.raises(Down):
        breaker.call(breaker.call, down)
    assert counted(breaker) == ("closed", 2, 0)
    assert breaker.call(breaker.call, up) == "answer"
    assert counted(breaker) == ("closed", 0, 0)


# -- threads and several breakers --------------------------------------------------------------------------------------


def test_failures_of_threads_add_up(breaker_of):
    """One breaker used by many threads loses no failure."""
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


def test_second_breaker_forgets_no_failures(make_storage):
    """Making one more breaker on a circuit in use changes nothing."""
    storage = make_storage("closed", "common")
    breaker = CircuitBreaker(state_storage=storage)
    with pytest.raises(Down):
        breaker.call(down)
    assert CircuitBreaker(state_storage=storage).fail_counter == 1


def test_storages_of_one_namespace_are_one_circuit(make_storage, engine):
    """What one storage counts, another of the same namespace trips on; in memory, every storage is its own circuit."""
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


# -- the storage's interface by hand -----------------------------------------------------------------------------------


def test_counters_by_hand_do_what_they_say(make_storage):
    """The raw interface counts literally."""
    storage = make_storage("closed", "by-hand")
    storage.increment_counter()
    storage.increment_counter()
    storage.increment_success_counter()
    assert (storage.counter, storage.success_counter) == (2, 1)
    storage.reset_counter()
    storage.reset_success_counter()
    assert (storage.counter, storage.success_counter) == (0, 0)


@pytest.mark.parametrize("state", ["open", "half-open", "closed"])
def test_state_by_hand_is_the_state(make_storage, state):
    """The raw interface sets literally."""
    storage = make_storage("closed", "by-hand")
    storage.state = state
    assert storage.state == state
    assert pybreaker.CircuitBreaker(state_storage=storage).current_state == state


def test_opened_at_by_hand_reads_back(make_storage):
    """It is ``None`` until set, and an aware datetime within a second of what was set then."""
    storage = make_storage("open", "by-hand")
    storage.state = "open"
    now = datetime.now(timezone.utc)
    storage.opened_at = now
    assert storage.opened_at is not None
    assert storage.opened_at.tzinfo is not None
    assert abs(storage.opened_at - now) < timedelta(seconds=1)
