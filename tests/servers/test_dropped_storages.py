"""Storages that are dropped leave nothing behind, however many there were."""

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

#: Storages that are made and dropped.
STORAGES = 1000
#: Bytes that each may leave behind; tables that grow in steps account for these.
LEFT_MAX = 20

#: Where memory of this package is allocated: here, in weak collections, and in named tuples.
_OURS = [tracemalloc.Filter(True, pattern) for pattern in ("*/pybreaker_redis/*", "*weakref*", "<string>")]


def use(storage: Any) -> None:
    """Make calls with all that a call leaves for the next one."""
    breaker = CircuitBreaker(state_storage=storage)
    assert breaker.call(up) == up()
    with contextlib.suppress(Down):
        breaker.call(down)
    assert breaker.call(up) == up()


def left_by(make: Callable[[], Any]) -> None:
    """Make, use and drop storages; assert that they leave nothing behind, as soon as listeners have tidied up."""

    def drop_many() -> None:
        for _ in range(STORAGES):
            use(make())

    def held() -> int:
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(_OURS).traces)

    tracemalloc.start()
    try:
        # Tables have their size after this.
        drop_many()
        before = held()
        drop_many()
        wait_for(lambda: held() - before < LEFT_MAX * STORAGES, "little is left of the dropped storages")
    finally:
        tracemalloc.stop()


def test_dropped_memory_storages_leave_nothing_behind() -> None:
    """Tests make one for each test, and some applications one for each tenant."""
    left_by(lambda: CircuitMemoryStorage("closed"))


@pytest.mark.parametrize("circuits", [1, STORAGES], ids=["one circuit", "many circuits"])
def test_dropped_redis_storages_leave_nothing_behind(server: PrivateServer, circuits: int) -> None:
    """Listeners, servers and the list of storages of one circuit forget them."""
    numbers = itertools.count()
    with contextlib.closing(server.client()) as client:
        left_by(lambda: CircuitRedisStorage("closed", client, f"dropped-{next(numbers) % circuits}", timeout=10))
