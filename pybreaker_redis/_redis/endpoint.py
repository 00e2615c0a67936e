"""Where does a client's server listen, and how does one get there on connections of one's own?

Knows: clients and connection pools of redis-py and its kin.  Does not know: what is said on a connection.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import queue
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pybreaker_redis._deadline import keep_deadlines
from pybreaker_redis._names import has_plain_copy, plain_copy
from pybreaker_redis._outside import suppress_errors
from pybreaker_redis._words import Credentials, EndpointIdentity, identity_of, idle_limit, kept_arguments

#: Most connections of one's own to a server.  One is enough unless threads ask at the same time.
POOL_CONNECTIONS_MAX = 50

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
        is_one_slot: Whether keys of different circuits may not be asked for in one command: there, or somewhere behind
            it, is a cluster.
    """

    connection_class: Any
    identity: EndpointIdentity
    connection_arguments: Mapping[str, Any] = field(compare=False)
    db: int
    is_one_slot: bool = False

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


def bounded_client(client: Any, timeout: float) -> Any:
    """A plain client of the same library on connections of its own, which try once and keep deadlines (`_deadline.py`).

    Methods of subclasses and of single objects are left out: they may wait, and retry.  What subclasses call the keys
    is found out before (`_names.py`).  Sentinels are asked on such connections, too, each for its share of the time.

    Args:
        client: Of a single server, or of a master that Sentinels know.
        timeout: Seconds to wait for a connection while all of them are in use.

    Returns:
        The copy, or ``None`` if there is no making one: it is a cluster's, not redis-py's kin, or no client at all.
    """
    # Whatever pools, connections and clients of somebody's own raise that are not made like the library's.
    with suppress_errors():
        return _copy_client(client, timeout)
    return None


def client_on_pool(client: Any, pool: Any) -> Any:
    """Return a plain client of the same library that uses another pool."""
    own = plain_copy(client)
    own.connection_pool = pool
    return own


def close_idle_connections(pool: Any) -> None:
    """Close the connections of a pool that nobody uses just now; whoever takes one of them connects anew."""
    idle = getattr(pool, "pool", None)
    if idle is None:
        with suppress_errors():
            pool.disconnect(inuse_connections=False)
        return
    # What is taken out of a blocking pool is in nobody else's hands.
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


def replace_credentials(client: Any, words: Mapping[str, Any]) -> bool:
    """Have a client on connections of our own authenticate by other words from now on; whether they differ."""
    own = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {}).get("credentials")
    return isinstance(own, Credentials) and own.switch_arguments(words)


def sentinel_pool_of(client: Any) -> Any:
    """The pool of a client whose master Sentinels watch; ``None`` of any other client."""
    pool = getattr(client, "connection_pool", None)
    return pool if hasattr(pool, "sentinel_manager") and getattr(pool, "is_master", False) else None


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


def _copy_client(client: Any, timeout: float, longest: float | None = None) -> Any:
    endpoint = endpoint_of(client)
    library = client_module_of(client)
    if endpoint is None or library is None:
        msg = f"not redis-py's kin: {client!r}"
        raise TypeError(msg)
    pool = _make_pool(client.connection_pool, library, endpoint, timeout, longest)
    # Now rather than in the middle of a call: the kinds of connection that need something else raise here.
    pool.connection_class(**pool.connection_kwargs)
    return client_on_pool(client, pool)


def _make_pool(pool: Any, library: Any, endpoint: Endpoint, timeout: float, longest: float | None) -> Any:
    connection_class = keep_deadlines(endpoint.connection_class, longest)
    words = {
        **endpoint.connection_arguments,
        "decode_responses": False,
        "socket_timeout": timeout,
        "credentials": Credentials(pool.connection_kwargs),
        "idle_limit": idle_limit(pool.connection_kwargs),
    }
    knows_protocols = "protocol" in inspect.signature(getattr(library, "AbstractConnection", object)).parameters
    if knows_protocols and longest is None:
        # Nothing is pushed here, and RESP2 every server speaks; redis-py 8 asks for more unless told not to.  What
        # Sentinels answer is understood in the protocol alone that their client was made for.
        words["protocol"] = 2
    if "path" not in words:
        # redis-py 3 does not know the word for unix sockets, where connecting takes no time.
        words["socket_connect_timeout"] = timeout
    notifications = sys.modules.get(f"{library.__name__.partition('.')[0]}.maint_notifications")
    if notifications:
        # They would ask every new connection for one answer more, and lengthen its timeouts at will.
        words["maint_notifications_config"] = notifications.MaintNotificationsConfig(enabled=False)
    if not hasattr(pool, "sentinel_manager"):
        words.update(max_connections=POOL_CONNECTIONS_MAX, timeout=timeout, connection_class=connection_class)
        return library.BlockingConnectionPool(**words)
    manager = copy.copy(pool.sentinel_manager)
    # Some time has to be left for the next Sentinel, and for the master.
    share = timeout / (len(manager.sentinels) + 1)
    manager.sentinels = [_copy_client(sentinel, timeout, share) for sentinel in manager.sentinels]
    del words["connection_pool"]
    words.update(connection_class=connection_class, is_master=pool.is_master, check_connection=pool.check_connection)
    return type(pool)(pool.service_name, manager, **words)


def client_module_of(client: Any) -> Any:
    """The module that the kind of the client's pool comes from, which has the other kinds, too; or ``None``."""
    for cls in type(client.connection_pool).__mro__:
        module = sys.modules.get(cls.__module__)
        if cls.__name__ == "ConnectionPool" and hasattr(module, "BlockingConnectionPool"):
            return module
    return None
