"""What may be asked of a circuit besides what pybreaker asks?

Knows: intents, when a gate opens.  Does not know: breakers, names, registries.

What serves a guarded call swallows errors of Redis.  An operator has to be told: his commands raise them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pybreaker_redis._adapter import InferringStorage
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED, HALF_OPEN, OPEN
from pybreaker_redis._clock import wall_clock_ms
from pybreaker_redis._intents import Close, Intent, Load, RecordSuccess, ResetProbes, SetState, Trip

#: What puts a circuit into a state.  Who half-opens it has no right to the trial: an operator's process is rarely the
#: one that calls.
COMMANDS_FOR_STATE: dict[str, tuple[Intent, ...]] = {
    OPEN: (Trip(None, ""),),
    CLOSED: (Close(None, ""),),
    HALF_OPEN: (ResetProbes(), SetState(HALF_OPEN)),
}

#: What forgets the counts of a circuit, and leaves its state.
COMMANDS_FOR_RESET: tuple[Intent, ...] = (RecordSuccess(None, ""), ResetProbes())


def rejection_time_s(reply: Reply, reset_timeout: float) -> float:
    """How long a circuit goes on rejecting calls, seconds; 0 if it lets one pass.

    Args:
        reply: What is true of it, by the local clock.
        reset_timeout: Of its breaker, seconds.
    """
    circuit, left_ms = reply.circuit, 0.0
    if circuit.state == OPEN:
        # pybreaker compares with the local wall clock, wherever a test has moved it.
        left_ms = (circuit.opened_at_ms or 0) + reset_timeout * 1000 - wall_clock_ms()
    elif circuit.is_probe_leased(reply.now_ms):
        left_ms = circuit.probe_until_ms - reply.now_ms
    return max(0.0, left_ms / 1000)


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
