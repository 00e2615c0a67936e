"""Clocks for tests: a stopwatch that leaves out waits for a processor, and a clock that tests move."""

from __future__ import annotations

import time
from pathlib import Path

#: Nanoseconds on a processor, nanoseconds of waiting for one, number of turns: see sched-stats.rst of Linux.
ACCOUNT = Path("/proc/thread-self/schedstat")


def waited() -> float:
    """Return the seconds that this thread has waited for a processor so far, or 0.0 on platforms without this count."""
    try:
        return int(ACCOUNT.read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:
        return 0.0


class Stopwatch:
    """Context that measures the seconds of a block, without the time that this thread waited for a processor.

    A bound on such a time may be tight and still holds on a busy machine.
    """

    def __enter__(self) -> Stopwatch:  # typing.Self is new in 3.11
        self._waited = waited()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic()
        self.seconds = max(0.0, self.ended - self.began - (waited() - self._waited))


class Clock:
    """Clock that stands still until a test moves it."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now
