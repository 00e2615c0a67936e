"""A server that loses a circuit's last writes, as by a failover or an old snapshot: what processes do about it."""

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

#: Seconds; so much longer than any of these tests waits that no lease has ended by itself.
LEASE = 60.0

KEYS = circuit_keys("lost", needs_one_slot=False)


class Fleet:
    """Breakers of one circuit, and a server whose writes can be lost.

    Args:
        administrator: A client that may do everything.
        client: The client of the breakers.
    """

    def __init__(self, administrator: Any, client: Any) -> None:
        self.administrator = administrator
        self.client = client

    def breaker(self, **words: Any) -> CircuitBreaker:
        """A breaker whose storage asks the server at each look."""
        storage = CircuitRedisStorage(CLOSED, self.client, "lost", probe_lease=LEASE, max_staleness=0)
        return CircuitBreaker(**{"fail_max": 1, "reset_timeout": 0.2, "state_storage": storage, **words})

    def snapshot(self) -> list[bytes | None]:
        """The keys as they are."""
        return [self.administrator.dump(key) for key in KEYS]

    def lose(self, snapshot: list[bytes | None]) -> None:
        """The server has these keys again, and nothing that was written since."""
        with self.administrator.pipeline() as pipe:
            for key, value in zip(KEYS, snapshot, strict=True):
                pipe.delete(key)
                if value is not None:
                    pipe.restore(key, 0, value)
            pipe.execute()

    @property
    def state(self) -> str:
        """As stock's key has it."""
        return str(self.administrator.get(KEYS[0]).decode())

    @property
    def mark(self) -> dict[str, str]:
        """The fields of the hash; noise is not restored."""
        fields = {name.decode(): value.decode() for name, value in self.administrator.hgetall(KEYS[4]).items()}
        return {**fields, "noisy_until_ms": ""}


@pytest.fixture(params=["lua", "optimistic"])
def fleet(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[Fleet]:
    """On scripts, and on transactions."""
    user = {}
    with contextlib.closing(server.client()) as administrator:
        if request.param == "optimistic":
            administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "+@all", "-@scripting")
            user = {"username": "noscript", "password": "any"}
        with contextlib.closing(server.client(**user)) as client:
            yield Fleet(administrator, client)


def passes(breaker: CircuitBreaker) -> bool:
    """Whether a call passes that a new thread makes, as for a request."""
    passed = []

    def call() -> None:
        with contextlib.suppress(CircuitBreakerError):
            passed.append(breaker.call(lambda: True))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return bool(passed)


def trip(breaker: CircuitBreaker) -> None:
    """A call that opens the circuit."""
    with pytest.raises(CircuitBreakerError):
        breaker.call(lambda: 1 / 0)


def probe_starts(breaker: CircuitBreaker) -> contextlib.ExitStack:
    """A call that was let through by an open circuit, and has not ended."""
    probe = contextlib.ExitStack()

    def is_admitted() -> bool:
        with contextlib.suppress(CircuitBreakerError):
            probe.enter_context(breaker.calling())
            return True
        return False

    wait_for(is_admitted, "a probe")
    return probe


def test_lost_recovery_costs_a_probe_and_no_lease(fleet: Fleet) -> None:
    """The record of the probe comes back after the probe has closed the circuit: the next call is a probe, at once."""
    breaker = fleet.breaker()
    trip(breaker)
    with probe_starts(breaker):
        during = fleet.snapshot()
    assert fleet.state == CLOSED
    fleet.lose(during)
    assert fleet.state == HALF_OPEN
    assert passes(breaker)
    assert fleet.state == CLOSED
    assert passes(fleet.breaker())


def test_lost_recovery_of_a_spell_costs_a_probe(fleet: Fleet) -> None:
    """The record of the open circuit comes back: the next call is a probe, as the timeout is over."""
    breaker = fleet.breaker()
    trip(breaker)
    before = fleet.snapshot()
    wait_for(lambda: passes(breaker), "the recovery")
    fleet.lose(before)
    assert fleet.state == OPEN
    assert passes(breaker)
    assert fleet.state == CLOSED


def test_lost_trip_is_made_good_by_those_who_have_seen_it(fleet: Fleet) -> None:
    """No call passes for the rest of the timeout, and one probe after it."""
    breaker = fleet.breaker(reset_timeout=1.0)
    assert passes(breaker)
    before = fleet.snapshot()
    trip(breaker)
    opened = time.monotonic()
    fleet.lose(before)
    assert not passes(breaker)
    assert fleet.state == OPEN
    wait_for(lambda: passes(fleet.breaker(reset_timeout=1.0)), "the recovery")
    assert time.monotonic() - opened >= 1.0


def test_lost_claim_is_made_good_with_its_lease(fleet: Fleet) -> None:
    """There is one probe: the prober's process restores its claim, and its report counts."""
    breaker = fleet.breaker()
    trip(breaker)
    before = fleet.snapshot()
    with probe_starts(breaker):
        held = fleet.mark
        fleet.lose(before)
        assert not passes(breaker)
        assert fleet.mark == held
        assert not passes(fleet.breaker())
    assert fleet.state == CLOSED


def test_lost_claim_that_another_process_makes_again_is_fenced(fleet: Fleet) -> None:
    """Where the server alone knew of the claim there are two probes, and the one that it knows decides."""
    first, second = fleet.breaker(), fleet.breaker()
    trip(first)
    before = fleet.snapshot()
    late = probe_starts(first)
    fleet.lose(before)
    with probe_starts(second):
        held = fleet.mark
        late.close()
        assert fleet.mark == held, "a late report changes nothing"
    assert fleet.state == CLOSED


def test_lost_counts_delay_a_trip_and_cause_none(fleet: Fleet) -> None:
    """As many failures more as were lost."""
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
