"""What pybreaker promises of its storages, and users rely on: the same scenarios on ours, under its own breaker."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import MethodType
from typing import Any

import fakeredis
import pybreaker
import pytest
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.inspect import lease_ms_of, storage_of

pytestmark = pytest.mark.usefixtures("patient")

MakeStorage = Callable[..., Any]
STATES = ("closed", "open", "half-open")


@pytest.fixture(params=["memory", "fakeredis", "server"])
def make_storage(request: pytest.FixtureRequest) -> Iterator[MakeStorage]:
    """Make a storage, of the same circuit each time if it is in Redis."""
    if request.param == "memory":
        yield CircuitMemoryStorage
        return
    if request.param == "fakeredis":
        client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    else:
        server: PrivateServer = request.getfixturevalue("server")
        client = server.client()
    yield lambda state, **words: CircuitRedisStorage(state, client, "interface", **words)
    client.close()


@pytest.fixture
def make(make_storage: MakeStorage) -> Callable[..., CircuitBreaker]:
    """Make a breaker on a new storage."""
    return lambda **words: CircuitBreaker(state_storage=make_storage("closed"), **words)


class Journal(CircuitBreakerListener):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        """Note that a call begins."""
        self.events.append("call")

    def failure(self, cb: Any, exc: BaseException) -> None:
        """Note that it failed."""
        self.events.append(type(exc).__name__)

    def success(self, cb: Any) -> None:
        """Note that it succeeded."""
        self.events.append("success")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Note from where to where."""
        self.events.append((old_state.name, new_state.name))


# -- calls and counts --------------------------------------------------------------------------------------------------


def test_counts_follow_the_outcomes_of_calls(make: Callable[..., CircuitBreaker]) -> None:
    """A failure counts and passes on, a success forgets."""
    breaker = make()
    for call, failures in ((up, 0), (down, 1), (down, 2), (up, 0), (down, 1)):
        if call is up:
            assert breaker.call(call) == up()
        else:
            with pytest.raises(Down):
                breaker.call(call)
        assert (breaker.fail_counter, breaker.current_state) == (failures, "closed")


@pytest.mark.parametrize("words", [{}, {"throw_new_error_on_trip": True}, {"throw_new_error_on_trip": False}])
def test_last_failure_opens_and_raises_what_was_asked_for(
    make: Callable[..., CircuitBreaker], words: dict[str, bool]
) -> None:
    """`throw_new_error_on_trip` decides about the call that trips, and about no other."""
    breaker = make(fail_max=3, **words)
    for _ in range(2):
        with pytest.raises(Down):
            breaker.call(down)
    with pytest.raises(CircuitBreakerError if words.get("throw_new_error_on_trip", True) else Down):
        breaker.call(down)
    assert (breaker.fail_counter, breaker.current_state) == (3, "open")
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert breaker.fail_counter == 3


def test_error_of_the_trip_shows_the_failure_behind_it(make: Callable[..., CircuitBreaker]) -> None:
    """A traceback says why the circuit has opened."""
    breaker = make(fail_max=1)
    with pytest.raises(CircuitBreakerError) as raised:
        breaker.call(down)
    assert "Down" in "".join(traceback.format_exception(raised.value))


def test_open_circuit_probes_when_its_timeout_is_over(make: Callable[..., CircuitBreaker]) -> None:
    """One call: its failure opens the circuit again, its success closes it."""
    journal = Journal()
    breaker = make(fail_max=1, reset_timeout=60, listeners=[journal])
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    breaker.reset_timeout = 0
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert (breaker.fail_counter, breaker.current_state) == (2, "open")
    assert breaker.call(up) == up()
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")
    assert [event for event in journal.events if isinstance(event, tuple)] == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


@pytest.mark.parametrize(("call", "state", "failures"), [(up, "closed", 0), (down, "open", 1)])
def test_half_open_by_hand_lets_the_next_call_decide(
    make: Callable[..., CircuitBreaker], call: Any, state: str, failures: int
) -> None:
    """Of the thread that half-opened it."""
    breaker = make()
    breaker.half_open()
    assert (breaker.fail_counter, breaker.current_state) == (0, "half-open")
    try:
        breaker.call(call)
    except CircuitBreakerError:
        assert call is down
    assert (breaker.fail_counter, breaker.current_state) == (failures, state)


def test_states_that_are_set_by_hand_are_told_to_listeners(make: Callable[..., CircuitBreaker]) -> None:
    """Each once, with the state before."""
    journal = Journal()
    breaker = make(listeners=[journal])
    breaker.open()
    assert breaker.current_state == "open"
    breaker.half_open()
    assert breaker.current_state == "half-open"
    breaker.close()
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert journal.events == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


def test_listeners_hear_of_each_call_once(make: Callable[..., CircuitBreaker]) -> None:
    """That it begins, and how it ends."""
    journal = Journal()
    breaker = make(listeners=[journal])
    breaker.call(up)
    with pytest.raises(Down):
        breaker.call(down)
    assert journal.events == ["call", "success", "call", "Down"]


def test_generator_is_a_call_until_its_end(make: Callable[..., CircuitBreaker]) -> None:
    """It fails or succeeds when it ends, not when it is made."""
    breaker = make()

    @breaker
    def numbers(fails: bool) -> Iterator[int]:
        yield 1
        if fails:
            raise Down

    with pytest.raises(Down):
        list(numbers(fails=True))
    assert breaker.fail_counter == 1
    assert list(numbers(fails=False)) == [1]
    assert breaker.fail_counter == 0


def test_block_is_a_call(make: Callable[..., CircuitBreaker]) -> None:
    """`calling` fails, trips, rejects and recovers as calls do."""
    breaker = make(fail_max=2, reset_timeout=60)
    ran = []

    def block(error: type[Exception] | None = None) -> None:
        with breaker.calling():
            ran.append(error)
            if error:
                raise error

    with pytest.raises(Down):
        block(Down)
    with pytest.raises(CircuitBreakerError):
        block(Down)
    assert (breaker.fail_counter, breaker.current_state) == (2, "open")
    with pytest.raises(CircuitBreakerError):
        block()
    assert ran == [Down, Down]
    breaker.reset_timeout = 0
    block()
    assert ran == [Down, Down, None]
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")


def test_threshold_takes_so_many_successes(make: Callable[..., CircuitBreaker]) -> None:
    """The circuit stays half-open until then, and a failure in between begins the count again."""
    breaker = make(fail_max=1, reset_timeout=60, success_threshold=2)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    breaker.reset_timeout = 0
    breaker.call(up)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert (breaker.current_state, breaker.success_counter) == ("open", 0)
    breaker.call(up)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    breaker.call(up)
    assert (breaker.current_state, breaker.success_counter) == ("closed", 0)


# -- storages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_making_a_breaker_changes_nothing(state: str) -> None:
    """A new worker joins a circuit as it is."""
    storage = CircuitMemoryStorage(state)
    storage.increment_counter()
    now = datetime.now()  # noqa: DTZ005
    storage.opened_at = now
    breaker = CircuitBreaker(state_storage=storage)
    assert (breaker.state.name, breaker.fail_counter, storage.opened_at) == (state, 1, now)


@pytest.mark.parametrize("zone", [None, timezone.utc, timezone(timedelta(hours=5, minutes=30))])
@pytest.mark.parametrize("microsecond", [0, 1, 499_999, 999_999])
def test_time_of_opening_is_read_as_it_was_set(zone: timezone | None, microsecond: int) -> None:
    """To the microsecond, and naive if it was."""
    storage = CircuitMemoryStorage("open")
    at = datetime(2026, 3, 29, 2, 30, 0, microsecond, tzinfo=zone)
    storage.opened_at = at
    assert storage.opened_at == at
    assert (storage.opened_at.tzinfo is None) is (zone is None)


def test_naive_time_of_opening_holds_the_gate_as_utc() -> None:
    """Pybreaker's comparison with an aware time does not fail in a guarded call."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    storage.opened_at = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=30)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    storage.opened_at -= timedelta(seconds=31)
    assert breaker.call(up) == up()


def test_time_of_opening_without_a_value_lets_the_next_call_probe() -> None:
    """As in pybreaker's own class, which begins without."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    storage.opened_at = None
    assert storage.opened_at is None
    assert breaker.call(up) == up()
    assert breaker.current_state == "closed"


def test_time_of_the_next_trip_replaces_the_one_that_was_set() -> None:
    """And is aware, as pybreaker sets it."""
    storage = CircuitMemoryStorage("closed")
    storage.opened_at = datetime(2020, 1, 1)  # noqa: DTZ001
    CircuitBreaker(state_storage=storage).open()
    assert abs(storage.opened_at - datetime.now(timezone.utc)) < timedelta(seconds=60)


def test_failures_may_be_set_under_the_name_that_pybreaker_has_for_them() -> None:
    """Tests that replace a breaker's `_inc_counter` do so; the breaker's lock makes it one step."""
    storage = CircuitMemoryStorage("closed")
    breaker = CircuitBreaker(fail_max=3000, state_storage=storage)

    def count(self: CircuitBreaker) -> None:
        counted = self._state_storage._fail_counter
        time.sleep(0.00005)
        self._state_storage._fail_counter = counted + 1

    breaker._inc_counter = MethodType(count, breaker)

    def fail() -> None:
        for _ in range(50):
            with pytest.raises(Down):
                breaker.call(down)

    threads = [threading.Thread(target=fail) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.fail_counter == storage._fail_counter == 150
    breaker.call(up)
    assert storage._fail_counter == 0


# -- copies ------------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda storage: pickle.loads(pickle.dumps(storage)),
}


class Named(CircuitMemoryStorage):
    """A storage with an attribute of its own."""

    def __init__(self, state: str, owner: str) -> None:
        self.owner = owner
        super().__init__(state, probe_lease=7)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("at", [None, datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=timezone.utc)])  # noqa: DTZ001
def test_copy_is_a_circuit_of_its_own(way: str, state: str, at: datetime | None) -> None:
    """It begins as the original is; then each goes its own way."""
    storage = Named(state, "shop")
    storage.increment_counter()
    storage.increment_counter()
    storage.increment_success_counter()
    storage.opened_at = at
    twin = COPIES[way](storage)
    assert type(twin) is Named
    assert (twin.owner, twin.name, lease_ms_of(twin)) == ("shop", "memory", 7000)
    assert (twin.state, twin.counter, twin.success_counter, twin.opened_at) == (state, 2, 1, at)
    storage.reset_counter()
    twin.increment_counter()
    assert (storage.counter, twin.counter) == (0, 3)
    breaker = CircuitBreaker(state_storage=twin)
    breaker.close()
    assert (breaker.call(up), twin.state, storage.state) == (up(), "closed", state)


@pytest.mark.parametrize("way", COPIES)
def test_copy_of_a_probed_circuit_can_be_probed(way: str) -> None:
    """The probe that is under way is the original's."""
    breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitMemoryStorage("open"))
    with breaker.calling():
        twin = CircuitBreaker(reset_timeout=0, state_storage=COPIES[way](storage_of(breaker)))
        assert twin.call(up) == up()
        assert twin.current_state == "closed"
        assert breaker.current_state == "half-open"
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("storage", [pybreaker.CircuitMemoryStorage, CircuitMemoryStorage])
def test_breaker_is_copied_with_neither_storage(way: str, storage: MakeStorage) -> None:
    """Pybreaker's breaker has a lock, which Python does not copy."""
    with pytest.raises(TypeError, match="RLock"):
        COPIES[way](CircuitBreaker(state_storage=storage("closed")))


# -- in Redis ----------------------------------------------------------------------------------------------------------


def test_keys_begin_with_the_namespace() -> None:
    """So that applications share a server; a circuit that has not moved has the three keys of stock workers."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    breaker = CircuitBreaker(state_storage=CircuitRedisStorage("closed", client, namespace="my_app"))
    with pytest.raises(Down):
        breaker.call(down)
    keys = client.keys()
    assert len(keys) == 3
    assert all(key.startswith(b"my_app") for key in keys)


def test_circuit_with_a_tag_is_read_as_it_was_set() -> None:
    """`cluster_mode` changes where the keys lie, and nothing else."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    storage = CircuitRedisStorage("open", client, namespace="my_app", cluster_mode=True)
    at = datetime.now(timezone.utc).replace(tzinfo=None)
    storage.opened_at = at
    assert CircuitBreaker(state_storage=storage).state.name == "open"
    assert storage.opened_at.strftime("%Y-%m-%d %H:%M:%S") == at.strftime("%Y-%m-%d %H:%M:%S")
