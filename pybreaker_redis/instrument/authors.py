"""Author of a transition: whether the breaker that notifies its listeners made the transition itself."""

from __future__ import annotations

import pybreaker

from pybreaker_redis.breaker import CircuitBreaker, is_notified_by_author
from pybreaker_redis.storage import made_transition


def is_author(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether a breaker made the transition of which it notifies its listeners, on this thread.

    Args:
        breaker: Breaker of this package or of pybreaker.
    """
    if isinstance(breaker, CircuitBreaker) and breaker.admits_calls:
        return is_notified_by_author()
    return made_transition(breaker)
