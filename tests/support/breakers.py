"""What tests of the view have in common: storages that are known to hear, and conditions with deadlines.

Knows: storages, the listener's names.  Does not know: which promise is being tested.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pybreaker
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._line import CONNECTION_NAME
from pybreaker_redis._listener import LISTENER_THREAD_NAME
from pybreaker_redis._server import RETRY_THREAD_NAME as KEEPER_NAME

#: Seconds after which a condition that has not come true never will.
DEADLINE = 10.0

NAMESPACE = "viewed"

#: What a line may speak: with 3 the server tells of foreign changes, with 2 only of published ones.
PROTOCOLS = [3, 2] if "protocol" in inspect.signature(redis.Redis).parameters else [2]


class Down(Exception):
    """The dependency is down."""


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """What it shows."""
        return self.now


def up() -> str:
    """The dependency is well."""
    return "answer"


def down() -> None:
    """The dependency is down."""
    raise Down


def wait_for(condition: Callable[[], Any], what: str, within: float = DEADLINE) -> float:
    """Wait until a condition holds; how many seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within, f"not within {within} s: {what}"
        time.sleep(0.0005)
    return time.monotonic() - began


def breaker_on(client: Any, namespace: str = NAMESPACE, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that has made a call; words of the breaker may be among those of the storage."""
    of_breaker = {name: words.pop(name) for name in ("fail_max", "reset_timeout", "success_threshold") if name in words}
    storage = CircuitRedisStorage("closed", client, namespace, **words)
    return pybreaker.CircuitBreaker(state_storage=storage, **of_breaker)


def view_of(breaker: pybreaker.CircuitBreaker) -> Any:
    """What this process believes about the breaker's circuit."""
    return breaker._state_storage._core.shared._view  # type: ignore[attr-defined]


def settled(breaker: pybreaker.CircuitBreaker) -> pybreaker.CircuitBreaker:
    """The breaker, when its calls need no Redis any more."""

    def is_settled() -> bool:
        breaker.call(up)
        view = view_of(breaker)
        return bool(view.is_trusted and view.fast_path.quiet_admission)

    wait_for(is_settled, "calls that need no round trip")
    return breaker


def fails(breaker: pybreaker.CircuitBreaker, times: int = 1) -> None:
    """So many guarded calls fail."""
    for _ in range(times):
        with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
            breaker.call(down)


def listeners() -> list[threading.Thread]:
    """The listening threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == LISTENER_THREAD_NAME]


def keepers() -> list[threading.Thread]:
    """The threads of this process that ask again for a server that is away."""
    return [thread for thread in threading.enumerate() if thread.name == KEEPER_NAME]


def lines(client: redis.Redis) -> list[dict[str, str]]:
    """The connections of listeners, as the server lists them."""
    return [line for line in client.client_list() if line["name"] == CONNECTION_NAME]


@contextlib.contextmanager
def counted(client: redis.Redis) -> Iterator[dict[str, int]]:
    """What the server was asked meanwhile, by command; what a script does counts, too."""
    client.config_resetstat()
    asked: dict[str, int] = {}
    yield asked
    asked.update({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()})
    asked.pop("config|resetstat", None)
    asked.pop("info", None)
