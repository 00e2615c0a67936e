"""Exceptions that are raised into a running call."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from tests.support.faults import Site


class JobTimeout(Exception):
    """A time limit of a worker's, as RQ's."""


class SoftTimeout(TimeoutError):
    """A time limit of an application's, of a class that client libraries take for the network's."""


@contextlib.contextmanager
def alarm(handler: Callable[..., Any], after: float = 0.2) -> Iterator[None]:
    """A signal interrupts the main thread."""
    usual = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


@contextlib.contextmanager
def frozen(site: Site) -> Iterator[None]:
    """The server answers no client for a while."""
    site.server.pause()
    try:
        yield
    finally:
        site.server.resume()


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """A signal handler that raises."""

    def handler(number: int, frame: object) -> NoReturn:
        raise error

    return handler
