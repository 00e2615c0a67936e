"""Masters that Sentinels watch."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pybreaker_redis._redis.classify import is_instance_of_named
from pybreaker_redis._redis.endpoint import Address, Endpoint
from pybreaker_redis._redis.legacy import sentinel_tls_class


def sentinel_pool_of(client: Any) -> Any:
    """Return the pool of a client for a master that Sentinels watch (``None`` for any other client)."""
    pool = getattr(client, "connection_pool", None)
    return pool if hasattr(pool, "sentinel_manager") and getattr(pool, "is_master", False) else None


def is_demoted_master(error: Exception) -> bool:
    """Return whether a server reports that it is no longer a master, or redis-py reports that for the server."""
    text = str(error)
    return (
        is_instance_of_named(error, "ReadOnlyError") or "READONLY" in text or "previous master is now a slave" in text
    )


def verify_master(endpoint: Endpoint, connection: Any) -> None:
    """Raise an error if Sentinels have another master than the server of a connection.

    If so, redis-py's pool closes its idle connections.  Errors of the query are suppressed, because Sentinels that do
    not answer prove nothing.

    Args:
        endpoint: Endpoint of the connection.
        connection: The connection.

    Raises:
        ConnectionResetError: Sentinels have another master.
    """
    pool = endpoint.connection_arguments.get("connection_pool")
    if not getattr(pool, "is_master", False):
        return
    try:
        address = tuple(pool.get_master_address())  # type: ignore[union-attr]
    except Exception:  # noqa: BLE001
        return
    if address != (connection.host, connection.port):
        msg = "the master has moved"
        raise ConnectionResetError(msg)


def copy_manager(manager: Any, copy_client: Callable[[Any, float], Any], timeout: float) -> Any:
    """Return a copy of a pool's manager of Sentinels, with clients that keep deadlines.

    Args:
        manager: Manager of the user's pool.
        copy_client: Function that copies a client, given the seconds to wait for a single reply.
        timeout: Seconds for a whole operation.
    """
    manager = copy.copy(manager)
    # Each Sentinel gets a share of the time, and the master gets one.
    share = timeout / (len(manager.sentinels) + 1)
    manager.sentinels = [copy_client(sentinel, share) for sentinel in manager.sentinels]
    return manager


def client_of_service(
    hosts: Sequence[Address],
    service: str,
    arguments: Mapping[str, Any],
    sentinel_arguments: Mapping[str, Any],
    *,
    tls: Mapping[str, bool],
) -> Any:
    """Return a client of a master that Sentinels watch.

    Args:
        hosts: Sentinels.
        service: Name of the master.
        arguments: Arguments of the master's connections.
        sentinel_arguments: Arguments of the Sentinels' connections.
        tls: Argument that enables TLS (empty: no TLS).
    """
    library = importlib.import_module("redis.sentinel")
    arguments = dict(arguments)
    if tls:
        arguments["connection_class"] = sentinel_tls_class(library)
    sentinels = library.Sentinel(list(hosts), sentinel_kwargs={**sentinel_arguments, **tls}, **arguments)
    return sentinels.master_for(service)
