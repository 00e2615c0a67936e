"""Every engine and server that can hold a circuit, in one table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import fakeredis
import pybreaker

from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.servers import FoundServer

#: ``make("closed", "namespace", **options)`` returns a storage.  Storages of one namespace share a circuit if possible.
MakeStorage = Callable[..., Any]

#: Function that returns the running, empty server of a binary.
TakeServer = Callable[[FoundServer], PrivateServer]


@dataclass(frozen=True)
class EngineCase:
    """One way to hold a circuit.

    Attributes:
        name: Name for test ids.
        opened: Context in which storages of this kind can be made.
        ours: Whether the storage is of this package.  Others are the reference.
        shared: Whether two storages of one namespace share a circuit.
        found: Server that holds the circuit.
    """

    name: str
    opened: Callable[[TakeServer], AbstractContextManager[MakeStorage]]
    ours: bool = True
    shared: bool = True
    found: FoundServer | None = None


@contextlib.contextmanager
def _reference(_: TakeServer) -> Iterator[MakeStorage]:
    yield lambda state="closed", namespace=None: pybreaker.CircuitMemoryStorage(state)


@contextlib.contextmanager
def _memory(_: TakeServer) -> Iterator[MakeStorage]:
    from pybreaker_redis import CircuitMemoryStorage

    yield lambda state="closed", namespace=None: CircuitMemoryStorage(state)


@contextlib.contextmanager
def _fakeredis(_: TakeServer, **settings: Any) -> Iterator[MakeStorage]:
    # Users' own tests have fakeredis without lupa, that is without scripts.
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer(), **settings)
    yield partial(_storage, client)


@contextlib.contextmanager
def _server(found: FoundServer, take: TakeServer, **settings: Any) -> Iterator[MakeStorage]:
    with contextlib.closing(take(found).client(**settings)) as client:
        yield partial(_storage, client)


@contextlib.contextmanager
def _server_without_scripts(found: FoundServer, take: TakeServer) -> Iterator[MakeStorage]:
    server = take(found)
    with contextlib.closing(server.client()) as client:
        administrator: Any = client  # redis-py has no types for raw commands
        administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
    with contextlib.closing(server.client(username="noscript", password="any")) as client:
        yield partial(_storage, client)


def _storage(client: Any, state: str = "closed", namespace: str | None = None, **options: Any) -> Any:
    from pybreaker_redis import CircuitRedisStorage

    # Tests write keys directly, so the storage must read them at every look.
    return CircuitRedisStorage(state, client, namespace=namespace, **{"max_staleness": 0, "timeout": 10, **options})


def _of_servers() -> Iterator[EngineCase]:
    for found in servers.at_hand():
        name = servers.name_of(found)
        yield EngineCase(name, partial(_server, found), found=found)
        yield EngineCase(f"{name}-decoded", partial(_server, found, decode_responses=True), found=found)
        yield EngineCase(f"{name}-optimistic", partial(_server_without_scripts, found), found=found)


#: Every engine case.
ENGINE_CASES = [
    EngineCase("reference", _reference, ours=False, shared=False),
    EngineCase("memory", _memory, shared=False),
    EngineCase("fakeredis", _fakeredis),
    EngineCase("fakeredis-decoded", partial(_fakeredis, decode_responses=True)),
    *_of_servers(),
]
