"""Format of a circuit in Redis: four plain values and a hash.

pybreaker's own storage writes the four plain values, too.  The hash holds the circuit as of this package's last
transition.  ``_engines/lua/prelude.lua`` reads and writes the same format.  `tests/servers/test_differential.py` and
`tests/servers/test_damaged_records.py` compare the two.
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

#: Longest push that is parsed, bytes.  A script publishes at most half of that.
PUSH_MAX_BYTES = 512

#: Placeholder for a value of another type, which MGET returns as missing.
WRONG_TYPE_VALUE = "?"

_WHOLE = re.compile(r"0|[1-9][0-9]{0,14}", re.ASCII)
#: Form of probe tokens.  An empty one is accepted, too.
PROBE_TOKEN_PATTERN = re.compile(r"[0-9a-f]{0,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """Values of a record as they were read.  ``None`` means missing or unreadable.

    Attributes:
        state: Plain value: one of the three states.
        fail_counter: Plain value: number of consecutive failures.
        success_counter: Plain value: number of consecutive successes.
        opened_at: Plain value: time of the last opening, whole seconds since the epoch.
        hash_circuit: Circuit in the hash.  The counters are meaningless.
        is_present: Whether any of the five values exists, readable or not.
        is_hash_damaged: Whether the hash exists and is unreadable.
        raw: Texts of the four plain values and of the fields of the hash.
    """

    state: str | None
    fail_counter: int | None
    success_counter: int | None
    opened_at: int | None
    hash_circuit: Circuit | None
    is_present: bool
    is_hash_damaged: bool
    raw: tuple[str | None, ...]


def to_text(value: RawValue) -> str | None:
    """Return a value as text.  Bytes that are no text become a text that no parser accepts."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def parse_record(plain: Sequence[RawValue], fields: Sequence[RawValue], *, is_hash: bool = True) -> StoredRecord:
    """Return the record of the raw values.

    Args:
        plain: The four plain values, in the order of `VALUE_NAMES`.
        fields: Fields of the hash, in the order of `HASH_FIELDS`.
        is_hash: Whether the fifth key holds a hash, or nothing.
    """
    raw = tuple(to_text(value) for value in (*plain, *fields))
    state, fail_counter, success_counter, opened_at = raw[:4]
    has_fields = is_hash and any(field is not None for field in raw[4:])
    hash_circuit = _parse_hash(raw[4:])
    return StoredRecord(
        state=state if state in STATES else None,
        fail_counter=_count(fail_counter),
        success_counter=_count(success_counter),
        opened_at=_whole(opened_at),
        hash_circuit=hash_circuit if has_fields else None,
        is_present=not is_hash or any(value is not None for value in raw),
        is_hash_damaged=not is_hash or (has_fields and hash_circuit is None),
        raw=raw,
    )


def _parse_hash(fields: Sequence[str | None]) -> Circuit | None:
    """Return the circuit in the hash (``None`` if the hash is damaged)."""
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
    """Return the circuit in a published message: the server's time and the fields of the hash, separated by blanks.

    Every user with the right to publish may have sent the message.  So the circuit is only compared, and never stored.

    Returns:
        The circuit without its counters (``None`` if the message is malformed).
    """
    if payload is None or len(payload) > PUSH_MAX_BYTES:
        return None
    now_ms, *fields = (to_text(payload) or "").split(" ")
    at_ms = _whole(now_ms)
    circuit = _parse_hash(fields) if len(fields) == len(HASH_FIELDS) else None
    if circuit is None or at_ms is None or _is_in_future(circuit, at_ms):
        return None
    return circuit


def _is_in_future(circuit: Circuit, at_ms: int) -> bool:
    is_too_long = circuit.with_bounded_lease(at_ms) is not circuit
    return is_too_long or max(circuit.opened_at_ms or 0, circuit.noisy_until_ms - NOISE_MAX_MS) > at_ms


@dataclass(frozen=True, slots=True)
class RecordChanges:
    """Writes that make a record hold a circuit.

    Attributes:
        plain: New plain values by name.  ``None`` deletes the value.
        hash_fields: Fields of the hash, all or none.
        is_hash_deleted: Whether the fifth key is deleted first.
    """

    plain: dict[str, str | None]
    hash_fields: dict[str, str]
    is_hash_deleted: bool

    def __bool__(self) -> bool:
        return bool(self.plain or self.hash_fields or self.is_hash_deleted)


def changes_for(circuit: Circuit, found: StoredRecord) -> RecordChanges:
    """Return the writes that make a record hold a circuit.

    The hash is created when the four plain values are no longer sufficient.

    Args:
        circuit: Circuit to hold.
        found: Record as it was read.
    """
    seconds = whole_seconds(circuit.opened_at_ms)
    plain = (
        circuit.state,
        str(circuit.fail_counter),
        str(circuit.success_counter),
        None if seconds is None else str(seconds),
    )
    hash_fields = (
        str(circuit.generation),
        circuit.state,
        "" if circuit.opened_at_ms is None else f"{circuit.opened_at_ms:.0f}",
        circuit.probe_token,
        f"{circuit.probe_until_ms:.0f}",
        f"{circuit.noisy_until_ms:.0f}",
        f"{circuit.probe_lease_ms:.0f}",
    )
    exceeds_plain = circuit.generation > 0 or circuit.noisy_until_ms > 0 or (circuit.opened_at_ms or 0) % 1000 > 0
    is_hash_needed = found.hash_circuit is not None or exceeds_plain
    has_changed = hash_fields != found.raw[4:]
    return RecordChanges(
        plain={name: new for name, new, old in zip(VALUE_NAMES, plain, found.raw, strict=False) if new != old},
        hash_fields=dict(zip(HASH_FIELDS, hash_fields, strict=True)) if is_hash_needed and has_changed else {},
        is_hash_deleted=found.is_hash_damaged,
    )


def _whole(value: str | None) -> int | None:
    """Return the number of a plain decimal with at most 15 digits, which a Lua number represents exactly."""
    return int(value) if value is not None and _WHOLE.fullmatch(value) else None


def _count(value: str | None, most: int = COUNT_LIMIT - 1) -> int | None:
    """Return the number of a plain decimal up to a limit."""
    number = _whole(value)
    return number if number is not None and number <= most else None


def whole_seconds(at_ms: float | None) -> int | None:
    """Return a time in milliseconds as whole seconds, as the plain value holds the time."""
    return None if at_ms is None else int(at_ms // 1000)


#: Time by which keys may outlive their TTL, milliseconds.  Counts renew the TTL only after this margin is used up.
TTL_RENEWAL_MARGIN_MS = 1000


def lifetime_ms(state: str, ttl_ms: int) -> int:
    """Return the milliseconds from the last write until the keys may expire.

    A closed circuit that expires loses only failures that no longer count.  Another circuit lives for a day at least.
    A probe's lease may last that long.  A reset timeout, which only the breaker has, rarely lasts longer.

    Args:
        state: State of the circuit.
        ttl_ms: Time to live that the user has set, milliseconds.
    """
    return ttl_ms if state == CLOSED else max(ttl_ms, LEASE_MAX_MS)
