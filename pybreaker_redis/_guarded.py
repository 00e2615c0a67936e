"""What does a guarded function return when its call was rejected?

Knows: functions, fallbacks.  Does not know: where breakers come from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pybreaker import CircuitBreaker, CircuitBreakerError

P = ParamSpec("P")
T = TypeVar("T")

#: The error is raised.  ``None`` would be something that a call may well return.
NO_FALLBACK = object()


def guarded_by(breaker: Callable[[], CircuitBreaker], fallback: Any) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have calls of a function guarded.

    Args:
        breaker: Returns the breaker; asked at every call.
        fallback: In place of `pybreaker.CircuitBreakerError`: a value, or what is called with the call's arguments.

    Returns:
        A decorator for functions; it raises TypeError for one that is asynchronous, as for such a fallback.
    """
    _check_synchronous("fallback", fallback)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        _check_synchronous("guarded function", function)

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return breaker().call(function, *args, **kwargs)
            except CircuitBreakerError:
                if fallback is NO_FALLBACK:
                    raise
                result: T = fallback(*args, **kwargs) if callable(fallback) else fallback
                return result

        return guarded

    return decorate


def _check_synchronous(what: str, function: Any) -> None:
    inner = inspect.unwrap(function) if callable(function) else function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if any(_is_asynchronous(code) for code in (inner, type(inner).__call__) if callable(inner)):
        msg = f"the {what} {function!r} is asynchronous, which a pybreaker.CircuitBreaker cannot guard"
        raise TypeError(msg)


def _is_asynchronous(code: Any) -> bool:
    return inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code)
