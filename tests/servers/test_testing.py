"""What tests of guarded code are given: circuits that stay put, a clock that advances, fixtures for those who ask."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import freezegun
import pybreaker
import pytest
import redis
import time_machine
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.registry import BreakerRegistry, retry_after
from pybreaker_redis.testing import BreakerClock, force_closed, force_open, in_memory, unique_prefix
from tests.support.breakers import Down, Heard, down, fails, up
from tests.support.inspect import lease_ms_of, storage_of

pytestmark = pytest.mark.usefixtures("patient")

pytest_plugins = ["pybreaker_redis.fixtures"]

#: New ones: storages of earlier tests may still be there, and are not to have a say.
_namespaces = (f"tested{number}" for number in itertools.count())

#: Where breakers may keep their circuits.
STORAGES = {
    "stock, memory": lambda client: pybreaker.CircuitMemoryStorage("closed"),
    "stock, Redis": lambda client: pybreaker.CircuitRedisStorage("closed", client, next(_namespaces)),
    "ours, memory": lambda client: CircuitMemoryStorage("closed"),
    "ours, Redis": lambda client: CircuitRedisStorage("closed", client, next(_namespaces)),
}

#: What else may move the time.
MOVERS: dict[str, Callable[[datetime], AbstractContextManager[Any]]] = {
    "freezegun": freezegun.freeze_time,
    "time-machine": lambda at: time_machine.travel(at, tick=False),
}

NOON = datetime(2030, 6, 1, 12, tzinfo=timezone.utc)


@pytest.fixture(params=STORAGES)
def make(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., CircuitBreaker]:
    """Breakers on each kind of storage."""
    return lambda **words: CircuitBreaker(state_storage=STORAGES[request.param](client), name="tested", **words)


def rejected(breaker: CircuitBreaker) -> bool:
    """Whether a call is."""
    try:
        breaker.call(up)
    except CircuitBreakerError:
        return True
    return False


class TestForced:
    """A circuit that stays as it is."""

    @pytest.mark.parametrize("reset_timeout", [0, 0.001, 60])
    def test_forced_open_rejects_every_call(self, make: Any, reset_timeout: float) -> None:
        """Whatever the timeout, so that a test of the fallback does not pass by chance."""
        breaker = make(reset_timeout=reset_timeout)
        with force_open(breaker):
            assert breaker.current_state == breaker.state.name == "open"
            assert all(rejected(breaker) for _ in range(3))
            assert reset_timeout < retry_after(breaker) + 0.1 <= max(reset_timeout, 1) + 1.1
        assert not rejected(breaker)

    def test_forced_open_tells_the_breaker_s_own_timeout(self, make: Any) -> None:
        """What a test compares ``Retry-After`` with."""
        breaker = make(reset_timeout=30)
        with force_open(breaker), pytest.raises(CircuitBreakerError) as raised:
            breaker.call(up)
        with force_open(breaker):
            assert 29 < retry_after(raised.value) <= 30

    def test_forced_closed_lets_every_call_pass(self, make: Any) -> None:
        """A test of what happens when the dependency fails is not about how often it did before."""
        breaker = make(fail_max=2)
        breaker.open()
        with force_closed(breaker):
            for _ in range(5):
                with pytest.raises(Down):
                    breaker.call(down)
            assert not rejected(breaker)
            assert breaker.fail_counter == 0
        assert rejected(breaker)

    def test_circuit_is_as_it_was_afterwards(self, make: Any) -> None:
        """Its counts included, and no listener has heard anything."""
        heard = Heard()
        breaker = make(fail_max=3, listeners=[heard])
        fails(breaker, 2)
        with force_open(breaker), force_closed(breaker):
            fails(breaker, 4)
            with force_open(breaker):
                assert rejected(breaker)
            assert not rejected(breaker)
        assert breaker.fail_counter == 2
        assert heard.states == []
        fails(breaker)
        assert [new for _, _, new in heard.states] == ["open"]

    def test_what_is_done_by_hand_meanwhile_changes_nothing(self, make: Any) -> None:
        """The code under test may open and close."""
        breaker = make()
        with force_open(breaker):
            breaker.close()
            assert rejected(breaker)
        with force_closed(breaker):
            breaker.open()
            breaker.half_open()
            assert not rejected(breaker)
        assert not rejected(breaker)

    def test_ends_with_an_error_too(self, make: Any) -> None:
        """A test that fails must not take the next one along."""
        breaker = make()
        with pytest.raises(KeyError), force_open(breaker):
            raise KeyError
        assert not rejected(breaker)

    def test_decorates_a_test(self, make: Any) -> None:
        """As `unittest.mock.patch` does."""
        breaker = make()

        @force_open(breaker)
        def test() -> bool:
            return rejected(breaker)

        assert test()
        assert test()
        assert not rejected(breaker)

    def test_its_registry_says_so_and_operators_move_nothing(self, client: redis.Redis) -> None:
        """A page that shows the circuits is tested like everything else."""
        breakers = BreakerRegistry(client)
        payments, _ = breakers.get("payments"), breakers.get("stock")
        with force_open(payments):
            states = {name: status.state for name, status in breakers.status().items()}
            assert states == {"payments": "open", "stock": "closed"}
            assert 59 < breakers.status()["payments"].retry_after <= 60
            breakers.set_state("payments", "closed")
            assert rejected(payments)
        with force_closed(payments):
            breakers.set_state("payments", "open")
            assert not rejected(payments)
            breakers.close()
        assert not rejected(payments)

    def test_asks_no_redis(self) -> None:
        """Tests of other things run where there is none."""

        def never() -> None:
            pytest.fail("asked for a client")

        payments = BreakerRegistry(never).get("payments")
        with force_open(payments):
            assert rejected(payments)
        with force_closed(payments):
            assert not rejected(payments)


class TestClock:
    """Time that passes for breakers."""

    def test_timeout_passes_without_waiting(self, make: Any) -> None:
        """And no earlier than it should; whole seconds are what stock stores."""
        breaker = make(fail_max=1, reset_timeout=30)
        with BreakerClock() as clock:
            fails(breaker)
            clock.advance(28)
            assert rejected(breaker)
            assert 0 < retry_after(breaker) <= 2
            clock.advance(2.5)
            assert retry_after(breaker) == 0
            assert not rejected(breaker)
            assert breaker.current_state == "closed"

    def test_trip_under_an_advanced_clock_waits_from_then_on(self, make: Any) -> None:
        """Time that has passed before is no reason to be early."""
        breaker = make(fail_max=1, reset_timeout=30)
        with BreakerClock() as clock:
            clock.advance(1000)
            fails(breaker)
            assert storage_of(breaker).opened_at.tzname() == "UTC"
            assert rejected(breaker)
            clock.advance(31)
            fails(breaker)
            assert rejected(breaker)
            clock.advance(31)
            assert not rejected(breaker)

    def test_lease_of_a_probe_passes_in_memory(self) -> None:
        """The prober has died, and somebody else may."""
        breakers = BreakerRegistry(probe_lease=10, reset_timeout=0)
        payments = breakers.get("payments")
        with BreakerClock() as clock:
            breakers.set_state("payments", "half-open")
            with payments.calling():
                status = breakers.status()["payments"]
                assert (status.state, round(status.retry_after)) == ("half-open", 10)
                clock.advance(11)
                assert breakers.status()["payments"].retry_after == 0

    def test_nothing_else_notices(self) -> None:
        """Timeouts of sockets, tokens and caches are not what is tested."""
        before = time.time(), datetime.now(timezone.utc), time.monotonic()
        with BreakerClock() as clock:
            clock.advance(10**6)
            after = time.time(), datetime.now(timezone.utc), time.monotonic()
        assert after[0] - before[0] < 60
        assert after[1] - before[1] < timedelta(minutes=1)
        assert after[2] - before[2] < 60

    def test_everything_is_as_it_was_afterwards(self) -> None:
        """Also after an error."""
        breaker = CircuitBreaker(reset_timeout=5)
        clock = BreakerClock()
        clock.advance(100)
        with pytest.raises(KeyError), clock:
            raise KeyError
        breaker.open()
        assert storage_of(breaker).opened_at.tzname() == "UTC"
        assert rejected(breaker)
        assert 4 < retry_after(breaker) <= 5

    @pytest.mark.parametrize("mover", MOVERS)
    @pytest.mark.parametrize("outer", ["mover", "clock"])
    def test_together_with_what_else_moves_the_time(self, make: Any, mover: str, outer: str) -> None:
        """A test may freeze the time for other reasons, around the clock or within it."""
        breaker = make(fail_max=1, reset_timeout=30)
        clock = BreakerClock()
        managers = [MOVERS[mover](NOON), clock]
        first, second = managers if outer == "mover" else managers[::-1]
        with first, second:
            fails(breaker)
            clock.advance(29)
            assert rejected(breaker)
            assert retry_after(breaker) == pytest.approx(1, abs=0.01)
            clock.advance(2)
            assert not rejected(breaker)

    @pytest.mark.parametrize("mover", MOVERS)
    def test_time_that_others_move_passes_for_breakers_too(self, mover: str) -> None:
        """One moves the other along."""
        payments = BreakerRegistry(fail_max=1, reset_timeout=30).get("payments")
        with BreakerClock() as clock:
            with MOVERS[mover](NOON):
                fails(payments)
                clock.advance(10)
            with MOVERS[mover](NOON + timedelta(seconds=19)):
                assert retry_after(payments) == pytest.approx(1, abs=0.01)
            with MOVERS[mover](NOON + timedelta(seconds=21)):
                assert not rejected(payments)
                fails(payments)
            # Whoever has moved the time is gone, the clock is not.
            with MOVERS[mover](NOON + timedelta(seconds=21)):
                clock.advance(29)
                assert rejected(payments)
                clock.advance(2)
                assert not rejected(payments)

    @pytest.mark.parametrize("mover", MOVERS)
    def test_forced_circuits_do_not_mind_frozen_time(self, make: Any, mover: str) -> None:
        """Whatever the date."""
        breaker = make(reset_timeout=0)
        with MOVERS[mover](NOON), force_open(breaker):
            assert rejected(breaker)
        with force_open(breaker), MOVERS[mover](NOON):
            assert rejected(breaker)


class TestInMemory:
    """An application's own registry, without its Redis."""

    def test_breakers_stay_themselves_and_need_no_redis(self, client: redis.Redis) -> None:
        """Whoever has taken a breaker at import goes by the circuit of the test."""
        breakers = BreakerRegistry(client, fail_max=1, probe_lease=7)
        payments = breakers.get("payments")
        fails(payments)
        for _ in range(2):
            with in_memory(breakers) as same:
                assert same is breakers
                assert breakers["payments"] is payments
                assert payments.call(up) == "answer"
                fails(payments)
                fails(stock := breakers.get("stock"))
                assert {name: status.state for name, status in breakers.status().items()} == {
                    "payments": "open",
                    "stock": "open",
                }
                assert lease_ms_of(stock) == 7000
        assert rejected(payments)
        assert not [key for key in client.keys("*") if key.startswith(b"stock")]
        # What was made meanwhile has the circuit that it should have.
        assert breakers["stock"] is stock
        assert not rejected(stock)
        assert client.exists("stock:pybreaker:state")

    def test_breaker_that_is_made_anew_meanwhile_has_its_circuit_afterwards(self, client: redis.Redis) -> None:
        """What is tested may end the registry: that must not leave it in memory, and open, for all later tests."""
        breakers = BreakerRegistry(client)
        breakers.get("payments")
        with in_memory(breakers):
            breakers.close()
            breakers.set_state("payments", "open")
        assert not rejected(breakers["payments"])
        assert client.exists("payments:pybreaker:state")


class TestFixtures:
    """What pytest offers."""

    def test_registry_and_clock(self, memory_breakers: BreakerRegistry, breaker_clock: BreakerClock) -> None:
        """Together they are all that a test of one's own fallback needs."""
        stock = memory_breakers.get("stock", fail_max=1, reset_timeout=30)
        fails(stock)
        assert rejected(stock)
        breaker_clock.advance(31)
        assert not rejected(stock)

    def test_registry_is_each_test_s_own(self, memory_breakers: BreakerRegistry) -> None:
        """The breaker of the last test is not here."""
        assert list(memory_breakers) == []

    def test_prefix_is_nobody_else_s(self, breaker_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers of pytest-xdist share a server, and so do the tests of one of them."""
        assert breaker_prefix != unique_prefix()
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
        assert unique_prefix("shop").startswith("shop-gw7-")

    @pytest.fixture
    def project(self, tmp_path: Path) -> Callable[[str, str], str]:
        """Runs pytest on a project of somebody's; returns what it prints."""

        def run(plugins: str, tests: str) -> str:
            (tmp_path / "conftest.py").write_text(f"pytest_plugins = {plugins}\n", encoding="utf-8")
            (tmp_path / "test_shop.py").write_text(tests, encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-p", "no:valkey", "-p", "no:cacheprovider", "-q", str(tmp_path)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr

        return run

    @pytest.mark.full
    def test_nobody_gets_them_unasked(self, project: Callable[[str, str], str]) -> None:
        """Installing a package must not change anybody's tests."""
        test = "def test_it(memory_breakers, breaker_clock, breaker_prefix): pass\n"
        assert "1 passed" in project('["pybreaker_redis.fixtures"]', test)
        assert "fixture 'memory_breakers' not found" in project("[]", test)

    def test_those_of_the_readme_run(self, project: Callable[[str, str], str]) -> None:
        """What is shown as tests is run as tests."""
        from tests.support.pages import blocks

        (shown,) = [source for _, source in blocks("python") if "memory_breakers" in source]
        assert "2 passed" in project('["pybreaker_redis.fixtures"]', shown)
