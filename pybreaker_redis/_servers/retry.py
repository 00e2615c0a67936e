"""Thread that retries an unreachable server.

`RetryThread` holds the mechanics only: one thread for each server, started on demand, ended when no retry is needed.
`Server` (server.py) decides when a retry is due and what a retry does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from pybreaker_redis._runtime import threads
from pybreaker_redis._runtime.fork import ForkSafe

RETRY_THREAD_NAME = "pybreaker_redis retry"

#: Longest wait of the thread, seconds.  The last circuit of a server may be garbage-collected, which wakes no thread.
RETRY_WAIT_MAX_S = 0.5


class RetryThread(ForkSafe):
    """Background thread of one server that runs as long as retries are needed.

    Args:
        seconds_until_due: Returns seconds until the next retry, ``None`` if none is needed, which ends the thread.  The
            call is made under the lock of this object: a start that comes meanwhile waits, and then makes a new thread.
        retry: Makes one retry.
        wait: Waits for a change of the availability, at most for the given seconds.
    """

    def __init__(
        self,
        seconds_until_due: Callable[[], float | None],
        retry: Callable[[], None],
        wait: Callable[[float], None],
    ) -> None:
        self._seconds_until_due = seconds_until_due
        self._retry = retry
        self._wait = wait
        self._thread: threading.Thread | None = None
        # Last: the base class makes the lock, and from then on may reset this object in a forked child.
        super().__init__()

    def _reset_in_child(self) -> None:
        self._thread = None

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def ensure_running(self) -> bool:
        """Start the thread unless it runs.

        Returns:
            Whether it runs.  Under uWSGI without ``--enable-threads`` none can be started: guarded calls take turns.
        """
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = None
                with contextlib.suppress(threads.ThreadRefusedError):
                    # The new thread needs the lock first, so the attribute is set before the thread can end.
                    self._thread = threads.start_daemon(self._run, RETRY_THREAD_NAME)
            return self._thread is not None

    def _run(self) -> None:
        while True:
            with self._lock:
                seconds = self._seconds_until_due()
                if seconds is None:
                    self._thread = None
                    return
            if seconds > 0:
                self._wait(min(seconds, RETRY_WAIT_MAX_S))
            else:
                self._retry()
