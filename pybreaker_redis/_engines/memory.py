"""Engine that holds a circuit in the memory of this process."""

from __future__ import annotations

from collections.abc import Callable

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import ForkSafe


class MemoryEngine(ForkSafe):
    """Engine of a circuit in memory.

    Args:
        circuit: Initial circuit.
        clock: Function that returns the local time, milliseconds since the epoch.
        fast_path: Fast path that follows the circuit (``None``: a new one).
        repair_note: Note of the first reply, see `Reply`.
    """

    def __init__(
        self,
        circuit: Circuit,
        clock: Callable[[], float] = wall_clock_ms,
        fast_path: FastPath | None = None,
        repair_note: str = "created",
    ) -> None:
        self._clock = clock
        self._circuit = circuit
        self._repair_note = repair_note
        self._fast_path = fast_path or FastPath()
        super().__init__()

    def execute(self, intent: Intent, known: Circuit | None = None, state_if_missing: str = "") -> Reply:
        """Execute an intent atomically.

        Args:
            intent: The intent.
            known: Not used, because memory loses nothing.
            state_if_missing: Not used, because the circuit exists.
        """
        with self._lock:
            now = self._clock()
            # The local clock may have been set back.
            decision = intent.apply(self._circuit.with_bounded_lease(now), now)
            circuit = self._circuit = decision.circuit
            # Under the same lock, so that the fast path follows the transitions in their order.
            self._fast_path.follow(circuit, is_quiet=circuit.fail_counter == 0)
            note, self._repair_note = self._repair_note, ""
            return Reply(decision.accepted, circuit, now, note)
