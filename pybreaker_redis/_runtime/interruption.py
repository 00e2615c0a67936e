"""Recognition of interruptions: exceptions that were raised into a wait for Redis, and that no error of Redis caused.

Time limits end a call in several ways:

* a signal handler raises, as for Celery
* another thread raises by ``PyThreadState_SetAsyncExc``, as for RQ and stopit
* a hub resumes a greenlet with an exception, as for gevent and eventlet.

The exception appears wherever the call is, often in the middle of a client library, which may wrap or replace it.

An exception is foreign if its class comes neither from a client library, nor from the standard library, nor from this
package.  These rules decide:

* An exception that a frame of a signal handler raised is an interruption, however often it was wrapped.
* A foreign exception is an interruption, unless one of the following rules applies.
* An exception that a ``raise`` statement made of a client's error is a translation of that error.
* Client sources, sources of credentials and log handlers may raise any class.  In their code, and behind a wrapper, an
  interruption is an exception that no ``raise`` statement raised, in the middle of a library's wait.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from types import CodeType, TracebackType
from typing import TypeVar

from pybreaker_redis._runtime.signals import is_raised_by_signal_handler, traceback_entries

_Function = TypeVar("_Function", bound=Callable[..., object])

#: Packages that send commands to Redis and parse replies.
_CLIENT_PACKAGES = frozenset(
    ("redis", "valkey", "rediscluster", "fakeredis", "hiredis", "libvalkey", "lupa", __name__.partition(".")[0])
)
#: Packages in which a greenlet waits.
_HUB_PACKAGES = frozenset(("gevent", "greenlet", "eventlet"))

#: Functions of a client's connection that call the user's source of credentials.
_CREDENTIAL_CALLERS = ("connect", "on_connect", "connect_check_health", "on_connect_check_health")

#: Code objects of this package's functions that call the user's code, which may raise any class.
_user_code_callers: set[CodeType] = set()


def calls_user_code(function: _Function) -> _Function:
    """Register a function that calls the user's code, so that no exception of that code counts as an interruption."""
    _user_code_callers.add(function.__code__)
    return function


def find_interruption(error: BaseException, handled: BaseException | None = None) -> BaseException | None:
    """Return the interruption behind an error.

    Args:
        error: Error that ended a wait for Redis.
        handled: Exception that the caller was handling before the wait, which was raised earlier, as were its causes.

    Returns:
        The interruption (``None`` if there is none).
    """
    causes = list(_causes(error, handled))
    for item in causes:
        if is_raised_by_signal_handler(item):
            return item
    if _is_foreign(error) and not _comes_from_user_code(error) and not _is_translated_client_error(error, causes[1:]):
        return error
    return next((item for item in causes if _is_foreign(item) and _is_injected(item)), None)


def is_interruption(error: BaseException) -> bool:
    """Return whether an error that a socket's method raised is an interruption."""
    return is_raised_by_signal_handler(error) or (_is_foreign(error) and not _comes_from_user_code(error))


@contextlib.contextmanager
def suppress_errors() -> Iterator[None]:
    """Suppress errors, and raise the interruption if there is one behind the error."""
    handled = sys.exc_info()[1]
    interruption = None
    try:
        yield
    except Exception as error:  # noqa: BLE001
        interruption = find_interruption(error, handled)
    if interruption is not None:
        raise interruption


def _causes(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts, the error first."""
    seen = {id(handled)}
    pending: list[BaseException | None] = [error]
    while pending:
        item = pending.pop(0)
        if item is not None and id(item) not in seen:
            seen.add(id(item))
            yield item
            pending += [item.__cause__, item.__context__]


def _top_package(module: object) -> str:
    return str(module).partition(".")[0]


def _is_foreign(error: BaseException) -> bool:
    package = _top_package(type(error).__module__)
    of_a_client = any(_top_package(cls.__module__) in _CLIENT_PACKAGES for cls in type(error).__mro__)
    return not of_a_client and package not in sys.stdlib_module_names


def _package_of_entry(entry: TracebackType) -> str:
    return _top_package(entry.tb_frame.f_globals.get("__name__"))


def _comes_from_user_code(error: BaseException) -> bool:
    """Return whether the traceback leads into the user's code: client source, log handler, source of credentials."""
    before = None
    for entry in traceback_entries(error.__traceback__):
        code = entry.tb_frame.f_code
        if code in _user_code_callers:
            return True
        by_client = (
            before is not None
            and _package_of_entry(before) in _CLIENT_PACKAGES
            and before.tb_frame.f_code.co_name in _CREDENTIAL_CALLERS
        )
        if by_client and _package_of_entry(entry) not in _CLIENT_PACKAGES | sys.stdlib_module_names:
            return True
        before = entry
    return False


def _is_translated_client_error(error: BaseException, causes: list[BaseException]) -> bool:
    """Return whether a ``raise`` statement made this error of a client's error, as wrappers of clients do."""
    return _ends_in_raise_statement(error) and any(not _is_foreign(item) for item in causes)


def _is_injected(error: BaseException) -> bool:
    innermost = _innermost(error)
    if innermost is None or _is_raise_statement(innermost):
        return False
    return _package_of_entry(innermost) in _CLIENT_PACKAGES | _HUB_PACKAGES | sys.stdlib_module_names


def _innermost(error: BaseException) -> TracebackType | None:
    innermost = None
    for innermost in traceback_entries(error.__traceback__):  # noqa: B007
        pass
    return innermost


def _ends_in_raise_statement(error: BaseException) -> bool:
    innermost = _innermost(error)
    return innermost is not None and _is_raise_statement(innermost)


def _is_raise_statement(entry: TracebackType) -> bool:
    """Return whether the instruction of an entry is a ``raise``, which a compiled module never shows."""
    code, at = entry.tb_frame.f_code.co_code, entry.tb_lasti
    return 0 <= at < len(code) and dis.opname[code[at]] in ("RAISE_VARARGS", "RERAISE")
