"""Time budgets: seconds that a guarded call, or an operator's command, may wait for Redis.

All requests of one guarded call share the `timeout` of its circuit.  A request that belongs to no call, as the reading
of a page of metrics, has the whole timeout for itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import find_interruption
from pybreaker_redis.errors import StorageUnavailableError

#: Seconds an operator's command waits for Redis at least.
OPERATOR_TIMEOUT_MIN_S = 2.0

#: Part of the timeout that remains for the last of several requests of one call.
LAST_REQUEST_SHARE_MIN = 0.2


@dataclass(slots=True)
class CallBudget:
    """Seconds that the requests of one thread's present call have waited for Redis.

    Attributes:
        spent_s: Seconds since the call began in which its requests waited for a reply.
        has_reported: Whether the call has reported its outcome.  A further report is that of another call, which was
            admitted without a request.
    """

    spent_s: float = 0.0
    has_reported: bool = False

    def begin_call(self) -> None:
        """Start over: a call begins."""
        self.spent_s, self.has_reported = 0.0, False

    def begin_request(self, timeout_s: float | None, *, is_report: bool) -> float | None:
        """Return the seconds that the next request may wait.

        Args:
            timeout_s: Seconds for all requests of a call.  ``None``: no limit.
            is_report: Whether the request reports the outcome of the call.
        """
        if is_report and self.has_reported:
            self.spent_s = 0.0
        self.has_reported = self.has_reported or is_report
        if timeout_s is None:
            return None
        # More than nothing: this process may have been the slow one, which is no reason to treat Redis as unreachable.
        return max(timeout_s - self.spent_s, timeout_s * LAST_REQUEST_SHARE_MIN)

    def is_half_spent(self, timeout_s: float | None) -> bool:
        """Whether more than half of the timeout is spent."""
        return timeout_s is not None and self.spent_s > timeout_s / 2


@contextlib.contextmanager
def request_wait(budget: CallBudget | None, timeout_s: float | None) -> Iterator[None]:
    """Limit a request that is no report to the timeout, or to what the call has left of it.

    Args:
        budget: Time budget of the guarded call.  ``None``: the request belongs to no call.
        timeout_s: Seconds for all requests of a call.  ``None``: no limit.
    """
    if budget is None:
        with deadline(timeout_s):
            yield
        return
    began = monotonic()
    try:
        with deadline(budget.begin_request(timeout_s, is_report=False)):
            yield
    finally:
        budget.spent_s += monotonic() - began


def operator_timeout_s(timeout_s: float | None) -> float | None:
    """Return the seconds an operator's command may wait for Redis.

    Args:
        timeout_s: Timeout of the circuit in seconds.  ``None``: no limit.
    """
    return None if timeout_s is None else max(timeout_s, OPERATOR_TIMEOUT_MIN_S)


@contextlib.contextmanager
def operator_wait(circuits: tuple[str, ...], server_name: Callable[[], str], timeout_s: float | None) -> Iterator[None]:
    """Limit the requests of an operator's command, and wrap what a client raises.

    Args:
        circuits: Names of the circuits that the command is for.
        server_name: Function that returns the address of their server, empty if the circuits were not located.
        timeout_s: Seconds the command may wait.  ``None``: no limit.

    Raises:
        StorageUnavailableError: The client raised an error.  An interruption that was raised into the command from
            outside, as a job's timeout, passes unchanged.
    """
    handled = sys.exc_info()[1]
    try:
        with deadline(timeout_s):
            yield
    except Exception as error:
        interruption = find_interruption(error, handled)
        if interruption is error:
            raise
        if interruption is not None:
            raise interruption  # noqa: B904 (has its own cause)
        raise StorageUnavailableError(circuits, server_name(), timeout_s, error) from error
