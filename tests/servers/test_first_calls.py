"""First calls of a process: the first failure, trip, rejection and recovery cost what later ones cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pybreaker
import pytest
import redis

import pybreaker_redis
from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import settled, up
from tests.support.round_trips import Down, Meter
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

RESET_TIMEOUT = 0.05

#: Round trips of each step, by breaker.
COSTS: list[tuple[Callable[..., pybreaker.CircuitBreaker], dict[str, int]]] = [
    (pybreaker_redis.CircuitBreaker, {"success": 0, "failure": 1, "trip": 1, "rejected call": 0, "recovery": 3}),
    (pybreaker.CircuitBreaker, {"success": 0, "failure": 1, "trip": 2, "rejected call": 0, "recovery": 4}),
]


def down() -> None:
    """Raise the error of a failed dependency."""
    raise Down


@pytest.mark.unmodified
@pytest.mark.parametrize(("make", "expected"), COSTS, ids=["ours", "unmodified"])
def test_first_call_of_each_kind_costs_what_later_ones_cost(
    every_server: PrivateServer, make: Callable[..., pybreaker.CircuitBreaker], expected: dict[str, int]
) -> None:
    """The listener loads the scripts when it connects, so no call sends a source."""
    with contextlib.closing(every_server.client()) as client:
        client.script_flush()
        for cycle in ("first", "second"):
            breaker = settled(make(fail_max=2, reset_timeout=60, state_storage=storage_of(client, cycle)))
            with contextlib.closing(Meter(every_server, scripts=True)) as meter:
                costs = {"success": meter.cost(lambda: breaker.call(up))}  # noqa: B023
                costs["failure"] = meter.cost(lambda: breaker.call(down))  # noqa: B023
                costs["trip"] = meter.cost(lambda: breaker.call(down))  # noqa: B023
                costs["rejected call"] = meter.cost(lambda: breaker.call(up))  # noqa: B023
                breaker.reset_timeout = RESET_TIMEOUT
                wait_for(lambda: pybreaker_redis.retry_after(breaker) == 0, "the end of the timeout")  # noqa: B023
                costs["recovery"] = meter.cost(lambda: breaker.call(up))  # noqa: B023
            assert costs == expected, cycle
            assert breaker.current_state == "closed"


def storage_of(client: redis.Redis, namespace: str) -> Any:
    """Return a storage with views that stay trusted during the steps."""
    return CircuitRedisStorage("closed", client, namespace, timeout=10, max_staleness=60)
