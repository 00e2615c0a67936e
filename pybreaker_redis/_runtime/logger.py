"""Log lines about something that comes and goes: the first pair at once, repetitions once a minute with a count.

Knows: when a line was logged last, how many losses were not.  Does not know: words, what comes and goes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors

#: Seconds after a logged loss in which further ones are counted only.
LOSS_WINDOW_S = 60.0

#: Logs a line; given how many losses were counted only since the last line.
BuildLine = Callable[[int], None]


class LossThrottle:
    """The lines about one subject.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._window_ends_at = float("-inf")
        self._unlogged = 0
        #: Whether the present loss was counted only, so that its end is no news either.
        self._is_silent = False
        #: The line that describes how it is now, not logged yet, and how many losses that one names itself.
        self._held_line: tuple[BuildLine, int] | None = None
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: the parent logs what it has counted."""
        self._lock = threading.RLock()
        self._unlogged, self._held_line = 0, None

    @property
    def has_held_line(self) -> bool:
        """Whether a line has to be logged later."""
        return self._held_line is not None

    def log_loss(self, build_line: BuildLine) -> None:
        """Log a loss, or count it."""
        with self._lock:
            self._unlogged += 1
            self._held_line = build_line, 1
            self._is_silent = True
        self.flush_held_line()

    def log_return(self, build_line: BuildLine) -> None:
        """Log the end of a loss; if that was counted only, the end is logged later."""
        with self._lock:
            if self._is_silent:
                self._held_line = build_line, 0
                said = None
            else:
                said = build_line
        if said is None:
            self.flush_held_line()
        else:
            said(0)

    def flush_held_line(self) -> None:
        """Log the line that is held, if it is time."""
        with self._lock:
            if self._held_line is None or self._clock() < self._window_ends_at:
                return
            (build_line, named), self._held_line = self._held_line, None
            more, self._unlogged = self._unlogged - named, 0
            self._window_ends_at = self._clock() + LOSS_WINDOW_S
            self._is_silent = False
        build_line(more)


#: Seconds between two log lines of one kind about one server.
REPEAT_WINDOW_S = 60.0


_logger = logging.getLogger("pybreaker_redis")


class RepeatThrottle:
    """Limit on log lines of one kind about one server: one within `REPEAT_WINDOW_S`; the others are counted."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._left_out = 0

    def admit_line(self) -> str | None:
        """Return what the line has to add, the number of lines left out before it; ``None``: leave this one out."""
        if monotonic() < self._next_at:
            self._left_out += 1
            return None
        left_out, self._left_out, self._next_at = self._left_out, 0, monotonic() + REPEAT_WINDOW_S
        return f"; {left_out} more like this since the last such line" if left_out else ""


@calls_user_code
def _say(level: int, message: str, *arguments: object, logger: logging.Logger = _logger, **words: Any) -> None:
    # What a handler raises is for nobody who makes a call, nor for those who keep circuits going.
    with suppress_errors():
        logger.log(level, message, *arguments, **words)
