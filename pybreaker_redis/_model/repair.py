"""Resolution of a stored record, damaged or not, into a circuit.

``_engines/lua/prelude.lua`` contains the same rules.  `tests/servers/test_differential.py` and
`tests/servers/test_damaged_records.py` compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, NOISE_MAX_MS, OPEN, Circuit, new_circuit, next_count
from pybreaker_redis._model.codec import VALUE_NAMES, StoredRecord, changes_for, whole_seconds


@dataclass(frozen=True, slots=True)
class ResolvedRecord:
    """Circuit that follows from a record.

    Attributes:
        circuit: The circuit.
        repair_note: Condition of the record: ``created``, ``restored`` (lost, and restored from the last
            read of the process), ``repaired NAME…`` (damaged values), or empty (sound).
    """

    circuit: Circuit
    repair_note: str


def resolve_record(found: StoredRecord, known: Circuit | None, state_if_missing: str, now_ms: int) -> ResolvedRecord:
    """Return the circuit of a record: repair damaged values, adopt foreign writes, restore lost data.

    The hash holds the last transition of this package.  If the process has read a later transition, the server has lost
    data.  The known circuit then replaces the hash, and a state that agrees with the older hash.  A state that differs
    from the hash was written by pybreaker's own storage or by redis-cli.  Such a state is adopted as a transition.

    Args:
        found: Record as it was read.
        known: Circuit as the process last read it (``None``: never).
        state_if_missing: Initial state of a circuit that exists neither in Redis nor in `known`.
        now_ms: Present time by the server's clock, milliseconds since the epoch.
    """
    if not found.is_present and known is None:
        return ResolvedRecord(new_circuit(state_if_missing, now_ms), "created")

    last, is_lost = _last_transition(found, known)
    state, opened_at, note = found.state, found.opened_at, ""
    is_outdated = is_lost and found.hash_circuit is not None and found.hash_circuit.state == state
    if is_outdated or (is_lost and last.state != CLOSED and state in (None, CLOSED)):
        state, opened_at, note = last.state, None, "restored"
    elif state is None:
        state = last.state if found.hash_circuit is not None or last.state != CLOSED else state_if_missing
        note = "" if found.is_present else "restored"

    # While the circuit is open, the time only increases.  A later time is a new trip of another client, an earlier one
    # is damage.
    last_opened_at = whole_seconds(last.opened_at_ms)
    is_backward = state == last.state == OPEN and opened_at is not None and opened_at < (last_opened_at or 0)
    if is_backward:
        opened_at = None
    is_own_transition = state == last.state and not (state == OPEN and opened_at not in (None, last_opened_at))
    if opened_at is not None and opened_at == last_opened_at:
        # Another client opened the circuit without a new time, as redis-cli or a host with a slow clock: now.
        opened_at_ms = now_ms if state == OPEN != last.state else last.opened_at_ms
    elif opened_at is not None:
        opened_at_ms = opened_at * 1000
    else:
        opened_at_ms = last.opened_at_ms if is_own_transition or state != OPEN else None
    if state == OPEN and opened_at_ms is None:
        opened_at_ms = now_ms
    is_future = opened_at_ms is not None and opened_at_ms > now_ms
    if is_future:
        opened_at_ms = now_ms

    is_probed = is_own_transition and state == HALF_OPEN and bool(last.probe_token)
    circuit = Circuit(
        state=state,
        fail_counter=found.fail_counter or 0,
        success_counter=found.success_counter or 0,
        opened_at_ms=opened_at_ms,
        generation=last.generation if is_own_transition else next_count(last.generation),
        probe_token=last.probe_token if is_probed else "",
        probe_until_ms=last.probe_until_ms if is_probed else 0,
        noisy_until_ms=last.noisy_until_ms if last.noisy_until_ms <= now_ms + NOISE_MAX_MS else 0,
        probe_lease_ms=last.probe_lease_ms if is_probed else 0,
    ).with_bounded_lease(now_ms)
    return ResolvedRecord(circuit, note or _repair_note(found, circuit, is_time_wrong=is_future or is_backward))


def _last_transition(found: StoredRecord, known: Circuit | None) -> tuple[Circuit, bool]:
    """Return the circuit as of the last transition, and whether the server has lost that transition.

    The process may know the circuit as closed, and find an older hash of an open circuit.  Then another process has
    opened the circuit on an emptied server, or the server has lost the recovery.  To continue with the open circuit
    costs a probe at most.  To close the circuit would admit all calls to a dependency that may still fail.  The circuit
    continues in a new generation with a free probe.  The holder of the probe has another generation, or has reported.

    Within a generation, the probe becomes free once, and the next claim begins a new generation.  So a record is older,
    too, if a call holds the probe there that the process has read as free.  The server has lost the report.
    """
    stored = found.hash_circuit or Circuit()
    if known is None or known.generation < stored.generation:
        return stored, False
    if known.generation == stored.generation:
        has_reported = known.state == stored.state == HALF_OPEN and not known.probe_token
        return stored.with_free_probe() if has_reported else stored, False
    if found.hash_circuit is not None and found.state == stored.state != CLOSED == known.state:
        return replace(stored.with_free_probe(), generation=next_count(known.generation)), False
    return replace(known, noisy_until_ms=0), True


def intact_circuit(found: StoredRecord, known: Circuit, now_ms: int) -> Circuit | None:
    """Return the circuit of a record (``None`` if a repair, an adoption or a restoration would have to write).

    Args:
        found: Record as it was read.
        known: Circuit as the process last read it.
        now_ms: Present time by the server's clock, milliseconds since the epoch.
    """
    resolved = resolve_record(found, known, CLOSED, now_ms)
    return None if resolved.repair_note or changes_for(resolved.circuit, found) else resolved.circuit


def _repair_note(found: StoredRecord, circuit: Circuit, *, is_time_wrong: bool) -> str:
    damaged = [name for name in VALUE_NAMES[:3] if getattr(found, name) is None]
    if is_time_wrong or (found.opened_at is None and (found.raw[3] is not None or circuit.opened_at_ms is not None)):
        damaged.append("opened_at")
    if found.is_hash_damaged:
        damaged.append("circuit")
    return f"repaired {' '.join(damaged)}" if damaged else ""
