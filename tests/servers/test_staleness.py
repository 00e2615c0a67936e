"""How old may be what a process goes by?  Real servers, real faults, deadlines measured.

Every test sees to it that the process believes what is true, then makes it untrue in some way, and measures how long
the process goes on.  Never longer than `max_staleness` and a round trip; where a push arrives, next to nothing.
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
from pybreaker_redis._replica import listener as listener_module
from pybreaker_redis._replica.connection import PushConnection
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import (
    NAMESPACE,
    PATIENT,
    PUSH,
    ROUND_TRIP,
    breaker_on,
    down,
    fails,
    seconds_until,
    settled,
    up,
)
from tests.support.inspect import lines, view_of
from tests.support.proxy import Proxy
from tests.support.servers import counted
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens", "patient")

STALENESS = 1.0


@pytest.fixture
def breaker(server: PrivateServer, protocol: int) -> Iterator[pybreaker.CircuitBreaker]:
    """A breaker that calls without asking."""
    with contextlib.closing(server.client()) as client:
        yield settled(breaker_on(client, max_staleness=STALENESS))


@pytest.fixture
def told(server: PrivateServer, protocol: int) -> Iterator[pybreaker.CircuitBreaker]:
    """The same, but what it notices it was told."""
    with contextlib.closing(server.client()) as client:
        yield settled(breaker_on(client, max_staleness=PATIENT))


@pytest.fixture
def tracking(request: pytest.FixtureRequest, protocol: int) -> pybreaker.CircuitBreaker:
    """One that is told even what nobody publishes, if the server can do so."""
    found: pybreaker.CircuitBreaker = request.getfixturevalue("told" if protocol == 3 else "breaker")
    return found


@pytest.fixture
def other(server: PrivateServer) -> Iterator[pybreaker.CircuitBreaker]:
    """The same circuit elsewhere, which always asks."""
    with contextlib.closing(server.client()) as client:
        yield breaker_on(client, max_staleness=0)


def subscribers(client: redis.Redis) -> int:
    """How many connections are told what happens to the circuit."""
    ((_, found),) = client.pubsub_numsub(channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0))
    return int(found)


# -- how it is meant to be ---------------------------------------------------------------------------------------------


def test_transition_of_another_is_heard_at_once(told, other):
    """Published with the transition itself."""
    for verb, state in (("open", "open"), ("close", "closed"), ("open", "open"), ("half_open", "open")):
        getattr(other, verb)()
        assert seconds_until(told, state) < PUSH


def test_transition_is_read_once_by_each_process(other, server, client):
    """A push is a hint.  A server that tracks reports each transition twice: 500 processes need not read it twice."""
    with contextlib.closing(server.client()) as own:
        breaker = settled(breaker_on(own, max_staleness=PATIENT))
        with counted(client) as asked:
            for _ in range(20):
                for verb, state in (("open", "open"), ("close", "closed")):
                    getattr(other, verb)()
                    seconds_until(breaker, state)
        # Each read of circuits asks for the time once, and so does each script: one for each transition, and those of
        # this process, which asks itself if it looks at the circuit during such a read.
        assert asked["time"] - 40 >= 40, asked
        assert asked["time"] - asked["evalsha"] <= 50, asked


def test_failure_of_another_is_heard_at_once(told, other):
    """From then on this process reports its successes, so that the failures are not taken for consecutive ones."""
    fails(other)
    assert wait_for(lambda: view_of(told).fast_path.quiet_admission is None, "noise") < PUSH
    told.call(up)
    assert other.fail_counter == 0


def test_10000_successes_and_10000_rejections_ask_nothing(breaker, client):
    """Free when healthy, and when open: what remains is the heartbeat."""
    for state in ("closed", "open"):
        with counted(client) as asked:
            began = time.monotonic()
            for _ in range(10_000):
                with contextlib.suppress(pybreaker.CircuitBreakerError):
                    breaker.call(up)
            beats = 2 + (time.monotonic() - began) / STALENESS * 2
        assert breaker.current_state == state
        scripts = asked.get("evalsha", 0) + asked.get("eval", 0)
        assert scripts < 20, asked
        # TIME, MGET twice, HMGET, CLIENT CACHING or PING.
        assert sum(asked.values()) - scripts * 6 <= beats * 6, asked
        if state == "closed":
            breaker.open()


# -- everything that can go wrong --------------------------------------------------------------------------------------


def test_foreign_writer_is_noticed_in_time(tracking, client, protocol):
    """A stock worker or redis-cli tells nobody; a server that tracks does."""
    client.set(f"{NAMESPACE}:pybreaker:state", "open")
    assert seconds_until(tracking, "open") < (PUSH if protocol == 3 else STALENESS + ROUND_TRIP)


def test_foreign_writer_is_noticed_again_and_again(tracking, client, protocol):
    """What was told once is not told again until it has been read again: it has been."""
    for state in ("open", "closed") * 3:
        client.set(f"{NAMESPACE}:pybreaker:state", state)
        assert seconds_until(tracking, state) < (PUSH if protocol == 3 else STALENESS + ROUND_TRIP)


def test_flushall_is_noticed_in_time(tracking, other, client, protocol):
    """The circuit comes back as it was known, from whoever asks first."""
    other.open()
    seconds_until(tracking, "open")
    client.flushall()
    began = time.monotonic()

    def is_back() -> bool:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            tracking.call(up)
        return bool(client.exists(f"{NAMESPACE}:pybreaker:state"))

    wait_for(is_back, "the circuit is back in Redis")
    assert time.monotonic() - began < (PUSH if protocol == 3 else STALENESS + ROUND_TRIP)
    assert client.get(f"{NAMESPACE}:pybreaker:state") == b"open"


def test_expiry_of_a_key_is_noticed_in_time(breaker, client):
    """Somebody gave the keys a lifetime; servers tell of it when they get round to it."""
    client.pexpire(f"{NAMESPACE}:pybreaker:state", 50)
    time.sleep(0.05)
    began = time.monotonic()

    def is_back() -> bool:
        breaker.call(up)
        return client.pttl(f"{NAMESPACE}:pybreaker:state") == -1

    wait_for(is_back, "the key is back")
    assert time.monotonic() - began < STALENESS + ROUND_TRIP


def test_muted_push_is_bounded_by_the_poll(tracking, server, protocol):
    """Whoever moves the circuit may not publish: the transition stands, and is noticed in time."""
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "mute", "on", "nopass", "~*", "&*", "+@all", "-publish")
    with contextlib.closing(server.client(username="mute", password="any")) as client:
        breaker_on(client).open()
    assert seconds_until(tracking, "open") < (PUSH if protocol == 3 else STALENESS + ROUND_TRIP)


def test_killed_connection_is_replaced_and_nothing_is_believed_meanwhile(told, other, client, monkeypatch):
    """CLIENT KILL, an output buffer that overflows, a proxy with a timeout."""
    seen, rest = threading.Event(), listener_module.Listener._pause
    monkeypatch.setattr(listener_module.Listener, "_pause", lambda self, seconds: seen.wait(10) and rest(self, seconds))
    for _ in range(3):
        seen.clear()
        before = {line["id"] for line in lines(client)}
        assert before
        for line in before:
            client.client_kill_filter(_id=line)
        wait_for(lambda: not view_of(told).is_trusted, "belief ends")
        other.open()
        assert seconds_until(told, "open") < PUSH, "it asks"
        seen.set()
        wait_for(lambda before=before: {line["id"] for line in lines(client)} - before, "a new line")
        other.close()
        seconds_until(told, "closed")
        settled(told)
        other.open()
        assert seconds_until(told, "open") < PUSH, "it hears"
        other.close()
        seconds_until(told, "closed")
        settled(told)


def test_lost_line_ends_belief_at_once_however_long_it_might_have_lasted(server, other, client, protocol):
    """``max_staleness`` is for what nobody notices; this is noticed."""
    with contextlib.closing(server.client()) as own:
        breaker = settled(breaker_on(own, max_staleness=PATIENT))
        for line in lines(client):
            client.client_kill_filter(_id=line["id"])
        other.open()
        assert seconds_until(breaker, "open") < PUSH


def test_connection_that_redis_py_replaces_quietly_is_noticed(breaker, other, client, monkeypatch):
    """The new one is subscribed to nothing: without a look at the socket all would seem well."""
    replaced: list[PushConnection] = []
    ask = PushConnection.query
    listener = listener_module.listener_for(breaker._state_storage._core.server)

    def replace_then_ask(line: PushConnection, commands: Any) -> Any:
        # Others may still listen, for storages of earlier tests.
        if not replaced and listener.session and line is listener.session.connection:
            replaced.append(line)
            # As redis-py does when it finds an error where we do not look.
            line._push_connection.disconnect()
            line._push_connection.connect()
        return ask(line, commands)

    monkeypatch.setattr(PushConnection, "query", replace_then_ask)

    def is_replaced() -> bool:
        session = listener.session
        return bool(replaced and session and session.connection is not replaced[0])

    wait_for(is_replaced, "a new line")
    settled(breaker)
    wait_for(lambda: subscribers(client) == 1, "the new line is told")
    other.open()
    assert seconds_until(breaker, "open") < PUSH


def test_frozen_server_is_believed_for_max_staleness_at_most(killable_server, protocol):
    """SIGSTOP: no error, no end of file, just nothing."""
    timeout = 1.0
    with contextlib.closing(killable_server.client()) as client:
        words = {"max_staleness": STALENESS, "timeout": timeout, "fallback_circuit_state": "open"}
        breaker = settled(breaker_on(client, **words))
        began = time.monotonic()
        os.kill(killable_server.pid or 0, signal.SIGSTOP)
        try:
            seconds_until(breaker, "open")
            assert time.monotonic() - began < STALENESS + timeout + ROUND_TRIP
        finally:
            os.kill(killable_server.pid or 0, signal.SIGCONT)
        wait_for(lambda: breaker.current_state == "closed", "the shared circuit is back", within=20)
        settled(breaker)


def test_listener_that_died_keeps_no_belief_alive(breaker, other, monkeypatch):
    """The reader looks at the clock himself."""
    from pybreaker_redis._replica.session import Session

    released = threading.Event()

    def stuck(self: Session) -> None:
        released.wait(10)
        raise ConnectionError("at last")

    monkeypatch.setattr(Session, "_beat", stuck)
    monkeypatch.setattr(Session, "_receive", lambda self, push: None)
    other.open()
    try:
        assert seconds_until(breaker, "open") < STALENESS + ROUND_TRIP
    finally:
        released.set()


def test_killed_server_that_comes_back_empty_gets_the_circuit_back(killable_server, protocol):
    """And its generations go on from where they were: nothing that was known is taken for old."""
    with (
        contextlib.closing(killable_server.client()) as client,
        contextlib.closing(killable_server.client()) as elsewhere,
    ):
        breaker = settled(breaker_on(client, fail_max=1, max_staleness=PATIENT))
        other = breaker_on(elsewhere, max_staleness=0)
        for _ in range(3):
            other.open()
            other.close()
        wait_for(lambda: view_of(breaker).cached.generation == 6, "all is heard")
        os.kill(killable_server.pid or 0, signal.SIGKILL)
        killable_server.restart(keep_data=False)
        newcomer = breaker_on(killable_server.client(), max_staleness=0, fail_max=1)
        # A failure of before the return is not everybody's yet.
        wait_for(lambda: fails(newcomer) or newcomer.current_state == "open", "the newcomer's trip")
        wait_for(lambda: not newcomer._state_storage.health().is_own, "that is everybody's")
        wait_for(lambda: breaker.current_state == "open", "the newcomer's trip is believed", within=20)
        newcomer.close()
        wait_for(lambda: breaker.current_state == "closed", "and its recovery", within=20)
        settled(breaker)
        other.open()
        assert seconds_until(breaker, "open") < PUSH


# -- a proxy that swallows ---------------------------------------------------------------------------------------------


def test_stream_that_went_silent_is_given_up(server, protocol, other):
    """Everything is sent, nothing arrives: only an answer that is missing tells."""
    with (
        contextlib.closing(Proxy(server.unix_socket)) as proxy,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=proxy.port)) as client,
    ):
        breaker = settled(breaker_on(client, max_staleness=STALENESS))
        proxy.manner = "mute"
        other.open()
        assert seconds_until(breaker, "open") < STALENESS + ROUND_TRIP
        proxy.manner = "pass"
        other.close()
        seconds_until(breaker, "closed")
        settled(breaker)
        wait_for(lambda: subscribers(client) >= 1, "there is a new line")
        other.open()
        assert seconds_until(breaker, "open") < PUSH


def test_always_asking_is_never_old(server, other):
    """``max_staleness=0`` for those who want it."""
    with contextlib.closing(server.client()) as client:
        breaker = breaker_on(client, max_staleness=0)
        breaker.call(up)
        other.open()
        assert breaker.current_state == "open"
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(down)
