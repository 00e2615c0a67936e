"""Reads of a circuit's `state`: which calls they admit, and what other readers see.

pybreaker reads `state` when it admits a call, and user code reads `state` for pages, checks and listeners.  Only a read
by `call()` admits.  While the breaker is half-open, that read claims the probe, because pybreaker makes no other
operation between two probes of a recovery.  Other reads never raise, and change nothing for calls
under way.
"""

from __future__ import annotations

import secrets
from types import FrameType

from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerStorage

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.admissions import Admissions, breaker_lock_if_free
from pybreaker_redis._adapter.call_context import CallContext, CallContexts
from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.core import CircuitCore
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import BY_HAND, HALF_OPEN, LEASE_MAX_MS, OPEN, Admission, Circuit
from pybreaker_redis._model.intents import ClaimProbe, Intent, Load, Reply, SetState
from pybreaker_redis._runtime.validation import checked_lease_ms

PROBE_TAKEN_MESSAGE = "Another caller is testing the dependency, circuit breaker still open"


class StateReads(CircuitBreakerStorage):
    """State of a circuit, as calls and observers read it.

    Args:
        name: Name that pybreaker's interface gives to the kind of storage: ``memory`` or ``redis``.
        probe_lease: Seconds until a probe without a report is offered again.
        core: The circuit.
    """

    def __init__(self, name: str, probe_lease: float, core: CircuitCore) -> None:
        super().__init__(name)
        self._core = core
        core.lease_ms = checked_lease_ms(probe_lease, LEASE_MAX_MS)
        self._contexts = CallContexts(core.held_probes)
        self._admissions = Admissions()
        #: Admission or rejection of the fast path, if the storage has one breaker, in a state that carries the same.
        self._tagged = BY_HAND

    def __bool__(self) -> bool:
        """Return True.  pybreaker's constructor evaluates ``state_storage or …``, so a breaker may be about to join."""
        self._tagged = BY_HAND
        return True

    def _read_state(self) -> str:
        if known := self._state_for_constructor():
            return known
        context = self._contexts.current()
        breaker = callsite.comparing_breaker()
        if breaker is None or not callsite.is_admission_read(breaker):
            reply = self._read_circuit(context, None)
            return context.visible_state(reply) if breaker is None else self._noticed_state(context, breaker, reply)
        # Once an open circuit's timeout is over, pybreaker calls a second time within the call: that is no new one.
        if not (context.budget.spent_s and callsite.frame_among(callsite.OPEN_BEFORE_CALL)):
            context.budget.begin_call()
        reply = self._read_circuit(context, context.budget)
        self._core.prepare_call(has_several_breakers=self._admissions.has_several_breakers)
        return self._noticed_state(context, breaker, reply, is_admission=True)

    def _noticed_state(
        self, context: CallContext, breaker: CircuitBreaker, reply: Reply, *, is_admission: bool = False
    ) -> str:
        """Return the state for a breaker that compares the state with its own.

        Args:
            context: Context of this thread.
            breaker: The breaker.
            reply: The circuit.
            is_admission: Whether the breaker admits a call by the read.
        """
        self._register(breaker)
        if context.is_notifying:
            if breaker in (notifying := callsite.notifying_breakers()):
                # A listener reads `breaker.state`.  pybreaker would notify the listeners again whenever the storage
                # disagrees with the breaker, so without end.
                return breaker._state.name
            context.is_notifying = bool(notifying)
        if is_admission:
            reply = self._admitted_to_probe(context, breaker, reply)
        circuit = reply.circuit
        state = context.visible_state(reply)
        if circuit.state == HALF_OPEN and breaker._state.name == HALF_OPEN:
            # Between two probes, and while another call probes, a half-open breaker stays half-open.
            return HALF_OPEN
        context.last_seen = Admission(circuit.generation, circuit.probe_token)
        with breaker_lock_if_free(breaker) as is_free:
            if breaker._state.name == state and (is_free or is_admission):
                self._retag(breaker, context.last_seen)
                if is_free and not context.is_notifying:
                    self._open_fast_path(circuit)
        context.rejected_reply = reply if is_admission and state == OPEN and self._tagged is BY_HAND else None
        return state

    def _admitted_to_probe(self, context: CallContext, breaker: CircuitBreaker, reply: Reply) -> Reply:
        """Return the circuit once a call is admitted to a half-open circuit: the call holds the probe.

        Raises:
            pybreaker.CircuitBreakerError: Another call holds the probe.
        """
        circuit = reply.circuit
        is_half_open = breaker._state.name == HALF_OPEN
        if circuit.state != HALF_OPEN or not (is_half_open or context.visible_state(reply) == HALF_OPEN):
            return reply
        tag = self._admissions.tag_of(breaker._state)
        if is_half_open and tag and tag.admission.token == circuit.probe_token and (claimer := tag.use_claim()):
            # Claimed a moment ago.  If the lease has ended since and another caller has claimed, the report is refused.
            if claimer is not context:
                self._core.held_probes.claim(circuit.probe_token)
            return reply
        is_leased = circuit.is_probe_leased(reply.now_ms)
        if is_leased and self._core.held_probes.is_held_here(circuit.probe_token):
            # A call within the probe is part of the probe.
            return self._with_admission(context, breaker, reply)
        if not is_leased:
            claim = self._claim_probe(context, circuit)
            if claim.accepted or claim.circuit.state != HALF_OPEN:
                return self._with_admission(context, breaker, claim)
        raise CircuitBreakerError(PROBE_TAKEN_MESSAGE)

    def _with_admission(self, context: CallContext, breaker: CircuitBreaker, reply: Reply) -> Reply:
        circuit = reply.circuit
        context.last_seen = Admission(circuit.generation, circuit.probe_token)
        if breaker._state.name == circuit.state:
            self._retag(breaker, context.last_seen)
        return reply

    def _retag(self, breaker: CircuitBreaker, admission: Admission) -> None:
        if self._admissions.retag(breaker, admission):
            self._tagged = BY_HAND

    def _open_fast_path(self, circuit: Circuit) -> None:
        """Open the fast path to calls through the storage's only breaker.  Its state object carries the admission."""
        fast_path = self._core.fast_path
        for_all = fast_path.admission or fast_path.rejection
        if (
            for_all is not None
            and for_all.generation == circuit.generation
            and not self._admissions.has_several_breakers
        ):
            self._tagged = for_all

    def _tag_new_state(self, context: CallContext, frame: FrameType, *, claims: bool = False) -> None:
        """Tag the state object under construction in a frame, whatever the circuit has become since the breaker read.

        Args:
            context: Context of this thread.
            frame: Frame of the constructor.
            claims: Whether the next call on the state object uses a claim of this thread.
        """
        state = frame.f_locals["self"]
        self._register(state._breaker)
        self._tagged = BY_HAND
        self._core.fast_path.keep_only(state.name)
        self._admissions.tag(state, context.last_seen, claimer=context if claims else None)
        context.is_notifying = True

    def _register(self, breaker: CircuitBreaker) -> None:
        if self._admissions.add_breaker(breaker):
            self._tagged = BY_HAND

    def _state_for_constructor(self) -> str | None:
        if (created := callsite.breaker_under_construction()) is None:
            return None
        self._register(created)
        return self._core.state_for_constructor

    def _read_circuit(self, context: CallContext, budget: CallBudget | None) -> Reply:
        """Return the circuit, all but the counters, without a request where that is possible."""
        return self._core.read_without_request() or self._execute_for(context, Load(), budget)

    def _execute_for(self, context: CallContext, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """Carry out an intent, and note what this thread learned.

        Args:
            context: Context of this thread.
            intent: Wanted change, or `Load`.
            budget: Time budget of the call that the intent belongs to.  ``None``: to no call, as what is done by hand.
        """
        # An intent without an admission belongs to no call.
        reply = self._core.carry_out(intent, None if getattr(intent, "generation", 0) is None else budget)
        circuit = reply.circuit
        if not isinstance(intent, Load):
            context.was_accepted = reply.accepted
            context.last_seen = Admission(circuit.generation, circuit.probe_token)
        if circuit.state == HALF_OPEN and (reply.repair_note == "created" or isinstance(intent, SetState)):
            # The caller that read the state is its first prober, until another one claims.
            context.half_opened_generation = circuit.generation
        return reply

    def _claim_probe(self, context: CallContext, circuit: Circuit) -> Reply:
        # The token is a new one: a late report of the call that had the probe must not count for this call.
        instead = circuit.probe_token if PROBE_TOKENS.take(circuit.probe_token) else ""
        token = secrets.token_hex(8)
        intent = ClaimProbe(circuit.generation, token, self._core.lease_ms, instead)
        reply = self._execute_for(context, intent, context.budget)
        if reply.accepted:
            self._core.held_probes.claim(token)
        return reply
