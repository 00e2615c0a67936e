"""What a circuit is, and what may become of it.

Knows: the record, the intents, time as a number that is passed in.  Does not know: clocks, threads, keys, Redis.

This module is the definition.  `lua/` says the same to a server that runs scripts, `_optimistic.py` applies these very
functions between WATCH and EXEC, `memory.py` behind a lock; `tests/test_differential.py` holds the three together.

An intent is a value: what a caller wants, with the generation in which that caller was admitted.  `apply` decides.  A
refused intent leaves the circuit as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half-open"
STATES = (CLOSED, OPEN, HALF_OPEN)

#: Longest believable lease, milliseconds.  A stored lease that ends later than this is damage, not a lease.
MAX_LEASE_MS = 24 * 3600 * 1000

#: Counts and generations from here on are damage: a thousand a second would take three decades.
MAX_COUNT = 10**12


def after(count: int) -> int:
    """The next count or generation; the last one is its own successor, so that it can be read again."""
    return min(count + 1, MAX_COUNT - 1)


@dataclass(frozen=True, slots=True)
class Circuit:
    """Everything that is shared about one circuit.

    Attributes:
        state: ``closed``, ``open`` or ``half-open``.
        fail_counter: Consecutive failures.
        success_counter: Consecutive successes while half-open.
        opened_at_ms: When it opened last, milliseconds since the epoch by the clock of the record's home.
        generation: The fencing token: one more for every transition.  Zero for a circuit that never moved.
        probe_token: Who holds the half-open probe; empty when nobody does.
        probe_until_ms: When that hold ends, same clock as `opened_at_ms`.
    """

    state: str = CLOSED
    fail_counter: int = 0
    success_counter: int = 0
    opened_at_ms: float | None = None
    generation: int = 0
    probe_token: str = ""
    probe_until_ms: float = 0

    def admits(self, generation: int | None, token: str) -> bool:
        """Whether a call that was admitted in `generation`, holding `token`, may still speak for this circuit.

        ``generation=None`` is an operator, or somebody who uses the storage by hand: always heard.
        """
        if generation is None:
            return True
        if self.generation != generation or self.state == OPEN:
            return False
        return self.state == CLOSED or self.probe_token == token

    def probe_is_free(self, now_ms: float) -> bool:
        """Whether an open gate would let somebody probe: half-open, and unclaimed or the lease has run out."""
        return self.state == HALF_OPEN and (not self.probe_token or self.probe_until_ms <= now_ms)

    def moved(self, state: str, **changes: float | str | None) -> Circuit:
        """The circuit after a transition to `state`: a new generation in which nobody holds the probe."""
        return replace(
            self,
            state=state,
            generation=after(self.generation),
            **{"probe_token": "", "probe_until_ms": 0, **changes},  # type: ignore[arg-type]
        )


def created(state: str, now_ms: float) -> Circuit:
    """A circuit that did not exist, in the state that its user asked for.

    "Never moved" means closed, so any other beginning counts as the first transition.  An open circuit always has an
    `opened_at_ms`: without it the gate would stand open to a probe at once.
    """
    if state == CLOSED:
        return Circuit()
    return Circuit().moved(state, opened_at_ms=now_ms if state == OPEN else None)


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of an intent: was it granted, and the circuit as it is now either way."""

    accepted: bool
    circuit: Circuit


@dataclass(frozen=True, slots=True)
class Intent:
    """Something that a caller wants of a circuit.  Subclasses are values: their fields are the script's arguments."""

    #: File name under ``lua/`` without its ending.
    script: ClassVar[str]

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        """Decide, at the instant `now_ms` of the clock of the record's home."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Load(Intent):
    """Tell me what is true."""

    script: ClassVar[str] = "load"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, circuit)


@dataclass(frozen=True, slots=True)
class Fenced(Intent):
    """Something that only counts if it comes from the circuit's present generation.

    Attributes:
        generation: In which the caller was admitted; ``None``: by hand, or an operator.
        token: The probe that the caller holds, or empty.
    """

    generation: int | None
    token: str

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if not circuit.admits(self.generation, self.token):
            return Decision(False, circuit)
        return Decision(True, self.settle(circuit, now_ms))

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        """The circuit that follows once the caller is admitted."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RecordFailure(Fenced):
    """A guarded call failed: one more consecutive failure."""

    script: ClassVar[str] = "record_failure"

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        return replace(circuit, fail_counter=after(circuit.fail_counter))


@dataclass(frozen=True, slots=True)
class RecordSuccess(Fenced):
    """A guarded call succeeded: the failures before it were not consecutive."""

    script: ClassVar[str] = "record_success"

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        return replace(circuit, fail_counter=0)


@dataclass(frozen=True, slots=True)
class CountProbe(Fenced):
    """A probe succeeded: one more towards the success threshold, and its holder may go on probing.

    By hand it counts, and renews nobody's lease.

    Attributes:
        lease_ms: How long the holder may take for the next probe, milliseconds.
    """

    lease_ms: int
    script: ClassVar[str] = "count_probe"

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        counted = replace(circuit, success_counter=after(circuit.success_counter))
        if self.generation is None or not circuit.probe_token:
            return counted
        return replace(counted, probe_until_ms=now_ms + self.lease_ms)


@dataclass(frozen=True, slots=True)
class Trip(Fenced):
    """Open the circuit, from now on."""

    script: ClassVar[str] = "trip"

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        return circuit.moved(OPEN, success_counter=0, opened_at_ms=now_ms)


@dataclass(frozen=True, slots=True)
class Close(Fenced):
    """Close the circuit and forget all counts."""

    script: ClassVar[str] = "close"

    def settle(self, circuit: Circuit, now_ms: float) -> Circuit:
        moved = circuit if circuit.state == CLOSED else circuit.moved(CLOSED)
        return replace(moved, fail_counter=0, success_counter=0)


@dataclass(frozen=True, slots=True)
class ClaimProbe(Intent):
    """Ask to be the one caller that tests a recovering dependency.

    Whether the reset timeout has passed is for the caller to know; the circuit knows that nobody else is probing.
    Asked twice, as by a client that repeats what it got no answer to, it is granted twice.

    Attributes:
        generation: The generation that the caller saw open.
        token: Unique for this claim.
        lease_ms: How long an unreported probe is waited for before it is offered again, milliseconds.
    """

    generation: int
    token: str
    lease_ms: int
    script: ClassVar[str] = "claim_probe"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if circuit.probe_token == self.token:
            return Decision(True, circuit)
        if circuit.generation != self.generation or not (circuit.state == OPEN or circuit.probe_is_free(now_ms)):
            return Decision(False, circuit)
        # Successes collected by a prober that died still count; those from before the circuit opened do not.
        successes = 0 if circuit.state == OPEN else circuit.success_counter
        claimed = circuit.moved(
            HALF_OPEN, success_counter=successes, probe_token=self.token, probe_until_ms=now_ms + self.lease_ms
        )
        return Decision(True, claimed)


@dataclass(frozen=True, slots=True)
class SetState(Intent):
    """By hand: put the circuit into a state, counters as they are.

    Half-open by hand takes the trial from whoever has it, be it claimed or made by hand too.
    """

    state: str
    script: ClassVar[str] = "set_state"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        if circuit.state == self.state != HALF_OPEN:
            return Decision(True, circuit)
        moved = circuit.moved(self.state)
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
    script: ClassVar[str] = "set_opened_at"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        at_ms = max(0, min(self.at_ms, now_ms))
        if circuit.state == OPEN and circuit.opened_at_ms is not None and at_ms <= circuit.opened_at_ms:
            return Decision(False, circuit)
        return Decision(True, replace(circuit, opened_at_ms=at_ms))


@dataclass(frozen=True, slots=True)
class ResetProbes(Intent):
    """By hand: forget the successes that were collected while half-open."""

    script: ClassVar[str] = "reset_probes"

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, success_counter=0))


#: Every intent; each has a script of its own.
INTENTS: tuple[type[Intent], ...] = (
    Load,
    RecordFailure,
    RecordSuccess,
    CountProbe,
    Trip,
    ClaimProbe,
    Close,
    SetState,
    SetOpenedAt,
    ResetProbes,
)
