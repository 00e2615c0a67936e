"""May I ask Redis now?

Knows: when it last failed, a monotonic clock.  Does not know: what was asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pybreaker_redis._forks import renew_in_children

#: Seconds without asking after a failure, at least; as many as the failed attempt took, if that is more.
PAUSE = 1.0

#: Seconds after which an attempt that has not ended is no reason any more for others not to try.
LONGEST_ATTEMPT = 30.0


class Guard:
    """Keeps callers away from a Redis that has just failed; one of them at a time looks whether it is back.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._asked_at = 0.0
        self._ask_again_at = 0.0
        #: Whether it was a write that failed: then an answer to a read does not mean that all is well again.
        self.refuses_writes = False
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock."""
        self._lock = threading.Lock()

    def may_ask(self) -> bool:
        """Whether Redis is well, or it is the caller's turn to look whether it is again."""
        if self._away_since is None:
            return True
        with self._lock:
            now = self._clock()
            if now < self._ask_again_at:
                return False
            self._asked_at, self._ask_again_at = now, now + LONGEST_ATTEMPT
            return True

    def failed(self, *, writing: bool) -> float | None:
        """Redis gave no usable answer.

        Returns:
            Seconds until the next attempt, if Redis had been well until now.
        """
        with self._lock:
            now = self._clock()
            first = self._away_since is None
            pause = PAUSE if first else max(PAUSE, now - self._asked_at)
            self._ask_again_at = now + pause
            self.refuses_writes = self.refuses_writes or writing
            if not first:
                return None
            self._away_since = now
            return pause

    def answered(self) -> float | None:
        """Redis answered.  Seconds that it had been away, or ``None`` if it had not."""
        if self._away_since is None:
            return None
        with self._lock:
            since: float | None = self._away_since
            self._away_since, self.refuses_writes = None, False
        # Two first answers may have come together; then the other one has taken it.
        return None if since is None else self._clock() - since
