"""A circuit that lives in this process.

Knows: the model, a lock.  Does not know: Redis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.operated import OperatedStorage
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import STATES, Circuit, new_circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Decision, Intent, Load, Reply
from pybreaker_redis._runtime.clock import AssignedMs, wall_clock_ms
from pybreaker_redis._runtime.validation import check_choice


@dataclass(frozen=True, slots=True)
class _SetAnyOpenedAt(Intent):
    """Set when the circuit opened: any time, or none.

    With a single clock there is no skew to defend against, and tests move this time at will.
    """

    at_ms: float | None

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, opened_at_ms=self.at_ms))


@dataclass(frozen=True, slots=True)
class _SetFailCounter(Intent):
    """Set the number of consecutive failures."""

    count: int

    def apply(self, circuit: Circuit, now_ms: float) -> Decision:
        return Decision(True, replace(circuit, fail_counter=self.count))


class CircuitMemoryStorage(OperatedStorage):
    """A circuit for the threads of one process; in place of `pybreaker.CircuitMemoryStorage`.

    Unlike pybreaker's own it is safe without the breaker's lock, lets one caller probe at a time even under
    `calling()`, and ignores results of calls that began before the last transition.

    Copies and pickles have the state, the counters and `opened_at`, and are circuits of their own: a probe that is
    under way stays with the original.  `opened_at` is read as it was set, also naive, and may be set to ``None``: then
    the next call probes.

    Args:
        state: ``closed``, ``open`` or ``half-open``.
        probe_lease: Seconds until a probe that nobody reported on is offered again, from 0.001 to 86400.

    Raises:
        ValueError: An unknown `state`, or a `probe_lease` out of range.
        TypeError: A `probe_lease` that is no number.
    """

    def __init__(self, state: str, *, probe_lease: float = 30.0) -> None:
        check_choice("state", state, STATES)
        super().__init__("memory", probe_lease, FastPath())
        self._begin(new_circuit(state, wall_clock_ms()))

    def _begin(self, circuit: Circuit) -> None:
        self._engine = MemoryEngine(circuit, fast_path=self._shortcut)
        self._execute_for(self._callers.current(), Load())

    def _execute(self, intent: Intent) -> Reply:
        return self._engine.execute(intent)

    def _say_opened_at(self, at: Any) -> Intent:
        if at is not None:
            super()._say_opened_at(at)
        return _SetAnyOpenedAt(at and AssignedMs.of(at))

    def _read_opened_at(self, at_ms: float) -> Any:
        if isinstance(at_ms, AssignedMs) and callsite.caller_code() is not callsite.CHECKS_TIMEOUT:
            return at_ms.assigned
        # pybreaker compares with an aware time, which a naive one cannot be.
        return super()._read_opened_at(at_ms)

    @property
    def _fail_counter(self) -> int:
        """The failures, under the name that pybreaker's class has for them: tests of its users set it."""
        return self._execute(Load()).circuit.fail_counter

    @_fail_counter.setter
    def _fail_counter(self, count: int) -> None:
        self._execute(_SetFailCounter(count))

    def __getstate__(self) -> dict[str, Any]:
        circuit = self._execute(Load()).circuit
        ours = vars(CircuitMemoryStorage(circuit.state))
        at_ms = circuit.opened_at_ms
        return {
            "circuit": {
                "state": circuit.state,
                "fail_counter": circuit.fail_counter,
                "success_counter": circuit.success_counter,
                "generation": circuit.generation,
            },
            "opened_at": None if at_ms is None else self._read_opened_at(at_ms),
            "probe_lease": self._lease_ms / 1000,
            "added": {name: value for name, value in vars(self).items() if name not in ours},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__("memory", state["probe_lease"], FastPath())
        self._begin(Circuit(**state["circuit"], opened_at_ms=state["opened_at"] and AssignedMs.of(state["opened_at"])))
        vars(self).update(state["added"])


class FixedCircuitStorage(OperatedStorage):
    """Circuit for tests that stays in one state: no call and no operator changes it.

    Args:
        state: ``closed``, ``open`` or ``half-open``.
        opened_ahead_ms: Milliseconds from the current time to the time at which the circuit opened.
    """

    def __init__(self, state: str, *, opened_ahead_ms: float = 0.0) -> None:
        super().__init__("fixed", 1.0, FastPath())
        self._fixed_state = state
        self._opened_ahead_ms = opened_ahead_ms

    def _execute(self, intent: Intent) -> Reply:
        now_ms = wall_clock_ms()
        return Reply(True, Circuit(self._fixed_state, opened_at_ms=now_ms + self._opened_ahead_ms), now_ms)
