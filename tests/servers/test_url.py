"""URLs: each scheme leads to a client that works, and an invalid URL raises at once, without secrets."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis import url as url_module
from pybreaker_redis._redis.cluster import topology_of
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.keys import CLUSTER_SLOT_COUNT
from pybreaker_redis._redis.url import URL_TIMEOUT_S, client_source_from_url
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import up
from tests.support.cluster import bus_port
from tests.support.inspect import located_client, parse_url, seed_nodes
from tests.support.records import fresh_namespace
from tests.support.sentinel import Sentinels
from tests.support.servers import FoundServer
from tests.support.tls import Certificates, Terminator
from tests.support.urls import has_cluster, options_of
from tests.support.wait import wait_for


@pytest.fixture(scope="module")
def reached(preferred: FoundServer) -> Iterator[PrivateServer]:
    """Yield a server with a port and a socket, and a user with a name and a password that must be quoted."""
    with PrivateServer(preferred.binary, port=free_port()) as server:
        with contextlib.closing(server.client()) as client:
            client.execute_command("ACL", "SETUSER", "sh@p", "on", ">se/c:ret", "~*", "&*", "+@all")
        yield server


@pytest.fixture(scope="module")
def watched_master(preferred: FoundServer) -> Iterator[Sentinels]:
    """Yield a master with two Sentinels."""
    made = Sentinels(preferred.binary, 2)
    with made.stack:
        yield made


@pytest.fixture(scope="module")
def cluster(preferred: FoundServer) -> Iterator[PrivateServer]:
    """Yield a cluster of one node."""
    with PrivateServer(preferred.binary, port=bus_port(), args=["--cluster-enabled", "yes"]) as node:
        with contextlib.closing(node.client()) as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(CLUSTER_SLOT_COUNT))
            wait_for(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "all slots in service")
        yield node


@pytest.fixture
def encrypted(reached: PrivateServer, certified: Certificates) -> Iterator[int]:
    """Yield the port of a TLS proxy of the server, because few binaries from pip support TLS."""
    port = free_port()
    with contextlib.closing(Terminator(reached.unix_socket, certified, port, requires_client_certificate=False)):
        yield port


def assert_shared(url: str, server: PrivateServer, timeout: float | None = 10) -> Any:
    """Assert that a storage of the URL shares its circuit on this server, and return a client of the URL."""
    namespace = fresh_namespace()
    storage = CircuitRedisStorage.from_url(url, namespace=f"{{{namespace}}}", timeout=timeout)
    breaker = CircuitBreaker(fail_max=3, state_storage=storage)
    assert storage.health().condition == "unused", "nothing is sent before the first call"
    breaker.call(up)
    breaker.open()
    health = storage.health()
    assert (health.condition, health.last_error) == ("connected", "")
    with contextlib.closing(server.client()) as observer:
        assert observer.get(f"{{{namespace}}}:pybreaker:state") == b"open"
    return client_source_from_url(url)()


@pytest.mark.parametrize("library", ["redis", "valkey"])
def test_url_of_a_server_works(reached: PrivateServer, library: str) -> None:
    """The plain form of a URL works."""
    client = assert_shared(f"{library}://127.0.0.1:{reached.port}", reached)
    assert type(client) is redis.Redis
    assert client.ping()


def test_url_of_a_socket_works(reached: PrivateServer) -> None:
    """As with redis-py, the query contains the database."""
    assert assert_shared(f"unix://{reached.unix_socket}", reached).ping()
    assert options_of(f"unix://{reached.unix_socket}?db=3")["db"] == 3


@pytest.mark.parametrize("place", ["127.0.0.1:{port}/0", "{socket}"])
def test_user_and_password_are_unquoted(reached: PrivateServer, place: str) -> None:
    """A password may contain any character."""
    scheme = "unix" if place == "{socket}" else "redis"
    place = place.format(port=reached.port, socket=reached.unix_socket)
    assert assert_shared(f"{scheme}://sh%40p:se%2Fc%3Aret@{place}", reached).acl_whoami() in (b"sh@p", "sh@p")


@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_url_with_tls_leads_to_a_server_with_a_checked_certificate(
    reached: PrivateServer, encrypted: int, certified: Certificates, library: str
) -> None:
    """Options of TLS are in the query."""
    url = f"{library}://127.0.0.1:{encrypted}/0?ssl_ca_certs={certified.authority}"
    client = assert_shared(url, reached)
    assert issubclass(client.connection_pool.connection_class, redis.SSLConnection)
    with pytest.raises((redis.ConnectionError, ssl.SSLError)):
        client_source_from_url(f"{library}://127.0.0.1:{encrypted}/0?socket_timeout=5")().ping()


@pytest.mark.parametrize("library", ["redis", "valkey"])
@pytest.mark.parametrize("timeout", [10, None])
def test_url_of_sentinels_leads_to_the_master(watched_master: Sentinels, library: str, timeout: float | None) -> None:
    """Any of several Sentinels answers. One that does not run is skipped."""
    places = ",".join(f"127.0.0.1:{made.port}" for made in watched_master.sentinels)
    client = assert_shared(
        f"{library}+sentinel://127.0.0.1:{free_port()},{places}/shop", watched_master.master, timeout
    )
    assert client.connection_pool.service_name == "shop"
    assert client.ping()


def test_options_of_a_sentinel_url_are_for_master_or_sentinels(watched_master: Sentinels) -> None:
    """User and password are those of the master. The Sentinels have separate options."""
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
    arguments = [made.connection_pool.connection_kwargs for made in pool.sentinel_manager.sentinels]
    assert [(words["host"], words["port"]) for words in arguments] == [("one", 26379), ("::1", 5)]
    for words in arguments:
        assert (words["username"], words["password"], words["db"]) == ("watch", "se&cret", 0)
        assert (words["socket_timeout"], words["socket_connect_timeout"]) == (0.4, URL_TIMEOUT_S)
        assert not words.get("decode_responses")


@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_sentinels_and_master_use_tls(library: str) -> None:
    """TLS holds for both the master and the Sentinels."""
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
def test_url_of_a_cluster_works(cluster: PrivateServer, library: str, timeout: float | None) -> None:
    """Any of several nodes answers. One that does not run is skipped."""
    client = assert_shared(
        f"{library}+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.port}/0?socket_timeout=0.7", cluster, timeout
    )
    assert type(client).__name__ == "RedisCluster"
    client.set("{named}", "here")
    assert client.get("{named}") == b"here"
    if hasattr(client, "nodes_manager"):
        words = client.nodes_manager.connection_kwargs
        assert (words["socket_timeout"], words["socket_connect_timeout"]) == (0.7, URL_TIMEOUT_S)


@has_cluster
@pytest.mark.full
def test_silent_nodes_of_a_cluster_delay_a_call_by_one_timeout(cluster: PrivateServer) -> None:
    """A cluster client connects to any of its nodes when it is created, and keeps no deadline."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        silent_address = f"127.0.0.1:{silent.getsockname()[1]}"
        for nodes, is_own in (
            (f"{silent_address},{silent_address}", True),
            (f"{silent_address},127.0.0.1:{cluster.port}", False),
        ):
            # Timeouts of a client that keeps no deadline.
            url = f"redis+cluster://{nodes}?socket_timeout=20&socket_connect_timeout=20"
            storage = CircuitRedisStorage.from_url(url, namespace=fresh_namespace(), max_staleness=0, timeout=2.0)
            began = time.monotonic()
            CircuitBreaker(state_storage=storage).call(up)
            assert time.monotonic() < began + 2.0 + 3.0
            assert storage.health().is_own == is_own
        # A node that is silent now may be the only one left later.
        topology = topology_of(located_client(storage))
        assert topology
        assert ("127.0.0.1", silent.getsockname()[1]) in seed_nodes(topology)


class TimeLimit(Exception):
    """Raised into a wait by the application."""


def test_time_limit_during_the_search_for_a_cluster_node_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No further node is tried: the error belongs to the caller and not to the node."""
    tried: list[int] = []

    def send_command(self: Any, *words: Any, **options: Any) -> None:
        if self.port in (1, 2):  # threads of other tests may send commands meanwhile
            tried.append(self.port)
        raise TimeLimit

    monkeypatch.setattr(redis.Connection, "connect", lambda self: None)
    monkeypatch.setattr(redis.Connection, "send_command", send_command)
    parsed = parse_url("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    with deadline(1.0), pytest.raises(TimeLimit):
        url_module.answering_first(parsed.hosts, parsed.arguments, parsed.connection_class)
    assert tried == [1]


@has_cluster
@pytest.mark.parametrize("library", ["rediss", "valkeys"])
def test_cluster_uses_tls(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Options of TLS hold for the nodes."""
    made: list[dict[str, Any]] = []
    clusters = importlib.import_module(str(url_module.cluster_library()))

    class RecordingCluster:
        def __init__(self, **words: Any) -> None:
            made.append(words)

    monkeypatch.setattr(clusters, "RedisCluster", RecordingCluster)
    client_source_from_url(f"{library}+cluster://one:1,two?ssl_ca_certs=/nowhere")()
    client_source_from_url("redis+cluster://one:1,two")()
    assert [words.get("ssl") for words in made] == [True, None]
    assert made[0]["ssl_ca_certs"] == "/nowhere"
    assert not {"db", "host", "port"} & made[0].keys()
    assert len(made[0]["startup_nodes"]) == 2


def test_redis_py_3_uses_redis_py_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases 3 of redis-py have no cluster client."""
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
    """The error contains the package to install."""
    monkeypatch.setattr(url_module, "cluster_library", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="the extra 'redis-py-cluster' of pybreaker_redis") as caught:
        CircuitRedisStorage.from_url("redis+cluster://:secret@one")
    assert "secret" not in str(caught.value)


def test_silent_server_is_waited_for_until_the_timeout_of_the_url() -> None:
    """A server that accepts connections and does not answer is given up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.05"
        storage = CircuitRedisStorage.from_url(url, timeout=None)
        assert CircuitBreaker(state_storage=storage).call(up) == "answer"
        assert storage.health().condition == "unreachable"
