"""Types of arguments and results, as type checkers of users see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

#: State of a circuit.
State: TypeAlias = Literal["closed", "open", "half-open"]

#: State in which a local circuit begins: ``last`` is the state that was seen last.
FallbackState: TypeAlias = Literal["closed", "open", "half-open", "last"]


class RedisClient(Protocol):
    """Synchronous client of Redis: `redis.Redis`, `redis.cluster.RedisCluster`, `valkey.Valkey` and similar classes.

    A client of asyncio has another kind of context manager, so it does not fit.
    """

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute a command of Redis."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> Any: ...


#: Client, or function that returns one.
ClientSource: TypeAlias = "RedisClient | Callable[[], RedisClient]"
