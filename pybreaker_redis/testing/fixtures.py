"""What does pytest offer to tests of guarded code?

Knows: pytest.  Does not know: how it is done; `testing/circuits.py` does it.

Not loaded unless asked for: ``pytest_plugins = ["pybreaker_redis.fixtures"]`` in the topmost ``conftest.py``.  Nothing
here applies to a test that does not name it.
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
    """A registry of the test's own, with its circuits in this process."""
    with BreakerRegistry() as breakers:
        yield breakers


@pytest.fixture
def breaker_clock() -> Iterator[BreakerClock]:
    """A clock that breakers go by: ``breaker_clock.advance(31)`` and the reset timeout is over."""
    with BreakerClock() as clock:
        yield clock


@pytest.fixture
def breaker_prefix() -> str:
    """A prefix that no other test has, whatever runs at the same time: for a registry on a real server."""
    return unique_prefix()
