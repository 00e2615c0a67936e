"""Dropped storages: any number of them leaves no memory behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from pybreaker import CircuitBreaker

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.wait import wait_for

#: Number of storages that are created and dropped.
STORAGES = 1000
#: Bytes that each storage may leave behind. Tables that grow in steps account for them.
LEFT_MAX_BYTES = 20

#: Origins of this package's memory: its modules, weak collections, and named tuples.
_OWN_MEMORY = [tracemalloc.Filter(True, pattern) for pattern in ("*/pybreaker_redis/*", "*weakref*", "<string>")]


def use(storage: Any) -> None:
    """Make calls, so that the storage has everything that a call leaves for the next one."""
    breaker = CircuitBreaker(state_storage=storage)
    assert breaker.call(up) == up()
    with contextlib.suppress(Down):
        breaker.call(down)
    assert breaker.call(up) == up()


def assert_nothing_left_by(make: Callable[[], Any]) -> None:
    """Create, use and drop storages.

    Assert that they leave no memory behind, as soon as listeners have removed them.
    """

    def drop_many() -> None:
        for _ in range(STORAGES):
            use(make())

    def held_bytes() -> int:
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(_OWN_MEMORY).traces)

    tracemalloc.start()
    try:
        # The tables reach their size here.
        drop_many()
        before = held_bytes()
        drop_many()
        wait_for(lambda: held_bytes() - before < LEFT_MAX_BYTES * STORAGES, "the release of dropped storages")
    finally:
        tracemalloc.stop()


def test_dropped_memory_storages_leave_nothing_behind() -> None:
    """Tests create a storage each, and some applications create one for each tenant."""
    assert_nothing_left_by(lambda: CircuitMemoryStorage("closed"))


@pytest.mark.parametrize("circuits", [1, STORAGES], ids=["one circuit", "many circuits"])
@pytest.mark.full
def test_dropped_redis_storages_leave_nothing_behind(server: PrivateServer, circuits: int) -> None:
    """Listeners, servers and the list of storages of one circuit drop their references."""
    numbers = itertools.count()
    with contextlib.closing(server.client()) as client:
        assert_nothing_left_by(
            lambda: CircuitRedisStorage("closed", client, f"dropped-{next(numbers) % circuits}", timeout=10)
        )
