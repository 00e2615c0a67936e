"""Records as they lie in Redis, sound and damaged, and intents for them: at random, on a server, without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hypothesis import strategies as st

from pybreaker_redis._model.circuit import HALF_OPEN, OPEN, STATES, Circuit
from pybreaker_redis._model.codec import HASH_FIELDS, VALUE_NAMES, WRONG_TYPE_VALUE, changes_for, parse_record
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    ReleaseProbe,
    Reply,
    ResetProbes,
    SetOpenedAt,
    SetState,
    ShareTrip,
    Trip,
)
from pybreaker_redis._model.repair import resolve_record

#: Value of a key: a string, a hash, or the name of another type with any content.
Value = bytes | dict[str, bytes] | str

#: Types of keys that cannot be read as a string.
OTHER_TYPES = ("list", "set", "zset", "stream")

TOKENS = ("a0", "b1", "c2")

LEASE_MS = 30_000

states = st.sampled_from(STATES)


# -- intents -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """An intent relative to the circuit that it will meet, so that most random ones apply to that circuit.

    Attributes:
        kind: Class of the intent.
        generation: Difference to the circuit's generation.  ``None`` means by hand.
        token: Token of the probe.  ``None`` means the circuit's own.
        number: Milliseconds: a lease, noise, or the time since the opening.
        state: State for `SetState`.
        threshold: Successes that close the circuit, or failures that open it.
    """

    kind: type[Intent]
    generation: int | None = 0
    token: str | None = None
    number: int = LEASE_MS
    state: str = OPEN
    threshold: int = 1

    def intent(self, circuit: Circuit, now_ms: float) -> Intent:
        """Return the intent for `circuit`."""
        generation = None if self.generation is None else max(0, circuit.generation + self.generation)
        token = circuit.probe_token if self.token is None else self.token
        # Claims have no use for a threshold.  The highest one stands for a claim instead of the present probe.
        instead = circuit.probe_token if self.threshold == 3 else ""
        makes: dict[type[Intent], Callable[[], Intent]] = {
            Load: Load,
            ResetProbes: ResetProbes,
            SetState: lambda: SetState(self.state),
            SetOpenedAt: lambda: SetOpenedAt(now_ms - self.number),
            # The shortest number stands for no noise: a failure that is not pushed to other processes.
            # One less, so that the usual threshold of a wish stands for none.
            RecordFailure: lambda: RecordFailure(
                generation, token, 0 if self.number == 1 else self.number, 1, self.threshold - 1
            ),
            CountProbe: lambda: CountProbe(generation, token, self.number, self.threshold),
            ShareTrip: lambda: ShareTrip(generation or 0, self.number),
            ClaimProbe: lambda: ClaimProbe(generation or 0, self.token or TOKENS[0], self.number, instead),
        }
        make = makes.get(self.kind)
        return make() if make else self.kind(generation, token)  # type: ignore[call-arg]


#: Mostly admitted just now.  Some are old, by hand, or of a generation that this server never had.
_generations = st.sampled_from([0, 0, 0, 0, 0, 0, None, -1, -2, 1])
_tokens = st.sampled_from([None, None, None, None, "", *TOKENS])
_leases = st.sampled_from([1, 50, LEASE_MS, LEASE_MS])
_thresholds = st.integers(1, 3)
_kinds = st.sampled_from(
    [RecordFailure, RecordSuccess, CountProbe, ReleaseProbe, Trip, Trip, ShareTrip, ClaimProbe, ClaimProbe, Close]
)

wishes = st.one_of(
    st.builds(Wish, _kinds, _generations, _tokens, _leases, threshold=_thresholds),
    st.builds(Wish, _kinds, _generations, _tokens, _leases, threshold=_thresholds),
    st.builds(Wish, _kinds, _generations, _tokens, _leases, threshold=_thresholds),
    st.builds(Wish, st.just(SetState), state=states),
    st.builds(Wish, st.just(SetOpenedAt), number=st.integers(-5000, 5000)),
    st.builds(Wish, st.sampled_from([Load, ResetProbes])),
)


@st.composite
def circuits(draw: st.DrawFn, now_ms: int = 1_000_000_000_000) -> Circuit:
    """Draw a sound circuit at some instant."""
    state = draw(states)
    times = st.integers(now_ms - 100_000, now_ms)
    circuit = Circuit(
        state=state,
        fail_counter=draw(st.integers(0, 9)),
        success_counter=draw(st.integers(0, 9)),
        opened_at_ms=draw(times if state == OPEN else st.none() | times),
        generation=draw(st.integers(0, 9)),
        noisy_until_ms=draw(st.sampled_from([0, 0, now_ms - 100, now_ms + 400, now_ms + 600])),
    )
    if state != HALF_OPEN:
        return circuit
    token = draw(st.sampled_from(["", *TOKENS]))
    if not token:
        return circuit
    lease_ms = draw(st.sampled_from([LEASE_MS, LEASE_MS, 0]))
    until_ms = draw(st.integers(now_ms - 1000, now_ms + LEASE_MS))
    return replace(circuit, probe_token=token, probe_until_ms=until_ms, probe_lease_ms=lease_ms)


# -- values of the keys ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ago:
    """An instant in a record, by its distance from now.

    Attributes:
        ms: Milliseconds before now.  Negative values lie in the future.
        unit: Milliseconds per unit of the number in the record: 1 or 1000.
    """

    ms: int
    unit: int

    def number(self, now_ms: int) -> bytes:
        """Return the number in the record."""
        return b"%d" % ((now_ms - self.ms) // self.unit)


_distances = st.sampled_from([0, 300, 300, 2_500, 70_000, -500, -3_600_000])

#: Values that no process writes, near to right ones and far from them.
_garbage = st.sampled_from(
    [
        *(b"", b" ", b"-1", b"+1", b"1.5", b"1e3", b"0x10", b"inf", b"nan", b"None", b"007", b" 5", b"5\n", b"5\x00"),
        *(b"999999999999", b"999999999999999", b"1" + b"0" * 15, b"9" * 400, b"\xff\xfe", b"\\xff", b"\xd9\xa3"),
        *(b"CLOSED", b"Open", b"half_open", b"open\n", b"halfopen", b"a0 ", b"A0", b"a" * 65),
    ]
) | st.binary(max_size=6)

_numbers = st.integers(0, 12).map(lambda number: b"%d" % number)
_state_names = states.map(str.encode)


def _often(good: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, good, *others)


_other_types = st.sampled_from(OTHER_TYPES)
_foreign_hashes = st.just({"foreign": b"value"})
_marks = st.fixed_dictionaries(
    {},
    optional={
        "generation": _often(_numbers, _garbage),
        "state": _often(_state_names, _garbage),
        "opened_at_ms": _often(st.builds(Ago, _distances, st.just(1)), st.just(b""), _garbage),
        "probe_token": _often(st.sampled_from([b"", *(token.encode() for token in TOKENS)]), _garbage),
        "probe_until_ms": _often(st.builds(Ago, st.sampled_from([-30_000, 50, -(10**9)]), st.just(1)), _garbage),
        "noisy_until_ms": _often(st.builds(Ago, st.sampled_from([-600, -400, 50, -(10**9)]), st.just(1)), _garbage),
        "probe_lease_ms": _often(st.sampled_from([b"0", b"50", b"30000", b"86400000", b"86400001"]), _garbage),
        "foreign": st.just(b"value"),
    },
).map(lambda fields: fields or {"foreign": b"value"})


def _damaged(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw a value of a string key, mostly a right one."""
    return _often(good, _garbage, _other_types, _foreign_hashes)


_values = {
    "state": _damaged(_state_names),
    "fail_counter": _damaged(_numbers),
    "success_counter": _damaged(_numbers),
    "opened_at": _damaged(st.builds(Ago, _distances, st.just(1000))),
    "circuit": _often(_marks, _garbage, _other_types),
}


@st.composite
def _sound(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a record as the package writes it, sometimes with one key overwritten or lost by another writer."""
    now_ms = 1_000_000_000_000
    circuit = draw(circuits(now_ms))
    opened = None if circuit.opened_at_ms is None else int(now_ms - circuit.opened_at_ms)
    content: dict[str, Any] = {
        "state": circuit.state.encode(),
        "fail_counter": b"%d" % circuit.fail_counter,
        "success_counter": b"%d" % circuit.success_counter,
        "circuit": {
            "generation": b"%d" % circuit.generation,
            "state": circuit.state.encode(),
            "opened_at_ms": b"" if opened is None else Ago(opened, 1),
            "probe_token": circuit.probe_token.encode(),
            "probe_until_ms": Ago(int(now_ms - circuit.probe_until_ms), 1) if circuit.probe_token else b"0",
            "noisy_until_ms": Ago(int(now_ms - circuit.noisy_until_ms), 1) if circuit.noisy_until_ms else b"0",
            "probe_lease_ms": b"%d" % circuit.probe_lease_ms,
        },
    }
    if opened is not None:
        content["opened_at"] = Ago(opened, 1000)
    name = draw(st.sampled_from(VALUE_NAMES))
    fate = draw(st.sampled_from(["left alone", "left alone", "overwritten", "lost"]))
    if fate == "overwritten":
        content[name] = draw(_values[name])
    elif fate == "lost":
        content.pop(name, None)
    return content


#: A sound record, or any subset of the five keys, each with a right value or any other.  See `laid`.
contents = st.one_of(_sound(), _sound(), st.fixed_dictionaries({}, optional=_values))


def laid(content: Mapping[str, Any], now_ms: int) -> dict[str, Value]:
    """Return random `contents` with their instants as numbers."""

    def at(value: Any) -> Any:
        if isinstance(value, dict):
            return {field: at(item) for field, item in value.items()}
        return value.number(now_ms) if isinstance(value, Ago) else value

    return {name: at(value) for name, value in content.items()}


@st.composite
def known_circuits(draw: st.DrawFn) -> Callable[[int], Circuit | None]:
    """Draw an earlier circuit of a process, older or newer than the record, as a function of the time."""
    if draw(st.integers(0, 3)) == 0:
        return lambda _: None
    now_ms = 1_000_000_000_000
    circuit = draw(circuits(now_ms))

    def at(now: int) -> Circuit:
        return moved_by(circuit, now - now_ms)

    return at


def moved_by(circuit: Circuit, distance_ms: int) -> Circuit:
    """Return the same circuit at another time."""
    return replace(
        circuit,
        opened_at_ms=None if circuit.opened_at_ms is None else circuit.opened_at_ms + distance_ms,
        probe_until_ms=circuit.probe_until_ms + distance_ms if circuit.probe_token else 0,
        noisy_until_ms=circuit.noisy_until_ms + distance_ms if circuit.noisy_until_ms else 0,
    )


# -- on a server -------------------------------------------------------------------------------------------------------


def lay(client: Any, keys: tuple[str, ...], values: Mapping[str, Value]) -> None:
    """Write these values into the five keys, and nothing more."""
    with client.pipeline(transaction=False) as pipe:
        pipe.delete(*keys)
        for name, value in values.items():
            key = keys[VALUE_NAMES.index(name)]
            if isinstance(value, bytes):
                pipe.set(key, value)
            elif isinstance(value, dict):
                pipe.hset(key, mapping=value)
            else:
                _FILL[value](pipe, key)
        pipe.execute()


_FILL: dict[str, Callable[[Any, str], Any]] = {
    "list": lambda pipe, key: pipe.rpush(key, "x"),
    "set": lambda pipe, key: pipe.sadd(key, "x"),
    "zset": lambda pipe, key: pipe.zadd(key, {"x": 1}),
    "stream": lambda pipe, key: pipe.xadd(key, {"x": "x"}),
}


def found(client: Any, keys: tuple[str, ...]) -> dict[str, Value]:
    """Return the values of the five keys.  `client` must not decode."""
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.type(key)
            pipe.get(key)
            pipe.hgetall(key)
        answers = pipe.execute(raise_on_error=False)
    values: dict[str, Value] = {}
    for name, kind, string, fields in zip(VALUE_NAMES, answers[::3], answers[1::3], answers[2::3], strict=True):
        if kind == b"string":
            values[name] = string
        elif kind == b"hash":
            values[name] = {field.decode(): value for field, value in fields.items()}
        elif kind != b"none":
            values[name] = kind.decode()
    return values


# -- without a server --------------------------------------------------------------------------------------------------


@dataclass
class Paper:
    """The five keys without a server: the effect of intents according to the Python definition, at a given instant.

    Attributes:
        values: Values as in `found`.
        now_ms: Time in milliseconds.
    """

    values: dict[str, Value]
    now_ms: float = 0

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Execute an intent as `Engine.execute` does."""
        plain: list[bytes | str | None] = [self._string(name) for name in VALUE_NAMES[:4]]
        if plain[3] is None and "opened_at" in self.values:
            plain[3] = WRONG_TYPE_VALUE
        circuit = self.values.get("circuit", {})
        is_hash = isinstance(circuit, dict)
        mark = [circuit.get(field) if isinstance(circuit, dict) else None for field in HASH_FIELDS]
        record = parse_record(plain, mark, is_hash=is_hash)
        resolved = resolve_record(record, known, state_if_missing, int(self.now_ms))
        decision = intent.apply(resolved.circuit, self.now_ms)
        changes = changes_for(decision.circuit, record)
        for name, text in changes.plain.items():
            if text is None:
                self.values.pop(name, None)
            else:
                self.values[name] = text.encode()
        if changes.is_hash_deleted:
            self.values.pop("circuit", None)
        if changes.hash_fields:
            fields = self.values.setdefault("circuit", {})
            assert isinstance(fields, dict)
            fields.update({field: text.encode() for field, text in changes.hash_fields.items()})
        return Reply(decision.accepted, decision.circuit, self.now_ms, resolved.repair_note)

    def _string(self, name: str) -> bytes | None:
        value = self.values.get(name)
        return value if isinstance(value, bytes) else None


_namespaces = count()


def fresh_namespace() -> str:
    """Return a namespace that no other example uses."""
    return f"{os.getpid()}-{next(_namespaces)}"
