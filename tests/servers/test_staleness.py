"""Staleness: the age of the record that a process trusts, measured on real servers with real faults.

Each test lets a process trust a true record, makes the record untrue, and measures for how long the process uses it.
The limit is `max_staleness` and a round trip. Where a push arrives, the time is close to zero.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis._replica.connection import PushConnection
from pybreaker_redis._replica.listener import listener_for
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import (
    NAMESPACE,
    NOTICE_MAX_S,
    PUSH_MAX_S,
    PUSH_ONLY_STALENESS_S,
    breaker_on,
    down,
    fails,
    seconds_until,
    settled,
    up,
)
from tests.support.inspect import (
    hang_sessions,
    hold_listener_pauses,
    listener_connections,
    reconnect_quietly,
    server_of,
    storage_of,
    view_of,
)
from tests.support.proxy import Proxy
from tests.support.servers import counted
from tests.support.wait import wait_for
from tests.support.ways import is_breaker

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

STALENESS = 1.0


@pytest.fixture
def breaker(server: PrivateServer, protocol: int) -> Iterator[pybreaker.CircuitBreaker]:
    """Yield a breaker that makes calls without round trips."""
    with contextlib.closing(server.client()) as client:
        yield settled(breaker_on(client, max_staleness=STALENESS))


@pytest.fixture
def pushed(server: PrivateServer, protocol: int) -> Iterator[pybreaker.CircuitBreaker]:
    """Yield a breaker that notices changes only by push."""
    with contextlib.closing(server.client()) as client:
        yield settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S))


@pytest.fixture
def tracking(request: pytest.FixtureRequest, protocol: int) -> pybreaker.CircuitBreaker:
    """Return a breaker that gets pushes even of foreign writes, if the server can track keys."""
    found: pybreaker.CircuitBreaker = request.getfixturevalue("pushed" if protocol == 3 else "breaker")
    return found


@pytest.fixture
def other(server: PrivateServer) -> Iterator[pybreaker.CircuitBreaker]:
    """Yield a breaker of another process on the same circuit, without a cache."""
    with contextlib.closing(server.client()) as client:
        yield breaker_on(client, max_staleness=0)


def subscribers(client: redis.Redis) -> int:
    """Return the number of connections that are subscribed to the circuit's channel."""
    ((_, found),) = client.pubsub_numsub(channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0))
    return int(found)


def test_transition_of_another_process_is_noticed_at_once(pushed, other):
    """The transition and its push are one step.  Only our breaker shows that another process may probe."""
    half_open = "half-open" if is_breaker else "open"
    for verb, state in (("open", "open"), ("close", "closed"), ("open", "open"), ("half_open", half_open)):
        getattr(other, verb)()
        assert seconds_until(pushed, state) < PUSH_MAX_S


def test_transition_is_read_once_by_each_process(other, server, client):
    """A push causes a read. A server that tracks reports each transition twice, and 500 processes read it only once."""
    with contextlib.closing(server.client()) as own_client:
        breaker = settled(breaker_on(own_client, max_staleness=PUSH_ONLY_STALENESS_S))
        with counted(client) as commands:
            for _ in range(20):
                for verb, state in (("open", "open"), ("close", "closed")):
                    getattr(other, verb)()
                    seconds_until(breaker, state)
        # Each read of circuits reads the time once, and so does each script. There is one script per transition, and
        # some of this process, which queries Redis if it reads the circuit during such a read.
        assert commands["time"] - 40 >= 40, commands
        assert commands["time"] - commands["evalsha"] <= 50, commands


def test_failure_of_another_process_is_noticed_at_once(pushed, other):
    """After the push, this process reports successes, so that failures do not count as consecutive."""
    fails(other)
    assert wait_for(lambda: view_of(pushed).fast_path.quiet_admission is None, "noise") < PUSH_MAX_S
    pushed.call(up)
    assert other.fail_counter == 0


def test_10000_successes_and_10000_rejections_cost_no_round_trips(breaker, client):
    """A healthy circuit and an open one cost nothing but the heartbeat."""
    for state in ("closed", "open"):
        with counted(client) as commands:
            began = time.monotonic()
            for _ in range(10_000):
                with contextlib.suppress(pybreaker.CircuitBreakerError):
                    breaker.call(up)
            beats = 2 + (time.monotonic() - began) / STALENESS * 2
        assert breaker.current_state == state
        scripts = commands.get("evalsha", 0) + commands.get("eval", 0)
        assert scripts < 20, commands
        # A beat sends TIME, MGET twice, HMGET, and CLIENT CACHING or PING.
        assert sum(commands.values()) - scripts * 6 <= beats * 6, commands
        if state == "closed":
            breaker.open()


def test_foreign_write_is_noticed_in_time(tracking, client, protocol):
    """A stock worker or redis-cli publishes nothing, but a server that tracks sends an invalidation."""
    client.set(f"{NAMESPACE}:pybreaker:state", "open")
    assert seconds_until(tracking, "open") < (PUSH_MAX_S if protocol == 3 else STALENESS + NOTICE_MAX_S)


def test_repeated_foreign_writes_are_noticed(tracking, client, protocol):
    """The server invalidates a key again only after the key was read again."""
    for state in ("open", "closed") * 3:
        client.set(f"{NAMESPACE}:pybreaker:state", state)
        assert seconds_until(tracking, state) < (PUSH_MAX_S if protocol == 3 else STALENESS + NOTICE_MAX_S)


def test_flushall_is_noticed_in_time(tracking, other, client, protocol):
    """The first process that queries Redis restores the circuit as it was known."""
    other.open()
    seconds_until(tracking, "open")
    client.flushall()
    began = time.monotonic()

    def is_back() -> bool:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            tracking.call(up)
        return bool(client.exists(f"{NAMESPACE}:pybreaker:state"))

    wait_for(is_back, "the restored circuit")
    assert time.monotonic() - began < (PUSH_MAX_S if protocol == 3 else STALENESS + NOTICE_MAX_S)
    assert client.get(f"{NAMESPACE}:pybreaker:state") == b"open"


def test_expiry_of_a_key_is_noticed_in_time(breaker, client):
    """Keys with a foreign TTL expire. Servers send the invalidation late."""
    client.pexpire(f"{NAMESPACE}:pybreaker:state", 50)
    time.sleep(0.05)
    began = time.monotonic()

    def is_back() -> bool:
        breaker.call(up)
        return client.pttl(f"{NAMESPACE}:pybreaker:state") == -1

    wait_for(is_back, "the restored key")
    assert time.monotonic() - began < STALENESS + NOTICE_MAX_S


def test_muted_push_is_bounded_by_the_poll(tracking, server, protocol):
    """A process without the right to publish makes a transition, which the next poll notices."""
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "mute", "on", "nopass", "~*", "&*", "+@all", "-publish")
    with contextlib.closing(server.client(username="mute", password="any")) as client:
        breaker_on(client).open()
    assert seconds_until(tracking, "open") < (PUSH_MAX_S if protocol == 3 else STALENESS + NOTICE_MAX_S)


def test_killed_connection_ends_trust_and_is_replaced(pushed, other, client, monkeypatch):
    """The cause may be CLIENT KILL, an output buffer that overflows, or a proxy with a timeout."""
    may_continue = threading.Event()
    hold_listener_pauses(monkeypatch, may_continue)
    for _ in range(3):
        may_continue.clear()
        before = {line["id"] for line in listener_connections(client)}
        assert before
        for line in before:
            client.client_kill_filter(_id=line)
        wait_for(lambda: not view_of(pushed).is_trusted, "the end of trust")
        other.open()
        assert seconds_until(pushed, "open") < PUSH_MAX_S, "the breaker queries Redis"
        may_continue.set()
        wait_for(
            lambda before=before: {line["id"] for line in listener_connections(client)} - before, "a new connection"
        )
        other.close()
        seconds_until(pushed, "closed")
        settled(pushed)
        other.open()
        assert seconds_until(pushed, "open") < PUSH_MAX_S, "the breaker gets the push"
        other.close()
        seconds_until(pushed, "closed")
        settled(pushed)


def test_lost_connection_ends_trust_before_max_staleness(server, other, client, protocol):
    """The limit ``max_staleness`` is for changes that are not noticed. A lost connection is noticed."""
    with contextlib.closing(server.client()) as own_client:
        breaker = settled(breaker_on(own_client, max_staleness=PUSH_ONLY_STALENESS_S))
        for line in listener_connections(client):
            client.client_kill_filter(_id=line["id"])
        other.open()
        assert seconds_until(breaker, "open") < PUSH_MAX_S


def test_connection_replaced_by_redis_py_is_noticed(breaker, other, client, monkeypatch):
    """A replaced connection has no subscription. Only a check of the socket shows the loss."""
    replaced: list[PushConnection] = []
    query = PushConnection.query
    listener = listener_for(server_of(breaker))

    def replace_then_query(line: PushConnection, commands: Any) -> Any:
        # Listeners of earlier tests may still run.
        if not replaced and listener.session and line is listener.session.connection:
            replaced.append(line)
            # redis-py does so when it finds an error on the connection.
            reconnect_quietly(line)
        return query(line, commands)

    monkeypatch.setattr(PushConnection, "query", replace_then_query)

    def is_replaced() -> bool:
        session = listener.session
        return bool(replaced and session and session.connection is not replaced[0])

    wait_for(is_replaced, "a new connection")
    settled(breaker)
    wait_for(lambda: subscribers(client) == 1, "the subscription of the new connection")
    other.open()
    assert seconds_until(breaker, "open") < PUSH_MAX_S


def test_frozen_server_is_trusted_for_at_most_max_staleness(killable_server, protocol):
    """After SIGSTOP, there is neither an error nor an end of file."""
    timeout = 1.0
    with contextlib.closing(killable_server.client()) as client:
        options = {"max_staleness": STALENESS, "timeout": timeout, "fallback_circuit_state": "open"}
        breaker = settled(breaker_on(client, **options))
        began = time.monotonic()
        os.kill(killable_server.pid or 0, signal.SIGSTOP)
        try:
            seconds_until(breaker, "open")
            assert time.monotonic() - began < STALENESS + timeout + NOTICE_MAX_S
        finally:
            os.kill(killable_server.pid or 0, signal.SIGCONT)
        wait_for(lambda: breaker.current_state == "closed", "the shared circuit", within=20)
        settled(breaker)


def test_stuck_listener_does_not_extend_trust(breaker, other, monkeypatch):
    """Each call compares the clock with the time of the last confirmation."""
    from pybreaker_redis._replica.session import Session

    released = threading.Event()

    def wait_and_fail(self: Session) -> None:
        released.wait(10)
        raise ConnectionError("at last")

    hang_sessions(monkeypatch, wait_and_fail)
    other.open()
    try:
        assert seconds_until(breaker, "open") < STALENESS + NOTICE_MAX_S
    finally:
        released.set()


def test_circuit_is_restored_on_a_server_that_returns_empty(killable_server, protocol):
    """Generations continue where they were, so no known record counts as outdated."""
    with (
        contextlib.closing(killable_server.client()) as client,
        contextlib.closing(killable_server.client()) as elsewhere,
    ):
        breaker = settled(breaker_on(client, fail_max=1, max_staleness=PUSH_ONLY_STALENESS_S))
        other = breaker_on(elsewhere, max_staleness=0)
        for _ in range(3):
            other.open()
            other.close()
        wait_for(lambda: view_of(breaker).cached.generation == 6, "the pushes of all transitions")
        os.kill(killable_server.pid or 0, signal.SIGKILL)
        killable_server.restart(keep_data=False)
        new_breaker = breaker_on(killable_server.client(), max_staleness=0, fail_max=1)
        # A failure before the return may not be shared yet.
        wait_for(lambda: fails(new_breaker) or new_breaker.current_state == "open", "the trip of the new process")
        wait_for(lambda: not storage_of(new_breaker).health().is_own, "the shared trip")
        wait_for(lambda: breaker.current_state == "open", "a read of the trip", within=20)
        new_breaker.close()
        wait_for(lambda: breaker.current_state == "closed", "a read of the recovery", within=20)
        settled(breaker)
        other.open()
        assert seconds_until(breaker, "open") < PUSH_MAX_S


def test_silent_connection_is_replaced(server, protocol, other):
    """All bytes are sent and none arrive: only the missing answer shows the fault."""
    with (
        contextlib.closing(Proxy(server.unix_socket)) as proxy,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=proxy.port)) as client,
    ):
        breaker = settled(breaker_on(client, max_staleness=STALENESS))
        proxy.manner = "mute"
        other.open()
        assert seconds_until(breaker, "open") < STALENESS + NOTICE_MAX_S
        proxy.manner = "pass"
        other.close()
        seconds_until(breaker, "closed")
        settled(breaker)
        wait_for(lambda: subscribers(client) >= 1, "a new connection")
        other.open()
        assert seconds_until(breaker, "open") < PUSH_MAX_S


def test_zero_staleness_reads_every_time(server, other):
    """With ``max_staleness=0``, each call reads the circuit."""
    with contextlib.closing(server.client()) as client:
        breaker = breaker_on(client, max_staleness=0)
        breaker.call(up)
        other.open()
        assert breaker.current_state == "open"
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(down)
