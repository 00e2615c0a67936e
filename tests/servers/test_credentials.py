"""Credentials: passwords that are replaced while a process runs, and connect functions of applications."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pybreaker
import pytest
import redis
import redis.sentinel
import valkey

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.connections import pool
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.connections.pool import bounded_client, has_new_credentials, replace_credentials
from pybreaker_redis._redis.endpoint import connection_arguments_of, endpoint_of
from pybreaker_redis._redis.keys import CLUSTER_SLOT_COUNT
from pybreaker_redis._redis.locator import CircuitLocator
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.clients import CredentialProvider
from tests.support.cluster import bus_port
from tests.support.inspect import retry_threads, storage_of, view_of
from tests.support.interrupts import JobTimeout, alarm, raising
from tests.support.logs import SECRET, messages_of, whole_log
from tests.support.selection import but_for
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners")

#: Timeout of an operation, seconds: long, because rotation is the subject and not an outage.
GENEROUS_S = 10.0


@pytest.fixture
def protected_server(killable_server: PrivateServer) -> Iterator[PrivateServer]:
    """Yield a server with the password ``old``."""
    with contextlib.closing(killable_server.client()) as operator:
        operator.config_set("requirepass", "old")
    yield killable_server
    # The starter of the server checks its health without a password.
    with contextlib.suppress(redis.RedisError), contextlib.closing(operator_of(killable_server, "new")) as operator:
        operator.config_set("requirepass", "")


def operator_of(server: PrivateServer, password: str) -> redis.Redis:
    """Return the client of an operator with all rights."""
    return redis.Redis(unix_socket_path=server.unix_socket, password=password)


def replace_password(server: PrivateServer) -> None:
    """Replace the password ``old`` by ``new``, and close the connections of all clients."""
    with contextlib.closing(operator_of(server, "old")) as operator:
        operator.config_set("requirepass", "new")
        operator.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with contextlib.suppress(redis.RedisError):
            operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


def breaker_of(client: Any, **words: Any) -> pybreaker.CircuitBreaker:
    """Return a breaker that has made a call."""
    storage = CircuitRedisStorage("closed", client, namespace="iam", timeout=GENEROUS_S, **words)
    breaker = pybreaker.CircuitBreaker(fail_max=9, state_storage=storage)
    assert breaker.call(up) == "answer"
    assert storage_of(breaker).health().condition == "connected"
    return breaker


def assert_recovery(breaker: pybreaker.CircuitBreaker, server: PrivateServer) -> None:
    """Assert that failures count in Redis again, and that pushes arrive."""
    storage: Any = storage_of(breaker)
    with pytest.raises(Down):
        breaker.call(down)
    with contextlib.closing(operator_of(server, "new")) as operator:
        # A read of the circuit reports failures that were counted while another thread fetched the new password.
        wait_for(
            lambda: breaker.current_state and operator.get("iam:pybreaker:fail_counter") == b"1",
            "the counted failure",
        )
    wait_for(lambda: storage.health().condition == "connected", "the connection")

    def is_subscribed() -> bool:
        with contextlib.suppress(Down):
            breaker.call(up)
        return bool(storage.health().push != "none")

    if view_of(storage).max_staleness:
        wait_for(is_subscribed, "a subscription")


class TestRotation:
    """A password is replaced at the server and in the application while the process runs."""

    def test_password_that_is_replaced_in_the_pool_is_used(self, protected_server: PrivateServer) -> None:
        """Some rotations replace the password only in the arguments of the pool."""
        client = redis.Redis(unix_socket_path=protected_server.unix_socket, password="old")
        breaker = breaker_of(client)
        replace_password(protected_server)
        client.connection_pool.connection_kwargs["password"] = "new"
        assert_recovery(breaker, protected_server)

    def test_password_that_is_replaced_late_is_used_with_the_next_retry(self, protected_server: PrivateServer) -> None:
        """The server has the new password first. Until the application has the password, its circuits are local."""
        client = redis.Redis(unix_socket_path=protected_server.unix_socket, password="old")
        breaker = breaker_of(client)
        replace_password(protected_server)
        with pytest.raises(Down):
            breaker.call(down)
        assert storage_of(breaker).health().condition == "unreachable"
        client.connection_pool.connection_kwargs["password"] = "new"
        with contextlib.closing(operator_of(protected_server, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the reported failure")
        wait_for(lambda: not retry_threads(), "the end of the retry thread")

    @pytest.mark.parametrize("max_staleness", [0, 1.0])
    def test_callable_is_called_again_once_its_password_is_rejected(
        self, protected_server: PrivateServer, max_staleness: float
    ) -> None:
        """The callable reads a file or queries a vault each time."""
        password = ["old"]
        made = []

        def client() -> redis.Redis:
            made.append(redis.Redis(unix_socket_path=protected_server.unix_socket, password=password[0]))
            return made[-1]

        breaker = breaker_of(client, max_staleness=max_staleness)
        assert len(made) == 1
        replace_password(protected_server)
        password[0] = "new"
        assert_recovery(breaker, protected_server)
        assert len(made) <= 3

    def test_callable_that_has_the_new_password_late_is_called_again(self, protected_server: PrivateServer) -> None:
        """The server is unreachable at that time, and a thread reads its circuits in batches."""
        password = ["old"]
        breaker = breaker_of(lambda: redis.Redis(unix_socket_path=protected_server.unix_socket, password=password[0]))
        replace_password(protected_server)
        with pytest.raises(Down):
            breaker.call(down)
        assert storage_of(breaker).health().condition == "unreachable"
        password[0] = "new"
        with contextlib.closing(operator_of(protected_server, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the reported failure")
        wait_for(lambda: not retry_threads(), "the end of the retry thread")

    def test_status_uses_the_new_password_of_a_callable(self, protected_server: PrivateServer) -> None:
        """An operator reads the status before any call is made."""
        password = ["old"]
        breakers = BreakerRegistry(
            lambda: redis.Redis(unix_socket_path=protected_server.unix_socket, password=password[0])
        )
        breakers.get("iam")
        assert breakers.status()["iam"].state == "closed"
        replace_password(protected_server)
        password[0] = "new"
        assert breakers.status()["iam"].state == "closed"
        breakers.close()

    def test_time_limit_reaches_the_call_while_a_callable_is_called_again(
        self, protected_server: PrivateServer
    ) -> None:
        """The vault is slow, and the application ends the call."""
        made = []

        def client() -> redis.Redis:
            made.append(redis.Redis(unix_socket_path=protected_server.unix_socket, password="old"))
            if len(made) > 1:
                time.sleep(GENEROUS_S)
            return made[-1]

        breaker = breaker_of(client, max_staleness=0)
        replace_password(protected_server)
        with alarm(raising(JobTimeout())), pytest.raises(JobTimeout):
            breaker.call(up)
        assert len(made) == 2

    def test_callable_that_fails_is_called_again(self, protected_server: PrivateServer) -> None:
        """The vault is unreachable, too."""
        answers: list[str] = ["old"]

        def client() -> redis.Redis:
            return redis.Redis(unix_socket_path=protected_server.unix_socket, password=answers.pop())

        breaker = breaker_of(client, max_staleness=0)
        replace_password(protected_server)
        with pytest.raises(Down):
            breaker.call(down)
        assert storage_of(breaker).health().condition == "unreachable"
        answers.extend(["new"] * 10)
        with contextlib.closing(operator_of(protected_server, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the reported failure")

    @pytest.mark.skipif(CredentialProvider is None, reason="this redis-py has no credential providers")
    def test_provider_that_is_replaced_is_used(self, protected_server: PrivateServer) -> None:
        """Each connection requests its credentials from the provider of that time."""

        class Provider(CredentialProvider):  # type: ignore[misc,valid-type]
            def __init__(self, password: str) -> None:
                self.password = password

            def get_credentials(self) -> tuple[str]:
                return (self.password,)

        client = redis.Redis(unix_socket_path=protected_server.unix_socket, credential_provider=Provider("old"))
        breaker = breaker_of(client)
        replace_password(protected_server)
        client.connection_pool.connection_kwargs["credential_provider"] = Provider("new")
        assert_recovery(breaker, protected_server)

    def test_password_of_a_user_that_is_replaced_is_used(self, killable_server: PrivateServer) -> None:
        """The password is replaced by ACL SETUSER. Open connections stay until they are closed."""
        with contextlib.closing(killable_server.client()) as operator:
            operator.execute_command("ACL", "SETUSER", "shop", "on", ">old", "~*", "&*", "+@all")
            client = redis.Redis(unix_socket_path=killable_server.unix_socket, username="shop", password="old")
            breaker = breaker_of(client, max_staleness=0)
            operator.execute_command("ACL", "SETUSER", "shop", "<old", ">new")
            operator.execute_command("CLIENT", "KILL", "USER", "shop")
            client.connection_pool.connection_kwargs["password"] = "new"
            with pytest.raises(Down):
                breaker.call(down)
            assert operator.get("iam:pybreaker:fail_counter") == b"1"


def test_credentials_of_an_application_client_do_not_change() -> None:
    """The application's client keeps its credentials."""
    assert not replace_credentials(redis.Redis(), {"password": "other"})
    assert not replace_credentials(None, {})
    assert not has_new_credentials(None)
    assert connection_arguments_of(None) == {}


def test_rejected_credentials_are_retried_if_others_exist_or_were_just_switched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of several threads switches the credentials, and all of their attempts were rejected."""
    now = [100.0]
    monkeypatch.setattr(pool, "monotonic", lambda: now[0])
    own = bounded_client(redis.Redis(password="one"), 1.0)
    assert not replace_credentials(own, {"password": "one"})
    assert not has_new_credentials(own)
    assert replace_credentials(own, {"password": "two"})
    assert has_new_credentials(own)
    assert replace_credentials(own, {"password": "two"})
    now[0] += pool.NEW_CREDENTIALS_S
    assert not has_new_credentials(own)
    assert not replace_credentials(own, {"password": "two"})


def test_client_source_is_called_once_for_threads_that_are_rejected_together() -> None:
    """The client source may query a vault.  A thread that is rejected later only tries again."""
    passwords = ["old"]
    made = []

    def client_source() -> redis.Redis:
        made.append(passwords[0])
        return redis.Redis(password=passwords[0])

    locator = CircuitLocator(client_source, "iam", needs_one_slot=False)
    own = bounded_client(locator.locate().client, 1.0)
    passwords[0] = "new"
    rejection = redis.AuthenticationError("WRONGPASS invalid username-password pair or user is disabled.")
    assert [locator.relocate(rejection, own) for _ in range(3)] == [True, True, True]
    assert made == ["old", "new"]


def test_slow_client_source_does_not_bring_old_credentials_back() -> None:
    """One thread read the old password, and returns after another one has read and used the new password."""
    passwords, others = ["old"], [False]
    rejection = redis.AuthenticationError("WRONGPASS invalid username-password pair or user is disabled.")

    def client_source() -> redis.Redis:
        client = redis.Redis(password=passwords[0])
        if others[0]:
            others[0] = False
            passwords[0] = "new"
            assert locator.relocate(rejection, own), "the other thread"
        return client

    locator = CircuitLocator(client_source, "iam", needs_one_slot=False)
    own = bounded_client(locator.locate().client, 1.0)
    others[0] = True
    assert locator.relocate(rejection, own)
    assert own.connection_pool.connection_kwargs["credentials"].read_credentials()["password"] == "new"


@pytest.fixture
def cluster(preferred: FoundServer) -> Iterator[PrivateServer]:
    """Yield a cluster of one node with the password ``old``."""
    with PrivateServer(preferred.binary, port=bus_port(), args=["--cluster-enabled", "yes"]) as node:
        with contextlib.closing(node.client()) as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(CLUSTER_SLOT_COUNT))
            wait_for(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "all slots in service")
            client.config_set("requirepass", "old")
        yield node
        with contextlib.suppress(redis.RedisError), contextlib.closing(operator_of(node, "new")) as operator:
            operator.config_set("requirepass", "")


@pytest.mark.full
@pytest.mark.skipif(not hasattr(redis, "RedisCluster"), reason="this redis-py has no clusters")
def test_cluster_client_with_renamed_keys_gets_its_new_password(cluster: PrivateServer) -> None:
    """Plain clients query the nodes, with the names of keys and the present password of the cluster client."""

    class Prefixed(redis.RedisCluster):  # type: ignore[misc,name-defined]
        def execute_command(self, *words: Any, **options: Any) -> Any:
            if words[0] in ("EVAL", "EVALSHA"):
                words = (*words[:3], *(f"a:{key}" for key in words[3 : 3 + int(words[2])]), *words[3 + int(words[2]) :])
            return super().execute_command(*words, **options)

    client = Prefixed(host="127.0.0.1", port=cluster.port, password="old")
    breaker = breaker_of(client, max_staleness=0)
    replace_password(cluster)
    client.nodes_manager.connection_kwargs["password"] = "new"
    with pytest.raises(Down):
        breaker.call(down)
    with contextlib.closing(operator_of(cluster, "new")) as operator:
        wait_for(
            lambda: breaker.current_state and operator.get("a:{iam}:pybreaker:fail_counter") == b"1",
            "the counted failure",
        )
        assert {bytes(name)[:2] for name in operator.keys("*")} == {b"a:"}
    client.close()


def test_nodes_of_a_cluster_use_the_credentials_of_its_client() -> None:
    """The clients of the nodes were created with the old credentials."""
    from pybreaker_redis._redis.cluster import ClusterTopology

    node = redis.Redis(password="old")
    cluster = ClusterTopology(None, lambda address: node, [], lambda slot: None, lambda address: address)
    assert cluster.client_of_node(("there", 1)) is node
    cluster.update_node_credentials({"password": "new", "username": "shop", "ssl": True})
    words = node.connection_pool.connection_kwargs
    assert (words["username"], words["password"], words.get("ssl")) == ("shop", "new", None)


def by_parser(connection: Any) -> None:
    """Authenticate as published recipes for IAM do."""
    connection._parser.on_connect(connection)
    connection.send_command("AUTH", "default", "old", check_health=False)
    connection.read_response()


def by_library(connection: Any) -> None:
    """Run the library's handshake, with a password that is requested at that time."""
    connection.username, connection.password = "default", "old"
    connection.on_connect()


def by_valkey(server: PrivateServer) -> Any:
    """Return a client of the other library, with another name of the argument."""
    return valkey.Valkey(unix_socket_path=server.unix_socket, valkey_connect_func=by_library)


@pytest.mark.parametrize("function", but_for((None,), (by_parser, by_library, None)))
def test_function_that_authenticates_is_called_for_each_connection(
    function: Callable[[Any], None] | None, protected_server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The function replaces the library's handshake. Without RESP3, the listener uses two connections."""
    if function is None:
        client = by_valkey(protected_server)
    elif ONCE:
        client = redis.Redis(unix_socket_path=protected_server.unix_socket, redis_connect_func=function)
    else:
        pytest.skip("this redis-py has no such functions")
    breaker = breaker_of(client)
    storage: Any = storage_of(breaker)

    def is_subscribed() -> bool:
        breaker.call(up)
        return bool(storage.health().push != "none")

    wait_for(is_subscribed, "a subscription")
    with pytest.raises(Down):
        breaker.call(down)
    with contextlib.closing(operator_of(protected_server, "old")) as operator:
        assert operator.get("iam:pybreaker:fail_counter") == b"1"
    assert messages_of(caplog, protected_server, "circuit 'iam'", level=logging.WARNING) == []


class FakeCluster:
    """Cluster client with a connect function."""

    def __init__(self, function: Any = None) -> None:
        self.nodes_manager = None
        self.user_on_connect_func = function

    def on_connect(self, connection: Any) -> None:
        """Raise, because this package's connections must not call the function, which requests reads from replicas."""
        raise AssertionError


def test_connect_function_of_a_cluster_client_is_skipped_and_that_of_its_user_kept(server: PrivateServer) -> None:
    """The function of the cluster client may request reads from replicas."""
    if not ONCE:
        pytest.skip("this redis-py has no such functions")
    called = []
    for function in (None, called.append):
        client = redis.Redis(unix_socket_path=server.unix_socket, redis_connect_func=FakeCluster(function).on_connect)
        own = bounded_client(client, GENEROUS_S)
        with deadline(GENEROUS_S):
            assert own.ping()
        assert len(called) == (0 if function is None else 1)
        own.connection_pool.disconnect()
    same = [redis.Redis(redis_connect_func=FakeCluster(print).on_connect) for _ in range(2)]
    assert endpoint_of(same[0]) == endpoint_of(same[1]) != endpoint_of(redis.Redis())


class SlowClient:
    """Client of an unknown class that waits for a number of seconds."""

    def __init__(self, client: Any, seconds: float) -> None:
        self._client = client
        self.seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def evalsha(self, *words: Any) -> Any:
        """Wait, and run the script."""
        time.sleep(self.seconds)
        return self._client.evalsha(*words)


class TestWaits:
    """Clients with methods that wait."""

    def test_unknown_client_that_waits_is_logged_once(
        self, client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The client is used unchanged, so its calls wait."""
        storage = CircuitRedisStorage("closed", SlowClient(client, 0.25), namespace="slow", timeout=0.1)
        breaker = pybreaker.CircuitBreaker(state_storage=storage)
        for _ in range(3):
            breaker.call(up)
        (line,) = [line for line in messages_of(caplog, "SlowClient: ") if "by itself" in line]
        assert line.startswith("SlowClient: a command took ")
        assert "the timeout of 0.10 s" in line

    @pytest.mark.parametrize("timeout", [0.25, None])
    def test_client_that_waits_is_logged_only_beyond_a_timeout(
        self, timeout: float | None, client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A wait within the limit is not logged."""
        storage = CircuitRedisStorage("closed", SlowClient(client, 0.01), namespace="slow", timeout=timeout)
        pybreaker.CircuitBreaker(state_storage=storage).call(up)
        assert not [line for line in messages_of(caplog, "SlowClient: ") if "by itself" in line]

    @pytest.mark.parametrize("method", ["execute_command", "evalsha"])
    def test_replaced_method_of_a_client_delays_no_call(self, method: str, killable_server: PrivateServer) -> None:
        """Tracing libraries replace methods. The original methods are bound to the client's own connections."""
        client = redis.Redis(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE)
        inner, calls = getattr(client, method), []

        def traced(*words: Any, **options: Any) -> Any:
            calls.append(words)
            return inner(*words, **options)

        setattr(client, method, traced)
        assert_timeout(client, killable_server)

    def test_subclass_with_retries_delays_no_call(self, killable_server: PrivateServer) -> None:
        """The number and the length of its pauses do not matter."""

        class Retrying(redis.Redis):
            def execute_command(self, *words: Any, **options: Any) -> Any:
                for _ in range(5):
                    try:
                        return super().execute_command(*words, **options)
                    except redis.RedisError:
                        time.sleep(1)
                return None

        assert_timeout(
            Retrying(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE), killable_server
        )

    def test_wrapper_of_a_client_delays_no_call(self, killable_server: PrivateServer) -> None:
        """A wrapper such as flask-redis has its client behind it."""

        class Lazy:
            def __init__(self, client: Any) -> None:
                self._client = client

            def __getattr__(self, name: str) -> Any:
                return getattr(self._client, name)

        assert_timeout(
            Lazy(redis.Redis(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE)), killable_server
        )


class SwallowingClient(SlowClient):
    """Client that returns None instead of raising."""

    def evalsha(self, *words: Any) -> Any:
        """Return None."""
        return None


def test_missing_reply_is_a_fault_of_the_circuit_and_no_error_of_a_call(client: redis.Redis) -> None:
    """Other circuits on the server are not affected."""
    storage = CircuitRedisStorage("closed", SwallowingClient(client, 0), namespace="swallowed")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    assert breaker.call(up) == "answer"
    with pytest.raises(Down):
        breaker.call(down)
    assert storage.health().condition == "refused"


def assert_timeout(client: Any, server: PrivateServer) -> None:
    """Assert that a call waits for a frozen server for its timeout, although its client would wait longer."""
    storage = CircuitRedisStorage("closed", client, namespace="patched", timeout=0.3)
    breaker = pybreaker.CircuitBreaker(fail_max=9, state_storage=storage)
    breaker.call(up)
    assert storage.health().condition == "connected"
    server.pause()
    began = time.monotonic()
    try:
        with pytest.raises(Down):
            breaker.call(down)
    finally:
        seconds = time.monotonic() - began
        server.resume()
    assert seconds < 0.3 + 1.5


def test_wrong_password_is_never_logged(server: PrivateServer, caplog: pytest.LogCaptureFixture) -> None:
    """Servers do not repeat passwords. The mask holds if one does."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    wrong = redis.Redis(unix_socket_path=server.unix_socket, username="stranger", password=SECRET, **ONCE)
    storage = CircuitRedisStorage("closed", wrong, namespace="wrong", timeout=5)
    assert pybreaker.CircuitBreaker(state_storage=storage).call(up) == "answer"
    assert storage.health().condition == "unreachable"
    assert SECRET not in whole_log(caplog) + storage.health().last_error
