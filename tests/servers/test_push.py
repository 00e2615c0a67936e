"""A push is a hint, an answer is a fact: what users who may only publish can do, and what a push costs.

Real servers.  The forger is a user of the server without a right to any key.
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
from tests.support.inspect import lines, listeners, view_of
from tests.support.servers import counted
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens", "patient")

#: Nothing that is noticed within this time was noticed by a beat.
PATIENT = 60.0

#: Longest time for a push and a read, seconds, on a machine that does other things too.
PUSH = 2.0

STALENESS = 1.0

KEYS = circuit_keys(NAMESPACE, needs_one_slot=False)
CHANNEL = channel_of(KEYS, 0)

Publish = Callable[..., None]


@pytest.fixture
def forge(server: PrivateServer) -> Iterator[Publish]:
    """Publishes on the circuit's channel, as a user who may do nothing else."""
    with contextlib.closing(server.client()) as administrator:
        rights = ("on", ">e", "resetkeys", "allchannels", "-@all", "+publish", "+auth", "+hello")
        administrator.execute_command("ACL", "SETUSER", "eve", "reset", *rights)
    with contextlib.closing(server.client(username="eve", password="e")) as eve:
        yield lambda payload, channel=CHANNEL: eve.execute_command("PUBLISH", channel, payload)


@pytest.fixture
def other(server: PrivateServer) -> Iterator[pybreaker.CircuitBreaker]:
    """The same circuit elsewhere, which always asks."""
    with contextlib.closing(server.client()) as client:
        yield breaker_on(client, max_staleness=0, reset_timeout=60)


def stored(client: redis.Redis) -> dict[bytes, Any]:
    """All that lies in Redis."""
    return {
        key: client.hgetall(key) if client.type(key) == b"hash" else client.get(key) for key in sorted(client.keys("*"))
    }


def now_ms() -> int:
    """What a forger takes for the server's time."""
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


# -- who may only publish ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORGED)
def test_forged_record_changes_no_circuit_and_nothing_in_redis(server, client, protocol, forge, name):
    """Calls go on, the record stays as it is, and so does what would be stored if Redis lost it."""
    breaker = settled(breaker_on(client, max_staleness=STALENESS, reset_timeout=60))
    known, before = view_of(breaker).cached, stored(client)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        forge(FORGED[name](now_ms()))
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"
        assert breaker._state_storage.opened_at is None
    assert stored(client) == before
    assert view_of(breaker).cached == known
    client.flushall()
    wait_for(lambda: breaker.call(up) and client.exists(KEYS[0]), "the circuit is back in Redis")
    assert stored(client) == before
    settled(breaker)
    assert len(listeners()) == 1


def test_forged_record_keeps_no_circuit_open(server, client, protocol, forge, other):
    """Neither a close nor a probe is held up by a generation that no server answered."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT, reset_timeout=60))
    for verb, state in (("open", "open"), ("close", "closed")) * 3:
        for name in ("open, last generation", "half-open for a day", "far future"):
            forge(FORGED[name](now_ms()))
        getattr(other, verb)()
        assert wait_for(lambda state=state: breaker.current_state == state, state) < PUSH
    assert int(client.hget(KEYS[4], "generation")) == 6


@pytest.mark.parametrize("channel", ["__redis__:invalidate", f"{NAMESPACE}:pybreaker:circuit", f"x{CHANNEL}"])
def test_message_on_a_channel_that_looks_alike_is_not_received(client, protocol, forge, channel, monkeypatch):
    """Invalidations come from the server alone, and each circuit has one channel."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT))
    received: list[Push] = []
    line = breaker._state_storage._core.shared._subscription._listener.session.connection
    hear = line._on_push
    monkeypatch.setattr(line, "_on_push", lambda push: (received.append(push), hear(push)))
    for payload in (KEYS[0], FORGED["next generation"](now_ms())):
        forge(payload, channel=channel)
    forge(FORGED["next generation"](now_ms()))
    wait_for(lambda: [push for push in received if push[0] == b"message"], "the last one arrives")
    assert [push[0] for push in received if push[0] != b"pong"] == [b"message"]
    assert breaker.call(up) == "answer"


def test_flood_of_forged_records_costs_one_read_each_10_ms_and_no_log_line(client, protocol, forge, caplog):
    """Whatever is published, and however often."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    breaker = settled(breaker_on(client, max_staleness=STALENESS))
    caplog.clear()
    with counted(client) as asked:
        began, sent = time.monotonic(), 0
        while time.monotonic() < began + 1.0:
            forge(f"{now_ms()} {sent} open {now_ms()}  0 0 0")
            sent += 1
        assert breaker.call(up) == "answer"
        seconds = time.monotonic() - began
    reads = asked["hmget"] - asked.get("evalsha", 0)
    assert sent > 200
    assert 1 <= reads <= seconds / REREAD_INTERVAL_S + REREAD_BURST + 2 * seconds / STALENESS + 2, asked
    # The call may have begun during a read, and an answer that a push has overtaken is not quiet.
    assert asked.get("evalsha", 0) <= 2
    assert caplog.messages == []


def test_transition_among_forged_noise_marks_is_noticed_at_once(client, protocol, forge, other):
    """A mark excuses no other change from being read."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT, reset_timeout=60))
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
            assert wait_for(lambda state=state: breaker.current_state == state, state) < PUSH
    finally:
        stop.set()
        thread.join()


def test_forged_noise_costs_one_report_at_most(client, protocol, forge):
    """The answer to that report says that there was no failure."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT))
    with counted(client) as asked:
        forge(FORGED["noise"](now_ms()))
        wait_for(lambda: view_of(breaker).fast_path.quiet_admission is None, "the mark arrives")
        for _ in range(100):
            breaker.call(up)
    assert asked["evalsha"] == 1


# -- what the listener reads counts as answered ------------------------------------------------------------------------


def test_transitions_of_another_process_cost_calls_ten_round_trips_a_second_at_most(client, protocol, other):
    """The listener reads it; only a call that begins during one of ten such reads a second asks, too."""
    breaker = settled(breaker_on(client, max_staleness=PATIENT, reset_timeout=60))
    began, own = time.monotonic(), 0
    for verb, state in (("open", "open"), ("close", "closed")) * 5:
        with counted(client) as asked:
            getattr(other, verb)()
            scripts = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            wait_for(lambda state=state: breaker.current_state == state, state)
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                breaker.call(up)
        own += asked["evalsha"] - scripts  # The others are of the one who moves it.
    assert own <= 1 + (time.monotonic() - began) / SUSPENSION_INTERVAL_MIN_S


def test_record_that_the_listener_has_read_is_restored(client, protocol, other):
    """No caller of this process has asked since the trip; what was read is a fact all the same."""
    breaker = settled(breaker_on(client, max_staleness=STALENESS, reset_timeout=60))
    other.open()
    wait_for(lambda: breaker.current_state == "open", "open")
    opened = stored(client)
    client.flushall()
    wait_for(lambda: breaker.current_state == "open" and client.exists(KEYS[0]), "the circuit is back in Redis")
    assert stored(client) == opened


class Fake:
    """A line whose answers a test writes."""

    is_tracking = False

    def __init__(self, hear: Callable[[Push], None]) -> None:
        self.hear = hear
        self.answers: list[Any] = []
        self.pushes: list[Push] = []

    def query(self, commands: list[Any]) -> list[Any]:
        """What was written, and what arrives meanwhile."""
        for push in self.pushes:
            self.hear(push)
        return self.answers


def overtaken(*pushes: Push) -> tuple[View, Session]:
    """A view of an open circuit, after a poll between whose commands a probe was claimed."""
    view, subscriber_table = View(PATIENT), SubscriberTable()
    subscriber_table.add_subscriber(view, KEYS, CHANNEL)
    session = Session(Fake, subscriber_table, set())  # type: ignore[arg-type]
    session._keys_by_channel = {CHANNEL: KEYS}
    session._channel_by_key = dict.fromkeys(KEYS, CHANNEL)
    line: Any = session.connection
    view.mark_subscribed()
    view.store_answer(view.begin_read(), Circuit(OPEN, opened_at_ms=5000, generation=1), 6000)
    assert view.is_trusted
    line.answers = [(7, 0), [b"0"], [b"open", b"5"], [b"2", b"half-open", b"5000", b"a0", b"9000", b"0", b"2000"]]
    line.pushes = [*pushes]
    session._poll(subscriber_table.snapshot())
    return view, session


def test_read_with_a_script_in_between_is_repeated_and_changes_nothing():
    """The commands of a batch are not one step, and this time the push says so."""
    view, session = overtaken(Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"]))
    assert view.cached == Circuit(OPEN, opened_at_ms=5000, generation=1)
    assert session._changed == {CHANNEL}
    line: Any = session.connection
    line.answers[2] = [b"half-open", b"5"]
    line.pushes = []
    session._reread_changed()
    known = view.cached
    assert known is not None
    assert (known.generation, known.state) == (2, "half-open")
    assert view.is_trusted
    assert session._changed == set()


def test_calls_ask_from_a_push_until_the_circuit_was_read_in_ten_reads_a_second():
    """A call that begins after a push must not use the record of before.  A flood of pushes costs calls little."""
    push = Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"])
    view, session = overtaken()
    line: Any = session.connection
    line.answers[2:] = [[b"open", b"5"], [b"1", b"open", b"5000", b"", b"0", b"0", b"0"]]
    session._poll(session._subscriber_table.snapshot())
    assert view.is_trusted
    believed = []
    for _ in range(3):
        session._receive(push)
        believed.append(view.is_trusted)
        session._reread_changed()
        assert view.is_trusted
    assert believed == [False, True, True]
    time.sleep(SUSPENSION_INTERVAL_MIN_S)
    session._reread_at = time.monotonic() + 60
    session._receive(push)
    assert view.is_trusted, "the read does not follow at once"


@pytest.mark.parametrize("time_read", [[b"9999999999999", b"0"], [b"-7", b"0"], [b"7"], None])
def test_clock_that_no_server_shows_ends_the_line_and_changes_nothing(time_read):
    """What a listener reads is checked like the answer of a script."""
    view, session = overtaken(Push([b"message", CHANNEL.encode(), b"7000 2 half-open 5000 a0 9000 0 2000"]))
    known, learned = view.cached, view.clock_offset.known_bounds
    line: Any = session.connection
    line.answers = [time_read, [b"0"], [b"half-open", b"5"], line.answers[3]]
    with pytest.raises(UnusableReplyError, match="TIME"):
        session._reread_changed()
    assert (view.cached, view.clock_offset.known_bounds) == (known, learned)


def test_read_that_makes_no_sense_is_left_to_the_next_caller():
    """A foreign writer's record has to be adopted, which takes a script."""
    view, _ = overtaken()
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
def test_noise_mark_excuses_the_change_of_the_hash_that_it_made_and_no_other(key, pushed, is_read):
    """Failures cost listeners no read; a mark, forged or not, hides no foreign writer."""
    view, session = overtaken()
    view.store_answer(view.begin_read(), Circuit(generation=1), 6500)
    session._receive(Push([b"invalidate", [key.encode(), b"unknown"]]))
    session._receive(Push([b"message", CHANNEL.encode(), pushed]))
    assert bool(session._changed | session._maybe_changed) == is_read


def test_circuit_that_calls_do_not_rely_on_is_not_read_again(client, other):
    """An idle process costs the server nothing for a transition but the push."""
    breaker = settled(breaker_on(client, max_staleness=0.2))
    wait_for(lambda: not view_of(breaker).is_trusted and not view_of(breaker).fast_path.was_used, "idle")
    with counted(client) as asked:
        other.open()
        other.close()
        time.sleep(0.1)
    assert asked.get("hmget", 0) == asked["evalsha"], "by scripts"


# -- work on what has changed only -------------------------------------------------------------------------------------


def test_push_costs_the_same_with_many_circuits(client):
    """CPU of one process: a wake-up of its listener works on what has changed."""
    cost = {}
    for count in (50, 1500):
        breakers = [breaker_on(client, f"many{count}-{number}", fail_max=10**6) for number in range(count)]
        for breaker in breakers:
            breaker.call(up)
        wait_for(lambda breakers=breakers: all(view_of(breaker).is_subscribed for breaker in breakers), "heard")
        spans = []
        for begin in range(3):
            began = time.process_time()
            for breaker in breakers[begin * 15 :][:15]:
                fails(breaker)
                time.sleep(0.002)
            spans.append(time.process_time() - began)
        cost[count] = min(spans)
    # Twice in a second there is a beat, which looks at each circuit once.
    assert cost[1500] < 3 * cost[50], cost


def test_wake_up_takes_what_was_added_and_left_since_the_last():
    """Views that came and went between two looks leave no trace."""
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
        assert subscriber_table.take_changes() == ([], set()), "another one of that channel is there"
        gone = weakref.ref(two)
        del two
        wait_for(lambda: gone() is None, "collected")
        assert subscriber_table.take_changes() == ([], {"a"})
        assert subscriber_table.views_of("a") == []
    assert not subscriber_table


def test_view_that_comes_again_on_another_channel_leaves_the_first():
    """A circuit that moves to another node of a cluster."""
    subscriber_table, view = SubscriberTable(), View(1.0)
    with subscriber_table.track_changes():
        subscriber_table.add_subscriber(view, KEYS, "a")
        assert subscriber_table.take_changes()[1] == set()
        subscriber_table.add_subscriber(view, KEYS, "b")
        new, left = subscriber_table.take_changes()
    assert ([item.channel for item in new], left) == (["b"], {"a"})
    subscriber_table.remove_subscriber(view)
    assert subscriber_table.take_changes() == ([], set()), "nothing is noted while nothing takes it"


# -- times and log lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_ms", [1e18, -1e18, float("inf"), float("-inf"), float("nan")])
def test_time_without_a_date_is_bounded(at_ms):
    """A guarded call adds its timeout to it, and must not raise."""
    assert isinstance(utc_from_ms(at_ms) + timedelta(days=365_000), datetime)


def test_far_time_that_was_set_rejects_calls_and_does_not_raise_otherwise():
    """Whatever the storage."""
    storage = CircuitMemoryStorage("closed")
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.open()
    storage.opened_at = datetime.max.replace(tzinfo=timezone.utc)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)


def test_lost_lines_are_logged_once_a_minute_with_a_count(client, caplog, monkeypatch):
    """A proxy that hangs up again and again fills no disk."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis")
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logger, "monotonic", lambda: clock.now)
    breaker = settled(breaker_on(client))

    def lose() -> None:
        before = {line["id"] for line in lines(client)}
        for line in before:
            client.client_kill_filter(_id=line)
        wait_for(lambda: {line["id"] for line in lines(client)} - before, "a new line")
        settled(breaker)

    for _ in range(4):
        lose()
    said = [message for message in caplog.messages if "no push" in message]
    assert len(said) == 1
    clock.now += logger.REPEAT_WINDOW_S
    lose()
    (_, again) = [message for message in caplog.messages if "no push" in message]
    assert "3 more" in again


def test_refusals_are_logged_once_a_minute_with_a_count(client, caplog, monkeypatch):
    """Rights that come and go, or lines that serve for a moment each."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(logger, "monotonic", lambda: clock.now)
    breaker = settled(breaker_on(client))
    listener: Listener = breaker._state_storage._core.shared._subscription._listener
    for seconds in (0, 1, 1, logger.REPEAT_WINDOW_S):
        clock.now += seconds
        listener._is_refusal_logged = False  # A poll was answered in between.
        listener.log_refused("NOPERM")
    first, last = caplog.messages
    assert first.endswith("every look at a circuit is a round trip")
    assert last.endswith("; 2 more like this since the last such line")
