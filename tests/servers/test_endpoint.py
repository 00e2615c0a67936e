"""Endpoints: clients of all kinds, and the package's own connections made like theirs."""

from __future__ import annotations

import contextlib
import gc
import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import fakeredis
import pytest
import redis
import valkey

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.connections import pool as pool_module
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.connections.pool import POOL_CONNECTIONS_MAX, bounded_client
from pybreaker_redis._redis.endpoint import Endpoint, command_wait_limit, endpoint_of
from pybreaker_redis._redis.keys import library_class_of
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.clients import KINDS, SAMPLE, CredentialProvider, by_port, retrying
from tests.support.inspect import connections_of, first_client_of, server_of
from tests.support.logs import messages_of
from tests.support.selection import but_for
from tests.support.sentinel import Sentinels
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

#: Seconds of a short deadline, and how much later an operation may end on a busy machine.
TIMEOUT_S = 0.3
TOLERANCE_S = 0.6

#: Seconds of a deadline that an answering server never reaches.
GENEROUS_S = 10.0


@pytest.fixture(scope="module")
def reached(preferred: FoundServer) -> Iterator[PrivateServer]:
    """Yield a server with a port, a socket and a user ``shop``, for all tests of this module."""
    with PrivateServer(preferred.binary, port=free_port()) as server:
        with contextlib.closing(server.client()) as client:
            client.execute_command("ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all")
        yield server


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    """Delete all keys of earlier tests."""
    if "reached" in request.fixturenames:
        with contextlib.closing(request.getfixturevalue("reached").client()) as client:
            client.flushall()


@pytest.fixture(params=but_for(SAMPLE, KINDS))
def client(request: pytest.FixtureRequest, reached: PrivateServer) -> Iterator[Any]:
    """Yield a client of each kind."""
    made = KINDS[request.param](reached)
    yield made
    made.close()
    made.connection_pool.disconnect()


def in_use(pool: Any) -> int:
    """Return the number of connections that a pool has created."""
    free = [made for made in getattr(pool, "_available_connections", ()) if made is not None]
    return len({*map(id, connections_of(pool)), *map(id, free)})


def take_connection(pool: Any) -> Any:
    """Take a connection of the pool. Older libraries require the name of a command."""
    needed = inspect.signature(pool.get_connection).parameters["command_name"].default is inspect.Parameter.empty
    return pool.get_connection(*(["PING"] if needed else []))


def connection_arguments_of(pool: Any) -> dict[str, Any]:
    """Return the arguments of a pool's connections."""
    return dict(pool.connection_kwargs)


class TestBounded:
    """The bounded copy of a client, on connections of this package."""

    def test_copy_reaches_the_same_database_as_the_same_user(self, client: Any) -> None:
        """The copy reads what the client writes, and vice versa."""
        copy = bounded_client(client, GENEROUS_S)
        assert copy is not None
        with deadline(GENEROUS_S):
            copy.set("key", "written")
            assert bytes_of(client.get("key")) == b"written"
            assert bytes_of(copy.get("key")) == b"written"
            user = copy.execute_command("ACL", "WHOAMI")
        assert bytes_of(user) == bytes_of(client.execute_command("ACL", "WHOAMI"))
        copy.connection_pool.disconnect()

    def test_copy_answers_in_bytes(self, client: Any) -> None:
        """Keys may contain any bytes, and a client that decodes would fail on some of them."""
        copy = bounded_client(client, GENEROUS_S)
        with deadline(GENEROUS_S):
            copy.set("key", b"\xff\xfe")
            assert copy.get("key") == b"\xff\xfe"
            assert (
                copy.eval("return redis.call('GET', KEYS[1])", 1, getattr(client, "prefix", "") + "key") == b"\xff\xfe"
            )
        copy.connection_pool.disconnect()

    def test_copy_leaves_the_client_as_it_was(self, client: Any) -> None:
        """The pool, connections and settings of the client belong to the application.

        Closing the copy closes none of them.
        """
        client.set("mine", 1)
        pool = client.connection_pool
        before = in_use(pool), connection_arguments_of(pool), pool.connection_class, dict(vars(client))
        copy = bounded_client(client, GENEROUS_S)
        assert copy.connection_pool is not pool
        with deadline(GENEROUS_S):
            copy.get("mine")
        copy.close()
        copy.connection_pool.disconnect()
        del copy
        gc.collect()
        assert client.connection_pool is pool
        assert (in_use(pool), connection_arguments_of(pool), pool.connection_class, dict(vars(client))) == before
        assert int(client.get("mine")) == 1

    def test_copy_is_a_plain_client_of_the_same_library(self, client: Any) -> None:
        """Methods of a subclass may wait and retry, and the names of its keys have been determined before."""
        copy = bounded_client(client, GENEROUS_S)
        assert type(copy) is library_class_of(client)
        assert isinstance(client, type(copy))
        assert copy is not client
        assert issubclass(copy.connection_pool.connection_class, client.connection_pool.connection_class)

    def test_copy_has_no_retries_name_or_health_checks(self, client: Any) -> None:
        """Retries are decided elsewhere, and names and health checks are for the application's connections."""
        copy = bounded_client(client, GENEROUS_S)
        with deadline(GENEROUS_S):
            copy.ping()
        made = take_connection(copy.connection_pool)
        assert made.socket_timeout == GENEROUS_S
        assert not made.health_check_interval
        assert not made.client_name
        retries = getattr(getattr(made, "retry", None), "_retries", 0)
        assert retries == 0
        assert not made.retry_on_timeout
        copy.connection_pool.release(made)
        copy.connection_pool.disconnect()

    def test_copy_does_not_wait_longer_than_its_deadline(self, reached: PrivateServer, client: Any) -> None:
        """The deadline holds for a frozen server, with or without a connection, whatever the client's settings."""
        copy = bounded_client(client, TIMEOUT_S)
        for connected in (True, False):
            if connected:
                with deadline(GENEROUS_S):
                    copy.ping()
            else:
                copy.connection_pool.disconnect()
            reached.pause()
            began = time.monotonic()
            try:
                with pytest.raises(Exception) as caught, deadline(TIMEOUT_S):  # noqa: PT011 (the class is checked below)
                    copy.set("key", 1)
            finally:
                seconds = time.monotonic() - began
                reached.resume()
            assert "TimeoutError" in {cls.__name__ for cls in type(caught.value).__mro__}
            assert seconds < TIMEOUT_S + TOLERANCE_S
        wait_for(lambda: answers(client), "an answer of the resumed server")
        copy.connection_pool.disconnect()


def answers(client: Any) -> bool:
    """Return whether the server answers."""
    with contextlib.suppress(Exception):
        return bool(client.ping())
    return False


def bytes_of(value: Any) -> bytes:
    """Return the value as Redis stores it."""
    return value if isinstance(value, bytes) else str(value).encode("latin-1")


def test_copy_has_the_callbacks_of_the_client(reached: PrivateServer) -> None:
    """The copy uses the response callbacks of the client."""
    client = by_port(reached)
    client.set_response_callback("GET", lambda answer, **_: ("seen", answer))
    copy = bounded_client(client, GENEROUS_S)
    with deadline(GENEROUS_S):
        copy.set("key", "value")
        assert copy.get("key") == ("seen", b"value")
    copy.connection_pool.disconnect()


def test_private_pool_waits_for_a_connection_until_the_timeout(reached: PrivateServer) -> None:
    """While all connections are in use, Redis counts as unreachable."""
    copy = bounded_client(by_port(reached), TIMEOUT_S)
    with deadline(10):
        connections = [take_connection(copy.connection_pool) for _ in range(POOL_CONNECTIONS_MAX)]
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError):
            copy.ping()
        assert TIMEOUT_S <= time.monotonic() - began < TIMEOUT_S + TOLERANCE_S
    for made in connections:
        copy.connection_pool.release(made)
    copy.connection_pool.disconnect()


def test_copy_fails_with_the_wrong_password_of_its_client(reached: PrivateServer) -> None:
    """The copy has no other credentials than the client."""
    copy = bounded_client(by_port(reached, username="shop", password="wrong"), GENEROUS_S)
    with pytest.raises((redis.exceptions.AuthenticationError, redis.ResponseError)), deadline(GENEROUS_S):
        copy.ping()
    copy.connection_pool.disconnect()


@pytest.mark.skipif(CredentialProvider is None, reason="this redis-py has no credential providers")
def test_credentials_are_requested_by_each_connection(reached: PrivateServer) -> None:
    """Credentials may be valid for a quarter of an hour, as in clouds."""
    requests = []

    class Rotating(CredentialProvider):  # type: ignore[misc,valid-type]
        """Credential provider of an application."""

        def get_credentials(self) -> tuple[str, str]:
            """Return credentials, and count the request."""
            requests.append(1)
            return "shop", "secret"

    copy = bounded_client(by_port(reached, credential_provider=Rotating()), GENEROUS_S)
    for times in (1, 2):
        with deadline(GENEROUS_S):
            assert copy.ping()
        copy.connection_pool.disconnect()
        assert len(requests) == times


def test_handshake_of_the_copy_sends_no_more_than_that_of_the_client(reached: PrivateServer) -> None:
    """Each further command would cost a round trip, which is slow where Redis is far away."""
    client = by_port(reached)
    client.ping()
    observer = by_port(reached)

    def commands_of(requester: Any) -> dict[str, int]:
        requester.connection_pool.disconnect()
        observer.config_resetstat()
        with deadline(GENEROUS_S):
            requester.ping()
        stats = observer.info("commandstats")
        return {name: stat["calls"] for name, stat in stats.items() if not name.startswith("cmdstat_config")}

    copy = bounded_client(client, GENEROUS_S)
    theirs, ours = commands_of(client), commands_of(copy)
    assert all(count <= theirs.get(name, 0) for name, count in ours.items()), (theirs, ours)
    copy.connection_pool.disconnect()
    observer.close()
    client.close()


class Unusual(redis.Redis):
    """Client that cannot be copied."""

    def __copy__(self) -> Any:
        """Raise, because no second client is possible."""
        msg = "there is only one"
        raise RuntimeError(msg)


def cluster(kind: Any = None) -> Any:
    """Return a cluster client that was never connected."""
    kind = kind or getattr(redis, "RedisCluster", None)
    if kind is None:
        pytest.skip("this redis-py has no clusters")
    made = object.__new__(kind)
    made.nodes_manager = MagicMock(connection_kwargs={"socket_timeout": 5.0})
    # The object was never initialised, so there is nothing to close.
    made.close = lambda: None
    return made


@pytest.mark.parametrize(
    "make",
    [
        cluster,
        lambda: cluster(valkey.ValkeyCluster),
        fakeredis.FakeRedis,
        lambda: fakeredis.FakeStrictRedis(decode_responses=True),
        MagicMock,
        lambda: MagicMock(spec=redis.Redis),
        lambda: Unusual(unix_socket_path="/nowhere"),
        object,
        lambda: None,
    ],
    ids=[
        "cluster",
        "valkey's cluster",
        "fakeredis",
        "decoding fake",
        "mock",
        "mock of a client",
        "unusual",
        "object",
        "nothing",
    ],
)
def test_client_without_a_single_server_has_no_copy(make: Callable[[], Any]) -> None:
    """The client itself is used, and no error is raised."""
    assert bounded_client(make(), TIMEOUT_S) is None


def test_copy_for_a_dead_server_is_created_without_a_connection(tmp_path: Path) -> None:
    """The copy is created at the circuit's first use, which may be during an outage."""
    copy = bounded_client(redis.Redis(unix_socket_path=str(tmp_path / "nobody")), TIMEOUT_S)
    assert copy is not None
    with pytest.raises(redis.ConnectionError), deadline(TIMEOUT_S):
        copy.ping()


@pytest.fixture
def sentinels(preferred: FoundServer) -> Iterator[Callable[[int], Sentinels]]:
    """Yield a function that starts a number of Sentinels of one master."""
    with contextlib.ExitStack() as stack:

        def start(count: int) -> Sentinels:
            made = Sentinels(preferred.binary, count)
            stack.push(made.stack)
            return made

        yield start


class TestSentinel:
    """A master behind Sentinels."""

    def test_copy_reaches_the_master(self, sentinels: Callable[[int], Sentinels]) -> None:
        """The copy queries its own Sentinels for the master. The application's Sentinels do not change."""
        manager = sentinels(2).manager(socket_timeout=20)
        client = manager.master_for("shop", db=1)
        pools = [sentinel.connection_pool for sentinel in manager.sentinels]
        before = connection_arguments_of(client.connection_pool), [connection_arguments_of(pool) for pool in pools]
        copy = bounded_client(client, GENEROUS_S)
        with deadline(10):
            copy.set("key", "value")
            assert copy.get("key") == b"value"
        assert client.get("key") == b"value"
        (idle,) = copy.connection_pool._available_connections
        pool_module.close_idle_connections(copy.connection_pool)
        assert idle._sock is None
        assert copy.connection_pool.sentinel_manager is not manager
        assert [sentinel.connection_pool for sentinel in manager.sentinels] == pools
        assert (
            connection_arguments_of(client.connection_pool),
            [connection_arguments_of(pool) for pool in pools],
        ) == before
        assert client.connection_pool.sentinel_manager is manager
        close_idle_connections(copy, client)

    def test_copy_follows_the_master(self, sentinels: Callable[[int], Sentinels]) -> None:
        """After a failover, the next connection goes to the master that the Sentinels name."""
        shop = sentinels(1)
        copy = bounded_client(shop.manager().master_for("shop"), GENEROUS_S)
        with deadline(10):
            assert copy.ping()
        with PrivateServer(shop.master.binary, port=free_port()) as other:
            with contextlib.closing(shop.sentinels[0].client()) as operator:
                operator.execute_command("SENTINEL", "REMOVE", "shop")
                operator.execute_command("SENTINEL", "MONITOR", "shop", "127.0.0.1", str(other.port), "1")
            shop.master.kill()
            with contextlib.suppress(redis.ConnectionError), deadline(10):
                copy.ping()
            with deadline(10):
                copy.set("key", "there")
            with contextlib.closing(other.client()) as client:
                assert client.get("key") == b"there"
            close_idle_connections(copy)

    def test_frozen_sentinel_leaves_time_for_the_next_one(self, sentinels: Callable[[int], Sentinels]) -> None:
        """Each Sentinel has its share of the time, and one share is for the master."""
        shop = sentinels(2)
        client = shop.manager(socket_timeout=30).master_for("shop")
        copy = bounded_client(client, 3.0)
        shop.sentinels[0].pause()
        began = time.monotonic()
        with deadline(3.0):
            assert copy.ping()
        assert time.monotonic() - began > 0.9
        close_idle_connections(copy, client)

    @pytest.mark.parametrize("count", [1, 3])
    def test_frozen_sentinels_are_waited_for_no_longer_than_the_deadline(
        self, sentinels: Callable[[int], Sentinels], count: int
    ) -> None:
        """The deadline is for all Sentinels together."""
        shop = sentinels(count)
        client = shop.manager(socket_timeout=30).master_for("shop")
        copy = bounded_client(client, TIMEOUT_S)
        for sentinel in shop.sentinels:
            sentinel.pause()
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError), deadline(TIMEOUT_S):
            copy.ping()
        assert time.monotonic() - began < TIMEOUT_S + TOLERANCE_S
        close_idle_connections(copy, client)

    def test_frozen_master_is_waited_for_no_longer_than_the_deadline(
        self, sentinels: Callable[[int], Sentinels]
    ) -> None:
        """The frozen master accepts connections, and the Sentinels have not noticed yet."""
        shop = sentinels(1)
        client = shop.manager(socket_timeout=30).master_for("shop")
        copy = bounded_client(client, TIMEOUT_S)
        shop.master.pause()
        began = time.monotonic()
        with pytest.raises((redis.TimeoutError, redis.ConnectionError)), deadline(TIMEOUT_S):
            copy.ping()
        assert time.monotonic() - began < TIMEOUT_S + TOLERANCE_S
        close_idle_connections(copy, client)

    def test_clients_of_one_master_share_a_server_if_one_pool_serves_them(
        self, sentinels: Callable[[int], Sentinels]
    ) -> None:
        """The endpoint's text contains the name of the service."""
        client = sentinels(1).manager().master_for("shop")
        again = redis.Redis(connection_pool=client.connection_pool)
        assert server_for(client) is server_for(again)
        assert str(endpoint_of(client)) == "the master 'shop'/0"


def close_idle_connections(*clients: Any) -> None:
    """Close all connections, including those to the Sentinels."""
    for client in clients:
        client.connection_pool.disconnect()
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            sentinel.connection_pool.disconnect()


class TestCommandWaitLimit:
    """The longest wait of a command in seconds, as far as the settings determine one."""

    def test_client_without_a_timeout_waits_without_end(self) -> None:
        """The number of retries does not matter."""
        assert command_wait_limit(redis.Redis(socket_timeout=None)) is None

    def test_every_retry_waits_as_long(self) -> None:
        """Releases 8 of redis-py retry ten times by default."""
        assert command_wait_limit(redis.Redis(socket_timeout=0.5, **ONCE)) == 0.5
        if ONCE:
            assert command_wait_limit(redis.Redis(socket_timeout=0.5, **retrying(3))) == 2.0

    @pytest.mark.skipif(not ONCE, reason="this redis-py never tries again")
    def test_client_that_retries_for_ever_waits_without_end(self) -> None:
        """A negative number of retries has no end."""
        assert command_wait_limit(redis.Redis(socket_timeout=0.5, **retrying(-1))) is None

    @pytest.mark.parametrize("make", [fakeredis.FakeRedis, MagicMock, object], ids=["fakeredis", "mock", "object"])
    def test_client_of_unknown_waits_has_a_limit_of_zero(self, make: Callable[[], Any]) -> None:
        """A client that never waits or has unknown waits, causes no warning."""
        assert command_wait_limit(make()) == 0.0

    def test_cluster_is_judged_by_its_nodes(self) -> None:
        """A cluster client has no pool."""
        made = cluster()
        assert command_wait_limit(made) == 5.0
        made.nodes_manager.connection_kwargs["socket_timeout"] = None
        assert command_wait_limit(made) is None


class TestWarning:
    """The warning about a client with unbounded waits."""

    @staticmethod
    def warnings(caplog: pytest.LogCaptureFixture, client: Any) -> list[str]:
        """Return the warnings about unbounded clients."""
        return messages_of(caplog, f"{type(client).__name__}: ")

    @pytest.mark.parametrize(
        ("seconds", "complaint"), [(None, "without end"), (5.0, "for 5 s"), (1.0, None), (0.1, None)], ids=str
    )
    def test_long_wait_is_logged_once(
        self, caplog: pytest.LogCaptureFixture, seconds: float | None, complaint: str | None
    ) -> None:
        """The warning appears neither for each circuit nor for each call, and not for a short wait."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=seconds, **ONCE)
        servers = [server_for(client) for _ in range(3)]
        assert servers[0] is servers[1] is servers[2]
        assert all(server.client_with_timeout(client, TIMEOUT_S) is client for server in servers)
        if complaint is None:
            assert self.warnings(caplog, client) == []
        else:
            (line,) = self.warnings(caplog, client)
            assert line.startswith("Unusual: ")
            assert f"a guarded call may wait for Redis {complaint}, so set the client's socket_timeout" in line

    def test_long_wait_is_logged_at_the_first_use_of_a_storage(self, caplog: pytest.LogCaptureFixture) -> None:
        """One warning covers all storages of the client."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=5, **ONCE)
        storages = [CircuitRedisStorage("closed", client, name) for name in ("one", "other")]
        assert self.warnings(caplog, client) == []
        for storage in storages:
            assert storage.state == "closed"
            assert storage.state == "closed"
        assert len(self.warnings(caplog, client)) == 1

    def test_client_without_a_timeout_by_choice_is_not_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """With `timeout=None`, the application chooses to use the client unchanged."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=None, **ONCE)
        assert server_for(client).client_with_timeout(client, None) is client
        assert self.warnings(caplog, client) == []

    def test_bounded_client_is_not_logged(self, caplog: pytest.LogCaptureFixture, client: Any) -> None:
        """The client's own timeouts do not matter."""
        assert server_for(client).client_with_timeout(client, TIMEOUT_S) is not client
        assert self.warnings(caplog, client) == []


class TestServer:
    """The server that storages share."""

    def test_clients_of_one_server_and_user_share_pool_and_availability(self, reached: PrivateServer) -> None:
        """All circuits notice an outage at once, and only one thread retries."""
        one, other = by_port(reached), by_port(reached, socket_timeout=3, max_connections=7)
        assert one.connection_pool is not other.connection_pool
        assert server_for(one) is server_for(other)
        server = server_for(one)
        pools = {server.client_with_timeout(client, TIMEOUT_S).connection_pool for client in (one, other)}
        assert len(pools) == 1
        assert not pools & {one.connection_pool, other.connection_pool}

    def test_storages_of_one_server_share_pool_and_availability(self, reached: PrivateServer) -> None:
        """An application may create a client wherever it needs one."""
        storages = [CircuitRedisStorage("closed", by_port(reached), name, timeout=10) for name in ("one", "other")]
        for storage in storages:
            assert storage.state == "closed"
        one, other = (server_of(storage) for storage in storages)
        assert one is not None
        assert one is other
        assert one.member_count == 2
        assert one.availability is other.availability
        with contextlib.closing(by_port(reached)) as operator:
            assert {storage.health().circuits for storage in storages} == {2}
            copy = [made for made in operator.client_list() if made["cmd"].startswith("eval")]
        assert len(copy) == 1, "both storages share a connection"
        one.close_idle_pools()

    @pytest.mark.parametrize(
        "words",
        [
            {"db": 1},
            {"username": "shop", "password": "secret"},
            {"port": 1},
            {"host": "127.0.0.2"},
            {"password": "other"},
            {"ssl": True},
            {"ssl": True, "ssl_cert_reqs": "none"},
            {"ssl": True, "ssl_cert_reqs": None},
            {"ssl": True, "ssl_ca_certs": "/authority.pem"},
            {"ssl": True, "ssl_certfile": "/client.pem", "ssl_keyfile": "/client.pem"},
        ],
        ids="+".join,
    )
    def test_clients_of_other_servers_users_or_databases_share_nothing(self, words: dict[str, Any]) -> None:
        """Users have different rights, and one server may be reachable while another is not."""
        defaults = {"host": "127.0.0.1", "port": 6379}
        if len(words) > 1 and "ssl" in words:
            defaults["ssl"] = True
        one, other = redis.Redis(**defaults), redis.Redis(**{**defaults, **words})
        assert server_for(one) is not server_for(other)

    @pytest.mark.parametrize(
        "words",
        [
            {"ssl": True, "ssl_ca_certs": "/authority.pem", "ssl_cert_reqs": "required"},
            {"socket_keepalive_options": {1: 2}},
            {"redis_connect_func": print},
        ],
        ids="+".join,
    )
    def test_clients_with_equal_arguments_share_a_server(self, words: dict[str, Any]) -> None:
        """The number of clients does not matter."""
        if not words.keys() <= inspect.signature(redis.Redis).parameters.keys():
            pytest.skip("this redis-py does not know these words")
        one, other = (redis.Redis(host="there", **words) for _ in range(2))
        assert one.connection_pool is not other.connection_pool
        assert server_for(one) is server_for(other)

    def test_unknown_arguments_distinguish_servers(self) -> None:
        """A connection class of an application may have an unknown argument, such as a list of tunnels."""

        class Tunnelled(redis.Connection):
            """Connection by way of other hosts."""

            def __init__(self, tunnels: Any = None, **words: Any) -> None:
                super().__init__(**words)
                self.tunnels = tunnels

        def server(tunnels: Any) -> Any:
            pool = redis.ConnectionPool(connection_class=Tunnelled, host="there", tunnels=tunnels)
            return server_for(redis.Redis(connection_pool=pool))

        servers = [server(tunnels) for tunnels in (["a"], ["b"], {"a": 1}, {"a"}, None)]
        assert servers[0] is server(["a"])
        assert servers[2] is server({"a": 1})
        assert len({id(item) for item in servers}) == len(servers)

    def test_connect_function_distinguishes_servers(self) -> None:
        """The function may authenticate."""
        if not ONCE:
            pytest.skip("this redis-py has no such functions")
        one, other = redis.Redis(redis_connect_func=print), redis.Redis(redis_connect_func=repr)
        assert server_for(one) is not server_for(other)

    def test_each_timeout_has_its_own_pool_of_one_server(self) -> None:
        """A pool has one timeout. The availability of the server is the same for all its pools."""
        client = redis.Redis(unix_socket_path="/nowhere")
        server = server_for(client)
        one, other, same = (
            server.client_with_timeout(client, timeout) for timeout in (TIMEOUT_S, 2 * TIMEOUT_S, TIMEOUT_S)
        )
        assert one.connection_pool is same.connection_pool
        assert one.connection_pool is not other.connection_pool
        assert other.connection_pool.timeout == 2 * TIMEOUT_S
        assert server.client_with_timeout(client, None) is client

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("redis://there:7000/0", {"host": "there", "port": 7000}),
            ("redis://there:7000", {"host": "there", "port": 7000}),
            ("redis://there:7000/2", {"host": "there", "port": 7000, "db": 2}),
            (
                "redis://shop:secret@there:7000/0",
                {"host": "there", "port": 7000, "username": "shop", "password": "secret"},
            ),
            ("unix:///there.sock", {"unix_socket_path": "/there.sock"}),
            ("redis://localhost", {}),
        ],
    )
    def test_url_and_arguments_of_the_same_endpoint_are_one_server(self, url: str, words: dict[str, Any]) -> None:
        """Parts of an application are configured by URL, as with django-redis, and other parts by arguments."""
        one, other = server_for(redis.Redis.from_url(url)), server_for(redis.Redis(**words))
        assert one is other

    def test_clients_of_two_libraries_share_nothing(self) -> None:
        """Pools of two libraries are not compatible."""
        one, other = redis.Redis(unix_socket_path="/there"), valkey.Valkey(unix_socket_path="/there")
        assert server_for(one) is not server_for(other)

    def test_client_without_an_endpoint_has_its_own_server(self) -> None:
        """Two clients without an endpoint may be clients of different servers."""
        one, other = MagicMock(), MagicMock()
        servers = server_for(one)
        assert servers is server_for(one)
        assert servers is not server_for(other)
        assert first_client_of(servers) is one
        assert str(servers) == "MagicMock"

    def test_server_ends_with_the_last_storage(self) -> None:
        """A process that creates a client for each request does not collect servers."""
        client = redis.Redis(unix_socket_path="/nowhere")
        storage = CircuitRedisStorage("closed", client)
        assert storage.state == "closed"
        server = weakref.ref(server_for(client))
        assert server() is server_of(storage)
        ended = server().availability.outage  # type: ignore[union-attr]
        assert ended is not None, "no server is running"
        del storage
        gc.collect()
        wait_for(lambda: gc.collect() is not None and server() is None, "the end of the server object")


class TestEndpoint:
    """The endpoint of a client's commands."""

    @pytest.mark.parametrize(
        ("client", "said"),
        [
            (redis.Redis, "localhost:6379/0"),
            (lambda: redis.Redis(host="there", port=1, db=2), "there:1/2"),
            (lambda: redis.Redis(unix_socket_path="/there"), "/there/0"),
            (lambda: redis.Redis.from_url("redis://there/3"), "there:6379/3"),
            (lambda: redis.Redis(password="secret"), "localhost:6379/0"),
        ],
    )
    def test_text_of_an_endpoint_contains_its_address_and_no_secret(self, client: Callable[[], Any], said: str) -> None:
        """The text is for the log."""
        assert str(endpoint_of(client())) == said

    @pytest.mark.parametrize("make", [cluster, fakeredis.FakeRedis, MagicMock, object])
    def test_client_without_a_single_address_has_no_endpoint(self, make: Callable[[], Any]) -> None:
        """Clusters have many endpoints, and fakeredis has none."""
        assert endpoint_of(make()) is None

    def test_endpoint_connects_once_without_retries(self, tmp_path: Path) -> None:
        """The connection has only the timeout that is given."""
        endpoint = endpoint_of(redis.Redis(unix_socket_path=str(tmp_path / "nobody"), socket_timeout=60))
        assert isinstance(endpoint, Endpoint)
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError):
            endpoint.connect(timeout=GENEROUS_S)
        assert time.monotonic() - began < GENEROUS_S
