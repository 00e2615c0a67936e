"""What errors mean, and when Redis may be asked again: the guard alone, under a clock that tests move."""

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

TIMEOUT = 0.25

UNREACHABLE, READ_ONLY, FORBIDDEN, UNUSABLE = (
    ErrorKind.UNREACHABLE,
    ErrorKind.READ_ONLY,
    ErrorKind.FORBIDDEN,
    ErrorKind.UNUSABLE,
)
MIGRATING, CONTENDED = ErrorKind.MIGRATING, ErrorKind.CONTENDED

KEYS = circuit_keys("guarded", needs_one_slot=True)

# -- what errors mean --------------------------------------------------------------------------------------------------


# -- what servers really say -------------------------------------------------------------------------------------------


# -- when it may be asked again ----------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    """The guard's clock."""
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> Availability:
    """A guard of a server that a thread asks again."""
    return Availability(TIMEOUT, has_retry_thread=True, clock=clock)


@pytest.fixture
def turns(clock: Clock) -> Availability:
    """A guard where callers ask again, that has been well for long."""
    guard = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
    clock.now += 2 * TURN_DELAY_MAX_S
    return guard


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[tuple[float, float]]]:
    """Decide what random pauses come to, as a share of the longest; returns the bounds that were asked for."""

    def load(share: float) -> list[tuple[float, float]]:
        bounds: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            bounds.append((low, high))
            return low + share * (high - low)

        monkeypatch.setattr(availability.random, "uniform", uniform)
        return bounds

    return load


def gone() -> redis.ConnectionError:
    """Nobody is there."""
    return redis.ConnectionError("Connection refused.")


def silent() -> redis.TimeoutError:
    """Nobody answers."""
    return redis.TimeoutError("Timeout reading from socket")


def pause(guard: Availability) -> float:
    """Seconds until Redis may be asked again."""
    assert guard.outage is not None
    return guard.outage.next_attempt_at - guard.clock()


def tried_in_vain(guard: Availability, clock: Clock, error: Exception | None = None) -> None:
    """When it is time to, somebody asks again, and fails."""
    assert guard.outage is not None
    clock.now = max(clock.now, guard.outage.next_attempt_at)
    assert guard.claim_attempt()
    guard.note_failure(error or gone())


class TestWell:
    """As long as nothing has failed."""

    @pytest.mark.parametrize("is_kept", [True, False])
    def test_everybody_may_ask(self, is_kept: bool, clock: Clock) -> None:
        """And there is nothing to ask again."""
        guard = Availability(TIMEOUT, has_retry_thread=is_kept, clock=clock)
        assert guard.claim_turn()
        assert guard.claim_turn()
        assert not guard.claim_attempt()
        assert guard.outage is None
        assert guard.last_error == ""
        assert guard.since == clock.now
        assert guard.set_retry_thread(not is_kept) is None

    def test_answer_ends_no_outage(self, kept: Availability, clock: Clock) -> None:
        """So nothing is said of it."""
        clock.now += 1
        assert kept.note_answer() is None
        assert kept.since == 100.0


class TestKept:
    """Where a thread asks again."""

    def test_callers_never_ask_however_long_it_takes(self, kept: Availability, clock: Clock) -> None:
        """They would have to wait for the answer."""
        kept.note_failure(gone())
        assert not kept.claim_turn()
        clock.now += 1e6
        assert not kept.claim_turn()
        assert kept.claim_attempt(), "nor have they taken the thread's turn"

    def test_first_failure_alone_is_news(self, kept: Availability, clock: Clock) -> None:
        """One line in the log when it goes, however many meet it."""
        news = kept.note_failure(gone())
        assert news is not None
        assert (news.since, news.kind, news.attempts, news.answer_wait_s) == (100.0, UNREACHABLE, 0, TIMEOUT)
        assert news.error == "ConnectionError: Connection refused."
        assert kept.note_failure(gone()) is None
        clock.now += 5
        tried_in_vain(kept, clock, redis.exceptions.ReadOnlyError("You can't write against a read only replica."))
        assert kept.outage is not None
        assert kept.outage.since == kept.since == 100.0
        assert kept.outage.kind is READ_ONLY
        assert kept.outage.error == kept.last_error == "ReadOnlyError: You can't write against a read only replica."

    def test_pauses_are_random_and_grow_to_the_longest(
        self, kept: Availability, clock: Clock, dice: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """A fleet that lost Redis at once does not come back at once; and once it is back, it is soon noticed."""
        bounds = dice(1)
        kept.note_failure(gone())
        for _ in range(40):
            tried_in_vain(kept, clock)
        assert {low for low, _ in bounds} == {0}
        longest = [high for _, high in bounds]
        assert longest[:6] == [RETRY_DELAY_MIN_S * 2**attempt for attempt in range(5)] + [RETRY_DELAY_MAX_S]
        assert set(longest[5:]) == {RETRY_DELAY_MAX_S}
        assert pause(kept) == RETRY_DELAY_MAX_S

    def test_pauses_lie_between_none_and_the_longest(self, kept: Availability, clock: Clock) -> None:
        """As the dice fall."""
        kept.note_failure(gone())
        seen = []
        for _ in range(50):
            tried_in_vain(kept, clock)
            seen.append(pause(kept))
        assert 0 <= min(seen) < max(seen) <= RETRY_DELAY_MAX_S
        assert len(set(seen)) > 40

    @pytest.mark.parametrize(
        ("staleness", "longest"),
        [([2.0], RETRY_DELAY_MAX_S), ([0.3, 0.5], 0.3), ([0.01], RETRY_DELAY_MAX_FLOOR_S), ([0], 1)],
    )
    def test_pauses_are_shorter_where_something_has_to_be_fresher(
        self,
        kept: Availability,
        clock: Clock,
        dice: Callable[[float], list[tuple[float, float]]],
        staleness: list[float],
        longest: float,
    ) -> None:
        """As fresh as the most demanding circuit has to be, within reason; one that always asks demands nothing."""
        dice(1)
        for seconds in staleness:
            kept.limit_retry_delay(seconds)
        kept.note_failure(gone())
        for _ in range(10):
            tried_in_vain(kept, clock)
        assert pause(kept) == pytest.approx(longest)

    def test_one_attempt_at_a_time(self, kept: Availability, clock: Clock) -> None:
        """As long as it has not ended; one that never ends is not waited for without end."""
        kept.note_failure(gone())
        clock.now += RETRY_DELAY_MAX_S
        assert kept.claim_attempt()
        assert not kept.claim_attempt()
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT - 0.001
        assert not kept.claim_attempt()
        clock.now += 0.001
        assert kept.claim_attempt()

    def test_answer_ends_the_outage_and_says_how_long_it_was(self, kept: Availability, clock: Clock) -> None:
        """For the line in the log; what was last wrong can still be read."""
        kept.note_failure(gone())
        clock.now += 7.5
        assert kept.note_answer() == 7.5
        assert kept.outage is None
        assert kept.since == clock.now
        assert kept.last_error == "ConnectionError: Connection refused."
        assert kept.claim_turn()
        assert kept.note_answer() is None

    def test_next_outage_begins_anew(self, kept: Availability, clock: Clock) -> None:
        """It has its own attempts, and its own patience."""
        kept.note_failure(silent())
        for _ in range(5):
            tried_in_vain(kept, clock, silent())
        kept.note_answer()
        news = kept.note_failure(silent())
        assert news is not None
        assert (news.since, news.attempts, news.answer_wait_s) == (clock.now, 0, TIMEOUT)
        assert pause(kept) <= RETRY_DELAY_MIN_S

    def test_guard_that_nobody_keeps_any_more_lets_callers_take_turns(self, kept: Availability, clock: Clock) -> None:
        """In a process that may start no threads."""
        kept.note_failure(gone())
        outage = kept.set_retry_thread(False)
        assert outage is kept.outage
        assert pause(kept) >= TURN_DELAY_MIN_S
        assert not kept.claim_turn()
        clock.now += pause(kept)
        assert kept.claim_turn()
        assert not kept.claim_turn()

    def test_guard_that_somebody_keeps_now_is_asked_soon(self, turns: Availability) -> None:
        """And no more by callers."""
        turns.note_failure(gone())
        turns.set_retry_thread(True)
        assert pause(turns) <= RETRY_DELAY_MIN_S
        assert not turns.claim_turn()


class TestPatience:
    """How long an attempt waits for its answer."""

    def test_patience_grows_by_half_with_each_attempt_that_got_no_answer(
        self, kept: Availability, clock: Clock
    ) -> None:
        """A server that has become slow for all is reached in the end."""
        kept.note_failure(silent())
        seen = []
        for _ in range(15):
            assert kept.outage is not None
            seen.append(kept.outage.answer_wait_s)
            tried_in_vain(kept, clock, silent())
        assert seen == pytest.approx(
            [min(TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR**n, ANSWER_WAIT_MAX_S) for n in range(15)]
        )
        assert seen[-1] == ANSWER_WAIT_MAX_S == 30.0
        assert ANSWER_WAIT_GROWTH_FACTOR == 1.5

    @pytest.mark.parametrize(
        "error", [gone(), redis.ResponseError("BUSY"), OSError(), redis.exceptions.ReadOnlyError()], ids=repr
    )
    def test_patience_does_not_grow_when_there_was_an_answer(
        self, kept: Availability, clock: Clock, error: Exception
    ) -> None:
        """Who is refused at once need not wait longer."""
        kept.note_failure(silent())
        for _ in range(5):
            tried_in_vain(kept, clock, error)
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT

    @pytest.mark.parametrize("error", [silent(), valkey.TimeoutError(), TimeoutError()], ids=repr)
    def test_any_kind_of_timeout_makes_patient(self, kept: Availability, clock: Clock, error: Exception) -> None:
        """Libraries have classes of their own."""
        kept.note_failure(gone())
        tried_in_vain(kept, clock, error)
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR

    def test_calls_that_wait_together_are_one_attempt(
        self, kept: Availability, dice: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """Forty threads that were under way when Redis froze have waited once each, not forty times."""
        dice(1)
        for _ in range(40):
            kept.note_failure(silent())
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT
        assert kept.outage.attempts == 0
        assert pause(kept) <= RETRY_DELAY_MIN_S


class TestTurns:
    """Where callers have to ask again."""

    def test_one_caller_at_a_time_asks_when_the_pause_is_over(self, turns: Availability, clock: Clock) -> None:
        """All others go by their own circuit meanwhile."""
        turns.note_failure(gone())
        assert not turns.claim_turn()
        clock.now += TURN_DELAY_MIN_S - 0.001
        assert not turns.claim_turn()
        clock.now += 0.001
        assert [turns.claim_turn() for _ in range(5)] == [True, False, False, False, False]
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
        assert turns.claim_turn(), "a caller that has died with its turn is not waited for without end"

    def test_pauses_double_up_to_the_longest(self, turns: Availability, clock: Clock) -> None:
        """Each costs a caller its wait."""
        turns.note_failure(gone())
        seen = []
        for _ in range(40):
            seen.append(pause(turns))
            tried_in_vain(turns, clock)
        assert seen[:6] == [TURN_DELAY_MIN_S * 2**turn for turn in range(5)] + [TURN_DELAY_MAX_S]
        assert set(seen[5:]) == {TURN_DELAY_MAX_S}

    def test_pauses_of_a_forbidden_circuit_do_not_grow(self, turns: Availability, clock: Clock) -> None:
        """The server answers at once, so a call hardly waits; other processes may wait for what this one holds."""
        forbidden = redis.exceptions.NoPermissionError("no permissions")
        turns.note_failure(forbidden)
        for _ in range(4):
            assert pause(turns) == TURN_DELAY_MIN_S
            tried_in_vain(turns, clock, forbidden)

    def test_what_fails_again_soon_goes_on_where_it_was(self, turns: Availability, clock: Clock) -> None:
        """A server that answers every other time would else cost a caller its wait each second."""
        turns.note_failure(gone())
        for _ in range(3):
            tried_in_vain(turns, clock)
        clock.now += pause(turns)
        assert turns.claim_turn()
        assert turns.note_answer()
        clock.now += TURN_DELAY_MAX_S
        turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S * 2**4
        assert turns.outage is not None
        assert turns.outage.attempts == 0

    def test_what_was_well_for_long_begins_anew(self, turns: Availability, clock: Clock) -> None:
        """It is another outage."""
        turns.note_failure(gone())
        for _ in range(3):
            tried_in_vain(turns, clock)
        turns.note_answer()
        clock.now += TURN_DELAY_MAX_S + 0.001
        turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S

    def test_first_failure_of_all_waits_for_the_first_turn(self, clock: Clock) -> None:
        """A process that has just started has not failed before."""
        guard = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
        clock.now += 0.1
        guard.note_failure(gone())
        assert pause(guard) == TURN_DELAY_MIN_S

    def test_calls_that_fail_together_are_one_turn(self, turns: Availability) -> None:
        """Ten threads that met the same outage do not keep the process alone for half a minute."""
        for _ in range(10):
            turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S

    def test_answer_lets_all_callers_in(self, turns: Availability, clock: Clock) -> None:
        """From the moment on that one of them had it."""
        turns.note_failure(gone())
        clock.now += TURN_DELAY_MIN_S
        assert turns.claim_turn()
        clock.now += 0.25
        assert turns.note_answer() == TURN_DELAY_MIN_S + 0.25
        assert all(turns.claim_turn() for _ in range(5))


class TestThreads:
    """What comes together."""

    def test_answers_that_come_together_end_one_outage_once(self, kept: Availability) -> None:
        """One line in the log, and no thread collides with another."""
        rounds, threads = 200, 6
        barrier = threading.Barrier(threads)

        def answer() -> Iterator[tuple[int, float | None]]:
            for number in range(rounds):
                if barrier.wait() == 0:
                    kept.note_failure(gone())
                barrier.wait()
                yield number, kept.note_answer()

        with ThreadPoolExecutor(threads) as pool:
            answers = [pair for pairs in pool.map(lambda _: list(answer()), range(threads)) for pair in pairs]
        assert Counter(number for number, seconds in answers if seconds is not None) == Counter(range(rounds))

    def test_one_of_many_threads_has_the_turn(self, turns: Availability, clock: Clock) -> None:
        """However close together they look."""
        rounds, threads = 200, 6
        turns.note_failure(gone())
        barrier = threading.Barrier(threads)

        def look() -> Iterator[bool]:
            for _ in range(rounds):
                if barrier.wait() == 0:
                    clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
                barrier.wait()
                yield turns.claim_turn()

        with ThreadPoolExecutor(threads) as pool:
            taken = list(pool.map(lambda _: list(look()), range(threads)))
        assert [sum(of_round) for of_round in zip(*taken, strict=True)] == [1] * rounds

    def test_failures_that_come_together_are_news_once(self, kept: Availability) -> None:
        """One line in the log when it goes, too."""
        threads = 6
        barrier = threading.Barrier(threads)

        def fail(_: int) -> bool:
            barrier.wait()
            return kept.note_failure(gone()) is not None

        with ThreadPoolExecutor(threads) as pool:
            assert sum(pool.map(fail, range(threads))) == 1


class TestForks:
    """In a child."""

    def test_child_of_a_process_whose_lock_was_held_can_go_on(self, kept: Availability, clock: Clock) -> None:
        """Whoever held it has not come along; nor has the thread that asks again."""
        kept.note_failure(gone())
        held = kept._lock
        held.acquire()
        try:
            kept.after_fork()
            assert not kept.has_retry_thread
            assert kept.outage is not None, "the server has not come back by forking"
            clock.now += RETRY_DELAY_MAX_S
            assert kept.claim_turn()
            assert kept.note_answer() == RETRY_DELAY_MAX_S
        finally:
            held.release()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="nobody forks here")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_every_child_is_told(self, kept: Availability) -> None:
        """Nobody has to think of it."""
        with kept._lock:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if kept._lock.acquire(timeout=1) and not kept.has_retry_thread else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert kept.has_retry_thread
