"""Log lines about something that comes and goes: the first pair at once, repetitions once a minute with a count.

Knows: when a line was logged last, how many losses were not.  Does not know: words, what comes and goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pybreaker_redis._forks import renew_in_children

#: Seconds after a logged loss in which further ones are counted only.
WINDOW_S = 60.0

#: Logs a line; given how many losses were counted only since the last line.
Say = Callable[[int], None]


class Bulletin:
    """The lines about one subject.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._until = float("-inf")
        self._counted = 0
        #: Whether the present loss was counted only, so that its end is no news either.
        self._is_silent = False
        #: The line that describes how it is now, not logged yet, and how many losses that one names itself.
        self._held: tuple[Say, int] | None = None
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: the parent logs what it has counted."""
        self._lock = threading.RLock()
        self._counted, self._held = 0, None

    @property
    def holds_a_line(self) -> bool:
        """Whether a line has to be logged later."""
        return self._held is not None

    def lost(self, say: Say) -> None:
        """Log a loss, or count it."""
        with self._lock:
            self._counted += 1
            self._held = say, 1
            self._is_silent = True
        self.flush()

    def returned(self, say: Say) -> None:
        """Log the end of a loss; if that was counted only, the end is logged later."""
        with self._lock:
            if self._is_silent:
                self._held = say, 0
                said = None
            else:
                said = say
        if said is None:
            self.flush()
        else:
            said(0)

    def flush(self) -> None:
        """Log the line that is held, if it is time."""
        with self._lock:
            if self._held is None or self._clock() < self._until:
                return
            (say, named), self._held = self._held, None
            more, self._counted = self._counted - named, 0
            self._until = self._clock() + WINDOW_S
            self._is_silent = False
        say(more)
