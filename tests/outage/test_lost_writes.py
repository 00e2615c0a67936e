"""Reaction of processes to a server that loses a circuit's last writes, as by a failover or an old snapshot."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("patient")

#: Seconds of a lease: so much longer than the waits of these tests that no lease ends by itself.
LEASE_S = 60.0

KEYS = circuit_keys("lost", needs_one_slot=False)


class Fleet:
    """Breakers of one circuit, and a server that can lose writes.

    Args:
        administrator: Client with all rights.
        client: Client of the breakers.
    """

    def __init__(self, administrator: Any, client: Any) -> None:
        self.administrator = administrator
        self.client = client

    def breaker(self, **settings: Any) -> CircuitBreaker:
        """Return a breaker that queries the server at each look."""
        storage = CircuitRedisStorage(CLOSED, self.client, "lost", probe_lease=LEASE_S, max_staleness=0)
        return CircuitBreaker(**{"fail_max": 1, "reset_timeout": 0.2, "state_storage": storage, **settings})

    def snapshot(self) -> list[bytes | None]:
        """Return the values of the circuit's keys."""
        return [self.administrator.dump(key) for key in KEYS]

    def lose(self, snapshot: list[bytes | None]) -> None:
        """Restore these values and lose all later writes."""
        with self.administrator.pipeline() as pipe:
            for key, value in zip(KEYS, snapshot, strict=True):
                pipe.delete(key)
                if value is not None:
                    pipe.restore(key, 0, value)
            pipe.execute()

    @property
    def state(self) -> str:
        """State in the key that the stock storage reads."""
        return str(self.administrator.get(KEYS[0]).decode())

    @property
    def hash_fields(self) -> dict[str, str]:
        """Fields of the hash, without the noise field, which is not restored."""
        fields = {name.decode(): value.decode() for name, value in self.administrator.hgetall(KEYS[4]).items()}
        return {**fields, "noisy_until_ms": ""}


@pytest.fixture(params=["lua", "optimistic"])
def fleet(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[Fleet]:
    """Fleets on both engines."""
    user = {}
    with contextlib.closing(server.client()) as administrator:
        if request.param == "optimistic":
            administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "+@all", "-@scripting")
            user = {"username": "noscript", "password": "any"}
        with contextlib.closing(server.client(**user)) as client:
            yield Fleet(administrator, client)


def passes(breaker: CircuitBreaker) -> bool:
    """Return whether a call of a new thread passes, as a web server makes it."""
    passed = []

    def call() -> None:
        with contextlib.suppress(CircuitBreakerError):
            passed.append(breaker.call(lambda: True))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return bool(passed)


def trip(breaker: CircuitBreaker) -> None:
    """Make a call that opens the circuit."""
    with pytest.raises(CircuitBreakerError):
        breaker.call(lambda: 1 / 0)


def start_probe(breaker: CircuitBreaker) -> contextlib.ExitStack:
    """Return the context of a call that an open circuit has admitted as a probe."""
    probe = contextlib.ExitStack()

    def is_admitted() -> bool:
        with contextlib.suppress(CircuitBreakerError):
            probe.enter_context(breaker.calling())
            return True
        return False

    wait_for(is_admitted, "a probe")
    return probe


def test_lost_recovery_costs_a_probe_and_no_lease(fleet: Fleet) -> None:
    """If the record of a finished probe comes back, the next call probes at once."""
    breaker = fleet.breaker()
    trip(breaker)
    with start_probe(breaker):
        during = fleet.snapshot()
    assert fleet.state == CLOSED
    fleet.lose(during)
    assert fleet.state == HALF_OPEN
    assert passes(breaker)
    assert fleet.state == CLOSED
    assert passes(fleet.breaker())


def test_lost_recovery_of_an_open_circuit_costs_a_probe(fleet: Fleet) -> None:
    """If the record of an open circuit comes back after its reset timeout, the next call probes."""
    breaker = fleet.breaker()
    trip(breaker)
    before = fleet.snapshot()
    wait_for(lambda: passes(breaker), "the recovery")
    fleet.lose(before)
    assert fleet.state == OPEN
    assert passes(breaker)
    assert fleet.state == CLOSED


def test_lost_trip_is_restored_by_a_process_that_saw_it(fleet: Fleet) -> None:
    """A process that saw the trip restores it, so no call passes before the reset timeout, and one probe after it."""
    breaker = fleet.breaker(reset_timeout=1.0)
    assert passes(breaker)
    before = fleet.snapshot()
    began = time.monotonic()
    trip(breaker)
    fleet.lose(before)
    assert not passes(breaker)
    assert fleet.state == OPEN
    wait_for(lambda: passes(fleet.breaker(reset_timeout=1.0)), "the recovery")
    # The server's clock counts in whole milliseconds.
    assert time.monotonic() - began >= 0.999


def test_lost_claim_is_restored_with_its_lease(fleet: Fleet) -> None:
    """The probing process restores its claim: no second probe is admitted, and the report counts."""
    breaker = fleet.breaker()
    trip(breaker)
    before = fleet.snapshot()
    with start_probe(breaker):
        claimed = fleet.hash_fields
        fleet.lose(before)
        assert not passes(breaker)
        assert fleet.hash_fields == claimed
        assert not passes(fleet.breaker())
    assert fleet.state == CLOSED


def test_report_of_a_lost_claim_is_fenced_if_another_process_claims(fleet: Fleet) -> None:
    """If no other process has seen the lost claim, a second probe is admitted, and only its report counts."""
    first, second = fleet.breaker(), fleet.breaker()
    trip(first)
    before = fleet.snapshot()
    late = start_probe(first)
    fleet.lose(before)
    with start_probe(second):
        claimed = fleet.hash_fields
        late.close()
        assert fleet.hash_fields == claimed, "a late report changes nothing"
    assert fleet.state == CLOSED


def test_lost_counts_delay_a_trip_and_cause_none(fleet: Fleet) -> None:
    """A lost count delays a trip by as many failures, and causes none."""
    breaker = fleet.breaker(fail_max=3)
    assert passes(breaker)
    before = fleet.snapshot()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            breaker.call(lambda: 1 / 0)
    fleet.lose(before)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            breaker.call(lambda: 1 / 0)
    trip(breaker)
