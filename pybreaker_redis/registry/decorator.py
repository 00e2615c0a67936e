"""Decorator that guards a function by a breaker, with a fallback for rejected calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from types import AsyncGeneratorType
from typing import Any, ParamSpec, TypeVar, cast

from pybreaker import CircuitBreakerError

from pybreaker_redis.breaker import CircuitBreaker, wrapper_of

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
        A decorator for functions of any kind.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        guarded = wrapper_of(breaker, function)
        if inspect.isasyncgenfunction(guarded):
            if fallback is not NO_FALLBACK:
                msg = f"an asynchronous generator has no fallback: {function.__qualname__} may catch CircuitOpenError"
                raise TypeError(msg)
            return cast("Callable[P, T]", guarded)
        if inspect.iscoroutinefunction(guarded):
            return cast("Callable[P, T]", _with_awaited_fallback(guarded, fallback))
        _check_synchronous("fallback", fallback)

        @functools.wraps(function)
        def with_fallback(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return _returned("guarded function", breaker().call(function, *args, **kwargs))
            except CircuitBreakerError:
                if fallback is NO_FALLBACK:
                    raise
                result = _returned("fallback", fallback(*args, **kwargs)) if callable(fallback) else fallback
                return cast("T", result)

        return with_fallback

    return decorate


def _with_awaited_fallback(guarded: Callable[..., Awaitable[T]], fallback: Any) -> Callable[..., Awaitable[T]]:
    if fallback is NO_FALLBACK:
        return guarded

    @functools.wraps(guarded)
    async def with_fallback(*args: Any, **kwargs: Any) -> T:
        try:
            return await guarded(*args, **kwargs)
        except CircuitBreakerError:
            result = fallback(*args, **kwargs) if callable(fallback) else fallback
            return cast("T", await result if inspect.isawaitable(result) else result)

    return with_fallback


def _check_synchronous(what: str, function: Any) -> None:
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
    return TypeError(f"the {what} {name} is asynchronous, but the guarded function is not an async def")


def _is_asynchronous(code: Any) -> bool:
    return inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code)
