"""Decorator that guards a function by a breaker, with a fallback for rejected calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import AsyncGeneratorType
from typing import Any, ParamSpec, TypeVar, cast

from pybreaker import CircuitBreaker, CircuitBreakerError

P = ParamSpec("P")
T = TypeVar("T")

#: Kinds of results, apart from awaitables, that leave work to be done.
_UNFINISHED = (Future, AsyncGeneratorType)
#: Kinds of results that most calls have.  Their look-up takes a fifth of the time of the other tests.
_FINISHED = frozenset((type(None), bool, int, float, str, bytes, tuple, list, dict))

#: No fallback: the error is raised.  ``None`` is a fallback, because a call may return ``None``.
NO_FALLBACK = object()


def guard_with(breaker: Callable[[], CircuitBreaker], fallback: Any) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that guards the calls of a function.

    Args:
        breaker: Function that returns the breaker, called at every call.
        fallback: Result in place of `pybreaker.CircuitBreakerError`: a value, or a callable that gets the call's
            arguments.

    Returns:
        A decorator for functions.  It raises TypeError for one that is asynchronous, as for such a fallback.
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
                result = _returned("fallback", fallback(*args, **kwargs)) if callable(fallback) else fallback
                return cast("T", result)

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
    """Return what a call returned, unless the work is still to be done: then nothing of it was guarded.

    A coroutine is closed.  A future is left alone: other callers may wait for it.
    """
    kind = type(result)
    if kind in _FINISHED:
        return result
    if hasattr(kind, "__await__") or issubclass(kind, _UNFINISHED):
        if isinstance(result, Coroutine):
            result.close()
        raise _asynchronous(what, result)
    return result


def _asynchronous(what: str, thing: Any) -> TypeError:
    # Not the thing itself: its `repr` may be long, and may show arguments and results.
    name = getattr(thing, "__qualname__", None) or f"that is an object of class {type(thing).__qualname__}"
    return TypeError(f"the {what} {name} is asynchronous, which a pybreaker.CircuitBreaker cannot guard")


def _is_asynchronous(code: Any) -> bool:
    return inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code)
