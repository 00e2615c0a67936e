"""Start of daemon threads, where a thread can be started without harm."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class ThreadRefusedError(Exception):
    """Refusal to start a thread.  The message is the reason, and empty if the reason is of no interest to a user."""


def start_daemon(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread.

    Args:
        target: Function that the thread runs.
        name: Name of the thread.

    Raises:
        ThreadRefusedError: A thread would do harm here, or cannot be started.
    """
    if sys.is_finalizing():
        # Before Python 3.12, the interpreter would wait forever for a thread that starts now.
        raise ThreadRefusedError
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi and uwsgi.worker_id() == 0 and uwsgi.mule_id() == 0:
        # A thread in the master would deadlock the workers that the master forks.
        raise ThreadRefusedError
    if uwsgi and not {"enable-threads", "threads"} & uwsgi.opt.keys():
        msg = "uWSGI runs without --enable-threads"
        raise ThreadRefusedError(msg)
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        # The interpreter shuts down, or the process has reached its limit of threads.
        raise ThreadRefusedError(str(error)) from error
    return thread
