"""Exceptions that tests raise into a running call."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from tests.support.faults import Site


class JobTimeout(Exception):
    """Time limit of a job, as RQ's."""


class SoftTimeout(TimeoutError):
    """Time limit of an application, of a class that client libraries use for network errors."""


@contextlib.contextmanager
def alarm(handler: Callable[..., Any], after: float = 0.2) -> Iterator[None]:
    """Interrupt the main thread by a signal."""
    usual = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


@contextlib.contextmanager
def frozen(site: Site) -> Iterator[None]:
    """Freeze the server for the block."""
    site.server.pause()
    try:
        yield
    finally:
        site.server.resume()


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """Return a signal handler that raises an error."""

    def handler(number: int, frame: object) -> NoReturn:
        raise error

    return handler
