"""Where does a client's server listen, and how does one get a connection of one's own there?

Knows: connection pools of redis-py and its kin.  Does not know: what is said on a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: What a connection of one's own leaves out: waiting and trying again is decided elsewhere, and what belongs to the
#: client's own connections (caches, names, notifications of maintenance) is not ours.
_LEFT_OUT = frozenset(
    (
        "cache",
        "cache_config",
        "client_name",
        "event_dispatcher",
        "health_check_interval",
        "himport_registry",
        "parser_class",
        "redis_connect_func",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_timeout",
    )
)


#: Which server, which database, which user: what else a connection is given makes no difference to what it reaches.
_TELLS_APART = frozenset(
    (
        *("host", "port", "path", "db", "username", "password", "credential_provider"),
        # Sentinel: the pool knows the master's name.
        *("connection_pool", "service_name"),
    )
)


@dataclass(frozen=True)
class Origin:
    """A server and a way to reach it; equal for clients that reach the same database of it as the same user.

    Attributes:
        connection_class: Of the client's pool.
        place: What tells servers, databases and users apart.
        words: What the connection's constructor takes.
        db: The database.
    """

    connection_class: Any
    place: tuple[tuple[str, _Word], ...]
    words: Mapping[str, Any] = field(compare=False)
    db: int

    def connect(self, *, timeout: float, **words: Any) -> Any:
        """A new connection, connected.

        Args:
            timeout: Seconds for each wait.
            words: Further words for the constructor.

        Raises:
            Exception: Whatever the library raises when there is nobody.
        """
        own = dict(self.words)
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

    def __str__(self) -> str:
        where = self.words.get("path") or f"{self.words.get('host', 'localhost')}:{self.words.get('port', 6379)}"
        return f"{where}/{self.db}"


class _Word:
    """A value that compares and hashes as what it is, or as itself where that is impossible."""

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            hash(value)
        except TypeError:
            self._key: Any = id(value)
        else:
            self._key = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Word) and bool(self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)


def origin_of(client: Any) -> Origin | None:
    """Where a client's commands go; ``None`` if there is no single such place that further connections can be made to.

    Clusters are many places, and fakeredis is none.
    """
    pool = getattr(client, "connection_pool", None)
    words = getattr(pool, "connection_kwargs", None)
    connection_class = getattr(pool, "connection_class", None)
    if not isinstance(words, Mapping) or connection_class is None:
        return None
    libraries = {cls.__module__.partition(".")[0] for cls in (*type(pool).__mro__, *connection_class.__mro__)}
    if libraries & {"fakeredis", "rediscluster"}:
        return None
    kept = {name: value for name, value in words.items() if name not in _LEFT_OUT and not name.startswith("maint_")}
    place = tuple((name, _Word(value)) for name, value in sorted(kept.items()) if name in _TELLS_APART)
    return Origin(connection_class, place, kept, int(words.get("db") or 0))
