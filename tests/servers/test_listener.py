"""One thread and one line for each server: when it begins, what it hears, what it costs, when it ends."""

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
from pathlib import Path
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
from pybreaker_redis._replica import listener as listener_module
from pybreaker_redis._replica import subscription
from pybreaker_redis._replica.listener import listener_for
from pybreaker_redis._replica.view import View
from pybreaker_redis._servers import table
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import (
    NAMESPACE,
    PATIENT,
    PUSH,
    ROUND_TRIP,
    Down,
    breaker_on,
    fails,
    seconds_until,
    settled,
    up,
)
from tests.support.clients import PROTOCOLS
from tests.support.inspect import lines, listeners, reset_in_child, view_of
from tests.support.servers import ONCE, counted
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens", "patient")


# -- when it begins ----------------------------------------------------------------------------------------------------


def test_nothing_starts_before_the_first_guarded_call(server, client):
    """Modules that make breakers are imported in masters; health checks look at breakers in all kinds of processes."""
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
    """A worker that starts while the circuit is open gets no other for a while, and needs the view most."""
    breaker = breaker_on(client)
    breaker.open()

    def needs_nobody() -> bool:
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        return bool(view_of(breaker).is_trusted)

    wait_for(needs_nobody, "rejections that ask nothing")


@pytest.mark.parametrize("words", [{"max_staleness": 0}])
def test_who_always_asks_needs_no_thread(client, words):
    """``max_staleness=0`` starts none."""
    breaker_on(client, **words).call(up)
    assert listeners() == []


# -- one for all -------------------------------------------------------------------------------------------------------


def test_1000_circuits_of_as_many_clients_take_one_thread_one_connection_one_batch(server, client, report):
    """The cost of listening does not grow with the number of circuits, but for what is read of each that is in use."""
    clients = [server.client() for _ in range(10)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    # Long beats: under a tracer, as for coverage, it takes most of a second to read 1000 circuits.
    beat = 2.0
    breakers = [breaker_on(clients[number % 10], f"circuit{number}", max_staleness=2 * beat) for number in range(1000)]
    for breaker in breakers:
        breaker.call(up)
    wait_for(lambda: all(view_of(breaker).is_subscribed for breaker in breakers), "all are heard", within=30)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listeners()) == 1
    wait_for(lambda: len(lines(client)) == (1 if PROTOCOLS[0] == 3 else 2), "one line")

    def use_all(seconds: float) -> dict[str, int]:
        with counted(client) as asked:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for breaker in breakers:
                    breaker.call(up)
        return asked

    # The first beats find circuits that were first used at different times.
    wait_for(lambda: "evalsha" not in use_all(beat * 1.1), "all are believed", within=60)
    beats = 2
    asked = use_all(beats * beat)
    # Of tens of thousands of calls; a beat that a busy machine delays costs each circuit one.
    assert asked.get("evalsha", 0) < 100, asked
    # A script asks for the time once, too.
    assert asked["time"] - asked.get("evalsha", 0) <= beats + 2, "one batch for each beat"
    # Two commands for each circuit and three for all of them.
    assert sum(asked.values()) <= (beats + 2) * (2 * 1000 + 3)
    report(f"1000 circuits in one process: {(after - before) / 1000 / 1024:.1f} KiB each, breakers included")
    for one in clients:
        one.close()


def test_circuit_that_needs_shorter_beats_gets_them(client):
    """It need not wait for a beat that was planned for others."""
    settled(breaker_on(client, "slow", max_staleness=60))
    breaker = settled(breaker_on(client, max_staleness=0.5))
    wait_for(lambda: breaker.call(up) and view_of(breaker).fast_path.quiet_admission, "believed")
    with counted(client) as asked:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            breaker.call(up)
    # Its own beats, of which each asks for the time, and so does a script.
    assert asked.get("time", 0) - asked.get("evalsha", 0) >= 4, asked


def test_idle_circuits_are_not_polled(client):
    """What nobody uses costs nobody anything."""
    breaker = settled(breaker_on(client, max_staleness=0.2))
    view = view_of(breaker)
    wait_for(lambda: not view.is_trusted and not view.fast_path.was_used, "nobody uses it")
    with counted(client) as asked:
        wait_for(
            lambda: client.info("commandstats").get("cmdstat_time", {"calls": 0})["calls"] >= 6, "the heartbeat goes on"
        )
    # One may have been under way when nobody used it any more.
    assert asked.get("hmget", 0) <= 1, asked


def test_storages_of_one_circuit_in_one_process_both_hear(server, client):
    """Two modules, one namespace: each has a view of its own, and one subscription serves both."""
    one, two = (settled(breaker_on(client, max_staleness=PATIENT)) for _ in range(2))
    with contextlib.closing(server.client()) as elsewhere:
        breaker_on(elsewhere, max_staleness=0).open()
    assert seconds_until(one, "open") < PUSH
    assert seconds_until(two, "open") < PUSH
    assert client.pubsub_numsub(channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0))[0][1] == 1


def test_storages_of_one_circuit_in_one_process_do_not_wait_for_the_push(server, client):
    """What one was answered a moment ago, the same thread need not ask through the other."""
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


def test_databases_do_not_hear_each_other(server, client):
    """Keys are distinct in each database, channels are common to all."""
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


def test_tcp_and_unix_socket_and_password_are_followed(preferred, tmp_path):
    """The line goes where the client goes, as the client's user."""
    with PrivateServer(preferred.binary, port=free_port(), args=["--requirepass", "secret"]) as server:
        for words in ({"port": server.port}, {"unix_socket_path": server.unix_socket}):
            with contextlib.closing(redis.Redis(**words, password="secret", decode_responses=True)) as client:
                breaker = settled(breaker_on(client, max_staleness=PATIENT))
                breaker_on(client, max_staleness=0).open()
                assert seconds_until(breaker, "open") < PUSH
                breaker.close()


# -- noise -------------------------------------------------------------------------------------------------------------


def test_failures_are_published_twice_a_second_at_any_rate(server, client):
    """Counters are never broadcast: 500 listeners would cost the server everything it has."""
    breaker = settled(breaker_on(client, fail_max=10**9, timeout=10))
    with contextlib.closing(server.client()) as elsewhere, elsewhere.pubsub() as ears:
        ears.psubscribe("*")
        ears.get_message(timeout=1)
        began = time.monotonic()
        made = 0
        while time.monotonic() < began + 2.0 or made < 600:
            fails(breaker, 10)
            made += 10
        seconds = time.monotonic() - began
        heard = 0
        while message := ears.get_message(timeout=0.1):
            heard += message["type"] == "pmessage"
    assert breaker.fail_counter > 500
    assert 3 <= heard <= 2 * seconds + 1


def test_success_long_after_a_failure_is_reported_all_the_same(client):
    """Quiet is not a matter of time: failures an hour apart are not consecutive if calls succeeded between them."""
    breaker = settled(breaker_on(client, fail_max=3, max_staleness=0.2))
    for _ in range(6):
        fails(breaker)
        assert breaker.fail_counter == 1
        # The noise is over, nobody has succeeded, and the view has been confirmed since.
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert breaker.current_state == "closed"
            time.sleep(0.01)
        breaker.call(up)
        assert breaker.fail_counter == 0
    settled(breaker)


def test_noise_lasts_though_a_poll_finds_nothing_to_forget(client):
    """The next failure may make none: until the second is over, every success is reported."""
    breaker = settled(breaker_on(client, fail_max=3, max_staleness=0.1))
    began = time.monotonic()
    fails(breaker)
    breaker.call(up)
    while True:
        assert breaker.current_state == "closed"
        quiet = view_of(breaker).fast_path.quiet_admission
        # Looked at last: it may be that nobody was allowed to run for a while.
        if time.monotonic() > began + 0.8:
            break
        assert quiet is None
    settled(breaker)


def test_failure_of_a_stock_worker_is_forgotten_too(client):
    """It counts without making noise; the poll reads the counter."""
    breaker = settled(breaker_on(client, max_staleness=0.2))
    pybreaker.CircuitRedisStorage("closed", client, NAMESPACE).increment_counter()
    wait_for(lambda: breaker.current_state and view_of(breaker).fast_path.quiet_admission is None, "the poll tells")
    breaker.call(up)
    assert breaker.fail_counter == 0


# -- where there is no push --------------------------------------------------------------------------------------------


def administrate(server: PrivateServer, *rights: str) -> None:
    """A user with these rights, and no others."""
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "limited", "reset", "on", "nopass", *rights)


@pytest.mark.parametrize(
    "rights",
    [("~*", "+@all", "-subscribe", "&*"), ("~*", "+@all", "resetchannels")],
    ids=["no SUBSCRIBE", "no channels"],
)
def test_forbidden_channel_reads_through_and_says_so_once(server, client, caplog, rights, protocol):
    """Nothing is believed that could not be heard, and one line says what that costs."""
    administrate(server, *rights)
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breakers = [breaker_on(limited, f"limited{number}") for number in range(3)]
        for breaker in breakers:
            breaker.call(up)
        wait_for(lambda: caplog.messages, "a warning")
        for breaker in breakers:
            breaker.call(up)
            assert not view_of(breaker).is_trusted
        breaker_on(client, "limited0", max_staleness=0).open()
        assert breakers[0].current_state == "open", "it asks"
        with pytest.raises(pybreaker.CircuitBreakerError):
            breakers[0].call(up)
        (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "every look at a circuit is a round trip" in said.message


@pytest.mark.parametrize("rights", [("~*", "&mine:*"), ("~mine:*", "&*")], ids=["its channel", "its keys"])
def test_circuit_that_may_not_be_heard_takes_nothing_from_the_others(server, caplog, rights, protocol):
    """They are heard as before, be they used before it or after."""
    administrate(server, "resetchannels", "+@all", *rights)
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        before = settled(breaker_on(limited, "mine:before"))
        other = breaker_on(limited, "other")
        assert other.call(up) == "answer"
        wait_for(lambda: other.call(up) and caplog.messages, "a warning")
        after = settled(breaker_on(limited, "mine:after"))
        for breaker in (before, after):
            assert settled(breaker).call(up) == "answer"
        assert not view_of(other).is_trusted
        assert len(listeners()) == 1
        (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "permission" in said.message.lower() or "NOPERM" in said.message


def test_user_who_may_not_introduce_himself_or_track_hears_all_the_same(server, client):
    """CLIENT is an administrator's command to some: without it only what is published is heard."""
    administrate(server, "~*", "&*", "+@all", "-client")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = settled(breaker_on(limited, max_staleness=PATIENT))
        breaker_on(client, max_staleness=0).open()
        assert seconds_until(breaker, "open") < PUSH


@pytest.mark.parametrize("commands", [["-hmget"], ["-mget"]], ids=" ".join)
def test_who_may_no_longer_read_goes_by_nothing(server, client, commands):
    """What cannot be confirmed is asked for; what cannot even be asked is decided here."""
    administrate(server, "~*", "&*", "+@all")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = settled(breaker_on(limited, max_staleness=0.2, fallback_circuit_state="open"))
        administrate(server, "~*", "&*", "+@all", *commands)
        assert seconds_until(breaker, "open") < 0.2 + ROUND_TRIP


class Odd(redis.Connection):
    """What a connection class of somebody's own may be like."""

    def __init__(self, *, colour: str, **words: object) -> None:
        raise TypeError("nobody else makes these")


def test_connection_class_that_nobody_else_can_make_reads_through(server, client, caplog):
    """No guess is made about what it needs."""
    breaker = breaker_on(client)
    breaker.call(up)
    client.ping()  # so that it has a connection left
    client.connection_pool.connection_class = Odd
    wait_for(lambda: lines(client), "the first one hears")
    other = breaker_on(client, "odd")
    for _ in range(2):
        other.call(up)
    wait_for(lambda: any("connection" in message for message in caplog.messages), "a warning")
    assert not view_of(other).is_trusted


def test_fakeredis_and_servers_without_scripts_read_through(server):
    """There nobody publishes: every look is exact, and no thread starts."""
    home = fakeredis.FakeServer()
    administrate(server, "~*", "&*", "+@all", "-@scripting")
    with contextlib.closing(server.client(username="limited", password="x")) as scriptless:
        for either in (fakeredis.FakeStrictRedis(server=home), scriptless):
            one, two = breaker_on(either), breaker_on(either)
            one.call(up)
            two.open()
            assert one.current_state == "open"
            assert not view_of(one).is_trusted
    assert listeners() == []
    assert endpoint_of(fakeredis.FakeStrictRedis(server=home)) is None
    assert endpoint_of(object()) is None


def renamed(command: str) -> list[str]:
    """Arguments for a server without this command."""
    return ["--rename-command", command, ""]


@pytest.mark.parametrize("commands", [["HELLO"], ["CLIENT"], ["HELLO", "CLIENT"]], ids=" ".join)
def test_server_without_hello_or_client_is_heard(preferred, commands):
    """Managed servers and proxies leave commands out: one step down, and nothing that is published is lost."""
    arguments = [argument for command in commands for argument in renamed(command)]
    words = {"protocol": 2} if PROTOCOLS[0] == 3 else {}
    with PrivateServer(preferred.binary, args=arguments) as server:
        clients = [server.client(**words) for _ in range(2)]
        breaker = settled(breaker_on(clients[0], max_staleness=PATIENT))
        breaker_on(clients[1], max_staleness=0).open()
        assert seconds_until(breaker, "open") < PUSH
        for client in clients:
            client.close()


def test_server_without_subscribe_reads_through(preferred, caplog):
    """It does not know the command at all."""
    with (
        PrivateServer(preferred.binary, args=renamed("SUBSCRIBE")) as server,
        contextlib.closing(server.client()) as client,
    ):
        breaker = breaker_on(client)
        breaker.call(up)
        wait_for(lambda: caplog.messages, "a warning")
        breaker.call(up)
        assert not view_of(breaker).is_trusted


def test_client_that_leads_to_no_single_place_reads_through_and_says_so_once(client, caplog):
    """A cluster's, or a wrapper of somebody's own."""

    class Wrapper:
        def evalsha(self, *arguments: object) -> object:
            return client.evalsha(*arguments)

        def eval(self, *arguments: object) -> object:
            return client.eval(*arguments)

    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = breaker_on(Wrapper())
    for _ in range(3):
        breaker.call(up)
    (said,) = caplog.messages
    assert "Wrapper; every look at the circuit is a round trip" in said
    breaker_on(client, max_staleness=0).open()
    assert breaker.current_state == "open"


def test_garbage_on_the_channel_is_ignored(client):
    """Anybody may publish there."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT))
    channel = channel_of(circuit_keys(NAMESPACE, needs_one_slot=False), 0)
    for payload in (b"", b"open", b"1 2 open", b"\xff" * 100, b"1 -1 open   0 0"):
        client.publish(channel, payload)
    breaker_on(client, max_staleness=0).open()
    assert seconds_until(breaker, "open") < PUSH
    assert len(listeners()) == 1


def test_redis_that_is_there_later_is_heard_later(killable_server):
    """The first calls of a process may find nobody; the listener goes on trying."""
    killable_server.stop()
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = breaker_on(client)
        assert breaker.call(up) == "answer"
        assert len(listeners()) == 1
        killable_server.start()
        wait_for(lambda: view_of(breaker).is_subscribed, "it hears", within=20)
        settled(breaker)


@pytest.mark.parametrize("travel", [freezegun.freeze_time, time_machine.travel], ids=["freezegun", "time-machine"])
def test_stopped_clock_stops_no_listener(client, server, travel):
    """Tests that stop the time, or move it by years, hear what happens all the same, and so do those after them."""
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
        with counted(client) as asked:
            until = perf_counter() + 2.0
            while perf_counter() < until:
                breaker.call(up)
        # A script asks for the time once, and so does a beat.
        assert asked.get("time", 0) - asked.get("evalsha", 0) >= 4, "the beats go on"


# -- uWSGI, as far as it can be told without it ------------------------------------------------------------------------


class UWSGI:
    """What uWSGI's module says to its applications."""

    def __init__(self, worker: int, **options: bytes) -> None:
        self.opt = {name.replace("_", "-"): value for name, value in options.items()}
        self.worker_id = lambda: worker
        self.mule_id = lambda: 0


def test_child_that_was_forked_behind_pythons_back_begins_anew(client):
    """UWSGI calls no hooks: then the process id tells."""
    mine = listener_module.ListenerTable()
    server = server_for(client)
    inherited = mine.listener_of(server)
    closed: list[bool] = []
    inherited.session = SimpleNamespace(connection=SimpleNamespace(close=lambda: closed.append(True)))
    assert mine.listener_of(server) is inherited
    mine._pid = -1
    assert mine.listener_of(server) is not inherited
    assert closed == [True]
    again = mine.listener_of(server)
    mine.after_fork()
    assert closed == [True], "one that has not begun has nothing to close"
    assert mine.listener_of(server) is not again


def test_ear_that_was_forked_behind_pythons_back_begins_anew(client):
    """The same for each circuit: nobody listens for it here."""
    breaker = settled(breaker_on(client))
    tenancy = breaker._state_storage._core
    ear = tenancy.shared._subscription
    ear._pid = os.getppid()
    tenancy.prepare_call(has_several_breakers=False)
    assert ear._pid == os.getpid()
    assert ear._listener.is_running
    settled(breaker)


def test_nobody_listens_to_what_nobody_has_asked_for(client):
    """Then it is not known where it lies."""
    breaker = breaker_on(client)
    shared = breaker._state_storage._core.shared
    shared.subscribe_to_changes(None)
    assert listeners() == []
    assert shared.push is None


def test_no_thread_starts_in_a_process_that_is_ending(client, monkeypatch):
    """Before Python 3.12 it would be waited for forever."""
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    breaker = breaker_on(client)
    assert breaker.call(up) == "answer"
    assert listeners() == []


def test_no_thread_starts_in_the_master_of_uwsgi(client, monkeypatch, caplog):
    """It would deadlock the workers; nobody has to be told, because they listen for themselves."""
    monkeypatch.setitem(sys.modules, "uwsgi", UWSGI(0, enable_threads=b"true"))
    breaker = breaker_on(client)
    for _ in range(2):
        breaker.call(up)
    assert listeners() == []
    assert caplog.messages == []


@pytest.mark.parametrize("options", [{"enable_threads": b"true"}, {"threads": b"2"}, {}], ids=" ".join)
def test_worker_of_uwsgi_listens_if_its_threads_run(client, monkeypatch, caplog, options):
    """Where they do not, one line says what that costs."""
    monkeypatch.setitem(sys.modules, "uwsgi", UWSGI(1, **options))
    for number in range(2):
        breaker = breaker_on(client, f"circuit{number}")
        for _ in range(2):
            breaker.call(up)
    assert len(listeners()) == bool(options)
    assert len(caplog.messages) == (not options)
    if not options:
        assert "--enable-threads" in caplog.text


def test_process_that_may_have_no_more_threads_reads_through(client, monkeypatch, caplog):
    """RLIMIT_NPROC, a container's limit, or an interpreter that is about to end."""

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    breaker = breaker_on(client)
    for _ in range(2):
        assert breaker.call(up) == "answer"
    (said,) = caplog.messages
    assert "can't start new thread" in said


# -- when it ends ------------------------------------------------------------------------------------------------------


def test_thread_and_connection_end_with_the_last_storage(client):
    """Nothing is kept alive by listening for it."""
    breakers = [settled(breaker_on(client, f"circuit{number}")) for number in range(2)]
    channels = [channel_of(circuit_keys(f"circuit{number}", needs_one_slot=False), 0) for number in range(2)]
    del breakers[0]
    gc.collect()
    wait_for(lambda: dict(client.pubsub_numsub(*channels)) == {channels[0].encode(): 0, channels[1].encode(): 1}, "one")
    breakers.clear()
    gc.collect()
    wait_for(lambda: not listeners() and not lines(client), "nobody listens")
    settled(breaker_on(client))
    assert len(listeners()) == 1


def test_nothing_is_kept_of_circuits_that_are_gone(client):
    """A process that has a circuit for each of its users, or makes a client for each request, does not grow."""
    kept = settled(breaker_on(client, "kept"))
    listener = view_of_listener(kept)
    for number in range(60):
        breaker_on(client, f"circuit{number}").call(up)

    def most_are_forgotten() -> bool:
        gc.collect()
        breaker_on(client, "last").call(up)
        return len(listener.subscriber_table._of_channel) < 30

    # The listener may just be reading some of them.
    wait_for(most_are_forgotten, "nothing is kept")
    for number in range(5):
        user = redis.Redis(unix_socket_path=f"/nowhere/{number}")
        listener_for(server_for(user)).add_view(View(1.0), ("",) * 5, "channel")
    gc.collect()
    wait_for(
        lambda: gc.collect() is not None and len(listener_module._listeners._by_server) == 1, "nobody listens elsewhere"
    )


def view_of_listener(breaker):
    """Who keeps the breaker's view true."""
    return breaker._state_storage._core.shared._subscription._listener


# -- when it ended before its time -------------------------------------------------------------------------------------


def test_circuit_that_left_and_is_back_is_heard_again(client):
    """A master that was demoted for a moment: the same line, and the same thread, which had been told to forget it."""
    breaker = settled(breaker_on(client))
    for _ in range(3):
        breaker._state_storage._core.shared.forget_location()
        settled(breaker)
    assert len(listeners()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_died_is_replaced(client, monkeypatch):
    """Whatever it died of; until then what it heard is believed no longer than it may be."""
    breaker = settled(breaker_on(client))
    (died,) = listeners()
    with monkeypatch.context() as patched:
        patched.setattr(listener_module.Listener, "_unsubscribe_views", lambda self: 1 / 0)
        for line in lines(client):
            client.client_kill_filter(_id=line["id"])
        wait_for(lambda: not died.is_alive(), "it dies")
    # As long after it began as a thread usually dies.
    breaker._state_storage._core.shared._subscription._next_start_at = 0.0
    wait_for(lambda: breaker.call(up) and listeners(), "another one")
    settled(breaker)
    assert len(listeners()) == 1


def test_thread_that_could_not_be_started_is_tried_again(client, monkeypatch, caplog):
    """The limit of processes may have been reached for a moment."""
    monkeypatch.setattr(subscription, "REFUSED_RETRY_DELAY_S", 0.1)

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        breaker = breaker_on(client)
        assert breaker.call(up) == "answer"
        assert caplog.messages
    settled(breaker)


@pytest.mark.parametrize("trouble", ["fakeredis", "no thread", "a stub of uwsgi"])
def test_whatever_keeps_it_from_listening_reaches_no_call(client, monkeypatch, trouble):
    """Nor does a log that cannot be written, or a module in the place of uWSGI's."""

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
    """A daemon thread, whatever it waits for, holds up nobody; where none can be started any more, calls ask."""
    root = Path(__file__).parents[2]
    began = time.monotonic()
    done = subprocess.run(
        # redis-py 3 compares versions by means of the past.
        [
            *(sys.executable, "-W", "error", "-W", "ignore:distutils Version:DeprecationWarning"),
            *("-c", PROGRAM.replace("{what}", what), server.unix_socket),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (done.returncode, done.stdout) == (0, "answer\n" * answers), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("first", ["a failure", "by hand"])
def test_failures_count_somewhere_while_redis_takes_no_writes(killable_server, first):
    """Reads go on, so polls agree: all the same nobody is admitted by Redis whose failure cannot be told there."""
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client, fail_max=3, reset_timeout=60))
        client.config_set("maxmemory", 1)
        if first == "by hand":
            breaker._state_storage.opened_at = datetime.now(timezone.utc)
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
    assert reached <= 3 + 1, "the first one may have been admitted by Redis"


@contextlib.contextmanager
def held_elsewhere(lock: Any) -> Iterator[None]:
    """Another thread has this lock."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_child_does_not_wait_for_locks_that_threads_of_its_parent_hold(client):
    """During an outage threads take the guard's lock and that of the process's own circuit, at every call."""
    breaker = breaker_on(client)
    storage = breaker._state_storage
    breaker.call(up)
    guards = (storage._core._faults, storage._core.server.availability)
    for item in (storage._core.local, storage._core.server, *guards, view_of(breaker), table._servers):
        with held_elsewhere(item._lock):
            reset_in_child(item)
            assert item._lock.acquire(timeout=1)
            item._lock.release()


# -- many threads ------------------------------------------------------------------------------------------------------


def test_threads_that_call_while_others_move_the_circuit_agree_with_it(server, client):
    """No thread goes by an admission of an earlier spell, and none hears twice of one transition."""
    told: Counter[str] = Counter()

    class Ears(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            told[new_state.name] += 1

    breaker = settled(breaker_on(client, reset_timeout=60))
    breaker.add_listener(Ears())
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
                    wait_for(lambda state=state: breaker._state.name == state, f"noticed {state}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not errors
    assert told == {"open": 20, "closed": 20}


def test_two_breakers_of_one_storage_both_notice(client, server):
    """What one has noticed, the other still has to be told."""
    breaker = breaker_on(client, reset_timeout=60)
    storage = breaker._state_storage
    second = pybreaker.CircuitBreaker(state_storage=storage, reset_timeout=60)
    heard: list[str] = []

    class Ears(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            heard.append(f"{new_state.name}, reads {cb.state.name}")

    second.add_listener(Ears())
    for each in (breaker, second):
        wait_for(lambda each=each: each.call(up) and view_of(breaker).is_trusted, "believed")
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
    assert heard == ["open, reads closed", "closed, reads open"]


def test_refused_line_is_tried_again_later(client, monkeypatch, server, caplog):
    """Rights that were withdrawn may come back."""
    monkeypatch.setattr(listener_module, "REFUSED_RETRY_DELAY_S", 0.1)
    administrate(server, "~*", "+@all", "resetchannels")
    with contextlib.closing(server.client(username="limited", password="x")) as limited:
        breaker = breaker_on(limited)
        breaker.call(up)
        wait_for(lambda: caplog.messages, "refused")
        administrate(server, "~*", "+@all", "&*")
        settled(breaker)


def test_state_that_was_read_before_and_taken_on_later_confuses_nobody(client, server):
    """A health check is told "open" and waits for the lock of the breaker, which a long call holds; then it closes."""
    heard: list[str] = []

    class Ears(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            heard.append(new_state.name)
            assert len(heard) < 50, "told for ever"
            _ = cb.state

    breaker = settled(breaker_on(client, reset_timeout=60))
    breaker.add_listener(Ears())
    looked = threading.Event()
    storage = breaker._state_storage

    class Looks:
        """Stands between the health check and its breaker: stops when the state was read."""

        def __init__(self) -> None:
            self.lock = breaker._lock

        def __enter__(self) -> None:
            if threading.current_thread().name == "health":
                looked.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    health = threading.Thread(target=lambda: breaker.state, name="health")

    def long_call() -> None:
        with contextlib.closing(server.client()) as elsewhere:
            other = breaker_on(elsewhere, max_staleness=0)
            other.open()
            seconds_until(breaker, "open")
            health.start()
            assert looked.wait(5)
            other.close()
            seconds_until(breaker, "closed")
            for _ in range(3):
                storage.reset_counter()

    breaker._lock = Looks()
    breaker.call(long_call)
    health.join(5)
    for _ in range(10):
        assert breaker.call(up) == "answer"
    assert set(heard) <= {"open", "closed"}
    assert len(heard) <= 4


def test_return_from_an_outage_is_noticed_though_nothing_has_moved(killable_server):
    """Its own circuit was open, the shared one was closed all the while: a listener that looks is told once of each."""
    heard: list[str] = []

    class Ears(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            heard.append(f"{new_state.name}, reads {cb.state.name}")

    with contextlib.closing(killable_server.client(**ONCE, socket_timeout=0.1)) as client:
        breaker = settled(breaker_on(client, fallback_circuit_state="open", reset_timeout=60, timeout=2.0))
        breaker.add_listener(Ears())
        os.kill(killable_server.pid, signal.SIGSTOP)
        wait_for(lambda: breaker.current_state == "open", "its own circuit")
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        os.kill(killable_server.pid, signal.SIGCONT)
        wait_for(lambda: breaker.current_state == "closed", "the shared circuit", within=20)
        settled(breaker)
    assert heard == ["open, reads closed", "closed, reads open"]
