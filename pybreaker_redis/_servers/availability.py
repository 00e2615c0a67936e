"""Availability of a server, or of one circuit: whether it may be queried now, and when it is retried.

`error_kind` sorts what a client library raises.  Errors of two kinds concern a server, with all its circuits.  The
others concern one circuit, which has an `Availability` of its own for them.
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
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.redaction import describe_error
from pybreaker_redis.health import Condition

#: Upper bound of the first delay of a retry thread, seconds.  The bound doubles with each attempt.
RETRY_DELAY_MIN_S = 0.05
#: Longest delay, seconds.  A fleet that returns is spread over this time.
RETRY_DELAY_MAX_S = 1.0
#: Circuits with a `max_staleness` below the longest delay shorten it, down to this, seconds.
RETRY_DELAY_MAX_FLOOR_S = 0.1

#: First and longest delay where a caller retries and has to wait for the answer, seconds.
TURN_DELAY_MIN_S = 1.0
TURN_DELAY_MAX_S = 30.0

#: Delay while a slot migrates, seconds.  A migration is short, and an answer takes no time.
MIGRATING_RETRY_DELAY_S = 0.1

#: Growth of the wait for an answer after each timeout, and its limit in seconds.
ANSWER_WAIT_GROWTH_FACTOR = 1.5
ANSWER_WAIT_MAX_S = 30.0

#: Delays that do not grow, seconds: the server answers at once, so a caller hardly waits.
_FIXED_DELAYS_S = {ErrorKind.MIGRATING: MIGRATING_RETRY_DELAY_S, ErrorKind.FORBIDDEN: TURN_DELAY_MIN_S}


@dataclass(frozen=True, slots=True)
class Outage:
    """Present failure of a server or a circuit.

    Attributes:
        since: When the outage began, seconds on the clock of its `Availability`.
        kind: Kind of the last error.
        error: Class and text of the last error.
        is_timeout: Whether the last error was a timeout.
        attempts: Number of retries that failed.
        next_attempt_at: When the next retry is due, seconds on the same clock.
        answer_wait_s: Seconds that the next retry waits for an answer.
    """

    since: float
    kind: ErrorKind
    error: str
    is_timeout: bool
    attempts: int
    next_attempt_at: float
    answer_wait_s: float


class Availability(ForkSafe):
    """State machine of one server or one circuit: available, or in an outage with retries.

    A retry thread makes the retries, if there is one.  Otherwise callers take turns, one at a time.

    Args:
        timeout: Seconds that the first retry waits for an answer.
        has_retry_thread: Whether a thread retries, or will once an outage begins.
        clock: Returns monotonic seconds.

    Attributes:
        outage: The present outage, ``None`` while there is none.
        has_retry_thread: Whether a thread makes the retries.
        retry_delay_max_s: Longest delay of the retry thread, seconds.
        last_recovery_at: When the last outage ended, seconds on `clock`, minus infinity if there was none.
        since: When the present condition began, seconds on `clock`.
        last_error: Class and text of the last error, empty if there was none.
        change_number: Number of outages that began, ended or changed their kind, and of calls of `wake_waiters`.
    """

    def __init__(self, timeout: float, *, has_retry_thread: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.outage: Outage | None = None
        self.has_retry_thread = has_retry_thread
        self.clock = clock
        self.retry_delay_max_s = RETRY_DELAY_MAX_S
        self.since = clock()
        self.last_error = ""
        self.last_recovery_at = -math.inf
        self.change_number = 0
        self._answer_wait_s = timeout
        self._failed_turns = 0
        #: Whether an attempt is under way.
        self._is_attempt_claimed = False
        #: Made by the first waiter.  This object may exist before gevent replaces the locks.
        self._change: threading.Condition | None = None
        super().__init__()

    def _reset_in_child(self) -> None:
        # The child has neither a retry thread nor an attempt under way.
        self._change = None
        self.has_retry_thread = self._is_attempt_claimed = False
        if self.outage is not None:
            self.outage = replace(self.outage, next_attempt_at=self.clock())

    def limit_retry_delay(self, max_staleness: float) -> None:
        """Shorten the longest delay of the retry thread.

        Args:
            max_staleness: Seconds within which a circuit must notice that the server is back, 0 for no limit.
        """
        if max_staleness:
            self.retry_delay_max_s = min(self.retry_delay_max_s, max(max_staleness, RETRY_DELAY_MAX_FLOOR_S))

    def extend_answer_wait(self, timeout: float) -> None:
        """Have the first retry of an outage wait for an answer at least so many seconds."""
        self._answer_wait_s = max(self._answer_wait_s, timeout)

    # Attempts -----------------------------------------------------------------------------------------------------

    @property
    def is_attempt_due(self) -> bool:
        """Whether there is no outage, or its next retry is due."""
        outage = self.outage
        return outage is None or self.clock() >= outage.next_attempt_at

    def claim_turn(self) -> bool:
        """Claim the turn of a caller, and return whether that caller may query.  Without an outage every caller may."""
        return self.outage is None or (not self.has_retry_thread and self.claim_attempt())

    def claim_attempt(self) -> bool:
        """Claim the next attempt, if it is due.

        Returns:
            Whether it was claimed.  Others are refused until `note_failure`, `note_answer` or `give_back_turn`.
        """
        with self._lock:
            outage = self.outage
            if outage is None or self.clock() < outage.next_attempt_at:
                return False
            self._is_attempt_claimed = True
            # An attempt that takes longer has died, and blocks no further one.
            self.outage = replace(outage, next_attempt_at=self.clock() + ANSWER_WAIT_MAX_S + outage.answer_wait_s)
            return True

    def give_back_turn(self) -> None:
        """Return a claimed turn that the caller did not use."""
        with self._lock:
            if self._is_attempt_claimed and not self.has_retry_thread and self.outage is not None:
                self._is_attempt_claimed = False
                self.outage = replace(self.outage, next_attempt_at=self.clock() + RETRY_DELAY_MIN_S)

    # Results ------------------------------------------------------------------------------------------------------

    def note_failure(self, error: BaseException) -> Outage | None:
        """Note that there was no usable answer.

        Args:
            error: What the client library raised.

        Returns:
            The outage, if it begins with this error.
        """
        kind = error_kind(error)
        with self._lock:
            before, self.last_error = self.outage, describe_error(error)
            if before and not self._is_attempt_claimed:
                # The query began before the outage was known, so it is no further attempt.
                self.outage = replace(before, kind=kind, error=self.last_error)
            else:
                self._is_attempt_claimed = False
                self.outage = self._next_outage(before, kind, is_timeout=is_instance_of_named(error, "TimeoutError"))
            outage = self.outage
        if before is None or before.kind is not kind:
            self.wake_waiters()
        return None if before else outage

    def _next_outage(self, before: Outage | None, kind: ErrorKind, *, is_timeout: bool) -> Outage:
        now = self.clock()
        if before is None:
            # A failure soon after a recovery continues the growth of the delays.
            self._failed_turns = 0 if now - self.last_recovery_at > TURN_DELAY_MAX_S else self._failed_turns + 1
            self.since = now
        else:
            self._failed_turns += 1
        attempts = before.attempts + 1 if before else 0
        answer_wait_s = before.answer_wait_s if before else self._answer_wait_s
        if before and is_timeout:
            answer_wait_s = min(answer_wait_s * ANSWER_WAIT_GROWTH_FACTOR, ANSWER_WAIT_MAX_S)
        return Outage(
            since=self.since,
            kind=kind,
            error=self.last_error,
            is_timeout=is_timeout,
            attempts=attempts,
            next_attempt_at=now + (_FIXED_DELAYS_S.get(kind) or self._next_delay_s(attempts)),
            answer_wait_s=answer_wait_s,
        )

    def note_answer(self) -> float | None:
        """Note a usable answer, which ends an outage.

        Returns:
            Length of the outage, seconds, ``None`` if there was none.
        """
        with self._lock:
            outage, self.outage, self._is_attempt_claimed = self.outage, None, False
            # Of two first answers that arrive together, one ends the outage.
            if outage is None:
                return None
            self.since = self.last_recovery_at = self.clock()
            seconds = self.since - outage.since
        self.wake_waiters()
        return seconds

    def set_retry_thread(self, has_retry_thread: bool) -> Outage | None:
        """Note whether a thread retries, which decides the delays.

        Returns:
            The present outage with its new delay, if there is an outage.
        """
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

    # Waiters ------------------------------------------------------------------------------------------------------

    def wait_for_change(self, seen: int, timeout_s: float) -> None:
        """Wait until `change_number` differs from a number.

        Args:
            seen: The number that the caller read before it looked at the outage, so that no change is missed.
            timeout_s: Longest wait, seconds.
        """
        with self._lock:
            if self._change is None:
                self._change = threading.Condition()
            change = self._change
        with change:
            if self.change_number == seen:
                change.wait(timeout_s)

    def wake_waiters(self) -> None:
        """Wake all waiters, so that they check the availability again."""
        with self._lock:
            self.change_number += 1
            change = self._change
        if change is not None:
            with change:
                change.notify_all()


@dataclass(frozen=True, slots=True)
class AvailabilityReport:
    """Availability of one circuit, for an operator.  The attributes are those of `Health`."""

    condition: Condition
    since: datetime | None
    last_error: str
    next_attempt: float | None
    attempts: int


def report_availability(server: Availability | None, circuit: Availability) -> AvailabilityReport:
    """Combine the availability of a server with that of one of its circuits.

    Args:
        server: Availability of the server, ``None`` if the circuit was not used yet.
        circuit: Availability of the circuit alone.
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
