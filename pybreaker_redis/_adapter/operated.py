"""What may be asked of a circuit besides what pybreaker asks?

Knows: intents, when a gate opens.  Does not know: breakers, names, registries.

What serves a guarded call swallows errors of Redis.  An operator has to be told: his commands raise them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pybreaker_redis._adapter.inference import InferringStorage
from pybreaker_redis._circuits.core import rejection_time_s
from pybreaker_redis._model.circuit import HALF_OPEN
from pybreaker_redis._model.intents import Intent, Load, Reply


class OperatedStorage(InferringStorage):
    """A storage that operators can command, and that says when its gate opens."""

    def retry_after(self, reset_timeout: float) -> float:
        """Seconds until a call may pass again: until the timeout, or the lease of whoever probes, is over.

        Args:
            reset_timeout: Of the breaker, seconds.

        Returns:
            Never less than 0, which means: now.
        """
        reply = self._look()
        if self._callers.current().visible_state(reply.circuit, reply.now_ms) == HALF_OPEN:
            return 0.0
        return rejection_time_s(reply, reset_timeout)

    @property
    def was_granted(self) -> bool:
        """Whether what this thread wanted last of the circuit was granted; of two that trip at once it is for one."""
        return self._callers.current().was_granted

    def command(self, *intents: Intent) -> None:
        """Do what an operator wants.

        Raises:
            Exception: It was not done; whatever the client raises then.
        """
        for intent in intents:
            self._insist(intent)

    def release_connections(self) -> None:
        """Let go of connections and threads that only this circuit needs, until it is used again."""

    def look_at(self, storages: Sequence[OperatedStorage]) -> list[Reply]:
        """What is true of circuits that live where this one does, times by the local clock.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        return [storage._insist(Load()) for storage in storages]  # noqa: SLF001

    def _insist(self, intent: Intent) -> Reply:
        """Carry out an intent on the circuit that all share, or raise."""
        return self._execute(intent)
