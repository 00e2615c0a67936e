"""Recognition of exceptions that a signal handler or a trace function has raised.

A handler runs between any two instructions of the main thread, and its exception leaves the interrupted code.  For
example, Celery's soft time limit is raised in the middle of a wait for Redis.
"""

from __future__ import annotations

import functools
import inspect
import signal
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType


def is_raised_by_signal_handler(error: BaseException) -> bool:
    """Return whether the traceback leads through a present signal handler, or through a function like one.

    A handler may restore its predecessor before the handler raises.  A function that was called with its caller's frame
    as an argument therefore counts as a handler, too.
    """
    handlers = {code for number in signal.valid_signals() if (code := _code_of_handler(signal.getsignal(number)))}
    return any(
        item.tb_frame.f_code in handlers or _receives_caller_frame(item.tb_frame)
        for item in traceback_entries(error.__traceback__)
    )


def traceback_entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    """Yield the entries of a traceback, the innermost last."""
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _code_of_handler(handler: object) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__"):
        # An object that can be called, or none.
        function = vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _receives_caller_frame(frame: FrameType) -> bool:
    code = frame.f_code
    number = code.co_argcount + code.co_kwonlyargcount
    given = [frame.f_locals.get(name) for name in code.co_varnames[:number]]
    if code.co_flags & inspect.CO_VARARGS:
        given += frame.f_locals.get(code.co_varnames[number], ())
    return frame.f_back is not None and any(value is frame.f_back for value in given)
