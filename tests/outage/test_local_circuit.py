"""The local circuit, which a process uses while Redis gives no answer, and the checks of storage arguments."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from typing import Any
from unittest.mock import MagicMock

import pytest
import redis
import valkey
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._circuits.local import LOCAL_GENERATION_MIN
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import NAMESPACE, Down, breaker_on, down, settled, up
from tests.support.inspect import admission_of, state_name_of, storage_of
from tests.support.logs import messages_of
from tests.support.servers import ONCE
from tests.support.wait import wait_for


class Asynchronous:
    """Stand-in that looks like an asynchronous client."""

    __module__ = "redis.asyncio.client"

    def evalsha(self) -> None:
        """Exist, as the method of a client."""


class AsynchronousForTests(Asynchronous):
    """Stand-in for the asynchronous client of a library for tests, which derives from that of redis-py."""


def refusing_client(directory: Any) -> redis.Redis:
    """Return a client of a server that does not run."""
    return redis.Redis(unix_socket_path=str(directory / "missing.sock"), **ONCE)


def test_constructing_does_no_io(tmp_path):
    """A service and its breakers start in an outage, because a constructor sends nothing."""
    storage = CircuitRedisStorage("closed", lambda: pytest.fail("the client source was called"))
    assert storage.name == "redis"
    CircuitRedisStorage("closed", refusing_client(tmp_path))


def test_local_circuit_trips_and_recovers_without_redis(tmp_path, caplog):
    """In an outage a dead dependency is spared, calls raise no error of Redis, and one line is logged."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    storage = CircuitRedisStorage("closed", refusing_client(tmp_path), namespace="shop")
    breaker = CircuitBreaker(fail_max=2, reset_timeout=60, state_storage=storage)
    assert breaker.call(up) == "answer"
    with pytest.raises(Down):
        breaker.call(down)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    with pytest.raises(CircuitBreakerError, match="not elapsed"):
        breaker.call(up)
    breaker.reset_timeout = 0.05
    time.sleep(0.1)
    assert breaker.call(up) == "answer"
    assert breaker.current_state == "closed"
    (message,) = messages_of(caplog, str(tmp_path), "circuit 'shop'")
    assert message.startswith(f"Redis at {tmp_path}/missing.sock/0 is unreachable (ConnectionError: ")
    assert re.search(r"; circuit 'shop' uses local state, next attempt in 0\.0\d s, waiting up to 0\.25 s$", message)


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_local_circuit_begins_in_the_fallback_state(tmp_path, state):
    """`fallback_circuit_state` is the first state of the local circuit, and no call recurses."""
    storage = CircuitRedisStorage("closed", refusing_client(tmp_path), fallback_circuit_state=state)
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    assert breaker.current_state == state
    if state == "open":
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    else:
        assert breaker.call(up) == "answer"


def test_failure_reported_at_the_begin_of_an_outage_counts(killable_server: PrivateServer):
    """A failure reported during the outage counts in the local circuit, which continues the shared one."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fail_max=3))
        reached = []

        def dead() -> None:
            reached.append(breaker.current_state)
            raise Down

        killable_server.kill()
        for _ in range(10):
            with contextlib.suppress(Down, CircuitBreakerError):
                breaker.call(dead)
        assert len(reached) == 3


def test_calls_are_settled_where_they_were_admitted(killable_server: PrivateServer):
    """A result is dropped if its circuit, local or shared, is no longer the one in use."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fail_max=5, timeout=10))
        storage = storage_of(breaker)

        def redis_stops_and_the_local_circuit_changes() -> None:
            killable_server.stop()
            storage.state = "open"
            storage.state = "closed"
            raise Down

        def redis_returns() -> None:
            killable_server.restart(keep_data=True)
            wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
            raise Down

        with pytest.raises(Down):
            breaker.call(redis_stops_and_the_local_circuit_changes)
        assert storage.counter == 0, "the local circuit does not settle a call of the shared one"
        with pytest.raises(Down):
            breaker.call(down)
        assert storage.counter == 1
        with pytest.raises(Down):
            breaker.call(redis_returns)
        assert storage.counter == 0, "the shared circuit does not settle a call of the local one"
        storage.increment_counter()
        assert client.get(f"{NAMESPACE}:pybreaker:fail_counter") == b"1"


def test_second_outage_begins_with_a_new_local_circuit(killable_server: PrivateServer):
    """Each outage has a new local circuit with a new generation, without the state of the last one."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, timeout=10))
        storage = storage_of(breaker)
        generations = []
        for _ in range(2):
            killable_server.kill()
            wait_for(lambda: storage.health().condition == "unreachable", "the outage is noticed")
            assert breaker.call(up) == "answer"
            with breaker.calling() as entered:
                generations.append(admission_of(breaker, entered).generation)
            with pytest.raises(Down):
                breaker.call(down)
            assert storage.counter == 1
            killable_server.restart(keep_data=False)
            wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
            assert storage.counter == 1, "the failure is reported to Redis"
            settled(breaker)
        assert LOCAL_GENERATION_MIN < generations[0] < generations[1] < 0


@pytest.mark.parametrize("fallback", ["closed", "open", "half-open", "last"])
def test_open_circuit_stays_open_without_redis(killable_server: PrivateServer, fallback: str):
    """An open circuit stays open in an outage: a lost Redis is no sign of a healthy dependency."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, reset_timeout=60, fallback_circuit_state=fallback, timeout=10))
        breaker.open()
        opened_at = storage_of(breaker).opened_at
        killable_server.kill()
        wait_for(lambda: storage_of(breaker).health().condition == "unreachable", "the outage is noticed")
        for _ in range(5):
            with pytest.raises(CircuitBreakerError):
                breaker.call(up)
        assert storage_of(breaker).opened_at == opened_at, "the reset timeout continues"


@pytest.mark.parametrize(("fallback", "state"), [("closed", "closed"), ("open", "open"), ("last", "closed")])
def test_closed_circuit_continues_in_the_fallback_state(killable_server: PrivateServer, fallback: str, state: str):
    """A closed circuit continues in the `fallback_circuit_state`."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fallback_circuit_state=fallback))
        killable_server.kill()
        wait_for(lambda: storage_of(breaker).health().condition == "unreachable", "the outage is noticed")
        assert breaker.current_state == state


def test_local_circuit_without_an_earlier_reply_begins_in_the_initial_state(tmp_path):
    """Without any earlier reply, `last` means the initial state of the storage."""
    storage = CircuitRedisStorage("open", refusing_client(tmp_path), fallback_circuit_state="last")
    assert CircuitBreaker(state_storage=storage).current_state == "open"


@pytest.mark.parametrize(
    "client",
    [
        lambda: None,
        lambda: 1 / 0,
        MagicMock(),
        valkey.Valkey(unix_socket_path="/missing.sock"),
    ],
    ids=["nothing", "raises", "mock", "valkey, dead"],
)
def test_error_of_a_client_does_not_reach_a_call(client, caplog):
    """Errors of a client do not reach calls, calls stay guarded, and the log names the error."""
    breaker = CircuitBreaker(fail_max=1, state_storage=CircuitRedisStorage("closed", client, "shop"))
    assert breaker.call(up) == "answer"
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert len(messages_of(caplog, "circuit 'shop'")) == 1


def test_valkey_client_works(server: PrivateServer, caplog):
    """Errors of valkey-py are understood as those of redis-py."""
    with contextlib.closing(valkey.Valkey(unix_socket_path=server.unix_socket)) as client:
        breaker = CircuitBreaker(fail_max=1, state_storage=CircuitRedisStorage("closed", client, "shop", timeout=10))
        with pytest.raises(CircuitBreakerError):
            breaker.call(down)
        assert client.get("shop:pybreaker:state") == b"open"
    assert messages_of(caplog, server, "circuit 'shop'") == []


def test_creation_of_breakers_calls_no_client_source():
    """A module may create breakers at import, before settings exist or before the process forks."""
    storage = CircuitRedisStorage("closed", lambda: pytest.fail("the client source was called"))
    assert state_name_of(CircuitBreaker(state_storage=storage)) == "closed"


def test_second_breaker_begins_in_the_last_known_state(server: PrivateServer):
    """The creation of a second breaker sends no command."""
    with contextlib.closing(server.client()) as client:
        storage = CircuitRedisStorage("closed", client)
        CircuitBreaker(state_storage=storage).open()
        assert state_name_of(CircuitBreaker(state_storage=storage)) == "open"


class ClientWithSecretInRepr:
    """Stand-in for a client of redis-py 6.4, with all arguments in its `repr`."""

    def __repr__(self) -> str:
        return f"<Client(password=swordfish, {'and so on, ' * 100})>"


@pytest.mark.parametrize("argument", ["state", "redis_object", "namespace", "fallback_circuit_state", "timeout", "ttl"])
@pytest.mark.parametrize(
    "given",
    [ClientWithSecretInRepr(), {"password": "swordfish"}, "redis://:swordfish@shop", "redis://?password=swordfish"],
)
def test_error_about_an_argument_masks_passwords(argument: str, given: Any) -> None:
    """Errors about arguments mask passwords of clients and URLs, because errors are logged."""
    if argument == "namespace" and isinstance(given, str):
        given = f"{given}\0"
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must .* an object of class") as raised:
        CircuitRedisStorage(**{"state": "closed", "redis_object": lambda: None, argument: given})
    assert "swordfish" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_error_cuts_a_long_value() -> None:
    """A long value is cut in the message."""
    with pytest.raises(ValueError, match=r"state must be one of .*, not 'a{78}…$"):
        CircuitRedisStorage("a" * 1000, lambda: None)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"state": "ajar"}, ValueError, "state must be one of 'closed', 'open', 'half-open', not 'ajar'"),
        ({"fallback_circuit_state": None}, ValueError, "fallback_circuit_state must be one of .*, not None"),
        ({"fallback_circuit_state": "ajar"}, ValueError, "must be one of 'closed', 'open', 'half-open', 'last', not"),
        ({"timeout": "1"}, TypeError, "timeout must be a number of seconds or None, not '1'"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds or None, not True"),
        ({"timeout": 0}, ValueError, "timeout must be None or lie between 0.01 and 60 seconds, not 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be None or lie between 0.01 and 60 seconds, not nan"),
        ({"namespace": b"shop"}, TypeError, "namespace must be a str or None, not b'shop'"),
        ({"ttl": "60"}, TypeError, "ttl must be a number of seconds or None, not '60'"),
        ({"ttl": True}, TypeError, "ttl must be a number of seconds or None, not True"),
        ({"ttl": 59.9}, ValueError, "ttl must be None or lie between 60 and 315360000 seconds, not 59.9"),
        ({"ttl": 315360001}, ValueError, "ttl must be None or lie between 60 and 315360000 seconds, not 315360001"),
        ({"ttl": float("nan")}, ValueError, "ttl must be None or lie between 60 and 315360000 seconds, not nan"),
        ({"redis_object": None}, TypeError, "redis_object must be a synchronous client or a callable .*, not None"),
        ({"redis_object": "redis://"}, TypeError, "redis_object must be .*, not 'redis://'"),
        ({"redis_object": Asynchronous()}, TypeError, "redis_object must be a synchronous client"),
        ({"redis_object": AsynchronousForTests()}, TypeError, "redis_object must be a synchronous client"),
        ({"probe_lease": "30"}, TypeError, "probe_lease must be a number of seconds, not '30'"),
    ],
)
def test_bad_argument_is_named_at_once(overrides, error, message):
    """The error names the argument, the given value and the accepted values."""
    arguments = {"state": "closed", "redis_object": lambda: None, **overrides}
    with pytest.raises(error, match=message):
        CircuitRedisStorage(**arguments)
