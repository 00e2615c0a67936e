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
so tells them, before it assigns `storage.state`.  In steady state nobody is asked anything: `_shortcut.py`.
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
from pybreaker_redis._admissions import BY_HAND, Admissions
from pybreaker_redis._arguments import check_state, lease_ms, shown
from pybreaker_redis._caller import Caller, Callers
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED, HALF_OPEN, OPEN, Admission, Circuit
from pybreaker_redis._clock import from_ms, to_ms
from pybreaker_redis._intents import (
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
from pybreaker_redis._shortcut import Shortcut

_TAKEN = "Another caller is testing the dependency, circuit breaker still open"


class IntentStorage(CircuitBreakerStorage):
    """pybreaker's storage interface over atomic intents, for any number of threads.

    Args:
        name: ``memory`` or ``redis``.
        probe_lease: Seconds until a probe that nobody reported on is offered again.
        shortcut: Kept true by whoever carries out the intents.
    """

    def __init__(self, name: str, probe_lease: float, shortcut: Shortcut) -> None:
        super().__init__(name)
        self._lease_ms = lease_ms(probe_lease)
        self._callers = Callers()
        self._shortcut = shortcut
        self._admissions = Admissions(shortcut)
        self._admitted = self._admissions.current

    def _execute(self, intent: Intent) -> Reply:
        """Carry out an intent where the circuit lives.  All times are by the local clock."""
        raise NotImplementedError

    def _look(self) -> Reply:
        """What is true of the circuit, all but the counters, as far as that is known without asking."""
        return self._execute(Load())

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``, the last only for the thread that is to probe.

        Raises:
            pybreaker.CircuitBreakerError: Asked for a call, while another thread probes through the same breaker.
        """
        shortcut = self._shortcut
        if self._admitted() is shortcut.admission and shortcut.now() < shortcut.until:
            shortcut.taken = True
            return CLOSED
        if self._admitted() is shortcut.rejection and shortcut.now() < shortcut.until and not _frames.created_breaker():
            shortcut.taken = True
            return OPEN
        return self._read_state()

    @state.setter
    def state(self, state: str) -> None:
        check_state("state", state)
        if _frames.asker() not in (_frames.OPENS, _frames.HALF_OPENS, _frames.CLOSES):
            self._ask(self._callers.current(), SetState(state))

    def increment_counter(self) -> None:
        """Count a failure."""
        caller = self._callers.current()
        if _frames.asker() is not _frames.REPORTS_FAILURE:
            self._ask(caller, RecordFailure(*BY_HAND))
            return
        caller.reported = self._reported_admission(caller)
        reply = self._ask(caller, RecordFailure(*caller.reported))
        caller.refused = not reply.accepted
        caller.count = reply.circuit.fail_counter if reply.accepted else 0

    def reset_counter(self) -> None:
        """Forget the failures."""
        shortcut = self._shortcut
        if self._admitted() is shortcut.quiet and shortcut.now() < shortcut.until:
            return
        caller = self._callers.current()
        if (asker := _frames.asker()) is _frames.REPORTS_SUCCESS:
            self._ask(caller, RecordSuccess(*self._reported_admission(caller)))
        elif asker is _frames.BUILDS_CLOSED:
            self._built(caller, CLOSED)
        else:
            self._ask(caller, RecordSuccess(*BY_HAND))

    def increment_success_counter(self) -> None:
        """Count a success while half-open."""
        caller = self._callers.current()
        if _frames.asker() is not _frames.COUNTS_PROBE:
            self._ask(caller, CountProbe(*BY_HAND, self._lease_ms))
            return
        reply = self._ask(caller, CountProbe(*self._reported_admission(caller), self._lease_ms))
        caller.count = reply.circuit.success_counter if reply.accepted else 0

    def reset_success_counter(self) -> None:
        """Forget the successes that were collected while half-open.

        Raises:
            pybreaker.CircuitBreakerError: This was the way into half-open, and somebody else has the probe.
        """
        caller = self._callers.current()
        if (asker := _frames.asker()) is _frames.CLOSES:
            probed = _frames.asked_through(_frames.COUNTS_PROBE)
            self._ask(caller, Close(*(self._reported_admission(caller) if probed else BY_HAND)))
        elif asker is _frames.BUILDS_OPEN:
            if _frames.asked_through(_frames.OPENS):
                self._ask(caller, Trip(*caller.fence))
            self._built(caller, OPEN)
        elif asker is _frames.BUILDS_HALF_OPEN:
            if _frames.asked_through(_frames.CHECKS_TIMEOUT):
                self._claim_probe(caller)
            elif _frames.asked_through(_frames.HALF_OPENS):
                self._ask(caller, ResetProbes())
                self._ask(caller, SetState(HALF_OPEN))
            self._built(caller, HALF_OPEN)
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
        caller = self._callers.current()
        reply = self._ask(caller)
        circuit = reply.circuit
        # Right before it claims the probe, whoever claims it reads this.
        caller.opened_generation = circuit.generation
        at_ms = circuit.opened_at_ms
        if circuit.state == HALF_OPEN and caller.sees(circuit, reply.now_ms) == OPEN:
            at_ms = circuit.probe_until_ms if circuit.is_probed(reply.now_ms) else None
        return None if at_ms is None else self._read_opened_at(at_ms)

    @opened_at.setter
    def opened_at(self, at: datetime | None) -> None:
        caller = self._callers.current()
        if _frames.asker() is not _frames.OPENS:
            self._ask(caller, self._say_opened_at(at))
            return
        failed = _frames.asked_through(_frames.COMPARES_FAILURES, _frames.PROBE_FAILED)
        if failed and caller.refused:
            # The failure came too late to count, so nothing trips; the caller gets their own exception.
            raise cast("BaseException", sys.exc_info()[1])
        caller.fence = caller.reported if failed else BY_HAND

    def _read_opened_at(self, at_ms: float) -> datetime:
        """Return the instant at which the circuit opened."""
        return from_ms(at_ms)

    def _say_opened_at(self, at: datetime | None) -> Intent:
        """Return the intent that sets when the circuit opened; a naive datetime is taken as UTC."""
        if not isinstance(at, datetime):
            msg = f"opened_at must be a datetime, not {shown(at)}"
            raise TypeError(msg)
        return SetOpenedAt(to_ms(at))

    def _read_state(self) -> str:
        if unasked := self._state_under_construction():
            return unasked
        caller = self._callers.current()
        breaker = _frames.reading_breaker()
        for_a_call = breaker is not None and _frames.reads_for_a_call(breaker)
        reply = self._ask(caller)
        if for_a_call:
            self._called()
        circuit = reply.circuit
        state = caller.sees(circuit, reply.now_ms)
        if breaker is None:
            return state
        self._admissions.know([breaker])
        if caller.telling:
            if breaker in (told := _frames.told_breakers()):
                # A listener reads `breaker.state`, which tells all listeners whenever the storage disagrees with the
                # breaker; that lasts until they have been told, so they would be told for ever.
                return breaker._state.name
            caller.telling = bool(told)
        if state == OPEN and breaker._state.name == HALF_OPEN and circuit.is_probed(reply.now_ms):
            # Another thread probes through this very breaker.  To say "open" would tell all listeners so, and that it
            # is half-open again at the next turn, though nothing has moved.
            if for_a_call:
                raise CircuitBreakerError(_TAKEN)
            return HALF_OPEN
        admission = self._admissions.to(circuit, noticed=breaker._state.name == state and not caller.telling)
        if state != OPEN:
            caller.looked = admission
        if for_a_call and (state != OPEN or admission is self._shortcut.rejection):
            self._admissions.admit(admission)
            caller.fresh = False
        return state

    def _built(self, caller: Caller, state: str) -> None:
        """A breaker is about to be in this state, whatever the circuit has become since the breaker asked."""
        self._admissions.know(_frames.told_breakers())
        self._shortcut.end_others(state)
        caller.telling = True

    def _state_under_construction(self) -> str | None:
        if (created := _frames.created_breaker()) is None:
            return None
        self._admissions.know([created])
        return self._state_unasked()

    def _called(self) -> None:
        """A breaker is about to make a guarded call in this process."""

    def _ask(self, caller: Caller, intent: Intent | None = None) -> Reply:
        reply = self._look() if intent is None else self._execute(intent)
        if not isinstance(intent, Load | None):
            caller.won = reply.accepted
        if reply.circuit.state == HALF_OPEN and (reply.event == "created" or isinstance(intent, SetState)):
            # Whoever asked for it is its first prober, until somebody else claims.
            caller.half_opened = reply.circuit.generation
        return reply

    def _state_unasked(self) -> str | None:
        """What to tell a breaker under construction, if the circuit is not to be asked for that."""
        return None

    def _count(self, breakers: CodeType, read: Callable[[Circuit], int]) -> int:
        caller = self._callers.current()
        count, caller.count = caller.count, None
        if count is not None and _frames.asker() is breakers:
            return count
        return read(self._ask(caller, Load()).circuit)

    def _claim_probe(self, caller: Caller) -> None:
        token = secrets.token_hex(8)
        if not self._ask(caller, ClaimProbe(caller.opened_generation, token, self._lease_ms)).accepted:
            raise CircuitBreakerError(_TAKEN)
        caller.claim(token)

    def _reported_admission(self, caller: Caller) -> Admission:
        """What this thread's report speaks for."""
        if _frames.called_past_breaker():
            # `breaker.state.call(…)`: admitted by nobody but the look at `breaker.state`.
            return caller.looked
        admission = self._admitted()
        if admission is BY_HAND:
            # A generator that finishes on a thread which never made a call: take it as of now.
            return Admission(self._ask(caller, Load()).circuit.generation)
        return admission
