"""`CircuitBreaker`: a `pybreaker.CircuitBreaker` that admits each call, and settles its outcome."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, ParamSpec, TypeVar, cast, overload

from pybreaker import CircuitBreakerListener, CircuitBreakerStorage

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._model.circuit import BY_HAND, HALF_OPEN
from pybreaker_redis._model.intents import Close, Load, ResetProbes, SetState, Trip
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.types import ClientSource
from pybreaker_redis.breaker.arguments import (
    Rule,
    check_callable,
    circuit_of,
    clock_for,
    matches,
    storage_for,
)
from pybreaker_redis.breaker.guard import CallGuard, guard_of
from pybreaker_redis.breaker.permit import Permit
from pybreaker_redis.breaker.rules import CheckedRules, check_rules
from pybreaker_redis.breaker.transitions import notify_before_call, notify_success
from pybreaker_redis.breaker.wrappers import Calling, guarded_generator, wrapper_of
from pybreaker_redis.errors import CircuitOpenError

P = ParamSpec("P")
T = TypeVar("T")

#: Results that leave work to be done.
_UNFINISHED = frozenset((GeneratorType, CoroutineType, AsyncGeneratorType))


class CircuitBreaker(CheckedRules):
    """Circuit breaker that admits each call and settles its outcome.

    An admission belongs to the call, and to no thread.  No lock is held while the guarded function runs, so threads
    that share the breaker run in parallel, and `acall` guards coroutines.

    With a storage of another package the breaker behaves as `pybreaker.CircuitBreaker` does.

    Args:
        fail_max: Number of consecutive failures that opens the circuit, at least 1.
        reset_timeout: Seconds for which an open circuit rejects calls.
        success_threshold: Number of successful probes that closes the circuit, at least 1.
        exclude: Exception classes, and functions of an exception: such exceptions are no failures.
        listeners: Listeners, see `pybreaker.CircuitBreakerListener`.  Two more methods are called if a listener has
            them: ``rejected(breaker, error)``, and ``transition(breaker, event)`` with a `Transition`.
        state_storage: Storage of the circuit.  ``None``: in the memory of this process, or in `redis`.
        name: Name of the breaker.
        throw_new_error_on_trip: Whether the call that opens the circuit raises `CircuitOpenError`, with the error of
            the call as its cause.
        redis: Client, callable that returns one, or URL.  The circuit is there, with `name` as its namespace.
        clock: Function that returns seconds since the epoch, for tests.  Only for circuits in memory.
        fallback: Function that is called with the arguments of a rejected call, in place of `CircuitOpenError`.
        include: Exception classes, and functions of an exception: only such exceptions are failures.  ``None``: all.

    Raises:
        TypeError: An argument is of the wrong type, or contradicts another one.
        ValueError: A number is out of range.
    """

    def __init__(  # noqa: PLR0917 (as pybreaker's)
        self,
        fail_max: int = 5,
        reset_timeout: float = 60,
        success_threshold: int = 1,
        exclude: Iterable[Rule] | None = None,
        listeners: Sequence[CircuitBreakerListener] | None = None,
        state_storage: CircuitBreakerStorage | None = None,
        name: str | None = None,
        throw_new_error_on_trip: bool = True,
        *,
        redis: ClientSource | str | None = None,
        clock: Callable[[], float] | None = None,
        fallback: Callable[..., Any] | None = None,
        include: Iterable[Rule] | None = None,
    ) -> None:
        check_rules(fail_max, reset_timeout, success_threshold)
        check_callable("fallback", fallback)
        clock_ms = clock_for(clock, state_storage, redis)
        storage = storage_for(state_storage, redis, name, clock_ms)
        #: ``None``: the storage is of another package.
        self._guard = self._guard_for(storage, clock_ms)
        self._fallback = fallback
        self._included = None if include is None else tuple(include)
        super().__init__(
            fail_max=fail_max,
            reset_timeout=reset_timeout,
            success_threshold=success_threshold,
            exclude=exclude,
            listeners=listeners,
            state_storage=storage,
            name=name,
            throw_new_error_on_trip=throw_new_error_on_trip,
        )
        if self._guard is not None:
            self._guard.adopt_first_state()

    def _guard_for(
        self, storage: CircuitBreakerStorage, clock_ms: Callable[[], float] = wall_clock_ms
    ) -> CallGuard | None:
        core = circuit_of(storage)
        return None if core is None else CallGuard(self, core, clock_ms)

    @property
    def admits_calls(self) -> bool:
        """Whether the breaker admits and settles calls.  ``False``: its storage is of another package."""
        return self._guard is not None

    @contextlib.contextmanager
    def _with_storage(self, storage: CircuitBreakerStorage) -> Iterator[None]:
        """Use another storage within a block, for tests.  No listener is called.

        Calls that began before the block settle in the former circuit.
        """
        before = self._state_storage, self._guard, self._state
        self._use_storage(storage)
        try:
            yield
        finally:
            self._state_storage, self._guard, self._state = before

    def _use_storage(self, storage: CircuitBreakerStorage) -> None:
        """Use another storage from now on, for tests."""
        guard = self._guard_for(storage)
        assert guard is not None, "tests use storages of this package"
        self._state_storage, self._guard = storage, guard
        self._state = self._create_new_state(guard.core.state_for_constructor or storage.state)
        guard.adopt_first_state()

    # State --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """State object of the breaker, after it has noticed what other processes did."""
        if self._guard is None:
            return super().state
        self._guard.notice(self._guard.read().circuit)
        return self._state

    @state.setter
    def state(self, state_str: str) -> None:
        # pybreaker's own methods set it.  With a circuit of this package nothing does.
        of_pybreaker: Any = super(CircuitBreaker, type(self)).state
        of_pybreaker.fset(self, state_str)

    @property
    def current_state(self) -> str:
        """State of the circuit: ``closed``, ``open`` or ``half-open``."""
        if self._guard is None:
            return super().current_state
        # pybreaker's constructor reads the state.  Nothing is sent before the first call.
        known = None if hasattr(self, "_state") else self._guard.core.state_for_constructor
        return known or self._guard.read().circuit.state

    @property
    def fail_counter(self) -> int:
        """Number of consecutive failures."""
        return super().fail_counter if self._guard is None else self._guard.core.carry_out(Load()).circuit.fail_counter

    @property
    def success_counter(self) -> int:
        """Number of consecutive successes while half-open."""
        if self._guard is None:
            return super().success_counter
        return self._guard.core.carry_out(Load()).circuit.success_counter

    def open(self) -> bool:
        """Open the circuit for all processes.  Return whether a trip raises a new error."""
        if self._guard is None:
            return super().open()
        self._guard.move_by_hand(Trip(*BY_HAND))
        return self._throw_new_error_on_trip

    def half_open(self) -> None:
        """Make the circuit half-open for all processes, so that the next call is a probe."""
        if self._guard is None:
            super().half_open()
        else:
            self._guard.move_by_hand(ResetProbes(), SetState(HALF_OPEN))

    def close(self) -> None:
        """Close the circuit for all processes, with all counts zero."""
        if self._guard is None:
            super().close()
        else:
            self._guard.move_by_hand(Close(*BY_HAND))

    def is_system_error(self, exception: BaseException) -> bool:
        """Whether an exception counts as a failure: not excluded, and included if the breaker has such a list."""
        if self._included is not None and not any(matches(rule, exception) for rule in self._included):
            return False
        return super().is_system_error(exception)

    # Calls --------------------------------------------------------------------------------------------------------

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function, unless the circuit rejects calls.

        Args:
            func: The guarded function.
            args: Its arguments.
            kwargs: Its arguments by keyword.

        Raises:
            CircuitOpenError: The call was rejected, or has opened the circuit and `throw_new_error_on_trip` is set.
            TypeError: The function is asynchronous: use `acall`.
        """
        guard = self._guard
        if guard is None:
            return super().call(func, *args, **kwargs)
        fast_path = guard.core.fast_path
        # None is no decision that a breaker follows.
        admission: Any = fast_path.admission
        if admission is not guard.followed or fast_path.now() >= fast_path.trust.until:
            return self._call_slowly(guard, func, args, kwargs)
        fast_path.was_used = True
        if self._listeners:
            notify_before_call(self, func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            permit = Permit(guard, admission, CallBudget())
            raise guard.settle_error(permit, error)
        if type(result) in _UNFINISHED:
            return cast("T", self._finish_later(guard, Permit(guard, admission, CallBudget()), result))
        if admission is not fast_path.quiet_admission or fast_path.now() >= fast_path.trust.until:
            guard.settle_success(Permit(guard, admission, CallBudget()))
        elif self._listeners:
            notify_success(self)
        return result

    def _call_slowly(self, guard: CallGuard, func: Callable[..., T], args: Any, kwargs: Any) -> T:
        rejection = guard.quick_rejection()
        if rejection is not None:
            return cast("T", self._rejected(rejection, args, kwargs))
        try:
            permit = guard.admit()
        except CircuitOpenError as error:
            return cast("T", self._rejected(error, args, kwargs))
        try:
            notify_before_call(self, func, args, kwargs)
            result = func(*args, **kwargs)
        except BaseException as error:
            raise guard.settle_error(permit, error)
        if type(result) in _UNFINISHED:
            return cast("T", self._finish_later(guard, permit, result))
        permit.succeed()
        return result

    def _rejected(self, error: CircuitOpenError, args: Any, kwargs: Any) -> Any:
        if self._fallback is None:
            raise error
        return self._fallback(*args, **kwargs)

    def _finish_later(self, guard: CallGuard, permit: Permit, result: Any) -> Any:
        """Return a generator that settles the call when it ends."""
        if isinstance(result, GeneratorType):
            return guarded_generator(guard, permit, result)
        permit.release()
        if isinstance(result, CoroutineType):
            result.close()
        name = getattr(result, "__qualname__", type(result).__qualname__)
        msg = f"call() cannot guard the asynchronous function {name}: use acall(), or the breaker as a decorator"
        raise TypeError(msg)

    async def acall(self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function and wait for its result, unless the circuit rejects calls.

        Other threads send the requests to Redis, so the event loop does not wait for a socket.

        Args:
            func: The guarded function.
            args: Its arguments.
            kwargs: Its arguments by keyword.

        Raises:
            CircuitOpenError: The call was rejected, or has opened the circuit and `throw_new_error_on_trip` is set.
            TypeError: The storage is of another package.
        """
        guard = guard_of(self)
        try:
            permit = await guard.admit_async()
        except CircuitOpenError:
            if self._fallback is None:
                raise
            result = self._fallback(*args, **kwargs)
            return cast("T", await result if hasattr(type(result), "__await__") else result)
        try:
            notify_before_call(self, func, args, kwargs)
            result = await func(*args, **kwargs)
        except BaseException as error:
            raise await guard.settle_error_async(permit, error)
        await guard.settle_success_async(permit)
        return result

    def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a coroutine of Tornado, and return its future, as `pybreaker.CircuitBreaker.call_async` does."""
        if self._guard is None:
            return super().call_async(func, *args, **kwargs)  # type: ignore[no-untyped-call]
        from tornado.gen import convert_yielded

        @functools.wraps(func)
        async def converted(*args: Any, **kwargs: Any) -> Any:
            return await convert_yielded(func(*args, **kwargs))

        return asyncio.ensure_future(self.acall(converted, *args, **kwargs))

    def admit(self) -> Permit:
        """Admit one call.  The caller settles the permit, or uses it as a context manager.

        Raises:
            CircuitOpenError: The circuit rejects the call.
            TypeError: The storage is of another package.
        """
        return guard_of(self).admit()

    def calling(self) -> Calling:  # type: ignore[override]
        """Return a context manager that guards a block: ``with`` or ``async with``.

        The block gets its `Permit`, to report a failure that raised nothing.
        """
        return cast("Calling", super().calling()) if self._guard is None else Calling(self, self._guard)

    @overload  # type: ignore[override]
    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...

    @overload
    def __call__(self, **options: bool) -> Callable[[Callable[P, T]], Callable[P, T]]: ...

    def __call__(self, *call_args: Any, **call_kwargs: Any) -> Any:
        """Guard a function, as a decorator: functions, generators, coroutines and asynchronous generators.

        As pybreaker does, accept ``__pybreaker_call_async=True`` for coroutines of Tornado.
        """
        if self._guard is None or "__pybreaker_call_async" in call_kwargs:
            return super().__call__(*call_args, **call_kwargs)
        if call_args:
            return wrapper_of(lambda: self, *call_args)
        return lambda function: wrapper_of(lambda: self, function)
