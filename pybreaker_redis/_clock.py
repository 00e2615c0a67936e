"""What time is it here, and how far is another clock ahead?

Knows: the local wall clock, what a server said about its own.  Does not know: who asked the server, and for what.

The local wall clock is looked up at every call, so that freezegun and time-machine are heard.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import NamedTuple

#: Seconds, monotonic, for what must go on while a test has stopped the time: freezegun replaces the function where it
#: finds it in a module.
monotonic = partial(time.monotonic)

#: Years 1 and 5000: what lies beyond is damage.  A timeout of centuries may be added to the later one.
EARLIEST_MS = datetime(1, 1, 2, tzinfo=timezone.utc).timestamp() * 1000
LATEST_MS = datetime(5000, 1, 1, tzinfo=timezone.utc).timestamp() * 1000


def now_ms() -> float:
    """Milliseconds since the epoch by the local clock."""
    return time.time() * 1000


class Moment(NamedTuple):
    """A moment by both clocks of this host, milliseconds.

    Attributes:
        wall_ms: Since the epoch, by the local wall clock, which tests and administrators move.
        steady_ms: By the monotonic clock, which is never set.
    """

    wall_ms: float
    steady_ms: float


def moment(wall: Callable[[], float] = now_ms) -> Moment:
    """The present moment.

    Args:
        wall: The local wall clock, milliseconds since the epoch.
    """
    return Moment(wall(), monotonic() * 1000)


def from_ms(at_ms: float) -> datetime:
    """Return an aware UTC datetime, bounded so that neither this nor an addition to the result raises."""
    if not EARLIEST_MS <= at_ms <= LATEST_MS:
        at_ms = EARLIEST_MS if at_ms < EARLIEST_MS else LATEST_MS
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc)


def to_ms(at: datetime) -> float:
    """Milliseconds since the epoch; a naive datetime is taken as UTC."""
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() * 1000


class SaidMs(float):
    """Milliseconds since the epoch that a caller has set, to be read as they were set.

    Attributes:
        said: The datetime that was given; naive, or aware and in UTC.
    """

    said: datetime

    @classmethod
    def of(cls, at: datetime) -> SaidMs:
        """Return the milliseconds of a datetime, and remember it."""
        result = cls(to_ms(at))
        result.said = at.astimezone(timezone.utc) if at.tzinfo else at
        return result


class Learned(NamedTuple):
    """What is known of a server's clock.

    Attributes:
        wall: Bounds of the server's clock minus the local wall clock, milliseconds.
        steady: Bounds of the server's clock minus the monotonic clock, milliseconds.
        steps: How often the server's clock was set, or another server with another clock has answered.
        is_doubted: Whether another server may answer next.
    """

    wall: tuple[float, float]
    steady: tuple[float, float]
    steps: int
    is_doubted: bool


class Offset:
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
        learned: All that is known; ``None`` before the first answer.
    """

    #: Difference that matters, milliseconds.
    MATTERS = 100

    #: The local clock was set back if it shows that much less than before, milliseconds: no answer takes as long.
    SET_BACK = 10_000

    def __init__(self) -> None:
        # Replaced as a whole: threads that learn at the same time lose an answer at most.
        self.learned: Learned | None = None
        self.ms = 0.0
        self._latest_ms = 0.0

    @property
    def known(self) -> bool:
        """Whether there was any answer yet, from the server that answers now."""
        return self.learned is not None and not self.learned.is_doubted

    @property
    def steady_ms(self) -> float:
        """The same for the monotonic clock in the place of the local one: only the server's clock changes it."""
        return self.learned.steady[0] if self.learned else 0

    @property
    def steps(self) -> int:
        """How often the server's clock has stepped: a time that was read earlier is one of another clock."""
        return self.learned.steps if self.learned else 0

    def learn(self, server_ms: float, before: Moment, after: Moment, *, waiting: bool) -> None:
        """Take in an answer.

        Args:
            server_ms: The server's time in it.
            before: When it was asked for.
            after: When it had come.
            waiting: Whether callers wait for a time to pass.
        """
        is_set_back = before.wall_ms < self._latest_ms - self.SET_BACK
        self._latest_ms = before.wall_ms if is_set_back else max(before.wall_ms, self._latest_ms)
        # The server's time has been cut to whole milliseconds.
        wall = server_ms - after.wall_ms, server_ms + 1 - before.wall_ms
        steady = server_ms - after.steady_ms, server_ms + 1 - before.steady_ms
        learned = self.learned
        if learned is None:
            self._learn(Learned(wall, steady, 0, is_doubted=False))
            return
        is_small = not _differ(wall, learned.wall, self.MATTERS)
        # A host that was suspended has both: its monotonic clock stood still, and its wall clock agrees.
        has_stepped = not is_small and _differ(steady, learned.steady, self.MATTERS)
        if not (learned.is_doubted or has_stepped):
            if not _differ(wall, learned.wall):
                wall = _narrowed(wall, learned.wall)
            elif is_small or (waiting and not is_set_back):
                wall = learned.wall
        if not _differ(steady, learned.steady):
            steady = _narrowed(steady, learned.steady)
        self._learn(Learned(wall, steady, learned.steps + has_stepped, is_doubted=False))

    def _learn(self, learned: Learned) -> None:
        # In this order: what is computed from the one is kept for as long as the other is the same.
        self.ms = learned.wall[0]
        self.learned = learned

    def forget(self) -> None:
        """It may be another server that answers next; until then it is what it was."""
        if self.learned is not None:
            self.learned = self.learned._replace(is_doubted=True)

    def set(self, ms: float) -> None:
        """Forget what was learned of the local clock: it is this, as of now."""
        steady, steps = (self.learned.steady, self.learned.steps) if self.learned else ((-math.inf, math.inf), 0)
        self._learn(Learned((ms, ms), steady, steps, is_doubted=False))


def _differ(some: tuple[float, float], other: tuple[float, float], by: float = 0) -> bool:
    """Whether two bounds contradict each other by more than that."""
    return some[0] > other[1] + by or some[1] < other[0] - by


def _narrowed(some: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(some[0], other[0]), min(some[1], other[1])
