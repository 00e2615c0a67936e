"""Whose time is it: the server's inside, the caller's at the interface, and nobody's clock can hold the gate."""

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
from tests.support.fleet import call, call_when_admitted, wait_until

pytestmark = pytest.mark.usefixtures("patient")

UTC = timezone.utc

RESET_TIMEOUT = 60.0

#: Instants at which tests freeze the local clock: whole, with fractions that a server's milliseconds cannot hold.
INSTANTS = [
    datetime(2030, 1, 1, tzinfo=UTC),
    datetime(2030, 1, 1, 12, 30, 15, 999_999, tzinfo=UTC),
    datetime(2001, 2, 3, 4, 5, 6, 500, tzinfo=UTC),
    None,  # whatever time it is
]

MakeStorage = Callable[[], Any]


class Down(Exception):
    """The dependency is down."""


def down() -> None:
    """The dependency is down."""
    raise Down


def trip(breaker: CircuitBreaker) -> None:
    """A call that opens the circuit."""
    with pytest.raises(CircuitBreakerError, match="opened"):
        breaker.call(down)


def rejected(breaker: CircuitBreaker) -> bool:
    """Whether a call is refused."""
    try:
        breaker.call(lambda: None)
    except CircuitBreakerError:
        return True
    return False


@pytest.fixture(params=["server", "fakeredis", "memory", "reference"])
def make_storage(request: pytest.FixtureRequest) -> Iterator[MakeStorage]:
    """Storages of one circuit on each kind of carrier; pybreaker's own in memory is the reference."""
    if request.param == "server":
        client = request.getfixturevalue("client")
        yield lambda: CircuitRedisStorage("closed", client, "clocks", max_staleness=0, timeout=10)
    elif request.param == "fakeredis":
        home = fakeredis.FakeServer()
        yield lambda: CircuitRedisStorage(
            "closed", fakeredis.FakeStrictRedis(server=home), "clocks", max_staleness=0, timeout=10
        )
    elif request.param == "memory":
        yield lambda: CircuitMemoryStorage("closed")
    else:
        yield lambda: pybreaker.CircuitMemoryStorage("closed")


@pytest.fixture
def redis_storage(client: redis.Redis) -> MakeStorage:
    """Storages of one circuit on a real server."""
    return lambda: CircuitRedisStorage("closed", client, "clocks", max_staleness=0, timeout=10)


class Hand:
    """On the local clock: moves it."""

    def __init__(self, move: Callable[[float], Any]) -> None:
        self.move = move


@contextlib.contextmanager
def _freezegun(at: datetime | None) -> Iterator[Hand]:
    with freeze_time(at) if at else freeze_time() as frozen:
        yield Hand(lambda seconds: frozen.tick(timedelta(seconds=seconds)))


@contextlib.contextmanager
def _time_machine(at: datetime | None) -> Iterator[Hand]:
    with time_machine.travel(at or datetime.now(UTC), tick=False) as traveller:
        yield Hand(traveller.shift)


@pytest.fixture(params=[_freezegun, _time_machine], ids=["freezegun", "time-machine"])
def local_clock(request: pytest.FixtureRequest) -> Callable[[datetime | None], AbstractContextManager[Hand]]:
    """Both libraries with which users' tests stop and move the local clock."""
    moved: Callable[[datetime | None], AbstractContextManager[Hand]] = request.param
    return moved


# -- users' tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", INSTANTS, ids=str)
@pytest.mark.parametrize("more", [0.0, 0.001, 3600.0])
def test_clock_moved_past_the_timeout_lets_the_next_call_through(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None, more: float
) -> None:
    """A user's test that moves its clock by exactly `reset_timeout`, or more, sees the circuit recover."""
    with local_clock(at) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=make_storage())
        trip(breaker)
        assert rejected(breaker)
        clock.move(RESET_TIMEOUT + more)
        assert not rejected(breaker)
        assert breaker.current_state == "closed"


@pytest.mark.parametrize("at", INSTANTS, ids=str)
def test_clock_moved_short_of_the_timeout_lets_nothing_through(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None
) -> None:
    """Not a millisecond early, in however many steps."""
    with local_clock(at) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=make_storage())
        trip(breaker)
        for step in (RESET_TIMEOUT / 2, RESET_TIMEOUT / 2 - 0.001):
            clock.move(step)
            assert rejected(breaker)
            assert breaker.state.name == "open"
        clock.move(0.001)
        assert not rejected(breaker)


@pytest.mark.parametrize("at", INSTANTS, ids=str)
def test_frozen_clock_reads_back_the_instant_of_the_trip(
    make_storage: MakeStorage, local_clock: Any, at: datetime | None
) -> None:
    """`opened_at` is the caller's time, to the microsecond, and not the server's."""
    with local_clock(at):
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=make_storage())
        trip(breaker)
        assert breaker._state_storage.opened_at == datetime.now(UTC)


def test_second_trip_under_a_moved_clock_waits_from_then_on(make_storage: MakeStorage, local_clock: Any) -> None:
    """The probe failed a minute later: the timeout begins again at that instant."""
    with local_clock(INSTANTS[0]) as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=make_storage())
        trip(breaker)
        clock.move(RESET_TIMEOUT)
        trip(breaker)
        assert rejected(breaker)
        clock.move(RESET_TIMEOUT - 0.001)
        assert rejected(breaker)
        clock.move(0.001)
        assert not rejected(breaker)


def test_clock_moved_between_probes_of_a_threshold_changes_nothing(make_storage: MakeStorage, local_clock: Any) -> None:
    """While successes are collected nobody waits for anything."""
    with local_clock(INSTANTS[0]) as clock:
        storage = make_storage()
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, success_threshold=3, state_storage=storage)
        trip(breaker)
        clock.move(RESET_TIMEOUT)
        for state in ("half-open", "half-open", "closed"):
            assert not rejected(breaker)
            assert breaker.current_state == state
            clock.move(1)


@pytest.mark.parametrize("back", [60.0, 3600.0])
def test_local_clock_set_back_does_not_prolong_the_lease_of_a_dead_prober_in_memory(back: float) -> None:
    """A circuit of one process goes by the local clock, and a lease has never more left than its length."""
    with time_machine.travel(NOON, tick=False) as clock:
        storage = CircuitMemoryStorage("closed", probe_lease=30)
        breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=storage)
        trip(breaker)
        clock.shift(RESET_TIMEOUT)
        assert storage._core.carry_out(ClaimProbe(1, "a0", 30_000)).accepted
        clock.shift(-back)
        assert rejected(breaker)
        clock.shift(29.9)
        assert rejected(breaker)
        clock.shift(0.1)
        assert not rejected(breaker)


def test_clock_frozen_after_the_trip_and_moved_lets_the_next_call_through(
    make_storage: MakeStorage, local_clock: Any
) -> None:
    """Many tests trip first, and only then travel into the future."""
    breaker = CircuitBreaker(fail_max=1, reset_timeout=RESET_TIMEOUT, state_storage=make_storage())
    trip(breaker)
    assert rejected(breaker)
    with local_clock(datetime.now(UTC) + timedelta(seconds=RESET_TIMEOUT + 1)):
        assert not rejected(breaker)


# -- the interface -----------------------------------------------------------------------------------------------------

#: One instant in several spellings.
NOON = datetime(2020, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
SPELLINGS = [
    NOON,
    NOON.replace(tzinfo=None),
    NOON.astimezone(timezone(timedelta(hours=5, minutes=30))),
    NOON.astimezone(timezone(-timedelta(hours=9, minutes=30))),
    NOON.astimezone(timezone(timedelta(hours=14))),
]


@pytest.fixture
def host_in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's own time zone is not UTC."""
    monkeypatch.setenv("TZ", "JST-9")  # spelled out: not every machine has a list of zones
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("host_in_tokyo")
@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
@pytest.mark.parametrize("make_storage", ["server", "fakeredis", "memory"], indirect=True)
def test_one_instant_in_any_zone_is_one_instant(make_storage: MakeStorage, spelling: datetime) -> None:
    """An aware datetime means what it says; a naive one is taken as UTC, as pybreaker itself has it."""
    storage = make_storage()
    storage.opened_at = spelling
    read = storage.opened_at
    if storage.name == "memory" and spelling.tzinfo is None:
        assert read == spelling, "it is read as it was set, as pybreaker's own class has it"
        read = read.replace(tzinfo=UTC)
    assert read.tzinfo == UTC
    assert abs(read - NOON) <= timedelta(milliseconds=1)


def test_foreign_zone_is_stored_off_by_stock_and_right_by_ours(client: redis.Redis) -> None:
    """Half past five in Delhi is noon at Greenwich."""
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
    """A wrong argument is named where it is made."""
    storage = make_storage()
    with pytest.raises(TypeError, match="opened_at must be a datetime"):
        storage.opened_at = noon


@pytest.mark.parametrize("fraction", [0, 1, 499, 500, 999_499, 999_500, 999_999])
@pytest.mark.parametrize("make_storage", ["server", "fakeredis"], indirect=True)
def test_time_said_by_hand_with_any_fraction_moves_nothing_when_read_again(
    make_storage: MakeStorage, fraction: int
) -> None:
    """Seconds and milliseconds of one instant never disagree, or the circuit would seem moved by somebody else."""
    storage = make_storage()
    storage.opened_at = NOON.replace(microsecond=fraction)
    storage.state = "open"
    first = storage.opened_at
    generation = storage._core.shared._view.cached.generation
    assert abs(first - NOON.replace(microsecond=fraction)) < timedelta(milliseconds=1.001)
    for _ in range(3):
        assert storage.opened_at == first
    assert storage._core.shared._view.cached.generation == generation == 1


def test_opening_time_is_precise_for_ours_and_whole_seconds_for_stock(client: redis.Redis) -> None:
    """Half a second means half a second, and stock still reads with `int()`."""
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
    assert len(opened) > 1, "always the same fraction of a second"


def test_opening_time_moves_forward_only_within_an_open_spell(redis_storage: MakeStorage) -> None:
    """A straggler that says when it saw the circuit open cannot open the gate early, nor can it later hold it shut."""
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


def test_each_caller_reads_the_opening_time_by_their_own_clock(client: redis.Redis) -> None:
    """Two hosts whose clocks differ by a day say two times for one instant, each right where it is said."""
    here = CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
    trip(CircuitBreaker(fail_max=1, state_storage=here))
    with time_machine.travel(datetime.now(UTC) + timedelta(days=1), tick=True):
        there = CircuitRedisStorage("closed", client, "clocks", max_staleness=0)
        difference = there.opened_at - here.opened_at
    assert abs(difference - timedelta(days=1)) < timedelta(seconds=1)


# -- hosts with wrong clocks -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", ["ours"])
@pytest.mark.parametrize("skew", [3600.0, -3600.0])
def test_host_an_hour_off_waits_exactly_the_timeout_and_holds_nobody(fleet_of: Any, skew: float) -> None:
    """Whoever trips and whoever waits: `reset_timeout` by any clock is `reset_timeout`."""
    for tripper in (0, 1):
        with fleet_of(2, fail_max=1, reset_timeout=1.0, clock_skew=[skew, 0.0], namespace=f"skew{tripper}") as fleet:
            opened = fleet[tripper].run(call, fail=True)
            # Those that a busy machine delays beyond the timeout may be the first trial.
            wait_until(opened.began + 0.6)
            assert all(outcome.rejected for outcome in fleet.run(call) if outcome.ended < opened.began + 1.0)
            wait_until(opened.ended + 1.1)
            # The one makes the trial, the other hears of its success.
            assert not fleet[1 - tripper].run(call_when_admitted, 1.0).rejected
            assert not fleet[tripper].run(call_when_admitted, 1.0).rejected


def test_stock_host_an_hour_ahead_cannot_hold_ours_open(client: redis.Redis) -> None:
    """In a mixed fleet the wrong clock of a stock worker is worth `reset_timeout` at most."""
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


def test_half_a_second_is_half_a_second(every_server: PrivateServer) -> None:
    """Ten recoveries, each measured: none early, where stock may take next to none."""
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
    # Half of them not much later, on a machine that does other things.
    assert sorted(waited)[5] < 0.5


@pytest.mark.slow
def test_half_a_second_on_stock_is_often_less(client: redis.Redis) -> None:
    """What is measured above can fail: stock cuts the opening time to whole seconds."""
    breaker = CircuitBreaker(
        fail_max=1, reset_timeout=0.5, state_storage=pybreaker.CircuitRedisStorage("closed", client, "clocks")
    )
    for _ in range(5):
        # In the last part of a second the cut is larger than the timeout; a busy machine may sleep into the next one.
        time.sleep((0.6 - time.time()) % 1)
        trip(breaker)
        if not rejected(breaker):
            return
        breaker.close()
    pytest.fail("stock waits for the whole timeout")
