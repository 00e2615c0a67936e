"""Commands and round trips of a client, counted in the client and at the server."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from pybreaker import CircuitBreakerError

from pybreaker_redis._redis.connections.spare import SpareConnections
from pybreaker_redis.testing.servers import PrivateServer

#: Commands at the begin of a connection.
GREETINGS = frozenset(("AUTH", "CLIENT", "HELLO", "SELECT"))


@contextlib.contextmanager
def commands_sent(client: Any) -> Iterator[list[str]]:
    """Record the names of commands that the calling thread sends one by one, without greetings and pipelines.

    A storage has its own connections and clients.  The class of these connections descends from the class of the
    client's.  On spare connections an engine sends commands that are already packed.
    """
    connection_class, caller, sent = client.connection_pool.connection_class, threading.get_ident(), []
    send_command = connection_class.send_command

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == caller and arguments[0] not in GREETINGS:
            sent.append(arguments[0])
        return send_command(self, *arguments, **options)

    execute = SpareConnections.execute

    def record_packed(self: SpareConnections, *command: Any) -> Any:
        if threading.get_ident() == caller:
            sent.append(command[0])
        return execute(self, *command)

    with (
        mock.patch.object(connection_class, "send_command", record),
        mock.patch.object(SpareConnections, "execute", record_packed),
    ):
        yield sent


class Down(Exception):
    """The dependency is down."""


class Meter:
    """Counter of one client's round trips, by the server's figures.

    The server counts how often it has read from a connection.  A command, a script and a pipeline are one read each.
    The commands within a script are none.  A listener's heartbeat would count, too.  Beside a listener the meter
    therefore counts scripts: a storage sends nothing but scripts, and a listener sends none.

    Args:
        server: Server that counts.
        scripts: Whether to count scripts.
    """

    def __init__(self, server: PrivateServer, *, scripts: bool = False) -> None:
        self._client = server.client()
        self._scripts = scripts
        # The end of a connection is a read, too, and redis-py 3 leaves sockets to the garbage collector.
        gc.collect()
        deadline = time.monotonic() + 10
        while not scripts and self._reads() + 1 != self._reads():
            assert time.monotonic() < deadline, "another client keeps the server busy"

    def cost(self, action: Callable[[], Any]) -> int:
        """Return the round trips of `action` on connections that are already open."""
        gc.disable()
        try:
            before = self._reads()
            with contextlib.suppress(Down, CircuitBreakerError):
                action()
            return self._reads() - before - (not self._scripts)
        finally:
            gc.enable()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _reads(self) -> int:
        if self._scripts:
            stats = self._client.info("commandstats")
            return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))
        return int(self._client.info("stats")["total_reads_processed"])
