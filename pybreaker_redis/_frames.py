"""Which of pybreaker's methods is asking?

Knows: the code of pybreaker's methods.  Does not know: storages, circuits.

The storage interface has no word for "this is a failure", "I only noticed" or "I am closing": the same
`reset_counter()` serves three of them.  The order of a thread's operations nearly tells them apart; it fails when a
listener, a health check or the guarded function itself reads the breaker in between.  Who called does tell, always.
It costs a few frames, only where a round trip follows anyway.  Names are those of pybreaker 1.4.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

from pybreaker import CircuitBreaker, CircuitClosedState, CircuitHalfOpenState, CircuitOpenState


def _code(function: Any) -> CodeType:
    code: CodeType = getattr(function, "fget", function).__code__
    return code


OPENS = _code(CircuitBreaker.open)
HALF_OPENS = _code(CircuitBreaker.half_open)
CLOSES = _code(CircuitBreaker.close)
COUNTS_FAILURE = _code(CircuitBreaker._inc_counter)
REPORTS_SUCCESS = _code(CircuitClosedState._handle_success)
COMPARES_FAILURES = _code(CircuitClosedState.on_failure)
PROBE_FAILED = _code(CircuitHalfOpenState.on_failure)
COUNTS_PROBE = _code(CircuitHalfOpenState.on_success)
CHECKS_TIMEOUT = _code(CircuitOpenState.before_call)
BUILDS_OPEN = _code(CircuitOpenState.__init__)
BUILDS_HALF_OPEN = _code(CircuitHalfOpenState.__init__)
BUILDS_CLOSED = _code(CircuitClosedState.__init__)
_BUILDS = _code(CircuitBreaker._create_new_state)
_READS_STATE = _code(CircuitBreaker.current_state)
_COMPARES_STATE = _code(CircuitBreaker.state)

#: What `CircuitBreaker.call` and the coroutine within `call_async` are called, also in subclasses that override them.
_CALLS = ("call", "wrapped")


def asker(operation: str) -> CodeType:
    """The code that asks a storage for an operation; to be called by that operation.

    Args:
        operation: Its name.  Frames of that name are passed over: they are overrides or wrappers of the storage.
    """
    return _asking_frame(operation).f_code


def asked_through(operation: str, *codes: CodeType) -> bool:
    """Whether one of `codes` is among the four callers behind the one that asks for an operation."""
    frame: FrameType | None = _asking_frame(operation).f_back
    for _ in range(4):
        if frame is None:
            break
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def asks_for_a_call(operation: str) -> bool:
    """Whether `state` is read to admit a call, not to look at the circuit."""
    reader = _asking_frame(operation)
    comparer = reader.f_back
    if reader.f_code is not _READS_STATE or comparer is None or comparer.f_code is not _COMPARES_STATE:
        return False
    return comparer.f_back is not None and comparer.f_back.f_code.co_name in _CALLS


def breaker_that_tells() -> CircuitBreaker | None:
    """The breaker that is just telling its listeners of a new state, on this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BUILDS:
            breaker: CircuitBreaker = frame.f_locals["self"]
            return breaker
        frame = frame.f_back
    return None


def compares_state(operation: str, breaker: CircuitBreaker) -> bool:
    """Whether `state` is read by `breaker.state`, which tells all listeners if the answer differs from its own."""
    reader = _asking_frame(operation)
    comparer = reader.f_back
    if reader.f_code is not _READS_STATE or comparer is None or comparer.f_code is not _COMPARES_STATE:
        return False
    return comparer.f_locals["self"] is breaker


def _asking_frame(operation: str) -> FrameType:
    frame = sys._getframe(2)
    while frame.f_code.co_name == operation and frame.f_back is not None:
        frame = frame.f_back
    return frame
