"""Connection pools of this package: copies of the user's pool with connections that keep deadlines."""

from __future__ import annotations

import contextlib
import inspect
import math
import queue
import sys
from collections.abc import Mapping
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._redis.connections.deadline import keep_deadlines
from pybreaker_redis._redis.connections.spare import SpareConnections
from pybreaker_redis._redis.endpoint import Endpoint, client_module_of, command_wait_limit, endpoint_of
from pybreaker_redis._redis.keys import plain_copy
from pybreaker_redis._redis.legacy import connect_timeout_arguments
from pybreaker_redis._redis.sentinel import copy_manager
from pybreaker_redis._runtime import redaction
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors
from pybreaker_redis._runtime.logger import emit

#: Longest wait of a client, seconds, that causes no warning.
CLIENT_WAIT_WARNING_S = 1.0

#: Connections of one pool, at most.  One connection is enough unless threads use Redis at the same time.
POOL_CONNECTIONS_MAX = 50

#: Seconds of silence after which a connection is replaced.  Load balancers drop silent connections after a minute or
#: more, and commands on such a connection get no reply.
IDLE_MAX_S = 30.0

#: Seconds for which credentials count as new.  A command that was rejected before the change is worth a retry.
NEW_CREDENTIALS_S = 1.0

#: Arguments of a connection that are credentials.
_CREDENTIALS = ("username", "password", "credential_provider")


class ConnectionPools(ForkSafe):
    """Pools of one server, one for each timeout."""

    def __init__(self) -> None:
        self._pools: dict[float, Any] = {}
        #: One for all pools and for push connections, so that each uses a password that any of them has taken.
        self._credentials: Credentials | None = None
        self._is_slow_client_logged = False
        super().__init__()

    def client_for(self, client: Any, timeout: float | None) -> Any:
        """Return a copy of a client that uses this package's connections.

        Args:
            client: Client of the server.
            timeout: Seconds for a whole operation (``None``: use the client as it is).

        Returns:
            The copy, or the client itself if no connections like the client's can be made.
        """
        if timeout is None:
            return client
        with self._lock:
            if timeout not in self._pools:
                bounded = bounded_client(client, timeout, self._credentials)
                if bounded is None and not self._pools:
                    self._log_if_blocking(client)
                if bounded is not None:
                    self._credentials = bounded.connection_pool.connection_kwargs["credentials"]
                self._pools[timeout] = bounded and bounded.connection_pool
            pool = self._pools[timeout]
        return client if pool is None else client_on_pool(client, pool)

    def any_client(self, client: Any) -> Any:
        """Return a copy of a client on any of the pools, or the client itself without a pool."""
        for pool in list(self._pools.values()):
            if pool is not None:
                return client_on_pool(client, pool)
        return client

    def log_slow_client(self, client: Any, seconds: float, timeout: float | None) -> None:
        """Log once that a client that is used as it is has exceeded the timeout.

        Args:
            client: Client of the server.
            seconds: Duration of an operation.
            timeout: Seconds that the operation may take (``None``: no limit).
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
        """Close the connections that no thread uses at present."""
        for pool in list(self._pools.values()):
            if pool is not None:
                close_idle_connections(pool)


def bounded_client(client: Any, timeout: float, credentials: Credentials | None = None) -> Any:
    """Return a plain client of the same library on connections that do not retry, and keep deadlines (`deadline.py`).

    Methods of subclasses and of single objects are left out, because they may wait and retry.  `keys.py` finds the
    names that such methods give to keys.  Sentinels are queried on such connections, too, each for a share of the time.

    Args:
        client: Client of a single server, or of a master that Sentinels watch.
        timeout: Seconds to wait for a connection while all connections are in use.
        credentials: Credentials of another pool to the same server, to be shared (``None``: those of the client).

    Returns:
        The copy (``None`` if the client is a cluster's, or of no known library).
    """
    # Classes of the user may raise anything if they are not made like the library's.
    with suppress_errors():
        return _copy_client(client, timeout, credentials=credentials)
    return None


def client_on_pool(client: Any, pool: Any) -> Any:
    """Return a plain client of the same library that uses another pool."""
    plain = plain_copy(client)
    plain.connection_pool = pool
    return plain


def close_idle_connections(pool: Any) -> None:
    """Close the connections of a pool that no thread uses at present, so that the next use of each connects again."""
    if (spare := getattr(pool, "spare_connections", None)) is not None:
        spare.release_all()
    idle = getattr(pool, "pool", None)
    if idle is None:
        with suppress_errors():
            pool.disconnect(inuse_connections=False)
        return
    # No other thread can get a connection while it is taken out of a blocking pool.
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


def replace_credentials(client: Any, arguments: Mapping[str, Any]) -> bool:
    """Replace the credentials of a client on this package's connections.

    Args:
        client: Copy of a client, see `bounded_client`.
        arguments: Arguments of the user's connections that contain the new credentials.

    Returns:
        Whether a retry is worthwhile, because the credentials differ or have changed a moment ago.
    """
    credentials = _credentials_in(client)
    return credentials is not None and credentials.switch_arguments(arguments)


def has_new_credentials(client: Any) -> bool:
    """Whether the credentials of this package's connections have changed within `NEW_CREDENTIALS_S`."""
    return monotonic() - credentials_switched_at(client) < NEW_CREDENTIALS_S


def credentials_switched_at(client: Any) -> float:
    """Return when the credentials on connections of this package changed (`monotonic`, minus infinity if never)."""
    credentials = _credentials_in(client)
    return -math.inf if credentials is None else credentials.switched_at


def _credentials_in(client: Any) -> Credentials | None:
    credentials = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {}).get("credentials")
    return credentials if isinstance(credentials, Credentials) else None


def _copy_client(
    client: Any, timeout: float, longest: float | None = None, credentials: Credentials | None = None
) -> Any:
    endpoint = endpoint_of(client)
    library = client_module_of(client)
    if endpoint is None or library is None:
        msg = f"not of a known client library: {client!r}"
        raise TypeError(msg)
    credentials = credentials or Credentials(client.connection_pool.connection_kwargs)
    pool = _make_pool(client.connection_pool, library, endpoint, timeout, longest, credentials=credentials)
    # A connection class that needs other arguments raises here, and not in the middle of a call.
    pool.connection_class(**pool.connection_kwargs)
    return client_on_pool(client, pool)


def _make_pool(
    pool: Any, library: Any, endpoint: Endpoint, timeout: float, longest: float | None, *, credentials: Credentials
) -> Any:
    connection_class = keep_deadlines(endpoint.connection_class, longest)
    arguments = {
        **endpoint.connection_arguments,
        "decode_responses": False,
        "socket_timeout": timeout,
        "credentials": credentials,
        "idle_limit": idle_limit(pool.connection_kwargs),
    }
    has_protocol = "protocol" in inspect.signature(getattr(library, "AbstractConnection", object)).parameters
    if has_protocol and longest is None:
        # These connections receive no pushes, and every server supports RESP2.  redis-py 8 sends HELLO 3 by default.
        # Replies of Sentinels are parsed in the protocol of the Sentinels' client only.
        arguments["protocol"] = 2
    arguments.update(connect_timeout_arguments(arguments, timeout))
    notifications = sys.modules.get(f"{library.__name__.partition('.')[0]}.maint_notifications")
    if notifications:
        # Notifications would cost a round trip per connection, and would change its timeouts.
        arguments["maint_notifications_config"] = notifications.MaintNotificationsConfig(enabled=False)
    if not hasattr(pool, "sentinel_manager"):
        arguments.update(max_connections=POOL_CONNECTIONS_MAX, timeout=timeout, connection_class=connection_class)
        made = library.BlockingConnectionPool(**arguments)
        made.spare_connections = SpareConnections(made)
        return made
    manager = copy_manager(
        pool.sentinel_manager, lambda sentinel, share: _copy_client(sentinel, timeout, share), timeout
    )
    del arguments["connection_pool"]
    arguments.update(
        connection_class=connection_class, is_master=pool.is_master, check_connection=pool.check_connection
    )
    return type(pool)(pool.service_name, manager, **arguments)


def idle_limit(arguments: Mapping[str, Any]) -> float:
    """Return the seconds of silence after which a connection is replaced."""
    interval = arguments.get("health_check_interval")
    return min(float(interval), IDLE_MAX_S) if isinstance(interval, int | float) and interval > 0 else IDLE_MAX_S


class Credentials:
    """Credentials of a client, read for each connection.

    Args:
        arguments: Arguments of the client's connections: the mapping itself, which the application may change.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        #: When they changed (`monotonic`, or minus infinity if they never did).
        self.switched_at = -math.inf

    def read_credentials(self) -> dict[str, Any]:
        """Return the present credentials, by the name of the argument."""
        found = credentials_of(self._arguments)
        if found["credential_provider"] is not None:
            found["credential_provider"] = _RegisteringProvider(found["credential_provider"])
        redaction.register_secret(found["password"])
        return found

    def switch_arguments(self, arguments: Mapping[str, Any]) -> bool:
        """Use other arguments from now on.

        Several threads are rejected at the same time, and one of them finds the new credentials.

        Args:
            arguments: Arguments of the user's connections.

        Returns:
            Whether the credentials differ, or have changed within `NEW_CREDENTIALS_S`.
        """
        before, self._arguments = credentials_of(self._arguments), arguments
        if credentials_of(arguments) != before:
            self.switched_at = monotonic()
        return monotonic() - self.switched_at < NEW_CREDENTIALS_S


def credentials_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the credentials among the arguments of a connection (``None`` for each that is missing)."""
    return {name: arguments.get(name) for name in _CREDENTIALS}


class _RegisteringProvider:
    """Credential provider that registers secrets, and delegates everything to the user's provider."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    @calls_user_code
    def get_credentials(self) -> Any:
        """Return the credentials of the user's provider."""
        credentials = self._provider.get_credentials()
        redaction.register_secret(credentials[-1])
        return credentials
