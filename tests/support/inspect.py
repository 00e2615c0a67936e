"""The only place where tests reach into private objects of the package."""

from __future__ import annotations

import threading
from typing import Any

import pybreaker
import redis

from pybreaker_redis._replica.connection import CONNECTION_NAME
from pybreaker_redis._replica.listener import LISTENER_THREAD_NAME
from pybreaker_redis._runtime import fork
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._servers.retry import RETRY_THREAD_NAME as KEEPER_NAME


def view_of(breaker: pybreaker.CircuitBreaker) -> Any:
    """What this process believes about the breaker's circuit."""
    return breaker._state_storage._core.shared._view  # type: ignore[attr-defined]


def listeners() -> list[threading.Thread]:
    """The listening threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == LISTENER_THREAD_NAME]


def keepers() -> list[threading.Thread]:
    """The threads of this process that ask again for a server that is away."""
    return [thread for thread in threading.enumerate() if thread.name == KEEPER_NAME]


def lines(client: redis.Redis) -> list[dict[str, str]]:
    """The connections of listeners, as the server lists them."""
    return [line for line in client.client_list() if line["name"] == CONNECTION_NAME]


def reset_in_child(item: ForkSafe) -> None:
    """Renew an object as a fork does in the child."""
    (item._renew_in_child if isinstance(item, ForkSafe) else item.after_fork)()


def pretend_fork() -> None:
    """Make this process look like a child that was forked without Python's hooks."""
    fork.process_id = -1
