"""Methods of pybreaker that call a storage: which one does, found by the frames of the stack.

The storage interface has no operation for "this is a failure", "the breaker noticed" or "the breaker closes": the same
`reset_counter()` serves three purposes.  The order of a thread's operations nearly distinguishes the purposes.  That
order misleads when a listener, a health check or the guarded function itself reads the breaker in between.  The caller
does not mislead.  The look at a few frames only happens where a round trip follows anyway.

Frames between a storage and the calling method of pybreaker 1.4 are passed over: they are overrides and wrappers.  The
walk ends where a guarded function or a listener begins: their operations are by hand.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType, FrameType
from typing import Any

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerListener,
    CircuitBreakerState,
    CircuitClosedState,
    CircuitHalfOpenState,
    CircuitOpenState,
)


def _code(function: Any) -> CodeType:
    # Monitoring agents wrap methods.  The wrapped function is the one that runs in the end.
    code: CodeType = inspect.unwrap(getattr(function, "fget", function)).__code__
    return code


_BREAKER_INIT = _code(CircuitBreaker.__init__)
OPEN_METHOD = _code(CircuitBreaker.open)
HALF_OPEN_METHOD = _code(CircuitBreaker.half_open)
CLOSE_METHOD = _code(CircuitBreaker.close)
HANDLE_ERROR = _code(CircuitBreakerState._handle_error)
HANDLE_SUCCESS = _code(CircuitBreakerState._handle_success)
CLOSED_ON_FAILURE = _code(CircuitClosedState.on_failure)
HALF_OPEN_ON_FAILURE = _code(CircuitHalfOpenState.on_failure)
HALF_OPEN_ON_SUCCESS = _code(CircuitHalfOpenState.on_success)
OPEN_BEFORE_CALL = _code(CircuitOpenState.before_call)
OPEN_INIT = _code(CircuitOpenState.__init__)
HALF_OPEN_INIT = _code(CircuitHalfOpenState.__init__)
CLOSED_INIT = _code(CircuitClosedState.__init__)

#: Methods of a breaker that bring it into another state.
STATE_CHANGING_METHODS = (OPEN_METHOD, HALF_OPEN_METHOD, CLOSE_METHOD)


def _ids(*codes: CodeType) -> frozenset[int]:
    """Return the identities of code that lives as long as pybreaker: to hash code takes longer than to walk a frame."""
    return frozenset(map(id, codes))


_CALLERS = _ids(
    OPEN_METHOD,
    HALF_OPEN_METHOD,
    CLOSE_METHOD,
    HANDLE_ERROR,
    HANDLE_SUCCESS,
    CLOSED_ON_FAILURE,
    HALF_OPEN_ON_SUCCESS,
    OPEN_BEFORE_CALL,
    OPEN_INIT,
    HALF_OPEN_INIT,
    CLOSED_INIT,
)
_NOTIFIES_LISTENERS = _code(CircuitBreaker._create_new_state)
_COMPARES_STATE = _code(CircuitBreaker.state)
#: Names under which `state` is read and passed on, by storages, by pybreaker and by overrides.
_READS_STATE = ("_state_for_constructor", "_read_state", "state", "current_state")
#: Names of the methods that admit a call by reading `state`: pybreaker's own, and overrides of these.
_ADMITS = frozenset(("call", "call_async", "calling"))


def _code_within(function: Any) -> CodeType:
    """Return the code of the coroutine that pybreaker defines inside one of its methods."""
    return next(constant for constant in _code(function).co_consts if isinstance(constant, CodeType))


_ADMITS_ASYNC = _code_within(CircuitBreaker.call_async)
_RUNS_FUNCTION = _ids(
    _code(CircuitBreakerState.call),
    _code(CircuitBreakerState.generator_call),
    _code_within(CircuitBreakerState.call_async),
)
_LISTENS = frozenset(name for name in vars(CircuitBreakerListener) if not name.startswith("_"))


def calling_frame() -> FrameType | None:
    """Return the frame of the method of pybreaker that called the storage method.  ``None``: other code called it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if id(code) in _CALLERS:
            return frame
        if id(code) in _RUNS_FUNCTION or code.co_name in _LISTENS:
            return None
        frame = frame.f_back
    return None


def caller_code() -> CodeType | None:
    """Return the method of pybreaker that called the storage method.  ``None``: other code called it."""
    frame = calling_frame()
    return frame.f_code if frame else None


def frame_among(*codes: CodeType, calling_frame: FrameType | None = None) -> FrameType | None:
    """Return the frame of one of these methods, if it is among those that led to the calling one.

    Args:
        codes: Code of the methods.
        calling_frame: Frame of the calling method, if it is known.
    """
    frame: FrameType | None = calling_frame or sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # The walk ends where pybreaker runs other code: a guarded function, or a listener.
        if id(code) in _RUNS_FUNCTION or (code.co_name in _LISTENS and id(code) not in _CALLERS):
            break
        if code in codes:
            return frame
        frame = frame.f_back
    return None


def reporting_state(frame: FrameType) -> CircuitBreakerState | None:
    """Return the state object of the call that is being reported, if that call is on the stack.

    Args:
        frame: Frame of a method of the state object, as of `_handle_error()`.

    Returns:
        ``None`` if the method was called by hand.
    """
    state: CircuitBreakerState = frame.f_locals["self"]
    outer: FrameType | None = frame
    while outer is not None and id(outer.f_code) not in _RUNS_FUNCTION:
        outer = outer.f_back
    return state if outer is not None and outer.f_locals["self"] is state else None


def comparing_breaker() -> CircuitBreaker | None:
    """Return the breaker that reads the storage's `state` to compare it with its own."""
    frame = _comparing_frame()
    return frame.f_locals["self"] if frame else None


def is_admission_read(breaker: CircuitBreaker) -> bool:
    """Whether a call is to be admitted: `call()` of the breaker, or an override of it, reads `breaker.state`.

    Other methods of a breaker that read `state`, as for a page of metrics, admit nothing.  Neither does an override
    that leaves the call to the overridden method, which reads `state` as well.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if id(code) in _RUNS_FUNCTION or (code.co_name in _LISTENS and id(code) not in _CALLERS):
            break
        if (code.co_name in _ADMITS or code is _ADMITS_ASYNC) and frame.f_locals.get("self") is breaker:
            return "super" not in code.co_names
        frame = frame.f_back
    return False


def notifying_breakers() -> list[CircuitBreaker]:
    """Return the breakers that are notifying their listeners of a new state, on this thread."""
    notifying = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _NOTIFIES_LISTENERS:
            notifying.append(frame.f_locals["self"])
        frame = frame.f_back
    return notifying


def is_own_transition() -> bool:
    """Whether a breaker made the transition itself of which it notifies its listeners, on this thread.

    Otherwise another process moved the circuit, and the breaker has noticed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _NOTIFIES_LISTENERS:
        frame = frame.f_back
    # The caller is the setter of `breaker.state`, and its caller is the code that set the state.
    mover = frame and frame.f_back and frame.f_back.f_back
    return mover is not None and mover.f_code in STATE_CHANGING_METHODS


def breaker_under_construction() -> CircuitBreaker | None:
    """Return the breaker under construction that reads the storage's `state`."""
    frame = _behind_readers(sys._getframe(1))
    return frame.f_locals["self"] if frame.f_code is _BREAKER_INIT else None


def _behind_readers(frame: FrameType) -> FrameType:
    while frame.f_code.co_name in _READS_STATE and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _comparing_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _READS_STATE:
        if frame.f_code is _COMPARES_STATE:
            return frame
        frame = frame.f_back
    return None
