"""Commands of operators: read, set and reset circuits, their health, and the time until a circuit admits calls again.

What serves guarded calls suppresses errors of Redis.  The commands of operators raise them, as
`StorageUnavailableError`.

pybreaker's error has no reference to the breaker that raised it.  The error's traceback has one: the frames of the
breaker's methods.  So `breaker_of` works for every breaker, and costs nothing until it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerState,
    CircuitBreakerStorage,
    CircuitClosedState,
    CircuitHalfOpenState,
)

from pybreaker_redis._circuits.bulk import read_for_operator
from pybreaker_redis._circuits.core import CircuitCore, rejection_time_s
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN
from pybreaker_redis._model.intents import Close, Intent, Load, RecordSuccess, Reply, ResetProbes, SetState, Trip
from pybreaker_redis._runtime.clock import ms_from_utc, utc_from_ms, wall_clock_ms
from pybreaker_redis.health import Health

#: Intents that put a circuit into a state.  Half-opening claims no probe: an operator's process rarely makes calls.
_INTENTS_FOR_STATE: dict[str, tuple[Intent, ...]] = {
    OPEN: (Trip(None, ""),),
    CLOSED: (Close(None, ""),),
    HALF_OPEN: (ResetProbes(), SetState(HALF_OPEN)),
}

#: Intents that set the counts of a circuit to zero, and leave its state.
_INTENTS_FOR_RESET: tuple[Intent, ...] = (RecordSuccess(None, ""), ResetProbes())

#: Methods of pybreaker that open the circuit and raise a new error: code of the methods without wrappers.
_TRIPPING_CODES = tuple(inspect.unwrap(cls.on_failure).__code__ for cls in (CircuitClosedState, CircuitHalfOpenState))


@dataclass(frozen=True, slots=True)
class CircuitSnapshot:
    """A circuit at the time of a command.

    Attributes:
        state: ``closed``, ``open`` or ``half-open``.
        fail_counter: Consecutive failures.
        success_counter: Consecutive successes while half-open.
        opened_at: Time at which the circuit opened last, aware, by the local clock.  ``None``: never.
        retry_after: Seconds until a call may pass.  0: a call may pass now.
    """

    state: str
    fail_counter: int
    success_counter: int
    opened_at: datetime | None
    retry_after: float


def storage_of(breaker: CircuitBreaker) -> CircuitBreakerStorage:
    """Return the storage of a breaker."""
    storage: CircuitBreakerStorage = breaker._state_storage
    return storage


def breaker_of(error: CircuitBreakerError) -> CircuitBreaker | None:
    """Return the breaker that raised an error.  ``None`` if the error lost its traceback, as in a pickle."""
    breaker = None
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, CircuitBreakerState):
            owner = owner._breaker
        if isinstance(owner, CircuitBreaker):
            # Of breakers around breakers, the innermost raised the error.
            breaker = owner
        if frame.f_code in _TRIPPING_CODES and frame.f_locals["exc"] is not error:
            # The breaker tripped: it raised the error itself, with the traceback of the failure before.
            break
        step = step.tb_next
    return breaker


def retry_after(breaker_or_error: CircuitBreaker | CircuitBreakerError) -> float:
    """Return the seconds until a circuit may admit a call, by the view of this process.

    In steady state no request is made.  While another call probes: until the end of its lease, at the latest.

    Args:
        breaker_or_error: Breaker with any storage, or an error that a breaker raised.

    Returns:
        At least 0, which means now.  For a pickled `CircuitOpenError`: the seconds from the time of the error.  For
        another error without a traceback: 0.
    """
    breaker = breaker_of(breaker_or_error) if isinstance(breaker_or_error, CircuitBreakerError) else breaker_or_error
    if breaker is None:
        # A pickle of this package's error has the time, as of when it was raised.
        return getattr(breaker_or_error, "retry_after", 0.0)
    storage = storage_of(breaker)
    core = _core_of(storage)
    if core is not None:
        reply = core.read_without_request() or core.carry_out(Load())
        circuit = reply.circuit
        if circuit.state == HALF_OPEN and core.held_probes.is_held_here(circuit.probe_token):
            return 0.0
        return rejection_time_s(reply, breaker.reset_timeout)
    if storage.state != OPEN or not (opened_at := storage.opened_at):
        return 0.0
    return max(0.0, (ms_from_utc(opened_at) - wall_clock_ms()) / 1000 + breaker.reset_timeout)


def set_state(breaker: CircuitBreaker, state: str) -> None:
    """Put the circuit of a breaker into another state, for all processes that share the circuit.

    Args:
        breaker: Breaker with a storage of this package.
        state: ``open``, for the reset timeout from now on.  ``closed``, with all counts zero.  ``half-open``, so that
            the next call of any process is a probe.

    Raises:
        KeyError: There is no such state.
        StorageUnavailableError: Redis did not execute the command.
    """
    _checked_core_of(breaker).carry_out_or_raise(*_INTENTS_FOR_STATE[state])


def reset(breaker: CircuitBreaker) -> None:
    """Set all counts of a breaker's circuit to zero, and leave its state.

    Raises:
        StorageUnavailableError: Redis did not execute the command.
    """
    _checked_core_of(breaker).carry_out_or_raise(*_INTENTS_FOR_RESET)


def read(breakers: Sequence[CircuitBreaker]) -> list[CircuitSnapshot]:
    """Return the circuits of breakers, in one round trip for each server or node of a cluster.

    Raises:
        StorageUnavailableError: Redis did not execute a command.
    """
    cores = [_checked_core_of(breaker) for breaker in breakers]
    replies = iter(read_for_operator([core for core in cores if isinstance(core, Failover)]))
    return [
        _snapshot(next(replies) if isinstance(core, Failover) else core.carry_out(Load()), breaker.reset_timeout)
        for core, breaker in zip(cores, breakers, strict=True)
    ]


def health(breaker: CircuitBreaker) -> Health | None:
    """Return the last observed condition of a circuit's Redis, without a request.

    Returns:
        The condition, or ``None`` for a circuit without Redis.
    """
    core = _checked_core_of(breaker)
    return core.report_health() if isinstance(core, Failover) else None


def release_connections(breaker: CircuitBreaker) -> None:
    """Release connections and threads that only the breaker's circuit needs, until its next use."""
    _checked_core_of(breaker).release_connections()


def _snapshot(reply: Reply, reset_timeout_s: float) -> CircuitSnapshot:
    circuit = reply.circuit
    return CircuitSnapshot(
        state=circuit.state,
        fail_counter=circuit.fail_counter,
        success_counter=circuit.success_counter,
        opened_at=None if circuit.opened_at_ms is None else utc_from_ms(circuit.opened_at_ms),
        retry_after=rejection_time_s(reply, reset_timeout_s),
    )


def _core_of(storage: CircuitBreakerStorage) -> CircuitCore | None:
    """Return the circuit of a storage of this package.  ``None`` for other storages."""
    core: CircuitCore | None = getattr(storage, "_core", None)
    return core


def _checked_core_of(breaker: CircuitBreaker) -> CircuitCore:
    core = _core_of(storage_of(breaker))
    if core is None:
        msg = f"breaker {breaker.name!r} has no storage of this package"
        raise TypeError(msg)
    return core
