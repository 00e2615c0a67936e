"""One circuit through all of its life, by two who know of each other only what Redis tells them.

Knows: breakers, conditions with deadlines.  Does not know: which servers, clients and rights there are.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import Health
from tests.support.breakers import Down, breaker_on, down, fails, up
from tests.support.inspect import storage_of
from tests.support.wait import wait_for

#: Seconds for which the two may go by what they know.
STALENESS = 0.3

#: A round trip and the time to notice, on a machine that does other things too, seconds.
SLACK = 2.0


class Two:
    """Two breakers of one circuit, each with a client of its own.

    Args:
        here: The client that is tested.
        there: Another way to the same database, so that neither hears of the other within the process.
        namespace: Of the circuit.
        operator: A client that may do anything.
    """

    def __init__(self, here: Any, there: Any, namespace: str, operator: redis.Redis) -> None:
        # A busy machine takes its time to shake hands by TLS; that Redis is away is not the subject here.
        words = {"fail_max": 2, "reset_timeout": 60, "max_staleness": STALENESS, "timeout": 2.0}
        self.here, self.there = (breaker_on(client, namespace, **words) for client in (here, there))
        self.both = (self.here, self.there)
        self.namespace = namespace
        self.operator = operator

    def agree_on(self, state: str) -> float:
        """Wait until both read this state; how many seconds that took."""
        began = time.monotonic()
        for breaker in self.both:
            wait_for(lambda breaker=breaker: breaker.current_state == state, f"both read {state}")
        return time.monotonic() - began

    def trip(self) -> None:
        """A failure here and one there are two."""
        for breaker in self.both:
            fails(breaker)
        assert self.agree_on("open") < STALENESS + SLACK
        for breaker in self.both:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)

    def recover(self) -> None:
        """One probe; whoever comes meanwhile is rejected."""

        def probe() -> None:
            with pytest.raises(pybreaker.CircuitBreakerError):
                self.there.call(down)

        for breaker in self.both:
            breaker.reset_timeout = 0.05
        began = time.monotonic()
        while True:
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                self.here.call(probe)
                break
            assert time.monotonic() < began + 5, "no probe"
        assert self.agree_on("closed") < STALENESS + SLACK

    def follow_a_foreign_writer(self) -> None:
        """As redis-cli, which tells nobody."""
        for state in ("open", "closed"):
            self.operator.set(f"{self.namespace}:pybreaker:state", state)
            assert self.agree_on(state) < STALENESS + SLACK

    def live(self) -> None:
        """All of it."""
        for breaker in self.both:
            # The server may be on its way back from an earlier test.
            wait_for(lambda breaker=breaker: breaker.call(up) and not health_of(breaker).is_own, "the shared circuit")
        self.trip()
        self.recover()
        self.follow_a_foreign_writer()
        with pytest.raises(Down):
            self.here.call(down)
        for breaker in self.both:
            assert health_of(breaker).condition == "connected", health_of(breaker)


def health_of(breaker: pybreaker.CircuitBreaker) -> Health:
    """What the breaker's storage says of its Redis."""
    health: Health = storage_of(breaker).health()
    return health


@contextlib.contextmanager
def said_of(caplog: pytest.LogCaptureFixture, server: str) -> Iterator[list[str]]:
    """What is said of a server meanwhile, down to what only matters to operators."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    already = len(caplog.records)
    said: list[str] = []
    yield said
    said += [record.getMessage() for record in caplog.records[already:] if server in record.getMessage()]
