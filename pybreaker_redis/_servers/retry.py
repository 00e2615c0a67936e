"""Retries of an unreachable server: the thread that makes them, and one attempt.

`RetryThread` holds the mechanics only: one thread for each server, started on demand, ended when no retry is needed.
`Server` decides when an attempt is due and what an attempt does.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from pybreaker_redis._runtime import threads
from pybreaker_redis._servers.availability import Availability

RETRY_THREAD_NAME = "pybreaker_redis retry"

#: Longest wait of the thread, seconds.  Members vanish with the garbage collector, which wakes no thread.
RETRY_SLEEP_MAX_S = 0.5


class ReturnAttempt:
    """One attempt to return to a server after an outage.

    Args:
        availability: Availability of the server.
        answer_wait_s: Seconds to wait for the first answer, if that is more than the timeout of a member.
        current_members: Returns the members as of now: some may have been added since the attempt began.

    Attributes:
        answer_wait_s: See above.
        current_members: See above.
        outcomes: Number of members for each result of a return, for the log.
        outage_s: Length of the outage, seconds; ``None`` while it lasts, or if another thread has ended it.
        has_let_callers_in: Whether callers may query the server, though members may still be returning.
    """

    def __init__(
        self, availability: Availability, answer_wait_s: float, current_members: Callable[[], Sequence[object]]
    ) -> None:
        self._availability = availability
        self.answer_wait_s = answer_wait_s
        self.current_members = current_members
        self.outcomes: Counter[str] = Counter()
        self.outage_s: float | None = None
        self.has_let_callers_in = False

    def let_callers_in(self) -> None:
        """End the outage, once.  From here on callers count their own returns in `outcomes`."""
        if not self.has_let_callers_in:
            self.has_let_callers_in = True
            self.outage_s = self._availability.note_answer()


class RetryThread:
    """Background thread of one server that runs as long as attempts are needed.

    Args:
        seconds_until_due: Returns seconds until the next attempt, ``None`` if none is needed.  The call is made under
            the lock of this object.  An answer of ``None`` ends the thread, and no start in between is lost.
        attempt: Does what is due.
        wait: Waits, at most for the given seconds.
    """

    def __init__(
        self,
        seconds_until_due: Callable[[], float | None],
        attempt: Callable[[], None],
        wait: Callable[[float], None],
    ) -> None:
        self._seconds_until_due = seconds_until_due
        self._attempt = attempt
        self._wait = wait
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """Renew the lock, and drop the thread, which does not exist in a child process."""
        self._lock = threading.RLock()
        self._thread = None

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def ensure_running(self) -> bool:
        """Start the thread unless it runs.

        Returns:
            Whether it runs.  Under uWSGI without ``--enable-threads`` none can be started, and callers take turns.
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
                self._wait(min(seconds, RETRY_SLEEP_MAX_S))
            else:
                self._attempt()
