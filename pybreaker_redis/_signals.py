"""Was this raised by a signal handler?

Knows: signal handlers, tracebacks.  Does not know: who was interrupted.

A handler runs between any two instructions of the main thread, and what it raises comes out of whatever was going on:
Celery's soft time limit, for one, in the middle of a wait for Redis.  It is not meant for whoever was waiting.
"""

from __future__ import annotations

import signal
from types import CodeType


def raised_by_a_handler(error: BaseException) -> bool:
    """Whether an exception was raised in a Python function that is now the handler of a signal, or by way of it."""
    handlers = {code for number in signal.valid_signals() if (code := _code(signal.getsignal(number)))}
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code in handlers:
            return True
        frame = frame.tb_next
    return False


def _code(handler: object) -> CodeType | None:
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__"):
        # An object that can be called, or none.
        function = vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
