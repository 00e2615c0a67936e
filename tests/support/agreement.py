"""Two clients of one circuit through its life cycle, where Redis is their only connection."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from tests.support.breakers import Down, breaker_on, down, fails, up
from tests.support.outages import health_of
from tests.support.wait import wait_for

#: Seconds for which each of the two may trust its view.
STALENESS = 0.3

#: Seconds for a round trip and for the notice of a change, on a busy machine.
SLACK = 2.0


class CircuitPair:
    """Two breakers of one circuit, each with its own client.

    Args:
        here: Client under test.
        there: Client with another connection to the same database, so that no change spreads within the process.
        namespace: Namespace of the circuit.
        operator: Client with all rights.
    """

    def __init__(self, here: Any, there: Any, namespace: str, operator: redis.Redis) -> None:
        # A TLS handshake is slow on a busy machine, and outages are not the subject of these tests.
        settings = {"fail_max": 2, "reset_timeout": 60, "max_staleness": STALENESS, "timeout": 2.0}
        self.here, self.there = (breaker_on(client, namespace, **settings) for client in (here, there))
        self.breakers = (self.here, self.there)
        self.namespace = namespace
        self.operator = operator

    def wait_until_both_read(self, state: str) -> float:
        """Wait until both breakers read this state, and return the seconds that took."""
        began = time.monotonic()
        for breaker in self.breakers:
            wait_for(lambda breaker=breaker: breaker.current_state == state, f"both breakers read {state}")
        return time.monotonic() - began

    def trip(self) -> None:
        """Trip the circuit by one failure of each breaker."""
        for breaker in self.breakers:
            fails(breaker)
        assert self.wait_until_both_read("open") < STALENESS + SLACK
        for breaker in self.breakers:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)

    def recover(self) -> None:
        """Close the circuit by one probe, during which the other breaker rejects calls."""

        def probe() -> None:
            with pytest.raises(pybreaker.CircuitBreakerError):
                self.there.call(down)

        for breaker in self.breakers:
            breaker.reset_timeout = 0.05
        began = time.monotonic()
        while True:
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                self.here.call(probe)
                break
            assert time.monotonic() < began + 5, "no probe"
        assert self.wait_until_both_read("closed") < STALENESS + SLACK

    def follow_foreign_writer(self) -> None:
        """Change the state as redis-cli does, without a PUBLISH, and wait until both breakers follow."""
        for state in ("open", "closed"):
            self.operator.set(f"{self.namespace}:pybreaker:state", state)
            assert self.wait_until_both_read(state) < STALENESS + SLACK

    def run_lifecycle(self) -> None:
        """Take the circuit through its life cycle."""
        for breaker in self.breakers:
            # The server may still be returning from an outage of an earlier test.
            wait_for(
                lambda breaker=breaker: breaker.call(up) and not health_of(breaker).is_own,
                "the shared circuit is in use again",
            )
        self.trip()
        self.recover()
        self.follow_foreign_writer()
        with pytest.raises(Down):
            self.here.call(down)
        for breaker in self.breakers:
            assert health_of(breaker).condition == "connected", health_of(breaker)


@contextlib.contextmanager
def log_lines_about(caplog: pytest.LogCaptureFixture, server: str) -> Iterator[list[str]]:
    """Yield a list that receives the log lines about a server, including those of level INFO."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    already = len(caplog.records)
    lines: list[str] = []
    yield lines
    lines += [record.getMessage() for record in caplog.records[already:] if server in record.getMessage()]
