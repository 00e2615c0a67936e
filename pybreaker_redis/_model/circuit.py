"""What is a circuit?

Knows: its values, time as a number that is passed in.  Does not know: clocks, threads, keys, Redis.

With `_model/intents.py` this is the definition; everything else carries it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half-open"
STATES = (CLOSED, OPEN, HALF_OPEN)

#: Longest believable lease, milliseconds.  A stored lease that ends later than this is damage, not a lease.
LEASE_MAX_MS = 24 * 3600 * 1000

#: Counts and generations from here on are damage: a thousand a second would take three decades.
COUNT_LIMIT = 10**12

#: Latest time that a record can hold, milliseconds since the epoch: 15 digits, which a Lua number holds exactly.
TIME_MAX_MS = 10**15 - 1

#: Longest believable noise, milliseconds.
NOISE_MAX_MS = 60 * 1000

#: How long a closed circuit is noisy after a failure, milliseconds.
NOISE_DURATION_MS = 1000


def next_count(count: int, times: int = 1) -> int:
    """The next count or generation, so many times; the last is its own successor, so that it can be read again."""
    return min(count + times, COUNT_LIMIT - 1)


class Admission(NamedTuple):
    """What a call may speak for when it ends.

    Attributes:
        generation: In which it was admitted; ``None``: nobody was, somebody acts by hand.
        token: The probe that it is, or empty.
    """

    generation: int | None
    token: str = ""


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
        noisy_until_ms: Until when a success may have failures to forget, so that it has to be reported, same clock.
            Later, only one who has seen a counter at zero since may keep it to himself.
        probe_lease_ms: Length of that hold, milliseconds; 0: unknown, as a foreign writer leaves it.
    """

    state: str = CLOSED
    fail_counter: int = 0
    success_counter: int = 0
    opened_at_ms: float | None = None
    generation: int = 0
    probe_token: str = ""
    probe_until_ms: float = 0
    noisy_until_ms: float = 0
    probe_lease_ms: float = 0

    def can_report(self, generation: int | None, token: str) -> bool:
        """Whether a call that was admitted in `generation`, holding `token`, may still speak for this circuit.

        ``generation=None`` is an operator, or somebody who uses the storage by hand: always heard.
        """
        if generation is None:
            return True
        if self.generation != generation or self.state == OPEN:
            return False
        return self.state == CLOSED or self.probe_token == token

    def is_probe_free(self, now_ms: float) -> bool:
        """Whether an open gate would let somebody probe: half-open, and unclaimed or the lease has run out."""
        return self.state == HALF_OPEN and (not self.probe_token or self.probe_until_ms <= now_ms)

    def is_probe_leased(self, now_ms: float) -> bool:
        """Whether somebody holds the probe."""
        return self.state == HALF_OPEN and not self.is_probe_free(now_ms)

    def with_bounded_lease(self, now_ms: float) -> Circuit:
        """The circuit with a lease that ends no later than its own length after `now_ms`.

        A lease can have more time left only if the clock was set back, or if another server with a slower clock has
        taken over.  A lease of unknown length that ends after the longest possible one is damage, and over.
        """
        if self.probe_until_ms <= now_ms + (self.probe_lease_ms or LEASE_MAX_MS):
            return self
        return replace(self, probe_until_ms=now_ms + self.probe_lease_ms if self.probe_lease_ms else 0)

    def with_failures(self, fail_counter: int) -> Circuit:
        """The circuit with another number of failures: `replace` in half its time, as each failing call needs it."""
        return Circuit(
            self.state,
            fail_counter,
            self.success_counter,
            self.opened_at_ms,
            self.generation,
            self.probe_token,
            self.probe_until_ms,
            self.noisy_until_ms,
            self.probe_lease_ms,
        )

    def with_free_probe(self) -> Circuit:
        """The circuit with a probe that is free."""
        return replace(self, probe_token="", probe_until_ms=0, probe_lease_ms=0)

    def after_transition(self, state: str, **changes: float | str | None) -> Circuit:
        """The circuit after a transition to `state`: a new generation in which nobody holds the probe."""
        return replace(
            self,
            state=state,
            generation=next_count(self.generation),
            **{"probe_token": "", "probe_until_ms": 0, "probe_lease_ms": 0, **changes},  # type: ignore[arg-type]
        )


def new_circuit(state: str, now_ms: float) -> Circuit:
    """A circuit that did not exist, in the state that its user asked for.

    "Never moved" means closed, so any other beginning counts as the first transition.  An open circuit always has an
    `opened_at_ms`: without it the gate would stand open to a probe at once.
    """
    if state == CLOSED:
        return Circuit()
    return Circuit().after_transition(state, opened_at_ms=now_ms if state == OPEN else None)


#: Of operators, tests, and users of a storage without a breaker.
BY_HAND = Admission(None)
