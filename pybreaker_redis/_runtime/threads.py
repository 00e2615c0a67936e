"""May a thread be started here?

Knows: daemon threads, shutdown, uWSGI.  Does not know: what a thread is for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class ThreadRefusedError(Exception):
    """No thread can be started; the message says why, if that is worth a word."""


def start(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        ThreadRefusedError: It would do harm here, or cannot be.
    """
    if sys.is_finalizing():
        # Before Python 3.12 a thread that is started now would be waited for forever.
        raise ThreadRefusedError
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi and uwsgi.worker_id() == 0 and uwsgi.mule_id() == 0:
        # In the master: a thread here would deadlock the workers that are forked from it.
        raise ThreadRefusedError
    if uwsgi and not {"enable-threads", "threads"} & uwsgi.opt.keys():
        msg = "uWSGI runs without --enable-threads"
        raise ThreadRefusedError(msg)
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        # The interpreter is about to shut down, or the process may have no more threads.
        raise ThreadRefusedError(str(error)) from error
    return thread
