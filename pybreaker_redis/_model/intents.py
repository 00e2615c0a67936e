"""Intents: the operations on a circuit, and their decisions.

This module and `_model/circuit.py` define all behaviour of a circuit.  Three engines execute the definition:

* `_engines/lua/` contains the same decisions as scripts.
* `_engines/transaction.py` calls these functions between WATCH and EXEC.
* `_engines/memory.py` calls these functions under a lock.

`tests/servers/test_differential.py` compares the three.

An intent is a value, with the generation in which its caller was admitted.  `Intent.apply` decides.  A refused intent
leaves the circuit unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit, next_count


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision about an intent.

    Attributes:
        accepted: Whether the intent was accepted.
        circuit: Circuit after the decision, unchanged if the intent was refused.
    """

    accepted: bool
    circuit: Circuit


@dataclass(frozen=True, slots=True)
class Intent:
    """Operation on a circuit.  The fields of a subclass are the arguments of its script."""

    #: Name of the operation's file in ``_engines/lua/``, without its ending.
    operation: ClassVar[str]

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        """Decide the intent.

        Args:
            circuit: Circuit before the decision.
            now_ms: Present time by the engine's clock, milliseconds since the epoch.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Load(Intent):
    """Read of the circuit."""

    operation: ClassVar[str] = "load"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, circuit)


@dataclass(frozen=True, slots=True)
class FencedIntent(Intent):
    """Operation that is refused unless the caller was admitted in the circuit's present generation.

    Attributes:
        generation: Generation in which the caller was admitted (``None``: an operator, or direct use of the storage).
        token: Token of the probe that the caller holds, or empty.
    """

    generation: int | None
    token: str

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if not circuit.can_report(self.generation, self.token):
            return Decision(False, circuit)
        return Decision(True, self.apply_admitted(circuit, now_ms))

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        """Return the circuit after the operation of an admitted caller.

        Args:
            circuit: Circuit before the operation.
            now_ms: Present time by the engine's clock, milliseconds since the epoch.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RecordFailure(FencedIntent):
    """Report of one or more failed calls.

    Failures renew the noise at most twice during its duration, because every renewal is published to all processes.

    Attributes:
        noise_ms: Duration of the noise after this failure, milliseconds (0: no process receives pushes).
        times: Number of failures.  A local circuit reports all of its failures together.
        threshold: Number of consecutive failures that opens the circuit in the same step.  A failed probe opens the
            circuit, too.  0: the report only counts, because the breaker keeps its threshold to itself.
    """

    noise_ms: int = 0
    times: int = 1
    threshold: int = 0
    operation: ClassVar[str] = "record_failure"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        counted = circuit.with_failures(next_count(circuit.fail_counter, self.times))
        if self.threshold and (circuit.state == HALF_OPEN or counted.fail_counter >= self.threshold):
            return counted.after_transition(OPEN, success_counter=0, opened_at_ms=now_ms)
        if self.noise_ms and circuit.state == CLOSED and circuit.noisy_until_ms < now_ms + self.noise_ms / 2:
            return replace(counted, noisy_until_ms=now_ms + self.noise_ms)
        return counted


@dataclass(frozen=True, slots=True)
class RecordSuccess(FencedIntent):
    """Report of a successful call, which resets the consecutive failures."""

    operation: ClassVar[str] = "record_success"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.with_failures(0)


@dataclass(frozen=True, slots=True)
class CountProbe(FencedIntent):
    """Report of a successful probe.

    Below the threshold, the probe becomes free, and the next call of any process may claim the next probe.  At the
    threshold, the caller keeps the probe to close the circuit.  Without a generation, the probe stays as it is.

    Attributes:
        lease_ms: Time in which the caller must close the circuit, milliseconds.
        threshold: Number of successes that close the circuit.
    """

    lease_ms: int
    threshold: int = 1
    operation: ClassVar[str] = "count_probe"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        counted = replace(circuit, success_counter=next_count(circuit.success_counter))
        if self.generation is None or not circuit.probe_token:
            return counted
        # As with pybreaker's storages, a success clears the failures.
        counted = replace(counted, fail_counter=0)
        if counted.success_counter < self.threshold:
            return counted.with_free_probe()
        return replace(counted, probe_until_ms=now_ms + self.lease_ms, probe_lease_ms=self.lease_ms)


@dataclass(frozen=True, slots=True)
class ReleaseProbe(FencedIntent):
    """Return of a probe without an outcome.  The next call of any process may claim the next probe."""

    operation: ClassVar[str] = "release_probe"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.with_free_probe() if circuit.state == HALF_OPEN else circuit


@dataclass(frozen=True, slots=True)
class Trip(FencedIntent):
    """Opening of the circuit, now."""

    operation: ClassVar[str] = "trip"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.after_transition(OPEN, success_counter=0, opened_at_ms=now_ms)


@dataclass(frozen=True, slots=True)
class ShareTrip(Intent):
    """Opening of the circuit, because a local circuit has opened while Redis was unreachable.

    The circuit opens for the rest of the local circuit's time.  The intent is refused if the circuit has another
    generation than before the outage, or is open since the same time or later.  So only one of many processes that
    return trips the circuit.

    Attributes:
        generation: Generation of the circuit before the outage.
        open_ms: Time since the local circuit opened, milliseconds.  A duration is the same by all clocks.
    """

    generation: int
    open_ms: int
    operation: ClassVar[str] = "share_trip"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        opened_at_ms = max(0, now_ms - self.open_ms)
        was_open = circuit.state == OPEN and (circuit.opened_at_ms or 0) >= opened_at_ms
        if circuit.generation != self.generation or was_open:
            return Decision(False, circuit)
        return Decision(True, circuit.after_transition(OPEN, success_counter=0, opened_at_ms=opened_at_ms))


@dataclass(frozen=True, slots=True)
class Close(FencedIntent):
    """Closing of the circuit, with counters at zero."""

    operation: ClassVar[str] = "close"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        changed = circuit if circuit.state == CLOSED else circuit.after_transition(CLOSED)
        return replace(changed, fail_counter=0, success_counter=0)


@dataclass(frozen=True, slots=True)
class ClaimProbe(Intent):
    """Claim of the one half-open probe.

    The caller checks whether the reset timeout has passed.  The circuit checks that no other call holds the probe.  A
    claim with the token that holds the probe is granted again and renews the lease, because clients retry commands.

    Attributes:
        generation: Generation in which the caller saw the circuit open.
        token: Token that is unique for this claim.
        lease_ms: Time until another caller may claim an unreported probe, milliseconds.
        lost_token: Token of a probe that no call holds any more, and that counts as free (empty: none).
    """

    generation: int
    token: str
    lease_ms: int
    lost_token: str = ""
    operation: ClassVar[str] = "claim_probe"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        lease: dict[str, float] = {"probe_until_ms": now_ms + self.lease_ms, "probe_lease_ms": self.lease_ms}
        if circuit.probe_token == self.token:
            return Decision(True, replace(circuit, **lease))  # type: ignore[arg-type]
        is_free = circuit.is_probe_free(now_ms) or (circuit.probe_token == self.lost_token != "")
        if circuit.generation != self.generation or not (circuit.state == OPEN or is_free):
            return Decision(False, circuit)
        # Successes of a caller that never reported count.  Successes from before the circuit opened do not.
        successes = 0 if circuit.state == OPEN else circuit.success_counter
        return Decision(
            True, circuit.after_transition(HALF_OPEN, success_counter=successes, probe_token=self.token, **lease)
        )


@dataclass(frozen=True, slots=True)
class SetState(Intent):
    """Change of the state by an operator, without a change of the counters.

    Half-open frees the probe, also while a call holds the probe.

    Attributes:
        state: State after the change.
    """

    state: str
    operation: ClassVar[str] = "set_state"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if circuit.state == self.state != HALF_OPEN:
            return Decision(True, circuit)
        changed = circuit.after_transition(self.state)
        if self.state == OPEN and changed.opened_at_ms is None:
            changed = replace(changed, opened_at_ms=now_ms)
        return Decision(True, changed)


@dataclass(frozen=True, slots=True)
class SetOpenedAt(Intent):
    """Change of the time at which the circuit opened.

    A time in the future counts as now, so that a host with a fast clock cannot keep the circuit open.  While the
    circuit is open, an earlier time is refused, so that a late caller cannot admit a probe early.

    Attributes:
        at_ms: Time of the opening by the engine's clock, milliseconds since the epoch.  A negative one counts as 0.
    """

    at_ms: float
    operation: ClassVar[str] = "set_opened_at"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        at_ms = max(0, min(self.at_ms, now_ms))
        if circuit.state == OPEN and circuit.opened_at_ms is not None and at_ms <= circuit.opened_at_ms:
            return Decision(False, circuit)
        return Decision(True, replace(circuit, opened_at_ms=at_ms))


@dataclass(frozen=True, slots=True)
class ResetProbes(Intent):
    """Reset of the successes that were counted while half-open."""

    operation: ClassVar[str] = "reset_probes"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, success_counter=0))


#: All intents.  Each has a script.
INTENTS: tuple[type[Intent], ...] = (
    Load,
    RecordFailure,
    RecordSuccess,
    CountProbe,
    ReleaseProbe,
    Trip,
    ShareTrip,
    ClaimProbe,
    Close,
    SetState,
    SetOpenedAt,
    ResetProbes,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to an intent.

    Attributes:
        accepted: Whether the intent was accepted.  A refused intent has changed nothing.
        circuit: Circuit after the decision.
        now_ms: Time of the decision by the engine's clock, milliseconds since the epoch.
        repair_note: Condition of the record before the decision: ``created``, ``restored`` (lost, and restored
            from the last read of the process), ``repaired NAME…`` (damaged values), or empty (sound).
    """

    accepted: bool
    circuit: Circuit
    now_ms: float
    repair_note: str = ""
