"""Clocks of this host, and conversion between times.

Each call reads the clock again, so that freezegun and time-machine have an effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import NamedTuple

#: Monotonic clock, seconds, which runs while a test has frozen the time.  freezegun replaces `time.monotonic` in the
#: modules that import the function.  Inside a `partial`, the function stays.
monotonic = partial(time.monotonic)

#: Earliest and latest time of a sound record, milliseconds since the epoch: years 1 and 5000.  A later time is damage.
#: The latest one leaves room for a timeout of centuries.
EARLIEST_TIME_MS = datetime(1, 1, 2, tzinfo=timezone.utc).timestamp() * 1000
LATEST_TIME_MS = datetime(5000, 1, 1, tzinfo=timezone.utc).timestamp() * 1000


def wall_clock_ms() -> float:
    """Return the time of the local wall clock, milliseconds since the epoch."""
    return time.time() * 1000


class Instant(NamedTuple):
    """One instant by both clocks of this host.

    Attributes:
        wall_ms: Time of the local wall clock, milliseconds since the epoch.  Tests and
            administrators set this clock.
        monotonic_ms: Time of the monotonic clock, milliseconds.  This clock is never set.
    """

    wall_ms: float
    monotonic_ms: float


def instant(wall: Callable[[], float] = wall_clock_ms) -> Instant:
    """Return the present instant.

    Args:
        wall: Function that returns the local time, milliseconds since the epoch.
    """
    return Instant(wall(), monotonic() * 1000)


def utc_from_ms(at_ms: float) -> datetime:
    """Return an aware UTC datetime, limited so that neither this function nor an addition to the result raises.

    Args:
        at_ms: Milliseconds since the epoch.
    """
    if not EARLIEST_TIME_MS <= at_ms <= LATEST_TIME_MS:
        at_ms = EARLIEST_TIME_MS if at_ms < EARLIEST_TIME_MS else LATEST_TIME_MS
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc)


def ms_from_utc(at: datetime) -> float:
    """Return milliseconds since the epoch, where a naive datetime counts as UTC."""
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() * 1000


class AssignedMs(float):
    """Milliseconds since the epoch that keep the datetime from which they were made.

    Attributes:
        assigned: The given datetime: naive, or aware and in UTC.
    """

    assigned: datetime

    @classmethod
    def of(cls, at: datetime) -> AssignedMs:
        """Return the milliseconds of a datetime."""
        result = cls(ms_from_utc(at))
        result.assigned = at.astimezone(timezone.utc) if at.tzinfo else at
        return result
