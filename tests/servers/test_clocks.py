"""Clocks: records hold the time of the server, the interface that of the caller. No wrong clock blocks a circuit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis
import time_machine
from freezegun import freeze_time
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis._model.intents import ClaimProbe
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import down
from tests.support.fleet import call, call_when_admitted, wait_until
from tests.support.inspect import execute_intent, storage_of, view_of

pytestmark = pytest.mark.usefixtures("patient")

UTC = timezone.utc

RESET_TIMEOUT_S = 60.0

#: Times at which tests freeze the local clock: whole seconds, and fractions that milliseconds cannot hold.
INSTANTS = [
    datetime(2030, 1, 1, tzinfo=UTC),
    datetime(2030, 1, 1, 12, 30, 15, 999_999, tzinfo=UTC),
    datetime(2001, 2, 3, 4, 5, 6, 500, tzinfo=UTC),
    None,  # the present time
]

MakeStorage = Callable[[], Any]


def trip(breaker: CircuitBreaker) -> None:
    """Make a call that opens the circuit."""
    with pytest.raises(CircuitBreakerError, match="opened"):
        breaker.call(down)


def rejected(breaker: CircuitBreaker) -> bool:
    """Return whether a call is rejected."""
    try:
        breaker.call(lambda: None)
    except CircuitBreakerError:
        return True
    return False


@pytest.fixture(params=["server", "fakeredis", "memory", "reference"])
def make_storage(request: pytest.FixtureRequest) -> Iterator[MakeStorage]:
    """Yield a factory of storages of one circuit, on each engine. pybreaker's memory storage is the reference."""
    if request.param == "server":
        client = request.getfixturevalue("client")
        yield lambda: CircuitRedisStorage("closed", client, "clocks", max_staleness=0, timeout=10)
    elif request.param == "fakeredis":
        fake_server = fakeredis.FakeServer()
        yield lambda: CircuitRedisStorage(
            "closed", fakeredis.FakeStrictRedis(server=fake_server), "clocks", max_staleness=0, timeout=10
        )
    elif request.param == "memory":
        yield lambda: CircuitMemoryStorage("closed")
    else:
        yield lambda: pybreaker.CircuitMemoryStorage("closed")


@pytest.fixture
def redis_storage(client: redis.Redis) -> MakeStorage:
    """Return a factory of storages of one circuit on a real server."""
    return lambda: CircuitRedisStorage("closed", client, "clocks", max_staleness=0, timeout=10)


class MovableClock:
    """Local clock that a test can move."""

    def __init__(self, move: Callable[[float], Any]) -> None:
        self.move = move


@contextlib.contextmanager
def _freezegun(at: datetime | None) -> Iterator[MovableClock]:
    with freeze_time(at) if at else freeze_time() as frozen:
        yield MovableClock(lambda seconds: frozen.tick(timedelta(seconds=seconds)))


@contextlib.contextmanager
def _time_machine(at: datetime | None) -> Iterator[MovableClock]:
    with time_machine.travel(at or datetime.now(UTC), tick=False) as travelled:
        yield MovableClock(travelled.shift)


@pytest.fixture(params=[_freezegun, _time_machine], ids=["freezegun", "time-machine"])
def local_clock(request: pytest.FixtureRequest) -> Callable[[datetime | None], AbstractContextManager[MovableClock]]:
    """Return both libraries with which applications' tests stop and move the local clock."""
    moved: Callable[[datetime | None], AbstractContextManager[MovableClock]] = request.param
    return moved


@pytest.mark.parametrize("at", INSTANTS, ids=str)
@pytest.mark.parametrize("more", [0.0, 0.001, 3600.0])
def test_clock_moved_past_the_timeout_admits_the_next_call(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None, more: float
) -> None:
    """A test that moves its clock by at least `reset_timeout` sees the circuit recover."""
    with local_clock(at) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=make_storage())
        trip(breaker)
        assert rejected(breaker)
        clock.move(RESET_TIMEOUT_S + more)
        assert not rejected(breaker)
        assert breaker.current_state == "closed"


@pytest.mark.parametrize("at", INSTANTS, ids=str)
def test_clock_moved_short_of_the_timeout_admits_no_call(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None
) -> None:
    """No call is admitted a millisecond early, in any number of steps."""
    with local_clock(at) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=make_storage())
        trip(breaker)
        for step in (RESET_TIMEOUT_S / 2, RESET_TIMEOUT_S / 2 - 0.001):
            clock.move(step)
            assert rejected(breaker)
            assert breaker.state.name == "open"
        clock.move(0.001)
        assert not rejected(breaker)


@pytest.mark.parametrize("at", INSTANTS, ids=str)
def test_opening_time_under_a_frozen_clock_is_the_instant_of_the_trip(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None
) -> None:
    """The property `opened_at` is the caller's time to the microsecond, and not the server's."""
    with local_clock(at):
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=make_storage())
        trip(breaker)
        assert storage_of(breaker).opened_at == datetime.now(UTC)


def test_second_trip_under_a_moved_clock_starts_the_timeout_again(make_storage: MakeStorage, local_clock: Any) -> None:
    """The probe fails a minute later, and the reset timeout starts again."""
    with local_clock(INSTANTS[0]) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=make_storage())
        trip(breaker)
        clock.move(RESET_TIMEOUT_S)
        trip(breaker)
        assert rejected(breaker)
        clock.move(RESET_TIMEOUT_S - 0.001)
        assert rejected(breaker)
        clock.move(0.001)
        assert not rejected(breaker)


def test_clock_moved_between_probes_of_a_threshold_changes_nothing(make_storage: MakeStorage, local_clock: Any) -> None:
    """While successes are collected, no timeout runs."""
    with local_clock(INSTANTS[0]) as clock:
        storage = make_storage()
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, success_threshold=3, state_storage=storage)
        trip(breaker)
        clock.move(RESET_TIMEOUT_S)
        for state in ("half-open", "half-open", "closed"):
            assert not rejected(breaker)
            assert breaker.current_state == state
            clock.move(1)


@pytest.mark.parametrize("back", [60.0, 3600.0])
def test_local_clock_set_back_does_not_prolong_the_lease_of_a_dead_prober_in_memory(back: float) -> None:
    """A local circuit uses the local clock, and no lease has more time left than its length."""
    with time_machine.travel(NOON, tick=False) as clock:
        storage = CircuitMemoryStorage("closed", probe_lease=30)
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=storage)
        trip(breaker)
        clock.shift(RESET_TIMEOUT_S)
        assert execute_intent(storage, ClaimProbe(1, "a0", 30_000)).accepted
        clock.shift(-back)
        assert rejected(breaker)
        clock.shift(29.9)
        assert rejected(breaker)
        clock.shift(0.1)
        assert not rejected(breaker)


def test_clock_frozen_after_the_trip_and_moved_admits_the_next_call(
    make_storage: MakeStorage, local_clock: Any
) -> None:
    """Many tests trip first, and move the clock afterwards."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT_S, state_storage=make_storage())
    trip(breaker)
    assert rejected(breaker)
    with local_clock(datetime.now(UTC) + timedelta(seconds=RESET_TIMEOUT_S + 1)):
        assert not rejected(breaker)


#: One instant, written in several ways.
NOON = datetime(2020, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
WRITTEN_INSTANTS = [
    NOON,
    NOON.replace(tzinfo=None),
    NOON.astimezone(timezone(timedelta(hours=5, minutes=30))),
    NOON.astimezone(timezone(-timedelta(hours=9, minutes=30))),
    NOON.astimezone(timezone(timedelta(hours=14))),
]


@pytest.fixture
def host_in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the time zone of the host to one other than UTC."""
    monkeypatch.setenv("TZ", "JST-9")  # written as an offset: not every machine has a list of zones
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("host_in_tokyo")
@pytest.mark.parametrize("written", WRITTEN_INSTANTS, ids=str)
@pytest.mark.parametrize("make_storage", ["server", "fakeredis", "memory"], indirect=True)
def test_one_instant_in_any_zone_is_one_instant(make_storage: MakeStorage, written: datetime) -> None:
    """The zone of an aware datetime counts. A naive datetime is UTC, as with pybreaker."""
    storage = make_storage()
    storage.opened_at = written
    read = storage.opened_at
    if storage.name == "memory" and written.tzinfo is None:
        assert read == written, "pybreaker's own class reads the value back unchanged, too"
        read = read.replace(tzinfo=UTC)
    assert read.tzinfo == UTC
    assert abs(read - NOON) <= timedelta(milliseconds=1)


def test_time_of_another_zone_is_stored_wrong_by_stock_only(client: redis.Redis) -> None:
    """Half past five in Delhi is noon in Greenwich."""
    delhi = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
    stock = pybreaker.CircuitRedisStorage("closed", client, "stock")
    stock.opened_at = delhi
    assert stock.opened_at - NOON.replace(microsecond=0) == timedelta(seconds=19_800)
    CircuitRedisStorage("closed", client, "ours", max_staleness=0).opened_at = delhi
    assert abs(int(client.get("ours:pybreaker:opened_at")) - NOON.timestamp()) < 2


@pytest.mark.parametrize(
    ("make_storage", "noon"),
    [
        *(("memory", noon) for noon in (1_590_000_000, "noon")),
        *((place, noon) for place in ("server", "fakeredis") for noon in (1_590_000_000, None, "noon")),
    ],
    indirect=["make_storage"],
)
def test_opened_at_that_is_no_datetime_is_refused_at_once(make_storage: MakeStorage, noon: Any) -> None:
    """The error is raised by the assignment."""
    storage = make_storage()
    with pytest.raises(TypeError, match="opened_at must be a datetime"):
        storage.opened_at = noon


@pytest.mark.parametrize("fraction", [0, 1, 499, 500, 999_499, 999_500, 999_999])
@pytest.mark.parametrize("make_storage", ["server", "fakeredis"], indirect=True)
def test_direct_opening_time_with_any_fraction_causes_no_transition(make_storage: MakeStorage, fraction: int) -> None:
    """Seconds and milliseconds of one instant must agree, because a difference would look like a foreign transition."""
    storage = make_storage()
    storage.opened_at = NOON.replace(microsecond=fraction)
    storage.state = "open"
    first = storage.opened_at
    generation = view_of(storage).cached.generation
    assert abs(first - NOON.replace(microsecond=fraction)) < timedelta(milliseconds=1.001)
    for _ in range(3):
        assert storage.opened_at == first
    assert view_of(storage).cached.generation == generation == 1


def test_opening_time_has_milliseconds_here_and_whole_seconds_for_stock(client: redis.Redis) -> None:
    """Half a second is exact, and stock reads whole seconds with `int()`."""
    storage = CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    opened = set()
    for _ in range(5):
        before = datetime.now(UTC)
        trip(breaker)
        after = datetime.now(UTC)
        millisecond = timedelta(milliseconds=1)
        assert before - millisecond <= storage.opened_at <= after + millisecond
        opened.add(storage.opened_at.microsecond)
        raw = client.get("clocks:pybreaker:opened_at")
        assert raw.isdigit()
        stock = pybreaker.CircuitRedisStorage("closed", client, "clocks")
        assert int(raw) == int(client.hget("clocks:pybreaker:circuit", "opened_at_ms")) // 1000
        assert stock.opened_at.timestamp() == int(raw)
        breaker.close()
        time.sleep(0.003)
    assert len(opened) > 1, "every trip had the same fraction of a second"


def test_opening_time_of_an_open_circuit_only_moves_forward(redis_storage: MakeStorage) -> None:
    """A late write with an earlier time admits no probe early. A time in the future does not keep the circuit open."""
    storage = redis_storage()
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    trip(breaker)
    opened_at = storage.opened_at
    storage.opened_at = opened_at - timedelta(seconds=50)
    assert storage.opened_at == opened_at
    storage.opened_at = datetime.now(UTC) + timedelta(hours=1)
    assert opened_at < storage.opened_at <= datetime.now(UTC) + timedelta(seconds=1)
    breaker.close()
    storage.opened_at = opened_at - timedelta(seconds=50)
    assert abs(storage.opened_at - opened_at + timedelta(seconds=50)) < timedelta(milliseconds=1.001)


def test_each_host_reads_the_opening_time_by_its_own_clock(client: redis.Redis) -> None:
    """On two hosts with clocks that differ by a day, one instant has two times, each right by the host's clock."""
    here = CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
    trip(CircuitBreaker(fail_max=1, state_storage=here))
    with time_machine.travel(datetime.now(UTC) + timedelta(days=1), tick=True):
        there = CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
        difference = there.opened_at - here.opened_at
    assert abs(difference - timedelta(days=1)) < timedelta(seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["ours"])
@pytest.mark.parametrize("skew", [3600.0, -3600.0])
def test_host_an_hour_off_waits_exactly_the_timeout_and_blocks_no_other(fleet_of: Any, skew: float) -> None:
    """The reset timeout has its length by any clock, whichever host trips and whichever waits."""
    for tripper in (0, 1):
        with fleet_of(2, fail_max=1, reset_timeout=1.0, clock_skew=[skew, 0.0], namespace=f"skew{tripper}") as fleet:
            opened = fleet[tripper].run(call, fail=True)
            # A call that a busy machine delays beyond the timeout may be the trial.
            wait_until(opened.began + 0.6)
            assert all(outcome.rejected for outcome in fleet.run(call) if outcome.ended < opened.began + 1.0)
            wait_until(opened.ended + 1.1)
            # One worker makes the trial, and the other reads its success.
            assert not fleet[1 - tripper].run(call_when_admitted, 1.0).rejected
            assert not fleet[tripper].run(call_when_admitted, 1.0).rejected


def test_stock_host_an_hour_ahead_cannot_keep_a_circuit_open(client: redis.Redis) -> None:
    """In a mixed fleet, the wrong clock of a stock worker costs at most one `reset_timeout`."""
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=1), tick=True):
        trip(CircuitBreaker(fail_max=1, state_storage=pybreaker.CircuitRedisStorage("closed", client, "clocks")))
    breaker = CircuitBreaker(
        reset_timeout=0.3, state_storage=CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
    )
    before = time.monotonic()
    while rejected(breaker):
        assert time.monotonic() - before < 5
        time.sleep(0.01)
    assert time.monotonic() - before >= 0.3


def test_reset_timeout_below_a_second_is_exact(every_server: PrivateServer) -> None:
    """Of ten recoveries, none is early. With stock, some take next to no time."""
    with contextlib.closing(every_server.client()) as client:
        breaker = CircuitBreaker(
            fail_max=1,
            reset_timeout=0.15,
            state_storage=CircuitRedisStorage("closed", client, "clocks", max_staleness=0),
        )
        waited = []
        for _ in range(10):
            before = time.monotonic()
            trip(breaker)
            while rejected(breaker):
                time.sleep(0.001)
            waited.append(time.monotonic() - before)
    assert min(waited) >= 0.15
    # Half of the recoveries are not much later, on a machine that does other things.
    assert sorted(waited)[5] < 0.5


@pytest.mark.slow
def test_reset_timeout_below_a_second_is_often_cut_by_stock(client: redis.Redis) -> None:
    """The measurement above can fail, because stock cuts the opening time to whole seconds."""
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=0.5, state_storage=pybreaker.CircuitRedisStorage("closed", client, "clocks")
    )
    for _ in range(5):
        # In the last part of a second, the cut exceeds the timeout. A busy machine may sleep into the next second.
        time.sleep((0.6 - time.time()) % 1)
        trip(breaker)
        if not rejected(breaker):
            return
        breaker.close()
    pytest.fail("stock waits for the whole timeout")
