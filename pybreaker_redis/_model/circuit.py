"""Circuit: the values that processes share.

This module and `_model/intents.py` define all behaviour of a circuit, without clocks, threads and Redis.  The engines
execute the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"
STATES = (CLOSED, OPEN, HALF_OPEN)

#: Longest lease of a probe, milliseconds.  A stored lease that ends later is damage.
LEASE_MAX_MS = 24 * 3600 * 1000

#: Exclusive limit of counts and generations.  At a thousand a second, a count reaches the limit after three decades.
COUNT_LIMIT = 10**12

#: Latest time in a record, milliseconds since the epoch: 15 digits, which a Lua number represents exactly.
TIME_MAX_MS = 10**15 - 1

#: Longest noise, milliseconds.  A stored noise that ends later is damage.
NOISE_MAX_MS = 60 * 1000

#: Noise of a closed circuit after a failure, milliseconds: the time in which every success is reported.
NOISE_DURATION_MS = 1000


def next_count(count: int, times: int = 1) -> int:
    """Return a count or generation after `times` steps, at most the largest one that a record may hold."""
    return min(count + times, COUNT_LIMIT - 1)


class Admission(NamedTuple):
    """Right of a call to report its outcome.

    Attributes:
        generation: Generation in which the circuit admitted the call (``None``: a report without a call).
        token: Token of the probe that the call is (empty: the call is no probe).
    """

    generation: int | None
    token: str = ""


@dataclass(frozen=True, slots=True)
class Circuit:
    """Values of one circuit.

    Times are milliseconds since the epoch, by the clock of the engine: for Redis, the server's clock.

    Attributes:
        state: ``closed``, ``open`` or ``half-open``.
        fail_counter: Number of consecutive failures.
        success_counter: Number of consecutive successes while half-open.
        opened_at_ms: Time of the last opening (``None``: never).
        generation: Fencing token, incremented by every transition (0: no transition yet).
        probe_token: Token of the call that holds the half-open probe (empty: the probe is free).
        probe_until_ms: End of the probe's lease.
        noisy_until_ms: End of the noise.  Until then, every success is reported, because failures may precede the
            success.  Later, a process reports a success unless the process has read a zero counter since.
        probe_lease_ms: Duration of the probe's lease, milliseconds (0: unknown, as another client wrote the record).
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
        """Return whether a call may still report to this circuit.

        Args:
            generation: Generation in which the circuit admitted the call (``None``: a command of an operator, or a
                direct use of the storage, which is always accepted).
            token: Token of the probe that the call is, or empty.
        """
        if generation is None:
            return True
        if self.generation != generation or self.state == OPEN:
            return False
        return self.state == CLOSED or self.probe_token == token

    def is_probe_free(self, now_ms: float) -> bool:
        """Return whether a caller may claim the probe: half-open, and unclaimed or with an expired lease."""
        return self.state == HALF_OPEN and (not self.probe_token or self.probe_until_ms <= now_ms)

    def is_probe_leased(self, now_ms: float) -> bool:
        """Return whether a call holds the probe."""
        return self.state == HALF_OPEN and not self.is_probe_free(now_ms)

    def with_bounded_lease(self, now_ms: float) -> Circuit:
        """Return the circuit with a lease that ends at most its own duration after `now_ms`.

        More time is left only if the clock was set back, or if a server with a slower clock has taken over.  A lease of
        unknown duration that ends after the longest possible one is damage, and counts as expired.
        """
        if self.probe_until_ms <= now_ms + (self.probe_lease_ms or LEASE_MAX_MS):
            return self
        return replace(self, probe_until_ms=now_ms + self.probe_lease_ms if self.probe_lease_ms else 0)

    def with_failures(self, fail_counter: int) -> Circuit:
        """Return the circuit with another number of failures.

        Each failing call needs this function, which takes half the time of `dataclasses.replace`.
        """
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
        """Return the circuit with a free probe."""
        return replace(self, probe_token="", probe_until_ms=0, probe_lease_ms=0)

    def after_transition(self, state: str, **changes: float | str | None) -> Circuit:
        """Return the circuit after a transition: a new generation with a free probe.

        Args:
            state: State after the transition.
            changes: Further values after the transition, by the name of the attribute.
        """
        return replace(
            self,
            state=state,
            generation=next_count(self.generation),
            **{"probe_token": "", "probe_until_ms": 0, "probe_lease_ms": 0, **changes},  # type: ignore[arg-type]
        )


def new_circuit(state: str, now_ms: float) -> Circuit:
    """Return a circuit that did not exist before.

    Generation 0 means closed, so any other initial state counts as the first transition.  An open circuit always has an
    `opened_at_ms`.  Without that time, the first call would be admitted as a probe.

    Args:
        state: Initial state.
        now_ms: Present time, milliseconds since the epoch.
    """
    if state == CLOSED:
        return Circuit()
    return Circuit().after_transition(state, opened_at_ms=now_ms if state == OPEN else None)


#: Admission of operators, of tests, and of code that uses a storage without a breaker.
BY_HAND = Admission(None)
