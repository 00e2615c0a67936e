"""Who is compared, and what does each of them do per call?

Knows: the packages that guard synchronous calls.  Does not know: how anything is measured.

All are asked in the shortest way that they document, on a redis-py client of their own.  None of them has listeners,
and all count failures in such a way that `Terms.fail_max` failures in a row trip them.
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

#: A `Terms.fail_max` that nothing reaches.
NEVER = 10**9

# Peers judge rates, not runs of failures: at this one, the calls that they must have seen before they judge decide.
_ANY_RATE = 1e-9


@dataclass(frozen=True)
class Terms:
    """What a circuit is to be.

    Attributes:
        circuit: Its name, not used before on the server.
        fail_max: Failures that trip it; of peers that judge rates: calls before they judge.
        reset_timeout: Seconds until an open circuit lets somebody try.
    """

    circuit: str
    fail_max: int = NEVER
    reset_timeout: float = 3600.0


@dataclass(frozen=True)
class Guard:
    """A circuit in use.

    Attributes:
        around: Turns a function into one that is guarded.
        rejection: What is raised instead of calling it.
        close: Ends what runs in the background.
    """

    around: Callable[[Callable[[], None]], Callable[[], Any]]
    rejection: type[Exception]
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """One way to guard a call.

    Attributes:
        name: For the tables.
        shares: Whether its circuits are shared over Redis.
        make: Makes a circuit; the client is for those that share.
        needs: Module without which it is not there.
    """

    name: str
    shares: bool
    make: Callable[[Terms, Any], Guard]
    needs: str

    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        try:
            import_module(self.needs)
        except Exception as error:  # noqa: BLE001 (a package that is too old for this Python fails as it likes)
            return f"{type(error).__name__}: {error}"
        return ""


# -- the breaker is pybreaker's, the storage differs -------------------------------------------------------------------


def _pybreaker(storage: Any, terms: Terms) -> Guard:
    breaker = pybreaker.CircuitBreaker(
        fail_max=terms.fail_max, reset_timeout=terms.reset_timeout, state_storage=storage
    )
    return Guard(lambda function: partial(breaker.call, function), pybreaker.CircuitBreakerError)


def pybreaker_memory(terms: Terms, client: Any) -> Guard:
    """Reads and sets attributes."""
    del client
    return _pybreaker(pybreaker.CircuitMemoryStorage("closed"), terms)


def our_memory(terms: Terms, client: Any) -> Guard:
    """Decides by the model, under a lock; of a success or a rejection it knows that nothing is to be decided."""
    del client
    return _pybreaker(pybreaker_redis.CircuitMemoryStorage("closed"), terms)


def pybreaker_redis_storage(terms: Terms, client: Any) -> Guard:
    """GET and SET for each look and each result."""
    return _pybreaker(pybreaker.CircuitRedisStorage("closed", client, namespace=terms.circuit), terms)


def our_redis(terms: Terms, client: Any) -> Guard:
    """One script where something is to be decided; looks at what this process was told, where it was told."""
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
    """Keeps the results of the last hundred calls, under a lock; looks at the clock twice."""
    del client
    return _interlock(terms, None)


def interlock_redis(terms: Terms, client: Any) -> Guard:
    """As in memory: each process counts for itself.  A trip is told to Redis, and read there once a second.

    A thread does both, so a call itself makes no round trip but that of a probe.
    """
    from interlock.integrations.redis import RedisStorage

    return _interlock(terms, RedisStorage(client))


def nopanic_memory(terms: Terms, client: Any) -> Guard:
    """Counts results in ten buckets of three seconds, under a lock."""
    from nopanic import CircuitOpen, circuit_breaker

    del client
    breaker = circuit_breaker(
        failure_threshold=_ANY_RATE, min_calls=terms.fail_max, reset_timeout=terms.reset_timeout, name=terms.circuit
    )
    return Guard(breaker, CircuitOpen)


def nopanic_redis(terms: Terms, client: Any) -> Guard:
    """One script to be admitted, one to report; the buckets are in Redis."""
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
    """Reads and sets attributes, without a lock: ``call``, its synchronous path."""
    from aiobreaker import CircuitBreakerState
    from aiobreaker.storage.memory import CircuitMemoryStorage

    del client
    return _aiobreaker(terms, CircuitMemoryStorage(CircuitBreakerState.CLOSED))


def aiobreaker_redis(terms: Terms, client: Any) -> Guard:
    """GET and SET for each look and each result, as pybreaker, of which it is a descendant."""
    from aiobreaker import CircuitBreakerState
    from aiobreaker.storage.redis import CircuitRedisStorage

    return _aiobreaker(terms, CircuitRedisStorage(CircuitBreakerState.CLOSED, client, namespace=terms.circuit))


class LasierRejected(Exception):
    """What lasier is told to raise."""


def lasier_redis(terms: Terms, client: Any) -> Guard:
    """GET before and after each call; failures in a row are those within a minute, and successes do not reset them.

    It has no half-open state: when the key of an open circuit expires, everybody is admitted.
    """
    from lasier.adapters.caches import RedisAdapter
    from lasier.circuit_breaker.rules import MaxFailuresRule
    from lasier.circuit_breaker.sync import CircuitBreaker

    rule = MaxFailuresRule(max_failures=terms.fail_max, failure_cache_key=terms.circuit)
    timeout = math.ceil(terms.reset_timeout)
    return Guard(CircuitBreaker(rule, RedisAdapter(client), LasierRejected, circuit_timeout=timeout), LasierRejected)


#: The one that all others are compared with.
REFERENCE = Contender("pybreaker, memory", False, pybreaker_memory, "pybreaker")

#: The storages of `tests.support.fleet`, and how the tables call them.
STORAGES: dict[Make, str] = {"stock": "pybreaker", "ours": "pybreaker_redis"}

#: In the order of the tables.
CONTENDERS = (
    REFERENCE,
    Contender("pybreaker_redis, memory", False, our_memory, "pybreaker_redis"),
    Contender("interlock, memory", False, interlock_memory, "interlock"),
    Contender("nopanic, memory", False, nopanic_memory, "nopanic"),
    Contender("aiobreaker, memory", False, aiobreaker_memory, "aiobreaker"),
    Contender("pybreaker, Redis", True, pybreaker_redis_storage, "pybreaker"),
    Contender("pybreaker_redis, Redis", True, our_redis, "pybreaker_redis"),
    Contender("interlock, Redis", True, interlock_redis, "interlock.integrations.redis"),
    Contender("nopanic, Redis", True, nopanic_redis, "nopanic_redis"),
    Contender("aiobreaker, Redis", True, aiobreaker_redis, "aiobreaker.storage.redis"),
    Contender("lasier, Redis", True, lasier_redis, "lasier.circuit_breaker.sync"),
)


def at_hand(*, sharing: bool = False) -> list[Contender]:
    """Those that can be measured here; only those that share, if so asked."""
    return [item for item in CONTENDERS if not item.missing() and (item.shares or not sharing)]


def not_at_hand() -> list[str]:
    """Those that cannot, and why."""
    return [f"{item.name} ({reason})" for item in CONTENDERS if (reason := item.missing())]
