"""Clients of URLs.

These forms are accepted::

    redis://[[user]:[password]@][host][:port][/db]

    unix://[[user]:[password]@]/path/of/socket[?db=N]

    redis+sentinel://[[user]:[password]@]host[:port],…/service[/db][?sentinel_username=…&sentinel_password=…]

    redis+cluster://[[user]:[password]@]host[:port],…

In each of them, ``valkey`` may replace ``redis``.  The schemes ``rediss`` and ``valkeys`` mean TLS, for the connections
to Sentinels, too.  The query has further arguments of the connections, with redis-py's names:
``?socket_timeout=0.5&ssl_ca_certs=/path``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

import redis
import redis.connection

from pybreaker_redis._redis.connections.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis._redis.endpoint import Address
from pybreaker_redis._redis.legacy import client_of_redis_py_cluster
from pybreaker_redis._redis.sentinel import client_of_service
from pybreaker_redis._runtime.interruption import find_interruption

#: Seconds for each wait, unless the URL has another value.  redis-py's default is no timeout, or a long one.
URL_TIMEOUT_S = 1.0

#: Default ports, by kind.
_DEFAULT_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}

_LIBRARIES = ("redis", "rediss", "valkey", "valkeys")
URL_SCHEMES = ("unix", *(f"{library}{kind and '+' + kind}" for kind in _DEFAULT_PORTS for library in _LIBRARIES))

_URL = re.compile(r"([^:/?]+)://(?:([^/?]*)@)?([^/?@]*)([^?]*)(?:\?(.*))?", re.DOTALL)
_HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::([0-9]{1,5}))?")

#: Secrets in a URL, including everything that may be part of an unquoted one.
_SECRETS = re.compile(r"((?<=://)|^(?!.*://)).*(?=@)|(?<=password=)[^&#]*", re.DOTALL)

_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")

_clients: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def client_source_from_url(url: str) -> Callable[[], Any]:
    """Validate a URL, and return a function that returns its client.

    The function returns the same client each time.  The first call imports the client's library, and connects a
    cluster's client.

    Args:
        url: The URL, in one of the forms that the module's documentation lists.

    Raises:
        ValueError: The URL has no known form.  The error contains the URL without secrets, and the accepted form.
        TypeError: The value is no text.
        ModuleNotFoundError: No library for such a client is installed.
    """
    if not isinstance(url, str):
        msg = f"url must be a str, not of type {type(url).__name__}"
        raise TypeError(msg)
    parsed = _parse(url)
    if parsed.kind == "cluster" and cluster_library() is None:
        msg = (
            f"url {mask_url(url)!r}: this version of redis-py does not support clusters: upgrade it to 4.1 or later, "
            "or install the extra 'redis-py-cluster' of pybreaker_redis"
        )
        raise ModuleNotFoundError(msg)

    def client() -> Any:
        made = _clients.get(url)
        # Circuits with the same URL share its connections, and the state of its Sentinels and nodes.
        return _clients.setdefault(url, _make_client(parsed)) if made is None else made

    return client


def mask_url(url: str) -> str:
    """Return a URL without its secrets."""
    return _SECRETS.sub("***", url)


@dataclass(frozen=True)
class _ParsedUrl:
    """Parts of a URL.

    Attributes:
        kind: ``sentinel``, ``cluster``, or empty for a single server.
        connection_class: Class of redis-py's connections.
        hosts: Hosts with ports (empty for a unix socket).
        service: Name of the master that the Sentinels watch.
        arguments: Arguments of the client's connections: database, user, timeouts, and the rest of the query.
        sentinel_arguments: Arguments of the connections to Sentinels.
    """

    kind: str
    connection_class: type[Any]
    hosts: tuple[Address, ...]
    service: str
    arguments: Mapping[str, Any]
    sentinel_arguments: Mapping[str, Any]

    @property
    def tls(self) -> dict[str, bool]:
        """Argument that enables TLS where a client chooses its connection class (empty: no TLS)."""
        return {"ssl": True} if self.connection_class is redis.SSLConnection else {}


def _parse(url: str) -> _ParsedUrl:
    if "#" in url or "@" in url.partition("?")[2]:
        # Most likely, a password was not quoted.  Parts of such a password would be taken for another part of the URL.
        raise _url_error(url, "must have every # and, behind a question mark, every @ quoted, as %23 and %40")
    match = _URL.fullmatch(url)
    if match is None or match[1].lower() not in URL_SCHEMES:
        raise _url_error(url, f"must begin with one of {', '.join(f'{scheme}://' for scheme in URL_SCHEMES)}")
    scheme, user, netloc, path, query = match.groups()
    library, _, kind = scheme.lower().partition("+")
    arguments = _parse_query(url, query or "")
    if user is not None:
        name, _, password = user.partition(":")
        arguments.update({key: unquote(value) for key, value in (("username", name), ("password", password)) if value})
    sentinel_arguments = {name: arguments.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    connection_class: type[Any] = redis.UnixDomainSocketConnection
    hosts: tuple[Address, ...] = ()
    service = ""
    if library == "unix":
        if netloc or not path:
            raise _url_error(url, "must have the path of a socket after unix://, as in unix:///run/redis.sock")
        arguments["path"] = unquote(path)
    else:
        connection_class = redis.SSLConnection if library in ("rediss", "valkeys") else redis.Connection
        arguments.setdefault("socket_connect_timeout", URL_TIMEOUT_S)
        hosts = _parse_hosts(url, netloc, kind)
        first, _, rest = path.removeprefix("/").partition("/")
        service, db = (unquote(first), rest) if kind == "sentinel" else ("", f"{first}/{rest}" if rest else first)
        if kind == "sentinel" and not service:
            raise _url_error(
                url, "must name the service after the Sentinels, as in redis+sentinel://host:26379/service"
            )
        if db and not re.fullmatch("[0-9]{1,9}", db):
            raise _url_error(url, "must have the number of a database at the end of the path, or nothing")
        arguments.setdefault("db", int(db or 0))
    if kind == "cluster" and arguments.pop("db"):
        raise _url_error(url, "must not name a database: circuits on a cluster use number 0")
    _check_connection_arguments(url, connection_class, arguments)
    chosen = {
        name: value for name, value in arguments.items() if name.startswith(("socket_", "ssl_")) or name == "retry"
    }
    return _ParsedUrl(kind, connection_class, hosts, service, arguments, {**sentinel_arguments, **chosen})


def _parse_hosts(url: str, netloc: str, kind: str) -> tuple[Address, ...]:
    hosts = []
    for part in netloc.split(","):
        match = _HOST.fullmatch(part)
        port = int(match[2] or _DEFAULT_PORTS[kind]) if match else 0
        if match is None or not 0 < port < 65536:  # noqa: PLR2004
            raise _url_error(url, "must name hosts as host:port or [address]:port, with ports from 1 to 65535")
        if kind and not match[1]:
            raise _url_error(
                url, f"must name at least one host, and none that is empty, as in redis+{kind}://host:port"
            )
        hosts.append((unquote(match[1]).strip("[]") or "localhost", port))
    if len(hosts) > 1 and not kind:
        raise _url_error(url, "must name one host; several are for +sentinel:// and +cluster://")
    return tuple(hosts)


def _parse_query(url: str, query: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"socket_timeout": URL_TIMEOUT_S}
    if importlib.util.find_spec("redis.retry"):
        # Later versions of redis-py retry three or ten times by default, with pauses.
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        arguments["retry"] = Retry(NoBackoff(), 0)
    readers: dict[str, Any] = {**redis.connection.URL_QUERY_ARGUMENT_PARSERS, **_QUERY_READERS}
    for name, (text, *_) in parse_qs(query, keep_blank_values=True).items():
        if name in ("host", "port", "path"):
            raise _url_error(url, f"must have its {name} before the question mark")
        try:
            arguments[name] = readers.get(name, str)(text)
        except (TypeError, ValueError):
            shown = "***" if "password" in name else repr(text)
            raise _url_error(url, f"must have a usable value of {name}, not {shown}") from None
    return arguments


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError
    return seconds


def _yes_or_no(text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise ValueError
    return text.lower() in _YES


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError
    return int(text)


#: Parsers of arguments.  redis-py parses all others.
_QUERY_READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), _seconds),
    **dict.fromkeys(("db", "max_connections", "health_check_interval", "protocol"), _number),
    **dict.fromkeys(("decode_responses", "retry_on_timeout", "socket_keepalive", "ssl_check_hostname"), _yes_or_no),
}


def _check_connection_arguments(url: str, connection_class: type[Any], arguments: Mapping[str, Any]) -> None:
    """Raise an error now, and not in the middle of a call, if redis-py accepts no such connection."""
    try:
        connection_class(**{name: value for name, value in arguments.items() if name != "max_connections"})
    except Exception as error:  # noqa: BLE001
        # The library raises various errors for unknown and for contradictory arguments.
        raise _url_error(url, f"must have a query that this version of redis-py takes ({error})") from None


def _url_error(url: str, accepted: str) -> ValueError:
    return ValueError(f"url {accepted}, not {mask_url(url)!r}")


def _make_client(parsed: _ParsedUrl) -> Any:
    if parsed.kind == "sentinel":
        return client_of_service(
            parsed.hosts, parsed.service, parsed.arguments, parsed.sentinel_arguments, tls=parsed.tls
        )
    if parsed.kind == "cluster":
        return _client_of_cluster(parsed.hosts, parsed.arguments, parsed.connection_class, tls=parsed.tls)
    where: dict[str, Any] = {"connection_class": parsed.connection_class}
    for host, port in parsed.hosts:
        where.update(host=host, port=port)
    return redis.Redis(connection_pool=redis.ConnectionPool(**where, **parsed.arguments))


def cluster_library() -> str | None:
    """Return the module of the library for clusters that is installed (``None``: none)."""
    return next((name for name in ("redis.cluster", "rediscluster") if importlib.util.find_spec(name)), None)


def _client_of_cluster(
    hosts: Sequence[Address], arguments: Mapping[str, Any], connection_class: Any, *, tls: Mapping[str, bool]
) -> Any:
    """Return a client of a cluster, which connects at once.

    Args:
        hosts: Nodes to begin with.
        arguments: Arguments of the connections.
        connection_class: Class of the connections.
        tls: Argument that enables TLS (empty: no TLS).
    """
    name = cluster_library() or ""
    seeds = answering_first(hosts, arguments, connection_class)
    arguments = {**arguments, **tls}
    if name == "rediscluster":
        return client_of_redis_py_cluster(seeds, arguments)
    library = importlib.import_module(name)
    # The retry is for connections to nodes.  The client itself has to retry while slots move.
    del arguments["retry"]
    nodes = [library.ClusterNode(host, port) for host, port in seeds]
    if seconds_left() is None:
        return library.RedisCluster(**arguments, startup_nodes=nodes)
    # redis-py 8 begins with any of the nodes, so only the one that answered is passed.
    client = library.RedisCluster(**arguments, startup_nodes=nodes[:1])
    client.nodes_manager.startup_nodes.update((node.name, node) for node in nodes[1:])
    return client


def answering_first(hosts: Sequence[Address], arguments: Mapping[str, Any], connection_class: Any) -> list[Address]:
    """Return the nodes with one that answers first, because a cluster's client connects without a deadline.

    Args:
        hosts: Nodes to begin with.
        arguments: Arguments of the connections.
        connection_class: Class of the connections.

    Raises:
        ConnectionError: No node answers in time.  The last error of the client's library is raised, if there is one.
    """
    error: Exception = ConnectionError("no host")
    handled = sys.exc_info()[1]
    arguments = {name: value for name, value in arguments.items() if name != "max_connections"}
    for number, (host, port) in enumerate(hosts):
        left = seconds_left()
        if left is None:
            return list(hosts)
        # A node that does not answer leaves half of the time for the others.
        with deadline(left / min(len(hosts) - number, 2)):
            connection = keep_deadlines(connection_class)(host=host, port=port, **arguments)
            try:
                connection.connect()
                connection.send_command("PING")
                connection.read_response()
            except Exception as failure:
                if find_interruption(failure, handled):
                    raise
                # After any error of the library, the next node may answer.
                error = failure
            else:
                return [(host, port), *(other for other in hosts if other != (host, port))]
            finally:
                connection.disconnect()
    raise error
