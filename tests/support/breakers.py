"""What tests of the view have in common: storages that are known to hear, and conditions with deadlines.

Knows: storages, the listener's names.  Does not know: which promise is being tested.
"""

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
    """The dependency is well."""
    return "answer"


def down() -> None:
    """The dependency is down."""
    raise Down


def breaker_on(client: Any, namespace: str = NAMESPACE, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that has made a call; words of the breaker may be among those of the storage."""
    of_breaker = {name: words.pop(name) for name in ("fail_max", "reset_timeout", "success_threshold") if name in words}
    storage = CircuitRedisStorage("closed", client, namespace, **words)
    return pybreaker.CircuitBreaker(state_storage=storage, **of_breaker)


def settled(breaker: pybreaker.CircuitBreaker) -> pybreaker.CircuitBreaker:
    """The breaker, when its calls need no Redis any more."""

    def is_settled() -> bool:
        breaker.call(up)
        view = view_of(breaker)
        return bool(view.is_trusted and view.fast_path.quiet_admission)

    wait_for(is_settled, "calls that need no round trip")
    return breaker


def fails(breaker: pybreaker.CircuitBreaker, times: int = 1) -> None:
    """So many guarded calls fail."""
    for _ in range(times):
        with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
            breaker.call(down)


class Heard(pybreaker.CircuitBreakerListener):
    """The transitions that a listener was told of."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str, str]] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Note it."""
        self.states.append((cb.name, old_state.name, new_state.name))


#: The same where what is to be seen must be told: nobody looks for himself in time.
PATIENT = 60.0


#: A round trip and the time to notice, on a machine that does other things too, seconds.
ROUND_TRIP = 1.5


#: Longest time for a push, seconds, on a machine that does other things too.
PUSH = 2.0


def seconds_until(breaker: pybreaker.CircuitBreaker, state: str) -> float:
    """How long a breaker goes on before it reads this state; it is in use meanwhile."""
    return wait_for(lambda: breaker.current_state == state, f"reads {state}")
