"""A master that Sentinels move: circuits move with it, and nobody who calls notices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.sentinels import Sentinels
from tests.test_outage import calls, health_of, is_back
from tests.viewed import breaker_on, lines, settled, wait_for

pytestmark = pytest.mark.slow

#: Seconds.
DOWN_AFTER = 1.0


@pytest.fixture
def shop(preferred) -> Iterator[Sentinels]:
    """A master, and a Sentinel that may decide alone."""
    made = Sentinels(preferred.binary, 1, down_after=DOWN_AFTER)
    with made.stack:
        yield made


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
    assert took < 3


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
