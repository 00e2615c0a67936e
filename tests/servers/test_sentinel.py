"""Sentinel: circuits move with a master that Sentinels replace, without an error in a call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import redis
import redis.sentinel

from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import breaker_on, fails, settled
from tests.support.inspect import engine_of, listener_connections, locator_of
from tests.support.logs import messages_of
from tests.support.outages import calls, health_of, is_back
from tests.support.sentinel import Sentinels
from tests.support.wait import wait_for

#: Seconds until a Sentinel counts a silent master as down.
DOWN_AFTER_S = 1.0


@pytest.fixture
def shop(preferred) -> Iterator[Sentinels]:
    """Yield a master, and a Sentinel that decides alone."""
    sentinels = Sentinels(preferred.binary, 1, down_after=DOWN_AFTER_S)
    with sentinels.stack:
        yield sentinels


@pytest.mark.slow
def test_circuit_follows_a_planned_failover_within_seconds(shop: Sentinels, report):
    """The push connection follows the master, though the old one keeps its connection. The circuit stays shared."""
    client = shop.manager().master_for("shop")
    breaker = settled(breaker_on(client, fail_max=5, reset_timeout=60))
    replica = shop.add_replica()
    old = shop.master_port()
    with contextlib.closing(replica.client()) as new:
        shop.fail_over()
        wait_for(lambda: shop.master_port() != old, "the decision of the Sentinel", within=30)
        began = time.monotonic()
        outcome = calls(breaker, 0.5, failing=0.2)
        wait_for(lambda: listener_connections(new), "a listener of the new master")
        seconds = time.monotonic() - began
        wait_for(lambda: is_back(breaker), "the shared circuit")
        assert outcome.unexpected == []
        settled(breaker).open()
        wait_for(lambda: new.get("viewed:pybreaker:state") == b"open", "the trip at the new master")
    report(f"planned Sentinel failover: the listener has moved {seconds:.1f} s after the decision")
    assert seconds < 5


@pytest.mark.full
def test_intent_refused_by_a_demoted_master_is_repeated(preferred, caplog):
    """The demoted master refuses, and nothing was written there.

    The Sentinels name the new master for a second attempt.
    """
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
            # Sentinels also close the connections, but not when the network is split.
            promoted.execute_command("REPLICAOF", "127.0.0.1", old.port)
            wait_for(
                lambda: promoted.get("demoted:pybreaker:fail_counter") == b"1", "the replicated failure", within=30
            )
            promoted.execute_command("REPLICAOF", "NO", "ONE")
            demoted.execute_command("REPLICAOF", "127.0.0.1", new.port)
            master = new
            fails(breaker)
            assert promoted.get("demoted:pybreaker:fail_counter") == b"2"
        assert messages_of(caplog, "'demoted'") == []


def test_idle_connection_to_a_demoted_master_is_closed(killable_server):
    """The Sentinels name the new master at once. Idle connections in the pool lead to the old one."""
    shop = Sentinels(killable_server.binary, 1)
    with shop.stack:
        client = shop.manager().master_for("shop")
        breaker = breaker_on(client, max_staleness=0, timeout=10)
        breaker.call(lambda: None)
        client_of_master = engine_of(breaker).client
        locator = locator_of(breaker)
        (idle,) = client_of_master.connection_pool._available_connections
        for error in ("READONLY You can't write", "The previous master is now a slave"):
            client_of_master.ping()
            assert locator.relocate(redis.ConnectionError(error), client_of_master)
            assert idle._sock is None
        assert locator.relocate(redis.ReadOnlyError("You can't write"), client_of_master)
        assert not locator.relocate(redis.ConnectionError("gone"), client_of_master)
        assert not locator.relocate(redis.ReadOnlyError("You can't write"), killable_server.client())


@pytest.mark.slow
def test_master_that_dies_is_replaced_without_an_error(shop: Sentinels, report):
    """Until the Sentinel decides, the process uses its local circuit. Then, the new master gets the trip."""
    client = shop.manager().master_for("shop")
    breaker = settled(breaker_on(client, fail_max=3, reset_timeout=60))
    replica = shop.add_replica()
    shop.master.kill()
    began = time.monotonic()
    outcome = calls(breaker, 0.5, failing=1.0)
    assert outcome.unexpected == []
    assert outcome.reached == 3
    wait_for(lambda: shop.master_port() == replica.port, "the decision of the Sentinel", within=30)
    decided = time.monotonic()
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
    seconds = time.monotonic() - decided
    report(f"Sentinel's master killed: decided after {decided - began:.1f} s, back {seconds:.1f} s later")
    assert health_of(breaker).state == "open"
    with contextlib.closing(replica.client()) as new:
        assert new.get("viewed:pybreaker:state") == b"open"
