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
                return _returned("guarded function", breaker().call(function, *args, **kwargs))
            except CircuitBreakerError:
                if fallback is NO_FALLBACK:
                    raise
                result: T = _returned("fallback", fallback(*args, **kwargs)) if callable(fallback) else fallback
                return result

        return guarded

    return decorate


def _check_synchronous(what: str, function: Any) -> None:
    if isinstance(function, (classmethod, staticmethod)):
        # Not to be called like that, which would count as a failure of the dependency.
        kind = type(function).__name__
        msg = f"the {what} is a {kind}: write @{kind} above the decorator that guards"
        raise TypeError(msg)
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if any(_is_asynchronous(code) for code in (inner, type(inner).__call__) if callable(inner)):
        raise _asynchronous(what, function)


def _returned(what: str, result: T) -> T:
    """What a call returns, unless that is a call that is still to be made: then nothing of it was guarded."""
    if inspect.iscoroutine(result):
        result.close()
        raise _asynchronous(what, result)
    return result


def _asynchronous(what: str, thing: Any) -> TypeError:
    return TypeError(f"the {what} {thing!r} is asynchronous, which a pybreaker.CircuitBreaker cannot guard")


def _is_asynchronous(code: Any) -> bool:
    return inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code)
