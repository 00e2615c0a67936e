"""Guarded calls: their admission, and the settlement of their outcome.

These functions know what a call means, and nothing of pybreaker.  While the process trusts its view of a closed or open
circuit, a decision needs no request.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.core import CircuitCore, rejection_time_s
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import CLOSED, COUNT_LIMIT, HALF_OPEN, Admission, Circuit
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Load,
    RecordFailure,
    RecordSuccess,
    ReleaseProbe,
    Reply,
)
from pybreaker_redis._runtime.clock import wall_clock_ms


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """Decision about the admission of a call.

    Attributes:
        admission: Right of the call to report its outcome.  ``None``: the call is rejected.
        circuit: Circuit at the time of the decision, times by the local clock.
        wait_s: Seconds until a rejected call may be admitted.
        has_claimed: Whether the call claimed the probe, so that this process made the circuit half-open.
        is_nested: Whether the call is made within a probe, which has claimed the token.
    """

    admission: Admission | None
    circuit: Circuit
    wait_s: float = 0.0
    has_claimed: bool = False
    is_nested: bool = False


def admission_without_request(
    core: CircuitCore, reset_timeout_s: float, held: frozenset[str], clock_ms: Callable[[], float] = wall_clock_ms
) -> AdmissionDecision | None:
    """Decide about a call from the view of this process.  ``None``: a request is needed.

    Args:
        core: The circuit.
        reset_timeout_s: Seconds for which an open circuit rejects calls.
        held: Tokens of probes that the caller holds, see `HeldProbes.held_here`.
        clock_ms: Function that returns the local time, milliseconds since the epoch.
    """
    reply = core.read_without_request()
    return None if reply is None else _decision_for(reply, reset_timeout_s, held, clock_ms)


def admit_call(
    core: CircuitCore,
    reset_timeout_s: float,
    budget: CallBudget,
    held: frozenset[str],
    begin_claim: Callable[[int], None],
    *,
    clock_ms: Callable[[], float] = wall_clock_ms,
    has_several_breakers: bool = False,
) -> AdmissionDecision:
    """Decide about a call, and claim the probe if one is due.

    Args:
        core: The circuit.
        reset_timeout_s: Seconds for which an open circuit rejects calls.
        budget: Time budget of the call.
        held: Tokens of probes that the caller holds, see `HeldProbes.held_here`.
        begin_claim: Function that gets the generation which a claim may end, before the claim is sent.
        clock_ms: Function that returns the local time, milliseconds since the epoch.
        has_several_breakers: Whether several breakers of this process use the circuit.
    """
    reply = core.read_without_request() or core.carry_out(Load(), budget)
    core.prepare_call(has_several_breakers=has_several_breakers)
    decision = _decision_for(reply, reset_timeout_s, held, clock_ms)
    if decision is not None:
        return decision
    circuit = reply.circuit
    # The token is a new one: a late report of the call that had the probe must not count for this call.
    lost_token = circuit.probe_token if PROBE_TOKENS.take(circuit.probe_token) else ""
    token = secrets.token_hex(8)
    begin_claim(circuit.generation)
    reply = core.carry_out(ClaimProbe(circuit.generation, token, core.lease_ms, lost_token), budget)
    if reply.accepted:
        return AdmissionDecision(Admission(reply.circuit.generation, token), reply.circuit, has_claimed=True)
    # Another caller was faster.  A probe that is free again is for the next call: a call claims once.
    decision = _decision_for(reply, reset_timeout_s, held, clock_ms)
    return decision or AdmissionDecision(None, reply.circuit)


def _decision_for(
    reply: Reply, reset_timeout_s: float, held: frozenset[str], clock_ms: Callable[[], float]
) -> AdmissionDecision | None:
    """Return the decision that the circuit calls for.  ``None``: the probe has to be claimed."""
    circuit = reply.circuit
    if circuit.state == CLOSED:
        return AdmissionDecision(Admission(circuit.generation), circuit)
    wait_s = rejection_time_s(reply, reset_timeout_s, clock_ms)
    if wait_s <= 0:
        return None
    if circuit.state == HALF_OPEN and circuit.probe_token in held:
        # A call that is made within the probe is part of the probe.
        return AdmissionDecision(Admission(circuit.generation, circuit.probe_token), circuit, is_nested=True)
    return AdmissionDecision(None, circuit, wait_s)


def settle_success(core: CircuitCore, admission: Admission, success_threshold: float, budget: CallBudget) -> Reply:
    """Settle a call that succeeded, and close the circuit after the last probe that was needed.

    Args:
        core: The circuit.
        admission: Admission of the call.
        success_threshold: Number of successful probes that closes the circuit.
        budget: Time budget of the call.
    """
    if not admission.token:
        return core.carry_out(RecordSuccess(*admission), budget)
    threshold = math.ceil(min(COUNT_LIMIT, success_threshold))
    reply = core.carry_out(CountProbe(*admission, core.lease_ms, threshold), budget)
    if reply.accepted and reply.circuit.probe_token == admission.token:
        return core.carry_out(Close(*admission), budget)
    return reply


def settle_failure(core: CircuitCore, admission: Admission, fail_max: float, budget: CallBudget) -> Reply:
    """Settle a call that failed.  At the threshold, and after a probe, the circuit opens in the same step.

    Args:
        core: The circuit.
        admission: Admission of the call.
        fail_max: Number of consecutive failures that opens the circuit.
        budget: Time budget of the call.
    """
    threshold = max(1, math.ceil(min(COUNT_LIMIT, fail_max)))
    return core.carry_out(RecordFailure(*admission, threshold=threshold), budget)


def release_call(core: CircuitCore, admission: Admission, budget: CallBudget) -> None:
    """Settle a call without an outcome.  A probe becomes free for the next call of any process.

    Args:
        core: The circuit.
        admission: Admission of the call.
        budget: Time budget of the call.
    """
    if admission.token:
        core.carry_out(ReleaseProbe(*admission), budget)
