"""Fixtures of pytest for tests of guarded code.

A project loads them with ``pytest_plugins = ["pybreaker_redis.fixtures"]`` in its topmost ``conftest.py``.  A fixture
affects only the tests that name it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.circuits import unique_prefix
from pybreaker_redis.testing.clock import BreakerClock

with require_extra("pytest", extra="testing"):
    import pytest

__all__ = ("breaker_clock", "breaker_prefix", "memory_breakers")


@pytest.fixture
def memory_breakers() -> Iterator[BreakerRegistry]:
    """Yield a registry for one test, with its circuits in this process."""
    with BreakerRegistry() as breakers:
        yield breakers


@pytest.fixture
def breaker_clock() -> Iterator[BreakerClock]:
    """Yield a clock for breakers: ``breaker_clock.advance(31)`` ends a reset timeout of 30 seconds."""
    with BreakerClock() as clock:
        yield clock


@pytest.fixture
def breaker_prefix() -> str:
    """Return a prefix for a registry on a real server that no other test uses, in no other process."""
    return unique_prefix()
