"""Emission of log lines, and limits on repeated ones.

A handler of the application may raise.  `emit` suppresses its errors, because neither a guarded call nor a thread of
this package may fail by them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors
from pybreaker_redis._runtime.redaction import mask_text

#: Logger of all lines that no storage's own logger receives.
LOGGER = logging.getLogger("pybreaker_redis")

#: Seconds after a logged loss in which further losses are only counted.
LOSS_WINDOW_S = 60.0

#: Seconds between two log lines of one kind about one server.
REPEAT_WINDOW_S = 60.0


class LogLine(Protocol):
    """One log line, see `_log.Line`."""

    @property
    def level(self) -> int:
        """Level of the logging module."""
        ...

    @property
    def message(self) -> str:
        """Format string of the logging module."""
        ...

    @property
    def arguments(self) -> tuple[object, ...]:
        """Values for the format string."""
        ...

    @property
    def extra(self) -> Mapping[str, Any] | None:
        """Facts for handlers (``None``: none)."""


@calls_user_code
def emit(line: LogLine, *, logger: logging.Logger = LOGGER, error: BaseException | None = None) -> None:
    """Log a line with its secrets masked, and suppress errors of handlers, but no interruption.

    Args:
        line: The line.
        logger: Logger that receives the line.
        error: Error of the application, to be logged with its traceback.
    """
    with suppress_errors():
        # A subclass of str is a name that the application has chosen, see `_log.Name`.
        arguments = (
            mask_text(item) if type(item) is str or isinstance(item, BaseException) else item for item in line.arguments
        )
        facts = {name: mask_text(item) if isinstance(item, str) else item for name, item in (line.extra or {}).items()}
        extra = {"pybreaker_redis": facts} if facts else None
        logger.log(line.level, line.message, *arguments, exc_info=error, extra=extra)


#: Function that makes a line from the number of losses that were not logged before the line.
BuildLine = Callable[[int], LogLine]


class LossThrottle(ForkSafe):
    """Limit on the lines about one subject that is lost and returns.

    The throttle logs the first loss and its end at once.  For `LOSS_WINDOW_S` after a logged loss, it counts further
    losses, and holds the line about the present condition until the window ends.

    Args:
        clock: Clock of the throttle, monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window_ends_at = float("-inf")
        self._unlogged = 0
        #: Whether the present loss was only counted: then its end is not logged at once either.
        self._is_silent = False
        #: Line about the present condition, not logged yet, and the number of losses that the line itself describes.
        self._held_line: tuple[BuildLine, int] | None = None
        super().__init__()

    def _reset_in_child(self) -> None:
        # The parent logs what the parent has counted.
        self._unlogged, self._held_line = 0, None

    @property
    def has_held_line(self) -> bool:
        """Whether a line waits for the end of the window."""
        return self._held_line is not None

    @property
    def seconds_until_due(self) -> float | None:
        """Seconds until the held line is logged, `None` if no line is held."""
        return None if self._held_line is None else max(0.0, self._window_ends_at - self._clock())

    def log_loss(self, build_line: BuildLine) -> None:
        """Log a loss, or count it."""
        with self._lock:
            self._unlogged += 1
            self._held_line = build_line, 1
            self._is_silent = True
        self.flush_held_line()

    def log_return(self, build_line: BuildLine) -> None:
        """Log the end of a loss, or hold the line if the loss was only counted."""
        with self._lock:
            if is_silent := self._is_silent:
                self._held_line = build_line, 0
        if is_silent:
            self.flush_held_line()
        else:
            emit(build_line(0))

    def flush_held_line(self) -> None:
        """Log the held line, if the window has ended."""
        with self._lock:
            if self._held_line is None or self._clock() < self._window_ends_at:
                return
            (build_line, described), self._held_line = self._held_line, None
            more, self._unlogged = self._unlogged - described, 0
            self._window_ends_at = self._clock() + LOSS_WINDOW_S
            self._is_silent = False
        emit(build_line(more))


class RepeatThrottle:
    """Limit on log lines of one kind about one server: one within `REPEAT_WINDOW_S`, and a count of the others."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._left_out = 0

    def admit_line(self) -> int | None:
        """Admit a line, or count it.

        Returns:
            Number of lines that were left out before this one (``None``: this line is left out).
        """
        if monotonic() < self._next_at:
            self._left_out += 1
            return None
        left_out, self._left_out, self._next_at = self._left_out, 0, monotonic() + REPEAT_WINDOW_S
        return left_out
