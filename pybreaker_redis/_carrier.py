"""What every carrier of the circuit answers, whether it is a lock, a script or a transaction.

Knows: intents and circuits.  Does not know: which carrier it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pybreaker_redis._circuit import Circuit
from pybreaker_redis._intents import Intent


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


class Carrier(Protocol):
    """The home of one circuit's record."""

    def execute(self, intent: Intent, known: Circuit | None, create: str) -> Reply:
        """Carry out an intent atomically.

        Args:
            intent: What is wanted.
            known: The circuit as this process saw it last; a home that lost its data takes it from here.
            create: The state of a circuit that nobody knows.
        """
