"""What time is it here, and how far is another clock ahead?

Knows: the local wall clock, what a server said about its own.  Does not know: who asked the server, and for what.

The local wall clock is looked up at every call, so that freezegun and time-machine are heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import NamedTuple

#: Seconds, monotonic, for what must go on while a test has stopped the time: freezegun replaces the function where it
#: finds it in a module.
monotonic = partial(time.monotonic)

#: Years 1 and 5000: what lies beyond is damage.  A timeout of centuries may be added to the later one.
EARLIEST_TIME_MS = datetime(1, 1, 2, tzinfo=timezone.utc).timestamp() * 1000
LATEST_TIME_MS = datetime(5000, 1, 1, tzinfo=timezone.utc).timestamp() * 1000


def wall_clock_ms() -> float:
    """Milliseconds since the epoch by the local clock."""
    return time.time() * 1000


class Instant(NamedTuple):
    """A moment by both clocks of this host, milliseconds.

    Attributes:
        wall_ms: Since the epoch, by the local wall clock, which tests and administrators move.
        monotonic_ms: By the monotonic clock, which is never set.
    """

    wall_ms: float
    monotonic_ms: float


def instant(wall: Callable[[], float] = wall_clock_ms) -> Instant:
    """The present moment.

    Args:
        wall: The local wall clock, milliseconds since the epoch.
    """
    return Instant(wall(), monotonic() * 1000)


def utc_from_ms(at_ms: float) -> datetime:
    """Return an aware UTC datetime, bounded so that neither this nor an addition to the result raises."""
    if not EARLIEST_TIME_MS <= at_ms <= LATEST_TIME_MS:
        at_ms = EARLIEST_TIME_MS if at_ms < EARLIEST_TIME_MS else LATEST_TIME_MS
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc)


def ms_from_utc(at: datetime) -> float:
    """Milliseconds since the epoch; a naive datetime is taken as UTC."""
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() * 1000


class AssignedMs(float):
    """Milliseconds since the epoch that a caller has set, to be read as they were set.

    Attributes:
        assigned: The datetime that was given; naive, or aware and in UTC.
    """

    assigned: datetime

    @classmethod
    def of(cls, at: datetime) -> AssignedMs:
        """Return the milliseconds of a datetime, and remember it."""
        result = cls(ms_from_utc(at))
        result.assigned = at.astimezone(timezone.utc) if at.tzinfo else at
        return result
