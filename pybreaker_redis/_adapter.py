"""What does pybreaker mean by this get or set?

Knows: the call sequences of pybreaker 1.4.  Does not know: where the circuit lives.

An unmodified `CircuitBreaker` never says "I failed" or "I want to probe"; it reads and writes properties.  Which of
its methods does so gives the operation its meaning:

==========================  =======================================  ================================================
operation                   asked by                                 meaning
==========================  =======================================  ================================================
`state` read                a breaker, for a call                    admit: reports of this thread speak for this
                                                                     generation
`increment_counter`         `_handle_error()`                        the admitted call failed
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
from collections.abc import Callable
from datetime import datetime
from types import CodeType
from typing import cast

from pybreaker import CircuitBreakerError, CircuitBreakerStorage

from pybreaker_redis import _frames
from pybreaker_redis._arguments import check_state, lease_ms
from pybreaker_redis._caller import Caller
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import (
    HALF_OPEN,
    OPEN,
    Circuit,
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

_TAKEN = "Another caller is testing the dependency, circuit breaker still open"

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
        """``closed``, ``open`` or ``half-open``, the last only for the thread that is to probe.

        Raises:
            pybreaker.CircuitBreakerError: Asked for a call, while another thread probes through the same breaker.
        """
        if _frames.creates_breaker() and (unasked := self._state_unasked()):
            return unasked
        caller = self._caller
        reply = self._ask(caller, Load())
        state = self._state_for(caller, reply)
        breaker = _frames.reading_breaker()
        if breaker is None:
            return state
        if caller.telling:
            told = _frames.told_breakers()
            if breaker in told:
                # A listener reads `breaker.state`, which tells all listeners whenever the storage disagrees with the
                # breaker; that lasts until they have been told, so they would be told for ever.  Stock storages still
                # have the old state at this moment, or recurse.
                return breaker._state.name
            caller.telling = bool(told)
        for_a_call = _frames.reads_for_a_call(breaker)
        if state == OPEN and breaker._state.name == HALF_OPEN and self._is_probed(reply):
            # Another thread probes through this very breaker.  To say "open" would tell all listeners so, and that it
            # is half-open again at the next turn, though nothing has moved.
            if for_a_call:
                raise CircuitBreakerError(_TAKEN)
            return HALF_OPEN
        if state != OPEN and (for_a_call or not caller.in_flight):
            # Others than the breaker may read its state to call it, too; but not in the middle of a call.
            caller.admit(reply.circuit.generation, reply.circuit.probe_token)
            caller.in_flight = for_a_call
        return state

    @state.setter
    def state(self, state: str) -> None:
        check_state("state", state)
        if _frames.asker() not in (_frames.OPENS, _frames.HALF_OPENS, _frames.CLOSES):
            self._put(self._caller, state)

    def increment_counter(self) -> None:
        """Count a failure."""
        caller = self._caller
        if _frames.asker() is not _frames.REPORTS_FAILURE:
            self._ask(caller, RecordFailure(*BY_HAND))
            return
        caller.reported, caller.in_flight = self._admission(caller), False
        reply = self._ask(caller, RecordFailure(*caller.reported))
        caller.refused = not reply.accepted
        caller.count = reply.circuit.fail_counter if reply.accepted else 0

    def reset_counter(self) -> None:
        """Forget the failures."""
        caller = self._caller
        asker = _frames.asker()
        if asker is _frames.REPORTS_SUCCESS:
            caller.in_flight = False
            self._ask(caller, RecordSuccess(*self._admission(caller)))
        elif asker is _frames.BUILDS_CLOSED:
            caller.telling = True
        else:
            self._ask(caller, RecordSuccess(*BY_HAND))

    def increment_success_counter(self) -> None:
        """Count a success while half-open."""
        caller = self._caller
        if _frames.asker() is not _frames.COUNTS_PROBE:
            self._ask(caller, CountProbe(*BY_HAND, self._lease_ms))
            return
        reply = self._ask(caller, CountProbe(*self._admission(caller), self._lease_ms))
        caller.count = reply.circuit.success_counter if reply.accepted else 0

    def reset_success_counter(self) -> None:
        """Forget the successes that were collected while half-open.

        Raises:
            pybreaker.CircuitBreakerError: This was the way into half-open, and somebody else has the probe.
        """
        caller = self._caller
        asker = _frames.asker()
        if asker is _frames.CLOSES:
            probed = _frames.asked_through(_frames.COUNTS_PROBE)
            self._ask(caller, Close(*(self._admission(caller) if probed else BY_HAND)))
        elif asker is _frames.BUILDS_OPEN:
            if _frames.asked_through(_frames.OPENS):
                self._ask(caller, Trip(*caller.fence))
            caller.telling = True
        elif asker is _frames.BUILDS_HALF_OPEN:
            if _frames.asked_through(_frames.CHECKS_TIMEOUT):
                self._claim_probe(caller)
            elif _frames.asked_through(_frames.HALF_OPENS):
                self._ask(caller, ResetProbes())
                self._put(caller, HALF_OPEN)
            caller.telling = True
        else:
            self._ask(caller, ResetProbes())

    @property
    def counter(self) -> int:
        """Consecutive failures; to the breaker that compares with `fail_max`, the count that its own failure made."""
        return self._count(_frames.COMPARES_FAILURES, lambda circuit: circuit.fail_counter)

    @property
    def success_counter(self) -> int:
        """Consecutive successes while half-open; to the breaker that has just counted one, the count that it made."""
        return self._count(_frames.COUNTS_PROBE, lambda circuit: circuit.success_counter)

    @property
    def opened_at(self) -> datetime | None:
        """When the circuit opened last, aware, by the local clock; ``None`` if the gate stands open to a probe.

        While somebody else probes: the end of their lease.
        """
        caller = self._caller
        reply = self._ask(caller, Load())
        circuit = reply.circuit
        if _frames.asker() is _frames.CHECKS_TIMEOUT:
            caller.opened_generation = circuit.generation
        at_ms = circuit.opened_at_ms
        if circuit.state == HALF_OPEN and self._state_for(caller, reply) == OPEN:
            at_ms = circuit.probe_until_ms if self._is_probed(reply) else None
        return None if at_ms is None else from_ms(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime) -> None:
        caller = self._caller
        if _frames.asker() is not _frames.OPENS:
            if not isinstance(at, datetime):
                msg = f"opened_at must be a datetime, not {at!r}"
                raise TypeError(msg)
            self._ask(caller, self._set_opened_at(to_ms(at)))
            return
        failed = _frames.asked_through(_frames.COMPARES_FAILURES, _frames.PROBE_FAILED)
        if failed and caller.refused:
            # The failure came too late to count, so nothing trips; the caller gets their own exception.
            raise cast("BaseException", sys.exc_info()[1])
        caller.fence = caller.reported if failed else BY_HAND

    # Behind it ----------------------------------------------------------------------------------------------------

    def _ask(self, caller: Caller, intent: Intent) -> Reply:
        reply = self._execute(intent)
        if reply.event == "created" and reply.circuit.state == HALF_OPEN:
            # Whoever asked for a half-open circuit is its first prober, until somebody else claims.
            caller.half_open(reply.circuit.generation)
        return reply

    def _state_unasked(self) -> str | None:
        """What to tell a breaker under construction, if the circuit is not to be asked for that."""
        return None

    def _count(self, breakers: CodeType, read: Callable[[Circuit], int]) -> int:
        caller = self._caller
        count, caller.count = caller.count, None
        if count is not None and _frames.asker() is breakers:
            return count
        return read(self._ask(caller, Load()).circuit)

    def _put(self, caller: Caller, state: str) -> None:
        circuit = self._ask(caller, SetState(state)).circuit
        if state == HALF_OPEN:
            caller.half_open(circuit.generation)

    def _claim_probe(self, caller: Caller) -> None:
        token = secrets.token_hex(8)
        reply = self._ask(caller, ClaimProbe(caller.opened_generation, token, self._lease_ms))
        if not reply.accepted:
            raise CircuitBreakerError(_TAKEN)
        caller.claim(reply.circuit.generation, token)

    def _admission(self, caller: Caller) -> tuple[int, str]:
        """The generation and token that this thread's report speaks for."""
        if caller.generation is None:
            # A generator that finishes on a thread which never made a call: take it as of now.
            return self._ask(caller, Load()).circuit.generation, ""
        return caller.generation, caller.token

    def _is_probed(self, reply: Reply) -> bool:
        return reply.circuit.state == HALF_OPEN and not reply.circuit.probe_is_free(reply.now_ms)

    def _state_for(self, caller: Caller, reply: Reply) -> str:
        circuit = reply.circuit
        if circuit.state != HALF_OPEN:
            return circuit.state
        if not circuit.probe_token:
            return HALF_OPEN if caller.may_try(circuit.generation) else OPEN
        # A claim that has not admitted its call yet does so even if the lease has ended meanwhile: the report will be
        # fenced off if somebody else has claimed.  Later an ended lease has to be claimed anew.
        live = caller.fresh or reply.now_ms < circuit.probe_until_ms
        return HALF_OPEN if live and caller.holds(circuit.probe_token) else OPEN
