"""Which client does a URL name?

Knows: schemes, what stands where in each, redis-py's clients and redis-py-cluster's.  Does not know: circuits, what is
asked.

::

    redis://[[user]:[password]@][host][:port][/db]              valkey://
    unix://[[user]:[password]@]/path/of/socket[?db=N]
    redis+sentinel://[[user]:[password]@]host[:port],…/service[/db]
                     [?sentinel_username=…&sentinel_password=…]  valkey+sentinel://
    redis+cluster://[[user]:[password]@]host[:port],…           valkey+cluster://

With TLS: ``rediss`` and ``valkeys``; then Sentinels are talked to by TLS, too.  Further words of a connection stand in
the query, as redis-py has them: ``?socket_timeout=0.5&ssl_ca_certs=/path``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs, unquote

import redis

from pybreaker_redis._redis.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis._runtime.interruption import find_interruption

#: Seconds for each wait, unless the URL says something else: without, redis-py waits for ever, or for a minute.
URL_TIMEOUT_S = 1.0

#: Where each kind of server listens that does not say.
_DEFAULT_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}

_LIBRARIES = ("redis", "rediss", "valkey", "valkeys")
URL_SCHEMES = ("unix", *(f"{library}{kind and '+' + kind}" for kind in _DEFAULT_PORTS for library in _LIBRARIES))

_URL = re.compile(r"([^:/?]+)://(?:([^/?]*)@)?([^/?@]*)([^?]*)(?:\?(.*))?", re.DOTALL)
_HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::([0-9]{1,5}))?")

#: Secrets in a URL, wherever they stand; as much as may be one, if somebody forgot to quote it.
_SECRETS = re.compile(r"((?<=://)|^(?!.*://)).*(?=@)|(?<=password=)[^&#]*", re.DOTALL)

_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")

_clients: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def client_source_from_url(url: str) -> Callable[[], Any]:
    """Validate a URL; something to be called for the client that it names, the same one each time.

    Nothing is connected, and nothing imported for it, before that.

    Raises:
        ValueError: It names no client; the error says what was given, without secrets, and what is accepted.
        TypeError: It is no text.
        ModuleNotFoundError: No library is installed that makes such a client.
    """
    if not isinstance(url, str):
        msg = f"url must be a str, not of type {type(url).__name__}"
        raise TypeError(msg)
    place = _parse(url)
    make = {"": _single_client, "sentinel": client_of_service, "cluster": client_of_cluster}[place.kind]
    if place.kind == "cluster" and cluster_library() is None:
        msg = (
            f"url {mask_url(url)!r}: this version of redis-py knows no clusters: upgrade it to 4.1 or later, "
            "or install pybreaker_redis[redis-py-cluster]"
        )
        raise ModuleNotFoundError(msg)

    def client() -> Any:
        made = _clients.get(url)
        # Circuits that name the same place share its connections, and what is known of its Sentinels and nodes.
        return _clients.setdefault(url, make(place)) if made is None else made

    return client


def mask_url(url: str) -> str:
    """A URL as it may be printed."""
    return _SECRETS.sub("***", url)


@dataclass(frozen=True)
class _ParsedUrl:
    """What a URL says.

    Attributes:
        kind: ``sentinel``, ``cluster``, or empty: a single server.
        connection_class: Of redis-py.
        hosts: With ports; none for a unix socket.
        service: The master's name, as its Sentinels have it.
        words: For the client: database, user, timeouts, and what else the query says.
        of_sentinels: For the clients of the Sentinels.
    """

    kind: str
    connection_class: type[Any]
    hosts: tuple[tuple[str, int], ...]
    service: str
    words: Mapping[str, Any]
    of_sentinels: Mapping[str, Any]

    @property
    def tls(self) -> dict[str, bool]:
        """The word for TLS, where a client makes its connections itself."""
        return {"ssl": True} if self.connection_class is redis.SSLConnection else {}


def _parse(url: str) -> _ParsedUrl:
    if "#" in url or "@" in url.partition("?")[2]:
        # Most likely of a password that was not quoted, so that parts of it would be taken for something else.
        raise _url_error(url, "must have every # and, behind a question mark, every @ quoted, as %23 and %40")
    match = _URL.fullmatch(url)
    if match is None or match[1].lower() not in URL_SCHEMES:
        raise _url_error(url, f"must begin with one of {', '.join(f'{scheme}://' for scheme in URL_SCHEMES)}")
    scheme, user, netloc, path, query = match.groups()
    library, _, kind = scheme.lower().partition("+")
    words = _parse_query(url, query or "")
    if user is not None:
        name, _, password = user.partition(":")
        words.update({key: unquote(value) for key, value in (("username", name), ("password", password)) if value})
    of_sentinels = {name: words.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    connection_class: type[Any] = redis.UnixDomainSocketConnection
    hosts: tuple[tuple[str, int], ...] = ()
    service = ""
    if library == "unix":
        if netloc or not path:
            raise _url_error(url, "must have the path of a socket after unix://, as in unix:///run/redis.sock")
        words["path"] = unquote(path)
    else:
        connection_class = redis.SSLConnection if library in ("rediss", "valkeys") else redis.Connection
        # redis-py 3 does not know the word for unix sockets, where connecting takes no time.
        words.setdefault("socket_connect_timeout", URL_TIMEOUT_S)
        hosts = _parse_hosts(url, netloc, kind)
        first, _, rest = path.removeprefix("/").partition("/")
        service, db = (unquote(first), rest) if kind == "sentinel" else ("", f"{first}/{rest}" if rest else first)
        if kind == "sentinel" and not service:
            raise _url_error(
                url, "must name the service after the Sentinels, as in redis+sentinel://host:26379/service"
            )
        if db and not re.fullmatch("[0-9]{1,9}", db):
            raise _url_error(url, "must have the number of a database at the end of the path, or nothing")
        words.setdefault("db", int(db or 0))
    if kind == "cluster" and words.pop("db"):
        raise _url_error(url, "must not name a database: a cluster has number 0 only")
    _check_connection_arguments(url, connection_class, words)
    chosen = {name: value for name, value in words.items() if name.startswith(("socket_", "ssl_")) or name == "retry"}
    return _ParsedUrl(kind, connection_class, hosts, service, words, {**of_sentinels, **chosen})


def _parse_hosts(url: str, netloc: str, kind: str) -> tuple[tuple[str, int], ...]:
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
    words: dict[str, Any] = {"socket_timeout": URL_TIMEOUT_S}
    if importlib.util.find_spec("redis.retry"):
        # Later ones try three times, or ten, with pauses.
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        words["retry"] = Retry(NoBackoff(), 0)
    readers: dict[str, Any] = {**redis.connection.URL_QUERY_ARGUMENT_PARSERS, **_QUERY_READERS}
    for name, (text, *_) in parse_qs(query, keep_blank_values=True).items():
        if name in ("host", "port", "path"):
            raise _url_error(url, f"must have its {name} before the question mark")
        try:
            words[name] = readers.get(name, str)(text)
        except (TypeError, ValueError):
            shown = "***" if "password" in name else repr(text)
            raise _url_error(url, f"must have a usable value of {name}, not {shown}") from None
    return words


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


#: How to read a value; all others as redis-py reads them.
_QUERY_READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), _seconds),
    **dict.fromkeys(("db", "max_connections", "health_check_interval", "protocol"), _number),
    **dict.fromkeys(("decode_responses", "retry_on_timeout", "socket_keepalive", "ssl_check_hostname"), _yes_or_no),
}


def _check_connection_arguments(url: str, connection_class: type[Any], words: Mapping[str, Any]) -> None:
    """See whether there are such connections now, rather than in the middle of a call; nothing is connected."""
    try:
        connection_class(**{name: value for name, value in words.items() if name != "max_connections"})
    except Exception as error:  # noqa: BLE001
        # Whatever the library raises for words that it does not know or that contradict each other.
        raise _url_error(url, f"must have a query that this version of redis-py takes ({error})") from None


def _url_error(url: str, accepted: str) -> ValueError:
    return ValueError(f"url {accepted}, not {mask_url(url)!r}")


def _single_client(place: _ParsedUrl) -> Any:
    where: dict[str, Any] = {"connection_class": place.connection_class}
    for host, port in place.hosts:
        where.update(host=host, port=port)
    return redis.Redis(connection_pool=redis.ConnectionPool(**where, **place.words))


def client_of_service(place: _ParsedUrl) -> Any:
    library = importlib.import_module("redis.sentinel")
    words = dict(place.words)
    if place.tls:
        # As later versions have it; redis-py 3 knows no TLS behind Sentinels.
        kinds = (library.SentinelManagedConnection, redis.SSLConnection)
        words["connection_class"] = type("SentinelManagedSSLConnection", kinds, {})
    sentinels = library.Sentinel(list(place.hosts), sentinel_kwargs={**place.of_sentinels, **place.tls}, **words)
    return sentinels.master_for(place.service)


def cluster_library() -> str | None:
    return next((name for name in ("redis.cluster", "rediscluster") if importlib.util.find_spec(name)), None)


def client_of_cluster(place: _ParsedUrl) -> Any:
    name = cluster_library() or ""
    library = importlib.import_module(name)
    words: dict[str, Any] = {**place.words, **place.tls}
    hosts = answering_first(place)
    if name == "rediscluster":
        # Else it would ask with a command that managed servers do not have.
        words["skip_full_coverage_check"] = True
        words["startup_nodes"] = [{"host": host, "port": port} for host, port in hosts]
    else:
        # Of nodes, not of the cluster: that has to try again while its nodes move.
        del words["retry"]
        nodes = [library.ClusterNode(host, port) for host, port in hosts]
        if seconds_left() is not None:
            # From 8 on it begins with any of them.
            client = library.RedisCluster(**words, startup_nodes=nodes[:1])
            client.nodes_manager.startup_nodes.update((node.name, node) for node in nodes[1:])
            return client
        words["startup_nodes"] = nodes
    return library.RedisCluster(**words)


def answering_first(place: _ParsedUrl) -> list[tuple[str, int]]:
    """The hosts, first one that answers: a cluster's client connects when it is made, and keeps no deadline.

    Raises:
        Exception: None does in time.
    """
    error, kind = Exception("no host"), cast("Any", place.connection_class)
    handled = sys.exc_info()[1]
    words = {name: value for name, value in place.words.items() if name != "max_connections"}
    for number, (host, port) in enumerate(place.hosts):
        left = seconds_left()
        if left is None:
            return list(place.hosts)
        # Whoever does not answer leaves time for the next one.
        with deadline(left / min(len(place.hosts) - number, 2)):
            connection = keep_deadlines(kind)(host=host, port=port, **words)
            try:
                connection.connect()
                connection.send_command("PING")
                connection.read_response()
            except Exception as failure:
                if find_interruption(failure, handled):
                    raise
                # Whatever the library raises: the next one may answer.
                error = failure
            else:
                return [(host, port), *(other for other in place.hosts if other != (host, port))]
            finally:
                connection.disconnect()
    raise error
