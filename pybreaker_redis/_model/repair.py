"""Circuit that follows from a stored record, damaged or not.

Knows: fields of records.  Does not know: who stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, NOISE_MAX_MS, OPEN, Circuit, new_circuit, next_count
from pybreaker_redis._model.codec import VALUE_NAMES, StoredRecord, _seconds, changes_for


@dataclass(frozen=True, slots=True)
class ResolvedRecord:
    """The circuit that follows from what was found.

    Attributes:
        circuit: What to go on from.
        event: ``created``, ``restored`` (it had vanished, this process knew it), ``repaired NAME…``, or empty.
    """

    circuit: Circuit
    event: str


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
