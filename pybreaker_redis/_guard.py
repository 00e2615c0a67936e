"""May I ask Redis now?

Knows: when it last failed, a monotonic clock.  Does not know: what was asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from redis import exceptions

#: What a client raises when there is no usable answer.  `RedisClusterException` is not a `RedisError`.
REDIS_ERRORS: tuple[type[Exception], ...] = (
    exceptions.RedisError,
    OSError,
    *((exceptions.RedisClusterException,) if hasattr(exceptions, "RedisClusterException") else ()),
)

#: Seconds without asking after a failure.
PAUSE = 1.0


class Guard:
    """Keeps callers away from a Redis that has just failed.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._away_since: float | None = None
        self._ask_again_at = 0.0

    def may_ask(self) -> bool:
        """Whether Redis is well, or it is time to look whether it is again."""
        return self._away_since is None or self._clock() >= self._ask_again_at

    def failed(self) -> bool:
        """Redis gave no usable answer.  True if it had been well until now."""
        now = self._clock()
        self._ask_again_at = now + PAUSE
        if self._away_since is not None:
            return False
        self._away_since = now
        return True

    def answered(self) -> float | None:
        """Redis answered.  Seconds that it had been away, or ``None`` if it had not."""
        if self._away_since is None:
            return None
        away, self._away_since = self._clock() - self._away_since, None
        return away
