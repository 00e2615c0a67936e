"""This package's own connections to one server: pools made like the user's, one for each timeout.

Knows: pools, timeouts.  Does not know: circuits, outages.
"""

from __future__ import annotations

import threading
from typing import Any

from pybreaker_redis import _said
from pybreaker_redis._client import bounded_client, client_on_pool, close_idle_connections


class ConnectionPools:
    """The pools of one server."""

    def __init__(self) -> None:
        self._pools: dict[float, Any] = {}
        self._is_slow_client_logged = False
        self.after_fork()

    def after_fork(self) -> None:
        """In a child: renew the lock; a pool detects the fork by itself."""
        self._lock = threading.RLock()

    def client_for(self, client: Any, timeout: float | None) -> Any:
        """Return a client like another one, on connections of this package's own, where they can be had.

        Args:
            client: Of the server.
            timeout: Seconds for all of an operation; ``None``: on the client's connections, as long as those take.
        """
        if timeout is None:
            return client
        with self._lock:
            if timeout not in self._pools:
                own = bounded_client(client, timeout)
                if own is None and not self._pools:
                    _said.may_wait(client)
                self._pools[timeout] = own and own.connection_pool
            pool = self._pools[timeout]
        return client if pool is None else client_on_pool(client, pool)

    def log_slow_client(self, client: Any, seconds: float, timeout: float | None) -> None:
        """Log once that a client that is used as it is has waited by itself.

        Args:
            client: Of the server.
            seconds: That an operation has taken.
            timeout: Seconds that it should have taken at most; ``None``: it may take as long as it does.
        """
        if (
            timeout is None
            or self._pools.get(timeout) is not None
            or seconds <= 2 * timeout
            or self._is_slow_client_logged
        ):
            return
        self._is_slow_client_logged = True
        _said.waited(client, seconds, timeout)

    def close_idle(self) -> None:
        """Close the connections that are not in use just now."""
        for pool in list(self._pools.values()):
            if pool is not None:
                close_idle_connections(pool)
