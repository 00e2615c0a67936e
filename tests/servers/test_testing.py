"""The testing module: circuits in a fixed state, a clock that advances, and pytest fixtures on request."""

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

import fakeredis
import freezegun
import pybreaker
import pytest
import redis
import time_machine
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.registry import BreakerRegistry, retry_after
from pybreaker_redis.testing import BreakerClock, force_closed, force_open, in_memory, in_redis, unique_prefix
from tests.support.breakers import Down, TransitionRecorder, down, fails, up
from tests.support.inspect import lease_ms_of, storage_of
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("patient")

pytest_plugins = ["pybreaker_redis.fixtures"]

#: New names, because storages of earlier tests may still exist, and must have no influence.
_namespaces = (f"tested{number}" for number in itertools.count())

#: Storages of breakers, by kind.
STORAGES = {
    "stock, memory": lambda client: pybreaker.CircuitMemoryStorage("closed"),
    "stock, Redis": lambda client: pybreaker.CircuitRedisStorage("closed", client, next(_namespaces)),
    "ours, memory": lambda client: CircuitMemoryStorage("closed"),
    "ours, Redis": lambda client: CircuitRedisStorage("closed", client, next(_namespaces)),
}

#: Other libraries that move the time.
TIME_LIBRARIES: dict[str, Callable[[datetime], AbstractContextManager[Any]]] = {
    "freezegun": freezegun.freeze_time,
    "time-machine": lambda at: time_machine.travel(at, tick=False),
}

NOON = datetime(2030, 6, 1, 12, tzinfo=timezone.utc)


@pytest.fixture(params=STORAGES)
def make(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., CircuitBreaker]:
    """Return a factory of breakers on each kind of storage."""
    return lambda **options: CircuitBreaker(state_storage=STORAGES[request.param](client), name="tested", **options)


def rejected(breaker: CircuitBreaker) -> bool:
    """Return whether a call is rejected."""
    try:
        breaker.call(up)
    except CircuitBreakerError:
        return True
    return False


class TestForced:
    """Circuits in a fixed state."""

    @pytest.mark.parametrize("reset_timeout", [0, 0.001, 60])
    def test_forced_open_rejects_every_call(self, make: Any, reset_timeout: float) -> None:
        """The reset timeout makes no difference, so a test of a fallback does not pass by chance."""
        breaker = make(reset_timeout=reset_timeout)
        with force_open(breaker):
            assert breaker.current_state == breaker.state.name == "open"
            assert all(rejected(breaker) for _ in range(3))
            assert reset_timeout < retry_after(breaker) + 0.1 <= max(reset_timeout, 1) + 1.1
        assert not rejected(breaker)

    def test_forced_open_reports_the_timeout_of_the_breaker(self, make: Any) -> None:
        """A test can compare the header ``Retry-After`` with the breaker's own timeout."""
        breaker = make(reset_timeout=30)
        with force_open(breaker), pytest.raises(CircuitBreakerError) as raised:
            breaker.call(up)
        with force_open(breaker):
            assert 29 < retry_after(raised.value) <= 30

    def test_forced_closed_admits_every_call(self, make: Any) -> None:
        """A test of a failing dependency does not depend on earlier failures."""
        breaker = make(fail_max=2)
        breaker.open()
        with force_closed(breaker):
            for _ in range(5):
                with pytest.raises(Down):
                    breaker.call(down)
            assert not rejected(breaker)
            assert breaker.fail_counter == 0
        assert rejected(breaker)

    def test_forced_circuit_is_restored_afterwards(self, make: Any) -> None:
        """Its counts are unchanged, too, and no listener has been notified."""
        recorder = TransitionRecorder()
        breaker = make(fail_max=3, listeners=[recorder])
        fails(breaker, 2)
        with force_open(breaker), force_closed(breaker):
            fails(breaker, 4)
            with force_open(breaker):
                assert rejected(breaker)
            assert not rejected(breaker)
        assert breaker.fail_counter == 2
        assert recorder.states == []
        fails(breaker)
        assert [new for _, _, new in recorder.states] == ["open"]

    def test_direct_changes_of_a_forced_circuit_have_no_effect(self, make: Any) -> None:
        """Code under test may open and close the circuit."""
        breaker = make()
        with force_open(breaker):
            breaker.close()
            assert rejected(breaker)
        with force_closed(breaker):
            breaker.open()
            breaker.half_open()
            assert not rejected(breaker)
        assert not rejected(breaker)

    def test_forced_circuit_is_restored_after_an_error(self, make: Any) -> None:
        """A failed test must not affect the next one."""
        breaker = make()
        with pytest.raises(KeyError), force_open(breaker):
            raise KeyError
        assert not rejected(breaker)

    def test_forced_circuit_decorates_a_test(self, make: Any) -> None:
        """The context manager also works as a decorator, like `unittest.mock.patch`."""
        breaker = make()

        @force_open(breaker)
        def test() -> bool:
            return rejected(breaker)

        assert test()
        assert test()
        assert not rejected(breaker)

    def test_registry_shows_a_forced_circuit_and_operators_change_nothing(self, client: redis.Redis) -> None:
        """A page that shows the circuits can be tested, too."""
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

    def test_forced_circuit_sends_no_command(self) -> None:
        """Tests of other subjects run without Redis."""

        def never() -> None:
            pytest.fail("the registry requested a client")

        payments = BreakerRegistry(never).get("payments")
        with force_open(payments):
            assert rejected(payments)
        with force_closed(payments):
            assert not rejected(payments)


class TestClock:
    """Time that passes for breakers only."""

    def test_timeout_passes_without_waiting(self, make: Any) -> None:
        """The timeout passes no earlier than it should. Stock stores whole seconds."""
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
        """Time that passed before the trip does not shorten the timeout."""
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
        """The prober has died, so another call may claim the probe."""
        breakers = BreakerRegistry(probe_lease=10, reset_timeout=0)
        payments = breakers.get("payments")
        with BreakerClock() as clock:
            breakers.set_state("payments", "half-open")
            with payments.calling():
                status = breakers.status()["payments"]
                assert (status.state, round(status.retry_after)) == ("half-open", 10)
                clock.advance(11)
                assert breakers.status()["payments"].retry_after == 0

    def test_clock_affects_only_breakers(self) -> None:
        """Timeouts of sockets, tokens and caches are not affected."""
        before = time.time(), datetime.now(timezone.utc), time.monotonic()
        with BreakerClock() as clock:
            clock.advance(10**6)
            after = time.time(), datetime.now(timezone.utc), time.monotonic()
        assert after[0] - before[0] < 60
        assert after[1] - before[1] < timedelta(minutes=1)
        assert after[2] - before[2] < 60

    def test_clock_is_restored_afterwards(self) -> None:
        """The time is restored after an error, too."""
        breaker = CircuitBreaker(reset_timeout=5)
        clock = BreakerClock()
        clock.advance(100)
        with pytest.raises(KeyError), clock:
            raise KeyError
        breaker.open()
        assert storage_of(breaker).opened_at.tzname() == "UTC"
        assert rejected(breaker)
        assert 4 < retry_after(breaker) <= 5

    @pytest.mark.parametrize("library", TIME_LIBRARIES)
    @pytest.mark.parametrize("outer", ["library", "clock"])
    def test_clock_works_together_with_other_libraries(self, make: Any, library: str, outer: str) -> None:
        """A test may freeze the time for other reasons, around the clock or within it."""
        breaker = make(fail_max=1, reset_timeout=30)
        clock = BreakerClock()
        managers = [TIME_LIBRARIES[library](NOON), clock]
        first, second = managers if outer == "library" else managers[::-1]
        with first, second:
            fails(breaker)
            clock.advance(29)
            assert rejected(breaker)
            assert retry_after(breaker) == pytest.approx(1, abs=0.01)
            clock.advance(2)
            assert not rejected(breaker)

    @pytest.mark.parametrize("library", TIME_LIBRARIES)
    def test_time_moved_by_other_libraries_passes_for_breakers(self, library: str) -> None:
        """Moves of both clocks add up."""
        payments = BreakerRegistry(fail_max=1, reset_timeout=30).get("payments")
        with BreakerClock() as clock:
            with TIME_LIBRARIES[library](NOON):
                fails(payments)
                clock.advance(10)
            with TIME_LIBRARIES[library](NOON + timedelta(seconds=19)):
                assert retry_after(payments) == pytest.approx(1, abs=0.01)
            with TIME_LIBRARIES[library](NOON + timedelta(seconds=21)):
                assert not rejected(payments)
                fails(payments)
            # The library that moved the time has ended, and the clock has not.
            with TIME_LIBRARIES[library](NOON + timedelta(seconds=21)):
                clock.advance(29)
                assert rejected(payments)
                clock.advance(2)
                assert not rejected(payments)

    @pytest.mark.parametrize("library", TIME_LIBRARIES)
    def test_forced_circuit_works_under_frozen_time(self, make: Any, library: str) -> None:
        """The date makes no difference."""
        breaker = make(reset_timeout=0)
        with TIME_LIBRARIES[library](NOON), force_open(breaker):
            assert rejected(breaker)
        with force_open(breaker), TIME_LIBRARIES[library](NOON):
            assert rejected(breaker)


class TestInMemory:
    """The registry of an application, without its Redis."""

    def test_in_memory_keeps_breakers_and_needs_no_redis(self, client: redis.Redis) -> None:
        """A breaker that was imported uses the circuit of the test."""
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
        # A breaker that was created meanwhile gets the circuit of its storage.
        assert breakers["stock"] is stock
        assert not rejected(stock)
        assert client.exists("stock:pybreaker:state")

    def test_breaker_created_again_in_memory_gets_its_circuit_afterwards(self, client: redis.Redis) -> None:
        """Code under test may close the registry. Later tests must not find its circuits in memory, and open."""
        breakers = BreakerRegistry(client)
        breakers.get("payments")
        with in_memory(breakers):
            breakers.close()
            breakers.set_state("payments", "open")
        assert not rejected(breakers["payments"])
        assert client.exists("payments:pybreaker:state")


class TestInRedis:
    """The registry of an application, on the Redis of a test."""

    def test_in_redis_keeps_breakers_and_uses_the_other_server(self, client: redis.Redis) -> None:
        """A breaker that was imported uses the circuit on the server of the test, and no other server is asked."""
        breakers = BreakerRegistry("redis://localhost:1/0", fail_max=1)
        payments = breakers.get("payments")
        for is_first in (True, False):
            with in_redis(breakers, client) as same:
                assert same is breakers
                assert breakers["payments"] is payments
                # A later block finds what lies on the server.
                assert rejected(payments) is not is_first
                fails(stock := breakers.get("stock"))
                assert breakers.status()["stock"].state == "open"
                assert storage_of(payments).health().condition == "connected"
                breakers.set_state("payments", "open")
                breakers.set_state("stock", "closed")
        assert client.get("payments:pybreaker:state") == b"open"
        assert breakers["stock"] is stock
        assert not rejected(payments)
        assert storage_of(payments).health().condition == "unreachable"

    def test_in_redis_restores_when_a_storage_cannot_be_made(self, client: redis.Redis) -> None:
        """A bad argument raises before anything changes."""
        breakers = BreakerRegistry(client)
        payments = breakers.get("payments")
        payments.open()
        for bad, error in ((None, TypeError), (7, TypeError), ("http://localhost", ValueError)):
            with pytest.raises(error), in_redis(breakers, bad):
                pass
        assert rejected(payments)
        assert breakers.status()["payments"].state == "open"

    def test_fake_server_of_a_test_is_lost_and_returns(self) -> None:
        """A fake server that loses its connection is an outage, and its return is noticed."""
        server = fakeredis.FakeServer()
        breakers = BreakerRegistry("redis://localhost:1/0", fail_max=2)
        payments = breakers.get("payments")
        with in_redis(breakers, fakeredis.FakeStrictRedis(server=server)):
            assert payments.call(up) == "answer"
            server.connected = False
            assert payments.call(up) == "answer"
            assert breakers.health()["payments"].condition == "unreachable"
            server.connected = True
            wait_for(lambda: breakers.health()["payments"].condition == "connected", "the return of the server")


class TestFixtures:
    """Fixtures for pytest."""

    def test_registry_and_clock(self, memory_breakers: BreakerRegistry, breaker_clock: BreakerClock) -> None:
        """Both fixtures suffice for a test of a fallback."""
        stock = memory_breakers.get("stock", fail_max=1, reset_timeout=30)
        fails(stock)
        assert rejected(stock)
        breaker_clock.advance(31)
        assert not rejected(stock)

    def test_each_test_has_its_own_registry(self, memory_breakers: BreakerRegistry) -> None:
        """The breaker of the test before does not exist."""
        assert list(memory_breakers) == []

    def test_prefix_is_unique(self, breaker_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers of pytest-xdist share a server, and so do the tests of one worker."""
        assert breaker_prefix != unique_prefix()
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
        assert unique_prefix("shop").startswith("shop-gw7-")

    @pytest.fixture
    def project(self, tmp_path: Path) -> Callable[[str, str], str]:
        """Return a function that runs pytest on a project and returns its output."""

        def run(plugins: str, tests: str) -> str:
            (tmp_path / "conftest.py").write_text(f"pytest_plugins = {plugins}\n", encoding="utf-8")
            (tmp_path / "test_shop.py").write_text(tests, encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-p", "no:valkey", "-p", "no:cacheprovider", "-q", str(tmp_path)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr

        return run

    @pytest.mark.full
    def test_fixtures_are_available_only_on_request(self, project: Callable[[str, str], str]) -> None:
        """The installation of a package must not change the tests of an application."""
        test = "def test_it(memory_breakers, breaker_clock, breaker_prefix): pass\n"
        assert "1 passed" in project('["pybreaker_redis.fixtures"]', test)
        assert "fixture 'memory_breakers' not found" in project("[]", test)

    @pytest.mark.full
    def test_tests_of_the_page_run(self, project: Callable[[str, str], str]) -> None:
        """The tests that ``docs/howto/testing.rst`` shows are run as tests."""
        from tests.support.pages import blocks

        tests = [source for _, source in blocks("python", "docs/howto/testing.rst") if "(memory_breakers" in source]
        assert tests
        number = sum(source.count("\ndef test_") + source.startswith("def test_") for source in tests)
        assert f"{number} passed" in project('["pybreaker_redis.fixtures"]', "\n\n".join(tests))
