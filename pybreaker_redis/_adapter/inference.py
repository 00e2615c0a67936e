"""Meaning of pybreaker's reads and writes: each becomes an atomic intent, or nothing.

An unmodified `CircuitBreaker` has no method for "the call failed" or "claim the probe".  It reads and writes properties
of its storage.  The method that does so gives the operation its meaning, by the call sequences of pybreaker 1.4:

==========================  =======================================  ================================================
operation                   by                                       meaning
==========================  =======================================  ================================================
`state` read                `call()`                                 admit: the state object carries the admission,
                                                                     and half-open the claim of the probe
`state` read                anything other                           read
`increment_counter`         `_handle_error()`                        the call failed that the state object admitted
`reset_counter`             `_handle_success()`                      that call succeeded
`reset_counter`             a closed state under construction        noticed, or closing, which is already done: nothing
`increment_success_…`       a half-open state                        the probe succeeded
`opened_at` set             `open()`                                 the trip begins, or ends if the failure was refused
`reset_success_counter`     an open state, built by `open()`         the trip
`reset_success_counter`     a half-open state, built because an      claim the probe
                            open one has found its timeout over
`reset_success_counter`     a half-open state, built by              half-open by hand
                            `half_open()` for an operator
`reset_success_counter`     `close()`                                close
`reset_success_counter`     any other state under construction       noticed: nothing
`state` set                 `open()`, `half_open()`, `close()`       the echo of what is already done: nothing
any                         any other code                           by hand: literally that
==========================  =======================================  ================================================

Trip, claim, close and half-open are committed before pybreaker runs its listeners.  Building the new state object
notifies the listeners, and pybreaker assigns `storage.state` after that.

In steady state the fast path decides, and no request is made: `_model/fast_path.py`.
"""

from __future__ import annotations

import math
from datetime import datetime
from types import CodeType, FrameType
from typing import Literal, cast

from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.call_context import CallContext, CountedReport
from pybreaker_redis._adapter.state_reads import PROBE_TAKEN_MESSAGE, StateReads
from pybreaker_redis._model.circuit import BY_HAND, CLOSED, COUNT_LIMIT, HALF_OPEN, OPEN, STATES, Admission
from pybreaker_redis._model.intents import (
    Close,
    CountProbe,
    FencedIntent,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    Reply,
    ResetProbes,
    SetOpenedAt,
    SetState,
    Trip,
)
from pybreaker_redis._runtime.clock import ms_from_utc, utc_from_ms
from pybreaker_redis._runtime.validation import check_choice, format_value

_Counter = Literal["fail_counter", "success_counter"]


class InferringStorage(StateReads):
    """pybreaker's storage interface over atomic intents, for any number of threads.

    See `StateReads` for the arguments.
    """

    @property
    def state(self) -> str:
        """State of the circuit: ``closed``, ``open`` or ``half-open``, the last only for the thread that may probe.

        Raises:
            pybreaker.CircuitBreakerError: Read by `CircuitBreaker.call()`, while another call probes.
        """
        fast_path, tagged = self._core.fast_path, self._tagged
        if tagged is fast_path.admission and fast_path.now() < fast_path.trust.until:
            fast_path.was_used = True
            return CLOSED
        if tagged is fast_path.rejection and fast_path.now() < fast_path.trust.until:
            fast_path.was_used = True
            return OPEN
        return self._read_state()

    @state.setter
    def state(self, state: str) -> None:
        if callsite.caller_code() in callsite.STATE_CHANGING_METHODS and state in STATES:
            return
        check_choice("state", state, STATES)
        self._execute_for(self._contexts.current(), SetState(state))

    def reset_counter(self) -> None:
        """Set the count of failures to zero."""
        fast_path = self._core.fast_path
        # Where there is no failure to forget, a success changes nothing, however late it comes.
        if self._tagged is fast_path.quiet_admission and fast_path.now() < fast_path.trust.until:
            return
        context, frame = self._contexts.current(), callsite.calling_frame()
        if frame is None or frame.f_code not in (callsite.HANDLE_SUCCESS, callsite.CLOSED_INIT):
            self._execute_for(context, RecordSuccess(*BY_HAND))
        elif frame.f_code is callsite.HANDLE_SUCCESS:
            self._execute_for(context, RecordSuccess(*self._admission_of(context, frame)), context.budget)
        else:
            self._tag_new_state(context, frame)

    def increment_counter(self) -> None:
        """Count a failure."""
        context, frame = self._contexts.current(), callsite.calling_frame()
        if frame is None or frame.f_code is not callsite.HANDLE_ERROR:
            self._execute_for(context, RecordFailure(*BY_HAND))
            return
        self._report(context, frame, RecordFailure(*self._admission_of(context, frame)), "fail_counter")

    def increment_success_counter(self) -> None:
        """Count a success while half-open."""
        context, frame = self._contexts.current(), callsite.calling_frame()
        if frame is None or frame.f_code is not callsite.HALF_OPEN_ON_SUCCESS:
            self._execute_for(context, CountProbe(*BY_HAND, self._core.lease_ms))
            return
        state = frame.f_locals["self"]
        threshold = math.ceil(min(COUNT_LIMIT, state._breaker.success_threshold))
        admission = self._admission_of(context, frame)
        intent = CountProbe(*admission, self._core.lease_ms, threshold)
        reply = self._report(context, frame, intent, "success_counter")
        if reply.accepted and not reply.circuit.probe_token:
            # The probe was returned.  A call that the user still makes on this state object, past the breaker, reports
            # for the generation alone.
            context.half_opened_generation = admission.generation
            self._admissions.tag(state, Admission(admission.generation))

    def reset_success_counter(self) -> None:
        """Set the count of successes while half-open to zero.

        Raises:
            pybreaker.CircuitBreakerError: The circuit was about to become half-open, and another call has the probe.
        """
        context, frame = self._contexts.current(), callsite.calling_frame()
        caller_code = frame.f_code if frame else None
        if caller_code is callsite.CLOSE_METHOD:
            # The closed state that is built next needs a tag, even if the circuit was closed.
            self._tagged = BY_HAND
            probed = callsite.frame_among(callsite.HALF_OPEN_ON_SUCCESS)
            admission = self._admission_of(context, probed) if probed else BY_HAND
            self._execute_for(context, Close(*admission), context.budget)
        elif frame is not None and caller_code is callsite.OPEN_INIT:
            if callsite.frame_among(callsite.OPEN_METHOD):
                admission, context.trip_admission = context.trip_admission, BY_HAND
                self._execute_for(context, Trip(*admission), context.budget)
            self._tag_new_state(context, frame)
        elif frame is not None and caller_code is callsite.HALF_OPEN_INIT:
            claims = callsite.frame_among(callsite.OPEN_BEFORE_CALL) is not None
            if claims:
                if not self._claim_probe(context, context.seen_open).accepted:
                    raise CircuitBreakerError(PROBE_TAKEN_MESSAGE)
            elif callsite.frame_among(callsite.HALF_OPEN_METHOD):
                self._execute_for(context, ResetProbes())
                self._execute_for(context, SetState(HALF_OPEN))
            self._tag_new_state(context, frame, claims=claims)
        else:
            self._execute_for(context, ResetProbes())

    @property
    def counter(self) -> int:
        """Consecutive failures.  For a breaker that compares with `fail_max`, the count after its own failure."""
        return self._count(callsite.CLOSED_ON_FAILURE, "fail_counter")

    @property
    def success_counter(self) -> int:
        """Consecutive successes while half-open.  For a breaker that has just counted one, the count after that."""
        return self._count(callsite.HALF_OPEN_ON_SUCCESS, "success_counter")

    @property
    def opened_at(self) -> datetime | None:
        """Time at which the circuit opened last, aware, by the local clock.  ``None`` if the circuit admits a probe.

        While another call probes: the end of its lease.
        """
        context = self._contexts.current()
        rejected, context.rejected_reply = context.rejected_reply, None
        # The call that is about to be rejected has just read the circuit, which answers this question as well.
        if rejected and callsite.caller_code() is callsite.OPEN_BEFORE_CALL:
            reply = rejected
        else:
            reply = self._read_circuit(context, context.budget)
        circuit = reply.circuit
        # A call that claims the probe reads this right before.
        context.seen_open = circuit
        at_ms = circuit.opened_at_ms
        if circuit.state == HALF_OPEN and context.visible_state(reply) == OPEN:
            at_ms = circuit.probe_until_ms if circuit.is_probe_leased(reply.now_ms) else None
        return None if at_ms is None else self._opened_at_of(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime | None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        context = self._contexts.current()
        if callsite.caller_code() is not callsite.OPEN_METHOD:
            self._execute_for(context, self._intent_for_opened_at(at))
            return
        failed = callsite.frame_among(callsite.CLOSED_ON_FAILURE, callsite.HALF_OPEN_ON_FAILURE)
        failure = callsite.frame_among(callsite.HANDLE_ERROR) if failed else None
        report = context.counted_in(failure)
        if failure is not None and report is not None and not report.accepted:
            # The failure came too late to count, so nothing trips.  The caller gets the exception of its own function.
            raise cast("BaseException", failure.f_locals["exc"])
        # `on_failure()` by hand trips as `open()` by hand does.
        context.trip_admission = (
            report.admission if report else self._admission_of(context, failure) if failure else BY_HAND
        )

    def _opened_at_of(self, at_ms: float) -> datetime:
        """Return the value of `opened_at` for the milliseconds in the circuit."""
        return utc_from_ms(at_ms)

    def _intent_for_opened_at(self, at: datetime | None) -> Intent:
        """Return the intent that sets when the circuit opened.  A naive datetime is taken as UTC."""
        if not isinstance(at, datetime):
            msg = f"opened_at must be a datetime, not {format_value(at)}"
            raise TypeError(msg)
        return SetOpenedAt(ms_from_utc(at))

    def _report(self, context: CallContext, frame: FrameType, intent: FencedIntent, counter: _Counter) -> Reply:
        reply = self._execute_for(context, intent, context.budget)
        total = getattr(reply.circuit, counter) if reply.accepted else 0
        context.counted = CountedReport(id(frame), Admission(intent.generation, intent.token), reply.accepted, total)
        if not reply.accepted:
            # Later calls need a state object of the circuit's present generation.
            self._tagged = BY_HAND
        return reply

    def _count(self, comparing_code: CodeType, counter: _Counter) -> int:
        context, frame, budget = self._contexts.current(), callsite.calling_frame(), None
        if frame is not None and frame.f_code is comparing_code:
            is_failure = comparing_code is callsite.CLOSED_ON_FAILURE
            reporter = callsite.frame_among(callsite.HANDLE_ERROR, calling_frame=frame) if is_failure else frame
            if report := context.counted_in(reporter):
                return report.total
            budget = context.budget
        count: int = getattr(self._execute_for(context, Load(), budget).circuit, counter)
        return count

    def _admission_of(self, context: CallContext, frame: FrameType) -> Admission:
        """Return the admission of the call that a report is about.

        Args:
            context: Context of this thread.
            frame: Frame of the method of a state object that reports.
        """
        tag = self._admissions.tag_of(callsite.reporting_state(frame))
        if tag is not None:
            return tag.admission
        # By hand, or on a state object without a tag: the report is for now, and for the probe of this thread.
        self._tagged = BY_HAND
        circuit = self._execute_for(context, Load(), context.budget).circuit
        is_held = self._core.held_probes.is_held_here(circuit.probe_token)
        return Admission(circuit.generation, circuit.probe_token if is_held else "")


def made_transition(breaker: CircuitBreaker) -> bool:
    """Whether the breaker itself made the transition of which it notifies its listeners, on this thread.

    Otherwise the circuit was moved by another breaker, before this one read it, or at the same moment.
    """
    storage = breaker._state_storage
    is_refused = isinstance(storage, InferringStorage) and not storage._contexts.current().was_accepted
    return callsite.is_own_transition() and not is_refused
