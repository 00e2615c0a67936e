"""Arguments of a breaker: their checks, and the storage that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from pybreaker import CircuitBreakerStorage

from pybreaker_redis._circuits.core import CircuitCore
from pybreaker_redis._model.circuit import CLOSED
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.validation import format_value
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.storage import CircuitRedisStorage, client_source_from_url

#: Exception class, or function of an exception.
Rule: TypeAlias = type[BaseException] | Callable[[Any], bool]


def check_callable(argument: str, function: Any) -> None:
    """Raise an error unless a value can be called, or is ``None``.

    Raises:
        TypeError: The value can not be called.
    """
    if function is not None and not callable(function):
        msg = f"{argument} must be callable or None, not {format_value(function)}"
        raise TypeError(msg)


def clock_for(clock: Any, storage: CircuitBreakerStorage | None, redis: Any) -> Callable[[], float]:
    """Return the clock of a breaker, milliseconds since the epoch.

    Raises:
        TypeError: The clock can not be called, or the circuit is not in the memory of this breaker.
    """
    check_callable("clock", clock)
    if clock is None:
        return wall_clock_ms
    if storage is not None or redis is not None:
        msg = "clock is for a circuit that the breaker keeps in memory: leave out state_storage and redis"
        raise TypeError(msg)
    return lambda: clock() * 1000


def storage_for(
    storage: CircuitBreakerStorage | None, redis: Any, name: str | None, clock_ms: Callable[[], float]
) -> CircuitBreakerStorage:
    """Return the storage of a breaker.

    Args:
        storage: Storage that was given.
        redis: Client, callable that returns one, or URL.
        name: Name of the breaker, which is the namespace of its circuit in Redis.
        clock_ms: Clock of a circuit in memory.

    Raises:
        TypeError: Both a storage and a Redis were given, or a Redis without a name.
    """
    if storage is not None:
        if redis is not None:
            msg = "redis and state_storage exclude each other: the storage has its own client"
            raise TypeError(msg)
        return storage
    if redis is None:
        return CircuitMemoryStorage(CLOSED, clock_ms=clock_ms)
    if name is None:
        msg = "a breaker with redis must have a name, which is the namespace of its circuit"
        raise TypeError(msg)
    source = client_source_from_url(redis) if isinstance(redis, str) else redis
    return CircuitRedisStorage(CLOSED, source, namespace=name)


def circuit_of(storage: CircuitBreakerStorage) -> CircuitCore | None:
    """Return the circuit of a storage of this package.  ``None`` for other storages."""
    core: CircuitCore | None = getattr(storage, "_core", None)
    return core


def matches(rule: Rule, exception: BaseException) -> bool:
    """Whether an exception is of a class, or a function accepts it."""
    return isinstance(exception, rule) if isinstance(rule, type) else bool(rule(exception))
