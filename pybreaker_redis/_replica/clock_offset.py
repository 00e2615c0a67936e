"""Clock of a server minus the local clock, and the opening time of a circuit by a clock that is never set.

A record holds the time at which the circuit opened, by the clock of the server.  A step of that clock moves the offset,
and not the opening: a timeout is a length of time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pybreaker_redis._model.circuit import OPEN, Circuit
from pybreaker_redis._runtime.clock import Instant


class OpeningTime(NamedTuple):
    """Last opening of a circuit.

    Attributes:
        generation: Generation of the circuit.
        opened_at_ms: Opening time in the record, milliseconds by the clock of the server.
        step_count: Number of steps of that clock before the record was read.
        monotonic_ms: Clock of the server minus the monotonic clock at that time, milliseconds, a lower bound.
    """

    generation: int = 0
    opened_at_ms: float | None = None
    step_count: int = 0
    monotonic_ms: float = 0

    def to_local_ms(self, circuit: Circuit, offset: ClockOffset) -> float | None:
        """Return when a circuit opened, by the local clock, milliseconds, ``None`` if it never did."""
        if circuit.opened_at_ms is None:
            return None
        ahead_ms = offset.ms
        if self.opened_at_ms == circuit.opened_at_ms and self.step_count != offset.step_count:
            ahead_ms -= offset.monotonic_ms - self.monotonic_ms
        return circuit.opened_at_ms - ahead_ms

    def updated(self, circuit: Circuit, offset: ClockOffset) -> OpeningTime:
        """Return the opening after a record was read.

        Args:
            circuit: The record.
            offset: Offset that includes the time in the same answer.
        """
        before_ms, opened_at_ms = self.opened_at_ms, circuit.opened_at_ms
        if before_ms is None and opened_at_ms is None:
            return self
        step_count, monotonic_ms = offset.step_count, offset.monotonic_ms
        if before_ms is not None and opened_at_ms is not None:
            is_same_opening = circuit.state == OPEN and circuit.generation == self.generation
            # Within one opening the time moves back only when the clock of the server was set back past it.
            if (opened_at_ms < before_ms and is_same_opening) or (
                opened_at_ms == before_ms and step_count != self.step_count
            ):
                step_count, monotonic_ms = self.step_count, self.monotonic_ms + opened_at_ms - before_ms
        return OpeningTime(circuit.generation, opened_at_ms, step_count, monotonic_ms)


class OffsetBounds(NamedTuple):
    """Bounds of the offset of a server's clock.

    Attributes:
        wall: Bounds of the server's clock minus the local wall clock, milliseconds.
        steady: Bounds of the server's clock minus the monotonic clock, milliseconds.
        step_count: Number of times that the server's clock was set, or that a server with another clock answered.
        is_unconfirmed: Whether another server may answer next.
    """

    wall: tuple[float, float]
    steady: tuple[float, float]
    step_count: int
    is_unconfirmed: bool


class ClockOffset:
    """Clock of a server minus the local clock, milliseconds, a lower bound: no gate opens early.

    Every answer that carries the server's time bounds the offset by the local times around it (F. Cristian,
    "Probabilistic clock synchronization", 1989).  Bounds that agree narrow each other, so a slow first contact does not
    matter for long.  Bounds that contradict each other mean that a clock was moved.

    The monotonic clock shows which clock was moved:

    * If the server's clock no longer agrees with it, the server's clock was set, or another server answers.  The new
      bounds hold at once.
    * Otherwise a test or an administrator moved the local clock.  New bounds are then not used while a caller waits for
      a time to pass, so that the move makes that time pass.  If the clock was set back, they are used: the time would
      never pass.

    Contradictions below `CLOCK_STEP_MIN_MS` change nothing.

    Attributes:
        ms: Lower bound of the offset, zero before the first answer.
        known_bounds: All bounds, ``None`` before the first answer.
    """

    #: Smallest contradiction that counts as a step, milliseconds.
    CLOCK_STEP_MIN_MS = 100

    #: Smallest difference by which the local clock was set back, milliseconds.  No answer takes as long.
    CLOCK_SET_BACK_MIN_MS = 10_000

    def __init__(self) -> None:
        # The bounds are replaced as a whole.  Threads that store answers at the same time lose one at most.
        self.known_bounds: OffsetBounds | None = None
        self.ms = 0.0
        self._latest_ms = 0.0

    @property
    def is_confirmed(self) -> bool:
        """Whether the present server has answered."""
        return self.known_bounds is not None and not self.known_bounds.is_unconfirmed

    @property
    def monotonic_ms(self) -> float:
        """Lower bound of the server's clock minus the monotonic clock, milliseconds, which only the server changes."""
        return self.known_bounds.steady[0] if self.known_bounds else 0

    @property
    def step_count(self) -> int:
        """Number of steps of the server's clock.  A time that was read before a step is one of another clock."""
        return self.known_bounds.step_count if self.known_bounds else 0

    def note_answer_time(self, server_ms: float, before: Instant, after: Instant, *, is_waiting: bool) -> None:
        """Narrow or replace the bounds by an answer.

        Args:
            server_ms: Time of the server in the answer, milliseconds.
            before: Local times when the query was sent.
            after: Local times when the answer had arrived.
            is_waiting: Whether callers wait for a time to pass.
        """
        is_set_back = before.wall_ms < self._latest_ms - self.CLOCK_SET_BACK_MIN_MS
        self._latest_ms = before.wall_ms if is_set_back else max(before.wall_ms, self._latest_ms)
        # The time of the server is truncated to whole milliseconds.
        wall = server_ms - after.wall_ms, server_ms + 1 - before.wall_ms
        steady = server_ms - after.monotonic_ms, server_ms + 1 - before.monotonic_ms
        known = self.known_bounds
        if (
            known is not None
            and not known.is_unconfirmed
            and _contains(wall, known.wall)
            and _contains(steady, known.steady)
        ):
            # Most answers are slower than the fastest one, and show nothing new.
            return
        if known is None:
            self._store(OffsetBounds(wall, steady, 0, is_unconfirmed=False))
            return
        is_small = not _differ(wall, known.wall, self.CLOCK_STEP_MIN_MS)
        # On a host that was suspended the monotonic clock stood still, and the wall clock agrees.
        has_stepped = not is_small and _differ(steady, known.steady, self.CLOCK_STEP_MIN_MS)
        if not (known.is_unconfirmed or has_stepped):
            if not _differ(wall, known.wall):
                wall = _narrowed(wall, known.wall)
            elif is_small or (is_waiting and not is_set_back):
                wall = known.wall
        if not _differ(steady, known.steady):
            steady = _narrowed(steady, known.steady)
        self._store(OffsetBounds(wall, steady, known.step_count + has_stepped, is_unconfirmed=False))

    def _store(self, known: OffsetBounds) -> None:
        # In this order: readers cache what they compute from `ms` until `known_bounds` changes.
        self.ms = known.wall[0]
        self.known_bounds = known

    def mark_unconfirmed(self) -> None:
        """Note that another server may answer next.  Until it does, the bounds stay."""
        if self.known_bounds is not None:
            self.known_bounds = self.known_bounds._replace(is_unconfirmed=True)

    def pin(self, ms: float) -> None:
        """Replace the bounds for the local clock by one value.

        Args:
            ms: Clock of the server minus the local clock, milliseconds.
        """
        steady, step_count = (
            (self.known_bounds.steady, self.known_bounds.step_count)
            if self.known_bounds
            else ((-math.inf, math.inf), 0)
        )
        self._store(OffsetBounds((ms, ms), steady, step_count, is_unconfirmed=False))


def _differ(some: tuple[float, float], other: tuple[float, float], by: float = 0) -> bool:
    """Return whether two bounds contradict each other, by more than some milliseconds."""
    return some[0] > other[1] + by or some[1] < other[0] - by


def _contains(outer: tuple[float, float], inner: tuple[float, float]) -> bool:
    return outer[0] <= inner[0] and outer[1] >= inner[1]


def _narrowed(some: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(some[0], other[0]), min(some[1], other[1])
