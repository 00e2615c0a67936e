"""What pybreaker means is heard exactly, whoever else reads or writes at the same time."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
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

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import CLOSED, Circuit, new_circuit
from pybreaker_redis._model.intents import Load
from pybreaker_redis._runtime import fork
from tests.support.inspect import reset_in_child

pytestmark = pytest.mark.usefixtures("patient")


class Down(Exception):
    """The dependency is down."""


def up() -> str:
    """A call to the healthy dependency."""
    return "answer"


def down() -> None:
    """A call to the dead dependency."""
    raise Down


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    """Let calls fail, whatever the breaker makes of it."""
    for _ in range(times):
        with pytest.raises((Down, CircuitBreakerError)):
            breaker.call(down)


@pytest.fixture(params=["memory", "redis"])
def storage_of(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., Any]:
    """Make a storage of a circuit; with Redis, each storage has the same circuit."""
    if request.param == "memory":
        return lambda state="closed", **words: CircuitMemoryStorage(state, **words)
    return lambda state="closed", **words: CircuitRedisStorage(
        state, client, namespace="adapter", max_staleness=0, **words
    )


@contextmanager
def elsewhere(action: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run something in another thread, and see that it ends."""
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
    """Wait for something that has to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def in_thread(action: Callable[[], Any]) -> Any:
    """The answer of something done in another thread."""
    answers: list[Any] = []
    with elsewhere(lambda: answers.append(action())):
        pass
    return answers[0]


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_both_resets_by_hand_close_nothing(storage_of):
    """`reset_success_counter()` and `reset_counter()` in a row are only `close()` if `close()` asks for them."""
    storage = storage_of("open")
    storage.increment_counter()
    storage.increment_success_counter()
    storage.reset_success_counter()
    storage.reset_counter()
    assert (storage.state, storage.counter, storage.success_counter) == ("open", 0, 0)


def test_opened_at_and_reset_by_hand_open_nothing(storage_of):
    """Setting `opened_at` and resetting the successes is only a trip if `open()` asks for it."""
    storage = storage_of()
    storage.opened_at = datetime.now(timezone.utc)
    storage.reset_success_counter()
    assert storage.state == "closed"


def test_reading_opened_at_and_reset_by_hand_claim_nothing(storage_of):
    """Reading `opened_at` and resetting the successes is only a claim if an open state asks for it."""
    storage = storage_of("open")
    assert storage.opened_at is not None
    storage.reset_success_counter()
    assert storage.state == "open"


def test_count_and_reset_after_a_probe_by_hand_close_nothing(storage_of):
    """Between two probes the successes may be read and reset without closing the circuit."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    assert storage.success_counter == 1
    storage.reset_success_counter()
    assert (storage.state, storage.success_counter) == ("half-open", 0)


def test_counting_by_hand_in_an_old_thread_counts(storage_of):
    """By hand means by hand, also on a thread whose last call lies generations back."""
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
    """An exception in flight does not make a count by hand a report."""
    storage = storage_of("open")
    try:
        down()
    except Down:
        storage.increment_counter()
    assert storage.counter == 1


def test_counting_by_hand_in_a_guarded_function_counts(storage_of):
    """What the function asks of the storage is the function's, not the call's that it is made in."""
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
    """`open()` by hand is never refused, not even in the handler of a failure that was."""
    storage = storage_of()
    breaker = CircuitBreaker(state_storage=storage)

    def overtaken() -> None:
        in_thread(breaker.current_state.upper)
        other.open()
        other.close()
        raise Down

    other = CircuitBreaker(state_storage=storage)
    try:
        breaker.call(overtaken)
    except Down:
        assert storage.counter == 0
        breaker.open()
    assert storage.state == "open"


def test_half_open_by_hand_forgets_collected_successes(storage_of):
    """A trial by hand starts the threshold again, and its successes count from one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    breaker.half_open()
    assert storage.success_counter == 0
    breaker.call(up)
    assert (storage.state, storage.success_counter) == ("half-open", 1)


def test_operator_closes_although_its_own_probe_was_overtaken(storage_of):
    """Found by the machine: `close()` by hand was fenced off if the thread's last deed was a counted probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    breaker.call(up)
    in_thread(breaker.half_open)
    breaker.close()
    assert storage.state == "closed"


@pytest.mark.parametrize("state", ["ajar", "", None, 1, b"open"])
def test_unknown_state_is_refused_and_nothing_lost(storage_of, state):
    """A bad state is named at once, and the circuit stays as it is."""
    storage = storage_of("open")
    with pytest.raises(ValueError, match="state must be one of 'closed', 'open', 'half-open', not"):
        storage.state = state
    assert storage.state == "open"


@pytest.mark.parametrize("at", [None, 1700000000, "2030-01-01"])
def test_opened_at_that_is_no_datetime_is_refused(storage_of, at):
    """The error names what was given."""
    storage = storage_of()
    if storage.name == "memory" and at is None:
        storage.opened_at = at
        assert storage.opened_at is None, "which pybreaker's own class takes, too"
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
    """The error names the argument, what was given and what is accepted."""
    with pytest.raises(error, match=f"probe_lease must .*not {lease!r}"):
        CircuitMemoryStorage("closed", probe_lease=lease)


# -- noticing ----------------------------------------------------------------------------------------------------------


def test_looking_before_calling_still_reports_the_success(storage_of):
    """`if breaker.current_state == "closed": breaker.call(f)` is a success like any other."""
    storage = storage_of("open")
    breaker = CircuitBreaker(state_storage=storage)
    storage.state = "closed"
    storage.increment_counter()
    assert breaker.current_state == "closed"
    assert breaker.current_state == "closed"
    breaker.call(up)
    assert storage.counter == 0


def test_second_breaker_that_notices_wipes_nothing(storage_of):
    """Two breakers may share a storage: what the second one notices is not a success."""
    storage = storage_of()
    breakers = [CircuitBreaker(fail_max=2, reset_timeout=0, state_storage=storage) for _ in range(3)]
    fail(breakers[0], 2)
    assert [breaker.state.name for breaker in breakers] == ["open"] * 3
    breakers[0].call(up)
    fail(breakers[0])
    assert [breaker.state.name for breaker in breakers] == ["closed"] * 3
    assert storage.counter == 1


def test_noticing_again_after_a_listener_raised_wipes_nothing(storage_of):
    """A listener that raises makes the breaker notice again and again; the counter is none of its business."""

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


def test_threads_that_hammer_reads_disturb_no_call(storage_of):
    """Health checks may read anything at any moment: every count, trip, probe and close happens as without them."""
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
    """Keeps a breaker long in the moment in which it has told the storage's news to some."""

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Let others in."""
        time.sleep(0.001)


# -- what listeners see ------------------------------------------------------------------------------------------------


class Looking(CircuitBreakerListener):
    """Reads everything that it can at every transition."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Note what was told, what the storage says and what the breaker says."""
        self.seen.append((new_state.name, cb.current_state, cb.state.name))


def test_listener_may_read_the_breakers_state(storage_of):
    """`breaker.state` inside `state_change` neither recurses nor repeats; the storage already has the new state."""
    listener = Looking()
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


def test_listener_may_read_the_breakers_state_of_what_others_did(storage_of):
    """The same when the breaker only notices; with stock storages, this recurses until Python gives up."""
    storage = storage_of()
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    other = CircuitBreaker(reset_timeout=0, state_storage=storage)
    in_thread(other.open)
    assert breaker.state.name == "open"
    in_thread(other.close)
    assert breaker.call(up) == "answer"
    assert listener.seen == [("open", "open", "closed"), ("closed", "closed", "open")]


@pytest.mark.parametrize("told", ["open", "half-open", "closed"])
def test_raising_listener_loses_no_transition(storage_of, told):
    """Trip, claim and close are committed before listeners run."""

    class Raising(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            if new_state.name == told:
                raise RuntimeError(told)

    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage, listeners=[Raising()])
    with pytest.raises((RuntimeError, CircuitBreakerError)):
        breaker.call(down)
    if told != "open":
        with pytest.raises(RuntimeError):
            breaker.call(up)
    assert storage.state == told
    # Nor does it leave anything behind that would swallow an assignment, or hide the state.
    storage.state = "open"
    assert breaker.current_state == "open"


@pytest.mark.parametrize("action", ["open", "half_open", "close"])
def test_raising_listener_does_not_stop_the_operator(storage_of, action):
    """What an operator orders is done before listeners run."""

    class Raising(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            raise RuntimeError

    storage = storage_of("closed" if action == "open" else "open")
    breaker = CircuitBreaker(state_storage=storage, listeners=[Raising()])
    with pytest.raises(RuntimeError):
        getattr(breaker, action)()
    assert storage.state == {"open": "open", "half_open": "half-open", "close": "closed"}[action]


# -- one probe ---------------------------------------------------------------------------------------------------------


def test_others_are_rejected_while_a_block_probes(storage_of):
    """`calling()` holds no lock, so other threads do come: they get `CircuitBreakerError` at once."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    with breaker.calling():
        assert storage.state == "half-open"
        for _ in range(3):
            with pytest.raises(CircuitBreakerError):
                in_thread(lambda: breaker.call(up))
    assert storage.state == "closed"


def test_refused_claim_tells_no_listener(storage_of, monkeypatch):
    """Whoever comes second hears nothing of half-open."""
    storage = storage_of("open")
    first = CircuitBreaker(reset_timeout=0, state_storage=storage)
    listener = Looking()
    second = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    probe = first.calling()
    opened_at = type(storage).opened_at

    def read_and_lose_the_race(self: Any) -> Any:
        monkeypatch.undo()
        at = opened_at.fget(self)
        in_thread(probe.__enter__)
        return at

    # An override of the same name is passed over, so the storage still knows who asks.
    read_and_lose_the_race.__code__ = read_and_lose_the_race.__code__.replace(co_name="opened_at")
    monkeypatch.setattr(type(storage), "opened_at", property(read_and_lose_the_race, opened_at.fset))
    with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        second.call(up)
    assert listener.seen == []
    in_thread(lambda: probe.__exit__(None, None, None))


def test_expired_lease_is_claimed_by_another_thread(storage_of):
    """A prober that never reports blocks the circuit for its lease only; when it does report, nobody listens."""
    storage = storage_of("open", probe_lease=1.0)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, success_threshold=2)
    with breaker.calling():
        assert in_thread(lambda: storage.opened_at) is not None
        wait_until(lambda: in_thread(lambda: storage.opened_at) is None)
        assert in_thread(lambda: breaker.call(up)) == "answer"
        assert storage.success_counter == 1
    assert storage.success_counter == 1
    assert in_thread(lambda: storage.state) == "open"


def test_slow_probe_counts_if_nobody_else_claimed(storage_of):
    """A probe that outlasts its lease is still the probe as long as nobody took over."""
    storage = storage_of("open", probe_lease=0.001)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    breaker.call(lambda: time.sleep(0.02))
    assert storage.state == "closed"


def test_probe_whose_lease_has_ended_is_claimed_again_and_no_listener_is_called(storage_of):
    """A probe without a report blocks for its lease; then the next call claims, and nothing has moved for listeners."""
    storage = storage_of("open", probe_lease=0.03)
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage, listeners=[listener])
    breaker.call(up)
    lost = breaker.calling()
    lost.__enter__()
    wait_until(lambda: storage.state == "open")
    breaker.call(up)
    assert storage.state == "closed"
    assert [told for told, _, _ in listener.seen] == ["half-open", "closed"]
    lost.__exit__(None, None, None)


def test_reset_timeout_zero_with_the_shortest_lease_does_not_recurse(storage_of):
    """The claim that a thread has just won admits its call, however late it comes."""
    storage = storage_of("open", probe_lease=0.001)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    for _ in range(20):
        with pytest.raises(CircuitBreakerError, match="Trial call failed"):
            breaker.call(down)


@pytest.mark.parametrize("threshold", [2, 3, 5])
def test_threshold_takes_so_many_successes_whichever_threads_make_them(storage_of, threshold):
    """With a thread for each request: every call is admitted, and listeners are notified of nothing in between."""
    storage = storage_of("open")
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=threshold, state_storage=storage, listeners=[listener])
    for made in range(threshold):
        assert storage.success_counter == made
        assert in_thread(lambda: breaker.call(up)) == "answer"
    assert (storage.state, storage.counter, storage.success_counter) == ("closed", 0, 0)
    assert [told for told, _, _ in listener.seen] == ["half-open", "closed"]


def test_failure_of_a_later_probe_opens(storage_of):
    """A probe that another thread makes decides like the first one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    assert in_thread(lambda: breaker.call(up)) == "answer"
    with pytest.raises(CircuitBreakerError, match="Trial call failed"):
        in_thread(lambda: breaker.call(down))
    assert (storage.state, storage.success_counter) == ("open", 0)


def test_refused_claim_between_two_probes_rejects_and_tells_no_listener(storage_of):
    """Another breaker has the next probe: `CircuitBreakerError`, and the circuit is still half-open for listeners."""
    storage = storage_of("open")
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage, listeners=[listener])
    breaker.call(up)
    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    with other.calling(), pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        in_thread(lambda: breaker.call(up))
    breaker.call(up)
    assert storage.state == "closed"
    assert [told for told, _, _ in listener.seen] == ["half-open", "closed"]


@pytest.mark.parametrize("moved", ["open", "close"])
def test_claim_that_finds_the_circuit_moved_follows_it(storage_of, moved, monkeypatch):
    """What others did between the look and the claim is noticed at once, not rejected as a probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=60, success_threshold=3, state_storage=storage)
    breaker.half_open()
    breaker.call(up)
    other = CircuitBreaker(state_storage=storage)
    look = type(storage)._read_circuit

    def look_and_be_overtaken(self: Any, *given: Any) -> Any:
        monkeypatch.undo()
        reply = look(self, *given)
        in_thread(getattr(other, moved))
        return reply

    monkeypatch.setattr(type(storage), "_read_circuit", look_and_be_overtaken)
    if moved == "open":
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed"):
            breaker.call(up)
    else:
        assert breaker.call(up) == "answer"
    assert breaker.state.name == storage.state == {"open": "open", "close": "closed"}[moved]


def test_claim_that_finds_another_prober_is_rejected(storage_of, monkeypatch):
    """Two calls see the same free probe; one gets it."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.call(up)
    probe = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage).calling()
    look = type(storage)._read_circuit

    def look_and_be_overtaken(self: Any, *given: Any) -> Any:
        monkeypatch.undo()
        reply = look(self, *given)
        in_thread(probe.__enter__)
        return reply

    monkeypatch.setattr(type(storage), "_read_circuit", look_and_be_overtaken)
    with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
        breaker.call(up)
    probe.__exit__(None, None, None)
    assert storage.success_counter == 2


def test_forked_child_does_not_hold_its_parents_probe():
    """A child that is forked in the middle of a probe is one of the others."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    with breaker.calling():
        pid = os.fork()
        if not pid:
            os._exit(0 if storage.state == "open" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert storage.state == "half-open"


def test_anybody_may_claim_after_half_open_by_hand(storage_of):
    """Half-open by hand is a gate open to one: the thread that did it, or whoever claims first."""
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
    """Found by the machine: two operators who half-open one circuit used to get a trial each."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.half_open()
    assert in_thread(lambda: (breaker.half_open(), storage.state)[1]) == "half-open"
    assert storage.state == "open"


# -- fencing -----------------------------------------------------------------------------------------------------------


def test_call_that_reads_its_breaker_is_not_admitted_again(storage_of):
    """The guarded function may look at its breaker; its result still belongs to the generation it began in."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    other = CircuitBreaker(fail_max=2, state_storage=storage)

    def overtaken() -> None:
        in_thread(other.open)
        in_thread(other.close)
        assert breaker.state.name == breaker.current_state == storage.state == "closed"
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    assert storage.counter == 0


def test_late_failure_of_a_closed_circuits_call_surfaces_and_trips_nothing(storage_of):
    """Even as the last one before `fail_max`, a failure of an earlier generation is the user's own and nothing else."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    other = CircuitBreaker(fail_max=1, state_storage=storage)

    def overtaken() -> None:
        in_thread(other.open)
        in_thread(other.close)
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)


@pytest.mark.parametrize("throw_new_error", [True, False])
def test_late_failure_of_a_probe_surfaces_and_opens_nothing(storage_of, throw_new_error):
    """A prober that was overtaken gets its own exception, whatever the breaker would have thrown."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, throw_new_error_on_trip=throw_new_error)

    def overtaken() -> None:
        in_thread(CircuitBreaker(state_storage=storage).close)
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)


def test_late_success_of_a_probe_closes_nothing(storage_of):
    """A prober that was overtaken has nothing to say about the circuit."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    assert breaker.call(lambda: in_thread(CircuitBreaker(state_storage=storage).open)) is True
    assert (storage.state, storage.success_counter) == ("open", 0)


def test_nested_call_that_trips_leaves_the_outer_one_nothing_to_report(storage_of):
    """One failure that passes through two guarded calls of one circuit opens it once."""
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
    """A storage cannot know where a generator began: on a thread that made no call, its end counts as of now."""
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


# -- around it ---------------------------------------------------------------------------------------------------------


def test_subclass_that_overrides_operations_is_understood(server):
    """Storages may be extended: an override that calls on is passed over when asking who asked."""

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


def test_breaker_subclass_that_counts_differently_is_understood(storage_of):
    """A breaker that overrides `call()`, as users do to shed the lock, is admitted and fenced like the original."""

    class Unlocked(CircuitBreaker):
        def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            return self.state.call(func, *args, **kwargs)

    storage = storage_of()
    breaker = Unlocked(fail_max=1, state_storage=storage)

    def overtaken() -> None:
        in_thread(breaker.open)
        in_thread(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)


class Passing(CircuitBreaker):
    """Overrides what it can, and calls on."""

    def half_open(self) -> None:
        """As it is."""
        super().half_open()

    def open(self) -> bool:
        """As it is."""
        return super().open()

    def close(self) -> None:
        """As it is."""
        super().close()

    @property
    def current_state(self) -> str:
        """As it is."""
        return super().current_state

    def _create_new_state(self, *args: Any, **words: Any) -> Any:
        return super()._create_new_state(*args, **words)

    def _inc_counter(self) -> None:
        self._state_storage.increment_counter()


class Direct(CircuitBreaker):
    """Has a way of its own to make a call."""

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """By a method of its own."""
        return self.guarded(func)

    def guarded(self, func: Any) -> Any:
        """Call without the lock."""
        return self.state.call(func)


class Wrapped(CircuitMemoryStorage):
    """A storage as a monitoring agent leaves it."""


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
def test_extended_and_wrapped_classes_are_understood(breaker_class, storage_class):
    """Found by review: a frame more between breaker and storage must not cost a trip, a fence or the one probe."""
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
    """A breaker of the same kind on the same storage, so that a thread need not wait for the lock of the other."""
    return type(breaker)(reset_timeout=0, success_threshold=2, state_storage=breaker._state_storage)


def test_two_breakers_and_a_listener_that_reads_both(storage_of):
    """Found by review: each breaker that is telling keeps its old state for its own listeners."""
    storage = storage_of()
    breakers: list[CircuitBreaker] = []
    told = []

    class ReadsBoth(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            told.append(new_state.name)
            assert [breaker.state.name for breaker in breakers]

    listener = ReadsBoth()
    breakers += [CircuitBreaker(fail_max=1, state_storage=storage, listeners=[listener]) for _ in range(2)]
    with pytest.raises(CircuitBreakerError):
        breakers[0].call(down)
    assert told == ["open", "open"]


def test_rejected_threads_of_the_probers_breaker_tell_nobody(storage_of):
    """Found by review: the state is a thread's, the breaker is shared; nothing moves, so nobody is told."""
    storage = storage_of("open")
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=20, state_storage=storage, listeners=[listener])
    for _ in range(19):
        with breaker.calling():
            with pytest.raises(CircuitBreakerError):
                in_thread(lambda: breaker.call(up))
            assert in_thread(lambda: breaker.state.name) == "half-open"
    assert [told for told, _, _ in listener.seen] == ["half-open"]


def test_probe_that_was_never_made_is_claimed_by_one(storage_of):
    """Found by review: a claim admits one call; once its lease has ended, it admits none."""

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


def test_forked_children_do_not_share_a_trial_by_hand():
    """Found by review: half-open in a master is no trial for each of its workers."""
    storage = CircuitMemoryStorage("half-open")
    assert storage.state == "half-open"
    pid = os.fork()
    if not pid:
        os._exit(0 if storage.state == "open" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_listener_that_opens_the_breaker_itself_opens_it_once(storage_of):
    """Found by review: the trip of a failure is fenced by that failure, whatever its listeners do."""

    class Opens(CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            cb.open()

    storage = storage_of()
    opened = []
    breaker = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[Opens()])
    execute = storage._core.carry_out
    storage._core.carry_out = lambda *given: (opened.append(r := execute(*given)), r)[1]
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert max(reply.circuit.generation for reply in opened) == 1


@pytest.mark.parametrize(("make", "admitted"), [(StockMemoryStorage, 3), (CircuitMemoryStorage, 0)])
def test_memory_lets_one_block_probe_where_stock_lets_all(make, admitted):
    """`calling()` holds no lock, so with pybreaker's own memory storage every thread is admitted while half-open."""
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


# -- found by changing the code: see `tox -e mutation` ----------------------------------------------------------------


@pytest.mark.parametrize("lease", [0.001, 86400, 86400.0])
def test_lease_at_either_limit_is_accepted(lease):
    """The limits that the error names are themselves allowed."""
    storage = CircuitMemoryStorage("open", probe_lease=lease)
    CircuitBreaker(reset_timeout=0, state_storage=storage).call(up)
    assert storage.state == "closed"


@pytest.mark.parametrize("lease", [0.0001, 86400.001])
def test_lease_beyond_a_limit_is_refused_and_both_limits_named(lease):
    """One millisecond more is too much, and the reader learns what is not."""
    with pytest.raises(ValueError, match=r"must lie between 0\.001 and 86400 seconds"):
        CircuitMemoryStorage("closed", probe_lease=lease)


def test_late_success_of_a_probe_tells_no_listener(storage_of):
    """Nobody hears of a close that was not granted."""
    storage = storage_of("open")
    listener = Looking()
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[listener])
    assert breaker.call(lambda: in_thread(CircuitBreaker(state_storage=storage).open)) is True
    assert [told for told, _, _ in listener.seen] == ["half-open"]


@pytest.mark.parametrize("state", ["closed", "open"])
def test_late_failure_surfaces_as_the_very_exception(storage_of, state):
    """What the dependency said comes with the exception, so it must be that one, not another of its kind."""
    storage = storage_of(state)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=0, state_storage=storage)
    error = Down("it")

    def overtaken() -> None:
        in_thread(CircuitBreaker(state_storage=storage).open)
        raise error

    with pytest.raises(Down) as caught:
        breaker.call(overtaken)
    assert caught.value is error


def memory_at(clock: Callable[[], float], **words: Any) -> CircuitMemoryStorage:
    """An open circuit in memory whose time, in milliseconds, is told."""
    storage = CircuitMemoryStorage("open", **words)
    storage._core._engine = MemoryEngine(new_circuit("open", clock()), clock)
    return storage


def test_claim_just_won_admits_its_call_although_the_lease_is_over_already():
    """On a machine so slow that every look at the clock takes longer than the lease, calls still get through."""
    storage = memory_at(count(0, 1_000_000).__next__, probe_lease=1)
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    assert breaker.call(up) == "answer"
    assert storage.success_counter == 1
    assert breaker.call(up) == "answer"
    assert storage.state == "closed"


def test_prober_loses_its_lease_at_the_very_instant_others_may_claim():
    """There is no instant at which one thread still holds the probe and another may have it."""
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
def test_call_made_from_outside_through_the_state_counts_for_its_own_generation(storage_of, before):
    """`breaker.state.call(f)` by somebody else than the breaker is a call too, whatever this thread called before."""
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


def test_call_made_from_outside_through_the_state_is_fenced(storage_of):
    """Its late failure counts no more than that of any other call."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)

    def overtaken() -> None:
        in_thread(breaker.open)
        in_thread(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.state.call(overtaken)
    assert storage.counter == 0


@pytest.mark.parametrize("last", [up, down])
def test_calls_that_bypass_the_breaker_are_admitted_anew(storage_of, last):
    """`breaker.state.call(f)` from outside is a call, too, also after the circuit has moved since the thread's last."""
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


def test_child_of_a_fork_does_not_wait_for_a_lock_that_a_thread_of_its_parent_holds() -> None:
    """There nobody would ever let go of it."""
    engine = MemoryEngine(Circuit())
    engine._lock.acquire()
    reset_in_child(engine)
    assert engine.execute(Load()).circuit.state == CLOSED


@pytest.mark.parametrize("given", [-1, 0.001, 61, float("nan"), float("inf")])
def test_staleness_out_of_range_is_refused_at_once(given: float) -> None:
    """Naming the argument, what was given and what is accepted."""
    with pytest.raises(ValueError, match=r"max_staleness must be 0 or lie between 0\.01 and 60 seconds, not"):
        CircuitRedisStorage("closed", fakeredis.FakeStrictRedis(), max_staleness=given)


@pytest.mark.parametrize("given", ["1", None, True])
def test_staleness_that_is_no_number_is_refused_at_once(given: object) -> None:
    """Naming the argument and what was given."""
    with pytest.raises(TypeError, match="max_staleness must be a number of seconds, not"):
        CircuitRedisStorage("closed", fakeredis.FakeStrictRedis(), max_staleness=given)  # type: ignore[arg-type]


def test_living_objects_are_renewed_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry of these objects keeps none of them alive."""
    monkeypatch.setattr(fork, "_instances", weakref.WeakValueDictionary())
    monkeypatch.setattr(fork, "process_id", -1)
    renewed: list[str] = []

    class Inherited(fork.ForkSafe):
        def __init__(self, name: str) -> None:
            self.name = name
            super().__init__()

        def _reset_in_child(self) -> None:
            renewed.append(self.name)

    living, collected = Inherited("living"), Inherited("collected")
    lock = living._lock
    del collected
    fork.renew()
    fork.renew()
    assert renewed == ["living"], "once in each process"
    assert living._lock is not lock
