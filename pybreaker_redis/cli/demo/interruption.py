"""Ctrl-C and SIGTERM, recorded by signal handlers and raised at safe points of the demo."""

from __future__ import annotations

import signal


class Interruption:
    """Record of a SIGINT or SIGTERM, which `check` raises where no operation is incomplete.

    An exception raised by a signal handler may leave a lock of ``queue`` or ``subprocess`` locked, or may be lost.
    """

    def __init__(self) -> None:
        self._was_received = False

    def listen(self) -> None:
        """Install the signal handlers.  A second signal ends the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell sets SIG_IGN in processes that it runs in the background.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._record)

    def _record(self, number: int, _: object) -> None:
        self._was_received = True
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raise a recorded signal.

        Raises:
            KeyboardInterrupt: A signal was received.
        """
        if self._was_received:
            raise KeyboardInterrupt
