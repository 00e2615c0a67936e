"""Clients of all kinds, and the connections of our own that are made like theirs."""

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
from pybreaker_redis._redis import pool as pool_module
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.endpoint import Endpoint, command_wait_limit, endpoint_of
from pybreaker_redis._redis.keys import library_class_of
from pybreaker_redis._redis.pool import POOL_CONNECTIONS_MAX, bounded_client
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.clients import KINDS, CredentialProvider, by_port, retrying
from tests.support.sentinel import Sentinels
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

#: Seconds after which nobody is waited for any more; how much later that may be on a machine that does other things.
TIMEOUT = 0.3
MORE = 0.6

#: The same where somebody answers.
ENOUGH = 10.0


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reached(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A server with a port, a socket, and a user ``shop``, for all tests here."""
    with PrivateServer(preferred.binary, port=free_port()) as server:
        with contextlib.closing(server.client()) as client:
            client.execute_command("ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all")
        yield server


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    """Nothing is left of earlier tests."""
    if "reached" in request.fixturenames:
        with contextlib.closing(request.getfixturevalue("reached").client()) as client:
            client.flushall()


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, reached: PrivateServer) -> Iterator[Any]:
    """Each kind of client in turn."""
    made = KINDS[request.param](reached)
    yield made
    made.close()
    made.connection_pool.disconnect()


def in_use(pool: Any) -> int:
    """How many connections a pool has made."""
    free = [made for made in getattr(pool, "_available_connections", ()) if made is not None]
    return len({*map(id, getattr(pool, "_connections", ())), *map(id, free)})


def take(pool: Any) -> Any:
    """A connection of the pool; older libraries want to know what for."""
    needed = inspect.signature(pool.get_connection).parameters["command_name"].default is inspect.Parameter.empty
    return pool.get_connection(*(["PING"] if needed else []))


def connection_arguments_of(pool: Any) -> dict[str, Any]:
    """What a pool's connections are given."""
    return dict(pool.connection_kwargs)


# -- a client's copy ---------------------------------------------------------------------------------------------------


class TestBounded:
    """The same client on connections of its own."""

    def test_copy_reaches_the_same_database_as_the_same_user(self, client: Any) -> None:
        """What one writes the other reads."""
        own = bounded_client(client, ENOUGH)
        assert own is not None
        with deadline(ENOUGH):
            own.set("key", "written")
            assert bytes_of(client.get("key")) == b"written"
            assert bytes_of(own.get("key")) == b"written"
            user = own.execute_command("ACL", "WHOAMI")
        assert bytes_of(user) == bytes_of(client.execute_command("ACL", "WHOAMI"))
        own.connection_pool.disconnect()

    def test_copy_answers_in_bytes(self, client: Any) -> None:
        """Whatever lies there is ours to judge: a client that decodes would fail on some of it."""
        own = bounded_client(client, ENOUGH)
        with deadline(ENOUGH):
            own.set("key", b"\xff\xfe")
            assert own.get("key") == b"\xff\xfe"
            assert (
                own.eval("return redis.call('GET', KEYS[1])", 1, getattr(client, "prefix", "") + "key") == b"\xff\xfe"
            )
        own.connection_pool.disconnect()

    def test_copy_leaves_the_client_as_it_was(self, client: Any) -> None:
        """Its pool, its connections and its settings are the user's; closing ours closes none of them."""
        client.set("mine", 1)
        pool = client.connection_pool
        before = in_use(pool), connection_arguments_of(pool), pool.connection_class, dict(vars(client))
        own = bounded_client(client, ENOUGH)
        assert own.connection_pool is not pool
        with deadline(ENOUGH):
            own.get("mine")
        own.close()
        own.connection_pool.disconnect()
        del own
        gc.collect()
        assert client.connection_pool is pool
        assert (in_use(pool), connection_arguments_of(pool), pool.connection_class, dict(vars(client))) == before
        assert int(client.get("mine")) == 1

    def test_copy_is_a_plain_client_of_the_same_library(self, client: Any) -> None:
        """Methods of subclasses may wait and retry, and what they call the keys was found out before."""
        own = bounded_client(client, ENOUGH)
        assert type(own) is library_class_of(client)
        assert isinstance(client, type(own))
        assert own is not client
        assert issubclass(own.connection_pool.connection_class, client.connection_pool.connection_class)

    def test_copy_neither_repeats_nor_names_nor_asks_after_its_health(self, client: Any) -> None:
        """Trying again is decided elsewhere, and what belongs to the user's connections is not ours."""
        own = bounded_client(client, ENOUGH)
        with deadline(ENOUGH):
            own.ping()
        made = take(own.connection_pool)
        assert made.socket_timeout == ENOUGH
        assert not made.health_check_interval
        assert not made.client_name
        retries = getattr(getattr(made, "retry", None), "_retries", 0)
        assert retries == 0
        assert not made.retry_on_timeout
        own.connection_pool.release(made)
        own.connection_pool.disconnect()

    def test_copy_does_not_wait_longer_than_its_deadline(self, reached: PrivateServer, client: Any) -> None:
        """Whatever the client's own timeouts and retries are: a server that is frozen, a connection or none."""
        own = bounded_client(client, TIMEOUT)
        for connected in (True, False):
            if connected:
                with deadline(ENOUGH):
                    own.ping()
            else:
                own.connection_pool.disconnect()
            reached.pause()
            began = time.monotonic()
            try:
                with pytest.raises(Exception) as caught, deadline(TIMEOUT):  # noqa: PT011 (looked at below)
                    own.set("key", 1)
            finally:
                took = time.monotonic() - began
                reached.resume()
            assert "TimeoutError" in {cls.__name__ for cls in type(caught.value).__mro__}
            assert took < TIMEOUT + MORE
        wait_for(lambda: pings(client), "the server answers again")
        own.connection_pool.disconnect()


def pings(client: Any) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(Exception):
        return bool(client.ping())
    return False


def bytes_of(value: Any) -> bytes:
    """As it lies in Redis."""
    return value if isinstance(value, bytes) else str(value).encode("latin-1")


def test_callbacks_of_the_client_are_kept(reached: PrivateServer) -> None:
    """As far as they are the client's, they are the copy's."""
    client = by_port(reached)
    client.set_response_callback("GET", lambda answer, **_: ("seen", answer))
    own = bounded_client(client, ENOUGH)
    with deadline(ENOUGH):
        own.set("key", "value")
        assert own.get("key") == ("seen", b"value")
    own.connection_pool.disconnect()


def test_pool_of_ones_own_waits_no_longer_than_the_timeout_for_a_connection(reached: PrivateServer) -> None:
    """All of them are in use, so Redis does not answer."""
    own = bounded_client(by_port(reached), TIMEOUT)
    with deadline(10):
        taken = [take(own.connection_pool) for _ in range(POOL_CONNECTIONS_MAX)]
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError):
            own.ping()
        assert TIMEOUT <= time.monotonic() - began < TIMEOUT + MORE
    for made in taken:
        own.connection_pool.release(made)
    own.connection_pool.disconnect()


def test_wrong_password_is_wrong_for_the_copy(reached: PrivateServer) -> None:
    """It has no other credentials than the client's."""
    own = bounded_client(by_port(reached, username="shop", password="wrong"), ENOUGH)
    with pytest.raises((redis.exceptions.AuthenticationError, redis.ResponseError)), deadline(ENOUGH):
        own.ping()
    own.connection_pool.disconnect()


@pytest.mark.skipif(CredentialProvider is None, reason="this redis-py has no credential providers")
def test_credentials_are_asked_for_anew_by_each_connection(reached: PrivateServer) -> None:
    """They may be valid for a quarter of an hour, as in clouds."""
    asked = []

    class Rotating(CredentialProvider):  # type: ignore[misc,valid-type]
        """Of the user's own."""

        def get_credentials(self) -> tuple[str, str]:
            """New ones each time."""
            asked.append(1)
            return "shop", "secret"

    own = bounded_client(by_port(reached, credential_provider=Rotating()), ENOUGH)
    for times in (1, 2):
        with deadline(ENOUGH):
            assert own.ping()
        own.connection_pool.disconnect()
        assert len(asked) == times


def test_handshake_of_the_copy_asks_for_no_more_than_the_clients(reached: PrivateServer) -> None:
    """Every question more is a wait more, where Redis is far."""
    client = by_port(reached)
    client.ping()
    observer = by_port(reached)

    def asked_by(asking: Any) -> dict[str, int]:
        asking.connection_pool.disconnect()
        observer.config_resetstat()
        with deadline(ENOUGH):
            asking.ping()
        stats = observer.info("commandstats")
        return {name: stat["calls"] for name, stat in stats.items() if not name.startswith("cmdstat_config")}

    own = bounded_client(client, ENOUGH)
    theirs, ours = asked_by(client), asked_by(own)
    assert all(count <= theirs.get(name, 0) for name, count in ours.items()), (theirs, ours)
    own.connection_pool.disconnect()
    observer.close()
    client.close()


class Unusual(redis.Redis):
    """A client that is made in a way of its own."""

    def __copy__(self) -> Any:
        """There is no making another."""
        msg = "there is only one"
        raise RuntimeError(msg)


def cluster(kind: Any = None) -> Any:
    """A cluster's client that was never connected."""
    kind = kind or getattr(redis, "RedisCluster", None)
    if kind is None:
        pytest.skip("this redis-py has no clusters")
    made = object.__new__(kind)
    made.nodes_manager = MagicMock(connection_kwargs={"socket_timeout": 5.0})
    # What ends with it was never begun.
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
def test_no_copy_of_what_has_no_single_server(make: Callable[[], Any]) -> None:
    """It is used as it is, and nothing is raised."""
    assert bounded_client(make(), TIMEOUT) is None


def test_copy_of_a_dead_servers_client_connects_to_nobody(tmp_path: Path) -> None:
    """It is made when a circuit is first used, and that may be in an outage."""
    own = bounded_client(redis.Redis(unix_socket_path=str(tmp_path / "nobody")), TIMEOUT)
    assert own is not None
    with pytest.raises(redis.ConnectionError), deadline(TIMEOUT):
        own.ping()


# -- Sentinel ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sentinels(preferred: FoundServer) -> Iterator[Callable[[int], Sentinels]]:
    """So many Sentinels of a master."""
    with contextlib.ExitStack() as stack:

        def start(count: int) -> Sentinels:
            made = Sentinels(preferred.binary, count)
            stack.push(made.stack)
            return made

        yield start


class TestSentinel:
    """A master that Sentinels know."""

    def test_copy_reaches_the_master(self, sentinels: Callable[[int], Sentinels]) -> None:
        """As the Sentinels say; the user's Sentinels are left as they are."""
        manager = sentinels(2).manager(socket_timeout=20)
        client = manager.master_for("shop", db=1)
        pools = [sentinel.connection_pool for sentinel in manager.sentinels]
        before = connection_arguments_of(client.connection_pool), [connection_arguments_of(pool) for pool in pools]
        own = bounded_client(client, ENOUGH)
        with deadline(10):
            own.set("key", "value")
            assert own.get("key") == b"value"
        assert client.get("key") == b"value"
        (idle,) = own.connection_pool._available_connections
        pool_module.close_idle_connections(own.connection_pool)
        assert idle._sock is None
        assert own.connection_pool.sentinel_manager is not manager
        assert [sentinel.connection_pool for sentinel in manager.sentinels] == pools
        assert (
            connection_arguments_of(client.connection_pool),
            [connection_arguments_of(pool) for pool in pools],
        ) == before
        assert client.connection_pool.sentinel_manager is manager
        close_idle_connections(own, client)

    def test_copy_follows_the_master(self, sentinels: Callable[[int], Sentinels]) -> None:
        """After a failover the Sentinels name another one, and that is where the next connection goes."""
        shop = sentinels(1)
        own = bounded_client(shop.manager().master_for("shop"), ENOUGH)
        with deadline(10):
            assert own.ping()
        with PrivateServer(shop.master.binary, port=free_port()) as other:
            with contextlib.closing(shop.sentinels[0].client()) as operator:
                operator.execute_command("SENTINEL", "REMOVE", "shop")
                operator.execute_command("SENTINEL", "MONITOR", "shop", "127.0.0.1", str(other.port), "1")
            shop.master.kill()
            with contextlib.suppress(redis.ConnectionError), deadline(10):
                own.ping()
            with deadline(10):
                own.set("key", "there")
            with contextlib.closing(other.client()) as client:
                assert client.get("key") == b"there"
            close_idle_connections(own)

    def test_frozen_sentinel_leaves_time_for_the_next_one(self, sentinels: Callable[[int], Sentinels]) -> None:
        """Each has its share of the time, and one is left for the master."""
        shop = sentinels(2)
        client = shop.manager(socket_timeout=30).master_for("shop")
        own = bounded_client(client, 3.0)
        shop.sentinels[0].pause()
        began = time.monotonic()
        with deadline(3.0):
            assert own.ping()
        assert time.monotonic() - began > 0.9
        close_idle_connections(own, client)

    @pytest.mark.parametrize("count", [1, 3])
    def test_frozen_sentinels_are_waited_for_no_longer_than_the_deadline(
        self, sentinels: Callable[[int], Sentinels], count: int
    ) -> None:
        """All of them together."""
        shop = sentinels(count)
        client = shop.manager(socket_timeout=30).master_for("shop")
        own = bounded_client(client, TIMEOUT)
        for sentinel in shop.sentinels:
            sentinel.pause()
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError), deadline(TIMEOUT):
            own.ping()
        assert time.monotonic() - began < TIMEOUT + MORE
        close_idle_connections(own, client)

    def test_frozen_master_is_waited_for_no_longer_than_the_deadline(
        self, sentinels: Callable[[int], Sentinels]
    ) -> None:
        """It takes connections, and the Sentinels have not noticed yet."""
        shop = sentinels(1)
        client = shop.manager(socket_timeout=30).master_for("shop")
        own = bounded_client(client, TIMEOUT)
        shop.master.pause()
        began = time.monotonic()
        with pytest.raises((redis.TimeoutError, redis.ConnectionError)), deadline(TIMEOUT):
            own.ping()
        assert time.monotonic() - began < TIMEOUT + MORE
        close_idle_connections(own, client)

    def test_clients_of_one_master_share_a_server_if_one_pool_serves_them(
        self, sentinels: Callable[[int], Sentinels]
    ) -> None:
        """And say by which name they know it."""
        client = sentinels(1).manager().master_for("shop")
        again = redis.Redis(connection_pool=client.connection_pool)
        assert server_for(client) is server_for(again)
        assert str(endpoint_of(client)) == "the master 'shop'/0"


def close_idle_connections(*clients: Any) -> None:
    """Also on the Sentinels."""
    for client in clients:
        client.connection_pool.disconnect()
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            sentinel.connection_pool.disconnect()


# -- how long it may take ----------------------------------------------------------------------------------------------


class TestLongestWait:
    """How many seconds a command may take at most, as far as the settings tell."""

    def test_client_without_a_timeout_waits_without_end(self) -> None:
        """Whatever its retries are."""
        assert command_wait_limit(redis.Redis(socket_timeout=None)) is None

    def test_every_retry_waits_as_long(self) -> None:
        """redis-py 8 retries ten times unless told otherwise."""
        assert command_wait_limit(redis.Redis(socket_timeout=0.5, **ONCE)) == 0.5
        if ONCE:
            assert command_wait_limit(redis.Redis(socket_timeout=0.5, **retrying(3))) == 2.0

    @pytest.mark.skipif(not ONCE, reason="this redis-py never tries again")
    def test_client_that_tries_for_ever_waits_without_end(self) -> None:
        """A negative number of retries means that."""
        assert command_wait_limit(redis.Redis(socket_timeout=0.5, **retrying(-1))) is None

    @pytest.mark.parametrize("make", [fakeredis.FakeRedis, MagicMock, object], ids=["fakeredis", "mock", "object"])
    def test_what_never_waits_or_cannot_be_judged_is_not_complained_of(self, make: Callable[[], Any]) -> None:
        """Nothing is known of it, or it is known not to wait."""
        assert command_wait_limit(make()) == 0.0

    def test_cluster_is_judged_by_its_nodes(self) -> None:
        """It has no pool of its own."""
        made = cluster()
        assert command_wait_limit(made) == 5.0
        made.nodes_manager.connection_kwargs["socket_timeout"] = None
        assert command_wait_limit(made) is None


class TestWarning:
    """What is said of a client whose waits cannot be bounded."""

    @staticmethod
    def said(caplog: pytest.LogCaptureFixture) -> list[str]:
        """The lines about it."""
        return [line for line in caplog.messages if "no connections with deadlines" in line]

    @pytest.mark.parametrize(
        ("seconds", "complaint"), [(None, "without end"), (5.0, "for 5 s"), (1.0, None), (0.1, None)], ids=str
    )
    def test_long_wait_is_said_once(
        self, caplog: pytest.LogCaptureFixture, seconds: float | None, complaint: str | None
    ) -> None:
        """Not for each circuit, not for each call; not for a wait that nobody minds."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=seconds, **ONCE)
        servers = [server_for(client) for _ in range(3)]
        assert servers[0] is servers[1] is servers[2]
        assert all(server.client_with_timeout(client, TIMEOUT) is client for server in servers)
        if complaint is None:
            assert self.said(caplog) == []
        else:
            (line,) = self.said(caplog)
            assert line.startswith("Unusual: ")
            assert f"a guarded call may wait for Redis {complaint}: give the client a socket_timeout" in line

    def test_storages_say_it_when_they_are_first_used(self, caplog: pytest.LogCaptureFixture) -> None:
        """Once for all of them."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=5, **ONCE)
        storages = [CircuitRedisStorage("closed", client, name) for name in ("one", "other")]
        assert self.said(caplog) == []
        for storage in storages:
            assert storage.state == "closed"
            assert storage.state == "closed"
        assert len(self.said(caplog)) == 1

    def test_nothing_is_said_of_who_wants_it_so(self, caplog: pytest.LogCaptureFixture) -> None:
        """`timeout=None` is to use the client as it is."""
        client = Unusual(unix_socket_path="/nowhere", socket_timeout=None, **ONCE)
        assert server_for(client).client_with_timeout(client, None) is client
        assert self.said(caplog) == []

    def test_nothing_is_said_of_a_client_that_is_bounded(self, caplog: pytest.LogCaptureFixture, client: Any) -> None:
        """However long it would wait itself."""
        assert server_for(client).client_with_timeout(client, TIMEOUT) is not client
        assert self.said(caplog) == []


# -- one server --------------------------------------------------------------------------------------------------------


class TestServer:
    """What storages share."""

    def test_clients_of_one_server_and_user_share_pool_and_guard(self, reached: PrivateServer) -> None:
        """When it goes, all circuits know at once, and one thread alone asks again."""
        one, other = by_port(reached), by_port(reached, socket_timeout=3, max_connections=7)
        assert one.connection_pool is not other.connection_pool
        assert server_for(one) is server_for(other)
        server = server_for(one)
        pools = {server.client_with_timeout(client, TIMEOUT).connection_pool for client in (one, other)}
        assert len(pools) == 1
        assert not pools & {one.connection_pool, other.connection_pool}

    def test_storages_of_one_server_share_pool_and_guard(self, reached: PrivateServer) -> None:
        """As an application has it that makes a client wherever it needs one."""
        storages = [CircuitRedisStorage("closed", by_port(reached), name, timeout=10) for name in ("one", "other")]
        for storage in storages:
            assert storage.state == "closed"
        one, other = (storage._core.server for storage in storages)
        assert one is not None
        assert one is other
        assert one.member_count == 2
        assert one.availability is other.availability
        with contextlib.closing(by_port(reached)) as operator:
            assert {storage.health().circuits for storage in storages} == {2}
            own = [made for made in operator.client_list() if made["cmd"].startswith("eval")]
        assert len(own) == 1, "one connection does for both"
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
        """What one may, another need not; and what has gone for one may be there for the other."""
        given = {"host": "127.0.0.1", "port": 6379}
        if len(words) > 1 and "ssl" in words:
            given["ssl"] = True
        one, other = redis.Redis(**given), redis.Redis(**{**given, **words})
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
    def test_clients_that_are_made_alike_share_a_server(self, words: dict[str, Any]) -> None:
        """However many an application makes."""
        if not words.keys() <= inspect.signature(redis.Redis).parameters.keys():
            pytest.skip("this redis-py does not know these words")
        one, other = (redis.Redis(host="there", **words) for _ in range(2))
        assert one.connection_pool is not other.connection_pool
        assert server_for(one) is server_for(other)

    def test_words_of_no_known_constructor_tell_servers_apart(self) -> None:
        """A kind of connection of an application's own may be given a tunnel, or a list of them."""

        class Tunnelled(redis.Connection):
            """By way of another host."""

            def __init__(self, tunnels: Any = None, **words: Any) -> None:
                super().__init__(**words)
                self.tunnels = tunnels

        def server(tunnels: Any) -> Any:
            pool = redis.ConnectionPool(connection_class=Tunnelled, host="there", tunnels=tunnels)
            return server_for(redis.Redis(connection_pool=pool))

        kept = [server(tunnels) for tunnels in (["a"], ["b"], {"a": 1}, {"a"}, None)]
        assert kept[0] is server(["a"])
        assert kept[2] is server({"a": 1})
        assert len({id(item) for item in kept}) == len(kept)

    def test_function_that_connects_tells_servers_apart(self) -> None:
        """It may authenticate."""
        if not ONCE:
            pytest.skip("this redis-py has no such functions")
        one, other = redis.Redis(redis_connect_func=print), redis.Redis(redis_connect_func=repr)
        assert server_for(one) is not server_for(other)

    def test_other_timeout_is_another_pool_of_one_server(self) -> None:
        """A pool waits as long as it was made to; what one circuit finds out about the server holds for all."""
        client = redis.Redis(unix_socket_path="/nowhere")
        server = server_for(client)
        one, other, same = (server.client_with_timeout(client, timeout) for timeout in (TIMEOUT, 2 * TIMEOUT, TIMEOUT))
        assert one.connection_pool is same.connection_pool
        assert one.connection_pool is not other.connection_pool
        assert other.connection_pool.timeout == 2 * TIMEOUT
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
    def test_url_and_words_that_lead_to_the_same_place_are_one_server(self, url: str, words: dict[str, Any]) -> None:
        """Some of an application is configured by a URL, as django-redis is, and some by words."""
        one, other = server_for(redis.Redis.from_url(url)), server_for(redis.Redis(**words))
        assert one is other

    def test_clients_of_two_libraries_share_nothing(self) -> None:
        """Their pools do not go together."""
        one, other = redis.Redis(unix_socket_path="/there"), valkey.Valkey(unix_socket_path="/there")
        assert server_for(one) is not server_for(other)

    def test_client_without_an_origin_is_a_server_of_its_own(self) -> None:
        """Nobody knows whether two of them are the same."""
        one, other = MagicMock(), MagicMock()
        kept = server_for(one)
        assert kept is server_for(one)
        assert kept is not server_for(other)
        assert kept._client is one
        assert str(kept) == "MagicMock"

    def test_server_ends_with_the_last_storage(self) -> None:
        """A process that makes clients for each request does not collect servers."""
        client = redis.Redis(unix_socket_path="/nowhere")
        storage = CircuitRedisStorage("closed", client)
        assert storage.state == "closed"
        server = weakref.ref(server_for(client))
        assert server() is storage._core.server
        ended = server().availability.outage  # type: ignore[union-attr]
        assert ended is not None, "nobody is there"
        del storage
        gc.collect()
        wait_for(lambda: gc.collect() is not None and server() is None, "the thread that asks again lets go of it")


class TestOrigin:
    """Where a client's commands go."""

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
    def test_origin_says_where_it_is_and_no_secrets(self, client: Callable[[], Any], said: str) -> None:
        """For lines in the log."""
        assert str(endpoint_of(client())) == said

    @pytest.mark.parametrize("make", [cluster, fakeredis.FakeRedis, MagicMock, object])
    def test_what_has_no_single_place_has_no_origin(self, make: Callable[[], Any]) -> None:
        """Clusters are many places, and fakeredis is none."""
        assert endpoint_of(make()) is None

    def test_origin_connects_once_without_retries(self, tmp_path: Path) -> None:
        """Its timeouts are those that it is given."""
        endpoint = endpoint_of(redis.Redis(unix_socket_path=str(tmp_path / "nobody"), socket_timeout=60))
        assert isinstance(endpoint, Endpoint)
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError):
            endpoint.connect(timeout=ENOUGH)
        assert time.monotonic() - began < ENOUGH
