"""URLs: each scheme leads to a client that answers, and whatever is wrong with one is said at once, without secrets."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from pybreaker import CircuitBreaker

from pybreaker_redis import CircuitRedisStorage, _urls
from pybreaker_redis._client import command_wait_limit
from pybreaker_redis._cluster import topology_of
from pybreaker_redis._deadline import deadline
from pybreaker_redis._demo.server import PrivateServer, free_port
from pybreaker_redis._keys import CLUSTER_SLOT_COUNT
from pybreaker_redis._urls import URL_SCHEMES, URL_TIMEOUT_S, client_source_from_url, mask_url
from tests.clusters import bus_port
from tests.records import fresh_namespace
from tests.sentinels import Sentinels
from tests.servers import FoundServer
from tests.tls import Certificates, Terminator
from tests.viewed import up, wait_for

has_cluster = pytest.mark.skipif(_urls.cluster_library() is None, reason="no library for clusters is installed")


def words_of(url: str) -> dict[str, Any]:
    """What the connections of a URL's client are made with."""
    words: dict[str, Any] = client_source_from_url(url)().connection_pool.connection_kwargs
    return words


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reached(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A server with a port and a socket, and a user whose name and password have to be quoted."""
    with PrivateServer(preferred.binary, port=free_port()) as server:
        with contextlib.closing(server.client()) as client:
            client.execute_command("ACL", "SETUSER", "sh@p", "on", ">se/c:ret", "~*", "&*", "+@all")
        yield server


@pytest.fixture(scope="module")
def watched(preferred: FoundServer) -> Iterator[Sentinels]:
    """A master, and two Sentinels."""
    made = Sentinels(preferred.binary, 2)
    with made.stack:
        yield made


@pytest.fixture(scope="module")
def cluster(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A cluster of one node."""
    with PrivateServer(preferred.binary, port=bus_port(), args=["--cluster-enabled", "yes"]) as node:
        with contextlib.closing(node.client()) as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(CLUSTER_SLOT_COUNT))
            wait_for(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "it serves all slots")
        yield node


@pytest.fixture
def encrypted(reached: PrivateServer, certified: Certificates) -> Iterator[int]:
    """The port of the server by TLS: few binaries that install with pip speak it themselves."""
    port = free_port()
    with contextlib.closing(Terminator(reached.unix_socket, certified, port, asks_who=False)):
        yield port


def answers(url: str, where: PrivateServer, timeout: float | None = 10) -> Any:
    """Whether a storage of a URL shares its circuit on this server; its client."""
    namespace = fresh_namespace()
    storage = CircuitRedisStorage.from_url(url, namespace=f"{{{namespace}}}", timeout=timeout)
    breaker = CircuitBreaker(fail_max=3, state_storage=storage)
    assert storage.health().condition == "unused", "nothing is asked before the first call"
    breaker.call(up)
    breaker.open()
    health = storage.health()
    assert (health.condition, health.last_error) == ("connected", "")
    with contextlib.closing(where.client()) as observer:
        assert observer.get(f"{{{namespace}}}:pybreaker:state") == b"open"
    return client_source_from_url(url)()


# -- every scheme ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["redis", "valkey"])
def test_url_of_a_server_leads_there(reached: PrivateServer, library: str) -> None:
    """The plainest of all."""
    client = answers(f"{library}://127.0.0.1:{reached.port}", reached)
    assert type(client) is redis.Redis
    assert client.ping()


def test_url_of_a_socket_leads_there(reached: PrivateServer) -> None:
    """With the database in the query, as redis-py has it."""
    assert answers(f"unix://{reached.unix_socket}", reached).ping()
    assert words_of(f"unix://{reached.unix_socket}?db=3")["db"] == 3


@pytest.mark.parametrize("place", ["127.0.0.1:{port}/0", "{socket}"])
def test_user_and_password_are_unquoted(reached: PrivateServer, place: str) -> None:
    """A password may hold any character."""
    scheme = "unix" if place == "{socket}" else "redis"
    place = place.format(port=reached.port, socket=reached.unix_socket)
    assert answers(f"{scheme}://sh%40p:se%2Fc%3Aret@{place}", reached).acl_whoami() in (b"sh@p", "sh@p")


@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_url_with_tls_leads_there_and_certificates_are_checked(
    reached: PrivateServer, encrypted: int, certified: Certificates, library: str
) -> None:
    """The words of TLS stand in the query."""
    url = f"{library}://127.0.0.1:{encrypted}/0?ssl_ca_certs={certified.authority}"
    client = answers(url, reached)
    assert issubclass(client.connection_pool.connection_class, redis.SSLConnection)
    with pytest.raises((redis.ConnectionError, ssl.SSLError)):
        client_source_from_url(f"{library}://127.0.0.1:{encrypted}/0?socket_timeout=5")().ping()


@pytest.mark.parametrize("library", ["redis", "valkey"])
@pytest.mark.parametrize("timeout", [10, None])
def test_url_of_sentinels_leads_to_the_master(watched: Sentinels, library: str, timeout: float | None) -> None:
    """Each of several Sentinels may be asked; one that is not there is passed over."""
    places = ",".join(f"127.0.0.1:{made.port}" for made in watched.sentinels)
    client = answers(f"{library}+sentinel://127.0.0.1:{free_port()},{places}/shop", watched.master, timeout)
    assert client.connection_pool.service_name == "shop"
    assert client.ping()


def test_words_of_a_sentinel_url_are_for_master_or_sentinels(watched: Sentinels) -> None:
    """User and password stand for the master's; the Sentinels' have names of their own."""
    client = client_source_from_url(
        "redis+sentinel://shop:secret@one,[::1]:5/my%20shop/2?sentinel_username=watch&sentinel_password=se%26cret"
        "&socket_timeout=0.4&decode_responses=yes&max_connections=7"
    )()
    pool = client.connection_pool
    assert (pool.service_name, pool.max_connections) == ("my shop", 7)
    master = pool.connection_kwargs
    assert (master["db"], master["username"], master["password"]) == (2, "shop", "secret")
    assert (master["socket_timeout"], master["socket_connect_timeout"]) == (0.4, URL_TIMEOUT_S)
    assert master["decode_responses"] is True
    asked = [made.connection_pool.connection_kwargs for made in pool.sentinel_manager.sentinels]
    assert [(words["host"], words["port"]) for words in asked] == [("one", 26379), ("::1", 5)]
    for words in asked:
        assert (words["username"], words["password"], words["db"]) == ("watch", "se&cret", 0)
        assert (words["socket_timeout"], words["socket_connect_timeout"]) == (0.4, URL_TIMEOUT_S)
        assert not words.get("decode_responses")


@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_sentinels_and_master_are_talked_to_by_tls(library: str) -> None:
    """Who encrypts the one encrypts the other."""
    pool = client_source_from_url(f"{library}+sentinel://one/shop?ssl_ca_certs=/nowhere")().connection_pool
    for some in (pool, *(made.connection_pool for made in pool.sentinel_manager.sentinels)):
        assert issubclass(some.connection_class, redis.SSLConnection)
        assert some.connection_kwargs["ssl_ca_certs"] == "/nowhere"
    plain = client_source_from_url("redis+sentinel://one/shop")().connection_pool
    for some in (plain, *(made.connection_pool for made in plain.sentinel_manager.sentinels)):
        assert not issubclass(some.connection_class, redis.SSLConnection)


@has_cluster
@pytest.mark.parametrize("library", ["redis", "valkey"])
@pytest.mark.parametrize("timeout", [10, None])
def test_url_of_a_cluster_leads_there(cluster: PrivateServer, library: str, timeout: float | None) -> None:
    """Each of several nodes may be asked; one that is not there is passed over."""
    client = answers(
        f"{library}+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.port}/0?socket_timeout=0.7", cluster, timeout
    )
    assert type(client).__name__ == "RedisCluster"
    client.set("{named}", "here")
    assert client.get("{named}") == b"here"
    if hasattr(client, "nodes_manager"):
        words = client.nodes_manager.connection_kwargs
        assert (words["socket_timeout"], words["socket_connect_timeout"]) == (0.7, URL_TIMEOUT_S)


@has_cluster
def test_silent_nodes_of_a_cluster_keep_a_call_waiting_for_one_timeout(cluster: PrivateServer) -> None:
    """A cluster's client connects when it is made, to any of its nodes, and keeps no deadline of anybody."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
        for nodes, is_own in ((f"{nobody},{nobody}", True), (f"{nobody},127.0.0.1:{cluster.port}", False)):
            # What a client waits that keeps no deadline.
            url = f"redis+cluster://{nodes}?socket_timeout=20&socket_connect_timeout=20"
            storage = CircuitRedisStorage.from_url(url, namespace=fresh_namespace(), max_staleness=0, timeout=2.0)
            began = time.monotonic()
            CircuitBreaker(state_storage=storage).call(up)
            assert time.monotonic() < began + 2.0 + 3.0
            assert storage.health().is_own == is_own
        # Whoever is silent now may be the one who is left later.
        known = topology_of(storage._core._locator._client)
        assert known
        assert ("127.0.0.1", silent.getsockname()[1]) in known._seed_nodes


class TimeLimit(Exception):
    """Raised into a wait from outside."""


def test_time_limit_that_strikes_while_a_cluster_is_looked_for_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No further node is tried: the error belongs to the caller, not to the node."""
    tried: list[int] = []

    def send_command(self: Any, *words: Any, **options: Any) -> None:
        if self.port in (1, 2):  # Threads of other tests may send something meanwhile.
            tried.append(self.port)
        raise TimeLimit

    monkeypatch.setattr(redis.Connection, "connect", lambda self: None)
    monkeypatch.setattr(redis.Connection, "send_command", send_command)
    place = _urls._parse("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    with deadline(1.0), pytest.raises(TimeLimit):
        _urls.answering_first(place)
    assert tried == [1]


@has_cluster
@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_cluster_is_talked_to_by_tls(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """The words of TLS go with those of the nodes."""
    made: list[dict[str, Any]] = []
    clusters = importlib.import_module(str(_urls.cluster_library()))

    class Noted:
        def __init__(self, **words: Any) -> None:
            made.append(words)

    monkeypatch.setattr(clusters, "RedisCluster", Noted)
    client_source_from_url(f"{library}+cluster://one:1,two?ssl_ca_certs=/nowhere")()
    client_source_from_url("redis+cluster://one:1,two")()
    assert [words.get("ssl") for words in made] == [True, None]
    assert made[0]["ssl_ca_certs"] == "/nowhere"
    assert not {"db", "host", "port"} & made[0].keys()
    assert len(made[0]["startup_nodes"]) == 2


def test_redis_py_3_takes_redis_py_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no clusters of its own."""
    made: list[dict[str, Any]] = []

    class Library:
        class RedisCluster:
            def __init__(self, **words: Any) -> None:
                made.append(words)

    find, imported = importlib.util.find_spec, importlib.import_module
    found = {"rediscluster": Library, "redis.cluster": None, "redis.retry": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find(name))
    monkeypatch.setattr(importlib, "import_module", lambda name: found.get(name) or imported(name))
    client_source_from_url("redis+cluster://one:1,two")()
    assert made[0]["startup_nodes"] == [{"host": "one", "port": 1}, {"host": "two", "port": 6379}]
    assert made[0]["skip_full_coverage_check"] is True
    assert "retry" not in made[0]


def test_cluster_without_a_library_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to install."""
    monkeypatch.setattr(_urls, "cluster_library", lambda: None)
    with pytest.raises(ModuleNotFoundError, match=r"pybreaker_redis\[redis-py-cluster\]") as caught:
        CircuitRedisStorage.from_url("redis+cluster://:secret@one")
    assert "secret" not in str(caught.value)


# -- what the client is like -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://there", "rediss://there", "unix:///there", "redis+sentinel://there/shop"])
def test_client_waits_for_a_second_and_tries_once(url: str) -> None:
    """So even `timeout=None`, which uses it as it is, hangs nobody for long."""
    assert command_wait_limit(client_source_from_url(url)()) == URL_TIMEOUT_S == 1
    if not url.startswith("unix"):
        assert words_of(url)["socket_connect_timeout"] == URL_TIMEOUT_S


def test_nobody_who_answers_is_waited_for_no_longer_than_that() -> None:
    """Whoever accepts and says nothing is given up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.05"
        storage = CircuitRedisStorage.from_url(url, timeout=None)
        assert CircuitBreaker(state_storage=storage).call(up) == "answer"
        assert storage.health().condition == "away"


def test_query_wins() -> None:
    """Whatever redis-py takes may stand there."""
    words = words_of(
        "redis://user:pass@there:1/2?socket_timeout=0.3&socket_connect_timeout=2&db=5&health_check_interval=9"
        "&decode_responses=no&encoding=latin-1&socket_keepalive=true&client_name=me"
    )
    expected = {
        "host": "there",
        "port": 1,
        "db": 5,
        "username": "user",
        "password": "pass",
        "socket_timeout": 0.3,
        "socket_connect_timeout": 2.0,
        "health_check_interval": 9,
        "decode_responses": False,
        "encoding": "latin-1",
        "socket_keepalive": True,
        "client_name": "me",
    }
    assert {name: words[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "host", "port", "db"),
    [
        ("redis://", "localhost", 6379, 0),
        ("redis://there", "there", 6379, 0),
        ("REDIS://there/", "there", 6379, 0),
        ("redis://:7/3", "localhost", 7, 3),
        ("redis://[::1]:7", "::1", 7, 0),
        ("valkeys://there:7", "there", 7, 0),
    ],
)
def test_what_is_not_said_is_as_usual(url: str, host: str, port: int, db: int) -> None:
    """Host, port and database."""
    words = words_of(url)
    assert (words["host"], words["port"], words["db"]) == (host, port, db)


def test_circuits_of_one_url_share_a_client_as_long_as_one_of_them_lives() -> None:
    """Else each would have Sentinels and nodes of its own to keep up with."""
    url = "redis+sentinel://nobody/shared"
    first = client_source_from_url(url)()
    assert client_source_from_url(url)() is first
    assert client_source_from_url(f"{url}/1")() is not first
    del first
    gc.collect()
    assert url not in _urls._clients


def test_storage_of_a_url_takes_all_other_words() -> None:
    """By keyword, as the class does."""
    storage = CircuitRedisStorage.from_url("redis://nobody", "open", "shop", max_staleness=3, cluster_mode=True, ttl=60)
    assert storage.health().circuit == "shop"
    assert storage.health().state == "open"
    with pytest.raises(ValueError, match="max_staleness must"):
        CircuitRedisStorage.from_url("redis://nobody", max_staleness=-1)
    with pytest.raises(TypeError, match="ajar"):
        CircuitRedisStorage.from_url("redis://nobody", ajar=True)


def test_subclass_makes_its_own_kind() -> None:
    """As any class method that makes one."""

    class Own(CircuitRedisStorage):
        pass

    assert type(Own.from_url("redis://nobody")) is Own


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "http://there": "must begin with one of unix://, redis://.*valkeys\\+cluster://, not 'http://there'",
    "there:6379": "must begin with one of",
    "": "must begin with one of",
    "redis:there": "must begin with one of",
    "redis+sentinels://there/shop": "must begin with one of",
    "redis://there:port": "must name hosts as host:port",
    "redis://there:0": "ports from 1 to 65535",
    "redis://there:65536": "ports from 1 to 65535",
    "redis://::1": "must name hosts as host:port or \\[address\\]:port",
    "redis://one,two": "must name one host",
    "redis://there/shop": "number of a database",
    "redis://there/0/1": "number of a database",
    "redis://there/-1": "number of a database",
    "redis://there#0": "must have every # and, behind a question mark, every @ quoted, as %23 and %40",
    "redis://there?client_name=me@home": "must have every #",
    "unix://": "path of a socket",
    "unix://there/socket": "path of a socket",
    "redis+sentinel://there": "must name the service",
    "redis+sentinel://there/": "must name the service",
    "redis+sentinel:///shop": "must name at least one host",
    "redis+sentinel://one,,two/shop": "must name at least one host",
    "redis+sentinel://one/shop/nine": "number of a database",
    "redis+cluster://": "must name at least one host",
    "redis+cluster://one/1": "must not name a database",
    "redis+cluster://one?db=1": "must not name a database",
    "redis://there?socket_timeout=long": "usable value of socket_timeout, not 'long'",
    "redis://there?socket_timeout=0": "usable value of socket_timeout, not '0'",
    "redis://there?socket_timeout=nan": "usable value of socket_timeout, not 'nan'",
    "redis://there?socket_connect_timeout=inf": "usable value of socket_connect_timeout",
    "redis://there?db=-1": "usable value of db",
    "redis://there?db=": "usable value of db",
    "redis://there?decode_responses=perhaps": "usable value of decode_responses",
    "redis://there?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "redis://there?host=elsewhere": "must have its host before the question mark",
    "redis+cluster://there?port=7": "must have its port before the question mark",
    "unix:///there?path=/elsewhere": "must have its path before the question mark",
    "unix:///there?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "redis+sentinel://there/shop?nonsense=1": "must have a query that this version of redis-py takes .*nonsense",
    "rediss://there?ssl_cert_reqs=perhaps": "must have a query that this version of redis-py takes",
}


@pytest.mark.parametrize("url", MISTAKES)
def test_mistake_in_a_url_is_said_at_once(url: str) -> None:
    """What was given, and what is accepted."""
    with pytest.raises(ValueError, match=f"^url .*(?:{MISTAKES[url]})") as caught:
        CircuitRedisStorage.from_url(url)
    assert repr(mask_url(url)) in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", [None, b"redis://:secret@there", 6379, redis.Redis()])
def test_url_of_another_type_is_refused_at_once(url: Any) -> None:
    """Without saying what was in it."""
    with pytest.raises(TypeError, match=f"url must be a str, not of type {type(url).__name__}") as caught:
        CircuitRedisStorage.from_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@there",
        "redis://:secret@there:port",
        "redis://user:se/cret@there",
        "redis://user:sec#ret@there",
        "redis://user:sec?ret@there",
        "user:secret@there",
        "redis:user:secret@there",
        "redis+sentinel://there?sentinel_password=secret&password=secret",
        "redis://there?password=secret&db=x",
        "rediss://there?ssl_password=secret&db=x",
    ],
)
def test_no_secret_is_printed(url: str) -> None:
    """However badly it was quoted: errors end up in logs."""
    with pytest.raises(ValueError, match=r"\*\*\*") as caught:
        CircuitRedisStorage.from_url(url)
    assert not any(part in str(caught.value) for part in ("secret", "cret", "ret@", "se/", "user"))


secrets = st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: f"s3cr3t{text}s3cr3t")


@settings(deadline=None)
@given(
    scheme=st.sampled_from(URL_SCHEMES) | st.just("http"),
    secret=secrets,
    rest=st.text(st.sampled_from("ab:/@,?#=&[]0"), max_size=12),
)
def test_any_text_is_refused_without_its_secret_or_taken(scheme: str, secret: str, rest: str) -> None:
    """Nothing but the errors that are promised, and no secret in any."""
    url = f"{scheme}://user:{secret}@{rest}"
    assert "s3cr3t" not in mask_url(url)
    try:
        client_source_from_url(url)
    except ModuleNotFoundError as error:
        said = str(error)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    assert "s3cr3t" not in said
