"""What every carrier of the circuit answers, whether it is a lock, a script or a transaction.

Knows: intents and circuits.  Does not know: which carrier it is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pybreaker_redis._circuit import Circuit
from pybreaker_redis._intents import Intent


class MissingFeature(enum.Enum):
    """What a server may not have, or not for this user, and circuits can do without."""

    SCRIPTS = "scripts"
    """Circuits are moved by transactions."""
    EVALSHA = "names"
    """Of scripts: each is sent as a whole."""
    PUBLISH = "publishing"
    """Nobody is told when a circuit moves."""
    TRACKING = "tracking"
    """Nobody is told of what others than these scripts do."""


#: Told what is missing, and in what words that was said.
NoteMissingFeature = Callable[[MissingFeature, object], None]


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


class Engine(Protocol):
    """The home of one circuit's record."""

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Carry out an intent atomically.

        Args:
            intent: What is wanted.
            known: The circuit as this process saw it last; a home that lost its data takes it from here.
            state_if_missing: The state of a circuit that nobody knows.
        """
