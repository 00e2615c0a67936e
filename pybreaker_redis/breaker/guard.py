"""Guard of one breaker's calls: admission, settlement, and notifications of listeners."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from pybreaker import CircuitBreaker

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.core import CircuitCore
from pybreaker_redis._model.circuit import BY_HAND, CLOSED, OPEN, Admission, Circuit
from pybreaker_redis._model.intents import Intent, Load, Reply
from pybreaker_redis._runtime.redaction import describe_error
from pybreaker_redis.breaker.calls import (
    AdmissionDecision,
    admission_without_request,
    admit_call,
    release_call,
    settle_failure,
    settle_success,
)
from pybreaker_redis.breaker.offload import REQUESTS, run_request
from pybreaker_redis.breaker.permit import Permit
from pybreaker_redis.breaker.rejections import Rejections
from pybreaker_redis.breaker.transitions import StateFollower, notify, notify_success
from pybreaker_redis.errors import CircuitOpenError

T = TypeVar("T")

#: Exceptions that end a call from outside, whatever the dependency does.
_INTERRUPTIONS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


#: Guards of this process by their circuit: several breakers may have one storage.
_GUARDS_BY_CORE: weakref.WeakKeyDictionary[CircuitCore, weakref.WeakSet[CallGuard]] = weakref.WeakKeyDictionary()


def _is_interruption(error: BaseException) -> bool:
    if isinstance(error, Exception):
        return False
    greenlet = sys.modules.get("greenlet")
    return isinstance(error, _INTERRUPTIONS) or (greenlet is not None and isinstance(error, greenlet.GreenletExit))


def guard_of(breaker: CircuitBreaker) -> CallGuard:
    """Return the guard of a breaker.

    Raises:
        TypeError: The breaker has a storage of another package.
    """
    guard: CallGuard | None = getattr(breaker, "_guard", None)
    if guard is None:
        msg = f"breaker {breaker.name!r} has a storage of another package, which admits and settles no calls"
        raise TypeError(msg)
    return guard


class CallGuard:
    """Admission and settlement of the calls of one breaker.

    Args:
        breaker: The breaker.
        core: Circuit of the breaker.
        clock_ms: Function that returns the local time, milliseconds since the epoch.

    Attributes:
        core: Circuit of the breaker.
        followed: Decision of the fast path that the breaker has followed: there is no transition to notice.
    """

    def __init__(self, breaker: CircuitBreaker, core: CircuitCore, clock_ms: Callable[[], float]) -> None:
        self.core = core
        self.followed: Admission = BY_HAND
        self._breaker = breaker
        self._clock_ms = clock_ms
        self._follower = StateFollower(breaker)
        self._rejections = Rejections(breaker, core, clock_ms)
        _GUARDS_BY_CORE.setdefault(core, weakref.WeakSet()).add(self)

    @property
    def name(self) -> str | None:
        """Name of the breaker."""
        return self._breaker.name

    # State --------------------------------------------------------------------------------------------------------

    def adopt_first_state(self) -> None:
        """Take over the state object that pybreaker's constructor made."""
        self._follower.adopt(self._breaker._state)

    def read(self) -> Reply:
        """Return the circuit, without a request where that is possible.  Its counters may be older."""
        return self.core.read_without_request() or self.core.carry_out(Load())

    def notice(self, circuit: Circuit) -> None:
        """Follow the circuit, and notify the listeners if another process or breaker has changed its state."""
        self._follower.note(circuit, is_author=False)

    def move_by_hand(self, *intents: Intent) -> None:
        """Carry out intents that belong to no call, and notify the listeners."""
        replies = [self.core.carry_out(intent) for intent in intents]
        self.followed = BY_HAND
        self._follower.note(replies[-1].circuit, is_author=True, restarts=True)

    # Admission ----------------------------------------------------------------------------------------------------

    def admit(self) -> Permit:
        """Admit one call.

        Raises:
            CircuitOpenError: The circuit rejects the call.
        """
        budget, held = CallBudget(), self.core.held_probes.held_here()
        claims: list[int] = []
        try:
            decision = self._admit(self._breaker.reset_timeout, budget, held, claims)
        except BaseException:
            self._end_claims(claims)
            raise
        return self._permit_for(decision, budget, claims)

    async def admit_async(self) -> Permit:
        """Admit one call of a task.  A request is sent by another thread.

        Raises:
            CircuitOpenError: The circuit rejects the call.
            asyncio.CancelledError: The task was cancelled.  A probe that is claimed for it becomes free.
        """
        core, budget, reset_timeout_s = self.core, CallBudget(), self._breaker.reset_timeout
        # Here, because the probes belong to a context, and the request is sent in another one.
        held = core.held_probes.held_here()
        decision = admission_without_request(core, reset_timeout_s, held, self._clock_ms)
        if decision is not None:
            return self._permit_for(decision, budget, [])
        claims: list[int] = []

        def return_probe(abandoned: AdmissionDecision) -> None:
            if abandoned.has_claimed and abandoned.admission is not None:
                self._follower.note(abandoned.circuit, is_author=True)
                release_call(core, abandoned.admission, budget)

        try:
            decision = await self._request(
                lambda: self._admit(reset_timeout_s, budget, held, claims), when_abandoned=return_probe
            )
        except BaseException:
            self._end_claims(claims)
            raise
        return self._permit_for(decision, budget, claims)

    def _admit(
        self, reset_timeout_s: float, budget: CallBudget, held: frozenset[str], claims: list[int]
    ) -> AdmissionDecision:
        """Decide about a call.  A claim that is sent adds its generation to `claims`, for `_end_claims`."""

        def begin_claim(generation: int) -> None:
            claims.append(generation)
            self._follower.begin_request(generation)

        has_several = len(_GUARDS_BY_CORE[self.core]) > 1
        return admit_call(
            self.core,
            reset_timeout_s,
            budget,
            held,
            begin_claim,
            clock_ms=self._clock_ms,
            has_several_breakers=has_several,
        )

    def _end_claims(self, claims: list[int]) -> None:
        for generation in claims:
            self._follower.end_request(generation)

    def _permit_for(self, decision: AdmissionDecision, budget: CallBudget, claims: list[int]) -> Permit:
        admission = decision.admission
        if not decision.has_claimed:
            # Another process is the author of what is noticed.
            self._end_claims(claims)
        # Before the listeners are called: a permit that becomes garbage gives its probe back.
        permit = None if admission is None else Permit(self, admission, budget, is_nested=decision.is_nested)
        try:
            self._follower.note(decision.circuit, is_author=decision.has_claimed)
        except BaseException:
            # A listener was interrupted.
            if permit is not None:
                self.settle_nothing(permit)
            raise
        finally:
            if decision.has_claimed:
                self._end_claims(claims)
        fast_path, state = self.core.fast_path, self._breaker._state.name
        for_all = fast_path.admission if state == CLOSED else fast_path.rejection if state == OPEN else None
        if for_all is not None:
            self.followed = for_all
        if permit is None:
            raise self._rejections.error_of(decision, self.followed)
        if decision.has_claimed:
            self.core.held_probes.claim(permit.admission.token)
        return permit

    def quick_rejection(self) -> CircuitOpenError | None:
        """Return the error of a call that the view of this process rejects.  ``None``: `admit` decides."""
        return self._rejections.quick_error(self.followed)

    # Settlement ---------------------------------------------------------------------------------------------------

    def settle_success(self, permit: Permit) -> None:
        """Report a success.  See `Permit.succeed`."""
        permit.take()
        if permit.is_nested:
            notify_success(self._breaker)
            return
        generation = permit.admission.generation
        self._follower.begin_request(generation)
        try:
            reply = settle_success(self.core, permit.admission, self._breaker.success_threshold, permit.budget)
            self._note_success(permit, reply)
        finally:
            self._follower.end_request(generation)

    async def settle_success_async(self, permit: Permit) -> None:
        """Report a success of a task."""
        fast_path = self.core.fast_path
        # A success without a failure to forget sends nothing.
        is_quiet = fast_path.quiet_admission == permit.admission and fast_path.now() < fast_path.trust.until
        if is_quiet or permit.is_nested:
            self.settle_success(permit)
            return
        permit.take()
        generation, threshold = permit.admission.generation, self._breaker.success_threshold
        self._follower.begin_request(generation)
        try:
            reply = await self._request(
                lambda: settle_success(self.core, permit.admission, threshold, permit.budget),
                when_abandoned=lambda abandoned: self._note_success(permit, abandoned),
            )
            self._note_success(permit, reply)
        finally:
            self._follower.end_request(generation)

    def settle_error(self, permit: Permit, error: BaseException) -> BaseException:
        """Report the error of a call.  See `Permit.fail`.

        Returns:
            What the call raises: the error, or a `CircuitOpenError` if the error has opened the circuit and the breaker
            raises a new error then.
        """
        if _is_interruption(error):
            self.settle_nothing(permit)
            return error
        if not self._is_failure(permit, error):
            self.settle_success(permit)
            return error
        permit.take()
        generation = permit.admission.generation
        self._follower.begin_request(generation)
        try:
            reply = settle_failure(self.core, permit.admission, self._breaker.fail_max, permit.budget)
            return self._note_failure(permit, error, reply)
        finally:
            self._follower.end_request(generation)

    async def settle_error_async(self, permit: Permit, error: BaseException) -> BaseException:
        """Report the error of a task, as `settle_error` does."""
        if _is_interruption(error):
            permit.take()
            if permit.is_probe and not permit.is_nested:
                # A cancelled task must not wait.
                REQUESTS.submit(lambda: release_call(self.core, permit.admission, permit.budget))
            return error
        if not self._is_failure(permit, error):
            await self.settle_success_async(permit)
            return error
        permit.take()
        generation, fail_max = permit.admission.generation, self._breaker.fail_max
        self._follower.begin_request(generation)
        try:
            reply = await self._request(
                lambda: settle_failure(self.core, permit.admission, fail_max, permit.budget),
                when_abandoned=lambda abandoned: self._note_failure(permit, error, abandoned),
            )
            return self._note_failure(permit, error, reply)
        finally:
            self._follower.end_request(generation)

    def settle_nothing(self, permit: Permit) -> None:
        """Report that a call has no outcome.  See `Permit.release`."""
        permit.take()
        if not permit.is_nested:
            release_call(self.core, permit.admission, permit.budget)

    def _is_failure(self, permit: Permit, error: BaseException) -> bool:
        try:
            return self._breaker.is_system_error(error)
        except BaseException:
            # A function of `exclude` or `include` has failed.  The outcome is unknown.
            self.settle_nothing(permit)
            raise

    def _note_success(self, permit: Permit, reply: Reply) -> None:
        # pybreaker closes the circuit before it reports the success of a probe.
        if permit.is_probe and reply.accepted and reply.circuit.state == CLOSED:
            self.followed = BY_HAND
            self._follower.note(reply.circuit, is_author=True)
        notify_success(self._breaker)

    def _note_failure(self, permit: Permit, error: BaseException, reply: Reply) -> BaseException:
        notify(self._breaker, "failure", error)
        if not reply.accepted or reply.circuit.state != OPEN:
            return error
        cause = describe_error(error)
        self.followed = BY_HAND
        self._rejections.note_opening(reply.circuit.generation, cause)
        self._follower.note(reply.circuit, is_author=True, cause=cause)
        if not self._breaker._throw_new_error_on_trip:
            return error
        trip = self._rejections.error_of_trip(reply.circuit, cause, is_probe=permit.is_probe)
        trip.__cause__ = error
        return trip

    async def _request(self, function: Callable[[], T], *, when_abandoned: Callable[[T], Any] | None = None) -> T:
        if not self.core.sends_requests:
            return function()
        return await run_request(function, when_abandoned=when_abandoned)
