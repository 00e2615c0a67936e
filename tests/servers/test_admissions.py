"""Admissions: the outcome of a call settles the admission of that call, wherever and however the call ends."""

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
from tests.support.breakers import Down, down, up

pytestmark = [pytest.mark.unmodified, pytest.mark.usefixtures("patient")]

#: Seconds for which a thread waits in vain for another one, if the two take turns.
TURN_S = 0.5


class StateRecorder(CircuitBreakerListener):
    """Listener that records the new state of each transition."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record the new state."""
        self.seen.append(new_state.name)


@pytest.fixture(params=["memory", "redis", "pushed"])
def storage_of(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., Any]:
    """Return a factory of storages: in memory, with a round trip for each read, and with a listener."""
    if request.param == "memory":
        return lambda state="closed", **words: CircuitMemoryStorage(state, **words)
    staleness = {} if request.param == "pushed" else {"max_staleness": 0}
    return lambda state="closed", **words: CircuitRedisStorage(
        state, client, namespace="admissions", **staleness, **words
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads, each of which may run any step."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


def elsewhere(action: Callable[[], Any]) -> Any:
    """Return the result of an action on a new thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(action).result(30)


def test_probing_generator_that_ends_on_another_thread_closes_the_circuit(storage_of):
    """A stream is one call, even if each step runs on another thread of a pool, in a copied context."""
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
    """The failure of a probe trips on any thread."""
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
    """Web frameworks may finish a dependency that yields within ``with breaker.calling()`` on any thread."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage)
    for expected in ("half-open", "closed"):
        block = breaker.calling()
        elsewhere(block.__enter__)
        elsewhere(lambda block=block: block.__exit__(None, None, None))
        assert elsewhere(lambda: breaker.state.name) == expected


def test_generator_that_ends_in_a_later_generation_changes_nothing(storage_of):
    """The generator carries its admission to a thread without calls, and the admission is outdated."""
    storage = storage_of()
    listener = StateRecorder()
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
    """Each of several streams reports for the generation of its admission, although the circuit opens and closes."""
    storage = storage_of()
    listener = StateRecorder()
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
    """Tasks of asyncio share a thread, and each task is a call."""
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
    """A call through the same circuit, within a guarded function or block, is not rejected by its own probe."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    other = CircuitBreaker(reset_timeout=0, state_storage=storage, success_threshold=3)
    with breaker.calling():
        assert breaker.call(up) == "answer"
    assert breaker.call(lambda: other.call(up)) == "answer"
    assert storage.state == "closed"


def test_dropped_storages_leave_no_context_variables_behind():
    """A dropped storage, its breaker and their admissions are freed, for any number of storages."""
    references = []
    before = len(contextvars.copy_context())
    for _ in range(3):
        breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitMemoryStorage("open"))
        breaker.call(up)
        references.append(weakref.ref(inspect.storage_of(breaker)))
    del breaker
    gc.collect()
    assert [storage() for storage in references] == [None] * 3
    assert len(contextvars.copy_context()) <= before + 1


def handle(breaker: CircuitBreaker, is_up: bool) -> None:
    """Report as wrappers for coroutines do today."""
    if is_up:
        breaker.state._handle_success()
        return
    try:
        raise Down
    except Down as error:
        breaker.state._handle_error(error, reraise=False)


def handle_and_raise(breaker: CircuitBreaker, is_up: bool) -> None:
    """Report as wrappers for coroutines do, and raise the error again."""
    if is_up:
        breaker.state._handle_success()
        return
    with suppress(Down):
        breaker.state._handle_error(Down())


def count(breaker: CircuitBreaker, is_up: bool) -> None:
    """Report as wrappers did before pybreaker had `_handle_error`."""
    if is_up:
        inspect.storage_of(breaker).reset_counter()
        breaker.state.on_success()
        return
    breaker._inc_counter()
    with suppress(Down):
        breaker.state.on_failure(Down())


def handle_on_state_object(breaker: CircuitBreaker, is_up: bool) -> None:
    """Report to the stored state object, not to the property that reads the storage."""
    state = inspect.state_object_of(breaker)
    if is_up:
        state._handle_success()
        return
    with suppress(Down):
        state._handle_error(Down())


def through_outages(breaker: CircuitBreaker, report: Callable[[CircuitBreaker, bool], None]) -> Iterator[None]:
    """Run three outages and recoveries step by step. Each outage admits `fail_max` calls."""
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


REPORTS = [handle, handle_and_raise, count, handle_on_state_object]


@pytest.mark.parametrize("threshold", [1, 2])
@pytest.mark.parametrize("report", REPORTS)
def test_circuit_with_direct_reports_trips_and_recovers_in_each_outage(storage_of, report, threshold):
    """A report without a call counts for the current generation, also after recoveries."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, success_threshold=threshold, state_storage=storage)
    for _ in through_outages(breaker, report):
        pass


@pytest.mark.parametrize("report", REPORTS)
def test_circuit_with_direct_reports_in_a_pool_trips_and_recovers_in_each_outage(storage_of, pool, report):
    """Each step runs on another thread, which may have made other steps before."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, state_storage=storage_of())
    steps = through_outages(breaker, report)
    while pool.submit(next, steps, "end").result(30) != "end":
        pass


@pytest.mark.parametrize("report", REPORTS)
def test_circuit_with_direct_reports_in_a_coroutine_trips_and_recovers_in_each_outage(storage_of, report):
    """A long-running coroutine has one context, in which other tasks make calls, too."""
    breaker = CircuitBreaker(fail_max=3, reset_timeout=60, state_storage=storage_of())

    async def lifetime() -> None:
        for _ in through_outages(breaker, report):
            await asyncio.sleep(0)
            assert breaker.current_state in ("closed", "open")

    asyncio.run(lifetime())


def test_direct_claim_used_by_another_thread_admits_one_call(storage_of):
    """Between a direct claim and its call, the breaker's lock is free, so a call of another thread may be the probe."""
    storage = storage_of("open")

    class ClaimedByAnother(CircuitBreaker):
        def half_open(self) -> None:
            super().half_open()
            block.append(self.calling())
            thread.submit(block[0].__enter__).result(30)

    block: list[Any] = []
    reached: list[str] = []
    breaker = ClaimedByAnother(reset_timeout=0, success_threshold=3, state_storage=storage)
    with ThreadPoolExecutor(1) as thread:
        for call in (breaker.state.before_call, breaker.call):
            with pytest.raises(CircuitBreakerError, match="Another caller is testing the dependency"):
                call(lambda: reached.append("within the probe of the other thread"))
        assert not reached
        assert thread.submit(breaker.call, up).result(30) == "answer", "the call is part of the probe of that thread"
        thread.submit(block[0].__exit__, None, None, None).result(30)
    assert breaker.call(up) == "answer"
    assert storage.state == "closed"


def test_late_direct_failure_is_raised_and_trips_nothing(storage_of):
    """The report comes on an outdated half-open state object. pybreaker does not announce a trip."""
    storage = storage_of("open")
    listener = StateRecorder()
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=2, state_storage=storage, listeners=[listener])
    breaker.call(up)
    state = inspect.state_object_of(breaker)
    with CircuitBreaker(reset_timeout=0, state_storage=storage).calling(), pytest.raises(Down):
        elsewhere(lambda: state._handle_error(Down()))
    assert storage.state == "closed"
    assert "open" not in listener.seen


def test_direct_failure_after_a_late_one_trips(storage_of):
    """A refused report does not affect the next report on the same thread."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)

    def fail_late() -> None:
        breaker.open()
        breaker.close()
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    breaker._inc_counter()
    with pytest.raises(CircuitBreakerError):
        breaker.state.on_failure(Down())
    assert storage.state == "open"


def test_failure_of_a_call_trips_although_a_listener_makes_a_call(storage_of):
    """Between a failure and its trip, a listener may make another call."""
    storage = storage_of()

    class CallsInListener(CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            cb.remove_listener(self)
            with suppress(Down):
                cb.call(down)

    breaker = CircuitBreaker(fail_max=2, state_storage=storage, listeners=[CallsInListener()])
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert (storage.state, storage.counter) == ("open", 2)


def test_calls_past_the_breaker_recover_with_a_threshold(storage_of):
    """A call by `breaker.state.call(f)` between two probes has no claim, and counts while no other call has one."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    for _ in range(3):
        assert breaker.state.call(up) == "answer"
    assert storage.state == "closed"


class Monitored(CircuitBreaker):
    """Breaker with methods that read its state."""

    def metrics(self) -> str:
        """Return the state for a page."""
        return self.state.name

    @property
    def is_open(self) -> bool:
        """Return whether the circuit is open, for a health check."""
        return self.state.name == "open"


@contextmanager
def probing(breaker: CircuitBreaker) -> Iterator[None]:
    """Probe on another thread while the block runs."""
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


def test_read_during_a_probe_raises_nothing(storage_of):
    """Methods of a subclass that read `state` only observe, on any thread."""
    storage = storage_of("open")
    breaker = Monitored(reset_timeout=0, state_storage=storage)
    other = Monitored(reset_timeout=0, state_storage=storage)
    with probing(breaker):
        assert breaker.metrics() == "half-open"
        assert not breaker.is_open
        assert other.metrics() == "open"
    assert breaker.metrics() == "closed"


def test_read_between_two_probes_claims_nothing(storage_of):
    """However often a page reads the state, the next call gets the next probe."""
    storage = storage_of("open")
    breaker = Monitored(reset_timeout=0, success_threshold=3, state_storage=storage)
    for _ in range(3):
        assert elsewhere(lambda: breaker.call(up)) == "answer"
        breaker.metrics()
        elsewhere(breaker.metrics)
    assert storage.state == "closed"


def test_read_does_not_change_the_admission_of_a_running_call(storage_of):
    """A guarded function may read its breaker after transitions by other breakers, and is still fenced."""
    storage = storage_of()
    breaker = Monitored(fail_max=1, state_storage=storage)
    other = CircuitBreaker(state_storage=storage)

    def fail_late() -> None:
        other.open()
        assert breaker.metrics() == "open"
        other.close()
        assert breaker.metrics() == "closed"
        assert elsewhere(breaker.metrics) == "closed"
        raise Down

    with pytest.raises(Down):
        breaker.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)


def test_override_of_call_may_read_before_and_after_it(storage_of):
    """Logging may read the state before and after a call. Only the call itself claims the probe."""

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


def test_breaker_that_joins_a_busy_storage_is_fenced_like_the_first(storage_of):
    """Calls of the second breaker carry admissions from the first call on, though the storage caches admissions."""
    storage = storage_of()
    first = CircuitBreaker(state_storage=storage)
    for _ in range(3):
        first.call(up)
    second = CircuitBreaker(fail_max=1, state_storage=storage)

    def fail_late() -> None:
        first.open()
        first.close()
        raise Down

    with pytest.raises(Down):
        second.call(fail_late)
    assert storage.counter == 0
    with pytest.raises(CircuitBreakerError):
        second.call(down)
    assert storage.state == "open"


def test_breaker_with_a_replaced_storage_counts_there(storage_of):
    """Admissions of the first storage mean nothing to the second."""
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
def test_breaker_closed_while_closed_continues_to_count(storage_of, move):
    """The state object is new, and the circuit is not."""
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


def test_transition_while_the_state_is_renewed_is_kept(storage_of):
    """Another thread may change the breaker's state at any time. That state is not overwritten."""

    class Moves(CircuitBreaker):
        moves = False

        def _create_new_state(self, *args: Any, **words: Any) -> Any:
            created = super()._create_new_state(*args, **words)
            if self.moves:
                self.moves = False
                self.state = "open"
            return created

    storage = storage_of()
    listener = StateRecorder()
    breaker = Moves(state_storage=storage, listeners=[listener])
    breaker.call(up)
    other = CircuitBreaker(state_storage=storage)
    other.open()
    other.close()
    breaker.moves = True
    assert breaker.state.name == "closed"
    assert listener.seen == ["open", "closed"]


def test_breaker_that_notices_late_costs_no_count(storage_of):
    """A thread that waited after its read sets an old state, which is renewed before a call."""

    class LateBreaker(CircuitBreaker):
        reads = 0

        @property
        def current_state(self) -> str:
            state = super().current_state
            if threading.current_thread() is late:
                self.reads += 1
            # A thread that notices a transition acts on its second read.
            if threading.current_thread() is late and self.reads == 2:
                has_read.set()
                assert may_continue.wait(30)
            return state

    class WaitingListener(CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            if threading.current_thread() is late:
                notified.set()
                assert end.wait(30)

    storage = storage_of()
    has_read, may_continue, notified, end = (threading.Event() for _ in range(4))
    late = threading.Thread(target=lambda: breaker.state)
    breaker = LateBreaker(fail_max=9, state_storage=storage, listeners=[WaitingListener()])
    breaker.open()
    elsewhere(CircuitBreaker(state_storage=storage).close)
    # A storage with one breaker has a fast path.
    gc.collect()
    late.start()
    assert has_read.wait(30)
    assert breaker.call(up) == "answer"
    elsewhere(breaker.open)
    elsewhere(breaker.close)
    assert breaker.call(up) == "answer"
    may_continue.set()
    assert notified.wait(30)
    for _ in range(3):
        assert breaker.state.name == "closed"
    end.set()
    late.join(30)
    for expected in (1, 2):
        with pytest.raises(Down):
            breaker.call(down)
        assert storage.counter == expected


def test_breaker_without_a_lock_is_fenced(storage_of):
    """Applications may replace the lock, so that calls run in parallel."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    inspect.set_lock(breaker, nullcontext())

    def fail_late() -> None:
        elsewhere(breaker.open)
        elsewhere(breaker.close)
        raise Down

    for _ in range(3):
        breaker.call(up)
    with pytest.raises(Down):
        breaker.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)


def runs_in_parallel(
    pool: ThreadPoolExecutor, *guarded: Callable[[Callable[[], Any]], Any], patience_s: float = 20
) -> bool:
    """Return whether guarded actions on two threads run at the same time."""
    both_are_inside = threading.Barrier(2)

    def meet() -> None:
        with suppress(threading.BrokenBarrierError):
            both_are_inside.wait(patience_s)

    for future in [pool.submit(guard, meet) for guard in guarded]:
        future.result(30)
    return not both_are_inside.broken


def call_inside(breaker: CircuitBreaker) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that runs an action within ``with breaker.calling():``."""

    def run(action: Callable[[], Any]) -> None:
        with breaker.calling():
            action()

    return run


def test_threads_that_call_one_breaker_take_turns(storage_of, pool):
    """The breaker holds its lock while `call` runs the function, whatever the storage is."""
    breaker = CircuitBreaker(state_storage=storage_of())
    assert not runs_in_parallel(pool, breaker.call, breaker.call, patience_s=TURN_S)
    decorated = breaker(lambda action: action())
    assert not runs_in_parallel(pool, decorated, decorated, patience_s=TURN_S)


def test_blocks_of_calling_run_in_parallel(storage_of, pool):
    """The breaker holds its lock at the begin of a ``calling()`` block, and not within."""
    breaker = CircuitBreaker(fail_max=2, state_storage=storage_of())
    guard = call_inside(breaker)
    assert runs_in_parallel(pool, guard, guard)
    for _ in range(2):
        with suppress(Down, CircuitBreakerError):
            guard(down)
    with pytest.raises(CircuitBreakerError):
        guard(up)


def test_breakers_of_one_namespace_run_in_parallel(client: redis.Redis, pool):
    """One breaker for each thread is one circuit, because the namespace is the same."""
    first, second = (
        CircuitBreaker(fail_max=2, state_storage=CircuitRedisStorage("closed", client, namespace="admissions"))
        for _ in range(2)
    )
    assert runs_in_parallel(pool, first.call, second.call)
    for breaker in (first, second):
        with suppress(Down, CircuitBreakerError):
            breaker.call(down)
    for breaker in (first, second):
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)


def test_child_of_a_fork_cannot_use_a_claim_of_its_parent():
    """A claim that has not admitted its call at the fork admits the call in the parent only."""
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
    """The new state object carries an admission like any other."""
    storage = storage_of()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    breaker.call(up)
    breaker.call(up)
    breaker.close()

    def fail_late() -> None:
        elsewhere(breaker.open)
        elsewhere(breaker.close)
        raise Down

    with pytest.raises(Down):
        breaker.state.call(fail_late)
    assert (storage.state, storage.counter) == ("closed", 0)


@pytest.mark.parametrize("threshold", [float("inf"), 1e30, 0, 2.5])
def test_any_number_may_be_a_success_threshold(storage_of, threshold):
    """A threshold that is never reached keeps the circuit half-open, one probe after the other."""
    storage = storage_of("open")
    breaker = CircuitBreaker(reset_timeout=0, success_threshold=threshold, state_storage=storage)
    for _ in range(3):
        assert elsewhere(lambda: breaker.call(up)) == "answer"
    assert storage.state == ("open" if threshold > 3 else "closed") or breaker.state.name == "half-open"
