"""Permits: the right of one call to go on, and its duty to report the outcome once."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import Admission
from pybreaker_redis._runtime import fork


class Settlement(Protocol):
    """What settles permits."""

    @property
    def name(self) -> str | None:
        """Name of the breaker."""

    def settle_success(self, permit: Permit) -> None:
        """Report a success."""

    def settle_error(self, permit: Permit, error: BaseException) -> BaseException:
        """Report an error, and return what the call raises."""
        ...

    def settle_nothing(self, permit: Permit) -> None:
        """Report that the call has no outcome."""


class Permit:
    """Admission of one call by `CircuitBreaker.admit`.

    The permit belongs to the call, and to no thread: any thread, context or event loop may settle it.  As a context
    manager it settles the call by the way in which the block ends::

        with breaker.admit() as permit:
            response = session.get(url)
            if response.status_code >= 500:
                permit.fail(OSError(response.reason))

    A permit that is never settled counts nothing.  Once the permit of a probe is garbage, the probe is offered to
    callers of this process.  Other processes wait for the end of the lease.
    """

    __slots__ = ("__weakref__", "_guard", "_process_id", "_unsettled", "admission", "budget", "is_nested")

    def __init__(self, guard: Settlement, admission: Admission, budget: CallBudget, *, is_nested: bool = False) -> None:
        self._guard = guard
        self.admission = admission
        self.budget = budget
        #: Whether the call is made within a probe, which settles the token.  Only a failure of this call counts.
        self.is_nested = is_nested
        self._process_id = fork.process_id
        # A list, because `pop` takes its item for one thread only.
        self._unsettled = [admission]

    @property
    def generation(self) -> int | None:
        """Generation of the circuit that admitted the call.  A later generation refuses the outcome."""
        return self.admission.generation

    @property
    def is_probe(self) -> bool:
        """Whether the call tests the dependency for the whole fleet."""
        return bool(self.admission.token)

    @property
    def is_settled(self) -> bool:
        """Whether the outcome was reported."""
        return not self._unsettled

    def take(self) -> None:
        """Note that the outcome is about to be reported.

        Raises:
            RuntimeError: The outcome was reported before.
        """
        try:
            self._unsettled.pop()
        except IndexError:
            msg = "this permit was settled before: call succeed(), fail() or release() once"
            raise RuntimeError(msg) from None

    def succeed(self) -> None:
        """Report a success.

        Raises:
            RuntimeError: The permit was settled before.
        """
        self._guard.settle_success(self)

    def fail(self, error: BaseException) -> None:
        """Report a failure.  An error that the breaker excludes counts as a success.

        The error is not raised, also if it opens the circuit.

        Args:
            error: Error of the call.

        Raises:
            RuntimeError: The permit was settled before.
        """
        self._guard.settle_error(self, error)

    def release(self) -> None:
        """Report that the call has no outcome.  Nothing is counted, and a probe is free for the next call.

        Raises:
            RuntimeError: The permit was settled before.
        """
        self._guard.settle_nothing(self)

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._unsettled:
            if error is None:
                self.succeed()
            else:
                self.fail(error)

    def __del__(self) -> None:
        # Without a request: garbage may be collected anywhere, also in the event loop.
        # The copy in a forked child is garbage, and the parent goes on with the probe.
        if self._unsettled and self.admission.token and not self.is_nested and self._process_id == fork.process_id:
            PROBE_TOKENS.release(self.admission.token)

    def __repr__(self) -> str:
        state = "settled" if self.is_settled else "a probe" if self.is_probe else "unsettled"
        return f"<{type(self).__name__} of {self._guard.name!r}, generation {self.generation}, {state}>"
