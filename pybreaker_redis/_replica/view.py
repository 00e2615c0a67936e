"""View: bounded-staleness cache of one circuit's record.

The last record is kept for good: a server that loses its data gets the record back from here.  Calls *trust* the
record, so that they send no query, while four conditions hold:

* The circuit is subscribed.
* The record was read less than `max_staleness` ago.
* No push has reported a change since.
* The process uses the shared circuit, so that reports take the same way as reads.

Readers compare the clock themselves, so a listener that died or hangs cannot prolong the trust.

Answers arrive out of order, on many connections.  `merge` decides which of two records is later.

A push is a hint, because a user of the server may publish without a right to any key.  A pushed record is compared and
dropped, and the circuit is read again.  Calls that begin before that read query Redis, but for ten such reads a second
at most.  For further pushes they use the view, so a flood of pushes costs calls little.  Only an answer is stored, so
only an answered record can reach a script, which would restore the record on an emptied server.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

from pybreaker_redis._model.circuit import CLOSED, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._replica.clock_offset import ClockOffset, OpeningTime
from pybreaker_redis._replica.merge import Merge, is_same_but_counters, merge
from pybreaker_redis._replica.trust import ArmedTrust, ReadTicket
from pybreaker_redis._runtime.fork import ForkSafe

#: Largest difference between the time in another storage's answer and the estimated time of the server, milliseconds.
#: A larger one means another clock.  In a busy process an answer is late.
FOREIGN_CLOCK_GAP_MS = 1000

#: Shortest time between two suspensions, seconds, however many pushes arrive.
SUSPENSION_INTERVAL_MIN_S = 0.1


class View(ForkSafe):
    """Record of one circuit, as this process has read it last.  Times in the record are the server's.

    Args:
        max_staleness: Seconds for which a record may be trusted, 0 for never.
        now: Returns monotonic seconds.

    Attributes:
        max_staleness: Seconds for which a record may be trusted.
        cached: The record that was read last, ``None`` before the first answer.
        clock_offset: Clock of the server minus the local clock.
        opening_time: When the circuit opened last, on a clock that is never set.
        fast_path: The record in the form that costs calls least.
        is_quiet: Whether the record has neither failures nor noise, so that successes need no report.
    """

    def __init__(self, max_staleness: float, now: Callable[[], float] = time.monotonic) -> None:
        self.max_staleness = max_staleness
        self.cached: Circuit | None = None
        self.clock_offset = ClockOffset()
        self.opening_time = OpeningTime()
        self.fast_path = FastPath(0, now)
        self._now = now
        #: Time of the server in the last answer, milliseconds, and when that answer arrived, monotonic seconds.
        self._seen_ms = 0.0
        self._seen_at = 0.0
        self.is_quiet = False
        #: Whether the last record of another storage had times of another clock.
        self._is_foreign = False
        self._is_subscribed = False
        self._is_paused = False
        self._distrust_count = 0
        self._change_count = 0
        self._push_count = 0
        self._suspended_at = -math.inf
        self._asked_at = -math.inf
        #: Trust that the view shares with others (``None``: the view is not armed).
        self._armed_trust: ArmedTrust | None = None
        super().__init__()

    # For readers --------------------------------------------------------------------------------------------------

    def read_trusted(self) -> Circuit | None:
        """Return the record, if it may be trusted.  Its counters may be older."""
        if self._now() >= self.fast_path.trust.until:
            return None
        self.fast_path.was_used = True
        return self.cached

    def read_trusted_quiet(self, generation: int | None) -> Circuit | None:
        """Return the record, if it may be trusted, is closed, has no failures, and is of this generation."""
        quiet = self.fast_path.quiet_admission
        if quiet is None or quiet.generation != generation:
            return None
        return self.read_trusted()

    @property
    def is_trusted(self) -> bool:
        """Whether calls need no query now."""
        return self._now() < self.fast_path.trust.until

    @property
    def is_subscribed(self) -> bool:
        """Whether changes of the circuit are received."""
        return self._is_subscribed

    @property
    def seconds_since_read(self) -> float:
        """Seconds since the record was read, `math.inf` before the first answer."""
        if self.cached is None:
            return math.inf
        armed = self._armed_trust
        read_at = self._seen_at if armed is None else max(self._seen_at, armed.trust.until - self.max_staleness)
        return self._now() - read_at

    @property
    def estimated_server_ms(self) -> float:
        """Time of the server, milliseconds, never later than it is: the last one plus what has passed here since."""
        return self._seen_ms + (self._now() - self._seen_at) * 1000

    def local_opened_at_ms(self, circuit: Circuit) -> float | None:
        """Return when the circuit opened by the local clock, milliseconds, ``None`` if it never did.

        A step of the server's clock does not change the result for the same opening: a timeout is a length of time.
        """
        return self.opening_time.to_local_ms(circuit, self.clock_offset)

    # For queries --------------------------------------------------------------------------------------------------

    def begin_read(self) -> ReadTicket:
        """Return a ticket for a query that is about to be sent."""
        self._asked_at = self._now()
        return ReadTicket(self._asked_at, self._distrust_count, self._change_count, self._push_count)

    def store_answer(self, ticket: ReadTicket, circuit: Circuit, now_ms: float) -> None:
        """Store the record in an answer, unless the cached one is later.

        Args:
            ticket: Ticket of the query.
            circuit: The record.
            now_ms: Time of the server in the answer, milliseconds.
        """
        with self._lock:
            # A failure that was pushed after the query was sent may have been counted after the answer.
            is_quiet = (
                circuit.fail_counter == 0 and circuit.noisy_until_ms <= now_ms and ticket.push_count == self._push_count
            )
            if is_sent_later := ticket.change_count == self._change_count:
                # The record is later even if the clock of the server was set back.
                self._seen_ms = min(self._seen_ms, now_ms)
            if self._store(circuit, now_ms, is_quiet=is_quiet, is_sent_later=is_sent_later):
                self._note_opening_time(circuit)
                self._extend_trust(ticket)

    def pause_trust(self) -> None:
        """Trust nothing until `resume_trust`: the process uses the local circuit."""
        with self._lock:
            self._is_paused = True
            self._distrust()

    def resume_trust(self) -> None:
        """Permit trust again: the process uses the shared circuit."""
        self._is_paused = False

    # For the listener ---------------------------------------------------------------------------------------------

    def mark_subscribed(self) -> None:
        """Note that changes are received from now on."""
        self._set_subscribed(True)

    def mark_unsubscribed(self) -> None:
        """Note that changes are received no longer, and trust nothing that was read before."""
        self._set_subscribed(False)

    def _set_subscribed(self, is_subscribed: bool) -> None:
        with self._lock:
            self._is_subscribed = is_subscribed
            # Another server with another clock may answer next.
            self._seen_ms = 0
            self._distrust()

    @property
    def is_in_use(self) -> bool:
        """Whether a change has to be read at once.

        Calls rely on the record, or on an answer under way.  Or the circuit is not closed.  Otherwise the local circuit
        of an idle process would reject calls in an outage, though the circuit has closed since.
        """
        is_fresh = self._now() < self._asked_at + self.max_staleness
        is_relied_on = is_fresh or self._is_paused or self._armed_trust is not None
        return is_relied_on or (self.cached is not None and self.cached.state != CLOSED)

    def compare_push(self, circuit: Circuit | None) -> bool:
        """Compare a pushed record with the cached one, and drop the pushed one.

        A noise mark of the cached generation ends the quiet until the answer to a later query: successes are reported
        from here on.  Any other difference has to be read.

        Args:
            circuit: The pushed record, ``None`` if it could not be parsed.

        Returns:
            Whether the circuit has to be read again.
        """
        with self._lock:
            self._push_count += 1
            known = self.cached
            is_in_use = self.is_in_use
            self._disarm()
            if not self._is_subscribed or known is None or circuit is None:
                return self._is_subscribed and is_in_use
            if not is_same_but_counters(replace(circuit, noisy_until_ms=known.noisy_until_ms), known):
                return is_in_use
            if known.state == CLOSED and circuit.noisy_until_ms != known.noisy_until_ms:
                self.is_quiet = False
                self._update_fast_path()
            return False

    def arm(self, ticket: ReadTicket, armed: ArmedTrust) -> bool:
        """Share a trust with other views, if a poll has shown that the record is quiet, and nothing was reported since.

        Args:
            ticket: Ticket of the poll.
            armed: The trust, which holds for the poll, too.

        Returns:
            Whether the view is armed.
        """
        with self._lock:
            is_current = ticket.change_count == self._change_count and ticket.distrust_count == self._distrust_count
            if not (is_current and self._is_subscribed and self.is_quiet) or self._is_paused:
                return False
            self._armed_trust = armed
            self.fast_path.trust = armed.trust
            self._update_fast_path()
            return True

    def disarm(self) -> None:
        """Use a trust of its own from now on: the server has reported a change of a key."""
        with self._lock:
            self._disarm()

    def suspend_trust(self) -> None:
        """Trust nothing until the next answer, at most every `SUSPENSION_INTERVAL_MIN_S`."""
        with self._lock:
            self._disarm()
            now = self._now()
            if now >= self._suspended_at + SUSPENSION_INTERVAL_MIN_S:
                self._suspended_at, self.fast_path.trusted_until = now, 0
                self.fast_path.withdraw()

    def store_sibling_answer(self, circuit: Circuit, now_ms: float) -> None:
        """Store the record in an answer to another storage of this process.  The trust is not extended.

        Args:
            circuit: The record.
            now_ms: Time of the server in the answer, milliseconds.
        """
        with self._lock:
            if self._is_subscribed:
                if self._seen_ms and abs(now_ms - self.estimated_server_ms) > FOREIGN_CLOCK_GAP_MS:
                    self._is_foreign = True
                if self._store(circuit, now_ms, is_quiet=False, is_sent_later=False):
                    if self._is_foreign:
                        # The clock of the server was set.  An answer to this storage shows by how much.
                        self._distrust()
                    else:
                        self._note_opening_time(circuit)

    def confirm_poll(self, ticket: ReadTicket, now_ms: float, *, failures: int, quiet: bool) -> None:
        """Note that a poll has found the cached record, but for its counters.

        Args:
            ticket: Ticket of the poll.  If the record has changed since, the poll is ignored.
            now_ms: Time of the server in the answer, milliseconds.
            failures: Counter of failures.
            quiet: Whether there was neither noise nor a failure.
        """
        with self._lock:
            if self.cached is None or ticket.change_count != self._change_count:
                return
            if self.cached.fail_counter != failures:
                self.cached = replace(self.cached, fail_counter=failures)
            self._note_opening_time(self.cached)
            if self.cached.with_bounded_lease(now_ms) is not self.cached:
                # The clock of the server was set back, so the record needs a repair.
                self._distrust()
                return
            self._note_read(now_ms)
            self.is_quiet = quiet and ticket.push_count == self._push_count
            self._extend_trust(ticket)

    def distrust_poll(self, ticket: ReadTicket) -> None:
        """Trust nothing: a poll has found what only a script may store.  The next call queries the circuit.

        Args:
            ticket: Ticket of the poll.  If the record has changed since, the poll is ignored.
        """
        with self._lock:
            if ticket.change_count == self._change_count:
                self._distrust()

    # Internals ----------------------------------------------------------------------------------------------------

    def _reset_in_child(self) -> None:
        # The listener thread exists in the parent only.
        self.mark_unsubscribed()

    def _store(self, circuit: Circuit, now_ms: float, *, is_quiet: bool, is_sent_later: bool) -> bool:
        """Store a record unless the cached one is later.  Return whether the record is cached now."""
        cached = self.cached
        if cached is not None:
            relation = merge(cached, self._seen_ms, circuit, now_ms, is_sent_later=is_sent_later)
            if relation is Merge.OLDER:
                return False
            if relation is Merge.SAME:
                # Two storages of this process may get the same answer, and counters may have changed.
                if circuit != cached:
                    self._disarm()
                    self.cached = circuit
                    self._change_count += 1
                return True
            if relation is Merge.CONFLICT and not self.is_quiet:
                # The first of two changes within a millisecond is unknown, so the noise of either counts.
                is_quiet = False
        self._disarm()
        self.cached, self.is_quiet = circuit, is_quiet
        self._note_read(now_ms)
        self._change_count += 1
        self._update_fast_path()
        return True

    def _note_opening_time(self, circuit: Circuit) -> None:
        """Note when the circuit opened.  The record was read with a time of the clock in `clock_offset`."""
        self._is_foreign = False
        self.opening_time = self.opening_time.updated(circuit, self.clock_offset)

    def _note_read(self, now_ms: float) -> None:
        self._seen_ms, self._seen_at = now_ms, self._now()

    def _extend_trust(self, ticket: ReadTicket) -> None:
        is_permitted = self._is_subscribed and not self._is_paused and self._armed_trust is None
        if is_permitted and ticket.distrust_count == self._distrust_count:
            self.fast_path.trusted_until = max(self.fast_path.trust.until, ticket.sent_at + self.max_staleness)
            self._update_fast_path()

    def _disarm(self) -> None:
        if (armed := self._armed_trust) is not None:
            self._armed_trust = None
            # The last sign of life was as good as a read of then.
            self.fast_path.trusted_until = armed.trust.until
            self._asked_at = max(self._asked_at, armed.trust.until - self.max_staleness)
            armed.disarmed.append(weakref.ref(self))

    def _distrust(self) -> None:
        self._disarm()
        self._distrust_count += 1
        self._change_count += 1
        self.fast_path.trusted_until = 0
        self.fast_path.withdraw()

    def _update_fast_path(self) -> None:
        if self.cached is not None and self.fast_path.trust.until:
            self.fast_path.follow(self.cached, is_quiet=self.is_quiet)
        else:
            self.fast_path.withdraw()
