"""Which of pybreaker's methods is asking?

Knows: the code of pybreaker's methods.  Does not know: storages, circuits.

The storage interface has no word for "this is a failure", "I only noticed" or "I am closing": the same
`reset_counter()` serves three of them.  The order of a thread's operations nearly tells them apart; it fails when a
listener, a health check or the guarded function itself reads the breaker in between.  Who called does tell.  It costs a
few frames, only where a round trip follows anyway.

Frames between a storage and the method of pybreaker 1.4 that asks are passed over: they are overrides and wrappers.
The walk ends where a guarded function or a listener begins: what they ask for, they ask for by hand.
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
    # Monitoring agents wrap methods; what they wrap is what runs in the end.
    code: CodeType = inspect.unwrap(getattr(function, "fget", function)).__code__
    return code


_CREATES = _code(CircuitBreaker.__init__)
OPENS = _code(CircuitBreaker.open)
HALF_OPENS = _code(CircuitBreaker.half_open)
CLOSES = _code(CircuitBreaker.close)
REPORTS_FAILURE = _code(CircuitBreakerState._handle_error)
REPORTS_SUCCESS = _code(CircuitBreakerState._handle_success)
COMPARES_FAILURES = _code(CircuitClosedState.on_failure)
PROBE_FAILED = _code(CircuitHalfOpenState.on_failure)
COUNTS_PROBE = _code(CircuitHalfOpenState.on_success)
CHECKS_TIMEOUT = _code(CircuitOpenState.before_call)
BUILDS_OPEN = _code(CircuitOpenState.__init__)
BUILDS_HALF_OPEN = _code(CircuitHalfOpenState.__init__)
BUILDS_CLOSED = _code(CircuitClosedState.__init__)


def _ids(*codes: CodeType) -> frozenset[int]:
    """Identities of code that lives as long as pybreaker: to hash code itself takes longer than to walk a frame."""
    return frozenset(map(id, codes))


_ASKERS = _ids(
    OPENS,
    HALF_OPENS,
    CLOSES,
    REPORTS_FAILURE,
    REPORTS_SUCCESS,
    COMPARES_FAILURES,
    COUNTS_PROBE,
    CHECKS_TIMEOUT,
    BUILDS_OPEN,
    BUILDS_HALF_OPEN,
    BUILDS_CLOSED,
)
_TELLS_LISTENERS = _code(CircuitBreaker._create_new_state)
_COMPARES_STATE = _code(CircuitBreaker.state)
#: Names under which `state` is read and passed on, by storages, by pybreaker and by overrides.
_READS_STATE = ("_state_for_constructor", "_read_state", "state", "current_state")
#: Names of the methods that admit a call by reading `state`: pybreaker's own, and overrides of these.
_ADMITS = frozenset(("call", "call_async", "calling"))


def _code_within(function: Any) -> CodeType:
    """The code of the coroutine that pybreaker defines inside one of its methods."""
    return next(constant for constant in _code(function).co_consts if isinstance(constant, CodeType))


_ADMITS_ASYNC = _code_within(CircuitBreaker.call_async)
_RUNS_FUNCTION = _ids(
    _code(CircuitBreakerState.call),
    _code(CircuitBreakerState.generator_call),
    _code_within(CircuitBreakerState.call_async),
)
_LISTENS = frozenset(name for name in vars(CircuitBreakerListener) if not name.startswith("_"))


def calling_frame() -> FrameType | None:
    """The frame of the method of pybreaker that asks the calling storage method for something, if one does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if id(code) in _ASKERS:
            return frame
        if id(code) in _RUNS_FUNCTION or code.co_name in _LISTENS:
            return None
        frame = frame.f_back
    return None


def caller_code() -> CodeType | None:
    """The method of pybreaker that asks the calling storage method for something; ``None``: somebody else does."""
    frame = calling_frame()
    return frame.f_code if frame else None


def frame_among(*codes: CodeType, calling_frame: FrameType | None = None) -> FrameType | None:
    """The frame of one of these methods, if it is among those that led to the asking one.

    Args:
        codes: The methods.
        calling_frame: The frame of the asking one, if it is known.
    """
    frame: FrameType | None = calling_frame or sys._getframe(1)
    while frame is not None and not _ends(frame):
        if frame.f_code in codes:
            return frame
        frame = frame.f_back
    return None


def reporting_state(frame: FrameType) -> CircuitBreakerState | None:
    """The state object whose call is being reported, if that call is on the stack.

    Args:
        frame: Of a method of the state object, as of `_handle_error()`.

    Returns:
        ``None`` if the method was called by hand.
    """
    state: CircuitBreakerState = frame.f_locals["self"]
    outer: FrameType | None = frame
    while outer is not None and id(outer.f_code) not in _RUNS_FUNCTION:
        outer = outer.f_back
    return state if outer is not None and outer.f_locals["self"] is state else None


def comparing_breaker() -> CircuitBreaker | None:
    """The breaker whose property `state` reads the calling storage's `state`, to compare it with its own."""
    frame = _comparing_frame()
    return frame.f_locals["self"] if frame else None


def is_admission_read(breaker: CircuitBreaker) -> bool:
    """Whether a call is to be admitted: `call()` of the breaker, or an override of it, reads `breaker.state`.

    Other methods of a breaker that read `state`, as for a page of metrics, only look.  So does an override that leaves
    the call to the method that it overrides: that method reads, too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _ends(frame):
        code = frame.f_code
        if (code.co_name in _ADMITS or code is _ADMITS_ASYNC) and frame.f_locals.get("self") is breaker:
            return "super" not in code.co_names
        frame = frame.f_back
    return False


def notifying_breakers() -> list[CircuitBreaker]:
    """The breakers that are telling their listeners of a new state just now, on this thread."""
    told = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _TELLS_LISTENERS:
            told.append(frame.f_locals["self"])
        frame = frame.f_back
    return told


def is_own_transition() -> bool:
    """Whether the new state that listeners are being told of, on this thread, was brought about by its breaker.

    Else the circuit was moved elsewhere, and the breaker has noticed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TELLS_LISTENERS:
        frame = frame.f_back
    # Behind it lies the setter of `breaker.state`, and behind that whoever has set it.
    mover = frame and frame.f_back and frame.f_back.f_back
    return mover is not None and mover.f_code in (OPENS, HALF_OPENS, CLOSES)


def breaker_under_construction() -> CircuitBreaker | None:
    """The breaker under construction that reads the calling storage's `state`."""
    frame = _behind_readers(sys._getframe(1))
    return frame.f_locals["self"] if frame.f_code is _CREATES else None


def _ends(frame: FrameType) -> bool:
    """Whether pybreaker runs in this frame something that is not its own: a guarded function, or a listener."""
    code = frame.f_code
    return id(code) in _RUNS_FUNCTION or (code.co_name in _LISTENS and id(code) not in _ASKERS)


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
