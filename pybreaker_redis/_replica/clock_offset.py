"""When did the circuit open last, by a clock that is never set?

Knows: records, how far a server's clock is ahead.  Does not know: views, who asks the server.

A record has the time at which the circuit opened, by the server's clock.  A step of that clock moves the difference to
the local clock, and not the time at which the circuit opened here: a timeout is a length of time.
"""

from __future__ import annotations

from typing import NamedTuple

from pybreaker_redis._circuit import OPEN, Circuit
from pybreaker_redis._clock import ClockOffset


class OpeningTime(NamedTuple):
    """The last opening of a circuit.

    Attributes:
        generation: Of the circuit.
        opened_at_ms: As the record has it.
        step_count: How often the server's clock had stepped when that was read.
        monotonic_ms: The server's clock minus the monotonic clock at that time, as well as it was learned.
    """

    generation: int = 0
    opened_at_ms: float | None = None
    step_count: int = 0
    monotonic_ms: float = 0

    def to_local_ms(self, circuit: Circuit, offset: ClockOffset) -> float | None:
        """Return when a circuit opened, by the local clock, milliseconds; ``None`` if it never did."""
        if circuit.opened_at_ms is None:
            return None
        ahead_ms = offset.ms
        if self.opened_at_ms == circuit.opened_at_ms and self.step_count != offset.step_count:
            ahead_ms -= offset.monotonic_ms - self.monotonic_ms
        return circuit.opened_at_ms - ahead_ms

    def updated(self, circuit: Circuit, offset: ClockOffset) -> OpeningTime:
        """Return the spell after a record was read together with a time of the server's clock, which is learned."""
        before_ms, opened_at_ms = self.opened_at_ms, circuit.opened_at_ms
        step_count, monotonic_ms = offset.step_count, offset.monotonic_ms
        if before_ms is not None and opened_at_ms is not None:
            is_same_spell = circuit.state == OPEN and circuit.generation == self.generation
            # Within a spell the time is moved back only where the server's clock was set back, so that it was to come.
            if (opened_at_ms < before_ms and is_same_spell) or (
                opened_at_ms == before_ms and step_count != self.step_count
            ):
                step_count, monotonic_ms = self.step_count, self.monotonic_ms + opened_at_ms - before_ms
        return OpeningTime(circuit.generation, opened_at_ms, step_count, monotonic_ms)
