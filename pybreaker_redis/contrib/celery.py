"""When does a task come back whose circuit was open?

Knows: Celery's retries, its brokers.  Does not know: circuits.
"""

from __future__ import annotations

import math
import random
from typing import Any, NoReturn

from pybreaker import CircuitBreakerError

from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.registry import retry_after

with require_extra("celery"):
    from celery import Task
    from celery.app import autoretry


class BreakerTask(Task):
    """A task that comes back when the circuit that has rejected it may be tried again.

    Whatever raises `CircuitBreakerError` out of the task counts as that: with the breaker's *throw_new_error_on_trip*,
    which is pybreaker's default, also the call that has failed and opened the circuit.  With ``False`` that call raises
    its own error, so the task fails, or does as ``autoretry_for`` has it.

    Called as a function, and in eager mode, it raises the error at once: there, nobody can wait.
    """

    abstract = True

    #: Whether a rejection is one of the task's ``max_retries``.  If not, the task waits as long as the circuit does; an
    #: end of that is what ``expires`` is for.
    rejections_count = True

    #: How long it is put off at random, so that not all come back at once: a share of the wait, or of a second if that
    #: is more.
    rejection_jitter = 0.5

    #: What ``autoretry_for`` leaves alone; rejections, which are for this class, it does in any case.
    dont_autoretry_for: tuple[type[BaseException], ...] = (CircuitBreakerError,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, for a worker or for somebody who calls it."""
        try:
            return super().__call__(*args, **kwargs)
        except CircuitBreakerError as error:
            if self.request.is_eager:
                raise
            self.retry_rejected(error)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, *rest: Any, **options: Any) -> Any:
        """Have a worker run the task again, as Celery does; but not for ``autoretry_for``, if the task was rejected."""
        # A task's own dont_autoretry_for replaces ours, and Celery takes it from the decorator, where no class sees it.
        # The first frame of an error is that which has caught it: what the task catches it may have retried.
        caught = exc.__traceback__ if isinstance(exc, CircuitBreakerError) else None
        if caught and caught.tb_frame.f_globals is vars(autoretry):
            raise exc
        return super().retry(args, kwargs, exc, *rest, **options)

    def retry_rejected(self, error: CircuitBreakerError) -> NoReturn:
        """Have a worker run the task again when the circuit may be tried.

        Raises:
            celery.exceptions.Retry: It will be.
            CircuitBreakerError: It has no retries left, or was called as a function.
        """
        request = self.request
        # Celery sends the task off with one retry more than it has had.
        had = request.retries
        try:
            request.retries = had if self.rejections_count else had - 1
            raise self.retry(exc=error, countdown=self.countdown(error))
        finally:
            request.retries = had

    def countdown(self, error: CircuitBreakerError) -> float:
        """Seconds until the circuit may be tried again, and a little more; less than a broker waits for its workers."""
        # A worker has a task that waits; were it not back in time, the broker would give it to another one, too.
        visible_for = self.broker_visibility_timeout() or math.inf
        wait = min(retry_after(error), visible_for / 2)
        return wait + random.uniform(0, min(self.rejection_jitter * max(wait, 1.0), visible_for / 4))

    def broker_visibility_timeout(self) -> float | None:
        """Seconds after which the broker takes a task for lost; ``None`` if it never does so."""
        connection = self.app.connection_for_write()
        channel = getattr(connection.get_transport_cls(), "Channel", None)
        stated = (
            connection.transport_options.get("visibility_timeout"),
            getattr(channel, "broker_visibility_timeout", None),
            getattr(channel, "default_visibility_timeout", None),
        )
        # A class may have a property of that name, which is no number.
        return next((float(seconds) for seconds in stated if isinstance(seconds, (int, float))), None)
