"""What every carrier of the circuit answers, whether it is a lock, a script or a transaction.

Knows: intents and circuits.  Does not know: which carrier it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._redis.classify import MissingFeature

#: Told what is missing, and in what words that was said.
NoteMissingFeature = Callable[[MissingFeature, object], None]


class Engine(Protocol):
    """The home of one circuit's record."""

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Carry out an intent atomically.

        Args:
            intent: What is wanted.
            known: The circuit as this process saw it last; a home that lost its data takes it from here.
            state_if_missing: The state of a circuit that nobody knows.
        """
