"""Packages that guard synchronous calls, and what each of them does per call.

Each contender is called in the shortest documented way, with a separate redis-py client.  Listeners are named.
`Terms.fail_max` failures in a row open each circuit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import pybreaker

import pybreaker_redis
from tests.support.fleet import Make

#: Value of `Terms.fail_max` that no benchmark reaches.
NEVER = 10**9

# Some peers compare failure rates.  With this rate their minimum number of calls decides.
_ANY_RATE = 1e-9


@dataclass(frozen=True)
class Terms:
    """Settings of a circuit.

    Attributes:
        circuit: Name of the circuit, new on the server.
        fail_max: Failures that open the circuit.  For peers that compare rates, the minimum number of calls.
        reset_timeout: Seconds until an open circuit admits a probe.
    """

    circuit: str
    fail_max: int = NEVER
    reset_timeout: float = 3600.0


@dataclass(frozen=True)
class Guard:
    """Circuit in use.

    Attributes:
        around: Function that returns a guarded function.
        rejection: Exception of a rejected call.
        close: Function that ends background threads.
    """

    around: Callable[[Callable[[], None]], Callable[[], Any]]
    rejection: type[Exception]
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """One way to guard a call.

    Attributes:
        name: Name in the tables.
        shares: Whether processes share its circuits through Redis.
        make: Function that creates a circuit.  Shared circuits use the client.
        needs: Module that must be installed.
    """

    name: str
    shares: bool
    make: Callable[[Terms, Any], Guard]
    needs: str

    @property
    def is_own(self) -> bool:
        """Whether the contender is part of this package."""
        return self.needs == "pybreaker_redis"

    def missing(self) -> str:
        """Return the reason why the contender cannot run here, or an empty text."""
        try:
            import_module(self.needs)
        except Exception as error:  # noqa: BLE001 (a package that is too old for this Python may raise any exception)
            return f"{type(error).__name__}: {error}"
        return ""


# -- breakers of pybreaker and of this package -------------------------------------------------------------------------


def _guard(breaker: pybreaker.CircuitBreaker) -> Guard:
    return Guard(lambda function: partial(breaker.call, function), pybreaker.CircuitBreakerError)


def _pybreaker(storage: Any, terms: Terms, **more: Any) -> Guard:
    return _guard(
        pybreaker.CircuitBreaker(
            fail_max=terms.fail_max, reset_timeout=terms.reset_timeout, state_storage=storage, **more
        )
    )


def _our_breaker(terms: Terms, **more: Any) -> Guard:
    return _guard(
        pybreaker_redis.CircuitBreaker(
            fail_max=terms.fail_max, reset_timeout=terms.reset_timeout, name=terms.circuit, **more
        )
    )


def pybreaker_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit that reads and sets attributes."""
    del client
    return _pybreaker(pybreaker.CircuitMemoryStorage("closed"), terms)


def pybreaker_memory_heard(terms: Terms, client: Any) -> Guard:
    """Create a circuit as `pybreaker_memory` does, with a listener that does nothing."""
    del client
    return _pybreaker(pybreaker.CircuitMemoryStorage("closed"), terms, listeners=[pybreaker.CircuitBreakerListener()])


def our_breaker_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit of our breaker in the memory of this process."""
    del client
    return _our_breaker(terms)


def our_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit that decides by the model, under a lock.  Successes and rejections take the fast path."""
    del client
    return _pybreaker(pybreaker_redis.CircuitMemoryStorage("closed"), terms)


def pybreaker_redis_storage(terms: Terms, client: Any) -> Guard:
    """Create a circuit that sends GET and SET for each read and each result."""
    return _pybreaker(pybreaker.CircuitRedisStorage("closed", client, namespace=terms.circuit), terms)


def our_breaker_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit of our breaker, which admits by its local view, and runs one script per failure."""
    return _our_breaker(terms, redis=client)


def our_breaker_heard(terms: Terms, client: Any) -> Guard:
    """Create a circuit as `our_breaker_redis` does, with a listener that does nothing."""
    return _our_breaker(terms, redis=client, listeners=[pybreaker.CircuitBreakerListener()])


def our_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit of the unmodified breaker, for which the storage infers what each read and write means."""
    return _pybreaker(pybreaker_redis.CircuitRedisStorage("closed", client, namespace=terms.circuit), terms)


# -- peers -------------------------------------------------------------------------------------------------------------


def _interlock(terms: Terms, storage: Any) -> Guard:
    from interlock.breaker import CircuitBreaker
    from interlock.config import Config
    from interlock.errors import CircuitOpenError

    config = Config(
        failure_rate_threshold=_ANY_RATE,
        minimum_number_of_calls=terms.fail_max,
        permitted_calls_in_half_open=1,
        wait_duration_in_open=terms.reset_timeout,
    )
    breaker = CircuitBreaker(name=terms.circuit, config=config, storage=storage)
    return Guard(lambda function: partial(breaker.call_sync, function), CircuitOpenError, breaker.close)


def interlock_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit that stores the results of the last hundred calls, under a lock."""
    del client
    return _interlock(terms, None)


def interlock_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit that counts failures per process, and shares trips.

    A thread writes trips to Redis and reads them once a second.  Only a probe makes a round trip.
    """
    from interlock.integrations.redis import RedisStorage

    return _interlock(terms, RedisStorage(client))


def nopanic_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit that counts results in ten buckets of three seconds, under a lock."""
    from nopanic import CircuitOpen, circuit_breaker

    del client
    breaker = circuit_breaker(
        failure_threshold=_ANY_RATE, min_calls=terms.fail_max, reset_timeout=terms.reset_timeout, name=terms.circuit
    )
    return Guard(breaker, CircuitOpen)


def nopanic_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit that runs one script for admission and one for the result.  The buckets are in Redis."""
    from nopanic import CircuitOpen
    from nopanic_redis import redis_circuit_breaker

    breaker = redis_circuit_breaker(
        client,
        failure_threshold=_ANY_RATE,
        min_calls=terms.fail_max,
        reset_timeout=terms.reset_timeout,
        name=terms.circuit,
    )
    return Guard(breaker, CircuitOpen)


def _aiobreaker(terms: Terms, storage: Any) -> Guard:
    from aiobreaker import CircuitBreaker, CircuitBreakerError

    timeout = timedelta(seconds=terms.reset_timeout)
    breaker = CircuitBreaker(fail_max=terms.fail_max, timeout_duration=timeout, state_storage=storage)
    return Guard(lambda function: partial(breaker.call, function), CircuitBreakerError)


def aiobreaker_memory(terms: Terms, client: Any) -> Guard:
    """Create a circuit that reads and sets attributes without a lock, through its synchronous ``call``."""
    from aiobreaker import CircuitBreakerState
    from aiobreaker.storage.memory import CircuitMemoryStorage

    del client
    return _aiobreaker(terms, CircuitMemoryStorage(CircuitBreakerState.CLOSED))


def aiobreaker_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit that sends GET and SET for each read and each result, like pybreaker, its origin."""
    from aiobreaker import CircuitBreakerState
    from aiobreaker.storage.redis import CircuitRedisStorage

    return _aiobreaker(terms, CircuitRedisStorage(CircuitBreakerState.CLOSED, client, namespace=terms.circuit))


class LasierRejected(Exception):
    """Exception that lasier raises for a rejected call."""


def lasier_redis(terms: Terms, client: Any) -> Guard:
    """Create a circuit that sends GET before and after each call.

    Failures are counted for a minute, and successes do not reset them.  The circuit has no half-open state: when its
    key expires, all calls are admitted.
    """
    from lasier.adapters.caches import RedisAdapter
    from lasier.circuit_breaker.rules import MaxFailuresRule
    from lasier.circuit_breaker.sync import CircuitBreaker

    rule = MaxFailuresRule(max_failures=terms.fail_max, failure_cache_key=terms.circuit)
    timeout = math.ceil(terms.reset_timeout)
    return Guard(CircuitBreaker(rule, RedisAdapter(client), LasierRejected, circuit_timeout=timeout), LasierRejected)


#: Contender that all others are compared with.
REFERENCE = Contender("pybreaker, memory", False, pybreaker_memory, "pybreaker")

#: Contender that shares a circuit as pybreaker does.
STOCK = Contender("pybreaker, Redis", True, pybreaker_redis_storage, "pybreaker")

#: The two ways in: our breaker, and pybreaker's unmodified breaker on our storage.
OUR_BREAKER = Contender("our breaker, Redis", True, our_breaker_redis, "pybreaker_redis")
OUR_STORAGE = Contender("our storage, Redis", True, our_redis, "pybreaker_redis")

#: Circuits with one listener, the first of our breaker.
HEARD = Contender("our breaker, Redis, one listener", True, our_breaker_heard, "pybreaker_redis")
REFERENCE_HEARD = Contender("pybreaker, memory, one listener", False, pybreaker_memory_heard, "pybreaker")

#: Names in the tables of the storages of `tests.support.fleet`.
STORAGES: dict[Make, str] = {"stock": "pybreaker", "ours": "pybreaker_redis"}

#: All contenders, in the order of the tables.
CONTENDERS = (
    REFERENCE,
    REFERENCE_HEARD,
    Contender("our breaker, memory", False, our_breaker_memory, "pybreaker_redis"),
    Contender("our storage, memory", False, our_memory, "pybreaker_redis"),
    Contender("interlock, memory", False, interlock_memory, "interlock"),
    Contender("nopanic, memory", False, nopanic_memory, "nopanic"),
    Contender("aiobreaker, memory", False, aiobreaker_memory, "aiobreaker"),
    STOCK,
    OUR_BREAKER,
    HEARD,
    OUR_STORAGE,
    Contender("interlock, Redis", True, interlock_redis, "interlock.integrations.redis"),
    Contender("nopanic, Redis", True, nopanic_redis, "nopanic_redis"),
    Contender("aiobreaker, Redis", True, aiobreaker_redis, "aiobreaker.storage.redis"),
    Contender("lasier, Redis", True, lasier_redis, "lasier.circuit_breaker.sync"),
)


def at_hand(*, sharing: bool = False) -> list[Contender]:
    """Return the contenders that can run here.

    Args:
        sharing: Whether to leave out circuits that are not shared through Redis.
    """
    return [item for item in CONTENDERS if not item.missing() and (item.shares or not sharing)]


def not_at_hand() -> list[str]:
    """Return the contenders that cannot run here, with the reason."""
    return [f"{item.name} ({reason})" for item in CONTENDERS if (reason := item.missing())]
