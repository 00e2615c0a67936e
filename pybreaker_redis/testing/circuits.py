"""How does one test code that is guarded?

Knows: breakers, their storages, clocks.  Does not know: test runners; `fixtures.py` knows pytest.

Nothing here needs Redis, and nothing here sleeps.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pybreaker
from pybreaker import CircuitBreaker, CircuitBreakerStorage

from pybreaker_redis import _clock
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED, OPEN, Circuit
from pybreaker_redis._intents import Intent
from pybreaker_redis._operated import OperatedStorage
from pybreaker_redis._shortcut import FastPath
from pybreaker_redis.registry import BreakerRegistry

__all__ = ("BreakerClock", "force_closed", "force_open", "in_memory", "unique_prefix")


#: Names that a module imports for itself are nothing that it exports.
_pybreaker: Any = pybreaker


class FixedCircuitStorage(OperatedStorage):
    """A circuit that stays as it is, whatever becomes of calls, and whatever operators want."""

    def __init__(self, state: str, breaker: CircuitBreaker) -> None:
        super().__init__("fixed", 1.0, FastPath())
        self._fixed_state = state
        # With a timeout of next to nothing it would be over before it has been looked at.
        self._opened_ahead_ms = 0 if breaker.reset_timeout > 1 else 1000

    def _execute(self, intent: Intent) -> Reply:
        now = _clock.wall_clock_ms()
        return Reply(True, Circuit(self._fixed_state, opened_at_ms=now + self._opened_ahead_ms), now)


@contextlib.contextmanager
def _replace_storage(breaker: CircuitBreaker, storage: CircuitBreakerStorage) -> Iterator[None]:
    """Another circuit for a breaker; afterwards its own again, as it was.  No listener is told."""
    with breaker._lock:
        before = breaker._state_storage, breaker._state
        breaker._state_storage = storage
        breaker._state = breaker._create_new_state(storage.state)
    try:
        yield
    finally:
        with breaker._lock:
            breaker._state_storage, breaker._state = before


@contextlib.contextmanager
def force_open(breaker: CircuitBreaker) -> Iterator[None]:
    """Have every call through a breaker rejected, as if its circuit had opened just then.

    Its circuit, wherever it is, is neither asked nor changed, and no listener is told.  For a ``with`` block, or as a
    decorator of a test.
    """
    with _replace_storage(breaker, FixedCircuitStorage(OPEN, breaker)):
        yield


@contextlib.contextmanager
def force_closed(breaker: CircuitBreaker) -> Iterator[None]:
    """Let every call through a breaker pass, however many fail; see `force_open`."""
    with _replace_storage(breaker, FixedCircuitStorage(CLOSED, breaker)):
        yield


@contextlib.contextmanager
def in_memory(breakers: BreakerRegistry) -> Iterator[BreakerRegistry]:
    """Give every breaker of a registry a new circuit in this process, closed; afterwards its own again.

    They stay the same objects, so it does not matter who holds them.  What is made meanwhile has its proper circuit
    afterwards.  Redis is not asked.
    """
    with contextlib.ExitStack() as stack:
        made = dict(breakers._breaker_by_name)
        redis, breakers._redis = breakers._redis, None
        for name, breaker in made.items():
            stack.enter_context(_replace_storage(breaker, breakers._storage(name)))
        try:
            yield breakers
        finally:
            breakers._redis = redis
            for name, breaker in breakers._breaker_by_name.items():
                if breaker is not made.get(name):
                    breaker._state_storage = breakers._storage(name)
                    breaker._state = breaker._create_new_state(CLOSED)


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
        for module, name, moved in ((_pybreaker, "UTC", _AdvancedUtc(self)), (_clock, "time", self)):
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


def unique_prefix(test: str = "test") -> str:
    """A prefix for a `BreakerRegistry` that no other test has, in no other process: for tests on one real server."""
    return f"{test}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{secrets.token_hex(4)}"
