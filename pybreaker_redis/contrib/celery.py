"""Celery task class that retries rejected tasks when their circuit may admit calls again."""

from __future__ import annotations

import math
import random
from typing import Any, NoReturn

from pybreaker import CircuitBreakerError

from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.operators import retry_after

with require_extra("celery"):
    from celery import Task
    from celery.app import autoretry

__all__ = ("BreakerTask",)


class BreakerTask(Task):
    """Task that retries when a circuit rejects its call, after the circuit's `retry_after`.

    Any `CircuitBreakerError` that leaves the task counts as a rejection.  The call that opens the circuit raises the
    dependency's error: the task fails, or retries as ``autoretry_for`` specifies.  With *throw_new_error_on_trip*,
    the default of breakers that no registry creates, that call raises a `CircuitBreakerError`, too.

    A task that is called as a function, or runs in eager mode, raises the error at once, because its caller waits.
    """

    abstract = True

    #: Whether a rejection counts as one of the task's ``max_retries``.  With ``False`` the task waits for as long as
    #: the circuit is open, and ``expires`` limits the wait.
    rejections_count = True

    #: Random addition to the wait, so that tasks do not all retry at once.  A share of the wait, or of one second
    #: where the wait is shorter.
    rejection_jitter = 0.5

    #: Exceptions that ``autoretry_for`` leaves alone.  Rejections are never retried by ``autoretry_for``.
    dont_autoretry_for: tuple[type[BaseException], ...] = (CircuitBreakerError,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task for a worker or for a direct caller."""
        try:
            return super().__call__(*args, **kwargs)
        except CircuitBreakerError as error:
            if self.request.is_eager:
                raise
            self.retry_rejected(error)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, *rest: Any, **options: Any) -> Any:
        """Retry the task as Celery does, but not on behalf of ``autoretry_for`` after a rejection."""
        # A dont_autoretry_for of the decorator replaces the one of this class, and no class attribute shows it.
        # The first frame of an error's traceback is the one that caught the error.  Errors that the task caught itself
        # may be retried.
        caught = exc.__traceback__ if isinstance(exc, CircuitBreakerError) else None
        if caught and caught.tb_frame.f_globals is vars(autoretry):
            raise exc
        return super().retry(args, kwargs, exc, *rest, **options)

    def retry_rejected(self, error: CircuitBreakerError) -> NoReturn:
        """Retry the task when the circuit may admit a call.

        Raises:
            celery.exceptions.Retry: A worker will run the task again.
            CircuitBreakerError: The task has no retries left, or was called as a function.
        """
        request = self.request
        # Celery sends the retry with a count that is one higher than request.retries.
        retries = request.retries
        try:
            request.retries = retries if self.rejections_count else retries - 1
            raise self.retry(exc=error, countdown=self.countdown(error))
        finally:
            request.retries = retries

    def countdown(self, error: CircuitBreakerError) -> float:
        """Return the seconds to wait: the circuit's `retry_after` and jitter, below the broker's visibility timeout."""
        # A broker delivers an unacknowledged task a second time after its visibility timeout, also one that only waits.
        visible_for = self.broker_visibility_timeout() or math.inf
        wait = min(retry_after(error), visible_for / 2)
        return wait + random.uniform(0, min(self.rejection_jitter * max(wait, 1.0), visible_for / 4))

    def broker_visibility_timeout(self) -> float | None:
        """Return the seconds after which the broker delivers an unacknowledged task again, or ``None`` for never."""
        connection = self.app.connection_for_write()
        channel = getattr(connection.get_transport_cls(), "Channel", None)
        stated = (
            connection.transport_options.get("visibility_timeout"),
            getattr(channel, "visibility_timeout", None),
            getattr(channel, "default_visibility_timeout", None),
        )
        # On the class a property of that name is an object, not a number.
        return next((float(seconds) for seconds in stated if isinstance(seconds, (int, float))), None)
