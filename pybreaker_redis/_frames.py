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
from collections.abc import Iterator
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
_ASKERS = frozenset(
    (
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
)
_TELLS_LISTENERS = _code(CircuitBreaker._create_new_state)
_COMPARES_STATE = _code(CircuitBreaker.state)
#: Names under which `state` is read and passed on, by storages, by pybreaker and by overrides.
_READS_STATE = ("_state_under_construction", "_read_state", "state", "current_state")
_CALLS = _code(CircuitBreaker.call)
_CALLS_STATE = _code(CircuitBreakerState.call)
_RUNS_FUNCTION = frozenset((_CALLS_STATE, _code(CircuitBreakerState.generator_call)))
_LISTENS = frozenset(name for name in vars(CircuitBreakerListener) if not name.startswith("_"))


def asker() -> CodeType | None:
    """The method of pybreaker that asks the calling storage method for something; ``None``: somebody else does."""
    for frame in _frames_of_pybreaker():
        if frame.f_code in _ASKERS:
            return frame.f_code
    return None


def asked_through(*codes: CodeType) -> bool:
    """Whether one of these methods is among those that led to the asking one."""
    return any(frame.f_code in codes for frame in _frames_of_pybreaker())


def reading_breaker() -> CircuitBreaker | None:
    """The breaker whose property `state` reads the calling storage's `state`, to compare it with its own."""
    frame = _comparing_frame()
    return frame.f_locals["self"] if frame else None


def reads_for_a_call(breaker: CircuitBreaker) -> bool:
    """Whether a method of the breaker reads `breaker.state`, as `call()` does to admit a call."""
    return _behind_readers(sys._getframe(1)).f_locals.get("self") is breaker


def told_breakers() -> list[CircuitBreaker]:
    """The breakers that are telling their listeners of a new state just now, on this thread."""
    told = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _TELLS_LISTENERS:
            told.append(frame.f_locals["self"])
        frame = frame.f_back
    return told


def tells_own_move() -> bool:
    """Whether the new state that listeners are being told of, on this thread, was brought about by its breaker.

    Else the circuit was moved elsewhere, and the breaker has noticed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TELLS_LISTENERS:
        frame = frame.f_back
    # Behind it lies the setter of `breaker.state`, and behind that whoever has set it.
    mover = frame and frame.f_back and frame.f_back.f_back
    return mover is not None and mover.f_code in (OPENS, HALF_OPENS, CLOSES)


def _frames_of_pybreaker() -> Iterator[FrameType]:
    """The frames behind the calling storage method, up to where pybreaker runs something that is not its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        listens = frame.f_code.co_name in _LISTENS and frame.f_code not in _ASKERS
        if listens or frame.f_code in _RUNS_FUNCTION:
            return
        yield frame
        frame = frame.f_back


def created_breaker() -> CircuitBreaker | None:
    """The breaker under construction that reads the calling storage's `state`."""
    frame = _behind_readers(sys._getframe(1))
    return frame.f_locals["self"] if frame.f_code is _CREATES else None


def called_past_breaker() -> bool:
    """Whether the call that is being reported was made on a breaker's state object, as in ``breaker.state.call(f)``."""
    inside = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALLS:
        if frame.f_code in _RUNS_FUNCTION:
            if inside or frame.f_code is not _CALLS_STATE:
                break
            inside = True
        frame = frame.f_back
    return inside and (frame is None or frame.f_code is not _CALLS)


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
