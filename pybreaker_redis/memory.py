"""Storages for circuits in the memory of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.inference import InferringStorage
from pybreaker_redis._circuits.core import FixedCore, MemoryCore
from pybreaker_redis._model.circuit import STATES, Circuit, new_circuit
from pybreaker_redis._model.intents import Decision, Intent, Load
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


class CircuitMemoryStorage(InferringStorage):
    """Circuit for the threads of one process, in place of `pybreaker.CircuitMemoryStorage`.

    Unlike pybreaker's class, the storage is safe without the breaker's lock, and admits one probe at a time even under
    `calling()`.  Results of calls that began before the last transition are ignored.

    Copies and pickles have the state, the counters and `opened_at`, and are separate circuits: a probe that is under
    way stays with the original.  `opened_at` is read as it was set, also naive, and may be set to ``None``:
    then the next call probes.

    Args:
        state: State to begin with: ``closed``, ``open`` or ``half-open``.
        probe_lease: Seconds until a probe without a report is offered to another call, from 0.001 to 86400.
        clock_ms: Function that returns the local time, milliseconds since the epoch.

    Raises:
        ValueError: The `state` is unknown, or `probe_lease` is out of range.
        TypeError: The `probe_lease` is no number.
    """

    def __init__(self, state: str, *, probe_lease: float = 30.0, clock_ms: Callable[[], float] = wall_clock_ms) -> None:
        check_choice("state", state, STATES)
        self._begin(probe_lease, new_circuit(state, clock_ms()), clock_ms)

    def _begin(self, probe_lease: float, circuit: Circuit, clock_ms: Callable[[], float] = wall_clock_ms) -> None:
        super().__init__("memory", probe_lease, MemoryCore(circuit, clock_ms))
        self._execute_for(self._contexts.current(), Load())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.last_known_state}>"

    def _intent_for_opened_at(self, at: Any) -> Intent:
        if at is not None:
            super()._intent_for_opened_at(at)
        return _SetAnyOpenedAt(at and AssignedMs.of(at))

    def _opened_at_of(self, at_ms: float) -> Any:
        if isinstance(at_ms, AssignedMs) and callsite.caller_code() is not callsite.OPEN_BEFORE_CALL:
            return at_ms.assigned
        # pybreaker compares with an aware time, which a naive one cannot be.
        return super()._opened_at_of(at_ms)

    @property
    def _fail_counter(self) -> int:
        """Consecutive failures, under the name of pybreaker's class: tests of users set the attribute."""
        return self._core.carry_out(Load()).circuit.fail_counter

    @_fail_counter.setter
    def _fail_counter(self, count: int) -> None:
        self._core.carry_out(_SetFailCounter(count))

    def __getstate__(self) -> dict[str, Any]:
        circuit = self._core.carry_out(Load()).circuit
        own_names = vars(CircuitMemoryStorage(circuit.state))
        at_ms = circuit.opened_at_ms
        return {
            "circuit": {
                "state": circuit.state,
                "fail_counter": circuit.fail_counter,
                "success_counter": circuit.success_counter,
                "generation": circuit.generation,
            },
            "opened_at": None if at_ms is None else self._opened_at_of(at_ms),
            "probe_lease": self._core.lease_ms / 1000,
            "added": {name: value for name, value in vars(self).items() if name not in own_names},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened_at = state["opened_at"]
        circuit = Circuit(**state["circuit"], opened_at_ms=opened_at and AssignedMs.of(opened_at))
        self._begin(state["probe_lease"], circuit)
        vars(self).update(state["added"])


class FixedCircuitStorage(InferringStorage):
    """Circuit for tests that stays in one state: no call and no operator changes it.

    Args:
        state: ``closed``, ``open`` or ``half-open``.
        opened_ahead_ms: Milliseconds from the current time to the time at which the circuit opened.
    """

    def __init__(self, state: str, *, opened_ahead_ms: float = 0.0) -> None:
        super().__init__("fixed", 1.0, FixedCore(state, opened_ahead_ms=opened_ahead_ms))
