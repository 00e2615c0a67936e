"""Requests of asyncio tasks, on threads of their own.

A request waits for a socket, which would stop the event loop.  A future of this pool belongs to no loop: its request is
sent even if the task is cancelled or the loop has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pybreaker_redis._runtime.fork import ForkSafe, renew

T = TypeVar("T")

#: Most requests of tasks at a time.  A request takes a fraction of a millisecond, and the longest timeout in an outage.
REQUEST_THREADS_MAX = 8


class RequestPool(ForkSafe):
    """Threads that send the requests of asyncio tasks.  The first request of each process starts them."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        super().__init__()

    def _reset_in_child(self) -> None:
        # The threads exist in the parent only.
        self._executor = None

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call a function on a thread of the pool, whatever becomes of its caller."""
        renew()
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(REQUEST_THREADS_MAX, "pybreaker_redis request")
            try:
                return self._executor.submit(function)
            except RuntimeError:
                # The interpreter shuts down, and the loop of another thread goes on.
                return _called(function)


def _called(function: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future


#: The pool of this process.
REQUESTS = RequestPool()


async def run_request(function: Callable[[], T], *, when_abandoned: Callable[[T], Any] | None = None) -> T:
    """Call a function on a thread of the pool, and wait for its result.

    Args:
        function: Function that sends requests.  It is called even if the waiting task is cancelled.
        when_abandoned: Function that gets the result, on that thread, if the task was cancelled or closed meanwhile.

    Raises:
        asyncio.CancelledError: The task was cancelled.
    """
    future = REQUESTS.submit(function)
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except BaseException:
        if when_abandoned is not None:
            future.add_done_callback(lambda done: _pass_result(done, when_abandoned))
        raise


def _pass_result(done: Future[T], receiver: Callable[[T], Any]) -> None:
    if done.exception() is None:
        REQUESTS.submit(lambda: receiver(done.result()))
