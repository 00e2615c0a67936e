"""Guards around functions, generators and blocks of code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any, cast

from pybreaker import CircuitBreaker

from pybreaker_redis.breaker.guard import CallGuard, guard_of
from pybreaker_redis.breaker.permit import Permit
from pybreaker_redis.breaker.transitions import notify_before_call


def wrapper_of(breaker: Callable[[], Any], function: Any) -> Any:
    """Return a function that guards another one, and is of the same kind.

    Args:
        breaker: Function that returns the breaker, called at every call.
        function: Function, generator function, coroutine function or asynchronous generator function.

    Raises:
        TypeError: The object cannot be called.
    """
    if isinstance(function, (classmethod, staticmethod)):
        kind = type(function).__name__
        msg = f"the guarded function is a {kind}: write @{kind} above the decorator that guards"
        raise TypeError(msg)
    if not callable(function):
        msg = f"the guarded function must be callable, not an object of class {type(function).__qualname__}"
        raise TypeError(msg)
    if _is(inspect.isasyncgenfunction, function):
        return _async_generator_wrapper(breaker, cast("Callable[..., AsyncGenerator[Any, Any]]", function))
    if _is(inspect.iscoroutinefunction, function):

        @functools.wraps(function)
        async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await breaker().acall(function, *args, **kwargs)

        return guarded_coroutine

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return breaker().call(function, *args, **kwargs)

    return guarded


def _is(test: Callable[[Any], bool], function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return test(function) or test(type(function).__call__)


def guarded_generator(
    guard: CallGuard, permit: Permit, generator: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Yield what a generator yields, and settle the call when the generator ends.

    Args:
        guard: Guard of the breaker.
        permit: Permit of the call.
        generator: Generator that the guarded function returned.
    """
    try:
        result = yield from generator
    except BaseException as error:
        raise guard.settle_error(permit, error)
    permit.succeed()
    return result


def _async_generator_wrapper(
    breaker: Callable[[], Any], function: Callable[..., AsyncGenerator[Any, Any]]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    """Return an asynchronous generator function that settles the call when its generator ends."""

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        guard = guard_of(breaker())
        permit = await guard.admit_async()
        try:
            notify_before_call(breaker(), function, args, kwargs)
            generator = function(*args, **kwargs)
            # As `yield from` does, which asynchronous generators do not have.
            item = await generator.__anext__()
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as thrown:
                    item = await generator.athrow(thrown)
                else:
                    item = await generator.asend(sent)
        except StopAsyncIteration:
            await guard.settle_success_async(permit)
        except BaseException as error:
            raise await guard.settle_error_async(permit, error)

    return guarded


class Calling(ContextDecorator):
    """Guard of one block: ``with breaker.calling():`` or ``async with breaker.calling():``."""

    #: Name for listeners, which get the object as the function of `before_call`.
    __name__ = "calling"

    def __init__(self, breaker: CircuitBreaker, guard: CallGuard) -> None:
        self._breaker = breaker
        self._guard = guard
        self._permit: Permit | None = None

    def _recreate_cm(self) -> Calling:
        return type(self)(self._breaker, self._guard)

    def _check_unused(self) -> None:
        if self._permit is not None and not self._permit.is_settled:
            msg = "this object guards a block already: write breaker.calling() for each block"
            raise RuntimeError(msg)

    def __enter__(self) -> Permit:
        self._check_unused()
        self._permit = permit = self._guard.admit()
        try:
            notify_before_call(self._breaker, self, (), {})
        except BaseException as error:
            raise self._guard.settle_error(permit, error)
        return permit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        permit = self._permit
        assert permit is not None
        if permit.is_settled:
            return
        if error is None:
            permit.succeed()
        elif (outcome := self._guard.settle_error(permit, error)) is not error:
            raise outcome

    async def __aenter__(self) -> Permit:
        self._check_unused()
        self._permit = permit = await self._guard.admit_async()
        try:
            notify_before_call(self._breaker, self, (), {})
        except BaseException as error:
            raise await self._guard.settle_error_async(permit, error)
        return permit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        permit = self._permit
        assert permit is not None
        if permit.is_settled:
            return
        if error is None:
            await self._guard.settle_success_async(permit)
        elif (outcome := await self._guard.settle_error_async(permit, error)) is not error:
            raise outcome
