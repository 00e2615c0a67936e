"""How a circuit lies in Redis, and what to believe when it lies there badly.

Knows: the five values and their formats, which of them stock pybreaker writes too.  Does not know: commands, clients.

The same rules stand in ``lua/circuit.lua``; `tests/test_differential.py` and `tests/test_bad_data.py` compare them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pybreaker_redis._circuit import (
    CLOSED,
    COUNT_LIMIT,
    HALF_OPEN,
    LEASE_MAX_MS,
    NOISE_MAX_MS,
    OPEN,
    STATES,
    Circuit,
    new_circuit,
    next_count,
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


@dataclass(frozen=True, slots=True)
class ResolvedRecord:
    """The circuit that follows from what was found.

    Attributes:
        circuit: What to go on from.
        event: ``created``, ``restored`` (it had vanished, this process knew it), ``repaired NAME…``, or empty.
    """

    circuit: Circuit
    event: str


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


def resolve_record(found: StoredRecord, known: Circuit | None, state_if_missing: str, now_ms: int) -> ResolvedRecord:
    """Repair what is damaged, adopt what somebody else moved, bring back what was lost.

    The mark is the memory of our last transition.  A process that knows a later one than the hash has seen the server
    lose data, so its knowledge takes the place of the mark, and of a state that agrees with the older mark.  A state
    that differs from the mark was written by a stock worker or with redis-cli: it is adopted as a transition of theirs.

    Args:
        found: What was read.
        known: The circuit as this process saw it last.
        state_if_missing: The state of a circuit that nobody knows.
        now_ms: The server's time.
    """
    if not found.is_present and known is None:
        return ResolvedRecord(new_circuit(state_if_missing, now_ms), "created")

    mark, lost = _last_transition(found, known)
    state, opened_at, event = found.state, found.opened_at, ""
    outdated = lost and found.mark is not None and found.mark.state == state
    if outdated or (lost and mark.state != CLOSED and state in (None, CLOSED)):
        state, opened_at, event = mark.state, None, "restored"
    elif state is None:
        state = mark.state if found.mark is not None or mark.state != CLOSED else state_if_missing
        event = "" if found.is_present else "restored"

    # While the circuit is open the time only moves forward: a later one is somebody's new trip, an earlier one damage.
    marked_at = _seconds(mark.opened_at_ms)
    backward = state == mark.state == OPEN and opened_at is not None and opened_at < (marked_at or 0)
    if backward:
        opened_at = None
    ours = state == mark.state and not (state == OPEN and opened_at not in (None, marked_at))
    if opened_at is not None and opened_at == marked_at:
        # Opened by somebody without saying when, as with redis-cli or by a host whose clock is behind: as of now.
        opened_at_ms = now_ms if state == OPEN != mark.state else mark.opened_at_ms
    elif opened_at is not None:
        opened_at_ms = opened_at * 1000
    else:
        opened_at_ms = mark.opened_at_ms if ours or state != OPEN else None
    if state == OPEN and opened_at_ms is None:
        opened_at_ms = now_ms
    future = opened_at_ms is not None and opened_at_ms > now_ms
    if future:
        opened_at_ms = now_ms

    probing = ours and state == HALF_OPEN and bool(mark.probe_token)
    circuit = Circuit(
        state=state,
        fail_counter=found.fail_counter or 0,
        success_counter=found.success_counter or 0,
        opened_at_ms=opened_at_ms,
        generation=mark.generation if ours else next_count(mark.generation),
        probe_token=mark.probe_token if probing else "",
        probe_until_ms=mark.probe_until_ms if probing else 0,
        noisy_until_ms=mark.noisy_until_ms if mark.noisy_until_ms <= now_ms + NOISE_MAX_MS else 0,
        probe_lease_ms=mark.probe_lease_ms if probing else 0,
    ).with_bounded_lease(now_ms)
    return ResolvedRecord(circuit, event or _repair_note(found, circuit, wrong_time=future or backward))


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


def _last_transition(found: StoredRecord, known: Circuit | None) -> tuple[Circuit, bool]:
    """Our last transition, and whether the server has lost it.

    Who knows the circuit closed and finds an older mark of an open one meets somebody who has opened it on an emptied
    server, or a server that has lost the recovery.  To go on from there costs a probe at most; to close the circuit
    would cost another outage.  It goes on in a generation that nobody has seen.  The probe is free there: its holder
    speaks for another generation, or has reported long ago.

    Within a generation the probe is given back once, and claimed in the next one.  So a record that has a holder of the
    probe that is known to be free is older, too: its server has lost the report.
    """
    mark = found.mark or Circuit()
    if known is None or known.generation < mark.generation:
        return mark, False
    if known.generation == mark.generation:
        reported = known.state == mark.state == HALF_OPEN and not known.probe_token
        return mark.with_free_probe() if reported else mark, False
    if found.mark is not None and found.state == mark.state != CLOSED == known.state:
        return replace(mark.with_free_probe(), generation=next_count(known.generation)), False
    return replace(known, noisy_until_ms=0), True


def intact_circuit(found: StoredRecord, known: Circuit, now_ms: int) -> Circuit | None:
    """Return the circuit that Redis holds, ``None`` if it would have to be repaired, adopted or restored."""
    believed = resolve_record(found, known, CLOSED, now_ms)
    return None if believed.event or changes_for(believed.circuit, found) else believed.circuit


def is_same_but_counters(one: Circuit, other: Circuit) -> bool:
    """Whether two circuits differ by nothing but their counters."""
    return replace(one, fail_counter=0, success_counter=0) == replace(other, fail_counter=0, success_counter=0)


def _repair_note(found: StoredRecord, circuit: Circuit, *, wrong_time: bool) -> str:
    damaged = [name for name in VALUE_NAMES[:3] if getattr(found, name) is None]
    if wrong_time or (found.opened_at is None and (found.raw[3] is not None or circuit.opened_at_ms is not None)):
        damaged.append("opened_at")
    if found.is_hash_damaged:
        damaged.append("circuit")
    return f"repaired {' '.join(damaged)}" if damaged else ""


def _whole(value: str | None) -> int | None:
    """A plain decimal of at most 15 digits: what a Lua number holds exactly."""
    return int(value) if value is not None and _WHOLE.fullmatch(value) else None


def _count(value: str | None, most: int = COUNT_LIMIT - 1) -> int | None:
    """A number that can still be counted on from, or another one with a limit."""
    number = _whole(value)
    return number if number is not None and number <= most else None


def _seconds(at_ms: float | None) -> int | None:
    return None if at_ms is None else int(at_ms // 1000)
