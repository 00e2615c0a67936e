"""Context managers that force a breaker open or closed, or give a registry other circuits.

Nothing here needs Redis, sleeps, or depends on a test runner.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import pybreaker
from pybreaker import STATE_CLOSED, STATE_OPEN, CircuitBreakerStorage

from pybreaker_redis import operators
from pybreaker_redis.breaker import CircuitBreaker
from pybreaker_redis.memory import FixedCircuitStorage
from pybreaker_redis.registry import BreakerRegistry

__all__ = ("force_closed", "force_open", "in_memory", "in_redis", "unique_prefix")


@contextlib.contextmanager
def _replace_storage(breaker: pybreaker.CircuitBreaker, storage: CircuitBreakerStorage) -> Iterator[None]:
    """Replace the storage of a breaker, and restore storage and state afterwards.  No listener is called."""
    if isinstance(breaker, CircuitBreaker):
        with breaker._with_storage(storage):
            yield
        return
    with breaker._lock:
        before = breaker._state_storage, breaker._state
        breaker._state_storage = storage
        breaker._state = breaker._create_new_state(storage.state)
    try:
        yield
    finally:
        with breaker._lock:
            breaker._state_storage, breaker._state = before


def _fixed_storage(breaker: pybreaker.CircuitBreaker, state: str) -> FixedCircuitStorage:
    # A very short reset timeout would end before the breaker compares it with the current time.
    return FixedCircuitStorage(state, opened_ahead_ms=0 if breaker.reset_timeout > 1 else 1000)


@contextlib.contextmanager
def force_open(breaker: pybreaker.CircuitBreaker) -> Iterator[None]:
    """Reject every call of a breaker, as if its circuit had opened just now.

    The breaker's circuit is neither read nor changed, and no listener is called.  Usable as a ``with`` block and as a
    decorator of a test.  The argument of a decorator is evaluated once, when the test is imported.
    """
    with _replace_storage(breaker, _fixed_storage(breaker, STATE_OPEN)):
        yield


@contextlib.contextmanager
def force_closed(breaker: pybreaker.CircuitBreaker) -> Iterator[None]:
    """Admit every call of a breaker, however many of them fail.  Usable like `force_open`."""
    with _replace_storage(breaker, _fixed_storage(breaker, STATE_CLOSED)):
        yield


@contextlib.contextmanager
def _replace_redis(breakers: BreakerRegistry, redis: Any) -> Iterator[BreakerRegistry]:
    with contextlib.ExitStack() as stack:
        made = dict(breakers._breaker_by_name)
        before, breakers._redis = breakers._redis, redis
        stack.callback(_restore_redis, breakers, before, made)
        for name, breaker in made.items():
            stack.enter_context(_replace_storage(breaker, breakers._storage(name)))
            stack.callback(operators.release_connections, breaker)
        yield breakers


def _restore_redis(breakers: BreakerRegistry, redis: Any, made: Mapping[str, CircuitBreaker]) -> None:
    """Restore the Redis of a registry, and give breakers that are not in `made` their configured circuit."""
    breakers._redis = redis
    for name, breaker in breakers._breaker_by_name.items():
        if breaker is not made.get(name):
            operators.release_connections(breaker)
            breaker._use_storage(breakers._storage(name))


@contextlib.contextmanager
def in_memory(breakers: BreakerRegistry) -> Iterator[BreakerRegistry]:
    """Give each breaker of a registry a new closed circuit in this process, and restore its circuit afterwards.

    The breakers stay the same objects, so references to them are affected, too.  Breakers that are created meanwhile
    get their configured circuit afterwards.  Nothing is sent to Redis.
    """
    with _replace_redis(breakers, None):
        yield breakers


@contextlib.contextmanager
def in_redis(breakers: BreakerRegistry, redis: Any) -> Iterator[BreakerRegistry]:
    """Give each breaker of a registry its circuit on another Redis, as on a client of ``fakeredis``.

    As with `in_memory`, the breakers stay the same objects, and have their configured circuits afterwards.  A circuit
    continues with what lies in that Redis.  Nothing is sent to the registry's own Redis.

    Args:
        breakers: The registry.
        redis: Client, callable that returns one, or URL, as for `BreakerRegistry`.

    Raises:
        TypeError: The value of `redis` is none of these.
        ValueError: The URL has no known form.
    """
    if redis is None:
        msg = "redis must be a client, a callable that returns one, or a URL, not None (in_memory needs none of them)"
        raise TypeError(msg)
    with BreakerRegistry(redis) as checked, _replace_redis(breakers, checked._redis):
        yield breakers


def unique_prefix(test: str = "test") -> str:
    """Return a prefix for a `BreakerRegistry` on a shared server that no other test uses, in no other process."""
    return f"{test}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{secrets.token_hex(4)}"
