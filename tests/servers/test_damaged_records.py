"""Bad data in Redis cannot hurt: it is repaired, said once, and never raised into a call."""

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
from tests.support.inspect import storage_of
from tests.support.records import Ago, Paper, Value, circuits, contents, found, fresh_namespace, laid, lay, moved_by
from tests.support.selection import examples

pytestmark = pytest.mark.usefixtures("patient")

#: Seconds; far from everything that `contents` has in the past, and longer than a test.
RESET_TIMEOUT = 30.0

#: Milliseconds around a boundary in time in which a slow machine may see either side of it.
BLUR_MS = 5_000


class Down(Exception):
    """The user's own exception."""


@dataclass
class Place:
    """Where a circuit lies, and how a breaker gets there.

    Attributes:
        plain: A client that may do everything and does not decode: to damage and to look.
        client: The client that is given to the storage.
    """

    plain: Any
    client: Any

    def breaker(self, namespace: str, state: str = CLOSED, **words: Any) -> CircuitBreaker:
        """An unmodified breaker on our storage."""
        storage = CircuitRedisStorage(state, self.client, namespace=namespace, max_staleness=0, timeout=10)
        return CircuitBreaker(state_storage=storage, **{"reset_timeout": RESET_TIMEOUT, "fail_max": 10**9, **words})

    def now_ms(self) -> int:
        """The server's time."""
        seconds, microseconds = self.plain.time()
        return int(seconds) * 1000 + int(microseconds) // 1000


@contextlib.contextmanager
def _on_server(server: PrivateServer, *, scripts: bool = True, decoded: bool = False) -> Iterator[Place]:
    user = {}
    with contextlib.closing(server.client()) as plain:
        if not scripts:
            plain.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
            user = {"username": "noscript", "password": "any"}
        with contextlib.closing(server.client(decode_responses=decoded, **user)) as client:
            yield Place(plain, client)


def _places() -> Iterator[Any]:
    for server in servers.at_hand():
        name = servers.name_of(server)
        yield pytest.param((server, {}), id=f"{name}-lua")
        if server is servers.at_hand()[0]:
            yield pytest.param((server, {"decoded": True}), id=f"{name}-lua-decoded")
            yield pytest.param((server, {"scripts": False}), id=f"{name}-optimistic")
            yield pytest.param((server, {"scripts": False, "decoded": True}), id=f"{name}-optimistic-decoded")
    yield pytest.param((None, {}), id="fakeredis")
    yield pytest.param((None, {"decode_responses": True}), id="fakeredis-decoded")


@pytest.fixture(params=_places())
def place(request: pytest.FixtureRequest, empty_server: Callable[[Any], PrivateServer]) -> Iterator[Place]:
    """Every carrier that has keys which can be damaged."""
    found_server, words = request.param
    if found_server is None:
        home = fakeredis.FakeServer()
        yield Place(fakeredis.FakeStrictRedis(server=home), fakeredis.FakeStrictRedis(server=home, **words))
        return
    with _on_server(empty_server(found_server), **words) as place:
        yield place


@pytest.fixture(params=[True, False], ids=["lua", "optimistic-decoded"])
def either(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[Place]:
    """The two carriers that have keys, on the preferred server."""
    with _on_server(server, scripts=request.param, decoded=not request.param) as place:
        yield place


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it; that a server runs no scripts is no news here."""
        line = record.getMessage()
        if "runs no scripts" not in line:
            self.lines.append(line)


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """Lines of a logger."""
    handler = Lines()
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def call(breaker: CircuitBreaker, *, fail: bool) -> bool:
    """One guarded call; whether it went through.  Any exception that is not expected escapes."""
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
    """The storage that comes with pybreaker reads every key: no exception, none logged, nothing unknown."""
    with logged("pybreaker") as lines:
        stock = pybreaker.CircuitRedisStorage(CLOSED, plain, namespace=namespace)
        assert stock.state in STATES
        assert stock.counter >= 0
        assert stock.success_counter >= 0
        assert stock.opened_at is None or isinstance(stock.opened_at, datetime)
        CircuitBreaker(state_storage=stock)
    assert lines == []


def admitted_by(circuit: Circuit, now_ms: int) -> bool:
    """Whether a newcomer's call goes through, as the record says."""
    if circuit.state == OPEN:
        assert circuit.opened_at_ms is not None
        left = circuit.opened_at_ms + RESET_TIMEOUT * 1000 - now_ms
        assume(abs(left) > BLUR_MS)
        return left <= 0
    if circuit.state == HALF_OPEN and circuit.probe_token:
        left = circuit.probe_until_ms - now_ms
        # Up to the millisecond a lease that has ended stays ended; one that holds may end meanwhile.
        assume(left <= 0 or left > BLUR_MS)
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
    # The generation after the largest readable one was unreadable, and so repaired for ever.
    content={"state": b"closed", "circuit": {"generation": b"999999999999999", "state": b"open"}},
    before=None,
    state_if_missing=CLOSED,
    failures=[False, True, False],
)
@example(
    # The same for counters: one more than the largest readable number was repaired again.
    content={"state": b"half-open", "fail_counter": b"9" * 15, "success_counter": b"9" * 15},
    before=None,
    state_if_missing=CLOSED,
    failures=[False, True],
)
@example(content={"opened_at": "list"}, before=None, state_if_missing=CLOSED, failures=[True, False])
def test_damaged_record_admits_or_rejects_as_its_repair_says(
    place: Place, content: dict[str, Any], before: Circuit | None, state_if_missing: str, failures: list[bool]
) -> None:
    """No exception but the user's own or CircuitBreakerError, one log line, and afterwards stock can read it all."""
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    breaker, known = None, None
    if before is not None:
        # What the process knows from before the record came to harm.
        lay(place.plain, keys, _as_left(moved_by(before, place.now_ms() - 1_000_000_000_000)))
        breaker = place.breaker(namespace, state_if_missing)
        assert breaker.current_state in STATES
        known = Paper(found(place.plain, keys), place.now_ms()).execute(Load(), None, state_if_missing).circuit
    now_ms = place.now_ms()
    values = laid(content, now_ms)
    lay(place.plain, keys, values)
    repaired = Paper(dict(values), now_ms).execute(Load(), known, state_if_missing if known is None else CLOSED)
    admits = admitted_by(repaired.circuit, now_ms)
    with logged("pybreaker_redis") as lines:
        breaker = breaker or place.breaker(namespace, state_if_missing)
        assert call(breaker, fail=failures[0]) is admits, repaired
        for fail in failures[1:]:
            call(breaker, fail=fail)
    assert len(lines) <= 1, lines
    assert_stock_can_read(place.plain, namespace)


@pytest.mark.parametrize("name", ["fail_counter", "generation"])
def test_largest_readable_number_is_said_once(server: PrivateServer, name: str) -> None:
    """Whatever the limit, there is a number that reaches it with the next failure or transition."""
    largest = b"%d" % (COUNT_LIMIT - 1)
    values: dict[str, Value] = {"fail_counter": largest}
    if name == "generation":
        values = {"state": b"closed", "circuit": {"generation": largest, "state": b"open"}}
    with _on_server(server) as place, logged("pybreaker_redis") as lines:
        lay(place.plain, circuit_keys("largest", needs_one_slot=False), values)
        breaker = place.breaker("largest")
        for _ in range(3):
            call(breaker, fail=True)
    assert len(lines) == 1, lines


def _as_left(circuit: Circuit) -> dict[str, Value]:
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


# -- an open circuit stays open ----------------------------------------------------------------------------------------

#: Ways in which keys come to harm.
HARMS: dict[str, Callable[[Any, str], Any]] = {
    "lost": lambda plain, key: None,
    "garbage": lambda plain, key: plain.set(key, b"\xff garbage"),
    "emptied": lambda plain, key: plain.set(key, b""),
    "a list": lambda plain, key: plain.rpush(key, "x"),
    "a stream": lambda plain, key: plain.xadd(key, {"x": "x"}),
}

SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(VALUE_NAMES, size)]


def harm(place: Place, namespace: str, names: tuple[str, ...], how: str) -> None:
    """Do this to these keys."""
    for name, key in zip(VALUE_NAMES, circuit_keys(namespace, needs_one_slot=False), strict=True):
        if name in names:
            place.plain.delete(key)
            HARMS[how](place.plain, key)


def tripped(place: Place, namespace: str, **words: Any) -> CircuitBreaker:
    """A breaker whose circuit has just opened."""
    breaker = place.breaker(namespace, fail_max=1, **words)
    assert call(breaker, fail=True)
    assert breaker.current_state == OPEN
    return breaker


@pytest.mark.parametrize("how", HARMS)
def test_known_open_circuit_stays_open_whatever_is_lost(either: Place, how: str) -> None:
    """A process that knows the circuit open lets nothing through, whichever keys are gone or damaged."""
    for names in SUBSETS:
        namespace = fresh_namespace()
        breaker = tripped(either, namespace)
        opened_at = storage_of(breaker).opened_at
        harm(either, namespace, names, how)
        with logged("pybreaker_redis") as lines:
            assert not call(breaker, fail=False), names
            assert not call(breaker, fail=False), names
        assert len(lines) <= 1, (names, lines)
        # Since the same instant or a later one: the timeout is never cut short.
        assert opened_at <= storage_of(breaker).opened_at <= datetime.now(timezone.utc), names
        assert either.breaker(namespace).current_state == OPEN, f"{names}: a newcomer sees another state"
        assert_stock_can_read(either.plain, namespace)


@pytest.mark.parametrize("how", HARMS)
def test_newcomer_finds_open_circuit_open_while_either_state_is_left(either: Place, how: str) -> None:
    """The state and the hash each remember for the other: a process that knows nothing lets nothing through."""
    for names in SUBSETS:
        if {"state", "circuit"} <= set(names):
            continue
        namespace = fresh_namespace()
        tripped(either, namespace)
        harm(either, namespace, names, how)
        newcomer = either.breaker(namespace)
        assert not call(newcomer, fail=False), names
        left = storage_of(newcomer).opened_at + timedelta(seconds=RESET_TIMEOUT) - datetime.now(timezone.utc)
        assert left > timedelta(seconds=RESET_TIMEOUT - 5), names


@pytest.mark.parametrize("names", [("opened_at",), ("state",), ("circuit",), ("opened_at", "circuit"), VALUE_NAMES])
def test_known_open_circuit_that_lost_keys_opens_the_gate_after_a_full_timeout(
    either: Place, names: tuple[str, ...]
) -> None:
    """Not a moment earlier than `reset_timeout` after the trip, and then it does recover."""
    namespace = fresh_namespace()
    before = time.monotonic()
    breaker = tripped(either, namespace, reset_timeout=0.4)
    harm(either, namespace, names, "lost")
    while not call(breaker, fail=False):
        assert time.monotonic() - before < 5
        time.sleep(0.005)
    assert time.monotonic() - before >= 0.4
    assert breaker.current_state == CLOSED


def test_opening_time_set_back_while_open_lets_nothing_through(either: Place) -> None:
    """A zero in the place of the time is damage: the hash knows better."""
    namespace = fresh_namespace()
    breaker = tripped(either, namespace)
    opened_at = storage_of(breaker).opened_at
    either.plain.set(f"{namespace}:pybreaker:opened_at", "0")
    assert not call(either.breaker(namespace), fail=False)
    assert not call(breaker, fail=False)
    assert storage_of(breaker).opened_at == opened_at
    assert_stock_can_read(either.plain, namespace)


@pytest.mark.parametrize(
    "opened_at", [b"nan", b"-1", b"1e10", b"99999999999999999999", b"999999999999999", Ago(-3_600_000, 1000)]
)
def test_absurd_opening_time_lets_nothing_through_and_does_not_stay(either: Place, opened_at: Any) -> None:
    """Neither the gate opens early, nor does a time in the future hold the fleet open."""
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    lay(either.plain, keys, laid({"state": b"open", "opened_at": opened_at}, either.now_ms()))
    before = time.monotonic()
    breaker = either.breaker(namespace, reset_timeout=0.3)
    while not call(breaker, fail=False):
        assert time.monotonic() - before < 5
        time.sleep(0.005)
    assert time.monotonic() - before >= 0.3


# -- the defects of stock ----------------------------------------------------------------------------------------------

#: What lies there, and whether the call fails: stock raises what is neither the user's nor the breaker's.
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
def test_bad_data_that_stock_raises_into_the_call_stays_out_of_ours(
    server: PrivateServer, defect: str, decoded: bool
) -> None:
    """What stock fails with (or, where texts are decoded, cannot even be built), ours repairs."""
    values, fail = STOCK_RAISES[defect]
    namespace = fresh_namespace()
    keys = circuit_keys(namespace, needs_one_slot=False)
    with _on_server(server, decoded=decoded) as place:
        lay(place.plain, keys, values)
        with pytest.raises((ValueError, OverflowError, OSError, AttributeError)):
            call(
                CircuitBreaker(state_storage=pybreaker.CircuitRedisStorage(CLOSED, place.client, namespace)), fail=fail
            )
        lay(place.plain, keys, values)
        call(place.breaker(namespace), fail=fail)
        assert_stock_can_read(place.plain, namespace)


def test_client_that_decodes_breaks_stock_and_serves_ours(server: PrivateServer) -> None:
    """`decode_responses=True` is what most applications use."""
    with _on_server(server, decoded=True) as place:
        with pytest.raises(AttributeError):
            CircuitBreaker(state_storage=pybreaker.CircuitRedisStorage(CLOSED, place.client, "decoded"))
        breaker = place.breaker("decoded")
        assert call(breaker, fail=True)
        assert breaker.fail_counter == 1


def test_open_circuit_without_opening_time_is_probed_by_stock_and_shut_by_ours(server: PrivateServer) -> None:
    """A key that went missing never opens the gate."""
    with _on_server(server) as place:
        for make, through in ((pybreaker.CircuitRedisStorage, True), (CircuitRedisStorage, False)):
            namespace = fresh_namespace()
            place.plain.set(f"{namespace}:pybreaker:state", "open")
            breaker = CircuitBreaker(reset_timeout=RESET_TIMEOUT, state_storage=make(CLOSED, place.client, namespace))
            assert call(breaker, fail=False) is through
