"""When did the circuit open last, by a clock that is never set?

Knows: records, how far a server's clock is ahead.  Does not know: views, who asks the server.

A record has the time at which the circuit opened, by the server's clock.  A step of that clock moves the difference to
the local clock, and not the time at which the circuit opened here: a timeout is a length of time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pybreaker_redis._model.circuit import OPEN, Circuit
from pybreaker_redis._runtime.clock import Instant


class OpeningTime(NamedTuple):
    """The last opening of a circuit.

    Attributes:
        generation: Of the circuit.
        opened_at_ms: As the record has it.
        step_count: How often the server's clock had stepped when that was read.
        monotonic_ms: The server's clock minus the monotonic clock at that time, as well as it was learned.
    """

    generation: int = 0
    opened_at_ms: float | None = None
    step_count: int = 0
    monotonic_ms: float = 0

    def to_local_ms(self, circuit: Circuit, offset: ClockOffset) -> float | None:
        """Return when a circuit opened, by the local clock, milliseconds; ``None`` if it never did."""
        if circuit.opened_at_ms is None:
            return None
        ahead_ms = offset.ms
        if self.opened_at_ms == circuit.opened_at_ms and self.step_count != offset.step_count:
            ahead_ms -= offset.monotonic_ms - self.monotonic_ms
        return circuit.opened_at_ms - ahead_ms

    def updated(self, circuit: Circuit, offset: ClockOffset) -> OpeningTime:
        """Return the spell after a record was read together with a time of the server's clock, which is learned."""
        before_ms, opened_at_ms = self.opened_at_ms, circuit.opened_at_ms
        step_count, monotonic_ms = offset.step_count, offset.monotonic_ms
        if before_ms is not None and opened_at_ms is not None:
            is_same_spell = circuit.state == OPEN and circuit.generation == self.generation
            # Within a spell the time is moved back only where the server's clock was set back, so that it was to come.
            if (opened_at_ms < before_ms and is_same_spell) or (
                opened_at_ms == before_ms and step_count != self.step_count
            ):
                step_count, monotonic_ms = self.step_count, self.monotonic_ms + opened_at_ms - before_ms
        return OpeningTime(circuit.generation, opened_at_ms, step_count, monotonic_ms)


class OffsetBounds(NamedTuple):
    """What is known of a server's clock.

    Attributes:
        wall: Bounds of the server's clock minus the local wall clock, milliseconds.
        steady: Bounds of the server's clock minus the monotonic clock, milliseconds.
        step_count: How often the server's clock was set, or another server with another clock has answered.
        is_unconfirmed: Whether another server may answer next.
    """

    wall: tuple[float, float]
    steady: tuple[float, float]
    step_count: int
    is_unconfirmed: bool


class ClockOffset:
    """A server's clock minus the local clock, milliseconds; never more than it is, so that no gate opens early.

    Every answer that carries the server's time bounds the offset by the local times around it (F. Cristian,
    "Probabilistic clock synchronization", 1989).  Bounds that agree narrow each other, so a slow first contact does not
    matter for long.  Bounds that contradict mean that a clock was moved.

    The monotonic clock tells whose.  If the server's clock agrees with it no longer, the server's clock was set, or
    another server answers: the new bounds hold at once.  Else the local clock was moved, by a test or an administrator.
    Then new bounds are not used while a caller waits for a time to pass: who moved the clock must see it pass.  If the
    clock was set back, they are: the time would never pass.

    Bounds that contradict by little change nothing that matters.

    Attributes:
        ms: The lower bound; zero as long as nothing is known.
        known_bounds: All that is known; ``None`` before the first answer.
    """

    #: Difference that matters, milliseconds.
    CLOCK_STEP_MIN_MS = 100

    #: The local clock was set back if it shows that much less than before, milliseconds: no answer takes as long.
    CLOCK_SET_BACK_MIN_MS = 10_000

    def __init__(self) -> None:
        # Replaced as a whole: threads that learn at the same time lose an answer at most.
        self.known_bounds: OffsetBounds | None = None
        self.ms = 0.0
        self._latest_ms = 0.0

    @property
    def is_confirmed(self) -> bool:
        """Whether there was any answer yet, from the server that answers now."""
        return self.known_bounds is not None and not self.known_bounds.is_unconfirmed

    @property
    def monotonic_ms(self) -> float:
        """The same for the monotonic clock in the place of the local one: only the server's clock changes it."""
        return self.known_bounds.steady[0] if self.known_bounds else 0

    @property
    def step_count(self) -> int:
        """How often the server's clock has stepped: a time that was read earlier is one of another clock."""
        return self.known_bounds.step_count if self.known_bounds else 0

    def note_answer_time(self, server_ms: float, before: Instant, after: Instant, *, is_waiting: bool) -> None:
        """Take in an answer.

        Args:
            server_ms: The server's time in it.
            before: When it was asked for.
            after: When it had come.
            is_waiting: Whether callers wait for a time to pass.
        """
        is_set_back = before.wall_ms < self._latest_ms - self.CLOCK_SET_BACK_MIN_MS
        self._latest_ms = before.wall_ms if is_set_back else max(before.wall_ms, self._latest_ms)
        # The server's time has been cut to whole milliseconds.
        wall = server_ms - after.wall_ms, server_ms + 1 - before.wall_ms
        steady = server_ms - after.monotonic_ms, server_ms + 1 - before.monotonic_ms
        learned = self.known_bounds
        if learned is None:
            self._store(OffsetBounds(wall, steady, 0, is_unconfirmed=False))
            return
        is_small = not _differ(wall, learned.wall, self.CLOCK_STEP_MIN_MS)
        # A host that was suspended has both: its monotonic clock stood still, and its wall clock agrees.
        has_stepped = not is_small and _differ(steady, learned.steady, self.CLOCK_STEP_MIN_MS)
        if not (learned.is_unconfirmed or has_stepped):
            if not _differ(wall, learned.wall):
                wall = _narrowed(wall, learned.wall)
            elif is_small or (is_waiting and not is_set_back):
                wall = learned.wall
        if not _differ(steady, learned.steady):
            steady = _narrowed(steady, learned.steady)
        self._store(OffsetBounds(wall, steady, learned.step_count + has_stepped, is_unconfirmed=False))

    def _store(self, learned: OffsetBounds) -> None:
        # In this order: what is computed from the one is kept for as long as the other is the same.
        self.ms = learned.wall[0]
        self.known_bounds = learned

    def mark_unconfirmed(self) -> None:
        """It may be another server that answers next; until then it is what it was."""
        if self.known_bounds is not None:
            self.known_bounds = self.known_bounds._replace(is_unconfirmed=True)

    def pin(self, ms: float) -> None:
        """Forget what was learned of the local clock: it is this, as of now."""
        steady, step_count = (
            (self.known_bounds.steady, self.known_bounds.step_count)
            if self.known_bounds
            else ((-math.inf, math.inf), 0)
        )
        self._store(OffsetBounds((ms, ms), steady, step_count, is_unconfirmed=False))


def _differ(some: tuple[float, float], other: tuple[float, float], by: float = 0) -> bool:
    """Whether two bounds contradict each other by more than that."""
    return some[0] > other[1] + by or some[1] < other[0] - by


def _narrowed(some: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(some[0], other[0]), min(some[1], other[1])
