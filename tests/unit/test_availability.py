"""Availability of one server: when a process may retry Redis, under a clock that tests move."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import valkey

from pybreaker_redis._redis.classify import ErrorKind
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis._servers import availability
from pybreaker_redis._servers.availability import (
    ANSWER_WAIT_GROWTH_FACTOR,
    ANSWER_WAIT_MAX_S,
    RETRY_DELAY_MAX_FLOOR_S,
    RETRY_DELAY_MAX_S,
    RETRY_DELAY_MIN_S,
    TURN_DELAY_MAX_S,
    TURN_DELAY_MIN_S,
    Availability,
)
from tests.support.clock import Clock
from tests.support.inspect import condition_of, lock_of, reset_in_child

TIMEOUT = 0.25

UNREACHABLE, READ_ONLY, FORBIDDEN, UNUSABLE = (
    ErrorKind.UNREACHABLE,
    ErrorKind.READ_ONLY,
    ErrorKind.FORBIDDEN,
    ErrorKind.UNUSABLE,
)
MIGRATING, CONTENDED = ErrorKind.MIGRATING, ErrorKind.CONTENDED

KEYS = circuit_keys("guarded", needs_one_slot=True)


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the availability."""
    return Clock()


@pytest.fixture
def threaded(clock: Clock) -> Availability:
    """Return the availability of a server that a retry thread queries."""
    return Availability(TIMEOUT, has_retry_thread=True, clock=clock)


@pytest.fixture
def turns(clock: Clock) -> Availability:
    """Return the availability of a server that callers retry, after a long time without an outage."""
    server = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
    clock.now += 2 * TURN_DELAY_MAX_S
    return server


@pytest.fixture
def fix_random(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[tuple[float, float]]]:
    """Replace random delays by a share of their range. The result collects the ranges that were requested."""

    def load(share: float) -> list[tuple[float, float]]:
        bounds: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            bounds.append((low, high))
            return low + share * (high - low)

        monkeypatch.setattr(availability.random, "uniform", uniform)
        return bounds

    return load


def refused_error() -> redis.ConnectionError:
    """Return the error of a server that is not running."""
    return redis.ConnectionError("Connection refused.")


def timeout_error() -> redis.TimeoutError:
    """Return the error of a server that does not answer."""
    return redis.TimeoutError("Timeout reading from socket")


def next_delay(server: Availability) -> float:
    """Return the seconds until the next attempt is due."""
    assert server.outage is not None
    return server.outage.next_attempt_at - server.clock()


def fail_attempt(server: Availability, clock: Clock, error: Exception | None = None) -> None:
    """Claim the next attempt when it is due, and fail."""
    assert server.outage is not None
    clock.now = max(clock.now, server.outage.next_attempt_at)
    assert server.claim_attempt()
    server.note_failure(error or refused_error())


class TestAvailable:
    """The time before the first failure."""

    @pytest.mark.parametrize("has_thread", [True, False])
    def test_every_caller_may_query_redis(self, has_thread: bool, clock: Clock) -> None:
        """There is no outage, so no attempt is due."""
        server = Availability(TIMEOUT, has_retry_thread=has_thread, clock=clock)
        assert server.claim_turn()
        assert server.claim_turn()
        assert not server.claim_attempt()
        assert server.outage is None
        assert server.last_error == ""
        assert server.since == clock.now
        assert server.set_retry_thread(not has_thread) is None

    def test_answer_without_an_outage_changes_nothing(self, threaded: Availability, clock: Clock) -> None:
        """Without an outage, an answer is not logged."""
        clock.now += 1
        assert threaded.note_answer() is None
        assert threaded.since == 100.0


class TestRetryThread:
    """A server that a retry thread queries."""

    def test_callers_never_retry_however_long_the_outage_lasts(self, threaded: Availability, clock: Clock) -> None:
        """A call that retried Redis would have to wait for the answer."""
        threaded.note_failure(refused_error())
        assert not threaded.claim_turn()
        clock.now += 1e6
        assert not threaded.claim_turn()
        assert threaded.claim_attempt(), "calls have not used up the attempt of the thread"

    def test_only_the_first_failure_starts_an_outage(self, threaded: Availability, clock: Clock) -> None:
        """One outage is logged once, however many calls fail."""
        news = threaded.note_failure(refused_error())
        assert news is not None
        assert (news.since, news.kind, news.attempts, news.answer_wait_s) == (100.0, UNREACHABLE, 0, TIMEOUT)
        assert news.error == "ConnectionError: Connection refused."
        assert threaded.note_failure(refused_error()) is None
        clock.now += 5
        fail_attempt(threaded, clock, redis.exceptions.ReadOnlyError("You can't write against a read only replica."))
        assert threaded.outage is not None
        assert threaded.outage.since == threaded.since == 100.0
        assert threaded.outage.kind is READ_ONLY
        assert (
            threaded.outage.error
            == threaded.last_error
            == "ReadOnlyError: You can't write against a read only replica."
        )

    def test_delays_are_random_and_grow_to_the_maximum(
        self, threaded: Availability, clock: Clock, fix_random: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """A fleet that lost Redis at one time does not return at one time. After recovery, the fleet returns soon."""
        bounds = fix_random(1)
        threaded.note_failure(refused_error())
        for _ in range(40):
            fail_attempt(threaded, clock)
        assert {low for low, _ in bounds} == {0}
        longest = [high for _, high in bounds]
        assert longest[:6] == [RETRY_DELAY_MIN_S * 2**attempt for attempt in range(5)] + [RETRY_DELAY_MAX_S]
        assert set(longest[5:]) == {RETRY_DELAY_MAX_S}
        assert next_delay(threaded) == RETRY_DELAY_MAX_S

    def test_delays_lie_between_zero_and_the_maximum(self, threaded: Availability, clock: Clock) -> None:
        """Each delay is random within its range."""
        threaded.note_failure(refused_error())
        seen = []
        for _ in range(50):
            fail_attempt(threaded, clock)
            seen.append(next_delay(threaded))
        assert 0 <= min(seen) < max(seen) <= RETRY_DELAY_MAX_S
        assert len(set(seen)) > 40

    @pytest.mark.parametrize(
        ("staleness", "longest"),
        [([2.0], RETRY_DELAY_MAX_S), ([0.3, 0.5], 0.3), ([0.01], RETRY_DELAY_MAX_FLOOR_S), ([0], 1)],
    )
    def test_delays_are_limited_by_the_shortest_staleness(
        self,
        threaded: Availability,
        clock: Clock,
        fix_random: Callable[[float], list[tuple[float, float]]],
        staleness: list[float],
        longest: float,
    ) -> None:
        """The most demanding circuit limits the delay, within reason. A circuit without cache sets no limit."""
        fix_random(1)
        for seconds in staleness:
            threaded.limit_retry_delay(seconds)
        threaded.note_failure(refused_error())
        for _ in range(10):
            fail_attempt(threaded, clock)
        assert next_delay(threaded) == pytest.approx(longest)

    def test_second_attempt_waits_for_the_first(self, threaded: Availability, clock: Clock) -> None:
        """A second attempt waits for the end of the first, but not for ever."""
        threaded.note_failure(refused_error())
        clock.now += RETRY_DELAY_MAX_S
        assert threaded.claim_attempt()
        assert not threaded.claim_attempt()
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT - 0.001
        assert not threaded.claim_attempt()
        clock.now += 0.001
        assert threaded.claim_attempt()

    def test_answer_ends_the_outage_and_returns_its_duration(self, threaded: Availability, clock: Clock) -> None:
        """The duration is for the log. The last error stays readable."""
        threaded.note_failure(refused_error())
        clock.now += 7.5
        assert threaded.note_answer() == 7.5
        assert threaded.outage is None
        assert threaded.since == clock.now
        assert threaded.last_error == "ConnectionError: Connection refused."
        assert threaded.claim_turn()
        assert threaded.note_answer() is None

    def test_next_outage_starts_without_attempts(self, threaded: Availability, clock: Clock) -> None:
        """A new outage has its own attempts and its own answer wait."""
        threaded.note_failure(timeout_error())
        for _ in range(5):
            fail_attempt(threaded, clock, timeout_error())
        threaded.note_answer()
        news = threaded.note_failure(timeout_error())
        assert news is not None
        assert (news.since, news.attempts, news.answer_wait_s) == (clock.now, 0, TIMEOUT)
        assert next_delay(threaded) <= RETRY_DELAY_MIN_S

    def test_callers_take_turns_after_the_retry_thread_has_ended(self, threaded: Availability, clock: Clock) -> None:
        """In a process that cannot start threads, callers take turns."""
        threaded.note_failure(refused_error())
        outage = threaded.set_retry_thread(False)
        assert outage is threaded.outage
        assert next_delay(threaded) >= TURN_DELAY_MIN_S
        assert not threaded.claim_turn()
        clock.now += next_delay(threaded)
        assert threaded.claim_turn()
        assert not threaded.claim_turn()

    def test_retry_thread_that_has_started_retries_soon(self, turns: Availability) -> None:
        """Callers no longer take turns."""
        turns.note_failure(refused_error())
        turns.set_retry_thread(True)
        assert next_delay(turns) <= RETRY_DELAY_MIN_S
        assert not turns.claim_turn()


class TestAnswerWait:
    """The time that an attempt waits for its answer."""

    def test_answer_wait_grows_by_half_with_each_timeout(self, threaded: Availability, clock: Clock) -> None:
        """A server that has become slow for every client is reached in the end."""
        threaded.note_failure(timeout_error())
        seen = []
        for _ in range(15):
            assert threaded.outage is not None
            seen.append(threaded.outage.answer_wait_s)
            fail_attempt(threaded, clock, timeout_error())
        assert seen == pytest.approx(
            [min(TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR**n, ANSWER_WAIT_MAX_S) for n in range(15)]
        )
        assert seen[-1] == ANSWER_WAIT_MAX_S == 30.0
        assert ANSWER_WAIT_GROWTH_FACTOR == 1.5

    @pytest.mark.parametrize(
        "error", [refused_error(), redis.ResponseError("BUSY"), OSError(), redis.exceptions.ReadOnlyError()], ids=repr
    )
    def test_answer_wait_does_not_grow_after_an_answer(
        self, threaded: Availability, clock: Clock, error: Exception
    ) -> None:
        """A server that refuses at once gives no reason to wait longer."""
        threaded.note_failure(timeout_error())
        for _ in range(5):
            fail_attempt(threaded, clock, error)
        assert threaded.outage is not None
        assert threaded.outage.answer_wait_s == TIMEOUT

    @pytest.mark.parametrize("error", [timeout_error(), valkey.TimeoutError(), TimeoutError()], ids=repr)
    def test_timeout_of_any_library_lengthens_the_answer_wait(
        self, threaded: Availability, clock: Clock, error: Exception
    ) -> None:
        """Client libraries have timeout classes of their own."""
        threaded.note_failure(refused_error())
        fail_attempt(threaded, clock, error)
        assert threaded.outage is not None
        assert threaded.outage.answer_wait_s == TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR

    def test_timeouts_of_simultaneous_calls_are_one_attempt(
        self, threaded: Availability, fix_random: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """Forty threads that waited when Redis froze have waited once each, not forty times."""
        fix_random(1)
        for _ in range(40):
            threaded.note_failure(timeout_error())
        assert threaded.outage is not None
        assert threaded.outage.answer_wait_s == TIMEOUT
        assert threaded.outage.attempts == 0
        assert next_delay(threaded) <= RETRY_DELAY_MIN_S


class TestTurns:
    """A server that callers have to retry."""

    def test_one_caller_at_a_time_retries_after_the_delay(self, turns: Availability, clock: Clock) -> None:
        """All other calls use their local circuit."""
        turns.note_failure(refused_error())
        assert not turns.claim_turn()
        clock.now += TURN_DELAY_MIN_S - 0.001
        assert not turns.claim_turn()
        clock.now += 0.001
        assert [turns.claim_turn() for _ in range(5)] == [True, False, False, False, False]
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
        assert turns.claim_turn(), "a caller that died with its turn blocks others for a limited time"

    def test_delays_double_up_to_the_maximum(self, turns: Availability, clock: Clock) -> None:
        """Each attempt costs one caller its wait."""
        turns.note_failure(refused_error())
        seen = []
        for _ in range(40):
            seen.append(next_delay(turns))
            fail_attempt(turns, clock)
        assert seen[:6] == [TURN_DELAY_MIN_S * 2**turn for turn in range(5)] + [TURN_DELAY_MAX_S]
        assert set(seen[5:]) == {TURN_DELAY_MAX_S}

    def test_delays_of_a_forbidden_circuit_do_not_grow(self, turns: Availability, clock: Clock) -> None:
        """The server answers at once, so a call hardly waits. Other processes may wait for the result of this one."""
        forbidden = redis.exceptions.NoPermissionError("no permissions")
        turns.note_failure(forbidden)
        for _ in range(4):
            assert next_delay(turns) == TURN_DELAY_MIN_S
            fail_attempt(turns, clock, forbidden)

    def test_failure_soon_after_an_answer_continues_the_delays(self, turns: Availability, clock: Clock) -> None:
        """A server that answers every other time would otherwise cost a caller its wait each second."""
        turns.note_failure(refused_error())
        for _ in range(3):
            fail_attempt(turns, clock)
        clock.now += next_delay(turns)
        assert turns.claim_turn()
        assert turns.note_answer()
        clock.now += TURN_DELAY_MAX_S
        turns.note_failure(refused_error())
        assert next_delay(turns) == TURN_DELAY_MIN_S * 2**4
        assert turns.outage is not None
        assert turns.outage.attempts == 0

    def test_failure_long_after_an_answer_starts_with_the_first_delay(self, turns: Availability, clock: Clock) -> None:
        """A failure after a long time without one is another outage."""
        turns.note_failure(refused_error())
        for _ in range(3):
            fail_attempt(turns, clock)
        turns.note_answer()
        clock.now += TURN_DELAY_MAX_S + 0.001
        turns.note_failure(refused_error())
        assert next_delay(turns) == TURN_DELAY_MIN_S

    def test_first_failure_of_a_process_waits_for_the_first_delay(self, clock: Clock) -> None:
        """A process that has just started had no earlier outage."""
        server = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
        clock.now += 0.1
        server.note_failure(refused_error())
        assert next_delay(server) == TURN_DELAY_MIN_S

    def test_failures_of_simultaneous_calls_are_one_turn(self, turns: Availability) -> None:
        """Ten threads that met the same outage do not isolate the process for half a minute."""
        for _ in range(10):
            turns.note_failure(refused_error())
        assert next_delay(turns) == TURN_DELAY_MIN_S

    def test_answer_admits_all_callers(self, turns: Availability, clock: Clock) -> None:
        """The answer to one caller admits all callers."""
        turns.note_failure(refused_error())
        clock.now += TURN_DELAY_MIN_S
        assert turns.claim_turn()
        clock.now += 0.25
        assert turns.note_answer() == TURN_DELAY_MIN_S + 0.25
        assert all(turns.claim_turn() for _ in range(5))


class TestThreads:
    """Simultaneous answers and failures of several threads."""

    def test_simultaneous_answers_end_the_outage_once(self, threaded: Availability) -> None:
        """The end of an outage is logged once, and no thread raises."""
        rounds, threads = 200, 6
        barrier = threading.Barrier(threads)

        def answer() -> Iterator[tuple[int, float | None]]:
            for number in range(rounds):
                if barrier.wait() == 0:
                    threaded.note_failure(refused_error())
                barrier.wait()
                yield number, threaded.note_answer()

        with ThreadPoolExecutor(threads) as pool:
            answers = [pair for pairs in pool.map(lambda _: list(answer()), range(threads)) for pair in pairs]
        assert Counter(number for number, seconds in answers if seconds is not None) == Counter(range(rounds))

    def test_one_of_many_threads_gets_the_turn(self, turns: Availability, clock: Clock) -> None:
        """Threads that claim at the same time get one turn."""
        rounds, threads = 200, 6
        turns.note_failure(refused_error())
        barrier = threading.Barrier(threads)

        def claim() -> Iterator[bool]:
            for _ in range(rounds):
                if barrier.wait() == 0:
                    clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
                barrier.wait()
                yield turns.claim_turn()

        with ThreadPoolExecutor(threads) as pool:
            taken = list(pool.map(lambda _: list(claim()), range(threads)))
        assert [sum(of_round) for of_round in zip(*taken, strict=True)] == [1] * rounds

    def test_simultaneous_failures_start_one_outage(self, threaded: Availability) -> None:
        """The start of an outage is logged once, too."""
        threads = 6
        barrier = threading.Barrier(threads)

        def fail(_: int) -> bool:
            barrier.wait()
            return threaded.note_failure(refused_error()) is not None

        with ThreadPoolExecutor(threads) as pool:
            assert sum(pool.map(fail, range(threads))) == 1


class TestWaiters:
    """Threads that wait for the end or the beginning of an outage."""

    @pytest.mark.parametrize("change", ["an outage begins", "an outage ends", "its kind changes", "a call"])
    def test_change_wakes_a_waiter(self, threaded: Availability, change: str) -> None:
        """A change between the read and the wait is not missed either."""
        if change in ("an outage ends", "its kind changes"):
            threaded.note_failure(refused_error())
        seen = threaded.change_number
        threads = [threading.Thread(target=threaded.wait_for_change, args=(seen, 60), daemon=True) for _ in range(2)]
        threads[0].start()
        {
            "an outage begins": lambda: threaded.note_failure(refused_error()),
            "an outage ends": threaded.note_answer,
            "its kind changes": lambda: threaded.note_failure(redis.exceptions.ReadOnlyError()),
            "a call": threaded.wake_waiters,
        }[change]()
        threads[1].start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()

    def test_further_failure_of_the_same_kind_wakes_no_waiter(self, threaded: Availability, clock: Clock) -> None:
        """A waiter would wake with every retry that fails."""
        threaded.note_failure(refused_error())
        seen = threaded.change_number
        threaded.note_failure(refused_error())
        fail_attempt(threaded, clock)
        assert threaded.change_number == seen

    def test_wait_ends_after_its_time(self, threaded: Availability) -> None:
        """Whatever the waiter waits for may vanish without a notice."""
        threaded.wait_for_change(threaded.change_number, 0.01)

    def test_child_waits_on_a_condition_of_its_own(self, threaded: Availability) -> None:
        """A thread of the parent may hold the lock of the parent's condition."""
        threaded.wait_for_change(threaded.change_number, 0)
        condition = condition_of(threaded)
        assert condition is not None
        with condition:
            reset_in_child(threaded)
            waiter = threading.Thread(target=threaded.wait_for_change, args=(threaded.change_number, 0.01), daemon=True)
            waiter.start()
            waiter.join(10)
            assert not waiter.is_alive()


class TestForks:
    """The availability in a child of a fork."""

    def test_child_of_a_fork_has_a_free_lock_and_no_retry_thread(self, threaded: Availability, clock: Clock) -> None:
        """Neither the thread that held the lock nor the retry thread exists in the child."""
        threaded.note_failure(refused_error())
        held = lock_of(threaded)
        held.acquire()
        try:
            reset_in_child(threaded)
            assert not threaded.has_retry_thread
            assert threaded.outage is not None, "a fork does not end the outage"
            clock.now += RETRY_DELAY_MAX_S
            assert threaded.claim_turn()
            assert threaded.note_answer() == RETRY_DELAY_MAX_S
        finally:
            held.release()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_every_child_of_a_fork_is_reset(self, threaded: Availability) -> None:
        """The reset in a child needs no call."""
        with lock_of(threaded):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if lock_of(threaded).acquire(timeout=1) and not threaded.has_retry_thread else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert threaded.has_retry_thread
