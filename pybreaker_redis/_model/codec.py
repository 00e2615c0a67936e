"""How a circuit lies in Redis, and what to believe when it lies there badly.

Knows: the five values and their formats, which of them stock pybreaker writes too.  Does not know: commands, clients.

The same rules stand in ``_engines/lua/circuit.lua``; `tests/servers/test_differential.py` and
`tests/servers/test_damaged_records.py` compare them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pybreaker_redis._model.circuit import (
    CLOSED,
    COUNT_LIMIT,
    LEASE_MAX_MS,
    NOISE_MAX_MS,
    STATES,
    Circuit,
)

#: Fields of the hash, in the order in which they are read and written.
HASH_FIELDS = (
    *("generation", "state", "opened_at_ms"),
    *("probe_token", "probe_until_ms", "noisy_until_ms", "probe_lease_ms"),
)

#: Names of the five values, in the order of the keys.
VALUE_NAMES = ("state", "fail_counter", "success_counter", "opened_at", "circuit")

RawValue = bytes | str | None

#: Longest payload of a push that is parsed, bytes: a script's is half as long at most.
PUSH_MAX_BYTES = 512

#: Stands for a value of another type, which MGET reports as missing.
WRONG_TYPE_VALUE = "?"

_WHOLE = re.compile(r"0|[1-9][0-9]{0,14}", re.ASCII)
#: As claims make them, or empty.
PROBE_TOKEN_PATTERN = re.compile(r"[0-9a-f]{0,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What was read, parsed but not yet believed.  ``None`` stands for missing and for unreadable alike.

    Attributes:
        state: One of the three states.
        fail_counter: Consecutive failures.
        success_counter: Consecutive successes.
        opened_at: Whole seconds since the epoch: all that stock writes.
        mark: The circuit as of our last transition, from the hash (its counters mean nothing).
        is_present: Whether any of the five was there at all, readable or not.
        is_hash_damaged: Whether the hash was there, but made no sense.
        raw: The four plain values and the fields of the hash as read.
    """

    state: str | None
    fail_counter: int | None
    success_counter: int | None
    opened_at: int | None
    mark: Circuit | None
    is_present: bool
    is_hash_damaged: bool
    raw: tuple[str | None, ...]


def to_text(value: RawValue) -> str | None:
    """A value as text; bytes that are not text become text that nothing accepts."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def parse_record(plain: Sequence[RawValue], mark: Sequence[RawValue], *, mark_is_hash: bool = True) -> StoredRecord:
    """Read the four plain values and the fields of the hash.

    Args:
        plain: State, fail counter, success counter, opened at.
        mark: The hash, in the order of `HASH_FIELDS`.
        mark_is_hash: False if that key holds something else.
    """
    raw = tuple(to_text(value) for value in (*plain, *mark))
    state, fail_counter, success_counter, opened_at = raw[:4]
    marked = mark_is_hash and any(field is not None for field in raw[4:])
    read = _mark(raw[4:])
    return StoredRecord(
        state=state if state in STATES else None,
        fail_counter=_count(fail_counter),
        success_counter=_count(success_counter),
        opened_at=_whole(opened_at),
        mark=read if marked else None,
        is_present=not mark_is_hash or any(value is not None for value in raw),
        is_hash_damaged=not mark_is_hash or (marked and read is None),
        raw=raw,
    )


def _mark(fields: Sequence[str | None]) -> Circuit | None:
    """The hash as a circuit, ``None`` if it makes no sense."""
    generation, state, opened_at_ms, token, probe_until_ms, noisy_until_ms, probe_lease_ms = fields
    number = _count(generation)
    if number is None or state is None or state not in STATES:
        return None
    return Circuit(
        state=state,
        opened_at_ms=_whole(opened_at_ms),
        generation=number,
        probe_token=token if token and PROBE_TOKEN_PATTERN.fullmatch(token) else "",
        probe_until_ms=_whole(probe_until_ms) or 0,
        noisy_until_ms=_whole(noisy_until_ms) or 0,
        probe_lease_ms=_count(probe_lease_ms, LEASE_MAX_MS) or 0,
    )


def parse_published(payload: RawValue) -> Circuit | None:
    """Read what a script published: the server's time and the fields of the hash, with blanks in between.

    Any user who may publish may have sent it, so it is something to compare with, and nothing to keep.

    Returns:
        The circuit without its counters; ``None`` if the payload makes no sense.
    """
    if payload is None or len(payload) > PUSH_MAX_BYTES:
        return None
    now_ms, *fields = (to_text(payload) or "").split(" ")
    at_ms = _whole(now_ms)
    circuit = _mark(fields) if len(fields) == len(HASH_FIELDS) else None
    if circuit is None or at_ms is None or _lies_in_the_future(circuit, at_ms):
        return None
    return circuit


def _lies_in_the_future(circuit: Circuit, at_ms: int) -> bool:
    is_too_long = circuit.with_bounded_lease(at_ms) is not circuit
    return is_too_long or max(circuit.opened_at_ms or 0, circuit.noisy_until_ms - NOISE_MAX_MS) > at_ms


@dataclass(frozen=True, slots=True)
class RecordChanges:
    """What has to be written so that Redis holds a circuit.

    Attributes:
        plain: New values by name; ``None`` deletes.
        mark: The fields of the hash, all or none.
        is_hash_deleted: Delete what lies in the place of the hash first.
    """

    plain: dict[str, str | None]
    mark: dict[str, str]
    is_hash_deleted: bool

    def __bool__(self) -> bool:
        return bool(self.plain or self.mark or self.is_hash_deleted)


def changes_for(circuit: Circuit, found: StoredRecord) -> RecordChanges:
    """What differs between `circuit` and what was found.

    The hash is only created once there is something that stock's keys cannot say.
    """
    seconds = _seconds(circuit.opened_at_ms)
    plain = (
        circuit.state,
        str(circuit.fail_counter),
        str(circuit.success_counter),
        None if seconds is None else str(seconds),
    )
    mark = (
        str(circuit.generation),
        circuit.state,
        "" if circuit.opened_at_ms is None else f"{circuit.opened_at_ms:.0f}",
        circuit.probe_token,
        f"{circuit.probe_until_ms:.0f}",
        f"{circuit.noisy_until_ms:.0f}",
        f"{circuit.probe_lease_ms:.0f}",
    )
    moved = circuit.generation > 0 or circuit.noisy_until_ms > 0 or (circuit.opened_at_ms or 0) % 1000 > 0
    needed = found.mark is not None or moved
    return RecordChanges(
        plain={name: new for name, new, old in zip(VALUE_NAMES, plain, found.raw, strict=False) if new != old},
        mark=dict(zip(HASH_FIELDS, mark, strict=True)) if needed and mark != found.raw[4:] else {},
        is_hash_deleted=found.is_hash_damaged,
    )


def _whole(value: str | None) -> int | None:
    """A plain decimal of at most 15 digits: what a Lua number holds exactly."""
    return int(value) if value is not None and _WHOLE.fullmatch(value) else None


def _count(value: str | None, most: int = COUNT_LIMIT - 1) -> int | None:
    """A number that can still be counted on from, or another one with a limit."""
    number = _whole(value)
    return number if number is not None and number <= most else None


def _seconds(at_ms: float | None) -> int | None:
    return None if at_ms is None else int(at_ms // 1000)


#: How much longer than that they live at most, milliseconds: counts renew what is left only when this is used up.
TTL_RENEWAL_MARGIN_MS = 1000


def lifetime_ms(state: str, ttl_ms: int) -> int:
    """Milliseconds from the last write until the keys may expire.

    Of a closed circuit nothing is lost but failures that are not to count any more.  One that is not closed lives for a
    day at least: so long a probe's lease can be, and a reset timeout, which only the breaker knows, hardly is.

    Args:
        state: Of the circuit.
        ttl_ms: What its user wishes, milliseconds.
    """
    return ttl_ms if state == CLOSED else max(ttl_ms, LEASE_MAX_MS)
