"""Ways in: which breaker the tests use on a storage of this package.

Without a choice it is the unmodified breaker of pybreaker.  With ``PYBREAKER_REDIS_WAY=breaker`` every test that
creates a `pybreaker.CircuitBreaker` gets the breaker of this package.  Worker processes inherit the variable.
"""

from __future__ import annotations

import os

import pybreaker

import pybreaker_redis

STORAGE, BREAKER = "storage", "breaker"

#: The way of this run.
WAY = os.environ.get("PYBREAKER_REDIS_WAY", STORAGE)

#: Whether the tests use the breaker of this package.
is_breaker = WAY == BREAKER

#: The breaker of pybreaker, not ours, in both ways.
UnmodifiedBreaker = pybreaker.CircuitBreaker


def settles_calls(breaker: pybreaker.CircuitBreaker) -> bool:
    """Return whether a breaker admits and settles calls: it is ours, on a storage of this package."""
    return isinstance(breaker, pybreaker_redis.CircuitBreaker) and breaker.admits_calls


def use_chosen_breaker() -> None:
    """Let test modules that are imported from now on find the chosen breaker in pybreaker."""
    if WAY not in (STORAGE, BREAKER):
        msg = f"PYBREAKER_REDIS_WAY must be {STORAGE} or {BREAKER}, not {WAY!r}"
        raise ValueError(msg)
    if is_breaker:
        pybreaker.CircuitBreaker = pybreaker_redis.CircuitBreaker  # type: ignore[misc]
