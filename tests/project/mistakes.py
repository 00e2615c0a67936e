"""Mistakes that a type checker has to find: one in each line with the word at its end, and none in other lines."""

from __future__ import annotations

import asyncio

import pybreaker
import redis
import redis.asyncio

from pybreaker_redis import (
    BreakerRegistry,
    CircuitBreaker,
    CircuitMemoryStorage,
    CircuitOpenError,
    CircuitRedisStorage,
    LogListener,
    retry_after,
)

client = redis.Redis()
breakers = BreakerRegistry(client, fail_max=3, listeners=[LogListener()])
BreakerRegistry("redis://localhost", exclude=[KeyError, lambda error: True], ttl=None)
BreakerRegistry(lambda: client)
# The constants of pybreaker are plain text for type checkers.
CircuitRedisStorage(pybreaker.STATE_CLOSED, client, fallback_circuit_state=pybreaker.STATE_OPEN)
CircuitMemoryStorage(pybreaker.STATE_CLOSED)
breaker = CircuitBreaker(redis=client, name="payments", fallback=lambda cents: "later")


@breakers.guard("payments")
def charge(cents: int) -> str:
    """Charge."""
    return f"charged {cents}"


@breaker
async def charge_later(cents: int) -> str:
    """Charge."""
    return f"charged {cents}"


receipt: str = charge(995)
called: str = breaker.call(charge, 995)
waited: str = asyncio.run(charge_later(995))
with breaker.calling() as permit:
    permit.fail(OSError())
with breaker.admit() as permit:
    permit.release()
try:
    charge(995)
except CircuitOpenError as error:
    seconds: float = error.retry_after + retry_after(error)

BreakerRegistry(client, reset_timout=3)  # mistake
BreakerRegistry(client, fail_max="5")  # mistake
BreakerRegistry(7)  # mistake
BreakerRegistry(redis.asyncio.Redis())  # mistake
breakers.get("payments", fallback_circuit_state="opened")  # mistake
breakers.set_state("payments", "opened")  # mistake
CircuitRedisStorage("closed", "redis://localhost")  # mistake
CircuitRedisStorage.from_url("redis://localhost", probe_leas=3)  # mistake
CircuitMemoryStorage("closed", probe_lease="3")  # mistake
CircuitBreaker(redis=7, name="payments")  # mistake
charge("995")  # mistake
breaker.call(charge, "995")  # mistake
number: int = charge(995)  # mistake
asyncio.run(charge_later("995"))  # mistake
permit.generation = 3  # mistake
