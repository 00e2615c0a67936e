"""How does one test code that is guarded?

Knows: breakers, their storages, clocks.  Does not know: test runners; `testing/fixtures.py` knows pytest.

Nothing here needs Redis, and nothing here sleeps.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

from pybreaker import CircuitBreaker, CircuitBreakerStorage

from pybreaker_redis._adapter.operated import OperatedStorage
from pybreaker_redis._model.circuit import CLOSED, OPEN, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._runtime import clock as clock_module
from pybreaker_redis.registry import BreakerRegistry

__all__ = ("force_closed", "force_open", "in_memory", "unique_prefix")


class FixedCircuitStorage(OperatedStorage):
    """A circuit that stays as it is, whatever becomes of calls, and whatever operators want."""

    def __init__(self, state: str, breaker: CircuitBreaker) -> None:
        super().__init__("fixed", 1.0, FastPath())
        self._fixed_state = state
        # With a timeout of next to nothing it would be over before it has been looked at.
        self._opened_ahead_ms = 0 if breaker.reset_timeout > 1 else 1000

    def _execute(self, intent: Intent) -> Reply:
        now = clock_module.wall_clock_ms()
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


def unique_prefix(test: str = "test") -> str:
    """A prefix for a `BreakerRegistry` that no other test has, in no other process: for tests on one real server."""
    return f"{test}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{secrets.token_hex(4)}"
