"""Where can a circuit live, and how does a process get there?

Knows: single servers, Sentinels, clusters, and clients of each in the versions that are installed.  Does not know:
circuits.

``PYBREAKER_REDIS_TEST_CLIENT=valkey`` has the clients made by valkey-py instead of redis-py.
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

#: Names the package that clients are made with.
VARIABLE = "PYBREAKER_REDIS_TEST_CLIENT"

#: That package, and what its clients are called after.
LIBRARY = os.environ.get(VARIABLE, "redis")
PREFIX = LIBRARY.capitalize()

KINDS = ("single server", "Sentinel", "Cluster")


def client_name() -> str:
    """For people: which client library, and its version as far as it matters."""
    library = importlib.import_module(LIBRARY)
    major, minor, *_ = library.__version__.split(".")
    if LIBRARY == "valkey":
        return f"valkey-py {major}"
    # Much had changed within the fourth and the third.
    name = f"redis-py {major}" if int(major) > 4 else f"redis-py {major}.{minor}"
    return f"{name}, redis-py-cluster" if importlib.util.find_spec("rediscluster") else name


def has_clusters() -> bool:
    """Whether there is a client for clusters: redis-py's own, from 4.1 on, or redis-py-cluster, of redis-py 3."""
    return bool(importlib.util.find_spec(f"{LIBRARY}.cluster") or importlib.util.find_spec("rediscluster"))


def cluster_client(port: int, **words: Any) -> Any:
    """A client of a cluster, as people make it."""
    if importlib.util.find_spec(f"{LIBRARY}.cluster"):
        made = getattr(importlib.import_module(f"{LIBRARY}.cluster"), f"{PREFIX}Cluster")
        return made(host="127.0.0.1", port=port, **words)
    from rediscluster import RedisCluster

    return RedisCluster(startup_nodes=[{"host": "127.0.0.1", "port": port}], **words)


def client_at(place: str, **words: Any) -> Any:
    """A client of ``unix:PATH``, ``cluster:PORT`` or ``sentinel:PORT``."""
    kind, _, where = place.partition(":")
    if kind == "cluster":
        return cluster_client(int(where), **words)
    library: Any = importlib.import_module(LIBRARY)
    if kind == "sentinel":
        sentinel: Any = importlib.import_module(f"{LIBRARY}.sentinel")
        manager = sentinel.Sentinel([("127.0.0.1", int(where))], sentinel_kwargs={**ONCE})
        return manager.master_for("shop", **words)
    return getattr(library, PREFIX)(unix_socket_path=where, **{**ONCE, **words})


class Place:
    """Where a circuit lives; a context manager, which makes it and ends it.

    Args:
        kind: One of `KINDS`.
        found: The server that it is made of.
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
        """What `client_at` takes."""
        if self._nodes:
            return f"cluster:{next(node.port for node in self._nodes.all if node.pid)}"
        if self._sentinels:
            return f"sentinel:{self._sentinels.sentinels[0].port}"
        assert self._server
        return f"unix:{self._server.unix_socket}"

    def keys(self, namespace: str) -> tuple[str, ...]:
        """Of a circuit that lives here."""
        return circuit_keys(namespace, needs_one_slot=self._nodes is not None)

    def home(self, namespace: str) -> PrivateServer:
        """The server on which a circuit lies."""
        if self._nodes:
            return self._nodes.primary_of(slot_of(self.keys(namespace)[0]))
        server = self._sentinels.master if self._sentinels else self._server
        assert server
        return server

    @contextlib.contextmanager
    def asked(self, namespace: str) -> Iterator[redis.Redis]:
        """A plain client of the server on which a circuit lies."""
        with contextlib.closing(self.home(namespace).client(**ONCE)) as client:
            yield client

    @contextlib.contextmanager
    def gone(self, namespace: str) -> Iterator[None]:
        """The server is killed, and afterwards there again, with nothing in it; of a cluster a replica takes over."""
        killed = self.home(namespace)
        killed.kill()
        yield
        if self._nodes:
            self._nodes.wait_until_replaced(killed, slot_of(self.keys(namespace)[0]))
        else:
            killed.start()

    def whole(self) -> None:
        """Everything runs, with nothing in it."""
        if self._nodes:
            for node in self._nodes.all:
                node.start()
            self._nodes.wait_until_whole()
            for slot in (0, 8000, 16000):
                self._nodes.run(self._nodes.primary_of(slot), "FLUSHALL")
            return
        # A test that failed may have left it dead.
        self.home("").start()
        with self.asked("") as client:
            wait_for(client.ping, "it answers")
            client.flushall()
