"""Armed circuits: quiet circuits that no beat reads, because the server would report each change of their keys."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import redis

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis._replica import armed
from pybreaker_redis._replica.view import View
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import (
    NAMESPACE,
    PUSH_MAX_S,
    breaker_on,
    fails,
    seconds_until,
    settled,
    up,
)
from tests.support.clients import PROTOCOLS
from tests.support.inspect import is_armed, view_of
from tests.support.servers import counted
from tests.support.wait import wait_for

pytestmark = [
    pytest.mark.usefixtures("no_listeners", "patient"),
    pytest.mark.skipif(PROTOCOLS[0] != 3, reason="only RESP3 puts pushes and answers into one order"),
]

KEYS = circuit_keys(NAMESPACE, needs_one_slot=False)


def armed_breaker(client: redis.Redis, **settings: Any) -> Any:
    """Return a breaker on an armed circuit."""
    breaker = settled(breaker_on(client, **settings))
    wait_for(lambda: breaker.call(up) and is_armed(breaker), "an armed circuit")
    return breaker


def beats(client: redis.Redis) -> int:
    """Return the number of beats since the statistics were reset."""
    return int(client.info("commandstats").get("cmdstat_time", {"calls": 0})["calls"])


def test_armed_circuit_is_trusted_and_not_read(client: redis.Redis) -> None:
    """A beat is one TIME, however often the circuit is used."""
    breaker = armed_breaker(client, max_staleness=0.2)
    with counted(client) as commands:
        wait_for(lambda: breaker.call(up) and view_of(breaker).is_trusted and beats(client) >= 8, "eight beats")
    assert {"mget", "hmget", "evalsha", "eval"}.isdisjoint(commands), commands


def test_armed_circuits_of_one_process_share_the_beat(client: redis.Redis) -> None:
    """A hundred circuits cost what one costs."""
    breakers = [armed_breaker(client, namespace=f"armed{number}", max_staleness=0.4) for number in range(100)]
    with counted(client) as commands:
        wait_for(lambda: all(each.call(up) for each in breakers) and beats(client) >= 5, "five beats")
    assert {"mget", "hmget", "evalsha", "eval"}.isdisjoint(commands), commands


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.set(KEYS.state, "open"),
        lambda client: client.hset(KEYS.circuit, mapping={"state": "open", "generation": "7", "opened_at_ms": "1"}),
        lambda client: breaker_on(client, max_staleness=0).open(),
    ],
    ids=["state", "hash", "transition"],
)
def test_change_of_an_armed_circuit_is_noticed(client: redis.Redis, change: Callable[[redis.Redis], Any]) -> None:
    """A push ends the trust, whichever client has changed the circuit.  No beat reads an armed circuit."""
    breaker = armed_breaker(client)
    change(client)
    wait_for(lambda: not is_armed(breaker), "the circuit is armed no longer", within=PUSH_MAX_S)


def test_opening_of_an_armed_circuit_is_noticed(client: redis.Redis) -> None:
    """Without a beat that reads the circuit, a push still leads to a read."""
    breaker = armed_breaker(client)
    client.set(KEYS.state, "open")
    assert seconds_until(breaker, "open") < PUSH_MAX_S


def test_lost_keys_of_an_armed_circuit_are_restored(client: redis.Redis) -> None:
    """FLUSHALL reports the loss of all keys."""
    breaker = armed_breaker(client)
    client.flushall()
    wait_for(lambda: breaker.call(up) and client.exists(KEYS.state), "a circuit in Redis", within=PUSH_MAX_S)


def test_failure_that_a_stock_worker_counts_is_reset_by_a_success(client: redis.Redis) -> None:
    """Stock workers publish nothing.  The counter is tracked while it is zero."""
    breaker = armed_breaker(client, max_staleness=0.4)
    client.incr(KEYS.fail_counter)
    wait_for(lambda: breaker.call(up) and client.get(KEYS.fail_counter) == b"0", "the reset counter")


def test_counter_above_zero_is_read_at_each_beat(client: redis.Redis) -> None:
    """Each failure changes the counter, and no process should receive a push for each."""
    breaker = armed_breaker(client, max_staleness=0.2, fail_max=100)
    fails(breaker)
    with counted(client) as commands:
        wait_for(lambda: view_of(breaker).cached.fail_counter == 1 and beats(client) >= 6, "six beats")
        assert not is_armed(breaker)
    del commands
    wait_for(lambda: breaker.call(up) and is_armed(breaker), "the circuit is armed again, once it is quiet")


def test_armed_circuit_is_read_again_after_a_while(
    server: PrivateServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server reports neither SWAPDB nor, in time, an expiry."""
    monkeypatch.setattr(armed, "ARMED_MAX_S", 0.3)
    breaker = armed_breaker(client, max_staleness=0.2)
    with contextlib.closing(server.client(db=1)) as other:
        other.set(KEYS.state, "open")
    client.swapdb(0, 1)
    try:
        assert seconds_until(breaker, "open") < PUSH_MAX_S
    finally:
        client.flushall()


def test_circuit_with_ttl_is_read_at_each_beat(client: redis.Redis) -> None:
    """Keys expire without a message, or with a late one, and each use renews them."""
    breaker = settled(breaker_on(client, max_staleness=0.2, ttl=100))
    client.config_resetstat()
    wait_for(lambda: breaker.call(up) and beats(client) >= 6, "six beats")
    assert not is_armed(breaker)


def test_lost_connection_disarms(client: redis.Redis) -> None:
    """What a server would report, it reports on a connection that is there."""
    breaker = armed_breaker(client)
    assert client.client_kill_filter(_type="pubsub")
    wait_for(lambda: not is_armed(breaker) or not view_of(breaker).is_trusted, "no trust without a connection")
    wait_for(lambda: breaker.call(up) and is_armed(breaker), "the circuit is armed by the new connection")


def test_armed_circuit_that_is_garbage_is_forgotten() -> None:
    """A listener keeps no circuit alive."""
    views = armed.ArmedViews()
    view = View(1.0)
    view.mark_subscribed()
    view.store_answer(view.begin_read(), Circuit(), 1.0)
    views.arm(view, view.begin_read(), 0.0)
    assert view.fast_path.quiet_admission
    del view
    gc.collect()
    assert views.take_used(armed.ARMED_MAX_S) == []


def armed_view(clock: list[float]) -> tuple[armed.ArmedViews, View]:
    """Return a view that has been armed for a long time, and the views of its session."""
    views, view = armed.ArmedViews(), View(1.0, lambda: clock[0])
    view.mark_subscribed()
    view.store_answer(view.begin_read(), Circuit(generation=1), 1.0)
    views.add(view)
    views.arm(view, view.begin_read(), clock[0])
    clock[0] += 10
    views.extend_trust(clock[0])
    assert view.is_trusted
    return views, view


def test_change_after_a_long_quiet_time_is_read_at_once() -> None:
    """The last beat was as good as a read, so calls rely on the view: the reread must not wait for the next beat."""
    clock = [0.0]
    _, view = armed_view(clock)
    clock[0] += 0.2
    view.disarm()
    assert view.is_in_use
    assert view.compare_push(Circuit("open", opened_at_ms=1.0, generation=2)), "the push leads to a read"


def test_circuit_that_is_armed_again_before_a_beat_is_read_in_time() -> None:
    """A change and its reread lie between two beats.  The limit counts from the reread."""
    clock = [0.0]
    views, view = armed_view(clock)
    view.disarm()
    views.arm(view, view.begin_read(), clock[0])
    view.fast_path.was_used = True
    assert views.take_used(clock[0]) == [], "the view is armed"
    assert views.take_used(clock[0] + armed.ARMED_MAX_S) == [view]
