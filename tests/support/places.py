"""Places in which a circuit can live: single servers, Sentinels and clusters, and clients of each.

``PYBREAKER_REDIS_TEST_CLIENT=valkey`` selects clients of valkey-py instead of redis-py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import redis
import redis.sentinel

from pybreaker_redis._redis.keys import circuit_keys, slot_of
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.cluster import Nodes
from tests.support.sentinel import Sentinels
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

#: Environment variable that names the package of the clients.
VARIABLE = "PYBREAKER_REDIS_TEST_CLIENT"

#: Package of the clients, and prefix of its classes.
LIBRARY = os.environ.get(VARIABLE, "redis")
PREFIX = LIBRARY.capitalize()

KINDS = ("single server", "Sentinel", "Cluster")


def client_name() -> str:
    """Return the client library for people, with its version as far as relevant."""
    library = importlib.import_module(LIBRARY)
    major, minor, *_ = library.__version__.split(".")
    if LIBRARY == "valkey":
        return f"valkey-py {major}"
    # The third and the fourth changed much within their minor releases.
    name = f"redis-py {major}" if int(major) > 4 else f"redis-py {major}.{minor}"
    return f"{name}, redis-py-cluster" if importlib.util.find_spec("rediscluster") else name


def has_clusters() -> bool:
    """Return whether the client library has a client for clusters.

    redis-py has one from 4.1 on.  For redis-py 3 there is redis-py-cluster.
    """
    return bool(importlib.util.find_spec(f"{LIBRARY}.cluster") or importlib.util.find_spec("rediscluster"))


def cluster_client(port: int, **settings: Any) -> Any:
    """Return a client of a cluster."""
    if importlib.util.find_spec(f"{LIBRARY}.cluster"):
        made = getattr(importlib.import_module(f"{LIBRARY}.cluster"), f"{PREFIX}Cluster")
        return made(host="127.0.0.1", port=port, **settings)
    from rediscluster import RedisCluster

    return RedisCluster(startup_nodes=[{"host": "127.0.0.1", "port": port}], **settings)


def client_at(place: str, **settings: Any) -> Any:
    """Return a client of ``unix:PATH``, ``cluster:PORT`` or ``sentinel:PORT``."""
    kind, _, where = place.partition(":")
    if kind == "cluster":
        return cluster_client(int(where), **settings)
    library: Any = importlib.import_module(LIBRARY)
    if kind == "sentinel":
        sentinel: Any = importlib.import_module(f"{LIBRARY}.sentinel")
        manager = sentinel.Sentinel([("127.0.0.1", int(where))], sentinel_kwargs={**ONCE})
        return manager.master_for("shop", **settings)
    return getattr(library, PREFIX)(unix_socket_path=where, **{**ONCE, **settings})


class Place:
    """Place in which a circuit lives, as a context manager that starts and ends its servers.

    Args:
        kind: One of `KINDS`.
        found: Binary of the servers.
    """

    def __init__(self, kind: str, found: FoundServer) -> None:
        self.kind = kind
        self.found = found
        self._stack = contextlib.ExitStack()
        self._nodes: Nodes | None = None
        self._sentinels: Sentinels | None = None
        self._server: PrivateServer | None = None

    def __enter__(self) -> Place:
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            if self.kind == "Cluster":
                self._nodes = self._stack.enter_context(Nodes(self.found.binary))
            elif self.kind == "Sentinel":
                self._sentinels = Sentinels(self.found.binary, 1)
                self._stack.push(self._sentinels.stack)
            else:
                self._server = self._stack.enter_context(PrivateServer(self.found.binary, port=free_port()))
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """Address of the place for `client_at`."""
        if self._nodes:
            return f"cluster:{next(node.port for node in self._nodes.all if node.pid)}"
        if self._sentinels:
            return f"sentinel:{self._sentinels.sentinels[0].port}"
        assert self._server
        return f"unix:{self._server.unix_socket}"

    def keys(self, namespace: str) -> tuple[str, ...]:
        """Return the keys of a circuit in this place."""
        return circuit_keys(namespace, needs_one_slot=self._nodes is not None)

    def server_of(self, namespace: str) -> PrivateServer:
        """Return the server that holds a circuit."""
        if self._nodes:
            return self._nodes.primary_of(slot_of(self.keys(namespace)[0]))
        server = self._sentinels.master if self._sentinels else self._server
        assert server
        return server

    @contextlib.contextmanager
    def client_of(self, namespace: str) -> Iterator[redis.Redis]:
        """Yield a plain client of the server that holds a circuit."""
        with contextlib.closing(self.server_of(namespace).client(**ONCE)) as client:
            yield client

    @contextlib.contextmanager
    def killed(self, namespace: str) -> Iterator[None]:
        """Kill the server of a circuit for the block.

        Afterwards the server runs again without data, or, in a cluster, a replica has taken over.
        """
        killed = self.server_of(namespace)
        killed.kill()
        yield
        if self._nodes:
            self._nodes.wait_until_replaced(killed, slot_of(self.keys(namespace)[0]))
        else:
            killed.start()

    def restore(self) -> None:
        """Restart all servers, without data."""
        if self._nodes:
            for node in self._nodes.all:
                node.start()
            self._nodes.wait_until_whole()
            for slot in (0, 8000, 16000):
                self._nodes.run(self._nodes.primary_of(slot), "FLUSHALL")
            return
        # A failed test may have left the server dead.
        self.server_of("").start()
        with self.client_of("") as client:
            wait_for(client.ping, "the server answers")
            client.flushall()
