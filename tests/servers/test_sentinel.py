"""A master that Sentinels move: circuits move with it, and nobody who calls notices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import redis
import redis.sentinel

from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import breaker_on, fails, settled
from tests.support.inspect import lines
from tests.support.outages import calls, health_of, is_back
from tests.support.sentinel import Sentinels
from tests.support.wait import wait_for

#: Seconds.
DOWN_AFTER = 1.0


@pytest.fixture
def shop(preferred) -> Iterator[Sentinels]:
    """A master, and a Sentinel that may decide alone."""
    made = Sentinels(preferred.binary, 1, down_after=DOWN_AFTER)
    with made.stack:
        yield made


@pytest.mark.slow
def test_planned_failover_is_followed_within_seconds(shop: Sentinels, report):
    """The line goes where the master is, though the old one keeps it open; the circuit is shared all the time."""
    client = shop.manager().master_for("shop")
    breaker = settled(breaker_on(client, fail_max=5, reset_timeout=60))
    replica = shop.add_replica()
    old = shop.master_port()
    with contextlib.closing(replica.client()) as new:
        shop.fail_over()
        wait_for(lambda: shop.master_port() != old, "they have decided", within=30)
        began = time.monotonic()
        spell = calls(breaker, 0.5, failing=0.2)
        wait_for(lambda: lines(new), "this process listens to the new master")
        took = time.monotonic() - began
        wait_for(lambda: is_back(breaker), "the shared circuit")
        assert spell.unexpected == []
        settled(breaker).open()
        wait_for(lambda: new.get("viewed:pybreaker:state") == b"open", "it is written there")
    report(f"planned Sentinel failover: the listener has moved {took:.1f} s after the decision")
    assert took < 5


def test_call_that_meets_a_demoted_master_is_made_once_more(preferred, caplog):
    """It says so itself, and nothing was written there: the Sentinels know where to, and nobody notices."""
    caplog.set_level("INFO", "pybreaker_redis")
    with (
        PrivateServer(preferred.binary, port=free_port()) as old,
        PrivateServer(preferred.binary, port=free_port()) as new,
    ):
        master = old
        manager = redis.sentinel.Sentinel([])
        manager.discover_master = lambda name: ("127.0.0.1", master.port)  # type: ignore[method-assign]
        breaker = breaker_on(manager.master_for("shop"), "demoted", fail_max=100, max_staleness=0, timeout=10)
        fails(breaker)
        with contextlib.closing(old.client()) as demoted, contextlib.closing(new.client()) as promoted:
            # Sentinels would besides close the connections; a network that is cut in two does not.
            promoted.execute_command("REPLICAOF", "127.0.0.1", old.port)
            wait_for(lambda: promoted.get("demoted:pybreaker:fail_counter") == b"1", "it follows", within=30)
            promoted.execute_command("REPLICAOF", "NO", "ONE")
            demoted.execute_command("REPLICAOF", "127.0.0.1", new.port)
            master = new
            fails(breaker)
            assert promoted.get("demoted:pybreaker:fail_counter") == b"2"
        assert [line for line in caplog.messages if "'demoted'" in line] == []


def test_connection_that_was_kept_open_to_a_demoted_master_is_left(killable_server):
    """The Sentinels say at once who is the master now; what waits to be used in the pool leads to the old one."""
    shop = Sentinels(killable_server.binary, 1)
    with shop.stack:
        client = shop.manager().master_for("shop")
        breaker = breaker_on(client, max_staleness=0, timeout=10)
        breaker.call(lambda: None)
        asked = breaker._state_storage._core.shared.selector.current.engine.client
        whereabouts = breaker._state_storage._core._locator
        (idle,) = asked.connection_pool._available_connections
        for said in ("READONLY You can't write", "The previous master is now a slave"):
            asked.ping()
            assert whereabouts.relocate(redis.ConnectionError(said), asked)
            assert idle._sock is None
        assert whereabouts.relocate(redis.ReadOnlyError("You can't write"), asked)
        assert not whereabouts.relocate(redis.ConnectionError("gone"), asked)
        assert not whereabouts.relocate(redis.ReadOnlyError("You can't write"), killable_server.client())


@pytest.mark.slow
def test_master_that_dies_is_replaced_without_an_error(shop: Sentinels, report):
    """Until they have decided each process protects itself; then what it has learned is the new master's."""
    client = shop.manager().master_for("shop")
    breaker = settled(breaker_on(client, fail_max=3, reset_timeout=60))
    replica = shop.add_replica()
    shop.master.kill()
    began = time.monotonic()
    spell = calls(breaker, 0.5, failing=1.0)
    assert spell.unexpected == []
    assert spell.reached == 3
    wait_for(lambda: shop.master_port() == replica.port, "they have decided", within=30)
    decided = time.monotonic()
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
    took = time.monotonic() - decided
    report(f"Sentinel's master killed: decided after {decided - began:.1f} s, back {took:.1f} s later")
    assert health_of(breaker).state == "open"
    with contextlib.closing(replica.client()) as new:
        assert new.get("viewed:pybreaker:state") == b"open"
