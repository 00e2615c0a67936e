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

from pybreaker_redis._signals import entries, raised_by_a_handler

_Function = TypeVar("_Function", bound=Callable[..., object])

#: Packages that talk to Redis, and parse what it says.
_CLIENTS = frozenset(
    ("redis", "valkey", "rediscluster", "fakeredis", "hiredis", "libvalkey", "lupa", __name__.partition(".")[0])
)
#: Packages in which a greenlet waits.
_HUBS = frozenset(("gevent", "greenlet", "eventlet"))

#: The functions of a client's connection that call what its user has given to authenticate.
_CALL_BACK = ("connect", "on_connect", "connect_check_health", "on_connect_check_health")

#: The codes of this package's functions that call what a user has given: it may raise errors of any class.
_calling_users: set[CodeType] = set()


def calls_users(function: _Function) -> _Function:
    """Note that a function calls what a user has given, so that errors of any class are no news from outside."""
    _calling_users.add(function.__code__)
    return function


def from_outside(error: BaseException, handled: BaseException | None = None) -> BaseException | None:
    """Return the exception that was raised from outside, if there is one behind an error.

    Args:
        error: What came out of a wait for Redis.
        handled: What the caller was handling before; it and what lies behind it have been raised earlier.
    """
    behind = list(_chain(error, handled))
    for item in behind:
        if raised_by_a_handler(item):
            return item
    if _is_foreign(error) and not _is_raised_for_users(error) and not _is_a_translation(error, behind[1:]):
        return error
    return next((item for item in behind if _is_foreign(item) and _has_struck(item)), None)


def has_struck(error: BaseException) -> bool:
    """Return whether an error that came straight out of a socket was raised from outside."""
    return raised_by_a_handler(error) or (_is_foreign(error) and not _is_raised_for_users(error))


@contextlib.contextmanager
def suppressed() -> Iterator[None]:
    """Suppress errors, but for an exception that was raised from outside: that is raised instead of them."""
    handled = sys.exc_info()[1]
    outside = None
    try:
        yield
    except Exception as error:  # noqa: BLE001
        outside = from_outside(error, handled)
    if outside is not None:
        raise outside


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it was raised from, or while which was handled, the error first."""
    seen = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        item = waiting.pop(0)
        if item is not None and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [item.__cause__, item.__context__]


def _package(module: object) -> str:
    return str(module).partition(".")[0]


def _is_foreign(error: BaseException) -> bool:
    home = _package(type(error).__module__)
    of_a_client = any(_package(cls.__module__) in _CLIENTS for cls in type(error).__mro__)
    return not of_a_client and home not in sys.stdlib_module_names


def _home(entry: TracebackType) -> str:
    return _package(entry.tb_frame.f_globals.get("__name__"))


def _is_raised_for_users(error: BaseException) -> bool:
    """Whether a traceback leads into what a user has given: a callable, a log handler, a source of credentials."""
    before = None
    for entry in entries(error.__traceback__):
        code = entry.tb_frame.f_code
        if code in _calling_users:
            return True
        by_client = before is not None and _home(before) in _CLIENTS and before.tb_frame.f_code.co_name in _CALL_BACK
        if by_client and _home(entry) not in _CLIENTS | sys.stdlib_module_names:
            return True
        before = entry
    return False


def _is_a_translation(error: BaseException, behind: list[BaseException]) -> bool:
    """Whether a client's error became this one, as wrappers do that have errors of their own."""
    return _innermost_raises(error) and any(not _is_foreign(item) for item in behind)


def _has_struck(error: BaseException) -> bool:
    innermost = _innermost(error)
    if innermost is None or _raises(innermost):
        return False
    return _home(innermost) in _CLIENTS | _HUBS | sys.stdlib_module_names


def _innermost(error: BaseException) -> TracebackType | None:
    innermost = None
    for innermost in entries(error.__traceback__):  # noqa: B007
        pass
    return innermost


def _innermost_raises(error: BaseException) -> bool:
    innermost = _innermost(error)
    return innermost is not None and _raises(innermost)


def _raises(entry: TracebackType) -> bool:
    """Whether the instruction of an entry is a ``raise``; compiled modules show none."""
    code, at = entry.tb_frame.f_code.co_code, entry.tb_lasti
    return 0 <= at < len(code) and dis.opname[code[at]] in ("RAISE_VARARGS", "RERAISE")
