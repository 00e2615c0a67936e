"""Table of the servers of this process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any

from pybreaker_redis._redis.endpoint import plain_endpoint_of
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._servers.server import Server


class ServerTable:
    """Servers by endpoint and user.  An entry lasts as long as circuits use the server."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._server_by_key: weakref.WeakValueDictionary[Hashable, Server] = weakref.WeakValueDictionary()
        renew_in_children(self)

    def after_fork(self) -> None:
        """Renew the lock in a child process."""
        self._lock = threading.RLock()

    def server_of(self, client: Any) -> Server:
        """Return the server of a client.  Add it if it is new."""
        shared: Any = getattr(client, "connection_pool", client)
        key = plain_endpoint_of(client) or id(shared)
        with self._lock:
            server = self._server_by_key.get(key)
            if server is None:
                server = self._server_by_key[key] = Server(client)
            return server


_servers = ServerTable()


def server_for(client: Any) -> Server:
    """Return the server of a client: one for all clients that reach it as the same user."""
    return _servers.server_of(client)
