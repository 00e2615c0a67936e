"""What tests of outages share."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from dataclasses import dataclass

import pybreaker

from pybreaker_redis import Health
from tests.support.breakers import Down, up
from tests.support.clock import Stopwatch

#: A call that takes longer than this has waited for something, seconds.
WAITED = 0.1


#: Calls of a spell, on however busy a machine.
FEWEST = 12


@dataclass(frozen=True)
class Spell:
    """Some seconds of guarded calls, as their callers saw them.

    Attributes:
        took: Seconds of each call.
        reached: How many reached the dependency.
        unexpected: Errors that were neither the dependency's nor the breaker's.
    """

    took: list[float]
    reached: int
    unexpected: list[BaseException]

    @property
    def waits(self) -> int:
        """How many of the calls have waited for something."""
        return sum(seconds > WAITED for seconds in self.took)

    @property
    def usual(self) -> float:
        """What 99 of 100 calls that have not waited take at most, seconds."""
        return statistics.quantiles([seconds for seconds in self.took if seconds <= WAITED], n=100)[-1]


def calls(breaker: pybreaker.CircuitBreaker, seconds: float, *, failing: float) -> Spell:
    """Make calls one after the other, of which so many in one fail."""
    chance = random.Random(seconds)
    spell = Spell([], 0, [])
    reached = 0

    def dependency() -> None:
        nonlocal reached
        reached += 1
        if chance.random() < failing:
            raise Down

    until = time.monotonic() + seconds
    while time.monotonic() < until or len(spell.took) < FEWEST:
        with Stopwatch() as watch:
            try:
                breaker.call(dependency)
            except (Down, pybreaker.CircuitBreakerError):
                pass
            except BaseException as error:  # noqa: BLE001
                spell.unexpected.append(error)
        spell.took.append(watch.seconds)
        time.sleep(0.0005)
    return Spell(spell.took, reached, spell.unexpected)


def health_of(breaker: pybreaker.CircuitBreaker) -> Health:
    """What the breaker's storage says of its Redis."""
    health: Health = breaker._state_storage.health()
    return health


def is_back(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether this process goes by the shared circuit again."""
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    health = health_of(breaker)
    return health.condition == "connected" and not health.is_own


def is_unreachable_for(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether this process knows that Redis is away."""
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    return health_of(breaker).condition == "unreachable"
