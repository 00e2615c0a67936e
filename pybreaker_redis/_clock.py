"""What time is it here, and how far is another clock ahead?

Knows: the local wall clock, what a server said about its own.  Does not know: who asked the server, and for what.

The local wall clock is looked up at every call, so that freezegun and time-machine are heard.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial

#: Seconds, monotonic, for what must go on while a test has stopped the time: freezegun replaces the function where it
#: finds it in a module.
monotonic = partial(time.monotonic)


#: Years 1 and 5000: what lies beyond is damage.  A timeout of centuries may be added to the later one.
EARLIEST_MS = datetime(1, 1, 2, tzinfo=timezone.utc).timestamp() * 1000
LATEST_MS = datetime(5000, 1, 1, tzinfo=timezone.utc).timestamp() * 1000


def now_ms() -> float:
    """Milliseconds since the epoch by the local clock."""
    return time.time() * 1000


def from_ms(at_ms: float) -> datetime:
    """Return an aware UTC datetime, bounded so that neither this nor an addition to the result raises."""
    return datetime.fromtimestamp(max(EARLIEST_MS, min(at_ms, LATEST_MS)) / 1000, timezone.utc)


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


class Offset:
    """A server's clock minus the local clock, milliseconds; never more than it is, so that no gate opens early.

    Every answer that carries the server's time bounds the offset by the local times around it (F. Cristian,
    "Probabilistic clock synchronization", 1989).  Bounds that agree narrow each other, so a slow first contact does not
    matter for long.  Bounds that contradict mean that the local clock was moved, by a test or an administrator, or has
    drifted.  They are not believed while somebody waits for a time to pass: who moved the clock must see it pass; who
    set it back would never.  Nor are they if they contradict by little, which changes nothing that matters.
    """

    #: Difference that matters, milliseconds.
    MATTERS = 100

    #: The local clock was set back if it shows that much less than before, milliseconds: no answer takes as long.
    SET_BACK = 10_000

    def __init__(self) -> None:
        self._bounds: tuple[float, float] | None = None
        self._doubted = False
        self._latest_ms = 0.0

    @property
    def known(self) -> bool:
        """Whether there was any answer yet, from the server that answers now."""
        return self._bounds is not None and not self._doubted

    @property
    def ms(self) -> float:
        """The lower bound; zero as long as nothing is known."""
        return self._bounds[0] if self._bounds else 0

    def learn(self, server_ms: float, before_ms: float, after_ms: float, *, waiting: bool) -> None:
        """Take in an answer that was asked for at `before_ms` and had come by `after_ms`."""
        is_set_back = before_ms < self._latest_ms - self.SET_BACK
        self._latest_ms = before_ms if is_set_back else max(before_ms, self._latest_ms)
        # The server's time has been cut to whole milliseconds.
        low, high = server_ms - after_ms, server_ms + 1 - before_ms
        if self._bounds is None or self._doubted:
            self._bounds, self._doubted = (low, high), False
        elif low <= self._bounds[1] and high >= self._bounds[0]:
            self._bounds = max(low, self._bounds[0]), min(high, self._bounds[1])
        elif is_set_back or not waiting:
            earliest, latest = self._bounds
            if not earliest - self.MATTERS <= low <= latest + self.MATTERS:
                self._bounds = low, high

    def forget(self) -> None:
        """It may be another server that answers next; until then it is what it was."""
        self._doubted = True

    def set(self, ms: float) -> None:
        """Forget what was learned: it is this, as of now."""
        self._bounds, self._doubted = (ms, ms), False
