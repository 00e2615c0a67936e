"""Endpoints: the server of a client, and the arguments that connect to it.

The functions read the connection pools of clients of redis-py, valkey-py and redis-py-cluster.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pybreaker_redis._redis.keys import has_plain_copy
from pybreaker_redis._redis.legacy import connect_timeout_arguments
from pybreaker_redis._runtime import redaction

#: Host and port.
Address = tuple[str, int]

#: Arguments that identify server, database and user.  Behind Sentinels, the pool has the name of the master.
_DATABASE_ARGUMENTS = frozenset(
    (
        *("host", "port", "path", "db", "connection_pool", "service_name"),
        *("username", "password", "credential_provider"),
    )
)


@dataclass(frozen=True)
class Endpoint:
    """Server with the arguments that connect to it.

    Endpoints are equal if their connections reach the same database as the same user, with the same options.

    Attributes:
        connection_class: Class of the pool's connections.
        identity: Values that distinguish servers, databases, users and options.
        connection_arguments: Arguments of the class.
        db: Number of the database.
    """

    connection_class: Any
    identity: EndpointIdentity
    connection_arguments: Mapping[str, Any] = field(compare=False)
    db: int

    @property
    def database_identity(self) -> EndpointIdentity:
        """Values that distinguish databases and users, with any options."""
        return tuple(item for item in self.identity if item[0] in _DATABASE_ARGUMENTS)

    @property
    def address(self) -> Address | None:
        """Host and port (``None`` for a unix socket, and for a master that Sentinels watch)."""
        if "path" in self.connection_arguments or "connection_pool" in self.connection_arguments:
            return None
        return self.connection_arguments.get("host") or "localhost", int(self.connection_arguments.get("port") or 6379)

    def connect(self, *, timeout: float, **arguments: Any) -> Any:
        """Open and return a new connection.

        Args:
            timeout: Seconds for each wait.
            arguments: Further arguments of the connection.

        Raises:
            redis.ConnectionError: No connection, or the class of that name of the client's library.
            redis.TimeoutError: No connection within the timeout, or the class of that name of the client's library.
            OSError: No connection.
        """
        kept = dict(self.connection_arguments)
        connect_timeout = min(kept.pop("socket_connect_timeout", None) or timeout, timeout)
        kept.update(connect_timeout_arguments(kept, connect_timeout))
        connection = self.connection_class(
            **{**kept, "decode_responses": False, **arguments},
            socket_timeout=timeout,
        )
        connection.connect()
        return connection

    def __str__(self) -> str:
        arguments = self.connection_arguments
        service = getattr(arguments.get("connection_pool"), "service_name", None)
        where = arguments.get("path") or f"{arguments.get('host', 'localhost')}:{arguments.get('port', 6379)}"
        return f"{f'the master {service!r}' if service else where}/{self.db}"


def endpoint_of(client: Any) -> Endpoint | None:
    """Return the endpoint of a client (``None`` if no further connection like the client's can be made).

    A cluster's client has many servers, and a client of fakeredis has none.
    """
    pool = getattr(client, "connection_pool", None)
    arguments = getattr(pool, "connection_kwargs", None)
    connection_class = getattr(pool, "connection_class", None)
    if not isinstance(arguments, Mapping) or connection_class is None:
        return None
    if _client_packages_of(client) & {"fakeredis", "rediscluster"}:
        return None
    kept = kept_arguments(arguments)
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        # Register the secrets of the Sentinels, too.
        kept_arguments(sentinel.connection_pool.connection_kwargs)
    return Endpoint(connection_class, identity_of(connection_class, kept), kept, int(arguments.get("db") or 0))


def plain_endpoint_of(client: Any) -> Endpoint | None:
    """Return the endpoint of a client (``None`` also if no plain client can replace the client).

    Such a client may rename keys in an unknown way.
    """
    endpoint = endpoint_of(client)
    return endpoint if endpoint is not None and has_plain_copy(client) else None


def _client_packages_of(client: Any) -> set[str]:
    """Return the packages of the client's connection classes."""
    pool = getattr(client, "connection_pool", None)
    connection_class = getattr(pool, "connection_class", None)
    classes = (*type(pool).__mro__, *getattr(connection_class, "__mro__", ()))
    return {cls.__module__.partition(".")[0] for cls in classes}


def connection_arguments_of(client: Any) -> Mapping[str, Any]:
    """Return the arguments of a client's connections (an empty mapping if there are none)."""
    arguments = getattr(getattr(client, "connection_pool", None), "connection_kwargs", None)
    if not isinstance(arguments, Mapping):
        # A cluster's client of redis-py.
        arguments = getattr(getattr(client, "nodes_manager", None), "connection_kwargs", None)
    return arguments if isinstance(arguments, Mapping) else {}


def command_wait_limit(client: Any) -> float | None:
    """Return the seconds that a command may take by the client's settings (``None``: without end).

    The result is 0 for a client that never waits, as one of fakeredis, and for a client with unknown settings.
    """
    arguments = connection_arguments_of(client)
    if not arguments or "fakeredis" in _client_packages_of(client):
        return 0.0
    if arguments.get("socket_timeout") is None:
        return None
    retries = getattr(arguments.get("retry"), "_retries", 0)
    if not isinstance(retries, int) or retries < 0:
        return None
    return float(arguments["socket_timeout"]) * (1 + retries)


def client_module_of(client: Any) -> Any:
    """Return the module of the client's pool class, which has the other classes of pools, too (``None``: unknown)."""
    for cls in type(client.connection_pool).__mro__:
        module = sys.modules.get(cls.__module__)
        if cls.__name__ == "ConnectionPool" and hasattr(module, "BlockingConnectionPool"):
            return module
    return None


#: Arguments that this package's connections do not take over.  This package controls timeouts and retries.  Caches,
#: names and maintenance notifications belong to the client's connections.
_DROPPED_ARGUMENTS = frozenset(
    (
        "cache",
        "cache_config",
        "client_name",
        "event_dispatcher",
        "health_check_interval",
        "himport_registry",
        "parser_class",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_timeout",
    )
)


#: Arguments that change neither the server nor the user: timing, encoding of replies, names of the client.
_IRRELEVANT_ARGUMENTS = frozenset(
    (
        *("decode_responses", "encoding", "encoding_errors", "legacy_responses", "protocol"),
        *("driver_info", "lib_name", "lib_version"),
        *("max_connections", "timeout", "socket_connect_timeout", "socket_read_size"),
        *("socket_keepalive", "socket_keepalive_options"),
        # Arguments of this package's connections, see `_redis/connections/deadline.py`.
        *("credentials", "idle_limit"),
    )
)


#: Arguments for a function that replaces the library's handshake.
CONNECT_HOOK_ARGUMENTS = frozenset(("redis_connect_func", "valkey_connect_func"))


class ArgumentValue:
    """Argument that compares and hashes by value, or by identity where its class cannot do that."""

    def __init__(self, value: Any) -> None:
        self._key: Any = _hashable(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArgumentValue) and bool(self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((str(name), _hashable(item)) for name, item in value.items()))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


#: Arguments that distinguish endpoints, by name.
EndpointIdentity = tuple[tuple[str, ArgumentValue], ...]


def kept_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that this package's connections take over from a client's, and register secrets."""
    left_out = {*_DROPPED_ARGUMENTS, *(name for name in arguments if "maint_" in name or name.startswith("orig_"))}
    kept = {name: value for name, value in arguments.items() if name not in left_out}
    for name in CONNECT_HOOK_ARGUMENTS & kept.keys():
        if (function := _user_connect_hook(kept.pop(name))) is not None:
            kept[name] = function
    for name, value in kept.items():
        if "password" in name:
            redaction.register_secret(value)
    return kept


def identity_of(connection_class: Any, arguments: Mapping[str, Any]) -> EndpointIdentity:
    """Return the arguments that distinguish connections: all that change their server, user or options.

    An argument with its default value is left out, so that the result is the same whether the argument is given or not.
    """
    defaults = {**_default_arguments(connection_class), "db": 0}
    relevant = {name: value for name, value in arguments.items() if name not in _IRRELEVANT_ARGUMENTS}
    relevant["db"] = int(arguments.get("db") or 0)
    return tuple(
        (name, ArgumentValue(value))
        for name, value in sorted(relevant.items())
        if ArgumentValue(value) != ArgumentValue(defaults.get(name))
    )


@lru_cache(maxsize=64)
def _default_arguments(connection_class: Any) -> dict[str, Any]:
    """Return the defaults of the arguments of a class and its ancestors."""
    defaults: dict[str, Any] = {}
    for cls in reversed(getattr(connection_class, "__mro__", ())):
        if "__init__" in vars(cls) and cls is not object:
            # Constructors of compiled classes have no signature.
            with contextlib.suppress(TypeError, ValueError):
                parameters = inspect.signature(cls.__init__).parameters.values()
                defaults.update((item.name, item.default) for item in parameters if item.default is not item.empty)
    return defaults


@dataclass(frozen=True)
class _HookAfterHandshake:
    """Replacement of a connection's handshake: the handshake, and then the user's function.

    Attributes:
        function: The user's function, called with the connection.
    """

    function: Callable[[Any], Any]

    def __call__(self, connection: Any) -> None:
        connection.on_connect()
        self.function(connection)


def _user_connect_hook(function: Any) -> Any:
    """Return the user's hook of a connection, without the part that a cluster's client adds."""
    owner = getattr(function, "__self__", None)
    if not hasattr(owner, "nodes_manager"):
        return function
    own = getattr(owner, "user_on_connect_func", None)
    return None if own is None else _HookAfterHandshake(own)
