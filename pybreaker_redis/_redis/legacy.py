"""Support of redis-py 3 and of redis-py-cluster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import redis
import redis.client

#: Whether redis-py has an option that leaves the reply to a single command undecoded.
HAS_NEVER_DECODE = hasattr(redis.client, "NEVER_DECODE")


def client_without_decoding(client: Any) -> Any:
    """Return a client that leaves replies undecoded where a command demands that.

    redis-py 3 decodes all replies of a client or none.  So a client that decodes is replaced by another one of the same
    server.
    """
    pool = getattr(client, "connection_pool", None)
    if HAS_NEVER_DECODE or not pool or not pool.connection_kwargs.get("decode_responses"):
        return client
    arguments = {**pool.connection_kwargs, "decode_responses": False}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **arguments))


def connect_timeout_arguments(arguments: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return the argument for the connect timeout (none for a unix socket, where redis-py 3 does not accept one).

    Args:
        arguments: Arguments of the connection.
        seconds: Connect timeout, seconds.
    """
    return {} if "path" in arguments else {"socket_connect_timeout": seconds}


def sentinel_tls_class(library: Any) -> type[Any]:
    """Return a class of connections by TLS to a master that Sentinels watch, as redis-py 4 and later have one.

    Args:
        library: Module ``redis.sentinel``.
    """
    return type("SentinelManagedSSLConnection", (library.SentinelManagedConnection, redis.SSLConnection), {})


def nodes_of_redis_py_cluster(client: Any) -> Any:
    """Return the node manager of a client of redis-py-cluster (``None`` for any other client)."""
    pool = getattr(client, "connection_pool", None)
    return getattr(pool, "nodes", None) if type(pool).__module__.startswith("rediscluster") else None


#: Host and port, as `endpoint.Address`.  This module is imported by `endpoint`.
_Address = tuple[str, int]


def topology_of_redis_py_cluster(
    client: Any, nodes: Any
) -> tuple[Callable[[_Address], Any], list[_Address], Callable[[int], _Address | None], Callable[[_Address], _Address]]:
    """Return the arguments of `ClusterTopology` for a client of redis-py-cluster.

    Args:
        client: The client.
        nodes: Its node manager.

    Returns:
        The arguments ``make``, ``seeds``, ``find`` and ``remap``.
    """

    def make(address: _Address) -> Any:
        return nodes.get_redis_link(*address)

    def find(slot: int) -> _Address | None:
        primary_and_replicas = nodes.slots.get(slot)
        if not primary_and_replicas:
            return None
        return primary_and_replicas[0]["host"], int(primary_and_replicas[0]["port"])

    def remap(address: _Address) -> _Address:
        host, port = nodes.remap_internal_node_object(list(address))
        return host, int(port)

    seeds = [*nodes.startup_nodes, *nodes.nodes.values()]
    return make, [(node["host"], int(node["port"])) for node in seeds], find, remap


def client_of_redis_py_cluster(hosts: list[_Address], arguments: Mapping[str, Any]) -> Any:
    """Return a client of redis-py-cluster.

    Args:
        hosts: Nodes to begin with.
        arguments: Further arguments of the client.
    """
    library = importlib.import_module("rediscluster")
    return library.RedisCluster(
        **arguments,
        # The check uses a command that managed servers do not have.
        skip_full_coverage_check=True,
        startup_nodes=[{"host": host, "port": port} for host, port in hosts],
    )
