"""What does this process believe about a circuit, and how old may the belief get?

Knows: records, their order, the difference of the clocks, a monotonic clock.  Does not know: keys, scripts, sockets.

What was seen last is kept for good: a server that loses its data gets it back from here.  It is *believed*, which is to
say that nobody asks Redis, as long as three things hold: changes are being heard, the record was read less than
`max_staleness` ago, and the process can reach Redis for more than listening.  The reader looks at the clock himself, so
a listener that died or got stuck cannot keep a belief alive.

Records arrive out of order, as answers on many connections.  The later of two is the one with the higher generation,
and within a generation the one with the later time of the server.

A push is a hint, because users who may write no key may publish.  A pushed record is compared and dropped: the circuit
is read again.  Calls that begin before that read is done ask Redis themselves, but in ten reads a second only: in the
others they use the view, so a flood of pushes costs them little.  Only an answer fills the view, so only an answered
record can reach a script, which would restore the record on an emptied server.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pybreaker_redis._model.circuit import CLOSED, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.repair import is_same_but_counters
from pybreaker_redis._replica.clock_offset import ClockOffset, OpeningTime
from pybreaker_redis._runtime.fork import renew_in_children

#: How far the time of another storage's answer may lie from the server's clock before it is one of another clock,
#: milliseconds: in a busy process it comes late.
FOREIGN_CLOCK_GAP_MS = 1000

#: Shortest time between two suspensions, seconds, however many pushes there are, forged ones too.
SUSPENSION_INTERVAL_MIN_S = 0.1


@dataclass(frozen=True, slots=True)
class ReadTicket:
    """What an answer must show that was asked for earlier.

    Attributes:
        asked_at: When, monotonic seconds: what comes back was true then or later.
        distrust_count: How often all had been forgotten by then.
        change_count: How often the record had changed by then.
        push_count: How many pushes had arrived by then.
    """

    asked_at: float
    distrust_count: int
    change_count: int
    push_count: int


class View:
    """One circuit, as this process sees it.  Times in it are the server's.

    Args:
        max_staleness: Seconds for which a record may be believed; 0: never.
        now: Seconds, monotonic.

    Attributes:
        cached: The circuit as it was seen last; ``None`` before the first answer.
        clock_offset: The server's clock minus the local one.
        opening_time: When the circuit opened last, by a clock that is never set.
        fast_path: What follows for calls, in the form that costs least to look at.
    """

    def __init__(self, max_staleness: float, now: Callable[[], float] = time.monotonic) -> None:
        self.max_staleness = max_staleness
        self.cached: Circuit | None = None
        self.clock_offset = ClockOffset()
        self.fast_path = FastPath(0, now)
        self._now = now
        self._lock = threading.RLock()
        self._seen_ms = 0.0
        self._seen_at = 0.0
        self.opening_time = OpeningTime()
        self._quiet = False
        #: Whether the last record of another storage was by another clock than is known.
        self._is_foreign = False
        self._is_subscribed = False
        self._reachable = True
        self._distrust_count = 0
        self._change_count = 0
        self._push_count = 0
        self._suspended_at = -math.inf
        self._asked_at = -math.inf
        renew_in_children(self)

    # For readers --------------------------------------------------------------------------------------------------

    def read_trusted(self) -> Circuit | None:
        """The circuit, all but its counters, if it may be believed."""
        if self._now() >= self.fast_path.trusted_until:
            return None
        self.fast_path.was_used = True
        return self.cached

    @property
    def estimated_server_ms(self) -> float:
        """The server's time, never later than it is: the last that was seen, and what has passed here since."""
        return self._seen_ms + (self._now() - self._seen_at) * 1000

    def local_opened_at_ms(self, circuit: Circuit) -> float | None:
        """When the circuit opened, by the local clock.

        While the record says the same, a step of the server's clock changes nothing: the timeout is a length of time.
        """
        return self.opening_time.to_local_ms(circuit, self.clock_offset)

    @property
    def may_believe(self) -> bool:
        """Whether the process goes by the shared circuit."""
        return self._reachable

    @property
    def seconds_since_read(self) -> float:
        """Seconds since it was seen last; `math.inf` if never."""
        return math.inf if self.cached is None else self._now() - self._seen_at

    @property
    def is_subscribed(self) -> bool:
        """Whether changes are being heard."""
        return self._is_subscribed

    @property
    def is_trusted(self) -> bool:
        """Whether nobody has to ask just now."""
        return self._now() < self.fast_path.trusted_until

    def read_trusted_quiet(self, generation: int | None) -> Circuit | None:
        """The circuit, if besides it is in this generation, closed and has no failures to forget."""
        quiet = self.fast_path.quiet_admission
        if quiet is None or quiet.generation != generation:
            return None
        return self.read_trusted()

    # For those who ask Redis --------------------------------------------------------------------------------------

    def begin_read(self) -> ReadTicket:
        """To be taken before asking: whatever was forgotten or heard meanwhile is not overwritten by the answer."""
        self._asked_at = self._now()
        return ReadTicket(self._asked_at, self._distrust_count, self._change_count, self._push_count)

    def store_answer(self, ticket: ReadTicket, circuit: Circuit, now_ms: float) -> None:
        """An answer has come: this was true at `now_ms`."""
        with self._lock:
            # A failure that was pushed after the question left may have been counted after the answer was given.
            quiet = (
                circuit.fail_counter == 0 and circuit.noisy_until_ms <= now_ms and ticket.push_count == self._push_count
            )
            if is_later := ticket.change_count == self._change_count:
                # Nothing has come in between, though the server's clock may have been set back.
                self._seen_ms = min(self._seen_ms, now_ms)
            if self._take(circuit, now_ms, quiet=quiet, is_later=is_later):
                self._note_opening_time(circuit)
                self._extend_trust(ticket)

    def pause_trust(self) -> None:
        """The process goes by a circuit of its own, so nothing is believed: reports would go another way than looks."""
        with self._lock:
            self._reachable = False
            self._distrust()

    def resume_trust(self) -> None:
        """The process goes by the shared circuit again."""
        self._reachable = True

    # For the listener ---------------------------------------------------------------------------------------------

    def is_heard(self, heard: bool) -> None:
        """From now on changes are heard, or no longer are.  What was believed before is forgotten."""
        with self._lock:
            self._is_subscribed = heard
            # It may be another server that answers next, with another clock.
            self._seen_ms = 0
            self._distrust()

    @property
    def is_in_use(self) -> bool:
        """Whether calls rely on the known record or on an answer under way, so that a change is to be read at once."""
        return self._now() < self._asked_at + self.max_staleness or not self._reachable

    def compare_push(self, circuit: Circuit | None) -> bool:
        """Compare a pushed record with the known one, and drop it.

        A noise mark of the known generation ends the quiet until an answer that is asked for later: successes are
        reported from here on.  Any other difference has to be read.

        Args:
            circuit: The pushed record; ``None`` if it could not be parsed.

        Returns:
            Whether the circuit has to be read again.
        """
        with self._lock:
            self._push_count += 1
            known = self.cached
            if not self._is_subscribed or known is None or circuit is None:
                return self._is_subscribed and self.is_in_use
            if not is_same_but_counters(replace(circuit, noisy_until_ms=known.noisy_until_ms), known):
                return self.is_in_use
            if known.state == CLOSED and circuit.noisy_until_ms != known.noisy_until_ms:
                self._quiet = False
                self._show()
            return False

    def suspend_trust(self) -> None:
        """Have calls ask until the circuit has been read again, at most every `SUSPENSION_INTERVAL_MIN_S`."""
        with self._lock:
            now = self._now()
            if now >= self._suspended_at + SUSPENSION_INTERVAL_MIN_S:
                self._suspended_at, self.fast_path.trusted_until = now, 0
                self.fast_path.withdraw()

    def store_sibling_answer(self, circuit: Circuit, now_ms: float) -> None:
        """Take the record that another storage of this process was answered; the belief lasts no longer for it."""
        with self._lock:
            if self._is_subscribed:
                if self._seen_ms and abs(now_ms - self.estimated_server_ms) > FOREIGN_CLOCK_GAP_MS:
                    self._is_foreign = True
                if self._take(circuit, now_ms, quiet=False, is_later=False):
                    if self._is_foreign:
                        # Its times are by a clock that was set: an answer will tell how far.
                        self._distrust()
                    else:
                        self._note_opening_time(circuit)

    def confirm_poll(self, ticket: ReadTicket, now_ms: float, *, failures: int, quiet: bool) -> None:
        """A poll has found the circuit as it is known, counters aside.

        Args:
            ticket: Taken before the poll; if anything has changed since, the next poll will tell.
            now_ms: The server's time.
            failures: The counter of failures.
            quiet: Whether there was neither noise nor a failure to forget.
        """
        with self._lock:
            if self.cached is None or ticket.change_count != self._change_count:
                return
            if self.cached.fail_counter != failures:
                self.cached = replace(self.cached, fail_counter=failures)
            self._note_opening_time(self.cached)
            if self.cached.with_bounded_lease(now_ms) is not self.cached:
                # The server's clock was set back: the record has to be repaired.
                self._distrust()
                return
            self._note_read(now_ms)
            self._quiet = quiet and ticket.push_count == self._push_count
            self._extend_trust(ticket)

    def distrust_poll(self, ticket: ReadTicket) -> None:
        """A poll has found something else than what is known: whoever needs the circuit next shall ask."""
        with self._lock:
            if ticket.change_count == self._change_count:
                self._distrust()

    def after_fork(self) -> None:
        """In a child: nobody there listens, nobody holds the lock."""
        self._lock = threading.RLock()
        self.is_heard(False)

    # Behind it ----------------------------------------------------------------------------------------------------

    def _take(self, circuit: Circuit, now_ms: float, *, quiet: bool, is_later: bool) -> bool:
        """Keep the later of two records; whether that is the new one.  It is if it was asked for later (`is_later`)."""
        known = self.cached
        if known is not None:
            if (circuit.generation, now_ms) < (known.generation, self._seen_ms):
                return False
            same_instant = (circuit.generation, now_ms) == (known.generation, self._seen_ms)
            if (
                same_instant
                and not is_later
                and (circuit.noisy_until_ms, circuit.fail_counter) < (known.noisy_until_ms, known.fail_counter)
            ):
                # Two answers within a millisecond arrive in the wrong order, of a poll and of a failure.  The failure
                # would be missing from what is known, and in an outage the next one would be taken for it.
                return False
            if same_instant and is_same_but_counters(circuit, known):
                # The same answer, given to two storages of this process, or only counters have changed.
                if circuit != known:
                    self.cached = circuit
                    self._change_count += 1
                return True
            # Two changes within a millisecond: which was first cannot be told, so believe in the noise of either.
            quiet = quiet and not (same_instant and not self._quiet)
        self.cached, self._quiet = circuit, quiet
        self._note_read(now_ms)
        self._change_count += 1
        self._show()
        return True

    def _note_opening_time(self, circuit: Circuit) -> None:
        """This was read together with a time of the server's clock as that is known."""
        self._is_foreign = False
        self.opening_time = self.opening_time.updated(circuit, self.clock_offset)

    def _note_read(self, now_ms: float) -> None:
        self._seen_ms, self._seen_at = now_ms, self._now()

    def _extend_trust(self, ticket: ReadTicket) -> None:
        if self._is_subscribed and self._reachable and ticket.distrust_count == self._distrust_count:
            self.fast_path.trusted_until = max(self.fast_path.trusted_until, ticket.asked_at + self.max_staleness)
            self._show()

    def _distrust(self) -> None:
        self._distrust_count += 1
        self._change_count += 1
        self.fast_path.trusted_until = 0
        self.fast_path.withdraw()

    def _show(self) -> None:
        if self.cached is not None and self.fast_path.trusted_until:
            self.fast_path.follow(self.cached, quiet=self._quiet)
        else:
            self.fast_path.withdraw()
