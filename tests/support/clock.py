"""Time as the code has it: what a thread spends waiting for a processor is the machine's doing.

Knows: clocks, Linux's account of a thread.  Does not know: what is measured.
"""

from __future__ import annotations

import time
from pathlib import Path

#: Nanoseconds on a processor, nanoseconds that it could have run and none was free, turns: Linux, sched-stats.rst.
ACCOUNT = Path("/proc/thread-self/schedstat")


def waited() -> float:
    """Seconds that this thread has waited for a processor so far; 0.0 where nobody counts them."""
    try:
        return int(ACCOUNT.read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:
        return 0.0


class Stopwatch:
    """Measures what a block takes, in seconds, but for the time in which this thread was not allowed to run.

    So a bound may be tight, and holds on a machine that does other things, too.
    """

    def __enter__(self) -> Stopwatch:  # typing.Self is new in 3.11
        self._waited = waited()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic()
        self.seconds = max(0.0, self.ended - self.began - (waited() - self._waited))


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """What it shows."""
        return self.now
