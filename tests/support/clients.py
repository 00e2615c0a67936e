"""Every kind of client of a single server, in one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import redis
import valkey

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.servers import ONCE

try:
    from redis import CredentialProvider, UsernamePasswordCredentialProvider
except ImportError:
    CredentialProvider = None  # type: ignore[assignment,misc]


class Prefixing(redis.Redis):
    """Client that renames keys, as applications do that share a server."""

    prefix = ""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute a command with the prefix before its key."""
        if args[0] in ("GET", "SET"):
            args = (args[0], self.prefix + args[1], *args[2:])
        return super().execute_command(*args, **options)


Kind = Callable[[PrivateServer], Any]


def by_port(server: PrivateServer, **settings: Any) -> redis.Redis:
    """Return a client of the TCP port."""
    return redis.Redis(host="127.0.0.1", port=server.port, **settings)


def retrying(retries: int) -> dict[str, Any]:
    """Return arguments for a client with so many retries, or none if the library has no such setting."""
    if not ONCE:
        return {}
    return {"retry": redis.retry.Retry(redis.backoff.NoBackoff(), retries)}


def pooled(server: PrivateServer) -> redis.Redis:
    """Return a client with a pool that waits for a free connection."""
    pool = redis.BlockingConnectionPool(host="127.0.0.1", port=server.port, max_connections=1, timeout=7)
    return redis.Redis(connection_pool=pool)


def by_django(server: PrivateServer) -> Any:
    """Return a client from django-redis."""
    settings = pytest.importorskip("django.conf").settings
    cache = pytest.importorskip("django_redis.cache")
    if not settings.configured:
        settings.configure()
    # The client of `django_redis.get_redis_connection`, without the caches that other tests have configured.
    return cache.RedisCache(server.url, {"OPTIONS": {"SOCKET_TIMEOUT": 9}}).client.get_client(write=True)


#: Every kind of client of a single server, by a name for test ids.
KINDS: dict[str, Kind] = {
    "tcp": by_port,
    "password": lambda server: by_port(server, username="shop", password="secret"),
    "decoding": lambda server: by_port(server, decode_responses=True, encoding="latin-1"),
    "database": lambda server: by_port(server, db=3),
    "url": lambda server: redis.Redis.from_url(f"{server.url}?socket_timeout=9"),
    "unix": lambda server: redis.Redis(unix_socket_path=server.unix_socket, db=2),
    "patient": lambda server: by_port(server, socket_timeout=30, health_check_interval=1, **retrying(3)),
    "named": lambda server: by_port(server, client_name="shop"),
    "blocking pool": pooled,
    "subclass": lambda server: Prefixing(host="127.0.0.1", port=server.port),
    "single connection": lambda server: by_port(server, single_connection_client=True),
    "strict": lambda server: redis.StrictRedis(host="127.0.0.1", port=server.port),
    "valkey": lambda server: valkey.Valkey(host="127.0.0.1", port=server.port),
    "valkey resp3": lambda server: valkey.Valkey(host="127.0.0.1", port=server.port, protocol=3),
    "valkey unix": lambda server: valkey.Valkey(unix_socket_path=server.unix_socket, decode_responses=True),
    "django": by_django,
}
if CredentialProvider:
    KINDS["credentials"] = lambda server: by_port(
        server, credential_provider=UsernamePasswordCredentialProvider("shop", "secret")
    )
if "protocol" in inspect.signature(redis.Redis).parameters:
    KINDS["resp2"] = lambda server: by_port(server, protocol=2)
    KINDS["resp3"] = lambda server: by_port(server, protocol=3)


#: Kinds that stand for the others in a run without ``--full``.
SAMPLE = ("decoding", "resp2", "unix", "valkey")

#: Protocols of a push connection: the server tracks keys with RESP3, and only sends what is published with RESP2.
PROTOCOLS = [3, 2] if "protocol" in inspect.signature(redis.Redis).parameters else [2]
