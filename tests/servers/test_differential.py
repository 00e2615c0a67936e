"""Differential test: scripts, transactions and the model in memory give the same results, record for record.

The clock of a server cannot be set. So the Python definition is evaluated for the instant that the server's reply
contains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import fakeredis
import pytest
import redis
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from pybreaker_redis._engines.base import Engine
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit, new_circuit
from pybreaker_redis._model.codec import TTL_RENEWAL_MARGIN_MS, VALUE_NAMES, lifetime_ms
from pybreaker_redis._model.intents import ClaimProbe, CountProbe, Load, RecordFailure, Trip
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.inspect import set_memory_circuit
from tests.support.records import (
    LEASE_MS,
    Ago,
    Paper,
    Wish,
    contents,
    found,
    fresh_namespace,
    known_circuits,
    laid,
    lay,
    states,
    wishes,
)
from tests.support.selection import examples

# The server is shared by all examples, and each example has its own namespace.
pytestmark = pytest.mark.slow

thorough = settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


#: Advance of the server's clock within one transaction, milliseconds. Before Redis 7, a read shows the advance.
CLOCK_MS = 50


@dataclass
class EngineSet:
    """Engines that are compared.

    Attributes:
        plain: Client that does not decode, for reading the keys.
        makes: Factories of the engines by name. Each takes the keys, and a TTL in milliseconds.
    """

    plain: Any
    makes: dict[str, Callable[..., Engine]] = field(default_factory=dict)


@contextlib.contextmanager
def engines_on(server: PrivateServer) -> Iterator[EngineSet]:
    """Yield the engines on a real server."""
    with (
        contextlib.closing(server.client()) as plain,
        contextlib.closing(server.client(decode_responses=True)) as texts,
    ):
        yield EngineSet(
            plain,
            {
                "lua": lambda keys, ttl_ms=0: LuaEngine(plain, keys, ttl_ms=ttl_ms),
                "lua, decoded": lambda keys, ttl_ms=0: LuaEngine(texts, keys, ttl_ms=ttl_ms),
                "optimistic": lambda keys, ttl_ms=0: TransactionEngine(plain, keys, ttl_ms),
                "optimistic, decoded": lambda keys, ttl_ms=0: TransactionEngine(texts, keys, ttl_ms),
            },
        )


@contextlib.contextmanager
def engines_on_fakeredis() -> Iterator[EngineSet]:
    """Yield the engines on fakeredis, as tests of applications use it."""
    fake_server = fakeredis.FakeServer()
    plain = fakeredis.FakeStrictRedis(server=fake_server)
    texts = fakeredis.FakeStrictRedis(server=fake_server, decode_responses=True)
    yield EngineSet(
        plain,
        {
            "optimistic": lambda keys, ttl_ms=0: TransactionEngine(plain, keys, ttl_ms),
            "optimistic, decoded": lambda keys, ttl_ms=0: TransactionEngine(texts, keys, ttl_ms),
        },
    )


@pytest.fixture
def engine_set(every_server: PrivateServer) -> Iterator[EngineSet]:
    """Yield the engines on each server found."""
    with engines_on(every_server) as engine_set:
        yield engine_set


@pytest.fixture
def fake_engine_set() -> Iterator[EngineSet]:
    """Yield the engines on fakeredis."""
    with engines_on_fakeredis() as engine_set:
        yield engine_set


class SettableClock:
    """Clock that tests set."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def __call__(self) -> float:
        """Return the time, in milliseconds since the epoch."""
        return self.now_ms


@dataclass
class Run:
    """One engine, with the definition on paper and in memory."""

    name: str
    engine: Engine
    client: Any
    keys: tuple[str, ...]
    state_if_missing: str
    paper: Paper = field(default_factory=lambda: Paper({}))
    clock: SettableClock = field(default_factory=SettableClock)
    memory: MemoryEngine | None = None
    known: Circuit | None = None
    ttl_ms: int = 0

    def step(self, wish: Wish) -> bool:
        """Apply an intent everywhere, compare the results, and return whether the intent was accepted."""
        intent = Load() if self.known is None else wish.intent(self.known, self.clock.now_ms)
        before = deepcopy(self.paper.values), self.ends() if self.ttl_ms else {}
        reply = self.engine.execute(intent, self.known, self.state_if_missing)
        self.paper.now_ms = self.clock.now_ms = reply.now_ms
        assert reply == self.paper.execute(intent, self.known, self.state_if_missing), (self.name, intent)
        assert found(self.client, self.keys) == self.paper.values, (self.name, intent)
        if self.memory is None:
            self.memory = MemoryEngine(new_circuit(self.state_if_missing, self.clock()), self.clock)
        in_memory = self.memory.execute(intent, None, "")
        assert (reply.accepted, reply.circuit) == (in_memory.accepted, in_memory.circuit), (self.name, intent)
        self.known = reply.circuit
        if self.ttl_ms:
            self.check_expiries(*before, is_read=isinstance(intent, Load))
        return reply.accepted

    def ends(self) -> dict[str, int | None]:
        """Return the expiry time of each key, in milliseconds since the epoch. ``None`` stands for no expiry."""
        with self.client.pipeline() as pipe:
            pipe.time()
            for key in self.keys:
                pipe.pttl(key)
            (seconds, microseconds), *left = pipe.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        # A reply of -1 stands for no expiry, and -2 for a missing key.
        return {name: None if ms == -1 else now_ms + ms for name, ms in zip(VALUE_NAMES, left, strict=True) if ms != -2}

    def check_expiries(self, values: dict[str, Any], ends: dict[str, int | None], *, is_read: bool) -> None:
        """Assert that a write sets one expiry for all keys, as late as promised, and that other operations set none."""
        after = self.ends()
        written = values != self.paper.values
        if not written and not (is_read and ends["state"] is None):
            assert after.keys() == ends.keys()
            for name, end in ends.items():
                assert end == after[name] or abs((end or 0) - (after[name] or 0)) <= CLOCK_MS, (self.name, name)
            return
        assert self.known is not None
        promised = self.clock.now_ms + lifetime_ms(self.known.state, self.ttl_ms)
        for name, end in after.items():
            assert end is not None, f"{self.name}: {name} has no end"
            assert promised - CLOCK_MS <= end <= promised + TTL_RENEWAL_MARGIN_MS + CLOCK_MS, (self.name, name)
        assert max(after.values()) - min(after.values()) <= CLOCK_MS, self.name  # type: ignore[operator,type-var]

    def shorten_expiry(self) -> None:
        """Move the expiry of all keys nearer, by the same time, as if no process had written for a while."""
        with self.client.pipeline() as pipe:
            end = min((end for end in self.ends().values() if end is not None), default=None)
            for key in self.keys:
                pipe.pexpireat(key, end - 2 * TTL_RENEWAL_MARGIN_MS) if end else pipe.ping()
            pipe.execute()

    def persist(self) -> None:
        """Remove the expiry of all keys, as writes of a process without a TTL do."""
        for key in self.keys:
            self.client.persist(key)

    def let_lease_run_out(self) -> None:
        """Let the lease end, as if its holder had died 30 seconds ago."""
        if self.known is None or not self.known.probe_token:
            return
        self.known = replace(self.known, probe_until_ms=1)
        assert self.memory is not None
        set_memory_circuit(self.memory, self.known)
        self.client.hset(self.keys[4], "probe_until_ms", "1")
        mark = self.paper.values["circuit"]
        assert isinstance(mark, dict)
        mark["probe_until_ms"] = b"1"

    def flush_scripts(self) -> None:
        """Flush the scripts, as an operator may at any time."""
        with contextlib.suppress(redis.ResponseError):
            self.client.script_flush()


def runs(engine_set: EngineSet, state_if_missing: str, ttl_ms: int = 0) -> list[Run]:
    """Return a run for each engine, with a circuit of its own."""
    made = []
    for name, make in engine_set.makes.items():
        keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
        made.append(Run(name, make(keys, ttl_ms), engine_set.plain, keys, state_if_missing, ttl_ms=ttl_ms))
    return made


#: Mostly intents, with events of the circuit in between.
histories = st.lists(
    st.one_of(*[wishes] * 12, st.just("the lease runs out"), st.just("the lease runs out"), st.just("SCRIPT FLUSH")),
    min_size=1,
    max_size=15,
)


def run_history(engine_set: EngineSet, state_if_missing: str, history: list[Wish | str], ttl_ms: int = 0) -> None:
    """Run the same history on every engine, and compare after every step."""
    for run in runs(engine_set, state_if_missing, ttl_ms):
        accepted = [run.step(Wish(Load))]
        for step in history:
            if isinstance(step, Wish):
                accepted.append(run.step(step))
            elif step == "SCRIPT FLUSH":
                run.flush_scripts()
            elif step == "no writes":
                run.shorten_expiry()
            elif step == "a write without a TTL":
                run.persist()
            else:
                run.let_lease_run_out()
        assert run.known is not None
        event(f"ends {run.known.state}")
        event(f"refused: {'some' if not all(accepted) else 'none'}")


RECOVERY: list[Wish | str] = [
    *[Wish(RecordFailure)] * 3,
    Wish(Trip),
    Wish(RecordFailure, -1),
    Wish(ClaimProbe),
    Wish(ClaimProbe),
    "the lease runs out",
    Wish(ClaimProbe, token="b1"),
    Wish(Trip, token="a0"),
    Wish(Trip),
]


@thorough
@given(state_if_missing=states, history=histories)
@example(state_if_missing=CLOSED, history=RECOVERY)
@pytest.mark.sample
def test_any_history_on_a_server_gives_the_same_records_with_every_engine(
    engine_set: EngineSet, state_if_missing: str, history: list[Wish | str]
) -> None:
    """Scripts, transactions and memory hold the same circuit. Scripts and transactions hold the same five keys."""
    run_history(engine_set, state_if_missing, history)


@thorough
@given(state_if_missing=states, history=histories)
@example(state_if_missing=CLOSED, history=RECOVERY)
def test_any_history_on_fakeredis_gives_the_same_records_with_every_engine(
    fake_engine_set: EngineSet, state_if_missing: str, history: list[Wish | str]
) -> None:
    """Tests of applications on fakeredis show what a server would show."""
    run_history(fake_engine_set, state_if_missing, history)


#: A circuit that is not closed stays for at least a day. One TTL is shorter, and one is longer.
ttls = st.sampled_from([60_000, 2 * 24 * 3600 * 1000])
histories_with_expiry = st.lists(
    st.one_of(*[wishes] * 6, *map(st.just, ["no writes", "no writes", "a write without a TTL"])),
    min_size=1,
    max_size=12,
)
with_ttl = given(state_if_missing=states, history=histories_with_expiry, ttl_ms=ttls)


@settings(thorough, max_examples=examples(40))
@with_ttl
@example(state_if_missing=CLOSED, history=RECOVERY, ttl_ms=60_000)
@example(state_if_missing=CLOSED, history=[Wish(Trip), "a write without a TTL", Wish(Load)], ttl_ms=60_000)
def test_any_history_with_a_ttl_on_a_server_gives_all_keys_one_expiry(
    engine_set: EngineSet, state_if_missing: str, history: list[Wish | str], ttl_ms: int
) -> None:
    """Each write renews the TTL of all five keys, and a refused intent renews none."""
    run_history(engine_set, state_if_missing, history, ttl_ms)


@settings(thorough, max_examples=examples(40))
@with_ttl
@example(state_if_missing=CLOSED, history=[Wish(Trip), "a write without a TTL", Wish(Load)], ttl_ms=60_000)
def test_any_history_with_a_ttl_on_fakeredis_gives_all_keys_one_expiry(
    fake_engine_set: EngineSet, state_if_missing: str, history: list[Wish | str], ttl_ms: int
) -> None:
    """On fakeredis, writes and refusals renew TTLs alike."""
    run_history(fake_engine_set, state_if_missing, history, ttl_ms)


def now_of(client: Any) -> int:
    """Return the server's time, in milliseconds."""
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def repair(engine_set: EngineSet, content: dict[str, Any], known: Any, state_if_missing: str, wish: Wish) -> list[str]:
    """Damage a record of every engine alike, compare each repair with the definition, and return short descriptions."""
    results = []
    for name, make in engine_set.makes.items():
        keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
        engine = make(keys)
        laid_at = now_of(engine_set.plain)
        values, circuit = laid(content, laid_at), known(laid_at)
        lay(engine_set.plain, keys, values)
        intent = wish.intent(circuit or Circuit(), laid_at)
        reply = engine.execute(intent, circuit, state_if_missing)
        paper = Paper(dict(values), reply.now_ms)
        assert reply == paper.execute(intent, circuit, state_if_missing), name
        assert found(engine_set.plain, keys) == paper.values, name
        again = engine.execute(Load(), reply.circuit, state_if_missing)
        assert (again.circuit, again.repair_note) == (reply.circuit, ""), f"{name}: still damaged after the repair"
        results.append(f"{reply.repair_note.partition(' ')[0] or 'sound'}, {reply.circuit.state}")
    return results


damage = given(content=contents, known=known_circuits(), state_if_missing=states, wish=wishes)


@thorough
@damage
def test_any_damage_on_a_server_is_repaired_alike_by_every_engine(
    engine_set: EngineSet, content: dict[str, Any], known: Any, state_if_missing: str, wish: Wish
) -> None:
    """Whatever the keys contain and the process has cached, one rule decides, and the repaired record is intact."""
    event(repair(engine_set, content, known, state_if_missing, wish)[0])


@thorough
@damage
def test_any_damage_on_fakeredis_is_repaired_alike_by_every_engine(
    fake_engine_set: EngineSet, content: dict[str, Any], known: Any, state_if_missing: str, wish: Wish
) -> None:
    """On fakeredis, the same rule repairs a record."""
    event(repair(fake_engine_set, content, known, state_if_missing, wish)[0])


#: A record of generation 3, opened 70 s ago and now half-open. Its prober holds a lease of 30 more seconds.
PROBED = {
    "state": b"half-open",
    "fail_counter": b"5",
    "success_counter": b"2",
    "opened_at": Ago(70_000, 1000),
    "circuit": {
        "generation": b"3",
        "state": b"half-open",
        "opened_at_ms": Ago(70_000, 1),
        "probe_token": b"a0",
        "probe_until_ms": Ago(-30_000, 1),
    },
}


def probed(**fields: Any) -> dict[str, Any]:
    """Return `PROBED` with other fields in its hash."""
    return {**PROBED, "circuit": {**PROBED["circuit"], **fields}}  # type: ignore[dict-item]


def opened(**values: Any) -> dict[str, Any]:
    """Return an open record of generation 3 with other values."""
    mark = {"generation": b"3", "state": b"open", "opened_at_ms": Ago(70_000, 1)}
    return {**PROBED, "state": b"open", "circuit": mark, **values}


#: A record for each rule that random records meet too seldom, with the expected result.
RULES: dict[str, tuple[dict[str, Any], Wish, dict[str, Any]]] = {
    "live probe is kept": (PROBED, Wish(Load), {"generation": 3, "probe_token": "a0"}),
    "lease longer than any is over": (probed(probe_until_ms=Ago(-(10**9), 1)), Wish(Load), {"probe_until_ms": 0}),
    "longest token is one": (probed(probe_token=b"a" * 64), Wish(Load), {"probe_token": "a" * 64}),
    "longer token is none": (probed(probe_token=b"a" * 65), Wish(Load), {"probe_token": ""}),
    "token in capitals is none": (probed(probe_token=b"A0"), Wish(Load), {"probe_token": ""}),
    "probe counted by hand keeps the lease": (PROBED, Wish(CountProbe, None, number=50), {"success_counter": 3}),
    "successes of a dead prober count": (
        probed(probe_until_ms=Ago(1, 1)),
        Wish(ClaimProbe, 3, "b1"),
        {"success_counter": 2, "probe_token": "b1", "generation": 4},
    ),
    "successes from before it opened do not": (
        opened(),
        Wish(ClaimProbe, 3, "b1"),
        {"success_counter": 0, "probe_token": "b1", "generation": 4},
    ),
    "other opening time is another spell": (opened(opened_at=Ago(9_000, 1000)), Wish(Load), {"generation": 4}),
    "earlier opening time is damage": (opened(opened_at=Ago(90_000, 1000)), Wish(Load), {"generation": 3}),
    "epoch as opening time is damage": (opened(opened_at=b"0"), Wish(Load), {"generation": 3, "state": OPEN}),
    "same opening time is the same": (opened(), Wish(Load), {"generation": 3}),
    "other state is a transition": ({**PROBED, "state": b"closed"}, Wish(Load), {"generation": 4, "state": CLOSED}),
    "lease with more left than its length is shortened": (
        probed(probe_until_ms=Ago(-(10**7), 1), probe_lease_ms=b"30000"),
        Wish(Load),
        {"generation": 3, "probe_token": "a0", "probe_lease_ms": 30_000},
    ),
    "length that no lease has is none": (probed(probe_lease_ms=b"86400001"), Wish(Load), {"probe_lease_ms": 0}),
    "claim of the holder renews the lease": (PROBED, Wish(ClaimProbe, 0, "a0", 50), {"probe_lease_ms": 50}),
    "largest generation is readable": (probed(generation=b"9" * 11), Wish(Load), {"generation": 99999999999}),
    "larger generation is not": (probed(generation=b"1" + b"0" * 12), Wish(Load), {"generation": 1, "probe_token": ""}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.sample
def test_rare_rule_holds_for_every_engine(engine_set: EngineSet, fake_engine_set: EngineSet, rule: str) -> None:
    """Each rule of the record holds for scripts and for transactions."""
    content, wish, expected = RULES[rule]
    for some in (engine_set, fake_engine_set):
        repair(some, content, lambda _: None, CLOSED, wish)
        for make in some.makes.values():
            keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
            lay(some.plain, keys, laid(content, now_of(some.plain)))
            circuit = make(keys).execute(wish.intent(Circuit(), 0), None, CLOSED).circuit
            assert {name: getattr(circuit, name) for name in expected} == expected


#: Cached records that are later than that of the server, with the expected results.
LOST_WRITES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "recovery, of a probe": (PROBED, {"state": CLOSED, "generation": 4}, {"generation": 5, "probe_token": ""}),
    "recovery, of a spell": (
        opened(),
        {"state": CLOSED, "generation": 5},
        {"generation": 6, "state": OPEN, "probe_token": ""},
    ),
    "report of a probe": (PROBED, {"state": HALF_OPEN, "generation": 3}, {"generation": 3, "probe_token": ""}),
    "claim": (
        opened(),
        {"state": HALF_OPEN, "generation": 4, "probe_token": "b1", "probe_lease_ms": 500},
        {"generation": 4, "state": HALF_OPEN, "probe_token": "b1", "probe_lease_ms": 500},
    ),
    "trip": (PROBED, {"state": OPEN, "generation": 4}, {"generation": 4, "state": OPEN, "probe_token": ""}),
}


@pytest.mark.parametrize("left_ms", [-50, 400, 10**7])
@pytest.mark.parametrize("loss", LOST_WRITES)
def test_lost_write_is_restored_alike_by_every_engine(
    engine_set: EngineSet, fake_engine_set: EngineSet, loss: str, left_ms: int
) -> None:
    """A failover or a snapshot may lose each transition, with any rest of the cached lease."""
    content, words, expected = LOST_WRITES[loss]

    def known(now_ms: int) -> Circuit:
        until_ms = now_ms + left_ms if "probe_token" in words else 0
        return Circuit(**{"opened_at_ms": now_ms - 70_000, "probe_until_ms": until_ms, **words})

    for some in (engine_set, fake_engine_set):
        repair(some, content, known, CLOSED, Wish(Load))
        for make in some.makes.values():
            keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
            laid_at = now_of(some.plain)
            lay(some.plain, keys, laid(content, laid_at))
            reply = make(keys).execute(Load(), known(laid_at), CLOSED)
            assert {name: getattr(reply.circuit, name) for name in expected} == expected
            assert reply.circuit.probe_until_ms <= reply.now_ms + 500


@pytest.mark.parametrize("unit", [1, 1000])
def test_opening_time_in_the_future_is_now_with_every_engine(engine_set: EngineSet, unit: int) -> None:
    """The record of a clock that was ahead is not trusted, whichever of its two times shows the lead."""
    content = opened(opened_at=Ago(-3_600_000, 1000))
    if unit == 1:
        content["circuit"] = {**content["circuit"], "opened_at_ms": Ago(-3_600_000, 1)}
    for name, make in engine_set.makes.items():
        keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
        lay(engine_set.plain, keys, laid(content, now_of(engine_set.plain)))
        reply = make(keys).execute(Load(), None, CLOSED)
        assert reply.circuit.opened_at_ms == reply.now_ms, name
        repair(engine_set, content, lambda _: None, CLOSED, Wish(Load))


def test_lease_ends_to_the_millisecond_with_every_engine(engine_set: EngineSet) -> None:
    """A probe is refused before the end of the lease, and granted from that millisecond on."""
    for name, make in engine_set.makes.items():
        granted_at = set()
        # With a short lead, a slow machine would be too late.
        for lead in range(2, 32):
            keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
            until = now_of(engine_set.plain) + lead
            lay(engine_set.plain, keys, laid(probed(probe_until_ms=b"%d" % until), until))
            engine = make(keys)
            reply = engine.execute(ClaimProbe(3, "b1", LEASE_MS), None, CLOSED)
            while not reply.accepted:
                assert reply.now_ms < until, name
                reply = engine.execute(ClaimProbe(3, "b1", LEASE_MS), None, CLOSED)
            assert reply.now_ms >= until, name
            granted_at.add(reply.now_ms - until)
        assert 0 in granted_at, name


def test_seeded_history_reaches_half_open(engine_set: EngineSet) -> None:
    """The example that seeds the histories reaches the intended states."""
    for run in runs(engine_set, CLOSED):
        seen = []
        run.step(Wish(Load))
        for step in RECOVERY:
            if isinstance(step, Wish):
                run.step(step)
            else:
                run.let_lease_run_out()
            assert run.known is not None
            seen.append(run.known.state)
        assert seen == [CLOSED] * 3 + [OPEN] * 2 + [HALF_OPEN] * 5 + [OPEN]
        assert run.known is not None
        assert run.known.generation == 4
