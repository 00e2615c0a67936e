"""When does somebody want the demo to end?

Knows: signals.  Does not know: what has to be ended.
"""

from __future__ import annotations

import signal


class Interruption:
    """Ctrl-C, or a supervisor's SIGTERM: noted when it comes, raised where nothing is half done.

    An exception out of a signal handler may leave a lock of ``queue`` or ``subprocess`` locked, or be lost.
    """

    def __init__(self) -> None:
        self._noted = False

    def listen(self) -> None:
        """Note them from now on; whoever sends one twice does not want to wait for a clean end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # so a shell starts what runs in its background
                signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self._noted = True
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raise what has been noted.

        Raises:
            KeyboardInterrupt: There was one.
        """
        if self._noted:
            raise KeyboardInterrupt
