"""What may be wanted of a circuit, and what becomes of it?

Knows: the intents, time as a number that is passed in.  Does not know: clocks, threads, keys, Redis.

With `_model/circuit.py` this is the definition.  `_engines/lua/` says the same to a server that runs scripts,
`_engines/transaction.py` applies these very functions between WATCH and EXEC, `_engines/memory.py` behind a lock;
`tests/servers/test_differential.py` holds the three together.

An intent is a value: what a caller wants, with the generation in which that caller was admitted.  `apply` decides.  A
refused intent leaves the circuit as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit, next_count


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of an intent: was it granted, and the circuit as it is now either way."""

    accepted: bool
    circuit: Circuit


@dataclass(frozen=True, slots=True)
class Intent:
    """Something that a caller wants of a circuit.  Subclasses are values: their fields are the script's arguments."""

    #: File name under ``lua/`` without its ending.
    operation: ClassVar[str]

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        """Decide, at the instant `now_ms` of the clock of the record's home."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Load(Intent):
    """Tell me what is true."""

    operation: ClassVar[str] = "load"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, circuit)


@dataclass(frozen=True, slots=True)
class FencedIntent(Intent):
    """Something that only counts if it comes from the circuit's present generation.

    Attributes:
        generation: In which the caller was admitted; ``None``: by hand, or an operator.
        token: The probe that the caller holds, or empty.
    """

    generation: int | None
    token: str

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if not circuit.can_report(self.generation, self.token):
            return Decision(False, circuit)
        return Decision(True, self.apply_admitted(circuit, now_ms))

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        """The circuit that follows once the caller is admitted."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RecordFailure(FencedIntent):
    """A guarded call failed: one more consecutive failure.  Or several: those that a process has counted by itself.

    However fast calls fail, the noise moves on twice in its time: each move is told to everybody.

    Attributes:
        noise_ms: For how long successes are to be reported to somebody who listens, milliseconds; 0: nobody listens.
        times: How many there were.
    """

    noise_ms: int = 0
    times: int = 1
    operation: ClassVar[str] = "record_failure"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        counted = circuit.with_failures(next_count(circuit.fail_counter, self.times))
        if self.noise_ms and circuit.state == CLOSED and circuit.noisy_until_ms < now_ms + self.noise_ms / 2:
            return replace(counted, noisy_until_ms=now_ms + self.noise_ms)
        return counted


@dataclass(frozen=True, slots=True)
class RecordSuccess(FencedIntent):
    """A guarded call succeeded: the failures before it were not consecutive."""

    operation: ClassVar[str] = "record_success"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.with_failures(0)


@dataclass(frozen=True, slots=True)
class CountProbe(FencedIntent):
    """A probe succeeded: one more towards the success threshold.

    Below the threshold the probe is given back, so that the next call of any process may claim the next one.  At the
    threshold the holder keeps it, to close the circuit.  By hand it counts, and leaves the probe alone.

    Attributes:
        lease_ms: How long the holder may take to close the circuit, milliseconds.
        threshold: Successes that close the circuit.
    """

    lease_ms: int
    threshold: int = 1
    operation: ClassVar[str] = "count_probe"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        counted = replace(circuit, success_counter=next_count(circuit.success_counter))
        if self.generation is None or not circuit.probe_token:
            return counted
        if counted.success_counter < self.threshold:
            return counted.with_free_probe()
        return replace(counted, probe_until_ms=now_ms + self.lease_ms, probe_lease_ms=self.lease_ms)


@dataclass(frozen=True, slots=True)
class Trip(FencedIntent):
    """Open the circuit, from now on."""

    operation: ClassVar[str] = "trip"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.after_transition(OPEN, success_counter=0, opened_at_ms=now_ms)


@dataclass(frozen=True, slots=True)
class ShareTrip(Intent):
    """A process that was cut off has opened the circuit meanwhile: so it is open for all, for the rest of its time.

    Refused if anybody has moved the circuit since the process was cut off, or if it is open anyway and opened later.
    So of many that return only one trips.

    Attributes:
        generation: The circuit's when the process was cut off.
        open_ms: For how long it has been open there, milliseconds; a length of time, so that clocks do not matter.
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
    """Close the circuit and forget all counts."""

    operation: ClassVar[str] = "close"

    def apply_admitted(self, circuit: Circuit, now_ms: float) -> Circuit:
        moved = circuit if circuit.state == CLOSED else circuit.after_transition(CLOSED)
        return replace(moved, fail_counter=0, success_counter=0)


@dataclass(frozen=True, slots=True)
class ClaimProbe(Intent):
    """Ask to be the one caller that tests a recovering dependency.

    Whether the reset timeout has passed is for the caller to know; the circuit knows that nobody else is probing.
    A claim with the token that holds the probe is granted again and renews the lease: clients repeat themselves.

    Attributes:
        generation: The generation that the caller saw open.
        token: Unique for this claim.
        lease_ms: How long an unreported probe is waited for before it is offered again, milliseconds.
        lost_token: Token of a probe that no call holds any more, and that counts as free; empty: none.
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
        # Successes collected by a prober that died still count; those from before the circuit opened do not.
        successes = 0 if circuit.state == OPEN else circuit.success_counter
        return Decision(
            True, circuit.after_transition(HALF_OPEN, success_counter=successes, probe_token=self.token, **lease)
        )


@dataclass(frozen=True, slots=True)
class SetState(Intent):
    """By hand: put the circuit into a state, counters as they are.

    Half-open by hand takes the trial from whoever has it, be it claimed or made by hand too.
    """

    state: str
    operation: ClassVar[str] = "set_state"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if circuit.state == self.state != HALF_OPEN:
            return Decision(True, circuit)
        moved = circuit.after_transition(self.state)
        if self.state == OPEN and moved.opened_at_ms is None:
            moved = replace(moved, opened_at_ms=now_ms)
        return Decision(True, moved)


@dataclass(frozen=True, slots=True)
class SetOpenedAt(Intent):
    """By hand: say when the circuit opened.

    Never in the future, so that a host whose clock is ahead cannot hold the fleet open; and while the circuit is open
    only forward, so that a straggler cannot open the gate early.

    Attributes:
        at_ms: Milliseconds since the epoch, by the clock of the record's home; the epoch itself if before it.
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
    """By hand: forget the successes that were collected while half-open."""

    operation: ClassVar[str] = "reset_probes"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, success_counter=0))


#: Every intent; each has a script of its own.
INTENTS: tuple[type[Intent], ...] = (
    Load,
    RecordFailure,
    RecordSuccess,
    CountProbe,
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
    """The answer to an intent.

    Attributes:
        accepted: Whether it was granted; a refused intent has changed nothing.
        circuit: What is true now.
        now_ms: When that was, milliseconds since the epoch by the clock of the record's home.
        event: ``created``, ``restored``, ``repaired NAME…`` if this answer found the record so, else empty.
    """

    accepted: bool
    circuit: Circuit
    now_ms: float
    event: str = ""
