"""Breakers on storages, their dependency, and limits for the delay of changes."""

from __future__ import annotations

import contextlib
from typing import Any

import pybreaker

from pybreaker_redis import CircuitRedisStorage
from tests.support.inspect import view_of
from tests.support.wait import wait_for

NAMESPACE = "viewed"


class Down(Exception):
    """The dependency is down."""


def up() -> str:
    """Call the healthy dependency."""
    return "answer"


def down() -> None:
    """Call the dead dependency."""
    raise Down


def breaker_on(client: Any, namespace: str = NAMESPACE, **settings: Any) -> pybreaker.CircuitBreaker:
    """Return a breaker on a new storage, where `settings` are those of the breaker and of the storage."""
    of_breaker = {
        name: settings.pop(name) for name in ("fail_max", "reset_timeout", "success_threshold") if name in settings
    }
    storage = CircuitRedisStorage("closed", client, namespace, **settings)
    return pybreaker.CircuitBreaker(state_storage=storage, **of_breaker)


def settled(breaker: pybreaker.CircuitBreaker) -> pybreaker.CircuitBreaker:
    """Return the breaker once its calls send nothing to Redis."""

    def is_settled() -> bool:
        breaker.call(up)
        view = view_of(breaker)
        return bool(view.is_trusted and view.fast_path.quiet_admission)

    wait_for(is_settled, "calls that need no round trip")
    return breaker


def fails(breaker: pybreaker.CircuitBreaker, times: int = 1) -> None:
    """Make failing calls."""
    for _ in range(times):
        with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
            breaker.call(down)


class TransitionRecorder(pybreaker.CircuitBreakerListener):
    """Recorder of the transitions that a breaker announces."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str, str]] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record a transition."""
        self.states.append((cb.name, old_state.name, new_state.name))


#: Staleness in seconds that is so long that only a push can explain a change.
PUSH_ONLY_STALENESS_S = 60.0


#: Seconds for a round trip and for the notice of a change, on a busy machine.
NOTICE_MAX_S = 1.5


#: Most seconds from a change to its push, on a busy machine.
PUSH_MAX_S = 2.0


def seconds_until(breaker: pybreaker.CircuitBreaker, state: str) -> float:
    """Read the breaker's state until it is this one, and return the seconds that took."""
    return wait_for(lambda: breaker.current_state == state, f"reads {state}")
