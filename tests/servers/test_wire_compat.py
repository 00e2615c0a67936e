"""Wire compatibility: stock workers share circuits with new workers, beside them, before them and after them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, STATES
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import (
    Fleet,
    Outcome,
    Spec,
    Worker,
    call,
    flood,
    operator,
    read_state,
    uncounted_failures,
    wait_until,
)
from tests.support.inspect import storage_of
from tests.support.selection import but_for
from tests.support.ways import settles_calls

pytestmark = pytest.mark.usefixtures("patient")

NAMESPACE = "fleet"

STOCK_KEYS = ["state", "fail_counter", "success_counter", "opened_at"]

#: Formats of the values. Stock reads the numbers with `int()`.
FORMATS = {
    "state": re.compile(rb"closed|open|half-open"),
    "fail_counter": re.compile(rb"0|[1-9][0-9]*"),
    "success_counter": re.compile(rb"0|[1-9][0-9]*"),
    "opened_at": re.compile(rb"[1-9][0-9]{9}"),
}

MixedFleet = Callable[..., Fleet]


def key(name: str) -> str:
    """Return the circuit's key of that name."""
    return f"{NAMESPACE}:pybreaker:{name}"


def values(client: redis.Redis) -> dict[str, bytes]:
    """Return the existing values of stock's keys."""
    raw = client.mget([key(name) for name in STOCK_KEYS])
    return {name: value for name, value in zip(STOCK_KEYS, raw, strict=True) if value is not None}


def assert_stock_can_parse(found: dict[str, bytes]) -> None:
    """Assert that stock could have written every value."""
    for name, value in found.items():
        assert FORMATS[name].fullmatch(value), (name, value)


@pytest.fixture
def mixed(server: PrivateServer, tmp_path: Path) -> MixedFleet:
    """Return a factory of mixed fleets: ``mixed("stock", "ours", reset_timeout=1.0)``."""

    def build(*makes: str, **words: Any) -> Fleet:
        # Writes of stock workers are noticed with the next read or within `max_staleness`. Here, they must be noticed
        # at once.
        words = {"max_staleness": 0, **words}
        spec = {"place": server.unix_socket, "log": str(tmp_path / "calls"), "namespace": NAMESPACE, **words}
        return Fleet(Spec(make=make, **spec) for make in makes)

    return build


def stock(client: redis.Redis, state: str = CLOSED, **words: Any) -> CircuitBreaker:
    """Return a breaker on stock's storage, as before a deployment or after a rollback."""
    storage = pybreaker.CircuitRedisStorage(state, client, NAMESPACE)
    return CircuitBreaker(**{"fail_max": 3, "reset_timeout": 60, "state_storage": storage, **words})


def ours(client: redis.Redis, state: str = CLOSED, **words: Any) -> CircuitBreaker:
    """Return a breaker on this package's storage."""
    lease = {"probe_lease": words.pop("probe_lease")} if "probe_lease" in words else {}
    storage = CircuitRedisStorage(state, client, NAMESPACE, max_staleness=0, **lease)
    return CircuitBreaker(**{"fail_max": 3, "reset_timeout": 60, "state_storage": storage, **words})


def fails(breaker: CircuitBreaker) -> None:
    """Make a call that fails."""
    with contextlib.suppress(ZeroDivisionError, CircuitBreakerError):
        breaker.call(lambda: 1 / 0)


def rejected(breaker: CircuitBreaker) -> bool:
    """Return whether a call is rejected."""
    try:
        breaker.call(lambda: None)
    except CircuitBreakerError:
        return True
    return False


both_ways = pytest.mark.parametrize(("one", "other"), [(stock, ours), (ours, stock)], ids=["stock-ours", "ours-stock"])

Make = Callable[..., CircuitBreaker]


def test_failures_of_old_and_new_processes_add_up(mixed: MixedFleet, shared: Any) -> None:
    """Failures of all workers add up in one counter."""
    with mixed("stock", "ours", "stock", "ours", fail_max=10**6) as fleet:
        assert fleet.run(uncounted_failures, 50) == [50] * 4
        assert shared.failures == 200
        assert shared.state == CLOSED
        # A success of either kind is a success for both.
        for worker in (0, 1):
            fleet[worker].run(call)
            assert shared.failures == 0
            fleet.run(uncounted_failures, 1)


@pytest.mark.parametrize("order", [("stock", "ours"), ("ours", "stock")], ids="-".join)
def test_trip_by_either_process_opens_both(mixed: MixedFleet, shared: Any, order: tuple[str, str]) -> None:
    """Workers of both kinds reach the threshold together, and the trip opens the circuit for all."""
    with mixed(*order, fail_max=4) as fleet:
        for _ in range(3):
            assert fleet[1].run(call, fail=True).error == "DependencyDown"
        assert fleet[0].run(call, fail=True).tripped
        assert shared.state == OPEN
        assert all(outcome.rejected for outcome in fleet.run(call))
        # A close by an operator on either side closes the circuit for both.
        fleet[1].run(operator, "close")
        assert [outcome.error for outcome in fleet.run(call)] == ["", ""]


@pytest.mark.parametrize("order", but_for([("stock", "ours")], [("stock", "ours"), ("ours", "stock")]), ids="-".join)
def test_recovery_by_either_process_closes_both(mixed: MixedFleet, shared: Any, order: tuple[str, str]) -> None:
    """The first call after the timeout is the trial, and its success closes the circuit for all."""
    with mixed(*order, fail_max=1, reset_timeout=2.0) as fleet:
        # Stock cuts the opening time to whole seconds, so late in a second its timeout may be over at once.
        time.sleep(1.05 - time.time() % 1)
        tripped: Outcome = fleet[0].run(call, fail=True)
        assert tripped.tripped
        assert fleet[1].run(call).rejected
        wait_until(tripped.ended + 2.1)
        assert fleet[1].run(call).error == ""
        assert shared.state == CLOSED
        assert fleet[0].run(call).error == ""
        assert shared.failures == 0


def test_stock_works_during_a_probe_of_a_new_worker(mixed: MixedFleet, shared: Any) -> None:
    """While a new worker probes, stock reads `half-open`, and works as always."""
    with mixed("ours", "stock", fail_max=1, reset_timeout=1.0) as fleet:
        tripped = fleet[0].run(call, fail=True)
        wait_until(tripped.ended + 1.1)
        inside, outcomes = fleet.hold(only=[fleet[0]])
        assert (len(inside), outcomes) == (1, [])
        assert shared.state == HALF_OPEN
        assert fleet[1].run(read_state) == HALF_OPEN
        assert fleet[1].run(call).error == ""
        assert shared.state == CLOSED
        # Stock has closed the circuit, so the late probe has no effect.
        assert [outcome.error for outcome in fleet.release(inside, success=False)] == ["DependencyDown"]
        assert (shared.state, shared.failures) == (CLOSED, 0)


def sample_flood(worker: Worker, until: float, **words: Any) -> tuple[int, list[str]]:
    """Make calls until a time, sample the keys, and return the calls and the errors, including unparsable values."""
    errors: list[str] = []
    made = 0
    while time.monotonic() < until:
        try:
            made += flood(worker, min(until, time.monotonic() + 0.02), **words)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what the test is about
            errors.append(repr(error))
        try:
            assert_stock_can_parse(values(worker.client))
        except AssertionError as error:
            errors.append(str(error))
    return made, errors


@pytest.mark.slow
def test_mixed_fleet_in_outages_writes_only_values_that_stock_can_parse(
    mixed: MixedFleet, shared: Any, report: Callable[[str], None]
) -> None:
    """Old and new workers go through outages, trips, probes and recoveries, without an error or an invalid value."""
    with mixed(
        "stock", "ours", "stock", "ours", "stock", "ours", fail_max=3, reset_timeout=0.3, max_staleness=1
    ) as fleet:
        begin = time.monotonic() + 0.3
        until = begin + 4.0
        dead = [(begin + at, begin + at + 0.5) for at in (0.3, 1.5, 2.7)]
        answers = fleet.run(sample_flood, until, at=begin, every=0.002, dead=dead, seconds=0.01)
        changes = fleet.transitions()
        generation = shared.generation
    assert [errors for _, errors in answers] == [[]] * 6
    assert {change.new for change in changes} == set(STATES), "the circuit was never in trouble"
    assert generation > 6
    report(
        f"mixed fleet: {sum(made for made, _ in answers)} calls, {generation} transitions, no value stock cannot parse"
    )


@both_ways
def test_closed_circuit_with_failures_is_continued(client: redis.Redis, one: Make, other: Make) -> None:
    """Two failures before the deployment and one after it make three."""
    before = one(client)
    fails(before)
    fails(before)
    after = other(client)
    assert (after.current_state, after.fail_counter) == (CLOSED, 2)
    fails(after)
    assert after.current_state == OPEN


@both_ways
def test_open_circuit_is_continued_with_its_time(client: redis.Redis, one: Make, other: Make) -> None:
    """The circuit stays open for the rest of the timeout, to within a second of rounding."""
    before = one(client, fail_max=1, reset_timeout=2.0)
    tripped = time.monotonic()
    fails(before)
    after = other(client, reset_timeout=2.0)
    assert after.current_state == OPEN
    assert rejected(after)
    assert abs((storage_of(after).opened_at - storage_of(before).opened_at).total_seconds()) < 2
    while rejected(after):
        assert time.monotonic() - tripped < 5
        time.sleep(0.01)
    assert time.monotonic() - tripped > 1.0
    assert after.current_state == CLOSED


def test_opening_time_of_stock_is_read_in_whole_seconds(client: redis.Redis) -> None:
    """The format of stock has whole seconds only."""
    before = stock(client, fail_max=1)
    fails(before)
    after = ours(client)
    raw = int(client.get(key("opened_at")))
    # The local clock shows the time, and its offset to the server is a measurement. Each answer improves the
    # measurement.
    assert min(abs(storage_of(after).opened_at.timestamp() - raw) for _ in range(5)) < 0.1
    assert storage_of(before).opened_at.timestamp() == raw


@both_ways
def test_half_open_circuit_is_continued_and_closed_by_the_next_success(
    client: redis.Redis, one: Make, other: Make
) -> None:
    """Successes from before the deployment count after it."""
    before = one(client, fail_max=1, reset_timeout=0.05, success_threshold=2)
    fails(before)
    time.sleep(0.1)
    assert not rejected(before)
    assert (client.get(key("state")), client.get(key("success_counter"))) == (b"half-open", b"1")
    if other is ours:
        # The probe of stock has no lease, so the probe is free.
        after = other(client, reset_timeout=0.05, success_threshold=2)
        assert not rejected(after)
    else:
        after = other(client, success_threshold=2)
        assert not rejected(after)
    assert after.current_state == CLOSED
    assert client.get(key("state")) == b"closed"


@pytest.mark.parametrize("success", [True, False])
def test_half_open_circuit_with_a_killed_prober_works_under_stock(
    mixed: MixedFleet, client: redis.Redis, success: bool
) -> None:
    """After a rollback in the middle of a probe, stock makes the trial itself."""
    with mixed("ours", fail_max=1, reset_timeout=0.2) as fleet:
        tripped = fleet[0].run(call, fail=True)
        wait_until(tripped.ended + 0.25)
        fleet.hold()
        fleet[0].kill()
    assert client.get(key("state")) == b"half-open"
    after = stock(client)
    if success:
        assert not rejected(after)
    else:
        fails(after)
    assert after.current_state == (CLOSED if success else OPEN)
    assert rejected(after) is not success
    assert_stock_can_parse(values(client))


def test_probe_of_a_killed_stock_worker_is_claimed_by_a_new_worker(mixed: MixedFleet, client: redis.Redis) -> None:
    """Stock leaves a circuit half-open for ever and for every caller. Here, one caller gets the probe."""
    with mixed("stock", "ours", "ours", fail_max=1, reset_timeout=1.0) as fleet:
        tripped = fleet[0].run(call, fail=True)
        wait_until(tripped.ended + 1.1)
        inside, _ = fleet.hold(only=[fleet[0]])
        assert len(inside) == 1
        fleet[0].kill()
        assert client.get(key("state")) == b"half-open"
        inside, outcomes = fleet.hold(only=fleet.workers[1:])
        assert len(inside) == 1
        assert [outcome.rejected for outcome in outcomes] == [True]
        fleet.release(inside, success=True)
        assert [outcome.error for outcome in fleet.run(call, only=fleet.workers[1:])] == ["", ""]


def test_rollback_and_second_deployment_lose_nothing(client: redis.Redis) -> None:
    """Each version continues where the other stopped, and the old hash does no harm."""
    first = ours(client, fail_max=2)
    fails(first)
    fails(first)
    first.close()
    fails(first)
    generation = int(client.hget(key("circuit"), "generation"))

    rolled_back = stock(client, fail_max=2)
    assert (rolled_back.current_state, rolled_back.fail_counter) == (CLOSED, 1)
    fails(rolled_back)
    assert rolled_back.current_state == OPEN
    assert rejected(rolled_back)

    again = ours(client, fail_max=2)
    assert again.current_state == OPEN
    assert rejected(again)
    assert again.fail_counter == 2
    assert int(client.hget(key("circuit"), "generation")) == generation + 1
    again.close()
    assert stock(client).current_state == CLOSED


def test_call_admitted_before_transitions_by_stock_changes_nothing_after_them(client: redis.Redis) -> None:
    """Stock has no generations. Once a new worker has read its transitions, late results are fenced."""
    own, theirs, watcher = ours(client, fail_max=1), stock(client, fail_max=1), ours(client)

    def while_stock_trips_and_closes() -> None:
        fails(theirs)
        assert watcher.current_state == OPEN
        theirs.close()
        assert watcher.current_state == CLOSED
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        own.call(while_stock_trips_and_closes)
    assert (client.get(key("state")), client.get(key("fail_counter"))) == (b"closed", b"0")
    assert client.hget(key("circuit"), "generation") == b"2"


@pytest.fixture(params=["lua", "fakeredis"])
def some_client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return a client of a real server, and one of fakeredis, which applications use in tests."""
    if request.param == "lua":
        yield request.getfixturevalue("client")
    else:
        import fakeredis

        yield fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())


def test_circuit_below_the_threshold_has_exactly_the_keys_of_stock(some_client: Any) -> None:
    """A circuit below the threshold has three keys, with the values that stock would write."""
    breaker = ours(some_client)
    assert breaker.current_state == CLOSED
    expected = {key(name).encode(): b"0" for name in ("fail_counter", "success_counter")}
    expected[key("state").encode()] = b"closed"

    def stored() -> dict[bytes, bytes]:
        return {name: some_client.get(name) for name in some_client.keys("*")}

    assert stored() == expected
    breaker.call(lambda: None)
    assert stored() == expected
    fails(breaker)
    # With push, the hash holds the time until which successes are reported.
    noise = some_client.hget(key("circuit"), "noisy_until_ms")
    some_client.delete(key("circuit"))
    assert stored() == {**expected, key("fail_counter").encode(): b"1"}
    assert (noise is None) is isinstance(some_client, fakeredis.FakeStrictRedis)
    breaker.call(lambda: None)
    assert stored() == expected
    some_client.flushall()
    stock(some_client)
    assert stored() == expected


def test_tripped_circuit_has_one_key_more_than_stock(some_client: Any) -> None:
    """One hash holds everything that the keys of stock cannot express."""
    fails(ours(some_client, fail_max=1))
    assert sorted(some_client.keys("*")) == sorted(key(name).encode() for name in [*STOCK_KEYS, "circuit"])
    assert_stock_can_parse(values(some_client))


@pytest.mark.parametrize("state", STATES)
def test_circuit_created_in_any_state_is_readable_for_stock(some_client: Any, state: str) -> None:
    """Stock can read a circuit that was only read here."""
    assert ours(some_client, state).current_state == state
    assert_stock_can_parse(values(some_client))
    breaker = stock(some_client)
    assert breaker.current_state == state
    assert rejected(breaker) is (state == OPEN)


@pytest.mark.parametrize("state", STATES)
def test_circuit_created_by_stock_in_any_state_is_readable_here(some_client: Any, state: str) -> None:
    """A circuit that stock created open without a time is open from now on. Half-open admits one call.

    The unmodified breaker would admit every call of a half-open circuit, so its storage shows the circuit open.
    """
    stock(some_client, state)
    breaker = ours(some_client)
    shown = HALF_OPEN if settles_calls(breaker) else OPEN
    assert breaker.current_state == (shown if state == HALF_OPEN else state)
    assert rejected(breaker) is (state == OPEN)
    assert_stock_can_parse(values(some_client))


@pytest.mark.parametrize("namespace", [None, "payments", "a:b", "{tagged}"])
def test_names_of_keys_are_those_of_stock(client: redis.Redis, namespace: str | None) -> None:
    """Both find the same circuit, whatever the namespace."""
    CircuitBreaker(state_storage=pybreaker.CircuitRedisStorage(CLOSED, client, namespace))
    theirs = sorted(client.keys("*"))
    client.flushall()
    assert CircuitBreaker(state_storage=CircuitRedisStorage(CLOSED, client, namespace)).current_state == CLOSED
    assert sorted(client.keys("*")) == theirs


def test_circuit_opened_with_redis_cli_is_open_from_now_on(client: redis.Redis) -> None:
    """An operator that sets only the state means now, and not the time of the last outage."""
    breaker = CircuitBreaker(reset_timeout=60, state_storage=CircuitRedisStorage("closed", client, "shop"))
    breaker.open()
    breaker.close()
    yesterday = int(time.time()) - 86_400
    client.set("shop:pybreaker:opened_at", yesterday)
    client.hset("shop:pybreaker:circuit", "opened_at_ms", yesterday * 1000)
    assert breaker.current_state == "closed"
    client.set("shop:pybreaker:state", "open")
    with pytest.raises(CircuitBreakerError):
        breaker.call(lambda: None)
    assert int(client.get("shop:pybreaker:opened_at")) > yesterday + 86_000
