"""Passwords that are replaced while a process runs, and functions of the user's that authenticate."""

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
from pybreaker_redis._redis import pool
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.endpoint import connection_arguments_of, endpoint_of
from pybreaker_redis._redis.keys import CLUSTER_SLOT_COUNT
from pybreaker_redis._redis.pool import bounded_client, replace_credentials
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.clients import CredentialProvider
from tests.support.cluster import bus_port
from tests.support.inspect import keepers
from tests.support.interrupts import JobTimeout, alarm, raising
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens")

#: Seconds for all of an operation: rotation is the subject, and no outage of a busy machine.
ENOUGH = 10.0


@pytest.fixture
def locked(killable_server: PrivateServer) -> Iterator[PrivateServer]:
    """A server that asks for the password ``old``."""
    with contextlib.closing(killable_server.client()) as operator:
        operator.config_set("requirepass", "old")
    yield killable_server
    # It is asked by its starter, too.
    with contextlib.suppress(redis.RedisError), contextlib.closing(operator_of(killable_server, "new")) as operator:
        operator.config_set("requirepass", "")


def operator_of(server: PrivateServer, password: str) -> redis.Redis:
    """An operator with all rights."""
    return redis.Redis(unix_socket_path=server.unix_socket, password=password)


def replace_password(server: PrivateServer) -> None:
    """From ``old`` to ``new``, also for those who are connected."""
    with contextlib.closing(operator_of(server, "old")) as operator:
        operator.config_set("requirepass", "new")
        operator.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with contextlib.suppress(redis.RedisError):
            operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


def breaker_of(given: Any, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that has made a call."""
    storage = CircuitRedisStorage("closed", given, namespace="iam", timeout=ENOUGH, **words)
    breaker = pybreaker.CircuitBreaker(fail_max=9, state_storage=storage)
    assert breaker.call(up) == "answer"
    assert breaker._state_storage.health().condition == "connected"  # type: ignore[attr-defined]
    return breaker


def recovers(breaker: pybreaker.CircuitBreaker, server: PrivateServer) -> None:
    """Its failures are counted in Redis again, and others are heard."""
    storage: Any = breaker._state_storage
    with pytest.raises(Down):
        breaker.call(down)
    with contextlib.closing(operator_of(server, "new")) as operator:
        # A look at the circuit brings back what was counted while another thread found the new password.
        wait_for(
            lambda: breaker.current_state and operator.get("iam:pybreaker:fail_counter") == b"1",
            "the failure is counted",
        )
    wait_for(lambda: storage.health().condition == "connected", "it is connected")

    def is_heard() -> bool:
        with contextlib.suppress(Down):
            breaker.call(up)
        return bool(storage.health().push != "none")

    if storage._core._view.max_staleness:
        wait_for(is_heard, "others are heard")


class TestRotation:
    """A password is replaced at the server and in the application, and the process goes on."""

    def test_password_that_is_replaced_in_the_pool_is_used(self, locked: PrivateServer) -> None:
        """As rotation does it that knows no other place."""
        client = redis.Redis(unix_socket_path=locked.unix_socket, password="old")
        breaker = breaker_of(client)
        replace_password(locked)
        client.connection_pool.connection_kwargs["password"] = "new"
        recovers(breaker, locked)

    def test_password_that_is_replaced_late_is_used_within_a_pause(self, locked: PrivateServer) -> None:
        """The server has it first: until the application has it too, its circuits are its own."""
        client = redis.Redis(unix_socket_path=locked.unix_socket, password="old")
        breaker = breaker_of(client)
        replace_password(locked)
        with pytest.raises(Down):
            breaker.call(down)
        assert breaker._state_storage.health().condition == "unreachable"  # type: ignore[attr-defined]
        client.connection_pool.connection_kwargs["password"] = "new"
        with contextlib.closing(operator_of(locked, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the failure is brought back")
        wait_for(lambda: not keepers(), "no thread retries")

    @pytest.mark.parametrize("max_staleness", [0, 1.0])
    def test_callable_is_called_again_once_its_password_is_rejected(
        self, locked: PrivateServer, max_staleness: float
    ) -> None:
        """It reads a file, or asks a vault, each time."""
        password = ["old"]
        made = []

        def client() -> redis.Redis:
            made.append(redis.Redis(unix_socket_path=locked.unix_socket, password=password[0]))
            return made[-1]

        breaker = breaker_of(client, max_staleness=max_staleness)
        assert len(made) == 1
        replace_password(locked)
        password[0] = "new"
        recovers(breaker, locked)
        assert len(made) <= 3

    def test_callable_that_has_the_new_password_late_is_called_again(self, locked: PrivateServer) -> None:
        """The server is away by then, and a thread reads its circuits in batches."""
        password = ["old"]
        breaker = breaker_of(lambda: redis.Redis(unix_socket_path=locked.unix_socket, password=password[0]))
        replace_password(locked)
        with pytest.raises(Down):
            breaker.call(down)
        assert breaker._state_storage.health().condition == "unreachable"  # type: ignore[attr-defined]
        password[0] = "new"
        with contextlib.closing(operator_of(locked, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the failure is brought back")
        wait_for(lambda: not keepers(), "no thread retries")

    def test_look_at_all_circuits_takes_the_new_password_of_a_callable(self, locked: PrivateServer) -> None:
        """An operator looks before any call is made."""
        password = ["old"]
        breakers = BreakerRegistry(lambda: redis.Redis(unix_socket_path=locked.unix_socket, password=password[0]))
        breakers.get("iam")
        assert breakers.status()["iam"].state == "closed"
        replace_password(locked)
        password[0] = "new"
        assert breakers.status()["iam"].state == "closed"
        breakers.close()

    def test_time_limit_reaches_the_call_while_a_callable_is_called_again(self, locked: PrivateServer) -> None:
        """The vault is slow, and the application ends the call."""
        made = []

        def client() -> redis.Redis:
            made.append(redis.Redis(unix_socket_path=locked.unix_socket, password="old"))
            if len(made) > 1:
                time.sleep(ENOUGH)
            return made[-1]

        breaker = breaker_of(client, max_staleness=0)
        replace_password(locked)
        with alarm(raising(JobTimeout())), pytest.raises(JobTimeout):
            breaker.call(up)
        assert len(made) == 2

    def test_callable_that_fails_is_called_again(self, locked: PrivateServer) -> None:
        """The vault is away, too."""
        answers: list[str] = ["old"]

        def client() -> redis.Redis:
            return redis.Redis(unix_socket_path=locked.unix_socket, password=answers.pop())

        breaker = breaker_of(client, max_staleness=0)
        replace_password(locked)
        with pytest.raises(Down):
            breaker.call(down)
        assert breaker._state_storage.health().condition == "unreachable"  # type: ignore[attr-defined]
        answers.extend(["new"] * 10)
        with contextlib.closing(operator_of(locked, "new")) as operator:
            wait_for(lambda: operator.get("iam:pybreaker:fail_counter") == b"1", "the failure is brought back")

    @pytest.mark.skipif(CredentialProvider is None, reason="this redis-py has no credential providers")
    def test_provider_that_is_replaced_is_used(self, locked: PrivateServer) -> None:
        """And the one that was there is asked for each connection."""

        class Provider(CredentialProvider):  # type: ignore[misc,valid-type]
            def __init__(self, password: str) -> None:
                self.password = password

            def get_credentials(self) -> tuple[str]:
                return (self.password,)

        client = redis.Redis(unix_socket_path=locked.unix_socket, credential_provider=Provider("old"))
        breaker = breaker_of(client)
        replace_password(locked)
        client.connection_pool.connection_kwargs["credential_provider"] = Provider("new")
        recovers(breaker, locked)

    def test_password_of_a_user_that_is_replaced_is_used(self, killable_server: PrivateServer) -> None:
        """By ACL SETUSER; the connections that there are stay until they are closed."""
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


def test_credentials_of_a_client_that_is_not_ours_are_not_touched() -> None:
    """They are the user's."""
    assert not replace_credentials(redis.Redis(), {"password": "other"})
    assert not replace_credentials(None, {})
    assert connection_arguments_of(None) == {}


def test_rejected_credentials_are_worth_another_attempt_if_there_are_others_or_were_just_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of several threads takes them, and all of them were rejected."""
    now = [100.0]
    monkeypatch.setattr(pool, "monotonic", lambda: now[0])
    own = bounded_client(redis.Redis(password="one"), 1.0)
    assert not replace_credentials(own, {"password": "one"})
    assert replace_credentials(own, {"password": "two"})
    assert replace_credentials(own, {"password": "two"})
    now[0] += pool.NEW_CREDENTIALS_S
    assert not replace_credentials(own, {"password": "two"})


@pytest.fixture
def cluster(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A cluster of one node, which asks for the password ``old``."""
    with PrivateServer(preferred.binary, port=bus_port(), args=["--cluster-enabled", "yes"]) as node:
        with contextlib.closing(node.client()) as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(CLUSTER_SLOT_COUNT))
            wait_for(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "it serves all slots")
            client.config_set("requirepass", "old")
        yield node
        with contextlib.suppress(redis.RedisError), contextlib.closing(operator_of(node, "new")) as operator:
            operator.config_set("requirepass", "")


@pytest.mark.skipif(not hasattr(redis, "RedisCluster"), reason="this redis-py has no clusters")
def test_cluster_client_that_renames_keys_and_has_a_new_password_is_followed(cluster: PrivateServer) -> None:
    """Its nodes are asked by plain clients: under its names, and with its present password."""

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
            "the failure is counted",
        )
        assert {bytes(name)[:2] for name in operator.keys("*")} == {b"a:"}
    client.close()


def test_nodes_of_a_cluster_take_the_credentials_of_its_client() -> None:
    """Their clients were made with those of before."""
    from pybreaker_redis._redis.cluster import ClusterTopology

    node = redis.Redis(password="old")
    cluster = ClusterTopology(None, lambda address: node, [], lambda slot: None, lambda address: address)
    assert cluster.client_of_node(("there", 1)) is node
    cluster.update_node_credentials({"password": "new", "username": "shop", "ssl": True})
    words = node.connection_pool.connection_kwargs
    assert (words["username"], words["password"], words.get("ssl")) == ("shop", "new", None)


# -- functions that connect --------------------------------------------------------------------------------------------


def by_parser(connection: Any) -> None:
    """As recipes for IAM have it."""
    connection._parser.on_connect(connection)
    connection.send_command("AUTH", "default", "old", check_health=False)
    connection.read_response()


def by_library(connection: Any) -> None:
    """The library's own handshake, with a password that is asked for just then."""
    connection.username, connection.password = "default", "old"
    connection.on_connect()


def by_valkey(server: PrivateServer) -> Any:
    """The other library, which has another word."""
    return valkey.Valkey(unix_socket_path=server.unix_socket, valkey_connect_func=by_library)


@pytest.mark.parametrize("function", [by_parser, by_library, None])
def test_function_that_authenticates_is_called_for_each_connection(
    function: Callable[[Any], None] | None, locked: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """In place of the library's handshake; where it does not ask for RESP3, two connections listen."""
    if function is None:
        client = by_valkey(locked)
    elif ONCE:
        client = redis.Redis(unix_socket_path=locked.unix_socket, redis_connect_func=function)
    else:
        pytest.skip("this redis-py has no such functions")
    breaker = breaker_of(client)
    storage: Any = breaker._state_storage

    def is_heard() -> bool:
        breaker.call(up)
        return bool(storage.health().push != "none")

    wait_for(is_heard, "others are heard")
    with pytest.raises(Down):
        breaker.call(down)
    with contextlib.closing(operator_of(locked, "old")) as operator:
        assert operator.get("iam:pybreaker:fail_counter") == b"1"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class FakeCluster:
    """A cluster's client, with what its connections are made to do."""

    def __init__(self, function: Any = None) -> None:
        self.nodes_manager = None
        self.user_on_connect_func = function

    def on_connect(self, connection: Any) -> None:
        """Never called by connections of our own: it would ask for reads from replicas."""
        raise AssertionError


def test_function_of_a_clusters_client_is_left_out_and_that_of_its_user_kept(server: PrivateServer) -> None:
    """The client's own one may ask for reads from replicas."""
    if not ONCE:
        pytest.skip("this redis-py has no such functions")
    called = []
    for function in (None, called.append):
        client = redis.Redis(unix_socket_path=server.unix_socket, redis_connect_func=FakeCluster(function).on_connect)
        own = bounded_client(client, ENOUGH)
        with deadline(ENOUGH):
            assert own.ping()
        assert len(called) == (0 if function is None else 1)
        own.connection_pool.disconnect()
    same = [redis.Redis(redis_connect_func=FakeCluster(print).on_connect) for _ in range(2)]
    assert endpoint_of(same[0]) == endpoint_of(same[1]) != endpoint_of(redis.Redis())


# -- clients that wait by themselves -----------------------------------------------------------------------------------


class Slow:
    """A client of no known kind, which waits as long as it likes."""

    def __init__(self, client: Any, seconds: float) -> None:
        self._client = client
        self.seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def evalsha(self, *words: Any) -> Any:
        """In its own time."""
        time.sleep(self.seconds)
        return self._client.evalsha(*words)


class TestWaits:
    """Clients whose own methods wait."""

    def test_unknown_client_that_waits_is_named_once(
        self, client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is used as it is, so it makes calls wait."""
        storage = CircuitRedisStorage("closed", Slow(client, 0.25), namespace="slow", timeout=0.1)
        breaker = pybreaker.CircuitBreaker(state_storage=storage)
        for _ in range(3):
            breaker.call(up)
        (line,) = [line for line in caplog.messages if "by itself" in line]
        assert line.startswith("Slow: a command took ")
        assert "0.10 s at most" in line

    @pytest.mark.parametrize("timeout", [0.25, None])
    def test_client_that_waits_for_long_is_named_only_if_a_call_has_a_timeout(
        self, timeout: float | None, client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And not for a wait within the limit."""
        storage = CircuitRedisStorage("closed", Slow(client, 0.01), namespace="slow", timeout=timeout)
        pybreaker.CircuitBreaker(state_storage=storage).call(up)
        assert not [line for line in caplog.messages if "by itself" in line]

    @pytest.mark.parametrize("method", ["execute_command", "evalsha"])
    def test_method_of_a_single_object_makes_no_call_wait(self, method: str, killable_server: PrivateServer) -> None:
        """Tracing libraries replace them; what they call is bound to the client's own connections."""
        client = redis.Redis(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE)
        inner, calls = getattr(client, method), []

        def traced(*words: Any, **options: Any) -> Any:
            calls.append(words)
            return inner(*words, **options)

        setattr(client, method, traced)
        waits(client, killable_server)

    def test_subclass_that_tries_again_makes_no_call_wait(self, killable_server: PrivateServer) -> None:
        """However often, and however long it pauses."""

        class Retrying(redis.Redis):
            def execute_command(self, *words: Any, **options: Any) -> Any:
                for _ in range(5):
                    try:
                        return super().execute_command(*words, **options)
                    except redis.RedisError:
                        time.sleep(1)
                return None

        waits(Retrying(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE), killable_server)

    def test_wrapper_without_a_method_for_scripts_makes_no_call_wait(self, killable_server: PrivateServer) -> None:
        """As flask-redis: its client stands behind it."""

        class Lazy:
            def __init__(self, client: Any) -> None:
                self._client = client

            def __getattr__(self, name: str) -> Any:
                return getattr(self._client, name)

        waits(
            Lazy(redis.Redis(unix_socket_path=killable_server.unix_socket, socket_timeout=5, **ONCE)), killable_server
        )


class Swallowing(Slow):
    """Answers nothing where its client raises, or where it likes."""

    def evalsha(self, *words: Any) -> Any:
        """Nothing."""
        return None


def test_answer_of_nothing_is_a_fault_of_the_circuit_and_no_error_of_a_call(client: redis.Redis) -> None:
    """Others who live on the server are not concerned."""
    storage = CircuitRedisStorage("closed", Swallowing(client, 0), namespace="swallowed")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    assert breaker.call(up) == "answer"
    with pytest.raises(Down):
        breaker.call(down)
    assert storage.health().condition == "refused"


def waits(client: Any, server: PrivateServer) -> None:
    """A call waits for a frozen server as long as any other, though its client would wait longer."""
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
        took = time.monotonic() - began
        server.resume()
    assert took < 0.3 + 1.5


SECRET = "hunter2-hunter2"


def test_wrong_password_is_printed_nowhere(server: PrivateServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server does not repeat it; this holds if one does."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    wrong = redis.Redis(unix_socket_path=server.unix_socket, username="stranger", password=SECRET, **ONCE)
    storage = CircuitRedisStorage("closed", wrong, namespace="wrong", timeout=5)
    assert pybreaker.CircuitBreaker(state_storage=storage).call(up) == "answer"
    assert storage.health().condition == "unreachable"
    assert SECRET not in caplog.text + storage.health().last_error
