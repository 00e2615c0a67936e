"""Which breaker has raised this, where does it keep its circuit, and when may it be tried again?

Knows: tracebacks, pybreaker's private names, storages of all kinds.  Does not know: registries.

pybreaker's error does not say which breaker raised it.  Its traceback does: the frames of the breaker's methods hold
the breaker.  So this works for every breaker, whoever made it, and costs nothing until somebody wants to know.
"""

from __future__ import annotations

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerState, CircuitBreakerStorage

from pybreaker_redis._adapter.callsite import COMPARES_FAILURES, PROBE_FAILED, is_own_transition
from pybreaker_redis._adapter.operated import OperatedStorage
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN
from pybreaker_redis._model.intents import Close, Intent, RecordSuccess, ResetProbes, SetState, Trip
from pybreaker_redis._runtime.clock import ms_from_utc, wall_clock_ms


def storage_of(breaker: CircuitBreaker) -> CircuitBreakerStorage:
    """Where a breaker keeps its circuit."""
    storage: CircuitBreakerStorage = breaker._state_storage
    return storage


def breaker_of(error: CircuitBreakerError) -> CircuitBreaker | None:
    """The breaker that has raised an error; ``None`` if the error has lost its traceback, as by way of a pickle."""
    breaker = None
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, CircuitBreakerState):
            owner = owner._breaker
        if isinstance(owner, CircuitBreaker):
            # Of breakers around breakers, the innermost has raised it.
            breaker = owner
        if frame.f_code in (COMPARES_FAILURES, PROBE_FAILED) and frame.f_locals["exc"] is not error:
            # It has tripped: the error is its own, and has been given the traceback of the failure before it.
            break
        step = step.tb_next
    return breaker


def made_transition(breaker: CircuitBreaker) -> bool:
    """Whether the new state that a breaker tells its listeners of, on this thread, is its own doing.

    Else the circuit was moved by somebody else, be it before the breaker has asked or just then.
    """
    storage = storage_of(breaker)
    return is_own_transition() and not (isinstance(storage, OperatedStorage) and not storage.was_granted)


def retry_after(breaker_or_error: CircuitBreaker | CircuitBreakerError) -> float:
    """Seconds until a circuit may be tried again, as far as this process knows: in steady state it asks nobody.

    While somebody else probes: until the end of their lease, at the latest.

    Args:
        breaker_or_error: A breaker with whatever storage, or an error that one has raised.

    Returns:
        Never less than 0, which means: now.  Also for an error that no longer tells its breaker, because it has lost
        its traceback, as by way of a pickle.
    """
    breaker = breaker_of(breaker_or_error) if isinstance(breaker_or_error, CircuitBreakerError) else breaker_or_error
    if breaker is None:
        return 0.0
    storage = storage_of(breaker)
    if isinstance(storage, OperatedStorage):
        return storage.retry_after(breaker.reset_timeout)
    if storage.state != OPEN or not (opened_at := storage.opened_at):
        return 0.0
    return max(0.0, (ms_from_utc(opened_at) - wall_clock_ms()) / 1000 + breaker.reset_timeout)


#: What puts a circuit into a state.  Who half-opens it has no right to the trial: an operator's process is rarely the
#: one that calls.
COMMANDS_FOR_STATE: dict[str, tuple[Intent, ...]] = {
    OPEN: (Trip(None, ""),),
    CLOSED: (Close(None, ""),),
    HALF_OPEN: (ResetProbes(), SetState(HALF_OPEN)),
}


#: What forgets the counts of a circuit, and leaves its state.
COMMANDS_FOR_RESET: tuple[Intent, ...] = (RecordSuccess(None, ""), ResetProbes())
