"""While Redis gives no answer, a process keeps a circuit of its own."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import pytest
import redis
import valkey
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._demo.server import PrivateServer
from pybreaker_redis._guard import LONGEST_ATTEMPT, PAUSE, Guard
from pybreaker_redis.storage import LOCAL_GENERATIONS
from tests.servers import ONCE


class Down(Exception):
    """The dependency is down."""


class Asynchronous:
    """As far as can be seen, an asynchronous client."""

    __module__ = "redis.asyncio.client"

    def evalsha(self) -> None:
        """There is one."""


def up() -> str:
    """A call to the healthy dependency."""
    return "answer"


def down() -> None:
    """A call to the dead dependency."""
    raise Down


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
    breaker = CircuitBreaker(fail_max=2, reset_timeout=0.05, state_storage=storage)
    assert breaker.call(up) == "answer"
    with pytest.raises(Down):
        breaker.call(down)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    with pytest.raises(CircuitBreakerError, match="not elapsed"):
        breaker.call(up)
    time.sleep(0.06)
    assert breaker.call(up) == "answer"
    assert breaker.current_state == "closed"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("circuit 'shop': Redis gave no usable answer (ConnectionError: ")
    assert caplog.messages[0].endswith("using this process's own state, next attempt in 1.0 s")


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


def test_shared_circuit_is_used_again_once_redis_answers(killable_server: PrivateServer, caplog):
    """Reports of calls from before, during and after an outage count where they belong, and the log says when."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    clock = [100.0]
    client = killable_server.client(**ONCE)
    storage = CircuitRedisStorage("closed", client)
    storage._guard = Guard(lambda: clock[0])
    breaker = CircuitBreaker(fail_max=5, state_storage=storage)
    with pytest.raises(Down):
        breaker.call(down)

    def meanwhile_redis_goes() -> None:
        killable_server.stop()
        raise Down

    def meanwhile_redis_returns() -> None:
        clock[0] += PAUSE
        assert storage.state == "closed"
        raise Down

    with pytest.raises(Down):
        breaker.call(meanwhile_redis_goes)
    assert storage.counter == 0, "a call that Redis admitted is not settled in this process's own circuit"
    with pytest.raises(Down):
        breaker.call(down)
    assert storage.counter == 1

    killable_server.restart(keep_data=True)
    with pytest.raises(Down):
        breaker.call(meanwhile_redis_returns)
    assert storage.counter == 0, "a call that this process admitted is not settled in Redis"
    storage.increment_counter()
    assert client.get("pybreaker:fail_counter") == b"1"
    assert caplog.messages[-1] == "circuit 'pybreaker': Redis answers again after 1.0 s"
    client.close()


def test_second_outage_begins_with_a_new_circuit(killable_server: PrivateServer):
    """What a process thought in the last outage is not what it thinks in the next; nor are their generations alike."""
    clock = [100.0]
    client = killable_server.client(**ONCE)
    storage = CircuitRedisStorage("closed", client)
    storage._guard = Guard(lambda: clock[0])
    breaker = CircuitBreaker(state_storage=storage)
    generations = []
    for _ in range(2):
        killable_server.stop()
        assert breaker.current_state == "closed"
        assert breaker.call(up) == "answer"
        generations.append(storage._admissions.current().generation)
        breaker.open()
        assert breaker.current_state == "open"
        killable_server.restart(keep_data=False)
        clock[0] += PAUSE
        assert breaker.current_state == "closed"
    assert LOCAL_GENERATIONS <= generations[0] < generations[1] < 0
    client.close()


def test_guard_lets_one_ask_at_a_time():
    """After a failure nobody asks for a while, then one; as long as that takes, nobody else does."""
    clock = [0.0]
    guard = Guard(lambda: clock[0])
    assert guard.may_ask()
    assert guard.answered() is None
    assert guard.failed(writing=False) == PAUSE
    assert not guard.may_ask()
    clock[0] = 2.0
    assert guard.may_ask()
    assert not guard.may_ask()
    clock[0] = 7.0
    assert guard.failed(writing=False) is None
    clock[0] = 11.9
    assert not guard.may_ask(), "it pauses for as long as the attempt took"
    clock[0] = 12.0
    assert guard.may_ask()
    clock[0] += LONGEST_ATTEMPT
    assert guard.may_ask(), "an attempt that never ended is not waited for without end"
    assert guard.answered() == 12.0 + LONGEST_ATTEMPT
    assert guard.answered() is None
    assert guard.may_ask()


def test_guard_survives_answers_that_come_together():
    """Found by review: two threads with the first answers after an outage used to collide."""
    guard = Guard()
    gone: list[float] = []

    def answer() -> None:
        for _ in range(2_000):
            guard.failed(writing=True)
            seconds = guard.answered()
            if seconds is not None:
                gone.append(seconds)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(answer) for _ in range(6)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert gone
    assert not guard.refuses_writes


def test_redis_that_takes_no_writes_is_away_until_it_does(server: PrivateServer, caplog):
    """Answers to reads end no outage that a refused write began: the dead dependency stays spared, the log short."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    clock = [100.0]
    with contextlib.closing(server.client()) as client:
        storage = CircuitRedisStorage("closed", client, namespace="shop")
        storage._guard = Guard(lambda: clock[0])
        breaker = CircuitBreaker(fail_max=2, reset_timeout=60, state_storage=storage)
        assert breaker.call(up) == "answer"
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        reached = 0
        for _ in range(20):
            clock[0] += PAUSE
            try:
                breaker.call(down)
            except Down:
                reached += 1
            except CircuitBreakerError as error:
                reached += "reached" in str(error)
        assert reached <= 3
        assert breaker.current_state == "open"
        assert len(caplog.messages) == 1
        assert "read only replica" in caplog.messages[0]
        client.execute_command("REPLICAOF", "no", "one")
        clock[0] += PAUSE
        assert breaker.current_state == "closed"
        assert len(caplog.messages) == 2
        assert caplog.messages[1].startswith("circuit 'shop': Redis answers again after ")


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
        breaker = CircuitBreaker(fail_max=1, state_storage=CircuitRedisStorage("closed", client, "shop"))
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


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"state": "ajar"}, ValueError, "state must be one of 'closed', 'open', 'half-open', not 'ajar'"),
        ({"fallback_circuit_state": None}, ValueError, "fallback_circuit_state must be one of .*, not None"),
        ({"namespace": b"shop"}, TypeError, "namespace must be a str or None, not b'shop'"),
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
