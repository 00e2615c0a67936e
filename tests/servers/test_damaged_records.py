"""Damaged records: Redis data of any kind is repaired, logged once, and never raised into a call."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import fakeredis
import pybreaker
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import CLOSED, COUNT_LIMIT, HALF_OPEN, OPEN, STATES, Circuit
from pybreaker_redis._model.codec import VALUE_NAMES
from pybreaker_redis._model.intents import Load
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.breakers import Down
from tests.support.inspect import storage_of
from tests.support.records import Ago, Paper, Value, circuits, contents, found, fresh_namespace, laid, lay, moved_by
from tests.support.selection import examples

pytestmark = pytest.mark.usefixtures("patient")

#: Seconds: far from every past time in `contents`, and longer than a test.
RESET_TIMEOUT_S = 30.0

#: Milliseconds around a point in time in which a slow machine may see either side.
TOLERANCE_MS = 5_000


@dataclass
class RecordStore:
    """Store of a circuit, and a client for breakers.

    Attributes:
        plain: Client with all rights that does not decode, for damaging and reading keys.
        client: Client that is given to the storage.
    """

    plain: Any
    client: Any

    def breaker(self, namespace: str, state: str = CLOSED, **words: Any) -> CircuitBreaker:
        """Return an unmodified breaker on this package's storage."""
        storage = CircuitRedisStorage(state, self.client, namespace=namespace, max_staleness=0, timeout=10)
        return CircuitBreaker(state_storage=storage, **{"reset_timeout": RESET_TIMEOUT_S, "fail_max": 10**9, **words})

    def now_ms(self) -> int:
        """Return the server's time, in milliseconds."""
        seconds, microseconds = self.plain.time()
        return int(seconds) * 1000 + int(microseconds) // 1000


@contextlib.contextmanager
def _on_server(server: PrivateServer, *, scripts: bool = True, decoded: bool = False) -> Iterator[RecordStore]:
    user = {}
    with contextlib.closing(server.client()) as plain:
        if not scripts:
            plain.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
            user = {"username": "noscript", "password": "any"}
        with contextlib.closing(server.client(decode_responses=decoded, **user)) as client:
            yield RecordStore(plain, client)


def _stores() -> Iterator[Any]:
    for server in servers.at_hand():
        name = servers.name_of(server)
        yield pytest.param((server, {}), id=f"{name}-lua")
        if server is servers.at_hand()[0]:
            yield pytest.param((server, {"decoded": True}), id=f"{name}-lua-decoded")
            yield pytest.param((server, {"scripts": False}), id=f"{name}-optimistic")
            yield pytest.param((server, {"scripts": False, "decoded": True}), id=f"{name}-optimistic-decoded")
    yield pytest.param((None, {}), id="fakeredis")
    yield pytest.param((None, {"decode_responses": True}), id="fakeredis-decoded")


@pytest.fixture(params=_stores())
def store(request: pytest.FixtureRequest, empty_server: Callable[[Any], PrivateServer]) -> Iterator[RecordStore]:
    """Yield every engine with keys that can be damaged."""
    found_server, words = request.param
    if found_server is None:
        fake_server = fakeredis.FakeServer()
        yield RecordStore(
            fakeredis.FakeStrictRedis(server=fake_server), fakeredis.FakeStrictRedis(server=fake_server, **words)
        )
        return
    with _on_server(empty_server(found_server), **words) as store:
        yield store


@pytest.fixture(params=[True, False], ids=["lua", "optimistic-decoded"])
def either_store(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[RecordStore]:
    """Yield the two engines with keys, on the preferred server."""
    with _on_server(server, scripts=request.param, decoded=not request.param) as store:
        yield store


class LogCollector(logging.Handler):
    """Handler that collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message, unless it is about missing scripts."""
        line = record.getMessage()
        if "runs no scripts" not in line:
            self.lines.append(line)


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """Collect the messages of a logger."""
    handler = LogCollector()
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def call(breaker: CircuitBreaker, *, fail: bool) -> bool:
    """Make a guarded call, and return whether the dependency was called. Unexpected exceptions escape."""
    reached = []

    def dependency() -> None:
        reached.append(1)
        if fail:
            raise Down

    try:
        breaker.call(dependency)
    except CircuitBreakerError:
        assert fail or not reached, "a successful call was reported as rejected"
    except Down:
        assert reached
    return bool(reached)


def assert_stock_can_read(plain: Any, namespace: str) -> None:
    """Assert that pybreaker's storage reads every key without an exception, a log line or an unknown state."""
    with logged("pybreaker") as lines:
        stock = pybreaker.CircuitRedisStorage(CLOSED, plain, namespace=namespace)
        assert stock.state in STATES
        assert stock.counter >= 0
        assert stock.success_counter >= 0
        assert stock.opened_at is None or isinstance(stock.opened_at, datetime)
        CircuitBreaker(state_storage=stock)
    assert lines == []


def admitted_by(circuit: Circuit, now_ms: int) -> bool:
    """Return whether the record admits a call of a new process."""
    if circuit.state == OPEN:
        assert circuit.opened_at_ms is not None
        left = circuit.opened_at_ms + RESET_TIMEOUT_S * 1000 - now_ms
        assume(abs(left) > TOLERANCE_MS)
        return left <= 0
    if circuit.state == HALF_OPEN and circuit.probe_token:
        left = circuit.probe_until_ms - now_ms
        # A lease that has ended stays ended to the millisecond. One that holds may end meanwhile.
        assume(left <= 0 or left > TOLERANCE_MS)
        return left <= 0
    return True


thorough = settings(
    max_examples=examples(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@thorough
@given(
    content=contents,
    before=st.none() | circuits(),
    state_if_missing=st.sampled_from(STATES),
    failures=st.lists(st.booleans(), min_size=1, max_size=3),
)
@example(
    # Without the limit, the next generation was unreadable, and was repaired for ever.
    content={"state": b"closed", "circuit": {"generation": b"999999999999999", "state": b"open"}},
    before=None,
    state_if_missing=CLOSED,
    failures=[False, True, False],
)
@example(
    # Without the limit, the next count was unreadable, and was repaired again.
    content={"state": b"half-open", "fail_counter": b"9" * 15, "success_counter": b"9" * 15},
    before=None,
    state_if_missing=CLOSED,
    failures=[False, True],
)
@example(content={"opened_at": "list"}, before=None, state_if_missing=CLOSED, failures=[True, False])
def test_damaged_record_admits_or_rejects_like_its_repair(
    store: RecordStore, content: dict[str, Any], before: Circuit | None, state_if_missing: str, failures: list[bool]
) -> None:
    """Only the application's error or CircuitBreakerError is raised, one line is logged, and stock reads the keys."""
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    breaker, known = None, None
    if before is not None:
        # The record that the process has cached before the damage.
        lay(store.plain, keys, _values_of(moved_by(before, store.now_ms() - 1_000_000_000_000)))
        breaker = store.breaker(namespace, state_if_missing)
        assert breaker.current_state in STATES
        known = Paper(found(store.plain, keys), store.now_ms()).execute(Load(), None, state_if_missing).circuit
    now_ms = store.now_ms()
    values = laid(content, now_ms)
    lay(store.plain, keys, values)
    repaired = Paper(dict(values), now_ms).execute(Load(), known, state_if_missing if known is None else CLOSED)
    admits = admitted_by(repaired.circuit, now_ms)
    with logged("pybreaker_redis") as lines:
        breaker = breaker or store.breaker(namespace, state_if_missing)
        assert call(breaker, fail=failures[0]) is admits, repaired
        for fail in failures[1:]:
            call(breaker, fail=fail)
    assert len(lines) <= 1, lines
    assert_stock_can_read(store.plain, namespace)


@pytest.mark.parametrize("name", ["fail_counter", "generation"])
def test_largest_readable_number_is_logged_once(server: PrivateServer, name: str) -> None:
    """Whatever the limit is, some number reaches the limit with the next failure or transition."""
    largest = b"%d" % (COUNT_LIMIT - 1)
    values: dict[str, Value] = {"fail_counter": largest}
    if name == "generation":
        values = {"state": b"closed", "circuit": {"generation": largest, "state": b"open"}}
    with _on_server(server) as store, logged("pybreaker_redis") as lines:
        lay(store.plain, circuit_keys("largest", needs_one_slot=False), values)
        breaker = store.breaker("largest")
        for _ in range(3):
            call(breaker, fail=True)
    assert len(lines) == 1, lines


def _values_of(circuit: Circuit) -> dict[str, Value]:
    values: dict[str, Value] = {
        "state": circuit.state.encode(),
        "fail_counter": b"%d" % circuit.fail_counter,
        "success_counter": b"%d" % circuit.success_counter,
        "circuit": {
            "generation": b"%d" % circuit.generation,
            "state": circuit.state.encode(),
            "opened_at_ms": b"" if circuit.opened_at_ms is None else b"%d" % circuit.opened_at_ms,
            "probe_token": circuit.probe_token.encode(),
            "probe_until_ms": b"%d" % circuit.probe_until_ms,
            "noisy_until_ms": b"%d" % circuit.noisy_until_ms,
            "probe_lease_ms": b"%d" % circuit.probe_lease_ms,
        },
    }
    if circuit.opened_at_ms is not None:
        values["opened_at"] = b"%d" % (circuit.opened_at_ms // 1000)
    return values


#: Kinds of damage, by name.
DAMAGES: dict[str, Callable[[Any, str], Any]] = {
    "lost": lambda plain, key: None,
    "garbage": lambda plain, key: plain.set(key, b"\xff garbage"),
    "emptied": lambda plain, key: plain.set(key, b""),
    "a list": lambda plain, key: plain.rpush(key, "x"),
    "a stream": lambda plain, key: plain.xadd(key, {"x": "x"}),
}

SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(VALUE_NAMES, size)]


def damage(store: RecordStore, namespace: str, names: tuple[str, ...], kind: str) -> None:
    """Damage these keys in this way."""
    for name, key in zip(VALUE_NAMES, circuit_keys(namespace, needs_one_slot=False), strict=True):
        if name in names:
            store.plain.delete(key)
            DAMAGES[kind](store.plain, key)


def open_breaker(store: RecordStore, namespace: str, **words: Any) -> CircuitBreaker:
    """Return a breaker of a circuit that has just opened."""
    breaker = store.breaker(namespace, fail_max=1, **words)
    assert call(breaker, fail=True)
    assert breaker.current_state == OPEN
    return breaker


@pytest.mark.parametrize("kind", DAMAGES)
def test_known_open_circuit_stays_open_whatever_is_lost(either_store: RecordStore, kind: str) -> None:
    """A process with an open circuit in its cache admits no call, whichever keys are lost or damaged."""
    for names in SUBSETS:
        namespace = fresh_namespace()
        breaker = open_breaker(either_store, namespace)
        opened_at = storage_of(breaker).opened_at
        damage(either_store, namespace, names, kind)
        with logged("pybreaker_redis") as lines:
            assert not call(breaker, fail=False), names
            assert not call(breaker, fail=False), names
        assert len(lines) <= 1, (names, lines)
        # The opening time is the same or later, so the reset timeout is never cut short.
        assert opened_at <= storage_of(breaker).opened_at <= datetime.now(timezone.utc), names
        assert either_store.breaker(namespace).current_state == OPEN, f"{names}: a new process sees another state"
        assert_stock_can_read(either_store.plain, namespace)


@pytest.mark.parametrize("kind", DAMAGES)
def test_new_process_finds_a_damaged_circuit_open_while_one_state_remains(either_store: RecordStore, kind: str) -> None:
    """State and hash can each replace the other, so a process without a cached record admits no call."""
    for names in SUBSETS:
        if {"state", "circuit"} <= set(names):
            continue
        namespace = fresh_namespace()
        open_breaker(either_store, namespace)
        damage(either_store, namespace, names, kind)
        new_breaker = either_store.breaker(namespace)
        assert not call(new_breaker, fail=False), names
        left = storage_of(new_breaker).opened_at + timedelta(seconds=RESET_TIMEOUT_S) - datetime.now(timezone.utc)
        assert left > timedelta(seconds=RESET_TIMEOUT_S - 5), names


@pytest.mark.parametrize("names", [("opened_at",), ("state",), ("circuit",), ("opened_at", "circuit"), VALUE_NAMES])
def test_known_open_circuit_without_keys_admits_a_probe_after_the_full_timeout(
    either_store: RecordStore, names: tuple[str, ...]
) -> None:
    """A probe is admitted no earlier than `reset_timeout` after the trip, and then the circuit recovers."""
    namespace = fresh_namespace()
    before = time.monotonic()
    breaker = open_breaker(either_store, namespace, reset_timeout=0.4)
    damage(either_store, namespace, names, "lost")
    while not call(breaker, fail=False):
        assert time.monotonic() - before < 5
        time.sleep(0.005)
    assert time.monotonic() - before >= 0.4
    assert breaker.current_state == CLOSED


def test_opening_time_of_zero_while_open_admits_no_call(either_store: RecordStore) -> None:
    """A zero in place of the time is damage, and the hash has the time."""
    namespace = fresh_namespace()
    breaker = open_breaker(either_store, namespace)
    opened_at = storage_of(breaker).opened_at
    either_store.plain.set(f"{namespace}:pybreaker:opened_at", "0")
    assert not call(either_store.breaker(namespace), fail=False)
    assert not call(breaker, fail=False)
    assert storage_of(breaker).opened_at == opened_at
    assert_stock_can_read(either_store.plain, namespace)


@pytest.mark.parametrize(
    "opened_at", [b"nan", b"-1", b"1e10", b"99999999999999999999", b"999999999999999", Ago(-3_600_000, 1000)]
)
def test_invalid_opening_time_admits_no_call_and_is_repaired(either_store: RecordStore, opened_at: Any) -> None:
    """Neither is a probe admitted early, nor does a time in the future keep the fleet open."""
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    lay(either_store.plain, keys, laid({"state": b"open", "opened_at": opened_at}, either_store.now_ms()))
    before = time.monotonic()
    breaker = either_store.breaker(namespace, reset_timeout=0.3)
    while not call(breaker, fail=False):
        assert time.monotonic() - before < 5
        time.sleep(0.005)
    assert time.monotonic() - before >= 0.3


#: Records with which stock raises an exception of its own, and whether the call fails.
STOCK_RAISES = {
    "unknown state": ({"state": b"ajar"}, False),
    "state of bytes that are no text": ({"state": b"\xff"}, False),
    "failures that are no number": ({"state": b"closed", "fail_counter": b"many"}, True),
    "opened_at that is no number": ({"state": b"open", "opened_at": b"soon"}, False),
    "opened_at after the last year": ({"state": b"open", "opened_at": b"999999999999"}, False),
    "opened_at beyond any clock": ({"state": b"open", "opened_at": b"9" * 30}, False),
}


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("defect", STOCK_RAISES)
def test_damage_that_raises_with_stock_raises_nothing_here(server: PrivateServer, defect: str, decoded: bool) -> None:
    """Stock fails with these records or, with a decoding client, cannot be created.

    This package repairs the records.
    """
    values, fail = STOCK_RAISES[defect]
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    with _on_server(server, decoded=decoded) as store:
        lay(store.plain, keys, values)
        with pytest.raises((ValueError, OverflowError, OSError, AttributeError)):
            call(
                CircuitBreaker(state_storage=pybreaker.CircuitRedisStorage(CLOSED, store.client, namespace)), fail=fail
            )
        lay(store.plain, keys, values)
        call(store.breaker(namespace), fail=fail)
        assert_stock_can_read(store.plain, namespace)


def test_decoding_client_fails_with_stock_and_works_here(server: PrivateServer) -> None:
    """Most applications use `decode_responses=True`."""
    with _on_server(server, decoded=True) as store:
        with pytest.raises(AttributeError):
            CircuitBreaker(state_storage=pybreaker.CircuitRedisStorage(CLOSED, store.client, "decoded"))
        breaker = store.breaker("decoded")
        assert call(breaker, fail=True)
        assert breaker.fail_counter == 1


def test_open_circuit_without_opening_time_is_probed_by_stock_only(server: PrivateServer) -> None:
    """A missing key never admits a probe."""
    with _on_server(server) as store:
        for make, is_admitted in ((pybreaker.CircuitRedisStorage, True), (CircuitRedisStorage, False)):
            namespace = fresh_namespace()
            store.plain.set(f"{namespace}:pybreaker:state", "open")
            breaker = CircuitBreaker(reset_timeout=RESET_TIMEOUT_S, state_storage=make(CLOSED, store.client, namespace))
            assert call(breaker, fail=False) is is_admitted
