"""This package's own connections to one server: pools made like the user's, one for each timeout.

Knows: pools, timeouts.  Does not know: circuits, outages.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import queue
import sys
from collections.abc import Mapping
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._redis.deadline import keep_deadlines
from pybreaker_redis._redis.endpoint import Endpoint, client_module_of, command_wait_limit, endpoint_of
from pybreaker_redis._redis.keys import plain_copy
from pybreaker_redis._runtime import redaction
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors
from pybreaker_redis._runtime.logger import emit

#: Seconds of waiting that a client may cause without a warning.
CLIENT_WAIT_WARNING_S = 1.0


class ConnectionPools(ForkSafe):
    """The pools of one server."""

    def __init__(self) -> None:
        self._pools: dict[float, Any] = {}
        #: One for all pools and for push connections, so that each uses a password that any of them has taken.
        self._credentials: Credentials | None = None
        self._is_slow_client_logged = False
        super().__init__()

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
                own = bounded_client(client, timeout, self._credentials)
                if own is None and not self._pools:
                    self._log_if_blocking(client)
                if own is not None:
                    self._credentials = own.connection_pool.connection_kwargs["credentials"]
                self._pools[timeout] = own and own.connection_pool
            pool = self._pools[timeout]
        return client if pool is None else client_on_pool(client, pool)

    def any_client(self, client: Any) -> Any:
        """Return a client on any of the pools; without a pool, the client itself."""
        for pool in list(self._pools.values()):
            if pool is not None:
                return client_on_pool(client, pool)
        return client

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
        emit(_log.client_blocked(type(client).__name__, seconds=seconds, timeout_s=timeout))

    @staticmethod
    def _log_if_blocking(client: Any) -> None:
        wait_s = command_wait_limit(client)
        if wait_s is None or wait_s > CLIENT_WAIT_WARNING_S:
            emit(_log.client_may_block(type(client).__name__, wait_s=wait_s))

    def close_idle(self) -> None:
        """Close the connections that are not in use just now."""
        for pool in list(self._pools.values()):
            if pool is not None:
                close_idle_connections(pool)


#: Most connections of one's own to a server.  One is enough unless threads ask at the same time.
POOL_CONNECTIONS_MAX = 50


def bounded_client(client: Any, timeout: float, credentials: Credentials | None = None) -> Any:
    """A plain client of the same library on connections of its own, which try once and keep deadlines (`deadline.py`).

    Methods of subclasses and of single objects are left out: they may wait, and retry.  What subclasses call the keys
    is found out before (`keys.py`).  Sentinels are asked on such connections, too, each for its share of the time.

    Args:
        client: Of a single server, or of a master that Sentinels know.
        timeout: Seconds to wait for a connection while all of them are in use.
        credentials: Credentials of another pool to the same server, to be shared; ``None``: those of the client.

    Returns:
        The copy, or ``None`` if there is no making one: it is a cluster's, not redis-py's kin, or no client at all.
    """
    # Whatever pools, connections and clients of somebody's own raise that are not made like the library's.
    with suppress_errors():
        return _copy_client(client, timeout, credentials=credentials)
    return None


def client_on_pool(client: Any, pool: Any) -> Any:
    """Return a plain client of the same library that uses another pool."""
    own = plain_copy(client)
    own.connection_pool = pool
    return own


def close_idle_connections(pool: Any) -> None:
    """Close the connections of a pool that nobody uses just now; whoever takes one of them connects anew."""
    idle = getattr(pool, "pool", None)
    if idle is None:
        with suppress_errors():
            pool.disconnect(inuse_connections=False)
        return
    # What is taken out of a blocking pool is in nobody else's hands.
    taken = []
    with contextlib.suppress(queue.Empty):
        while True:
            taken.append(idle.get_nowait())
    for connection in reversed(taken):
        with suppress_errors():
            if connection is not None:
                connection.disconnect()
        with contextlib.suppress(queue.Full):
            idle.put_nowait(connection)


def replace_credentials(client: Any, words: Mapping[str, Any]) -> bool:
    """Have a client on connections of our own authenticate by other words from now on; whether they differ."""
    own = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {}).get("credentials")
    return isinstance(own, Credentials) and own.switch_arguments(words)


def _copy_client(
    client: Any, timeout: float, longest: float | None = None, credentials: Credentials | None = None
) -> Any:
    endpoint = endpoint_of(client)
    library = client_module_of(client)
    if endpoint is None or library is None:
        msg = f"not redis-py's kin: {client!r}"
        raise TypeError(msg)
    credentials = credentials or Credentials(client.connection_pool.connection_kwargs)
    pool = _make_pool(client.connection_pool, library, endpoint, timeout, longest, credentials=credentials)
    # Now rather than in the middle of a call: the kinds of connection that need something else raise here.
    pool.connection_class(**pool.connection_kwargs)
    return client_on_pool(client, pool)


def _make_pool(
    pool: Any, library: Any, endpoint: Endpoint, timeout: float, longest: float | None, *, credentials: Credentials
) -> Any:
    connection_class = keep_deadlines(endpoint.connection_class, longest)
    words = {
        **endpoint.connection_arguments,
        "decode_responses": False,
        "socket_timeout": timeout,
        "credentials": credentials,
        "idle_limit": idle_limit(pool.connection_kwargs),
    }
    knows_protocols = "protocol" in inspect.signature(getattr(library, "AbstractConnection", object)).parameters
    if knows_protocols and longest is None:
        # Nothing is pushed here, and RESP2 every server speaks; redis-py 8 asks for more unless told not to.  What
        # Sentinels answer is understood in the protocol alone that their client was made for.
        words["protocol"] = 2
    if "path" not in words:
        # redis-py 3 does not know the word for unix sockets, where connecting takes no time.
        words["socket_connect_timeout"] = timeout
    notifications = sys.modules.get(f"{library.__name__.partition('.')[0]}.maint_notifications")
    if notifications:
        # They would ask every new connection for one answer more, and lengthen its timeouts at will.
        words["maint_notifications_config"] = notifications.MaintNotificationsConfig(enabled=False)
    if not hasattr(pool, "sentinel_manager"):
        words.update(max_connections=POOL_CONNECTIONS_MAX, timeout=timeout, connection_class=connection_class)
        return library.BlockingConnectionPool(**words)
    manager = copy.copy(pool.sentinel_manager)
    # Some time has to be left for the next Sentinel, and for the master.
    share = timeout / (len(manager.sentinels) + 1)
    manager.sentinels = [_copy_client(sentinel, timeout, share) for sentinel in manager.sentinels]
    del words["connection_pool"]
    words.update(connection_class=connection_class, is_master=pool.is_master, check_connection=pool.check_connection)
    return type(pool)(pool.service_name, manager, **words)


#: Seconds that a connection may be idle and is used again: load balancers forget silent ones after a minute or more,
#: and what is sent on these is never answered.
IDLE_MAX_S = 30.0


#: Seconds for which credentials are new: what was rejected before they were taken is worth another attempt.
NEW_CREDENTIALS_S = 1.0


_CREDENTIALS = ("username", "password", "credential_provider")


def idle_limit(words: Mapping[str, Any]) -> float:
    """Return for how many seconds a connection may be idle and is used again, as far as the client's words say."""
    interval = words.get("health_check_interval")
    return min(float(interval), IDLE_MAX_S) if isinstance(interval, int | float) and interval > 0 else IDLE_MAX_S


class Credentials:
    """The credentials of a client, as they are when a connection is made.

    Args:
        words: Of the client's connections: the mapping itself, which its owner changes when a password is replaced.
    """

    def __init__(self, words: Mapping[str, Any]) -> None:
        self._words = words
        self._switched_at = -math.inf

    def read_credentials(self) -> dict[str, Any]:
        """Return the credentials, by the word for each."""
        found = credentials_of(self._words)
        if found["credential_provider"] is not None:
            found["credential_provider"] = _RegisteringProvider(found["credential_provider"])
        redaction.register_secret(found["password"])
        return found

    def switch_arguments(self, words: Mapping[str, Any]) -> bool:
        """Use other words from now on; returns whether their credentials differ, or those of a moment ago did.

        Several threads are rejected at the same time, and one of them takes the new ones.
        """
        before, self._words = credentials_of(self._words), words
        if credentials_of(words) != before:
            self._switched_at = monotonic()
        return monotonic() - self._switched_at < NEW_CREDENTIALS_S


def credentials_of(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the credentials among words, ``None`` for each that is missing."""
    return {name: words.get(name) for name in _CREDENTIALS}


class _RegisteringProvider:
    """A credential provider whose secrets are masked from then on; everything else is the provider's own."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    @calls_user_code
    def get_credentials(self) -> Any:
        """Return what the provider returns."""
        credentials = self._provider.get_credentials()
        redaction.register_secret(credentials[-1])
        return credentials
