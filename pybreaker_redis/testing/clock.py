"""Clock of breakers that a test advances, while all other code uses the real time."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pybreaker

from pybreaker_redis._runtime import clock as clock_module

__all__ = ("BreakerClock",)

#: Annotated as Any, because mypy does not permit access to names that pybreaker imports but does not export.
_pybreaker: Any = pybreaker


class BreakerClock:
    """Clock for breakers alone that runs like the real clock and can be advanced.

    All breakers and storages of this process use the clock within its ``with`` block.  If freezegun or time-machine
    move the real clock, this clock moves along.

    Attributes:
        ahead: Seconds between the real clock and this one.
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        self._originals: list[tuple[Any, str, Any]] = []

    def advance(self, seconds: float) -> None:
        """Advance the clock: timeouts end earlier, and so do leases in memory.  Leases in Redis use the server's time.

        Args:
            seconds: Seconds to add.
        """
        self.ahead += seconds

    def time(self) -> float:
        """Return the seconds since the epoch, as `time.time` does."""
        return time.time() + self.ahead

    def __enter__(self) -> BreakerClock:
        # pybreaker compares times with datetime.now(UTC), and storages read the clock module.
        for module, name, moved in ((_pybreaker, "UTC", _AdvancedUtc(self)), (clock_module, "time", self)):
            self._originals.append((module, name, getattr(module, name)))
            setattr(module, name, moved)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._originals:
            setattr(*self._originals.pop())


class _AdvancedUtc(tzinfo):
    """UTC for pybreaker, with a current time that is advanced.

    pybreaker calls ``datetime.now(UTC)``.  The time zone is replaced and not `datetime`, because freezegun replaces
    `datetime` with a class, possibly after this clock was entered.
    """

    def __init__(self, clock: BreakerClock) -> None:
        self._clock = clock

    def fromutc(self, dt: datetime) -> datetime:
        return dt + timedelta(seconds=self._clock.ahead)

    def utcoffset(self, dt: datetime | None) -> timedelta:
        return timedelta(0)

    def dst(self, dt: datetime | None) -> None:
        return None

    def tzname(self, dt: datetime | None) -> str:
        return "UTC"
