"""Clock of breakers that a test moves.

Knows: where the package reads the time.  Does not know: circuits.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pybreaker

from pybreaker_redis._runtime import clock as clock_module

__all__ = ("BreakerClock",)


#: Names that a module imports for itself are nothing that it exports.
_pybreaker: Any = pybreaker


class BreakerClock:
    """A clock for breakers, and for nothing else, that goes on as the real one does and can be advanced.

    As long as the ``with`` block lasts, all breakers and storages of this process go by it.  If freezegun or
    time-machine move the real one, it moves along.

    Attributes:
        ahead: Seconds by which it has been advanced.
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        self._originals: list[tuple[Any, str, Any]] = []

    def advance(self, seconds: float) -> None:
        """So much time passes for breakers: timeouts and, in memory, leases of probes; in Redis leases go by Redis."""
        self.ahead += seconds

    def time(self) -> float:
        """Seconds since the epoch, as `time.time`."""
        return time.time() + self.ahead

    def __enter__(self) -> BreakerClock:
        # What pybreaker compares with, and what storages say.
        for module, name, moved in ((_pybreaker, "UTC", _AdvancedUtc(self)), (clock_module, "time", self)):
            self._originals.append((module, name, getattr(module, name)))
            setattr(module, name, moved)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._originals:
            setattr(*self._originals.pop())


class _AdvancedUtc(tzinfo):
    """UTC, but what is now is told as it will be.

    pybreaker asks for ``datetime.now(UTC)``.  freezegun puts a class of its own in the place of `datetime`, at times
    where something else has been put meanwhile; nobody touches the time zone.
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
