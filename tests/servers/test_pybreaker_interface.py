"""The storage interface of pybreaker: scenarios on which users rely, on this package's storages."""

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
    """Yield a factory of storages. In Redis, all its storages share a circuit."""
    if request.param == "memory":
        yield CircuitMemoryStorage
        return
    if request.param == "fakeredis":
        client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    else:
        server: PrivateServer = request.getfixturevalue("server")
        client = server.client()
    yield lambda state, **options: CircuitRedisStorage(state, client, "interface", **options)
    client.close()


@pytest.fixture
def make(make_storage: MakeStorage) -> Callable[..., CircuitBreaker]:
    """Return a factory of breakers on new storages."""
    return lambda **options: CircuitBreaker(state_storage=make_storage("closed"), **options)


class NotificationRecorder(CircuitBreakerListener):
    """Listener that records its notifications."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        """Record that a call begins."""
        self.events.append("call")

    def failure(self, cb: Any, exc: BaseException) -> None:
        """Record that a call failed."""
        self.events.append(type(exc).__name__)

    def success(self, cb: Any) -> None:
        """Record that a call succeeded."""
        self.events.append("success")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record the old and the new state."""
        self.events.append((old_state.name, new_state.name))


def test_counts_follow_the_outcomes_of_calls(make: Callable[..., CircuitBreaker]) -> None:
    """A failure counts and is raised, and a success resets the count."""
    breaker = make()
    for call, failures in ((up, 0), (down, 1), (down, 2), (up, 0), (down, 1)):
        if call is up:
            assert breaker.call(call) == up()
        else:
            with pytest.raises(Down):
                breaker.call(call)
        assert (breaker.fail_counter, breaker.current_state) == (failures, "closed")


@pytest.mark.parametrize("options", [{}, {"throw_new_error_on_trip": True}, {"throw_new_error_on_trip": False}])
def test_last_failure_opens_and_raises_the_configured_error(
    make: Callable[..., CircuitBreaker], options: dict[str, bool]
) -> None:
    """The option `throw_new_error_on_trip` decides about the call that trips, and about no other."""
    breaker = make(fail_max=3, **options)
    for _ in range(2):
        with pytest.raises(Down):
            breaker.call(down)
    with pytest.raises(CircuitBreakerError if options.get("throw_new_error_on_trip", True) else Down):
        breaker.call(down)
    assert (breaker.fail_counter, breaker.current_state) == (3, "open")
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert breaker.fail_counter == 3


def test_error_of_the_trip_shows_its_cause(make: Callable[..., CircuitBreaker]) -> None:
    """A traceback shows why the circuit opened."""
    breaker = make(fail_max=1)
    with pytest.raises(CircuitBreakerError) as raised:
        breaker.call(down)
    assert "Down" in "".join(traceback.format_exception(raised.value))


def test_open_circuit_probes_when_its_timeout_is_over(make: Callable[..., CircuitBreaker]) -> None:
    """One call is admitted: its failure opens the circuit again, its success closes the circuit."""
    recorder = NotificationRecorder()
    breaker = make(fail_max=1, reset_timeout=60, listeners=[recorder])
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    breaker.reset_timeout = 0
    with pytest.raises(CircuitBreakerError):
        breaker.call(down)
    assert (breaker.fail_counter, breaker.current_state) == (2, "open")
    assert breaker.call(up) == up()
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")
    assert [event for event in recorder.events if isinstance(event, tuple)] == [
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
    """The next call of the same thread decides."""
    breaker = make()
    breaker.half_open()
    assert (breaker.fail_counter, breaker.current_state) == (0, "half-open")
    try:
        breaker.call(call)
    except CircuitBreakerError:
        assert call is down
    assert (breaker.fail_counter, breaker.current_state) == (failures, state)


def test_direct_transitions_notify_listeners(make: Callable[..., CircuitBreaker]) -> None:
    """Each transition is notified once, with the state before."""
    recorder = NotificationRecorder()
    breaker = make(listeners=[recorder])
    breaker.open()
    assert breaker.current_state == "open"
    breaker.half_open()
    assert breaker.current_state == "half-open"
    breaker.close()
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert recorder.events == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


def test_listeners_are_notified_of_each_call_once(make: Callable[..., CircuitBreaker]) -> None:
    """Listeners are notified of the begin and of the end of a call."""
    recorder = NotificationRecorder()
    breaker = make(listeners=[recorder])
    breaker.call(up)
    with pytest.raises(Down):
        breaker.call(down)
    assert recorder.events == ["call", "success", "call", "Down"]


def test_generator_is_a_call_until_its_end(make: Callable[..., CircuitBreaker]) -> None:
    """The outcome counts when the generator ends, not when it is created."""
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
    """A block with `calling` fails, trips, rejects and recovers like a call."""
    breaker = make(fail_max=2, reset_timeout=60)
    executed = []

    def block(error: type[Exception] | None = None) -> None:
        with breaker.calling():
            executed.append(error)
            if error:
                raise error

    with pytest.raises(Down):
        block(Down)
    with pytest.raises(CircuitBreakerError):
        block(Down)
    assert (breaker.fail_counter, breaker.current_state) == (2, "open")
    with pytest.raises(CircuitBreakerError):
        block()
    assert executed == [Down, Down]
    breaker.reset_timeout = 0
    block()
    assert executed == [Down, Down, None]
    assert (breaker.fail_counter, breaker.current_state) == (0, "closed")


def test_success_threshold_is_the_number_of_successes(make: Callable[..., CircuitBreaker]) -> None:
    """The circuit stays half-open until the threshold, and a failure in between starts the count again."""
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


@pytest.mark.parametrize("state", STATES)
def test_creation_of_a_breaker_changes_nothing(state: str) -> None:
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
    """The time is read to the microsecond, and naive if a naive one was set."""
    storage = CircuitMemoryStorage("open")
    at = datetime(2026, 3, 29, 2, 30, 0, microsecond, tzinfo=zone)
    storage.opened_at = at
    assert storage.opened_at == at
    assert (storage.opened_at.tzinfo is None) is (zone is None)


def test_naive_time_of_opening_counts_as_utc() -> None:
    """The comparison of pybreaker with an aware time does not fail in a guarded call."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    storage.opened_at = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=30)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    storage.opened_at -= timedelta(seconds=31)
    assert breaker.call(up) == up()


def test_missing_time_of_opening_admits_the_next_call_as_a_probe() -> None:
    """The class of pybreaker also starts without an opening time."""
    storage = CircuitMemoryStorage("open")
    breaker = CircuitBreaker(reset_timeout=60, state_storage=storage)
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    storage.opened_at = None
    assert storage.opened_at is None
    assert breaker.call(up) == up()
    assert breaker.current_state == "closed"


def test_time_of_the_next_trip_replaces_the_one_that_was_set() -> None:
    """The new time is aware, as pybreaker sets it."""
    storage = CircuitMemoryStorage("closed")
    storage.opened_at = datetime(2020, 1, 1)  # noqa: DTZ001
    CircuitBreaker(state_storage=storage).open()
    assert abs(storage.opened_at - datetime.now(timezone.utc)) < timedelta(seconds=60)


def test_failures_can_be_set_by_the_private_name_of_pybreaker() -> None:
    """Tests that replace `_inc_counter` of a breaker set the private name. The breaker's lock makes this atomic."""
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


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda storage: pickle.loads(pickle.dumps(storage)),
}


class Named(CircuitMemoryStorage):
    """Storage with an additional attribute."""

    def __init__(self, state: str, owner: str) -> None:
        self.owner = owner
        super().__init__(state, probe_lease=7)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("at", [None, datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=timezone.utc)])  # noqa: DTZ001
def test_copy_is_an_independent_circuit(way: str, state: str, at: datetime | None) -> None:
    """The copy starts with the values of the original, and both change independently afterwards."""
    storage = Named(state, "shop")
    storage.increment_counter()
    storage.increment_counter()
    storage.increment_success_counter()
    storage.opened_at = at
    copied = COPIES[way](storage)
    assert type(copied) is Named
    assert (copied.owner, copied.name, lease_ms_of(copied)) == ("shop", "memory", 7000)
    assert (copied.state, copied.counter, copied.success_counter, copied.opened_at) == (state, 2, 1, at)
    storage.reset_counter()
    copied.increment_counter()
    assert (storage.counter, copied.counter) == (0, 3)
    breaker = CircuitBreaker(state_storage=copied)
    breaker.close()
    assert (breaker.call(up), copied.state, storage.state) == (up(), "closed", state)


@pytest.mark.parametrize("way", COPIES)
def test_copy_of_a_probed_circuit_can_be_probed(way: str) -> None:
    """The probe in flight belongs to the original."""
    breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitMemoryStorage("open"))
    with breaker.calling():
        copied = CircuitBreaker(reset_timeout=0, state_storage=COPIES[way](storage_of(breaker)))
        assert copied.call(up) == up()
        assert copied.current_state == "closed"
        assert breaker.current_state == "half-open"
    assert breaker.current_state == "closed"


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("storage", [pybreaker.CircuitMemoryStorage, CircuitMemoryStorage])
def test_breaker_is_copied_with_neither_storage(way: str, storage: MakeStorage) -> None:
    """The breaker of pybreaker has a lock, which Python cannot copy."""
    with pytest.raises(TypeError, match="RLock"):
        COPIES[way](CircuitBreaker(state_storage=storage("closed")))


def test_keys_begin_with_the_namespace() -> None:
    """Applications share a server by namespaces. A circuit without a transition has the three keys of stock workers."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    breaker = CircuitBreaker(state_storage=CircuitRedisStorage("closed", client, namespace="my_app"))
    with pytest.raises(Down):
        breaker.call(down)
    keys = client.keys()
    assert len(keys) == 3
    assert all(key.startswith(b"my_app") for key in keys)


def test_circuit_with_a_tag_is_read_as_it_was_set() -> None:
    """The option `cluster_mode` changes only the names of the keys."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    storage = CircuitRedisStorage("open", client, namespace="my_app", cluster_mode=True)
    at = datetime.now(timezone.utc).replace(tzinfo=None)
    storage.opened_at = at
    assert CircuitBreaker(state_storage=storage).state.name == "open"
    assert storage.opened_at.strftime("%Y-%m-%d %H:%M:%S") == at.strftime("%Y-%m-%d %H:%M:%S")
