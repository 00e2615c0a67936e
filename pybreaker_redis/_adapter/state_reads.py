"""Reads and writes of a circuit's `state`: which call they admit, and what a mere look sees.

Knows: breakers and their state objects, claims.  Does not know: how calls end.

pybreaker reads `state` when it admits a call, and user code reads it for pages, checks and listeners.  Only a read by
`call()` admits.  While the breaker is half-open, that read claims the probe: between two probes of a recovery pybreaker
does nothing else from which a claim could follow.  Other reads never raise, and change nothing for calls under way.
"""

from __future__ import annotations

import secrets
from types import FrameType

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerStorage

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.admissions import Admissions, breaker_lock_if_free
from pybreaker_redis._adapter.call_context import CallContext, CallContexts
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import BY_HAND, CLOSED, HALF_OPEN, LEASE_MAX_MS, OPEN, STATES, Admission, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import ClaimProbe, Intent, Load, Reply, SetState
from pybreaker_redis._runtime.validation import check_choice, checked_lease_ms

PROBE_TAKEN_MESSAGE = "Another caller is testing the dependency, circuit breaker still open"


class StateReads(CircuitBreakerStorage):
    """The state of a circuit, as calls and observers read it.

    Args:
        name: ``memory`` or ``redis``.
        probe_lease: Seconds until a probe without a report is offered again.
        fast_path: Kept true by the carrier of the intents.
    """

    def __init__(self, name: str, probe_lease: float, fast_path: FastPath) -> None:
        super().__init__(name)
        self._lease_ms = checked_lease_ms(probe_lease, LEASE_MAX_MS)
        self._callers = CallContexts()
        self._shortcut = fast_path
        self._admissions = Admissions()
        #: The shortcut's admission or rejection if the storage has one breaker, in a state that carries the same.
        self._tagged = BY_HAND

    def __bool__(self) -> bool:
        """True; pybreaker's constructor evaluates ``state_storage or …``, so a breaker may be about to join."""
        self._tagged = BY_HAND
        return True

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
            pybreaker.CircuitBreakerError: Read by `CircuitBreaker.call()`, while another call probes.
        """
        fast_path, carried = self._shortcut, self._tagged
        if carried is fast_path.admission and fast_path.now() < fast_path.trusted_until:
            fast_path.was_used = True
            return CLOSED
        if carried is fast_path.rejection and fast_path.now() < fast_path.trusted_until:
            fast_path.was_used = True
            return OPEN
        return self._read_state()

    @state.setter
    def state(self, state: str) -> None:
        check_choice("state", state, STATES)
        if callsite.caller_code() not in (callsite.OPENS, callsite.HALF_OPENS, callsite.CLOSES):
            self._execute_for(self._callers.current(), SetState(state))

    def _read_state(self) -> str:
        if unasked := self._state_for_constructor():
            return unasked
        caller = self._callers.current()
        breaker = callsite.comparing_breaker()
        for_a_call = breaker is not None and callsite.is_admission_read(breaker)
        reply = self._read_circuit(caller, for_a_call=for_a_call)
        if for_a_call:
            self._before_guarded_call()
        if breaker is None:
            return caller.visible_state(reply.circuit, reply.now_ms)
        self._note(breaker)
        if caller.is_notifying:
            if breaker in (told := callsite.notifying_breakers()):
                # A listener reads `breaker.state`, which tells all listeners whenever the storage disagrees with the
                # breaker; that lasts until they have been told, so they would be told for ever.
                return breaker._state.name
            caller.is_notifying = bool(told)
        if for_a_call:
            reply = self._admitted_to_probe(caller, breaker, reply)
        circuit = reply.circuit
        state = caller.visible_state(circuit, reply.now_ms)
        if circuit.state == HALF_OPEN and breaker._state.name == HALF_OPEN:
            # Between two probes, and while another call probes, a half-open breaker stays so: nothing has moved.
            return HALF_OPEN
        caller.last_seen = Admission(circuit.generation, circuit.probe_token)
        with breaker_lock_if_free(breaker) as is_free:
            if breaker._state.name == state and (is_free or for_a_call):
                self._renew(breaker, caller.last_seen)
                if is_free and not caller.is_notifying:
                    self._take_shortcut(circuit)
        caller.rejected_reply = reply if for_a_call and state == OPEN and self._tagged is BY_HAND else None
        return state

    def _admitted_to_probe(self, caller: CallContext, breaker: CircuitBreaker, reply: Reply) -> Reply:
        """Return what is true once a call is admitted to a half-open circuit: it holds the probe.

        Raises:
            pybreaker.CircuitBreakerError: Another call holds it.
        """
        circuit = reply.circuit
        is_half_open = breaker._state.name == HALF_OPEN
        if circuit.state != HALF_OPEN or not (is_half_open or caller.visible_state(circuit, reply.now_ms) == HALF_OPEN):
            return reply
        ticket = self._admissions.ticket(breaker._state)
        if is_half_open and ticket and ticket.admission.token == circuit.probe_token and (claimer := ticket.use()):
            # Claimed a moment ago.  If the lease has ended since and another caller has claimed, the report is refused.
            caller.take_over_claim(claimer, circuit)
            return reply
        if caller.holds(circuit) and circuit.is_probe_leased(reply.now_ms):
            # A call within the probe is part of it.
            return self._with_admission(caller, breaker, reply)
        if not circuit.is_probe_leased(reply.now_ms):
            claim = self._claim_probe(caller, circuit)
            if claim.accepted or claim.circuit.state != HALF_OPEN:
                return self._with_admission(caller, breaker, claim)
        raise CircuitBreakerError(PROBE_TAKEN_MESSAGE)

    def _with_admission(self, caller: CallContext, breaker: CircuitBreaker, reply: Reply) -> Reply:
        circuit = reply.circuit
        caller.last_seen = Admission(circuit.generation, circuit.probe_token)
        if breaker._state.name == circuit.state:
            self._renew(breaker, caller.last_seen)
        return reply

    def _renew(self, breaker: CircuitBreaker, admission: Admission) -> None:
        if self._admissions.renew(breaker, admission):
            self._tagged = BY_HAND

    def _take_shortcut(self, circuit: Circuit) -> None:
        """Open the shortcut to calls through the storage's only breaker, whose state object carries the admission."""
        everybodys = self._shortcut.admission or self._shortcut.rejection
        if (
            everybodys is not None
            and everybodys.generation == circuit.generation
            and not self._admissions.has_several_breakers
        ):
            self._tagged = everybodys

    def _tag_new_state(self, caller: CallContext, frame: FrameType, *, claims: bool = False) -> None:
        """A breaker is about to be in this state, whatever the circuit has become since the breaker asked."""
        state = frame.f_locals["self"]
        self._note(state._breaker)
        self._tagged = BY_HAND
        self._shortcut.keep_only(state.name)
        self._admissions.issue(state, caller.last_seen, claimer=caller if claims else None)
        caller.is_notifying = True

    def _note(self, breaker: CircuitBreaker) -> None:
        if self._admissions.note(breaker):
            self._tagged = BY_HAND

    def _state_for_constructor(self) -> str | None:
        if (created := callsite.breaker_under_construction()) is None:
            return None
        self._note(created)
        return self._state_without_query()

    def _read_circuit(self, caller: CallContext, *, for_a_call: bool) -> Reply:
        """Return what a read of `state` sees."""
        return self._execute_for(caller)

    def _before_guarded_call(self) -> None:
        """A breaker is about to make a guarded call in this process."""

    def _execute_for(self, caller: CallContext, intent: Intent | None = None) -> Reply:
        reply = self._look() if intent is None else self._execute(intent)
        circuit = reply.circuit
        if not isinstance(intent, Load | None):
            caller.was_granted = reply.accepted
            caller.last_seen = Admission(circuit.generation, circuit.probe_token)
        if circuit.state == HALF_OPEN and (reply.repair_note == "created" or isinstance(intent, SetState)):
            # The caller that asked for it is its first prober, until another one claims.
            caller.half_opened_generation = circuit.generation
        return reply

    def _state_without_query(self) -> str | None:
        """What to tell a breaker under construction, if the circuit is not to be asked for that."""
        return None

    def _claim_probe(self, caller: CallContext, circuit: Circuit) -> Reply:
        # A late report of the call that had the probe must not count for this one: the token is a new one.
        instead = circuit.probe_token if PROBE_TOKENS.take(circuit.probe_token) else ""
        token = secrets.token_hex(8)
        reply = self._execute_for(caller, ClaimProbe(circuit.generation, token, self._lease_ms, instead))
        if reply.accepted:
            caller.claim(token)
        return reply
