"""How does a worker in another process reach the place that a test has made?

Knows: clients of single servers, Sentinels and clusters, in the versions that are installed.  Does not know: circuits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import redis
import redis.sentinel

from tests.servers import ONCE

#: Whether there is a client for clusters: redis-py's own, from 4.1 on, or redis-py-cluster, which needs redis-py 3.
HAS_CLUSTERS = any(importlib.util.find_spec(name) for name in ("redis.cluster", "rediscluster"))


def cluster_client(port: int, **words: Any) -> Any:
    """A client of a cluster, as people make it."""
    if importlib.util.find_spec("redis.cluster"):
        from redis.cluster import RedisCluster

        return RedisCluster(host="127.0.0.1", port=port, **words)
    from rediscluster import RedisCluster

    return RedisCluster(startup_nodes=[{"host": "127.0.0.1", "port": port}], **words)


def client_at(place: str, **words: Any) -> Any:
    """A client of ``unix:PATH``, ``cluster:PORT`` or ``sentinel:PORT``."""
    kind, _, where = place.partition(":")
    if kind == "cluster":
        return cluster_client(int(where), **words)
    if kind == "sentinel":
        manager = redis.sentinel.Sentinel([("127.0.0.1", int(where))], sentinel_kwargs={**ONCE})
        return manager.master_for("shop", **words)
    return redis.Redis(unix_socket_path=where, **{**ONCE, **words})
