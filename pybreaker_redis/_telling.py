"""Who is reading the state while the breaker tells its listeners?

Knows: the frames of pybreaker's methods.  Does not know: storages, circuits.
"""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from pybreaker import CircuitBreaker


def _code(attribute: Any) -> CodeType:
    code: CodeType = attribute.fget.__code__
    return code


_READS_CURRENT_STATE = _code(CircuitBreaker.current_state)
_COMPARES_STATE = _code(CircuitBreaker.state)
_TELLS_LISTENERS = CircuitBreaker._create_new_state.__code__  # noqa: SLF001


def state_compared_by_a_listener() -> str | None:
    """The breaker's old state, if a listener that is just being told of the new one reads `breaker.state`.

    To be called by the storage's `state`.  The property `breaker.state` tells all listeners whenever the storage
    disagrees with the breaker, which it does until they have been told: they would be told for ever.  So this one
    reader, and only while the breaker is telling, gets what it compares with, as it does with stock storages;
    `current_state` and the storage itself give the new state.

    Found by walking the stack, because nothing else distinguishes the two readers; only ever done between a commit and
    its echo.
    """
    reader = sys._getframe(2)  # noqa: SLF001
    comparer = reader.f_back
    if reader.f_code is not _READS_CURRENT_STATE or comparer is None or comparer.f_code is not _COMPARES_STATE:
        return None
    breaker = comparer.f_locals["self"]
    frame = comparer.f_back
    while frame is not None:
        if frame.f_code is _TELLS_LISTENERS and frame.f_locals["self"] is breaker:
            return str(breaker._state.name)  # noqa: SLF001
        frame = frame.f_back
    return None
