"""The listener: one thread and one connection per server, from the first guarded call to the end of its storages."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import fakeredis
import freezegun
import pybreaker
import pytest
import redis
import time_machine

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.endpoint import endpoint_of
from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis._replica import armed, subscription
from pybreaker_redis._replica import listener as listener_module
from pybreaker_redis._replica.listener import listener_for
from pybreaker_redis._replica.view import View
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import (
    NAMESPACE,
    NOTICE_MAX_S,
    PUSH_MAX_S,
    PUSH_ONLY_STALENESS_S,
    Down,
    breaker_on,
    fails,
    seconds_until,
    settled,
    up,
)
from tests.support.clients import PROTOCOLS
from tests.support.inspect import (
    all_listeners,
    allow_start_now,
    channels_of,
    core_of,
    crash_listeners,
    faults_of,
    follower_of,
    is_subscribed,
    listener_connections,
    listener_of,
    listeners,
    local_of,
    lock_of,
    pretend_fork,
    reset_in_child,
    server_of,
    server_table,
    set_lock,
    shared_of,
    state_name_of,
    storage_of,
    subscription_of,
    view_of,
)
from tests.support.logs import messages_of, records_of
from tests.support.paths import ROOT
from tests.support.servers import ONCE, counted
from tests.support.wait import wait_for
from tests.support.ways import is_breaker, settles_calls

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")


def test_nothing_starts_before_the_first_guarded_call(server, client):
    """Modules that create breakers are imported in master processes, and health checks read breakers in any process."""
    storage = CircuitRedisStorage("closed", client, NAMESPACE)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    assert breaker.current_state == "closed"
    assert breaker.state.name == "closed"
    assert breaker.fail_counter == 0
    breaker.open()
    breaker.close()
    assert listeners() == []
    breaker.call(up)
    assert len(listeners()) == 1
    assert listeners()[0].daemon


def test_rejected_call_is_a_guarded_call(server, client):
    """A worker that starts while the circuit is open makes no other calls for a while, and needs the view most."""
    breaker = breaker_on(client)
    breaker.open()

    def needs_no_round_trip() -> bool:
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        return bool(view_of(breaker).is_trusted)

    wait_for(needs_no_round_trip, "rejections without a round trip")


@pytest.mark.parametrize("options", [{"max_staleness": 0}])
def test_zero_staleness_starts_no_thread(client, options):
    """With ``max_staleness=0``, no thread starts."""
    breaker_on(client, **options).call(up)
    assert listeners() == []


@pytest.mark.full
def test_1000_circuits_of_as_many_clients_take_one_thread_one_connection_one_batch(server, client, report):
    """The cost of listening does not grow with the number of circuits. Only polls read each circuit in use."""
    clients = [server.client() for _ in range(10)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    # Long beats, because a tracer (as for coverage) makes a read of 1000 circuits take most of a second.
    beat = 2.0
    breakers = [breaker_on(clients[number % 10], f"circuit{number}", max_staleness=2 * beat) for number in range(1000)]
    for breaker in breakers:
        breaker.call(up)
    wait_for(
        lambda: all(is_subscribed(breaker) for breaker in breakers), "the subscription to every circuit", within=30
    )
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listeners()) == 1
    wait_for(lambda: len(listener_connections(client)) == (1 if PROTOCOLS[0] == 3 else 2), "one connection")

    def use_all(seconds: float) -> dict[str, int]:
        with counted(client) as commands:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for breaker in breakers:
                    breaker.call(up)
        return commands

    # The first beats find circuits that were first used at different times.
    wait_for(lambda: "evalsha" not in use_all(beat * 1.1), "a trusted view of every circuit", within=60)
    beats = 2
    commands = use_all(beats * beat)
    # There are tens of thousands of calls. A beat that a busy machine delays costs each circuit one script.
    assert commands.get("evalsha", 0) < 100, commands
    # A script reads the time once, too.
    assert commands["time"] - commands.get("evalsha", 0) <= beats + 2, "one batch for each beat"
    # Two commands for each circuit and three for all of them.
    assert sum(commands.values()) <= (beats + 2) * (2 * 1000 + 3)
    report(f"1000 circuits in one process: {(after - before) / 1000 / 1024:.1f} KiB each, breakers included")
    for one in clients:
        one.close()


@pytest.mark.full
def test_circuit_that_needs_shorter_beats_gets_them(client):
    """The circuit need not wait for a beat that was planned for other circuits."""
    settled(breaker_on(client, "slow", max_staleness=60))
    breaker = settled(breaker_on(client, max_staleness=0.5))
    wait_for(lambda: breaker.call(up) and view_of(breaker).fast_path.quiet_admission, "a trusted view")
    with counted(client) as commands:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            breaker.call(up)
    # Each beat of this circuit reads the time, and so does each script.
    assert commands.get("time", 0) - commands.get("evalsha", 0) >= 4, commands


def test_idle_circuits_are_not_polled(client, monkeypatch):
    """An unused circuit costs nothing."""
    monkeypatch.setattr(armed, "ARMED_MAX_S", 0.1)
    breaker = settled(breaker_on(client, max_staleness=0.2))
    view = view_of(breaker)
    wait_for(lambda: not view.is_trusted and not view.fast_path.was_used, "an unused view")
    with counted(client) as commands:
        wait_for(lambda: client.info("commandstats").get("cmdstat_time", {"calls": 0})["calls"] >= 6, "further beats")
    # One poll may have been under way when the circuit fell out of use.
    assert commands.get("hmget", 0) <= 1, commands


def test_storages_of_one_circuit_in_one_process_both_get_the_push(server, client):
    """Two modules may use one namespace: each has its own view, and one subscription serves both."""
    one, two = (settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S)) for _ in range(2))
    with contextlib.closing(server.client()) as elsewhere:
        breaker_on(elsewhere, max_staleness=0).open()
    assert seconds_until(one, "open") < PUSH_MAX_S
    assert seconds_until(two, "open") < PUSH_MAX_S
    assert client.pubsub_numsub(channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0))[0][1] == 1


def test_storages_of_one_circuit_in_one_process_do_not_wait_for_the_push(server, client):
    """An answer to one storage is shared with the other, so the same thread need not read again."""
    one, two = settled(breaker_on(client, fail_max=3)), settled(breaker_on(client, fail_max=3))
    for _ in range(20):
        fails(one)
        two.call(up)
        assert one.fail_counter == 0
        fails(two, 2)
        assert one.current_state == two.current_state == "closed"
        fails(one)
        assert two.current_state == one.current_state == "open"
        two.close()
        assert one.current_state == "closed"


def test_databases_do_not_receive_pushes_of_each_other(server, client):
    """Each database has its own keys, but all databases share their channels."""
    here = settled(breaker_on(client))
    with contextlib.closing(server.client(db=1)) as elsewhere:
        there = settled(breaker_on(elsewhere))
        there.open()
        assert there.current_state == "open"
        time.sleep(0.05)
        assert here.current_state == "closed"
        here.open()
        there.close()
        assert (here.current_state, there.current_state) == ("open", "closed")


def test_listener_uses_address_and_password_of_the_client(preferred, tmp_path):
    """The push connection uses the address and the user of the client."""
    with PrivateServer(preferred.binary, port=free_port(), args=["--requirepass", "secret"]) as server:
        for options in ({"port": server.port}, {"unix_socket_path": server.unix_socket}):
            with contextlib.closing(redis.Redis(**options, password="secret", decode_responses=True)) as client:
                breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S))
                breaker_on(client, max_staleness=0).open()
                assert seconds_until(breaker, "open") < PUSH_MAX_S
                breaker.close()


def test_failures_are_published_twice_a_second_at_any_rate(server, client):
    """Counters are never published, because 500 listeners would use up the server."""
    breaker = settled(breaker_on(client, fail_max=10**9, timeout=10))
    with contextlib.closing(server.client()) as elsewhere, elsewhere.pubsub() as subscriber:
        subscriber.psubscribe("*")
        subscriber.get_message(timeout=1)
        began = time.monotonic()
        made = 0
        while time.monotonic() < began + 2.0 or made < 600:
            fails(breaker, 10)
            made += 10
        seconds = time.monotonic() - began
        received = 0
        while message := subscriber.get_message(timeout=0.1):
            received += message["type"] == "pmessage"
    assert breaker.fail_counter > 500
    assert 3 <= received <= 2 * seconds + 1


@pytest.mark.full
def test_success_long_after_a_failure_is_reported(client):
    """A success is not quiet because time has passed: failures before and after a success are not consecutive."""
    breaker = settled(breaker_on(client, fail_max=3, max_staleness=0.2))
    for _ in range(6):
        fails(breaker)
        assert breaker.fail_counter == 1
        # The time of noise is over without a success, and the view has been confirmed since.
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert breaker.current_state == "closed"
            time.sleep(0.01)
        breaker.call(up)
        assert breaker.fail_counter == 0
    settled(breaker)


def test_noise_lasts_though_a_poll_finds_no_failure(client):
    """The next failure may publish nothing. For a second after a failure, every success is reported."""
    breaker = settled(breaker_on(client, fail_max=3, max_staleness=0.1))
    began = time.monotonic()
    fails(breaker)
    breaker.call(up)
    while True:
        assert breaker.current_state == "closed"
        quiet = view_of(breaker).fast_path.quiet_admission
        # Read last, because this thread may have waited for a processor.
        if time.monotonic() > began + 0.8:
            break
        assert quiet is None
    settled(breaker)


def test_failure_of_a_stock_worker_is_reset_by_a_success(client):
    """Stock counts a failure without making noise, and the poll reads the counter."""
    breaker = settled(breaker_on(client, max_staleness=0.2))
    pybreaker.CircuitRedisStorage("closed", client, NAMESPACE).increment_counter()
    wait_for(
        lambda: breaker.current_state and view_of(breaker).fast_path.quiet_admission is None,
        "a poll that reads the counter",
    )
    breaker.call(up)
    assert breaker.fail_counter == 0


def administrate(server: PrivateServer, *rights: str) -> None:
    """Create a user with these rights only."""
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "limited", "reset", "on", "nopass", *rights)


@pytest.mark.parametrize(
    "rights",
    [("~*", "+@all", "-subscribe", "&*"), ("~*", "+@all", "resetchannels")],
    ids=["no SUBSCRIBE", "no channels"],
)
def test_forbidden_channel_reads_through_and_logs_one_warning(server, client, caplog, rights, protocol):
    """Without push, no view is trusted, and one warning states the cost."""
    administrate(server, *rights)
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breakers = [breaker_on(limited, f"limited{number}") for number in range(3)]
        for breaker in breakers:
            breaker.call(up)
        wait_for(lambda: messages_of(caplog, server, "limited"), "a warning")
        for breaker in breakers:
            breaker.call(up)
            assert not view_of(breaker).is_trusted
        breaker_on(client, "limited0", max_staleness=0).open()
        assert breakers[0].current_state == "open", "the breaker queries Redis"
        with pytest.raises(pybreaker.CircuitBreakerError):
            breakers[0].call(up)
        (warning,) = records_of(caplog, server, "limited", "other", level=logging.WARNING)
        assert "every read of a circuit is a round trip" in warning.message


@pytest.mark.parametrize("rights", [("~*", "&mine:*"), ("~mine:*", "&*")], ids=["its channel", "its keys"])
def test_forbidden_circuit_does_not_affect_other_circuits(server, caplog, rights, protocol):
    """Other circuits keep their subscriptions, before and after the forbidden one is used."""
    administrate(server, "resetchannels", "+@all", *rights)
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        before = settled(breaker_on(limited, "mine:before"))
        other = breaker_on(limited, "other")
        assert other.call(up) == "answer"
        wait_for(lambda: other.call(up) and messages_of(caplog, server, "other"), "a warning")
        after = settled(breaker_on(limited, "mine:after"))
        for breaker in (before, after):
            assert settled(breaker).call(up) == "answer"
        assert not view_of(other).is_trusted
        assert len(listeners()) == 1
        (warning,) = records_of(caplog, server, "limited", "other", level=logging.WARNING)
        assert "permission" in warning.message.lower() or "NOPERM" in warning.message


def test_user_without_client_commands_gets_pushes(server, client):
    """Some servers reserve CLIENT for administrators. Without CLIENT, published messages still arrive."""
    administrate(server, "~*", "&*", "+@all", "-client")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = settled(breaker_on(limited, max_staleness=PUSH_ONLY_STALENESS_S))
        breaker_on(client, max_staleness=0).open()
        assert seconds_until(breaker, "open") < PUSH_MAX_S


@pytest.mark.parametrize("commands", [["-hmget"], ["-mget"]], ids=" ".join)
def test_user_without_read_rights_falls_back_to_the_local_circuit(server, client, commands, monkeypatch):
    """A record that cannot be confirmed is read again. If even the read is refused, the local circuit decides."""
    # The server reports changes of an armed circuit, so its next read is due after half a minute.
    monkeypatch.setattr(armed, "ARMED_MAX_S", 0.1)
    administrate(server, "~*", "&*", "+@all")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = settled(breaker_on(limited, max_staleness=0.2, fallback_circuit_state="open"))
        administrate(server, "~*", "&*", "+@all", *commands)
        assert seconds_until(breaker, "open") < 0.2 + NOTICE_MAX_S


class UnknownConnection(redis.Connection):
    """Connection class of an application, with an argument that only the application can provide."""

    def __init__(self, *, colour: str, **options: object) -> None:
        raise TypeError("only the application makes these")


def test_unknown_connection_class_reads_through(server, client, caplog):
    """The listener does not guess the arguments of an unknown connection class."""
    breaker = breaker_on(client)
    breaker.call(up)
    client.ping()  # leaves a connection in the pool
    client.connection_pool.connection_class = UnknownConnection
    wait_for(lambda: listener_connections(client), "the connection of the first listener")
    other = breaker_on(client, "odd")
    for _ in range(2):
        other.call(up)
    wait_for(lambda: any("connection" in message for message in messages_of(caplog, server, "odd")), "a warning")
    assert not view_of(other).is_trusted


def test_fakeredis_and_servers_without_scripts_read_through(server):
    """Without scripts, no process publishes: every read is a round trip, and no thread starts."""
    fake_server = fakeredis.FakeServer()
    administrate(server, "~*", "&*", "+@all", "-@scripting")
    with contextlib.closing(server.client(username="limited", password="x")) as scriptless:
        for either in (fakeredis.FakeStrictRedis(server=fake_server), scriptless):
            one, two = breaker_on(either), breaker_on(either)
            one.call(up)
            two.open()
            assert one.current_state == "open"
            assert not view_of(one).is_trusted
    assert listeners() == []
    assert endpoint_of(fakeredis.FakeStrictRedis(server=fake_server)) is None
    assert endpoint_of(object()) is None


def renamed(command: str) -> list[str]:
    """Return arguments for a server without this command."""
    return ["--rename-command", command, ""]


@pytest.mark.parametrize("commands", [["HELLO"], ["CLIENT"], ["HELLO", "CLIENT"]], ids=" ".join)
def test_server_without_hello_or_client_sends_pushes(preferred, commands):
    """Managed servers and proxies lack commands. The listener uses fewer features, and receives all messages."""
    arguments = [argument for command in commands for argument in renamed(command)]
    options = {"protocol": 2} if PROTOCOLS[0] == 3 else {}
    with PrivateServer(preferred.binary, args=arguments) as server:
        clients = [server.client(**options) for _ in range(2)]
        breaker = settled(breaker_on(clients[0], max_staleness=PUSH_ONLY_STALENESS_S))
        breaker_on(clients[1], max_staleness=0).open()
        assert seconds_until(breaker, "open") < PUSH_MAX_S
        for client in clients:
            client.close()


def test_server_without_subscribe_reads_through(preferred, caplog):
    """The command does not exist on the server."""
    with (
        PrivateServer(preferred.binary, args=renamed("SUBSCRIBE")) as server,
        contextlib.closing(server.client()) as client,
    ):
        breaker = breaker_on(client)
        breaker.call(up)
        wait_for(lambda: messages_of(caplog, server, "limited"), "a warning")
        breaker.call(up)
        assert not view_of(breaker).is_trusted


def test_client_without_an_endpoint_reads_through_and_logs_once(server, client, caplog):
    """Clients of clusters and wrappers of applications have no single endpoint."""

    class Wrapper:
        def evalsha(self, *arguments: object) -> object:
            return client.evalsha(*arguments)

        def eval(self, *arguments: object) -> object:
            return client.eval(*arguments)

    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = breaker_on(Wrapper())
    for _ in range(3):
        breaker.call(up)
    (warning,) = messages_of(caplog, server, NAMESPACE)
    assert "Wrapper; every read of the circuit is a round trip" in warning
    breaker_on(client, max_staleness=0).open()
    assert breaker.current_state == "open"


def test_garbage_on_the_channel_is_ignored(client):
    """Any client may publish on the channel."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S))
    channel = channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0)
    for payload in (b"", b"open", b"1 2 open", b"\xff" * 100, b"1 -1 open   0 0"):
        client.publish(channel, payload)
    breaker_on(client, max_staleness=0).open()
    assert seconds_until(breaker, "open") < PUSH_MAX_S
    assert len(listeners()) == 1


def test_redis_that_starts_later_sends_pushes(killable_server):
    """Redis may not be running during the first calls of a process. The listener keeps trying."""
    killable_server.stop()
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = breaker_on(client)
        assert breaker.call(up) == "answer"
        assert len(listeners()) == 1
        killable_server.start()
        wait_for(lambda: is_subscribed(breaker), "a subscription", within=20)
        settled(breaker)


@pytest.mark.parametrize(
    "travel",
    [
        pytest.param(freezegun.freeze_time, id="freezegun", marks=pytest.mark.full),
        pytest.param(time_machine.travel, id="time-machine", marks=pytest.mark.full),
    ],
)
def test_stopped_clock_stops_no_listener(client, server, travel):
    """Tests that stop the time, or move it by years, still receive pushes, and so do the tests after them."""
    breaker = settled(breaker_on(client, max_staleness=0.3))
    with contextlib.closing(server.client()) as elsewhere:
        other = breaker_on(elsewhere, max_staleness=0)
        with travel("2040-01-01", tick=False):
            time.sleep(0.7)
            other.open()
            until = perf_counter() + 5
            while breaker.current_state != "open":
                assert perf_counter() < until
            other.close()
        time.sleep(0.4)
        seconds_until(breaker, "closed")
        settled(breaker)
        with counted(client) as commands:
            until = perf_counter() + 2.0
            while perf_counter() < until:
                breaker.call(up)
        # A script reads the time once, and so does a beat.
        assert commands.get("time", 0) - commands.get("evalsha", 0) >= 4, "further beats"


class UWSGI:
    """Module that uWSGI offers to its applications."""

    def __init__(self, worker: int, **options: bytes) -> None:
        self.opt = {name.replace("_", "-"): value for name, value in options.items()}
        self.worker_id = lambda: worker
        self.mule_id = lambda: 0


def test_child_of_a_fork_without_hooks_gets_its_own_listener(client):
    """Forks of uWSGI run no hooks, so the process id shows that a process is a child."""
    mine = listener_module.ListenerTable()
    server = server_for(client)
    inherited = mine.listener_of(server)
    closed: list[bool] = []
    inherited.session = SimpleNamespace(connection=SimpleNamespace(close=lambda: closed.append(True)))
    assert mine.listener_of(server) is inherited
    pretend_fork()
    assert mine.listener_of(server) is not inherited
    assert closed == [True]
    again = mine.listener_of(server)
    reset_in_child(mine)
    assert closed == [True], "a listener that has not started has no connection to close"
    assert mine.listener_of(server) is not again


def test_child_of_a_fork_without_hooks_subscribes_again(client):
    """In the child, no thread listens for the circuit, so the subscription starts again."""
    breaker = settled(breaker_on(client))
    failover = core_of(breaker)
    inherited = listener_of(breaker)
    pretend_fork()
    failover.prepare_call(has_several_breakers=False)
    assert listener_of(breaker) is not inherited
    assert listener_of(breaker).is_running
    settled(breaker)


def test_unknown_location_starts_no_listener(client):
    """The location of the circuit is not known before the first command."""
    breaker = breaker_on(client)
    shared = shared_of(breaker)
    shared.subscribe_to_changes(None)
    assert listeners() == []
    assert shared.push is None


def test_no_thread_starts_in_a_process_that_is_ending(client, monkeypatch):
    """Before Python 3.12, the interpreter would wait for the thread for ever."""
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    breaker = breaker_on(client)
    assert breaker.call(up) == "answer"
    assert listeners() == []


def test_no_thread_starts_in_the_master_of_uwsgi(server, client, monkeypatch, caplog):
    """A thread in the master would deadlock the workers. Workers have their own listeners, so nothing is logged."""
    monkeypatch.setitem(sys.modules, "uwsgi", UWSGI(0, enable_threads=b"true"))
    breaker = breaker_on(client)
    for _ in range(2):
        breaker.call(up)
    assert listeners() == []
    assert messages_of(caplog, server, NAMESPACE) == []


@pytest.mark.parametrize("options", [{"enable_threads": b"true"}, {"threads": b"2"}, {}], ids=" ".join)
def test_worker_of_uwsgi_listens_if_its_threads_run(server, client, monkeypatch, caplog, options):
    """If no threads run, one line states the cost."""
    monkeypatch.setitem(sys.modules, "uwsgi", UWSGI(1, **options))
    breakers = [breaker_on(client, f"circuit{number}") for number in range(2)]
    for breaker in breakers * 2:
        breaker.call(up)
    assert len(listeners()) == bool(options)
    lines = messages_of(caplog, server, "circuit0", "circuit1")
    assert len(lines) == (not options)
    if not options:
        assert "--enable-threads" in lines[0]


def test_process_at_its_thread_limit_reads_through(server, client, monkeypatch, caplog):
    """The cause may be RLIMIT_NPROC, the limit of a container, or an interpreter that is about to end."""

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    breaker = breaker_on(client)
    for _ in range(2):
        assert breaker.call(up) == "answer"
    (warning,) = messages_of(caplog, server, NAMESPACE)
    assert "can't start new thread" in warning


def test_thread_and_connection_end_with_the_last_storage(client):
    """Listening keeps no storage alive."""
    breakers = [settled(breaker_on(client, f"circuit{number}")) for number in range(2)]
    channels = [channel_of(circuit_keys(f"circuit{number}", needs_one_slot=False), 0) for number in range(2)]
    del breakers[0]
    gc.collect()
    wait_for(lambda: dict(client.pubsub_numsub(*channels)) == {channels[0].encode(): 0, channels[1].encode(): 1}, "one")
    breakers.clear()
    gc.collect()
    wait_for(lambda: not listeners() and not listener_connections(client), "the end of the listener")
    settled(breaker_on(client))
    assert len(listeners()) == 1


@pytest.mark.full
def test_dropped_circuits_leave_no_memory(client):
    """A process with a circuit for each of its users, or with a client for each request, does not grow."""
    used = settled(breaker_on(client, "used"))
    listener = listener_of(used)
    for number in range(60):
        breaker_on(client, f"circuit{number}").call(up)

    def most_are_removed() -> bool:
        gc.collect()
        breaker_on(client, "last").call(up)
        return len(channels_of(listener)) < 30

    # The listener may hold some of them while it reads.
    wait_for(most_are_removed, "removed subscribers")
    for number in range(5):
        user = redis.Redis(unix_socket_path=f"/nowhere/{number}")
        listener_for(server_for(user)).add_view(View(1.0), ("",) * 5, "channel")
    gc.collect()
    wait_for(lambda: gc.collect() is not None and len(all_listeners()) == 1, "removed listeners of other servers")


def test_circuit_that_returns_to_a_server_gets_pushes_again(client):
    """A master may be demoted for a moment. The same connection and the same thread serve the circuit again."""
    breaker = settled(breaker_on(client))
    for _ in range(3):
        shared_of(breaker).forget_location()
        settled(breaker)
    assert len(listeners()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_died_is_replaced(client, monkeypatch):
    """Until another thread runs, records are trusted for at most `max_staleness`."""
    breaker = settled(breaker_on(client))
    (died,) = listeners()
    with monkeypatch.context() as patched:
        crash_listeners(patched)
        for line in listener_connections(client):
            client.client_kill_filter(_id=line["id"])
        wait_for(lambda: not died.is_alive(), "the end of the thread")
    # As if the thread had died long after its start.
    allow_start_now(subscription_of(breaker))
    wait_for(lambda: breaker.call(up) and listeners(), "another thread")
    settled(breaker)
    assert len(listeners()) == 1


def test_start_of_a_thread_is_retried(server, client, monkeypatch, caplog):
    """The process may have been at its limit of threads for a moment only."""
    monkeypatch.setattr(subscription, "REFUSED_RETRY_DELAY_S", 0.1)

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        breaker = breaker_on(client)
        assert breaker.call(up) == "answer"
        assert messages_of(caplog, server, NAMESPACE)
    settled(breaker)


@pytest.mark.parametrize("trouble", ["fakeredis", "no thread", "a stub of uwsgi"])
def test_failure_to_listen_fails_no_call(client, monkeypatch, trouble):
    """Neither a missing thread, nor a log that cannot be written, nor a stub of uWSGI's module makes a call fail."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    handler, logger = Broken(), logging.getLogger("pybreaker_redis")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    if trouble == "no thread":
        monkeypatch.setattr(threading.Thread, "start", no_more)
    if trouble == "a stub of uwsgi":
        monkeypatch.setitem(sys.modules, "uwsgi", ModuleType("uwsgi"))
    breaker = breaker_on(fakeredis.FakeRedis() if trouble == "fakeredis" else client)
    for _ in range(3):
        assert breaker.call(up) == "answer"


PROGRAM = """
import sys, threading, redis, pybreaker
from pybreaker_redis import CircuitRedisStorage
storage = CircuitRedisStorage("closed", redis.Redis(unix_socket_path=sys.argv[1]), "program")
breaker = pybreaker.CircuitBreaker(state_storage=storage)
def late():
    print(breaker.call(lambda: "answer"), flush=True)
{what}
"""


@pytest.mark.parametrize(
    ("what", "answers"),
    [
        ("late()", 1),
        ("import atexit; atexit.register(late)", 1),
        ("late(); import atexit; atexit.register(late)", 2),
        ("threading._register_atexit(late); late()", 2),
        ("class Last:\n    def __del__(self): late()\nlast = Last()", 1),
    ],
    ids=["plain", "first call at exit", "last call at exit", "first threads, then exit", "in a finalizer"],
)
def test_program_ends_at_once_and_silently(server, what, answers):
    """A daemon thread delays no exit, whatever it waits for. Where no thread can start, calls query Redis."""
    began = time.monotonic()
    done = subprocess.run(
        # Releases 3 of redis-py import distutils to compare versions.
        [
            *(sys.executable, "-W", "error", "-W", "ignore:distutils Version:DeprecationWarning"),
            *("-c", PROGRAM.replace("{what}", what), server.unix_socket),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "answer\n" * answers), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("first", ["a failure", pytest.param("by hand", marks=pytest.mark.full)])
def test_failures_count_locally_while_redis_takes_no_writes(killable_server, first):
    """Polls succeed, because reads still work. A call that Redis admits must be able to report its failure to Redis."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fail_max=3, reset_timeout=60))
        client.config_set("maxmemory", 1)
        if first == "by hand":
            storage_of(breaker).opened_at = datetime.now(timezone.utc)
        reached = 0

        def count_and_fail() -> None:
            nonlocal reached
            reached += 1
            raise Down

        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                breaker.call(count_and_fail)
            time.sleep(0.005)
        client.config_set("maxmemory", 0)
    assert reached <= 3 + 1, "Redis may have admitted the first call"


@contextlib.contextmanager
def held_elsewhere(lock: Any) -> Iterator[None]:
    """Hold this lock in another thread."""
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            locked.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(10)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_child_of_a_fork_does_not_wait_for_locks_of_its_parent(client):
    """During an outage, threads take the locks of the server and of the local circuit with every call."""
    breaker = breaker_on(client)
    storage = storage_of(breaker)
    breaker.call(up)
    guards = (faults_of(storage), server_of(storage).availability)
    for item in (local_of(storage), server_of(storage), *guards, view_of(breaker), server_table()):
        with held_elsewhere(lock_of(item)):
            reset_in_child(item)
            assert lock_of(item).acquire(timeout=1)
            lock_of(item).release()


def test_threads_notice_every_transition_once(server, client):
    """No thread uses an admission of an earlier generation, and listeners are notified once of each transition."""
    notified: Counter[str] = Counter()

    class Recorder(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            notified[new_state.name] += 1

    breaker = settled(breaker_on(client, reset_timeout=60))
    breaker.add_listener(Recorder())
    stop = threading.Event()
    errors: list[BaseException] = []

    def call() -> None:
        while not stop.is_set():
            try:
                breaker.call(up)
            except pybreaker.CircuitBreakerError:
                time.sleep(0.001)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                return

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        with contextlib.closing(server.client()) as elsewhere:
            other = breaker_on(elsewhere, max_staleness=0)
            for _ in range(20):
                for verb, state in (("open", "open"), ("close", "closed")):
                    getattr(other, verb)()
                    wait_for(lambda state=state: state_name_of(breaker) == state, f"the state {state}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not errors
    assert notified == {"open": 20, "closed": 20}


#: Transitions of a listener that reads the state.  pybreaker notifies it before the breaker is in the new state.
NOTICES = ["open, reads open", "closed, reads closed"] if is_breaker else ["open, reads closed", "closed, reads open"]


def test_two_breakers_of_one_storage_both_notice(client, server):
    """A transition that one breaker has noticed must still be reported to the listeners of the other."""
    breaker = breaker_on(client, reset_timeout=60)
    storage = storage_of(breaker)
    second = pybreaker.CircuitBreaker(state_storage=storage, reset_timeout=60)
    received: list[str] = []

    class Recorder(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            received.append(f"{new_state.name}, reads {cb.state.name}")

    second.add_listener(Recorder())
    for each in (breaker, second):
        wait_for(lambda each=each: each.call(up) and view_of(breaker).is_trusted, "a trusted view")
    with contextlib.closing(server.client()) as elsewhere:
        other = breaker_on(elsewhere, max_staleness=0)
        other.open()
        for each in (breaker, second):
            seconds_until(each, "open")
            with pytest.raises(pybreaker.CircuitBreakerError):
                each.call(up)
        other.close()
        seconds_until(breaker, "closed")
        for _ in range(3):
            assert breaker.call(up) == "answer"
    assert second.call(up) == "answer"
    assert received == NOTICES


def test_refused_subscription_is_retried_later(client, monkeypatch, server, caplog):
    """An administrator may restore rights that were withdrawn."""
    monkeypatch.setattr(listener_module, "REFUSED_RETRY_DELAY_S", 0.1)
    administrate(server, "~*", "+@all", "resetchannels")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = breaker_on(limited)
        breaker.call(up)
        wait_for(lambda: messages_of(caplog, server, NAMESPACE), "the refusal")
        administrate(server, "~*", "+@all", "&*")
        settled(breaker)


def test_outdated_state_of_a_waiting_reader_causes_no_extra_notification(client, server):
    """A health check reads "open" and waits for a lock.  Then the circuit closes.

    A long call holds the breaker's lock.  In our breaker another thread follows the circuit meanwhile.
    """
    received: list[str] = []

    class Recorder(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            received.append(new_state.name)
            assert len(received) < 50, "endless notifications"
            _ = cb.state

    breaker = settled(breaker_on(client, reset_timeout=60))
    breaker.add_listener(Recorder())
    has_read = threading.Event()
    storage = storage_of(breaker)
    owner = follower_of(breaker) if settles_calls(breaker) else breaker

    class ReadSignal:
        """Lock that stands between the health check and its breaker, and shows that the state was read."""

        def __init__(self) -> None:
            self.lock = lock_of(owner)

        def __enter__(self) -> None:
            if threading.current_thread().name == "health":
                has_read.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    health = threading.Thread(target=lambda: breaker.state, name="health")
    signal_lock = ReadSignal()

    def long_call() -> None:
        # pybreaker holds the breaker's lock already, and may hold it twice.
        with contextlib.closing(server.client()) as elsewhere, signal_lock.lock:
            other = breaker_on(elsewhere, max_staleness=0)
            other.open()
            seconds_until(breaker, "open")
            health.start()
            assert has_read.wait(5)
            other.close()
            seconds_until(breaker, "closed")
            for _ in range(3):
                storage.reset_counter()

    set_lock(owner, signal_lock)
    breaker.call(long_call)
    health.join(5)
    for _ in range(10):
        assert breaker.call(up) == "answer"
    assert set(received) <= {"open", "closed"}
    assert len(received) <= 4


def test_return_from_an_outage_notifies_listeners_of_both_changes(killable_server):
    """The local circuit was open, the shared one stayed closed.

    A listener that reads the state is notified once of each.
    """
    received: list[str] = []

    class Recorder(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            received.append(f"{new_state.name}, reads {cb.state.name}")

    with contextlib.closing(killable_server.client(**ONCE, socket_timeout=0.1)) as client:
        breaker = settled(breaker_on(client, fallback_circuit_state="open", reset_timeout=60, timeout=2.0))
        breaker.add_listener(Recorder())
        os.kill(killable_server.pid, signal.SIGSTOP)
        wait_for(lambda: breaker.current_state == "open", "the local circuit")
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        os.kill(killable_server.pid, signal.SIGCONT)
        wait_for(lambda: breaker.current_state == "closed", "the shared circuit", within=20)
        settled(breaker)
    assert received == NOTICES
