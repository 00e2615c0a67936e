"""When did the circuit open last, by a clock that is never set?

Knows: records, how far a server's clock is ahead.  Does not know: views, who asks the server.

A record has the time at which the circuit opened, by the server's clock.  A step of that clock moves the difference to
the local clock, and not the time at which the circuit opened here: a timeout is a length of time.
"""

from __future__ import annotations

from typing import NamedTuple

from pybreaker_redis._circuit import OPEN, Circuit
from pybreaker_redis._clock import Offset


class Spell(NamedTuple):
    """The last opening of a circuit.

    Attributes:
        generation: Of the circuit.
        opened_at_ms: As the record has it.
        steps: How often the server's clock had stepped when that was read.
        steady_ms: The server's clock minus the monotonic clock at that time, as well as it was learned.
    """

    generation: int = 0
    opened_at_ms: float | None = None
    steps: int = 0
    steady_ms: float = 0

    def opened_at(self, circuit: Circuit, offset: Offset) -> float | None:
        """Return when a circuit opened, by the local clock, milliseconds; ``None`` if it never did."""
        if circuit.opened_at_ms is None:
            return None
        ahead_ms = offset.ms
        if self.opened_at_ms == circuit.opened_at_ms and self.steps != offset.steps:
            ahead_ms -= offset.steady_ms - self.steady_ms
        return circuit.opened_at_ms - ahead_ms

    def after(self, circuit: Circuit, offset: Offset) -> Spell:
        """Return the spell after a record was read together with a time of the server's clock, which is learned."""
        before_ms, opened_at_ms = self.opened_at_ms, circuit.opened_at_ms
        steps, steady_ms = offset.steps, offset.steady_ms
        if before_ms is not None and opened_at_ms is not None:
            is_same_spell = circuit.state == OPEN and circuit.generation == self.generation
            # Within a spell the time is moved back only where the server's clock was set back, so that it was to come.
            if (opened_at_ms < before_ms and is_same_spell) or (opened_at_ms == before_ms and steps != self.steps):
                steps, steady_ms = self.steps, self.steady_ms + opened_at_ms - before_ms
        return Spell(circuit.generation, opened_at_ms, steps, steady_ms)
