"""Reports that a local circuit has counted and the shared one has not.

Knows: intents and replies.  Does not know: Redis, breakers.
"""

from __future__ import annotations

from dataclasses import dataclass

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Intent, RecordFailure, RecordSuccess


@dataclass(frozen=True, slots=True)
class LocalReport:
    """What others have to be told of a circuit of one's own.

    Attributes:
        intents: What is wanted of the shared one.
        known: That one, as it was then.
        circuit: As it is, one's own.
        unused_failures: Failures that it had no use for.
        in_doubt: Failures that Redis may have counted.
    """

    intents: tuple[Intent, ...]
    known: Circuit | None
    circuit: Circuit
    unused_failures: int
    in_doubt: int

    @property
    def failures(self) -> int:
        """How many the others are told of."""
        return sum(intent.times for intent in self.intents if isinstance(intent, RecordFailure))

    @property
    def starts_from_zero(self) -> bool:
        """Whether those of before are forgotten first."""
        return any(isinstance(intent, RecordSuccess) for intent in self.intents)

    @property
    def counted(self) -> int:
        """What the shared counter is once all of this is done."""
        return self.failures + (0 if self.starts_from_zero or self.known is None else self.known.fail_counter)

    def is_visible_in(self, now: Circuit) -> bool:
        """Whether the shared circuit looks as if all of this had been done."""
        if self.known is None or now.generation != self.known.generation:
            return False
        # Others may have counted more since, but not after what forgets what they have counted.
        return now.fail_counter == self.counted or (not self.starts_from_zero and now.fail_counter > self.counted)
