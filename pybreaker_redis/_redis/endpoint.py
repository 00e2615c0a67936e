"""Where does a client's server listen, and how does one get there on connections of one's own?

Knows: clients and connection pools of redis-py and its kin.  Does not know: what is said on a connection.
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
from pybreaker_redis._runtime import redaction

#: Words that say which server, which database and which user; behind Sentinels the pool knows the master's name.
_DATABASE_ARGUMENTS = frozenset(
    (
        *("host", "port", "path", "db", "connection_pool", "service_name"),
        *("username", "password", "credential_provider"),
    )
)


@dataclass(frozen=True)
class Endpoint:
    """A server and a way to reach it; equal for clients that reach the same database of it by the same right and means.

    Attributes:
        connection_class: Of the client's pool.
        identity: What tells servers, databases, users and ways to connect apart.
        connection_arguments: What the connection's constructor takes.
        db: The database.
    """

    connection_class: Any
    identity: EndpointIdentity
    connection_arguments: Mapping[str, Any] = field(compare=False)
    db: int

    @property
    def database_identity(self) -> EndpointIdentity:
        """What tells databases and users apart, by whatever means they are reached."""
        return tuple(item for item in self.identity if item[0] in _DATABASE_ARGUMENTS)

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port; ``None`` for a unix socket, and for a master that Sentinels know."""
        if "path" in self.connection_arguments or "connection_pool" in self.connection_arguments:
            return None
        return self.connection_arguments.get("host") or "localhost", int(self.connection_arguments.get("port") or 6379)

    def connect(self, *, timeout: float, **words: Any) -> Any:
        """A new connection, connected.

        Args:
            timeout: Seconds for each wait.
            words: Further words for the constructor.

        Raises:
            Exception: Whatever the library raises when there is nobody.
        """
        own = dict(self.connection_arguments)
        connect_timeout = min(own.pop("socket_connect_timeout", None) or timeout, timeout)
        if "path" not in own:
            # redis-py 3 does not know the word for unix sockets, where connecting takes no time.
            own["socket_connect_timeout"] = connect_timeout
        connection = self.connection_class(
            **{**own, "decode_responses": False, **words},
            socket_timeout=timeout,
        )
        connection.connect()
        return connection

    def verify_master(self, connection: Any) -> bool:
        """Whether Sentinels know another master than the one that a connection leads to.

        To ask them also has the pool's idle connections closed if they do.  Who cannot be asked knows nothing else.
        """
        pool = self.connection_arguments.get("connection_pool")
        if not getattr(pool, "is_master", False):
            return False
        try:
            address = tuple(pool.get_master_address())  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001
            return False
        return address != (connection.host, connection.port)

    def __str__(self) -> str:
        words = self.connection_arguments
        service = getattr(words.get("connection_pool"), "service_name", None)
        where = words.get("path") or f"{words.get('host', 'localhost')}:{words.get('port', 6379)}"
        return f"{f'the master {service!r}' if service else where}/{self.db}"


def endpoint_of(client: Any) -> Endpoint | None:
    """Where a client's commands go; ``None`` if there is no single such place that further connections can be made to.

    Clusters are many places, and fakeredis is none.
    """
    pool = getattr(client, "connection_pool", None)
    words = getattr(pool, "connection_kwargs", None)
    connection_class = getattr(pool, "connection_class", None)
    if not isinstance(words, Mapping) or connection_class is None:
        return None
    if _client_packages_of(client) & {"fakeredis", "rediscluster"}:
        return None
    kept = kept_arguments(words)
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        # Their secrets are masked, too.
        kept_arguments(sentinel.connection_pool.connection_kwargs)
    return Endpoint(connection_class, identity_of(connection_class, kept), kept, int(words.get("db") or 0))


def plain_endpoint_of(client: Any) -> Endpoint | None:
    """As `endpoint_of`; ``None`` also for a client that no plain one can stand for: it may rename keys as it likes."""
    endpoint = endpoint_of(client)
    return endpoint if endpoint is not None and has_plain_copy(client) else None


def _client_packages_of(client: Any) -> set[str]:
    """The packages that the client's connections come from."""
    pool = getattr(client, "connection_pool", None)
    connection_class = getattr(pool, "connection_class", None)
    classes = (*type(pool).__mro__, *getattr(connection_class, "__mro__", ()))
    return {cls.__module__.partition(".")[0] for cls in classes}


def connection_arguments_of(client: Any) -> Mapping[str, Any]:
    """Return what a client's connections are given; nothing if it has none."""
    words = getattr(getattr(client, "connection_pool", None), "connection_kwargs", None)
    if not isinstance(words, Mapping):
        # redis-py's cluster.
        words = getattr(getattr(client, "nodes_manager", None), "connection_kwargs", None)
    return words if isinstance(words, Mapping) else {}


def command_wait_limit(client: Any) -> float | None:
    """How many seconds a command may take at most, as far as the client's settings tell; ``None``: without end.

    Zero for what never waits, as fakeredis, and for what cannot be judged.
    """
    words = connection_arguments_of(client)
    if not words or "fakeredis" in _client_packages_of(client):
        return 0.0
    if words.get("socket_timeout") is None:
        return None
    retries = getattr(words.get("retry"), "_retries", 0)
    if not isinstance(retries, int) or retries < 0:
        return None
    return float(words["socket_timeout"]) * (1 + retries)


def client_module_of(client: Any) -> Any:
    """The module that the kind of the client's pool comes from, which has the other kinds, too; or ``None``."""
    for cls in type(client.connection_pool).__mro__:
        module = sys.modules.get(cls.__module__)
        if cls.__name__ == "ConnectionPool" and hasattr(module, "BlockingConnectionPool"):
            return module
    return None


#: Words that this package's own connections leave out: waiting and retries are decided elsewhere, and caches, names and
#: notifications of maintenance belong to the client's own connections.
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


#: Words that change neither what a connection reaches nor by what right: timing, spelling of answers, greetings.
_IRRELEVANT_ARGUMENTS = frozenset(
    (
        *("decode_responses", "encoding", "encoding_errors", "legacy_responses", "protocol"),
        *("driver_info", "lib_name", "lib_version"),
        *("max_connections", "timeout", "socket_connect_timeout", "socket_read_size"),
        *("socket_keepalive", "socket_keepalive_options"),
        # Those of connections of our own (`_redis/deadline.py`).
        *("credentials", "idle_limit"),
    )
)


#: What a function is called that connects in place of the library's own handshake.
CONNECT_HOOK_ARGUMENTS = frozenset(("redis_connect_func", "valkey_connect_func"))


class ArgumentValue:
    """A value that compares and hashes as what it is, or as itself where that is impossible."""

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


EndpointIdentity = tuple[tuple[str, ArgumentValue], ...]


def kept_arguments(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of a client's connections that those of our own have, too; secrets among them are remembered."""
    left_out = {*_DROPPED_ARGUMENTS, *(name for name in words if "maint_" in name or name.startswith("orig_"))}
    kept = {name: value for name, value in words.items() if name not in left_out}
    for name in CONNECT_HOOK_ARGUMENTS & kept.keys():
        if (function := _user_connect_hook(kept.pop(name))) is not None:
            kept[name] = function
    for name, value in kept.items():
        if "password" in name:
            redaction.register_secret(value)
    return kept


def identity_of(connection_class: Any, words: Mapping[str, Any]) -> EndpointIdentity:
    """Return what tells connections apart that must not be shared: all words that change what they reach, and how.

    What a word says that is not given is what its constructor says: however the same is said, it is the same.
    """
    usual = {**_default_arguments(connection_class), "db": 0}
    said = {name: value for name, value in words.items() if name not in _IRRELEVANT_ARGUMENTS}
    said["db"] = int(words.get("db") or 0)
    return tuple(
        (name, ArgumentValue(value))
        for name, value in sorted(said.items())
        if ArgumentValue(value) != ArgumentValue(usual.get(name))
    )


@lru_cache(maxsize=64)
def _default_arguments(connection_class: Any) -> dict[str, Any]:
    """What the constructors of a class take for words that are not given."""
    usual: dict[str, Any] = {}
    for cls in reversed(getattr(connection_class, "__mro__", ())):
        if "__init__" in vars(cls) and cls is not object:
            # Some that are not written in Python have none.
            with contextlib.suppress(TypeError, ValueError):
                parameters = inspect.signature(cls.__init__).parameters.values()
                usual.update((item.name, item.default) for item in parameters if item.default is not item.empty)
    return usual


@dataclass(frozen=True)
class _HookAfterHandshake:
    """What a connection does in place of its handshake: the handshake, and then a function of the user's.

    Attributes:
        function: Of the user's, called with the connection.
    """

    function: Callable[[Any], Any]

    def __call__(self, connection: Any) -> None:
        connection.on_connect()
        self.function(connection)


def _user_connect_hook(function: Any) -> Any:
    """What there is to do when connected; of a cluster client's own function only what its user has asked for."""
    owner = getattr(function, "__self__", None)
    if not hasattr(owner, "nodes_manager"):
        return function
    own = getattr(owner, "user_on_connect_func", None)
    return None if own is None else _HookAfterHandshake(own)
