"""What does pybreaker mean by this get or set?

Knows: the call sequences of pybreaker 1.4.  Does not know: where the circuit lives.

An unmodified `CircuitBreaker` never says "I failed" or "I want to probe"; it reads and writes properties.  Which of
its methods does so gives the operation its meaning:

==========================  =======================================  ================================================
operation                   asked by                                 meaning
==========================  =======================================  ================================================
`state` read                `call()`                                 admit: the state object carries the admission,
                                                                     and half-open the claim of the probe
`state` read                anything else                            look
`increment_counter`         `_handle_error()`                        the call failed that the state object admitted
`reset_counter`             `_handle_success()`                      that call succeeded
`reset_counter`             a closed state being built               noticed, or closing, which is already done: nothing
`increment_success_…`       a half-open state                        the probe succeeded
`opened_at` set             `open()`                                 the trip begins; a failure that was refused ends it
`reset_success_counter`     an open state, built by `open()`         the trip
`reset_success_counter`     a half-open state, built because an      claim the probe
                            open one has found its timeout over
`reset_success_counter`     a half-open state, built by              half-open by hand
                            `half_open()` for an operator
`reset_success_counter`     `close()`                                close
`reset_success_counter`     any other state being built              noticed: nothing
`state` set                 `open()`, `half_open()`, `close()`       the echo of what is already done: nothing
any                         anybody else                             by hand: literally that
==========================  =======================================  ================================================

Trip, claim, close and half-open are committed before pybreaker runs its listeners: it builds the new state object, and
so tells them, before it assigns `storage.state`.  In steady state nobody is asked anything: `_model/fast_path.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from types import CodeType, FrameType
from typing import cast

from pybreaker import CircuitBreakerError

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.call_context import CallContext, CountedReport
from pybreaker_redis._adapter.state_reads import PROBE_TAKEN_MESSAGE, StateReads
from pybreaker_redis._model.circuit import BY_HAND, COUNT_LIMIT, HALF_OPEN, OPEN, Admission, Circuit
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
from pybreaker_redis._runtime.validation import format_value


class InferringStorage(StateReads):
    """pybreaker's storage interface over atomic intents, for any number of threads.

    See `Gate` for the arguments.
    """

    def increment_counter(self) -> None:
        """Count a failure."""
        caller, frame = self._callers.current(), callsite.calling_frame()
        if frame is None or frame.f_code is not callsite.REPORTS_FAILURE:
            self._execute_for(caller, RecordFailure(*BY_HAND))
            return
        admission = self._admission_of(caller, frame)
        self._report(caller, frame, RecordFailure(*admission), lambda circuit: circuit.fail_counter)

    def reset_counter(self) -> None:
        """Forget the failures."""
        fast_path = self._shortcut
        # Where there is nothing to forget, a success changes nothing, however late it comes.
        if self._tagged is fast_path.quiet_admission and fast_path.now() < fast_path.trusted_until:
            return
        caller, frame = self._callers.current(), callsite.calling_frame()
        if frame is None or frame.f_code not in (callsite.REPORTS_SUCCESS, callsite.BUILDS_CLOSED):
            self._execute_for(caller, RecordSuccess(*BY_HAND))
        elif frame.f_code is callsite.REPORTS_SUCCESS:
            self._execute_for(caller, RecordSuccess(*self._admission_of(caller, frame)))
        else:
            self._tag_new_state(caller, frame)

    def increment_success_counter(self) -> None:
        """Count a success while half-open."""
        caller, frame = self._callers.current(), callsite.calling_frame()
        if frame is None or frame.f_code is not callsite.COUNTS_PROBE:
            self._execute_for(caller, CountProbe(*BY_HAND, self._lease_ms))
            return
        state = frame.f_locals["self"]
        threshold = math.ceil(min(COUNT_LIMIT, state._breaker.success_threshold))
        admission = self._admission_of(caller, frame)
        intent = CountProbe(*admission, self._lease_ms, threshold)
        reply = self._report(caller, frame, intent, lambda circuit: circuit.success_counter)
        if reply.accepted and not reply.circuit.probe_token:
            # Given back: what is still called on this state object, past the breaker, speaks for the generation alone.
            caller.half_opened_generation = admission.generation
            self._admissions.issue(state, Admission(admission.generation))

    def reset_success_counter(self) -> None:
        """Forget the successes that were collected while half-open.

        Raises:
            pybreaker.CircuitBreakerError: This was the way into half-open, and somebody else has the probe.
        """
        caller, frame = self._callers.current(), callsite.calling_frame()
        caller_code = frame.f_code if frame else None
        if caller_code is callsite.CLOSES:
            # The closed state that is built next needs a ticket, even if the circuit was closed.
            self._tagged = BY_HAND
            probed = callsite.frame_among(callsite.COUNTS_PROBE)
            self._execute_for(caller, Close(*(self._admission_of(caller, probed) if probed else BY_HAND)))
        elif frame is not None and caller_code is callsite.BUILDS_OPEN:
            if callsite.frame_among(callsite.OPENS):
                fence, caller.trip_admission = caller.trip_admission, BY_HAND
                self._execute_for(caller, Trip(*fence))
            self._tag_new_state(caller, frame)
        elif frame is not None and caller_code is callsite.BUILDS_HALF_OPEN:
            claims = callsite.frame_among(callsite.CHECKS_TIMEOUT) is not None
            if claims:
                if not self._claim_probe(caller, caller.seen_open).accepted:
                    raise CircuitBreakerError(PROBE_TAKEN_MESSAGE)
            elif callsite.frame_among(callsite.HALF_OPENS):
                self._execute_for(caller, ResetProbes())
                self._execute_for(caller, SetState(HALF_OPEN))
            self._tag_new_state(caller, frame, claims=claims)
        else:
            self._execute_for(caller, ResetProbes())

    @property
    def counter(self) -> int:
        """Consecutive failures; to the breaker that compares with `fail_max`, the count that its own failure made."""
        return self._count(callsite.COMPARES_FAILURES, lambda circuit: circuit.fail_counter)

    @property
    def success_counter(self) -> int:
        """Consecutive successes while half-open; to the breaker that has just counted one, the count that it made."""
        return self._count(callsite.COUNTS_PROBE, lambda circuit: circuit.success_counter)

    @property
    def opened_at(self) -> datetime | None:
        """When the circuit opened last, aware, by the local clock; ``None`` if the gate stands open to a probe.

        While somebody else probes: the end of their lease.
        """
        caller = self._callers.current()
        rejected, caller.rejected_reply = caller.rejected_reply, None
        # The call that is about to be rejected has just looked: one look is enough for both of its questions.
        reply = (
            rejected if rejected and callsite.caller_code() is callsite.CHECKS_TIMEOUT else self._execute_for(caller)
        )
        circuit = reply.circuit
        # Right before it claims the probe, whoever claims it reads this.
        caller.seen_open = circuit
        at_ms = circuit.opened_at_ms
        if circuit.state == HALF_OPEN and caller.visible_state(circuit, reply.now_ms) == OPEN:
            at_ms = circuit.probe_until_ms if circuit.is_probe_leased(reply.now_ms) else None
        return None if at_ms is None else self._read_opened_at(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime | None) -> None:
        caller = self._callers.current()
        if callsite.caller_code() is not callsite.OPENS:
            self._execute_for(caller, self._say_opened_at(at))
            return
        failed = callsite.frame_among(callsite.COMPARES_FAILURES, callsite.PROBE_FAILED)
        failure = callsite.frame_among(callsite.REPORTS_FAILURE) if failed else None
        report = caller.counted_in(failure)
        if failure is not None and report is not None and not report.accepted:
            # The failure came too late to count, so nothing trips; the caller gets their own exception.
            raise cast("BaseException", failure.f_locals["exc"])
        # `on_failure()` by hand trips as `open()` by hand does.
        caller.trip_admission = (
            report.admission if report else self._admission_of(caller, failure) if failure else BY_HAND
        )

    def _read_opened_at(self, at_ms: float) -> datetime:
        """Return the instant at which the circuit opened."""
        return utc_from_ms(at_ms)

    def _say_opened_at(self, at: datetime | None) -> Intent:
        """Return the intent that sets when the circuit opened; a naive datetime is taken as UTC."""
        if not isinstance(at, datetime):
            msg = f"opened_at must be a datetime, not {format_value(at)}"
            raise TypeError(msg)
        return SetOpenedAt(ms_from_utc(at))

    def _report(
        self, caller: CallContext, frame: FrameType, intent: FencedIntent, count: Callable[[Circuit], int]
    ) -> Reply:
        reply = self._execute_for(caller, intent)
        counted = count(reply.circuit) if reply.accepted else 0
        caller.counted = CountedReport(id(frame), Admission(intent.generation, intent.token), reply.accepted, counted)
        if not reply.accepted:
            # Later calls need a state object of the circuit's present generation.
            self._tagged = BY_HAND
        return reply

    def _count(self, breakers: CodeType, read: Callable[[Circuit], int]) -> int:
        caller, frame = self._callers.current(), callsite.calling_frame()
        if frame is not None and frame.f_code is breakers:
            is_failure = breakers is callsite.COMPARES_FAILURES
            reporter = callsite.frame_among(callsite.REPORTS_FAILURE, calling_frame=frame) if is_failure else frame
            if report := caller.counted_in(reporter):
                return report.total
        return read(self._execute_for(caller, Load()).circuit)

    def _admission_of(self, caller: CallContext, frame: FrameType) -> Admission:
        """What a report speaks for.

        Args:
            caller: Of this thread.
            frame: Of the method of a state object that reports.
        """
        state = callsite.reporting_state(frame)
        ticket = self._admissions.ticket(state)
        if ticket is not None:
            return ticket.admission
        # By hand, or on a state object without a ticket: it speaks for now, and for the probe of this thread.
        self._tagged = BY_HAND
        circuit = self._execute_for(caller, Load()).circuit
        return Admission(circuit.generation, circuit.probe_token if caller.holds(circuit) else "")
