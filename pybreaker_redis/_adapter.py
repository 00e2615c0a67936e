"""What does pybreaker mean by this get or set?

Knows: the call sequences of pybreaker 1.4.  Does not know: where the circuit lives.

An unmodified `CircuitBreaker` never says "I failed" or "I want to probe"; it reads and writes properties.  Which of
its methods does so gives the operation its meaning:

==========================  =======================================  ================================================
operation                   asked by                                 meaning
==========================  =======================================  ================================================
`state` read                `call()`                                 admit: reports of this thread speak for this
                                                                     generation
`increment_counter`         `_inc_counter()`                         the admitted call failed
`reset_counter`             `_handle_success()`                      the admitted call succeeded
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
so tells them, before it assigns `storage.state`.
"""

from __future__ import annotations

import secrets
import sys
from datetime import datetime
from typing import cast

from pybreaker import CircuitBreakerError, CircuitBreakerStorage

from pybreaker_redis import _frames
from pybreaker_redis._caller import Caller
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import (
    HALF_OPEN,
    MAX_LEASE_MS,
    OPEN,
    STATES,
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    ResetProbes,
    SetOpenedAt,
    SetState,
    Trip,
)
from pybreaker_redis._clock import from_ms, to_ms

#: Generation and token of what nobody was admitted for.
BY_HAND = (None, "")


class IntentStorage(CircuitBreakerStorage):
    """pybreaker's storage interface over atomic intents, for any number of threads.

    Attributes:
        name: ``memory`` or ``redis``.
    """

    def __init__(self, name: str, probe_lease: float) -> None:
        super().__init__(name)
        self._lease_ms = lease_ms(probe_lease)
        self._caller = Caller()

    def _execute(self, intent: Intent) -> Reply:
        """Carry out an intent where the circuit lives.  All times are by the local clock."""
        raise NotImplementedError

    def _set_opened_at(self, at_ms: float) -> Intent:
        return SetOpenedAt(at_ms)

    # The interface ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``, the last only for the thread that is to probe."""
        caller = self._caller
        reply = self._ask(caller, Load())
        state = self._state_for(caller, reply)
        if caller.telling:
            breaker = _frames.breaker_that_tells()
            if breaker is None:
                caller.telling = False
            elif _frames.compares_state("state", breaker):
                # A listener reads `breaker.state`, which tells all listeners whenever the storage disagrees with the
                # breaker; that lasts until they have been told, so they would be told for ever.  Stock storages still
                # have the old state at this moment, or recurse.
                return str(breaker._state.name)
        if state != OPEN and _frames.asks_for_a_call("state"):
            caller.admit(reply.circuit.generation, reply.circuit.probe_token)
        return state

    @state.setter
    def state(self, state: str) -> None:
        caller = self._caller
        check_state("state", state)
        if _frames.asker("state") in (_frames.OPENS, _frames.HALF_OPENS, _frames.CLOSES):
            return
        self._put(caller, state)

    def increment_counter(self) -> None:
        """Count a failure."""
        caller = self._caller
        if _frames.asker("increment_counter") is not _frames.COUNTS_FAILURE:
            self._ask(caller, RecordFailure(*BY_HAND))
            return
        caller.fence = self._admission(caller)
        reply = self._ask(caller, RecordFailure(*caller.fence))
        caller.refused, caller.fresh = not reply.accepted, False
        caller.count = reply.circuit.fail_counter if reply.accepted else 0

    def reset_counter(self) -> None:
        """Forget the failures."""
        caller = self._caller
        asker = _frames.asker("reset_counter")
        if asker is _frames.REPORTS_SUCCESS:
            self._ask(caller, RecordSuccess(*self._admission(caller)))
        elif asker is _frames.BUILDS_CLOSED:
            caller.telling = True
        else:
            self._ask(caller, RecordSuccess(*BY_HAND))

    def increment_success_counter(self) -> None:
        """Count a success while half-open."""
        caller = self._caller
        if _frames.asker("increment_success_counter") is not _frames.COUNTS_PROBE:
            self._ask(caller, CountProbe(*BY_HAND, self._lease_ms))
            return
        reply = self._ask(caller, CountProbe(*self._admission(caller), self._lease_ms))
        caller.fresh = False
        caller.count = reply.circuit.success_counter if reply.accepted else 0

    def reset_success_counter(self) -> None:
        """Forget the successes that were collected while half-open.

        Raises:
            pybreaker.CircuitBreakerError: This was the way into half-open, and somebody else has the probe.
        """
        caller = self._caller
        asker = _frames.asker("reset_success_counter")
        if asker is _frames.CLOSES:
            probed = _frames.asked_through("reset_success_counter", _frames.COUNTS_PROBE)
            self._ask(caller, Close(*(self._admission(caller) if probed else BY_HAND)))
        elif asker is _frames.BUILDS_OPEN:
            if _frames.asked_through("reset_success_counter", _frames.OPENS):
                self._ask(caller, Trip(*caller.fence))
            caller.telling = True
        elif asker is _frames.BUILDS_HALF_OPEN:
            if _frames.asked_through("reset_success_counter", _frames.CHECKS_TIMEOUT):
                self._claim_probe(caller)
            elif _frames.asked_through("reset_success_counter", _frames.HALF_OPENS):
                self._ask(caller, ResetProbes())
                self._put(caller, HALF_OPEN)
            caller.telling = True
        else:
            self._ask(caller, ResetProbes())

    @property
    def counter(self) -> int:
        """Consecutive failures; to the breaker that compares with `fail_max`, the count that its own failure made."""
        caller = self._caller
        if _frames.asker("counter") is _frames.COMPARES_FAILURES:
            return caller.count
        return self._ask(caller, Load()).circuit.fail_counter

    @property
    def success_counter(self) -> int:
        """Consecutive successes while half-open; to the breaker that has just counted one, the count that it made."""
        caller = self._caller
        if _frames.asker("success_counter") is _frames.COUNTS_PROBE:
            return caller.count
        return self._ask(caller, Load()).circuit.success_counter

    @property
    def opened_at(self) -> datetime | None:
        """When the circuit opened last, aware, by the local clock; ``None`` if the gate stands open to a probe.

        While somebody else probes: the end of their lease.
        """
        caller = self._caller
        reply = self._ask(caller, Load())
        circuit = reply.circuit
        if _frames.asker("opened_at") is _frames.CHECKS_TIMEOUT:
            caller.opened_generation = circuit.generation
        at_ms = circuit.opened_at_ms
        if circuit.state == HALF_OPEN and self._state_for(caller, reply) == OPEN:
            at_ms = None if circuit.probe_is_free(reply.now_ms) else circuit.probe_until_ms
        return None if at_ms is None else from_ms(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime) -> None:
        caller = self._caller
        if _frames.asker("opened_at") is not _frames.OPENS:
            if not isinstance(at, datetime):
                msg = f"opened_at must be a datetime, not {at!r}"
                raise TypeError(msg)
            self._ask(caller, self._set_opened_at(to_ms(at)))
            return
        if not _frames.asked_through("opened_at", _frames.COMPARES_FAILURES, _frames.PROBE_FAILED):
            caller.fence = BY_HAND
        elif caller.refused:
            # The failure came too late to count, so nothing trips; the caller gets their own exception.
            raise cast("BaseException", sys.exc_info()[1])

    # Behind it ----------------------------------------------------------------------------------------------------

    def _ask(self, caller: Caller, intent: Intent) -> Reply:
        reply = self._execute(intent)
        if reply.event == "created" and reply.circuit.state == HALF_OPEN:
            # Whoever asked for a half-open circuit is its first prober, until somebody else claims.
            caller.half_opened = reply.circuit.generation
        return reply

    def _put(self, caller: Caller, state: str) -> None:
        circuit = self._ask(caller, SetState(state)).circuit
        if state == HALF_OPEN:
            caller.half_opened = circuit.generation

    def _claim_probe(self, caller: Caller) -> None:
        token = secrets.token_hex(8)
        reply = self._ask(caller, ClaimProbe(caller.opened_generation, token, self._lease_ms))
        if not reply.accepted:
            msg = "Another caller is testing the dependency, circuit breaker still open"
            raise CircuitBreakerError(msg)
        caller.claim(reply.circuit.generation, token)

    def _admission(self, caller: Caller) -> tuple[int, str]:
        """The generation and token that this thread's report speaks for."""
        if caller.generation is None:
            # A generator that finishes on a thread which never made a call: take it as of now.
            return self._ask(caller, Load()).circuit.generation, ""
        return caller.generation, caller.token

    def _state_for(self, caller: Caller, reply: Reply) -> str:
        circuit = reply.circuit
        if circuit.state != HALF_OPEN:
            return circuit.state
        if not circuit.probe_token:
            return HALF_OPEN if caller.half_opened == circuit.generation else OPEN
        # A claim that was never reported on admits its call even if the lease ended meanwhile: the report will be
        # fenced off if somebody else has claimed.  Between probes an ended lease has to be claimed anew.
        live = caller.fresh or reply.now_ms < circuit.probe_until_ms
        return HALF_OPEN if live and caller.holds(circuit.probe_token) else OPEN


def check_state(argument: str, state: str) -> None:
    """Refuse a state that pybreaker does not know, naming the argument."""
    if state not in STATES:
        msg = f"{argument} must be one of {', '.join(map(repr, STATES))}, not {state!r}"
        raise ValueError(msg)


def lease_ms(probe_lease: float) -> int:
    """Validate a lease in seconds; whole milliseconds."""
    if isinstance(probe_lease, bool) or not isinstance(probe_lease, (int, float)):
        msg = f"probe_lease must be a number of seconds, not {probe_lease!r}"
        raise TypeError(msg)
    if not 1 <= probe_lease * 1000 <= MAX_LEASE_MS:
        msg = f"probe_lease must lie between 0.001 and {MAX_LEASE_MS // 1000} seconds, not {probe_lease!r}"
        raise ValueError(msg)
    return round(probe_lease * 1000)
