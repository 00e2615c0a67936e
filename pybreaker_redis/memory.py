"""A circuit that lives in this process.

Knows: the model, a lock.  Does not know: Redis.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from pybreaker_redis._arguments import check_state
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import Circuit, created
from pybreaker_redis._clock import now_ms
from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._intents import Decision, Intent, Load, SetOpenedAt
from pybreaker_redis._operated import OperatedStorage
from pybreaker_redis._shortcut import Shortcut


class MemoryCarrier:
    """The model behind a lock.

    Args:
        circuit: How it begins.
        clock: Milliseconds since the epoch.
        shortcut: To be kept true.
        event: What is said of it in the first answer.
    """

    def __init__(
        self,
        circuit: Circuit,
        clock: Callable[[], float] = now_ms,
        shortcut: Shortcut | None = None,
        event: str = "created",
    ) -> None:
        self._lock = threading.RLock()
        self._clock = clock
        self._circuit = circuit
        self._event = event
        self._shortcut = shortcut or Shortcut()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock there."""
        self._lock = threading.RLock()

    def execute(self, intent: Intent, known: Circuit | None = None, create: str = "") -> Reply:
        """Carry out an intent; nothing is ever lost here, so what the caller knows does not matter."""
        with self._lock:
            now = self._clock()
            decision = intent.apply(self._circuit, now)
            circuit = self._circuit = decision.circuit
            self._shortcut.follow(circuit, quiet=circuit.fail_counter == 0)
            event, self._event = self._event, ""
            return Reply(decision.accepted, circuit, now, event)


@dataclass(frozen=True, slots=True)
class _SayOpenedAt(SetOpenedAt):
    """With a single clock there is no skew to defend against, and tests move this time at will: any time is taken."""

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, opened_at_ms=self.at_ms))


class CircuitMemoryStorage(OperatedStorage):
    """A circuit for the threads of one process; in place of `pybreaker.CircuitMemoryStorage`.

    Unlike pybreaker's own it is safe without the breaker's lock, lets one caller probe at a time even under
    `calling()`, and ignores results of calls that began before the last transition.

    Args:
        state: ``closed``, ``open`` or ``half-open``.
        probe_lease: Seconds until a probe that nobody reported on is offered again, from 0.001 to 86400.

    Raises:
        ValueError: An unknown `state`, or a `probe_lease` out of range.
        TypeError: A `probe_lease` that is no number.
    """

    _say_opened_at = _SayOpenedAt

    def __init__(self, state: str, *, probe_lease: float = 30.0) -> None:
        check_state("state", state)
        super().__init__("memory", probe_lease, Shortcut())
        self._carrier = MemoryCarrier(created(state, now_ms()), shortcut=self._shortcut)
        self._ask(self._callers.current(), Load())

    def _execute(self, intent: Intent) -> Reply:
        return self._carrier.execute(intent)
