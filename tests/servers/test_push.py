"""Pushes: a push causes a read and changes no record, so users with the right to publish cannot harm, and its cost.

The servers are real. The forger is a user of the server without rights for any key.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitMemoryStorage
from pybreaker_redis._model.circuit import OPEN, Circuit
from pybreaker_redis._redis.keys import channel_of, circuit_keys
from pybreaker_redis._replica import armed
from pybreaker_redis._replica.connection import Push
from pybreaker_redis._replica.listener import Listener
from pybreaker_redis._replica.session import REREAD_BURST, REREAD_INTERVAL_S, Session
from pybreaker_redis._replica.subscribers import SubscriberTable
from pybreaker_redis._replica.view import SUSPENSION_INTERVAL_MIN_S, View
from pybreaker_redis._runtime import logger
from pybreaker_redis._runtime.clock import utc_from_ms
from pybreaker_redis.errors import UnusableReplyError
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import NAMESPACE, breaker_on, fails, settled, up
from tests.support.inspect import (
    changed_channels,
    delay_reread,
    forget_refusal,
    listener_connections,
    listener_of,
    listeners,
    poll_once,
    receive_push,
    record_pushes,
    reread_changed,
    storage_of,
    subscribe_session,
    view_of,
)
from tests.support.logs import messages_of
from tests.support.outages import health_of
from tests.support.servers import counted
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

#: A staleness so long that no beat notices a change within a test, seconds.
PUSH_ONLY_STALENESS_S = 60.0

#: Longest time for a push and a read, seconds, on a machine that does other things, too.
PUSH_MAX_S = 2.0

STALENESS = 1.0

KEYS = circuit_keys(NAMESPACE, needs_one_slot=False)
CHANNEL = channel_of(KEYS, 0)

Publish = Callable[..., None]


@pytest.fixture
def forge(server: PrivateServer) -> Iterator[Publish]:
    """Yield a function that publishes on the circuit's channel as a user without any other right."""
    with contextlib.closing(server.client()) as administrator:
        rights = ("on", ">e", "resetkeys", "allchannels", "-@all", "+publish", "+auth", "+hello")
        administrator.execute_command("ACL", "SETUSER", "forger", "reset", *rights)
    with contextlib.closing(server.client(username="forger", password="e")) as forger:
        yield lambda payload, channel=CHANNEL: forger.execute_command("PUBLISH", channel, payload)


@pytest.fixture
def other(server: PrivateServer) -> Iterator[pybreaker.CircuitBreaker]:
    """Yield a breaker of another process on the same circuit, without a cache."""
    with contextlib.closing(server.client()) as client:
        yield breaker_on(client, max_staleness=0, reset_timeout=60)


def stored(client: redis.Redis) -> dict[bytes, Any]:
    """Return everything that Redis stores."""
    return {
        key: client.hgetall(key) if client.type(key) == b"hash" else client.get(key) for key in sorted(client.keys("*"))
    }


def now_ms() -> int:
    """Return the time as the forger estimates it for the server, in milliseconds."""
    return int(time.time() * 1000)


FORGED = {
    "half-open for a day": lambda now: f"{now} 7 half-open {now} abcd {now + 86_000_000} 0 86400000",
    "open, last generation": lambda now: f"{now} 999999999999 open {now}  0 0 0",
    "far future": lambda now: "999999999999999 7 open 999999999999999  0 0 0",
    "far past": lambda now: "0 7 open 0  0 0 0",
    "next generation": lambda now: f"{now} 1 open {now}  0 0 0",
    "noise": lambda now: f"{now} 0 closed   0 {now + 60_000} 0",
    "token": lambda now: f"{now} 0 closed  abcd {now + 86_000_000} 0 0",
    "not UTF-8": lambda now: b"\xff\xfe 7 open \xff  0 0 0",
    "huge": lambda now: b"1" * 5_000_000,
    "empty": lambda now: b"",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_record_changes_no_circuit_and_nothing_in_redis(server, client, protocol, forge, name):
    """Calls continue, the record stays as it is, and so does the record that would be restored after a loss."""
    breaker = settled(breaker_on(client, max_staleness=STALENESS, reset_timeout=60))
    known, before = view_of(breaker).cached, stored(client)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        forge(FORGED[name](now_ms()))
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"
        assert storage_of(breaker).opened_at is None
    assert stored(client) == before
    assert view_of(breaker).cached == known
    client.flushall()
    wait_for(lambda: breaker.call(up) and client.exists(KEYS[0]), "the restored circuit")
    assert stored(client) == before
    settled(breaker)
    assert len(listeners()) == 1


def test_forged_record_delays_no_transition(server, client, protocol, forge, other):
    """A generation that no server answered delays neither a close nor a probe."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S, reset_timeout=60))
    for verb, state in (("open", "open"), ("close", "closed")) * 3:
        for name in ("open, last generation", "half-open for a day", "far future"):
            forge(FORGED[name](now_ms()))
        getattr(other, verb)()
        assert wait_for(lambda state=state: breaker.current_state == state, state) < PUSH_MAX_S
    assert int(client.hget(KEYS[4], "generation")) == 6


@pytest.mark.parametrize("channel", ["__redis__:invalidate", f"{NAMESPACE}:pybreaker:circuit", f"x{CHANNEL}"])
def test_message_on_a_similar_channel_is_ignored(client, protocol, forge, channel, monkeypatch):
    """Invalidations come only from the server, and each circuit has one channel."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S))
    received = record_pushes(monkeypatch, listener_of(breaker).session.connection)
    for payload in (KEYS[0], FORGED["next generation"](now_ms())):
        forge(payload, channel=channel)
    forge(FORGED["next generation"](now_ms()))
    wait_for(lambda: [push for push in received if push[0] == b"message"], "the last message")
    assert [push[0] for push in received if push[0] != b"pong"] == [b"message"]
    assert breaker.call(up) == "answer"


def test_flood_of_forged_records_costs_one_read_each_10_ms_and_no_log_line(server, client, protocol, forge, caplog):
    """The content and the number of published messages make no difference."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    breaker = settled(breaker_on(client, max_staleness=STALENESS))
    caplog.clear()
    with counted(client) as commands:
        began, sent = time.monotonic(), 0
        while time.monotonic() < began + 1.0:
            forge(f"{now_ms()} {sent} open {now_ms()}  0 0 0")
            sent += 1
        assert breaker.call(up) == "answer"
        seconds = time.monotonic() - began
    reads = commands["hmget"] - commands.get("evalsha", 0)
    assert sent > 200
    assert 1 <= reads <= seconds / REREAD_INTERVAL_S + REREAD_BURST + 2 * seconds / STALENESS + 2, commands
    # The call may have begun during a read. An answer that a push has overtaken is not quiet.
    assert commands.get("evalsha", 0) <= 2
    assert messages_of(caplog, server, NAMESPACE) == []


def test_transition_among_forged_noise_marks_is_noticed_at_once(client, protocol, forge, other):
    """A noise mark does not prevent the read of any other change."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S, reset_timeout=60))
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            for generation in range(7):
                for state in ("open", "closed"):
                    forge(f"{now_ms()} {generation} {state} {now_ms()}  0 {now_ms() + 2000} 0")

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for verb, state in (("open", "open"), ("close", "closed")) * 3:
            getattr(other, verb)()
            assert wait_for(lambda state=state: breaker.current_state == state, state) < PUSH_MAX_S
    finally:
        stop.set()
        thread.join()


def test_forged_noise_costs_one_report_at_most(client, protocol, forge):
    """The answer to that report shows that there was no failure."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S))
    reports = []
    for _ in range(2):
        with counted(client) as commands:
            forge(FORGED["noise"](now_ms()))
            wait_for(lambda: view_of(breaker).fast_path.quiet_admission is None, "the forged noise mark")
            for _ in range(100):
                breaker.call(up)
        reports.append(commands["evalsha"])
    # The first mark may arrive during the poll of the subscription, which then confirms no quiet.
    assert reports in ([1, 1], [2, 1])


def test_transitions_of_another_process_cost_calls_ten_round_trips_a_second_at_most(client, protocol, other):
    """The listener reads the transition. Only calls that begin during one of ten reads a second query Redis."""
    breaker = settled(breaker_on(client, max_staleness=PUSH_ONLY_STALENESS_S, reset_timeout=60))
    began, own = time.monotonic(), 0
    for verb, state in (("open", "open"), ("close", "closed")) * 5:
        with counted(client) as commands:
            getattr(other, verb)()
            scripts = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            wait_for(lambda state=state: breaker.current_state == state, state)
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                breaker.call(up)
        own += commands["evalsha"] - scripts  # All other scripts belong to the breaker that makes the transitions.
    assert own <= 1 + (time.monotonic() - began) / SUSPENSION_INTERVAL_MIN_S


def test_record_that_the_listener_has_read_is_restored(client, protocol, other):
    """No call of this process has read the record since the trip. A record that the listener read is trusted, too."""
    breaker = settled(breaker_on(client, max_staleness=STALENESS, reset_timeout=60))
    other.open()
    wait_for(lambda: breaker.current_state == "open", "open")
    opened = stored(client)
    client.flushall()
    wait_for(lambda: breaker.current_state == "open" and client.exists(KEYS[0]), "the restored circuit")
    assert stored(client) == opened


class ScriptedConnection:
    """Connection with answers that a test writes."""

    is_tracking = False

    def __init__(self, receive: Callable[[Push], None]) -> None:
        self.receive = receive
        self.answers: list[Any] = []
        self.pushes: list[Push] = []

    def query(self, commands: list[Any]) -> list[Any]:
        """Return the scripted answers, after the pushes that arrive meanwhile."""
        for push in self.pushes:
            self.receive(push)
        return self.answers


def view_after_poll(*pushes: Push) -> tuple[View, Session]:
    """Return a view of an open circuit, after a poll with a claimed probe between its commands."""
    view, subscriber_table = View(PUSH_ONLY_STALENESS_S), SubscriberTable()
    subscriber_table.add_subscriber(view, KEYS, CHANNEL)
    session = Session(ScriptedConnection, subscriber_table, set())  # type: ignore[arg-type]
    subscribe_session(session, KEYS, CHANNEL)
    line: Any = session.connection
    view.mark_subscribed()
    view.store_answer(view.begin_read(), Circuit(OPEN, opened_at_ms=5000, generation=1), 6000)
    assert view.is_trusted
    line.answers = [(7, 0), [b"0"], [b"open", b"5"], [b"2", b"half-open", b"5000", b"a0", b"9000", b"0", b"2000"]]
    line.pushes = [*pushes]
    poll_once(session)
    return view, session


def test_read_with_a_script_in_between_is_repeated_and_changes_nothing():
    """The commands of a batch are not atomic, and a push shows that the circuit changed in between."""
    view, session = view_after_poll(Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"]))
    assert view.cached == Circuit(OPEN, opened_at_ms=5000, generation=1)
    assert changed_channels(session) == {CHANNEL}
    line: Any = session.connection
    line.answers[2] = [b"half-open", b"5"]
    line.pushes = []
    reread_changed(session)
    known = view.cached
    assert known is not None
    assert (known.generation, known.state) == (2, "half-open")
    assert view.is_trusted
    assert changed_channels(session) == set()


def test_push_suspends_trust_until_the_next_read_ten_times_a_second():
    """A call that begins after a push must not use the earlier record. A flood of pushes costs calls little."""
    push = Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"])
    view, session = view_after_poll()
    line: Any = session.connection
    line.answers[2:] = [[b"open", b"5"], [b"1", b"open", b"5000", b"", b"0", b"0", b"0"]]
    poll_once(session)
    assert view.is_trusted
    trusted = []
    for _ in range(3):
        receive_push(session, push)
        trusted.append(view.is_trusted)
        reread_changed(session)
        assert view.is_trusted
    assert trusted == [False, True, True]
    time.sleep(SUSPENSION_INTERVAL_MIN_S)
    delay_reread(session, 60)
    receive_push(session, push)
    assert view.is_trusted, "the next read is not due yet"


@pytest.mark.parametrize("time_read", [[b"9999999999999", b"0"], [b"-7", b"0"], [b"7"], None])
def test_invalid_server_time_ends_the_connection_and_changes_nothing(time_read):
    """The listener checks what it reads like the reply of a script."""
    view, session = view_after_poll(Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"]))
    known, bounds = view.cached, view.clock_offset.known_bounds
    line: Any = session.connection
    line.answers = [time_read, [b"0"], [b"half-open", b"5"], line.answers[3]]
    with pytest.raises(UnusableReplyError, match="TIME"):
        reread_changed(session)
    assert (view.cached, view.clock_offset.known_bounds) == (known, bounds)


def test_inconsistent_read_is_left_to_the_next_call():
    """The record of a foreign writer has to be adopted, which takes a script."""
    view, _ = view_after_poll()
    assert not view.is_trusted


@pytest.mark.parametrize(
    ("key", "pushed", "is_read"),
    [
        (KEYS[4], b"7000 1 closed   0 9000 0", False),
        (KEYS[4], b"7000 2 open 7000  0 0 0", True),
        (KEYS[0], b"7000 1 closed   0 9000 0", True),
        (KEYS[3], b"7000 1 closed   0 9000 0", True),
    ],
    ids=["noise", "transition", "foreign state with noise", "foreign time with noise"],
)
def test_noise_mark_prevents_only_the_read_of_its_own_change(key, pushed, is_read):
    """Failures cost listeners no read. A noise mark, forged or not, hides no foreign write."""
    view, session = view_after_poll()
    view.store_answer(view.begin_read(), Circuit(generation=1), 6500)
    receive_push(session, Push([b"invalidate", [key.encode(), b"unknown"]]))
    receive_push(session, Push([b"message", CHANNEL.encode(), pushed]))
    assert bool(changed_channels(session, certainly=False)) == is_read


def test_idle_circuit_is_not_read_after_a_push(client, other, monkeypatch):
    """A transition costs an idle process only the push."""
    # An armed circuit is not idle: the next call relies on the view.
    monkeypatch.setattr(armed, "ARMED_MAX_S", 0.1)
    breaker = settled(breaker_on(client, max_staleness=0.2))
    wait_for(lambda: not view_of(breaker).is_trusted and not view_of(breaker).fast_path.was_used, "idle")
    with counted(client) as commands:
        other.open()
        other.close()
        time.sleep(0.1)
    assert commands.get("hmget", 0) == commands["evalsha"], "only scripts have read the hash"


def test_idle_process_notices_that_an_open_circuit_has_closed(client, other):
    """An idle process follows a circuit that it knows as open: in an outage it would reject calls for no reason."""
    breaker = settled(breaker_on(client, max_staleness=0.2))
    other.open()
    wait_for(lambda: breaker.current_state == "open", "the circuit has opened")
    wait_for(lambda: not view_of(breaker).is_trusted and not view_of(breaker).fast_path.was_used, "idle")
    other.close()
    wait_for(lambda: health_of(breaker).state == "closed", "the circuit has closed")


@pytest.mark.full
def test_push_costs_the_same_with_many_circuits(client):
    """The CPU time of a wake-up of the listener depends on the number of changes only."""
    cost = {}
    for count in (50, 1500):
        breakers = [breaker_on(client, f"many{count}-{number}", fail_max=10**6) for number in range(count)]
        for breaker in breakers:
            breaker.call(up)
        wait_for(
            lambda breakers=breakers: all(view_of(breaker).is_subscribed for breaker in breakers),
            "the subscription to every circuit",
        )
        durations = []
        for begin in range(3):
            began = time.process_time()
            for breaker in breakers[begin * 15 :][:15]:
                fails(breaker)
                time.sleep(0.002)
            durations.append(time.process_time() - began)
        cost[count] = min(durations)
    # Twice a second, a beat reads each circuit once.
    assert cost[1500] < 3 * cost[50], cost


def test_wake_up_gets_added_views_and_abandoned_channels():
    """Views that were added and removed between two wake-ups leave no trace."""
    subscriber_table = SubscriberTable()
    one, two, three = View(1.0), View(1.0), View(1.0)
    subscriber_table.add_subscriber(one, KEYS, "a")
    with subscriber_table.track_changes():
        assert [item.view for item in subscriber_table.take_changes()[0]] == [one]
        assert subscriber_table.take_changes() == ([], set())
        subscriber_table.add_subscriber(two, KEYS, "a")
        subscriber_table.add_subscriber(three, KEYS, "b")
        subscriber_table.remove_subscriber(three)
        new, left = subscriber_table.take_changes()
        assert ([item.view for item in new], left) == ([two], {"b"})
        del new
        subscriber_table.remove_subscriber(one)
        assert subscriber_table.take_changes() == ([], set()), "another view of that channel remains"
        reference = weakref.ref(two)
        del two
        wait_for(lambda: reference() is None, "the end of the view")
        assert subscriber_table.take_changes() == ([], {"a"})
        assert subscriber_table.views_of("a") == []
    assert not subscriber_table


def test_view_that_moves_to_another_channel_leaves_the_first():
    """A circuit may move to another node of a cluster."""
    subscriber_table, view = SubscriberTable(), View(1.0)
    with subscriber_table.track_changes():
        subscriber_table.add_subscriber(view, KEYS, "a")
        assert subscriber_table.take_changes()[1] == set()
        subscriber_table.add_subscriber(view, KEYS, "b")
        new, left = subscriber_table.take_changes()
    assert ([item.channel for item in new], left) == (["b"], {"a"})
    subscriber_table.remove_subscriber(view)
    assert subscriber_table.take_changes() == ([], set()), "without a listener, no change is recorded"


@pytest.mark.parametrize("at_ms", [1e18, -1e18, float("inf"), float("-inf"), float("nan")])
def test_time_without_a_date_is_bounded(at_ms):
    """A guarded call adds its reset timeout to the time, and must not raise."""
    assert isinstance(utc_from_ms(at_ms) + timedelta(days=365_000), datetime)


def test_distant_opening_time_raises_only_the_rejection():
    """The kind of storage makes no difference."""
    storage = CircuitMemoryStorage("closed")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.open()
    storage.opened_at = datetime.max.replace(tzinfo=timezone.utc)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)


def test_lost_connections_are_logged_once_a_minute_with_a_count(server, client, caplog, monkeypatch):
    """A proxy that closes connections again and again must not fill the disk."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logger, "monotonic", lambda: clock.now)
    breaker = settled(breaker_on(client))

    def lose() -> None:
        before = {line["id"] for line in listener_connections(client)}
        for line in before:
            client.client_kill_filter(_id=line)
        wait_for(lambda: {line["id"] for line in listener_connections(client)} - before, "a new connection")
        settled(breaker)

    for _ in range(4):
        lose()
    warnings = [message for message in messages_of(caplog, server) if "no push" in message]
    assert len(warnings) == 1
    clock.now += logger.REPEAT_WINDOW_S
    lose()
    (_, again) = [message for message in messages_of(caplog, server) if "no push" in message]
    assert "3 more" in again


def test_refusals_are_logged_once_a_minute_with_a_count(server, client, caplog, monkeypatch):
    """Rights may be withdrawn again and again, and connections may fail after a moment each."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logger, "monotonic", lambda: clock.now)
    breaker = settled(breaker_on(client))
    listener: Listener = listener_of(breaker)
    for seconds in (0, 1, 1, logger.REPEAT_WINDOW_S):
        clock.now += seconds
        forget_refusal(listener)
        listener.log_refused("NOPERM")
    first, last = messages_of(caplog, server)
    assert first.endswith("every read of a circuit is a round trip")
    assert last.endswith("; 2 more such lines were left out")
