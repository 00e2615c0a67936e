"""Fixtures for tests with application servers: a shop of each kind, and its listeners' connections."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pybreaker_redis.testing.servers import PrivateServer
from tests.contrib.hosts.kinds import Kind
from tests.contrib.hosts.shop import Shop
from tests.support.logs import ALARMS

#: Output of Celery about a worker that a test has killed in the middle of a task.
LOST_WORKER = re.compile(r'Task handler raised error: WorkerLostError.*?\n"""\n.*?\n"""\n', re.DOTALL)


@pytest.fixture
def open_shop(kind: Kind, server: PrivateServer, tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    """Function that starts the host of this test, with the arguments of `Shop`."""
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    if kind.missing():
        reason = f"not installed: {', '.join(kind.missing())}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    shops: list[Shop] = []
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Shop:
            shops.append(Shop(kind, server, tmp_path, **settings))
            return stack.enter_context(shops[-1])

        yield start
    for shop in shops:
        print(shop.log)
        lines = LOST_WORKER.sub("", shop.log).splitlines()
        assert not [line for line in lines if any(alarm in line for alarm in ALARMS)]


@pytest.fixture
def listening(client: redis.Redis) -> Callable[[], int]:
    """Function that returns the number of listeners' connections at the server."""
    return lambda: sum(connection["name"] == "pybreaker_redis" for connection in client.client_list())
