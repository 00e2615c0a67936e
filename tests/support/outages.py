"""Series of guarded calls in an outage, and checks of a breaker's condition."""

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
from tests.support.inspect import storage_of

#: Seconds above which a call has waited for something.
WAIT_MIN_S = 0.1


#: Fewest calls of a series, on a machine of any speed.
CALLS_MIN = 12


@dataclass(frozen=True)
class CallSeries:
    """Some seconds of guarded calls, as their callers saw them.

    Attributes:
        took: Seconds of each call.
        reached: Number of calls that reached the dependency.
        unexpected: Errors that were neither the dependency's nor the breaker's.
    """

    took: list[float]
    reached: int
    unexpected: list[BaseException]

    @property
    def waits(self) -> int:
        """Number of calls that have waited for something."""
        return sum(seconds > WAIT_MIN_S for seconds in self.took)

    @property
    def usual(self) -> float:
        """Seconds that 99 % of the calls without a wait take at most."""
        return statistics.quantiles([seconds for seconds in self.took if seconds <= WAIT_MIN_S], n=100)[-1]


def calls(breaker: pybreaker.CircuitBreaker, seconds: float, *, failing: float) -> CallSeries:
    """Make calls in a row, of which this share fails."""
    chance = random.Random(seconds)
    series = CallSeries([], 0, [])
    reached = 0

    def dependency() -> None:
        nonlocal reached
        reached += 1
        if chance.random() < failing:
            raise Down

    until = time.monotonic() + seconds
    while time.monotonic() < until or len(series.took) < CALLS_MIN:
        with Stopwatch() as watch:
            try:
                breaker.call(dependency)
            except (Down, pybreaker.CircuitBreakerError):
                pass
            except BaseException as error:  # noqa: BLE001
                series.unexpected.append(error)
        series.took.append(watch.seconds)
        time.sleep(0.0005)
    return CallSeries(series.took, reached, series.unexpected)


def health_of(breaker: pybreaker.CircuitBreaker) -> Health:
    """Return the health of the breaker's storage."""
    health: Health = storage_of(breaker).health()
    return health


def is_back(breaker: pybreaker.CircuitBreaker) -> bool:
    """Make a call, and return whether this process uses the shared circuit again."""
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    health = health_of(breaker)
    return health.condition == "connected" and not health.is_own


def is_unreachable_for(breaker: pybreaker.CircuitBreaker) -> bool:
    """Make a call, and return whether this process has noticed the outage."""
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    return health_of(breaker).condition == "unreachable"
