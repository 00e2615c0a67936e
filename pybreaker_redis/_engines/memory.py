"""Engine that keeps a circuit in the memory of this process.

Knows: intents and circuits.  Does not know: Redis, breakers.
"""

from __future__ import annotations

from collections.abc import Callable

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import ForkSafe


class MemoryEngine(ForkSafe):
    """The model behind a lock.

    Args:
        circuit: How it begins.
        clock: Milliseconds since the epoch.
        fast_path: To be kept true.
        event: What is said of it in the first answer.
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
        self._shortcut = fast_path or FastPath()
        super().__init__()

    def execute(self, intent: Intent, known: Circuit | None = None, state_if_missing: str = "") -> Reply:
        """Carry out an intent; nothing is ever lost here, so what the caller knows does not matter."""
        with self._lock:
            now = self._clock()
            # The local clock may have been set back.
            decision = intent.apply(self._circuit.with_bounded_lease(now), now)
            circuit = self._circuit = decision.circuit
            self._shortcut.follow(circuit, quiet=circuit.fail_counter == 0)
            note, self._repair_note = self._repair_note, ""
            return Reply(decision.accepted, circuit, now, note)
