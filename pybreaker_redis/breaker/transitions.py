"""Transitions of a circuit, as a breaker and its listeners see them.

One process is the author of each transition.  The other processes notice it in their next call.  A listener of
pybreaker gets `state_change` in both cases.
"""

from __future__ import annotations

import contextlib
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pybreaker import CircuitBreakerState

from pybreaker_redis import _log
from pybreaker_redis._model.circuit import OPEN, Circuit
from pybreaker_redis._runtime.clock import utc_from_ms
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.logger import RepeatThrottle, emit
from pybreaker_redis._runtime.redaction import describe_error

if TYPE_CHECKING:
    from datetime import datetime

    from pybreaker import CircuitBreaker

#: Limits on the lines about listeners that fail, by breaker and method.
_THROTTLES: weakref.WeakKeyDictionary[CircuitBreaker, dict[str, RepeatThrottle]] = weakref.WeakKeyDictionary()

#: Whether the listeners that run at present are notified by the author of the transition.
_IS_AUTHOR: ContextVar[bool] = ContextVar("author of the transition", default=False)


@dataclass(frozen=True, slots=True)
class Transition:
    """One transition of a circuit.

    Attributes:
        circuit: Name of the breaker.
        old: State before: ``closed``, ``open`` or ``half-open``.
        new: State after.
        generation: Generation that the transition began.  ``None``: unknown, because the circuit was noticed later.
        noticed: Whether another process or another breaker made the transition.
        opened_at: Time at which the circuit opened, aware.  ``None`` unless the circuit is open.
        cause: Class and message of the error that opened the circuit.  Empty: none, or unknown.
    """

    circuit: str | None
    old: str
    new: str
    generation: int | None
    noticed: bool
    opened_at: datetime | None = None
    cause: str = ""


class StateFollower(ForkSafe):
    """State object of a breaker, which follows the circuit and notifies listeners of each change.

    Args:
        breaker: The breaker.
    """

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._generation = 0
        #: Generations for which reports and claims of this breaker are under way.  A list, because `append` and
        #: `remove` are one step each.
        self._under_way: list[int | None] = []
        super().__init__()

    def _reset_in_child(self) -> None:
        self._under_way = []

    def begin_request(self, generation: int | None) -> None:
        """Note that a request is under way which may make the transition that ends a generation."""
        self._under_way.append(generation)

    def end_request(self, generation: int | None) -> None:
        """Note that the request has ended, and that its transition was noted."""
        # In a forked child the list is new.
        with contextlib.suppress(ValueError):
            self._under_way.remove(generation)

    def adopt(self, state: CircuitBreakerState) -> CircuitBreakerState:
        """Return the state object with the breaker's own `call`, so that no call bypasses the admission."""
        state.call = self._breaker.call  # type: ignore[method-assign]
        return state

    def note(self, circuit: Circuit, *, is_author: bool, cause: str = "", restarts: bool = False) -> None:
        """Follow the circuit, and notify the listeners of a change.

        Args:
            circuit: The circuit, times by the local clock.
            is_author: Whether this breaker made the transition.
            cause: Class and message of the error that opened the circuit.
            restarts: Whether the listeners are notified although the state is the same: it began again, by hand.
        """
        breaker = self._breaker
        if not is_author and circuit.generation - 1 in self._under_way:
            # Perhaps the breaker is the author.  The thread that knows notes the transition, or the next call does.
            return
        with self._lock:
            old = breaker._state
            if not restarts and (old.name == circuit.state or (self._is_outdated(circuit) and not is_author)):
                return
            self._generation = circuit.generation
            new = self.adopt(breaker._create_new_state(circuit.state, prev_state=old, notify=False))
            breaker._state = new  # type: ignore[assignment]
        if not breaker._listeners:
            return
        opened_at_ms = circuit.opened_at_ms if circuit.state == OPEN else None
        event = Transition(
            circuit=breaker.name,
            old=old.name,
            new=new.name,
            generation=circuit.generation,
            noticed=not is_author,
            opened_at=None if opened_at_ms is None else utc_from_ms(opened_at_ms),
            cause=cause,
        )
        token = _IS_AUTHOR.set(is_author)
        try:
            notify(breaker, "state_change", old, new)
            notify(breaker, "transition", event)
        finally:
            _IS_AUTHOR.reset(token)

    def _is_outdated(self, circuit: Circuit) -> bool:
        """Whether another thread has followed a later generation: this one read the circuit before that."""
        is_same_run = (circuit.generation < 0) == (self._generation < 0)
        return is_same_run and circuit.generation < self._generation


def is_notified_by_author() -> bool:
    """Whether the running listener is notified of a transition that its own breaker made."""
    return _IS_AUTHOR.get()


def notify_before_call(breaker: CircuitBreaker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call `before_call` of all listeners, as `notify` does but faster: each guarded call takes this way."""
    for listener in tuple(breaker._listeners):
        try:
            listener.before_call(breaker, func, *args, **kwargs)
        except Exception as error:
            _log_failure(breaker, listener, "before_call", error)


def notify_success(breaker: CircuitBreaker) -> None:
    """Call `success` of all listeners, as `notify` does but faster: each successful call takes this way."""
    for listener in tuple(breaker._listeners):
        try:
            listener.success(breaker)
        except Exception as error:
            _log_failure(breaker, listener, "success", error)


def notify(breaker: CircuitBreaker, method: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of all listeners of a breaker.  A listener that raises is logged, and changes nothing.

    Args:
        breaker: The breaker, which is the method's first argument.
        method: Name of the method.  Listeners without such a method are skipped.
        args: Further arguments.
        kwargs: Further arguments.
    """
    for listener in tuple(breaker._listeners):
        function = getattr(listener, method, None)
        if function is None:
            continue
        try:
            function(breaker, *args, **kwargs)
        except Exception as error:
            _log_failure(breaker, listener, method, error)


def _log_failure(breaker: CircuitBreaker, listener: object, method: str, error: Exception) -> None:
    # A listener that fails may fail in each call.
    throttle = _THROTTLES.setdefault(breaker, {}).setdefault(method, RepeatThrottle())
    left_out = throttle.admit_line()
    if left_out is not None:
        line = _log.listener_failed(
            breaker.name or "",
            listener=type(listener).__qualname__,
            method=method,
            error=describe_error(error),
            left_out=left_out,
        )
        emit(line, error=error)
