"""May I ask Redis now?

Knows: what errors mean, when Redis last failed, a monotonic clock.  Does not know: what was asked, who asks again.

Whatever a client raises, it is one of six things (`error_kind`).  Two of them say something of the server, so that all
circuits of this process that live there are concerned; the others are a single circuit's own business.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from pybreaker_redis._redis.classify import ErrorKind, error_kind, is_instance_of_named
from pybreaker_redis._runtime.clock import utc_from_ms, wall_clock_ms
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.redaction import describe_error
from pybreaker_redis.health import Condition

#: The first pause before Redis is asked again is shorter than this, seconds; each further one may be twice as long.
RETRY_DELAY_MIN_S = 0.05
#: Longest pause, seconds: over so much time a fleet is spread that comes back.
RETRY_DELAY_MAX_S = 1.0
#: What is to be fresher than that has a shorter one, down to so many seconds.
RETRY_DELAY_MAX_FLOOR_S = 0.1

#: The same where no thread asks, so that a caller has to do it, and to wait for the answer.
TURN_DELAY_MIN_S = 1.0
TURN_DELAY_MAX_S = 30.0

#: Pause where a slot is under way, seconds: that does not take long, and to ask does not either.
MIGRATING_RETRY_DELAY_S = 0.1

#: How much longer each attempt may wait than the last one, if that got no answer in its time, up to so many seconds.
ANSWER_WAIT_GROWTH_FACTOR = 1.5
ANSWER_WAIT_MAX_S = 30.0


#: Pauses that do not grow, seconds: the server answers at once, so a caller hardly waits.
_FIXED_DELAYS_S = {ErrorKind.MIGRATING: MIGRATING_RETRY_DELAY_S, ErrorKind.FORBIDDEN: TURN_DELAY_MIN_S}


@dataclass(frozen=True, slots=True)
class Outage:
    """What is the matter.

    Attributes:
        since: When it began, seconds on the guard's clock.
        kind: Of the last error.
        error: The last one: its class and what it said.
        is_timeout: Whether that was that no answer came in time.
        attempts: How often Redis was asked in vain since.
        next_attempt_at: When it will be asked again, seconds on the guard's clock.
        answer_wait_s: Seconds to wait for the answer then.
    """

    since: float
    kind: ErrorKind
    error: str
    is_timeout: bool
    attempts: int
    next_attempt_at: float
    answer_wait_s: float


class Availability:
    """Keeps callers away from what has just failed.

    As long as it is somebody's business to ask again (`kept`), callers never do.  Else one of them at a time has to.

    Args:
        timeout: Seconds to wait for an answer at first.
        has_retry_thread: See below.
        clock: Seconds, monotonic.

    Attributes:
        outage: What is the matter; ``None`` while all is well.
        has_retry_thread: Whether somebody else asks again, or will as soon as something fails.
        retry_delay_max_s: Until it is asked again by somebody else, seconds.
        last_recovery_at: When the last outage ended; long ago if there was none.
        since: When this outage began, or the last one ended, or else this guard; seconds on `clock`.
        last_error: Of this or the last outage: its class and what it said; empty if there was none.
    """

    def __init__(self, timeout: float, *, has_retry_thread: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.outage: Outage | None = None
        self.has_retry_thread = has_retry_thread
        self.clock = clock
        self.retry_delay_max_s = RETRY_DELAY_MAX_S
        self._answer_wait_s = timeout
        self._lock = threading.RLock()
        self.since = clock()
        self.last_error = ""
        self._failed_turns = 0
        #: Whether somebody was told to ask, and has not come back yet.
        self._is_attempt_claimed = False
        self.last_recovery_at = -math.inf
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, and whoever asked again was left behind."""
        self._lock = threading.RLock()
        self.has_retry_thread = self._is_attempt_claimed = False
        if self.outage is not None:
            self.outage = replace(self.outage, next_attempt_at=self.clock())

    def limit_retry_delay(self, max_staleness: float) -> None:
        """Something has to be known again so many seconds after Redis is back, or twice as many."""
        if max_staleness:
            self.retry_delay_max_s = min(self.retry_delay_max_s, max(max_staleness, RETRY_DELAY_MAX_FLOOR_S))

    def extend_answer_wait(self, timeout: float) -> None:
        """Wait so many seconds for an answer at first, if that is more than before."""
        self._answer_wait_s = max(self._answer_wait_s, timeout)

    def claim_turn(self) -> bool:
        """Whether all is well, or nobody else asks again and it is the caller's turn."""
        return self.outage is None or (not self.has_retry_thread and self.claim_attempt())

    def is_attempt_due(self) -> bool:
        """Whether somebody may ask, or might be told to: a look that tells nobody to."""
        outage = self.outage
        return outage is None or self.clock() >= outage.next_attempt_at

    def claim_attempt(self) -> bool:
        """Whether it is time to ask again; then nobody else is to, until that has ended."""
        with self._lock:
            outage = self.outage
            if outage is None or self.clock() < outage.next_attempt_at:
                return False
            self._is_attempt_claimed = True
            # An attempt that has not ended after so long is no reason any more not to make another.
            self.outage = replace(outage, next_attempt_at=self.clock() + ANSWER_WAIT_MAX_S + outage.answer_wait_s)
            return True

    def return_attempt(self) -> None:
        """The caller who was told to ask has not: another one may."""
        with self._lock:
            if self._is_attempt_claimed and not self.has_retry_thread and self.outage is not None:
                self._is_attempt_claimed = False
                self.outage = replace(self.outage, next_attempt_at=self.clock() + RETRY_DELAY_MIN_S)

    def note_failure(self, error: BaseException) -> Outage | None:
        """There was no usable answer.

        Returns:
            What is the matter, if all had been well until now.
        """
        meaning = error_kind(error)
        with self._lock:
            now, before = self.clock(), self.outage
            self.last_error = describe_error(error)
            if before and not self._is_attempt_claimed:
                # Somebody who had asked before it was known that nobody answers; that is no further attempt.
                self.outage = replace(before, kind=meaning, error=self.last_error)
                return None
            self._is_attempt_claimed = False
            if before is None:
                # What fails again soon after it went well has not really gone well.
                self._failed_turns = 0 if now - self.last_recovery_at > TURN_DELAY_MAX_S else self._failed_turns + 1
                self.since = now
            else:
                self._failed_turns += 1
            attempts = before.attempts + 1 if before else 0
            patience = before.answer_wait_s if before else self._answer_wait_s
            if before and is_instance_of_named(error, "TimeoutError"):
                patience = min(patience * ANSWER_WAIT_GROWTH_FACTOR, ANSWER_WAIT_MAX_S)
            self.outage = Outage(
                since=self.since,
                kind=meaning,
                error=self.last_error,
                is_timeout=is_instance_of_named(error, "TimeoutError"),
                attempts=attempts,
                next_attempt_at=now + (_FIXED_DELAYS_S.get(meaning) or self._next_delay_s(attempts)),
                answer_wait_s=patience,
            )
            return None if before else self.outage

    def note_answer(self) -> float | None:
        """All is well.  Seconds that it was not, or ``None`` if it had been."""
        with self._lock:
            outage, self.outage, self._is_attempt_claimed = self.outage, None, False
            # Two first answers may have come together; then the other one has taken it.
            if outage is None:
                return None
            self.since = self.last_recovery_at = self.clock()
            return self.since - outage.since

    def set_retry_thread(self, has_retry_thread: bool) -> Outage | None:
        """Somebody else asks again from now on, or nobody does; what is the matter, if anything is."""
        with self._lock:
            self.has_retry_thread = has_retry_thread
            if self.outage is not None:
                self.outage = replace(
                    self.outage, next_attempt_at=self.clock() + self._next_delay_s(self.outage.attempts)
                )
            return self.outage

    def _next_delay_s(self, attempts: int) -> float:
        if self.has_retry_thread:
            # "Full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
            return random.uniform(0, min(self.retry_delay_max_s, RETRY_DELAY_MIN_S * 2 ** min(attempts, 30)))
        return min(TURN_DELAY_MAX_S, TURN_DELAY_MIN_S * 2.0 ** min(self._failed_turns, 30))


@dataclass(frozen=True, slots=True)
class AvailabilityReport:
    """What there is to say; the attributes are those of `Health`."""

    condition: Condition
    since: datetime | None
    last_error: str
    next_attempt: float | None
    attempts: int


def report_availability(server: Availability | None, circuit: Availability) -> AvailabilityReport:
    """Look at both guards.

    Args:
        server: Of the server; ``None``: it is not known yet which that is.
        circuit: Of what is only this circuit's trouble.
    """
    availability = circuit if server is None or circuit.outage else server
    outage = availability.outage
    condition: Condition = "unused" if server is None else "connected"
    if outage is not None:
        condition = (
            "refused"
            if availability is circuit
            else "unreachable"
            if outage.kind is ErrorKind.UNREACHABLE
            else "read-only"
        )
    return AvailabilityReport(
        condition=condition,
        since=None
        if condition == "unused"
        else utc_from_ms(wall_clock_ms() - (availability.clock() - availability.since) * 1000),
        last_error=circuit.last_error or (server.last_error if server else ""),
        next_attempt=None if outage is None else max(0.0, outage.next_attempt_at - availability.clock()),
        attempts=outage.attempts if outage else 0,
    )
