"""Which commands the running thread sends one by one to the server of a client, on any connection of its class."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from pybreaker import CircuitBreakerError

from pybreaker_redis.testing.servers import PrivateServer

#: Commands by which connections introduce themselves.
GREETINGS = frozenset(("AUTH", "CLIENT", "HELLO", "SELECT"))


@contextlib.contextmanager
def commands_sent(client: Any) -> Iterator[list[str]]:
    """Record the names of commands, but for greetings and what pipelines send.

    A storage has connections and clients of its own, whose class descends from that of the client's connections.
    """
    connection_class, caller, sent = client.connection_pool.connection_class, threading.get_ident(), []
    send_command = connection_class.send_command

    def record(self: Any, *words: Any, **options: Any) -> Any:
        if threading.get_ident() == caller and words[0] not in GREETINGS:
            sent.append(words[0])
        return send_command(self, *words, **options)

    with mock.patch.object(connection_class, "send_command", record):
        yield sent


class Down(Exception):
    """The dependency is down."""


class Meter:
    """Round trips of one client, counted by its server.

    The server counts how often it has read from a connection.  A command, a script and a pipeline are one read each;
    the commands within a script are none.  A listener's heartbeat would be counted, too: where there is one, the
    scripts are counted, which it never runs, and which are all that a storage sends.

    Args:
        server: That counts.
        scripts: Whether to count scripts.
    """

    def __init__(self, server: PrivateServer, *, scripts: bool = False) -> None:
        self._client = server.client()
        self._scripts = scripts
        # That a connection has gone is a read, too, and redis-py 3 leaves sockets to the garbage collector.
        gc.collect()
        deadline = time.monotonic() + 10
        while not scripts and self._reads() + 1 != self._reads():
            assert time.monotonic() < deadline, "somebody else keeps the server busy"

    def cost(self, action: Callable[[], Any]) -> int:
        """Round trips that `action` makes on connections that are already open."""
        gc.disable()
        try:
            before = self._reads()
            with contextlib.suppress(Down, CircuitBreakerError):
                action()
            return self._reads() - before - (not self._scripts)
        finally:
            gc.enable()

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _reads(self) -> int:
        if self._scripts:
            stats = self._client.info("commandstats")
            return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))
        return int(self._client.info("stats")["total_reads_processed"])
