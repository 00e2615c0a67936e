"""While Redis gives no answer, a process keeps a circuit of its own."""

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
from tests.support.servers import ONCE
from tests.support.wait import wait_for


class Asynchronous:
    """As far as can be seen, an asynchronous client."""

    __module__ = "redis.asyncio.client"

    def evalsha(self) -> None:
        """There is one."""


def refusing_client(directory: Any) -> redis.Redis:
    """A client of a server that is not there."""
    return redis.Redis(unix_socket_path=str(directory / "nobody.sock"), **ONCE)


def test_constructing_does_no_io(tmp_path):
    """A service starts, and its breakers with it, while Redis is away."""
    storage = CircuitRedisStorage("closed", lambda: pytest.fail("asked for a client"))
    assert storage.name == "redis"
    CircuitRedisStorage("closed", refusing_client(tmp_path))


def test_own_circuit_trips_and_recovers_without_redis(tmp_path, caplog):
    """No error of Redis reaches a call, and the dead dependency is spared all the same."""
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
    (message,) = caplog.messages
    assert message.startswith(f"circuit 'shop': Redis at {tmp_path}/nobody.sock/0 is away (ConnectionError: ")
    assert re.search(r"; using this process's own state, next attempt in 0\.0\d s, waiting up to 0\.25 s$", message)


@pytest.mark.parametrize("state", ["closed", "open", "half-open"])
def test_own_circuit_begins_in_the_fallback_state(tmp_path, state):
    """`fallback_circuit_state` decides whether calls go through meanwhile; none of them recurses."""
    storage = CircuitRedisStorage("closed", refusing_client(tmp_path), fallback_circuit_state=state)
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    assert breaker.current_state == state
    if state == "open":
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    else:
        assert breaker.call(up) == "answer"


def test_failure_that_meets_the_outage_counts(killable_server: PrivateServer):
    """The call was admitted by the very circuit that the own one goes on from: nobody gets one more for free."""
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
    """Once the own circuit has moved, and once the shared one is back, results of the other's calls change nothing."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fail_max=5, timeout=10))
        storage = breaker._state_storage

        def meanwhile_redis_goes_and_the_own_circuit_moves() -> None:
            killable_server.stop()
            storage.state = "open"
            storage.state = "closed"
            raise Down

        def meanwhile_redis_returns() -> None:
            killable_server.restart(keep_data=True)
            wait_for(lambda: storage.health().condition == "connected", "it is back")
            raise Down

        with pytest.raises(Down):
            breaker.call(meanwhile_redis_goes_and_the_own_circuit_moves)
        assert storage.counter == 0, "a call that Redis admitted is not settled in this process's own circuit"
        with pytest.raises(Down):
            breaker.call(down)
        assert storage.counter == 1
        with pytest.raises(Down):
            breaker.call(meanwhile_redis_returns)
        assert storage.counter == 0, "a call that this process admitted is not settled in Redis"
        storage.increment_counter()
        assert client.get(f"{NAMESPACE}:pybreaker:fail_counter") == b"1"


def test_second_outage_begins_with_a_new_circuit(killable_server: PrivateServer):
    """What a process thought in the last outage is not what it thinks in the next; nor are their generations alike."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, timeout=10))
        storage = breaker._state_storage
        generations = []
        for _ in range(2):
            killable_server.kill()
            wait_for(lambda: storage.health().condition == "unreachable", "it is gone")
            assert breaker.call(up) == "answer"
            generations.append(storage._admissions.tag_of(breaker._state).admission.generation)
            with pytest.raises(Down):
                breaker.call(down)
            assert storage.counter == 1
            killable_server.restart(keep_data=False)
            wait_for(lambda: storage.health().condition == "connected", "it is back")
            assert storage.counter == 1, "what it has counted is told"
            settled(breaker)
        assert LOCAL_GENERATION_MIN < generations[0] < generations[1] < 0


@pytest.mark.parametrize("fallback", ["closed", "open", "half-open", "last"])
def test_circuit_that_is_known_to_be_open_stays_open_without_redis(killable_server: PrivateServer, fallback: str):
    """Whatever the fallback: that Redis has gone does not mean that the dependency is back."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, reset_timeout=60, fallback_circuit_state=fallback, timeout=10))
        breaker.open()
        opened_at = breaker._state_storage.opened_at
        killable_server.kill()
        wait_for(lambda: breaker._state_storage.health().condition == "unreachable", "it is gone")
        for _ in range(5):
            with pytest.raises(CircuitBreakerError):
                breaker.call(up)
        assert breaker._state_storage.opened_at == opened_at, "for the rest of its time"


@pytest.mark.parametrize(("fallback", "state"), [("closed", "closed"), ("open", "open"), ("last", "closed")])
def test_closed_circuit_goes_on_in_the_fallback_state(killable_server: PrivateServer, fallback: str, state: str):
    """`fallback_circuit_state` is what to make of it that nobody knows any more."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fallback_circuit_state=fallback))
        killable_server.kill()
        wait_for(lambda: breaker._state_storage.health().condition == "unreachable", "it is gone")
        assert breaker.current_state == state


def test_own_circuit_that_never_met_redis_begins_as_a_new_one(tmp_path):
    """`last` without anything known: as a circuit that does not exist yet."""
    storage = CircuitRedisStorage("open", refusing_client(tmp_path), fallback_circuit_state="last")
    assert CircuitBreaker(state_storage=storage).current_state == "open"


@pytest.mark.parametrize(
    "client",
    [
        lambda: None,
        lambda: 1 / 0,
        MagicMock(),
        valkey.Valkey(unix_socket_path="/nobody.sock"),
    ],
    ids=["nothing", "raises", "mock", "valkey, dead"],
)
def test_nothing_that_a_client_does_reaches_a_call(client, caplog):
    """Whatever is wrong with the client, calls are made and guarded; the log says what it was."""
    breaker = CircuitBreaker(fail_max=1, state_storage=CircuitRedisStorage("closed", client))
    assert breaker.call(up) == "answer"
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert len(caplog.messages) == 1


def test_valkey_client_works(server: PrivateServer, caplog):
    """Its errors are not those of redis-py, and mean the same."""
    with contextlib.closing(valkey.Valkey(unix_socket_path=server.unix_socket)) as client:
        breaker = CircuitBreaker(fail_max=1, state_storage=CircuitRedisStorage("closed", client, "shop", timeout=10))
        with pytest.raises(CircuitBreakerError):
            breaker.call(down)
        assert client.get("shop:pybreaker:state") == b"open"
    assert caplog.messages == []


def test_creating_breakers_asks_for_no_client():
    """A module may create its breakers when it is imported, before settings are there and in a master that forks."""
    storage = CircuitRedisStorage("closed", lambda: pytest.fail("asked for a client"))
    assert CircuitBreaker(state_storage=storage)._state.name == "closed"


def test_breaker_created_late_begins_as_last_known(server: PrivateServer):
    """Creating a second breaker is no look at the circuit, either."""
    with contextlib.closing(server.client()) as client:
        storage = CircuitRedisStorage("closed", client)
        CircuitBreaker(state_storage=storage).open()
        assert CircuitBreaker(state_storage=storage)._state.name == "open"


class Talkative:
    """As a client of redis-py 6.4, whose `repr` has all that it was made with."""

    def __repr__(self) -> str:
        return f"<Client(password=swordfish, {'and so on, ' * 100})>"


@pytest.mark.parametrize("argument", ["state", "redis_object", "namespace", "fallback_circuit_state", "timeout", "ttl"])
@pytest.mark.parametrize(
    "given", [Talkative(), {"password": "swordfish"}, "redis://:swordfish@shop", "redis://?password=swordfish"]
)
def test_error_does_not_show_what_a_misplaced_client_carries(argument: str, given: Any) -> None:
    """Clients, their words and their URLs have passwords, and errors end in logs."""
    if argument == "namespace" and isinstance(given, str):
        given = f"{given}\0"
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must .* an object of class") as raised:
        CircuitRedisStorage(**{"state": "closed", "redis_object": lambda: None, argument: given})
    assert "swordfish" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_error_cuts_a_long_value() -> None:
    """A line of a log is enough."""
    with pytest.raises(ValueError, match=r"state must be one of .*, not 'a{78}…$"):
        CircuitRedisStorage("a" * 1000, lambda: None)


@pytest.mark.parametrize(
    ("words", "error", "message"),
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
        ({"probe_lease": "30"}, TypeError, "probe_lease must be a number of seconds, not '30'"),
    ],
)
def test_bad_argument_is_named_at_once(words, error, message):
    """The error says which argument, what was given and what is accepted."""
    arguments = {"state": "closed", "redis_object": lambda: None, **words}
    with pytest.raises(error, match=message):
        CircuitRedisStorage(**arguments)
