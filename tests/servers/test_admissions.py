"""The outcome of a call settles what that call was admitted for, wherever it ends and however it is reported."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from tests.support import inspect

pytestmark = pytest.mark.usefixtures("patient")


class Down(Exception):
    """The dependency is down."""


def up() -> str:
    """A call to the healthy dependency."""
    return "answer"


def down() -> None:
    """A call to the dead dependency."""
    raise Down


class Changes(CircuitBreakerListener):
    """The states that listeners are notified of, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Note the new state."""
        self.seen.append(new_state.name)


@pytest.fixture(params=["memory", "redis", "pushed"])
def storage_of(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., Any]:
    """Make a storage: in memory, with a round trip for each look, and with a listener."""
    if request.param == "memory":
        return lambda state="closed", **words: CircuitMemoryStorage(state, **words)
    staleness = {} if request.param == "pushed" else {"max_staleness": 0}
    return lambda state="closed", **words: CircuitRedisStorage(
        state, client, namespace="admissions", **staleness, **words
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads of which each may run any step."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


def elsewhere(action: Callable[[], Any]) -> Any:
    """The answer of something done on a new thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(action).result(30)


# -- calls that end on another thread or in another context --------------------------------------------------------


def test_probing_generator_that_ends_on_another_thread_closes_the_circuit(storage_of):
    """A stream whose every step runs on some thread of a pool, in a copied context, is one call."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)

    def stream() -> Iterator[int]:
        yield 1

    def step(action: Callable[[], Any]) -> Any:
        return elsewhere(lambda: contextvars.copy_context().run(action))

    tokens = step(lambda: breaker.call(stream))
    assert step(lambda: next(tokens)) == 1
    assert step(lambda: next(tokens, None)) is None
    assert storage.state == "closed"


def test_probing_generator_that_fails_on_another_thread_opens_the_circuit(storage_of):
    """The failure of a probe trips, whichever thread ran into it."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)

    def stream() -> Iterator[int]:
        yield 1
        raise Down

    tokens = elsewhere(lambda: breaker.call(stream))
    assert elsewhere(lambda: next(tokens)) == 1
    with pytest.raises((Down, CircuitBreakerError)):
        elsewhere(lambda: next(tokens))
    assert (storage.state, storage.counter) == ("open", 1)


def test_block_that_is_left_on_another_thread_reports_its_probe(storage_of):
    """As a dependency that yields within ``with breaker.calling()``, which web frameworks finish on any thread."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    for expected in ("half-open", "closed"):
        block = breaker.calling()
        elsewhere(block.__enter__)
        elsewhere(lambda block=block: block.__exit__(None, None, None))
        assert elsewhere(lambda: breaker.state.name) == expected


def test_generator_that_ends_in_a_later_generation_changes_nothing(storage_of):
    """On a thread that never called: the generator has its admission with it, and that is out of date."""
    storage = storage_of()
    listener = Changes()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage, listeners=[listener])

    def stream() -> Iterator[int]:
        yield 1
        raise Down

    tokens = breaker.call(stream)
    assert next(tokens) == 1
    breaker.open()
    breaker.close()
    with pytest.raises(Down):
        elsewhere(lambda: next(tokens))
    assert (storage.state, storage.counter) == ("closed", 0)
    assert listener.seen == ["open", "closed"]


def test_interleaved_generators_notify_no_listener(storage_of):
    """Three streams at once, of a closed circuit that others open and close: each reports for its own generation."""
    storage = storage_of()
    listener = Changes()
    breaker = CircuitBreaker(fail_max=3, state_storage=storage, listeners=[listener])
    other = CircuitBreaker(state_storage=storage)

    def stream(fails: bool) -> Iterator[int]:
        yield 1
        yield 2
        if fails:
            raise Down

    early = [breaker.call(stream, True) for _ in range(3)]
    assert [next(tokens) for tokens in early] == [1, 1, 1]
    other.open()
    other.close()
    late = [breaker.call(stream, fails) for fails in (False, True, True)]
    assert [next(tokens) for tokens in [*late, *early]] == [1, 1, 1, 2, 2, 2]
    for tokens in early:
        with pytest.raises(Down):
            next(tokens)
    assert storage.counter == 0
    assert [next(tokens) for tokens in late] == [2, 2, 2]
    for tokens in late:
        with suppress(Down):
            assert next(tokens, None) is None
    assert (storage.state, storage.counter) == ("closed", 2)
    assert listener.seen == []


def test_tasks_of_one_thread_probe_one_at_a_time(storage_of):
    """Asyncio's tasks share a thread, and each is a call of its own."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
    inside, most, rejected = [0], [0], [0]

    async def task() -> None:
        try:
            with breaker.calling():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                await asyncio.sleep(0.01)
                inside[0] -= 1
        except CircuitBreakerError:
            rejected[0] += 1

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(5)))

    asyncio.run(tasks())
    assert (most, rejected) == ([1], [4])
    assert storage.state == "closed"


def test_call_within_a_probe_is_part_of_it(storage_of):
    """A guarded function, or block, that calls through the same circuit is not rejected by its own probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    other = CircuitBreaker(reset_timeout=0, state_storage=storage, success_threshold=3)
    with breaker.calling():
        assert breaker.call(up) == "answer"
    assert breaker.call(lambda: other.call(up)) == "answer"
    assert storage.state == "closed"


def test_dropped_storages_leave_no_context_variables_behind():
    """A storage, its breaker and what they remember are freed, however many are made."""
    kept = []
    before = len(contextvars.copy_context())
    for _ in range(3):
        breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitMemoryStorage("open"))
        breaker.call(up)
        kept.append(weakref.ref(inspect.storage_of(breaker)))
    del breaker
    gc.collect()
    assert [storage() for storage in kept] == [None] * 3
    assert len(contextvars.copy_context()) <= before + 1


# -- pybreaker's methods driven by hand ------------------------------------------------------------------------------


def handle(breaker: CircuitBreaker, is_up: bool) -> None:
    """As wrappers for coroutines spell it today."""
    if is_up:
        breaker.state._handle_success()
        return
    try:
        raise Down
    except Down as error:
        breaker.state._handle_error(error, reraise=False)


def handle_and_raise(breaker: CircuitBreaker, is_up: bool) -> None:
    """The same, and the error goes on."""
    if is_up:
        breaker.state._handle_success()
        return
    with suppress(Down):
        breaker.state._handle_error(Down())


def count(breaker: CircuitBreaker, is_up: bool) -> None:
    """As it was spelled before there was `_handle_error`."""
    if is_up:
        inspect.storage_of(breaker).reset_counter()
        breaker.state.on_success()
        return
    breaker._inc_counter()
    with suppress(Down):
        breaker.state.on_failure(Down())


def handle_what_was_kept(breaker: CircuitBreaker, is_up: bool) -> None:
    """On the state object, not on the property that finds out what is true."""
    state = inspect.state_object_of(breaker)
    if is_up:
        state._handle_success()
        return
    with suppress(Down):
        state._handle_error(Down())


def through_outages(breaker: CircuitBreaker, report: Callable[[CircuitBreaker, bool], None]) -> Iterator[None]:
    """Three outages and recoveries, step by step; each lets `fail_max` calls through."""
    for outage in range(3):
        reached = 0
        for _ in range(10):
            with suppress(CircuitBreakerError):
                breaker.state.before_call(up)
                reached += 1
                report(breaker, False)
            yield
        assert (outage, reached, breaker.current_state) == (outage, breaker.fail_max, "open")
        breaker.reset_timeout = 0
        for _ in range(breaker.success_threshold):
            breaker.state.before_call(up)
            report(breaker, True)
            yield
        assert (outage, breaker.current_state, breaker.fail_counter) == (outage, "closed", 0)
        breaker.reset_timeout = 60


SPELLINGS = [handle, handle_and_raise, count, handle_what_was_kept]


@pytest.mark.parametrize("threshold", [1, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_circuit_driven_by_hand_trips_and_recovers_in_each_outage(storage_of, spelling, threshold):
    """A report without a call speaks for now, also after recoveries."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, success_threshold=threshold, state_storage=storage)
    for _ in through_outages(breaker, spelling):
        pass


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_circuit_driven_by_hand_in_a_pool_trips_and_recovers_in_each_outage(storage_of, pool, spelling):
    """Each step on another thread, with what that thread did before."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, state_storage=storage_of())
    steps = through_outages(breaker, spelling)
    while pool.submit(next, steps, "end").result(30) != "end":
        pass


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_circuit_driven_by_hand_in_one_coroutine_trips_and_recovers_in_each_outage(storage_of, spelling):
    """A coroutine that runs for long has one context for all of it, in which other tasks call, too."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, state_storage=storage_of())

    async def lifetime() -> None:
        for _ in through_outages(breaker, spelling):
            await asyncio.sleep(0)
            assert breaker.current_state in ("closed", "open")

    asyncio.run(lifetime())


def test_claim_by_hand_that_another_thread_uses_admits_one_call(storage_of):
    """Between a claim by hand and its call the breaker's lock is free: the call of another thread is the probe then."""
    storage = storage_of("open")

    class Overtaken(CircuitBreaker):
        def half_open(self) -> None:
            super().half_open()
            block.append(self.calling())
            thread.submit(block[0].__enter__).result(30)

    block: list[Any] = []
    reached: list[str] = []
    breaker = Overtaken(reset_timeout=0, success_threshold=3, state_storage=storage)
    with ThreadPoolExecutor(1) as thread:
        for call in (breaker.state.before_call, breaker.call):
            with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
                call(lambda: reached.append("within the probe of the other thread"))
        assert not reached
        assert thread.submit(breaker.call, up).result(30) == "answer", "which is part of the probe of that thread"
        thread.submit(block[0].__exit__, None, None, None).result(30)
    assert breaker.call(up) == "answer"
    assert storage.state == "closed"


def test_late_failure_by_hand_surfaces_and_trips_nothing(storage_of):
    """On a half-open state that is not the circuit's any more; pybreaker is kept from announcing a trip."""
    storage = storage_of("open")
    listener = Changes()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage, listeners=[listener])
    breaker.call(up)
    state = inspect.state_object_of(breaker)
    with CircuitBreaker(reset_timeout=0, state_storage=storage).calling(), pytest.raises(Down):
        elsewhere(lambda: state._handle_error(Down()))
    assert storage.state == "closed"
    assert "open" not in listener.seen


def test_failure_by_hand_after_a_late_one_trips(storage_of):
    """What was refused once is no reason to refuse what comes after it on the same thread."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)

    def overtaken() -> None:
        breaker.open()
        breaker.close()
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    breaker._inc_counter()
    with pytest.raises(CircuitBreakerError):
        breaker.state.on_failure(Down())
    assert storage.state == "open"


def test_failure_of_a_call_is_its_own_although_a_listener_reports_by_hand(storage_of):
    """Between a failure and the trip that follows from it, a listener may make any other call."""
    storage = storage_of()

    class Meddles(CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            cb.remove_listener(self)
            with suppress(Down):
                cb.call(down)

    breaker = CircuitBreaker(fail_max=2, state_storage=storage, listeners=[Meddles()])
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert (storage.state, storage.counter) == ("open", 2)


def test_calls_past_the_breaker_recover_with_a_threshold(storage_of):
    """`breaker.state.call(f)` between two probes has no claim of its own, and counts while no other call has one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    for _ in range(3):
        assert breaker.state.call(up) == "answer"
    assert storage.state == "closed"


# -- a look is not a call --------------------------------------------------------------------------------------------


class Monitored(CircuitBreaker):
    """Has methods of its own that look."""

    def metrics(self) -> str:
        """For a page."""
        return self.state.name

    @property
    def is_open(self) -> bool:
        """For a health check."""
        return self.state.name == "open"


@contextmanager
def probing(breaker: CircuitBreaker) -> Iterator[None]:
    """Another thread probes meanwhile, for as long as the block runs."""
    reached, leave = threading.Event(), threading.Event()

    def probe() -> None:
        reached.set()
        assert leave.wait(30)

    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(breaker.call, probe)
        assert reached.wait(30)
        try:
            yield
        finally:
            leave.set()
            call.result(30)


def test_look_during_a_probe_raises_nothing(storage_of):
    """Methods of a subclass that read `state` are observers, on any thread."""
    storage = storage_of("open")
    breaker = Monitored(reset_timeout=0, state_storage=storage)
    other = Monitored(reset_timeout=0, state_storage=storage)
    with probing(breaker):
        assert breaker.metrics() == "half-open"
        assert not breaker.is_open
        assert other.metrics() == "open"
    assert breaker.metrics() == "closed"


def test_look_between_two_probes_claims_nothing(storage_of):
    """However often a page looks, the next call gets the next probe."""
    storage = storage_of("open")
    breaker = Monitored(reset_timeout=0, success_threshold=3, state_storage=storage)
    for _ in range(3):
        assert elsewhere(lambda: breaker.call(up)) == "answer"
        breaker.metrics()
        elsewhere(breaker.metrics)
    assert storage.state == "closed"


def test_look_leaves_the_admission_of_a_call_under_way(storage_of):
    """A guarded function may look at its breaker, after others have moved the circuit, and is fenced off as before."""
    storage = storage_of()
    breaker = Monitored(fail_max=1, state_storage=storage)
    other = CircuitBreaker(state_storage=storage)

    def overtaken() -> None:
        other.open()
        assert breaker.metrics() == "open"
        other.close()
        assert breaker.metrics() == "closed"
        assert elsewhere(breaker.metrics) == "closed"
        raise Down

    with pytest.raises(Down):
        breaker.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)


def test_override_of_call_may_look_before_and_after_it(storage_of):
    """As logs do: the probe is claimed by the call itself, and by nothing before or after it."""

    class Logs(CircuitBreaker):
        def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.state.name
            answer = super().call(func, *args, **kwargs)
            return before, answer, self.state.name

    storage = storage_of("open")
    breaker = Logs(reset_timeout=0, success_threshold=3, state_storage=storage)
    breaker.half_open()
    for after in ("half-open", "half-open", "closed"):
        assert elsewhere(lambda: breaker.call(up)) == ("half-open", "answer", after)


# -- breakers on one storage, and storages of one breaker ------------------------------------------------------------


def test_breaker_that_joins_a_busy_storage_is_fenced_like_the_first(storage_of):
    """Its calls carry admissions from the first one on, though the storage admits the other breaker's from memory."""
    storage = storage_of()
    first = CircuitBreaker(state_storage=storage)
    for _ in range(3):
        first.call(up)
    second = CircuitBreaker(fail_max=1, state_storage=storage)

    def overtaken() -> None:
        first.open()
        first.close()
        raise Down

    with pytest.raises(Down):
        second.call(overtaken)
    assert storage.counter == 0
    with pytest.raises(CircuitBreakerError):
        second.call(down)
    assert storage.state == "open"


def test_breaker_that_is_given_another_storage_counts_there(storage_of):
    """What its state carries from the first storage means nothing to the second."""
    breaker = CircuitBreaker(fail_max=2, state_storage=CircuitMemoryStorage("closed"))
    for _ in range(2):
        breaker.call(up)
        breaker.open()
        breaker.close()
    storage = storage_of()
    inspect.set_storage(breaker, storage)
    for _ in range(2):
        with pytest.raises((Down, CircuitBreakerError)):
            breaker.call(down)
    assert storage.state == "open"


@pytest.mark.parametrize("move", ["close", "assign"])
def test_breaker_that_was_closed_by_hand_while_closed_goes_on_counting(storage_of, move):
    """The state object is a new one, and the circuit is not."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=3, state_storage=storage)
    breaker.call(up)
    breaker.call(up)
    if move == "close":
        breaker.close()
    else:
        breaker.state = "closed"
    for expected in (1, 2):
        with pytest.raises(Down):
            breaker.call(down)
        assert storage.counter == expected


def test_breaker_that_moves_while_its_state_is_renewed_keeps_the_move(storage_of):
    """Another thread may bring the breaker into another state at any moment: that state is not overwritten."""

    class Moves(CircuitBreaker):
        moves = False

        def _create_new_state(self, *args: Any, **words: Any) -> Any:
            created = super()._create_new_state(*args, **words)
            if self.moves:
                self.moves = False
                self.state = "open"
            return created

    storage = storage_of()
    listener = Changes()
    breaker = Moves(state_storage=storage, listeners=[listener])
    breaker.call(up)
    other = CircuitBreaker(state_storage=storage)
    other.open()
    other.close()
    breaker.moves = True
    assert breaker.state.name == "closed"
    assert listener.seen == ["open", "closed"]


def test_breaker_that_notices_late_costs_no_count(storage_of):
    """A thread that stood still between its look and what follows brings an old state; it is renewed before a call."""

    class Late(CircuitBreaker):
        reads = 0

        @property
        def current_state(self) -> str:
            state = super().current_state
            if threading.current_thread() is late:
                self.reads += 1
            # The second look of a thread that notices is the one that it follows.
            if threading.current_thread() is late and self.reads == 2:
                looked.set()
                assert go_on.wait(30)
            return state

    class Tells(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            if threading.current_thread() is late:
                told.set()
                assert end.wait(30)

    storage = storage_of()
    looked, go_on, told, end = (threading.Event() for _ in range(4))
    late = threading.Thread(target=lambda: breaker.state)
    breaker = Late(fail_max=9, state_storage=storage, listeners=[Tells()])
    breaker.open()
    elsewhere(CircuitBreaker(state_storage=storage).close)
    # A storage with one breaker has a shortcut.
    gc.collect()
    late.start()
    assert looked.wait(30)
    assert breaker.call(up) == "answer"
    elsewhere(breaker.open)
    elsewhere(breaker.close)
    assert breaker.call(up) == "answer"
    go_on.set()
    assert told.wait(30)
    for _ in range(3):
        assert breaker.state.name == "closed"
    end.set()
    late.join(30)
    for expected in (1, 2):
        with pytest.raises(Down):
            breaker.call(down)
        assert storage.counter == expected


def test_breaker_whose_lock_was_taken_out_is_fenced(storage_of):
    """As users do who want calls to run in parallel."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    inspect.set_lock(breaker, nullcontext())

    def overtaken() -> None:
        elsewhere(breaker.open)
        elsewhere(breaker.close)
        raise Down

    for _ in range(3):
        breaker.call(up)
    with pytest.raises(Down):
        breaker.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)


def test_child_of_a_fork_cannot_use_a_claim_of_its_parent():
    """A claim that has not admitted its call when the process forks admits that call in the parent alone."""
    storage = CircuitMemoryStorage("open")
    rejected: list[int] = []

    class Forks(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            if new_state.name == "half-open":
                rejected.append(os.fork())

    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, listeners=[Forks()])
    try:
        breaker.call(up)
    except CircuitBreakerError:
        os._exit(0)
    if not rejected[0]:
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(rejected[0], 0)[1]) == 0
    assert storage.state == "closed"


def test_call_after_a_close_by_hand_while_closed_is_fenced(storage_of):
    """Its state object carries an admission like any other."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    breaker.call(up)
    breaker.call(up)
    breaker.close()

    def overtaken() -> None:
        elsewhere(breaker.open)
        elsewhere(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.state.call(overtaken)
    assert (storage.state, storage.counter) == ("closed", 0)


@pytest.mark.parametrize("threshold", [float("inf"), 1e30, 0, 2.5])
def test_any_number_may_be_a_success_threshold(storage_of, threshold):
    """Pybreaker compares with it; what can never be reached keeps the circuit half-open, one probe after the other."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=threshold, state_storage=storage)
    for _ in range(3):
        assert elsewhere(lambda: breaker.call(up)) == "answer"
    assert storage.state == ("open" if threshold > 3 else "closed") or breaker.state.name == "half-open"
