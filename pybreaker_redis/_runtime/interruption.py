"""Exceptions that were raised into a wait for Redis from outside, and are none of Redis's.

Knows: classes by the module that defines them, tracebacks, causes and contexts.  Does not know: Redis, what was waited
for.

Time limits end a call in several ways: a signal handler raises (Celery), another thread has the interpreter raise (RQ,
stopit, by ``PyThreadState_SetAsyncExc``), a hub resumes a greenlet with an exception (gevent, eventlet).  Such an
exception surfaces wherever the call is, often in the middle of a client library, which may wrap it or replace it.

* What a signal handler's frame raised is from outside, however often it was wrapped.
* An error is from outside if its class is neither a client library's, nor the standard library's, nor this package's.
  There are three exceptions.  An error that a ``raise`` makes of a client's error is a translation of that.  A callable
  that returns a client, a source of credentials and a log handler may raise any class.  There, and where an error was
  wrapped, only what no ``raise`` statement has raised, in the middle of a library's wait, is from outside.
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

#: Packages that talk to Redis, and parse what it says.
_CLIENT_PACKAGES = frozenset(
    ("redis", "valkey", "rediscluster", "fakeredis", "hiredis", "libvalkey", "lupa", __name__.partition(".")[0])
)
#: Packages in which a greenlet waits.
_HUB_PACKAGES = frozenset(("gevent", "greenlet", "eventlet"))

#: The functions of a client's connection that call what its user has given to authenticate.
_CREDENTIAL_CALLERS = ("connect", "on_connect", "connect_check_health", "on_connect_check_health")

#: The codes of this package's functions that call what a user has given: it may raise errors of any class.
_user_code_callers: set[CodeType] = set()


def calls_user_code(function: _Function) -> _Function:
    """Note that a function calls what a user has given, so that errors of any class are no news from outside."""
    _user_code_callers.add(function.__code__)
    return function


def find_interruption(error: BaseException, handled: BaseException | None = None) -> BaseException | None:
    """Return the exception that was raised from outside, if there is one behind an error.

    Args:
        error: What came out of a wait for Redis.
        handled: What the caller was handling before; it and what lies behind it have been raised earlier.
    """
    causes = list(_causes(error, handled))
    for item in causes:
        if is_raised_by_signal_handler(item):
            return item
    if _is_foreign(error) and not _comes_from_user_code(error) and not _is_translated_client_error(error, causes[1:]):
        return error
    return next((item for item in causes if _is_foreign(item) and _is_injected(item)), None)


def is_interruption(error: BaseException) -> bool:
    """Return whether an error that came straight out of a socket was raised from outside."""
    return is_raised_by_signal_handler(error) or (_is_foreign(error) and not _comes_from_user_code(error))


@contextlib.contextmanager
def suppress_errors() -> Iterator[None]:
    """Suppress errors, but for an exception that was raised from outside: that is raised instead of them."""
    handled = sys.exc_info()[1]
    outside = None
    try:
        yield
    except Exception as error:  # noqa: BLE001
        outside = find_interruption(error, handled)
    if outside is not None:
        raise outside


def _causes(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it was raised from, or while which was handled, the error first."""
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
    home = _top_package(type(error).__module__)
    of_a_client = any(_top_package(cls.__module__) in _CLIENT_PACKAGES for cls in type(error).__mro__)
    return not of_a_client and home not in sys.stdlib_module_names


def _package_of_entry(entry: TracebackType) -> str:
    return _top_package(entry.tb_frame.f_globals.get("__name__"))


def _comes_from_user_code(error: BaseException) -> bool:
    """Whether a traceback leads into what a user has given: a callable, a log handler, a source of credentials."""
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
    """Whether a client's error became this one, as wrappers do that have errors of their own."""
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
    """Whether the instruction of an entry is a ``raise``; compiled modules show none."""
    code, at = entry.tb_frame.f_code.co_code, entry.tb_lasti
    return 0 <= at < len(code) and dis.opname[code[at]] in ("RAISE_VARARGS", "RERAISE")
