"""Ways to guard calls on a circuit in Redis, for fleets of `tests.support.fleet`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pybreaker
import redis

import pybreaker_redis
from tests.support.fleet import Make

#: Stock is pybreaker's breaker on its own storage, and storage the same breaker on ours.  Empty is no breaker: each
#: call sends one script that does nothing.
Way = Literal["stock", "storage", "breaker", "empty"]

#: Names in the tables.
WAYS: dict[Way, str] = {"stock": "pybreaker", "storage": "our storage", "breaker": "our breaker"}

#: Name of the way that no script can undercut.
EMPTY_SCRIPT = "a script that does nothing"

#: Ways with a listener in each process.
OURS: tuple[Way, ...] = ("storage", "breaker")


def make_of(way: Way) -> Make:
    """Return the origin of the storage."""
    return "ours" if way in OURS else "stock"


def breaker_on(storage: Any, way: Way, **settings: Any) -> pybreaker.CircuitBreaker:
    """Return a new breaker on a storage.

    Args:
        storage: Storage of the origin that `make_of` returns.
        way: Way to guard calls.
        settings: Settings of the breaker.
    """
    kind = pybreaker_redis.CircuitBreaker if way == "breaker" else pybreaker.CircuitBreaker
    return kind(state_storage=storage, **settings)


class EmptyScript:
    """Caller that sends one script per call, in place of a breaker.

    Args:
        client: Client of the server.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._digest = client.script_load("return 1")

    def call(self, function: Callable[..., object], *args: object) -> object:
        """Call a function, and send the script."""
        try:
            return function(*args)
        finally:
            self._client.evalsha(self._digest, 0)
