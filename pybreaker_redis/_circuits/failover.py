"""Circuit in Redis, with a local circuit for the time in which Redis cannot be used.

The shared circuit answers as long as Redis does.  A guarded call waits for Redis at most for its timeout.  No error of
Redis reaches the call: the local circuit answers instead.
"""

from __future__ import annotations

import sys
from functools import partial

from pybreaker_redis._circuits.budget import CallBudget, operator_timeout_s, operator_wait
from pybreaker_redis._circuits.membership import MemberCircuit
from pybreaker_redis._circuits.mode import LOCAL_MODES, Mode
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import HALF_OPEN
from pybreaker_redis._model.intents import CountProbe, Intent, RecordFailure, RecordSuccess, ReleaseProbe, Reply
from pybreaker_redis._redis.classify import may_have_executed
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import find_interruption, suppress_errors
from pybreaker_redis._servers.availability import report_availability
from pybreaker_redis.health import Health

#: Intents that report the outcome of a call.
_REPORTS = (RecordFailure, RecordSuccess, CountProbe, ReleaseProbe)

#: Most relocations of a circuit during one request: its keys need a tag, and another node has them.
RELOCATIONS_MAX = 2


class Failover(MemberCircuit):
    """One circuit in Redis, as this process uses it: a `CircuitCore`, and a `Member` of its server.

    See `MemberCircuit` for arguments and attributes.
    """

    sends_requests = True
    lease_ms = 0

    @property
    def server_name(self) -> str:
        """Address of the server.  Empty while the circuit was not used."""
        return "" if self.server is None else str(self.server)

    @property
    def last_known_state(self) -> str:
        """State of the circuit that answers calls, without a request."""
        return self.local.circuit.state if self.uses_local else self.shared.last_seen_state

    @property
    def state_for_constructor(self) -> str | None:
        """State for a breaker under construction, without a connection.

        Modules create breakers when they are imported: before settings are sure to exist, and in masters that fork
        later.  The first call reads the circuit.
        """
        return self.last_known_state

    def report_health(self) -> Health:
        """Return the last observed condition of the circuit and its server, without a request."""
        server, push = self.server, self.shared.push
        report = report_availability(server.availability if server else None, self._faults)
        return Health(
            circuit=self.name,
            server=self.server_name,
            server_version=push.server_version if push else "",
            condition=report.condition,
            since=report.since,
            state=self.last_known_state,
            is_own=self.uses_local,
            last_error=report.last_error,
            next_attempt=report.next_attempt,
            attempts=report.attempts,
            view_age=self.shared.view_age_s,
            push=push.via if push else "none",
            mode=self.shared.engine_mode,
            circuits=server.member_count if server else 0,
        )

    def prepare_call(self, *, has_several_breakers: bool) -> None:
        """See `CircuitCore.prepare_call`."""
        if has_several_breakers:
            self._settings_check.note_second_breaker()
        if (server := self.server) is not None and self.shared.is_subscription_due:
            # No error of a subscription may reach a guarded call.
            with suppress_errors():
                self.shared.subscribe_to_changes(server)

    def read_without_request(self) -> Reply | None:
        """See `CircuitCore.read_without_request`."""
        reply = self.shared.trusted_reply()
        return None if reply is None else PROBE_TOKENS.mask_free_probe(reply)

    def carry_out(self, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """See `CircuitCore.carry_out`."""
        if token := getattr(intent, "token", ""):
            reply = PROBE_TOKENS.track(partial(self._decide, budget=budget), intent, token)
        else:
            reply = self._decide(intent, budget)
        return PROBE_TOKENS.mask_free_probe(reply) if reply.circuit.state == HALF_OPEN else reply

    def carry_out_or_raise(self, *intents: Intent) -> Reply:
        """See `CircuitCore.carry_out_or_raise`."""
        replies = []
        for intent in intents:
            with operator_wait((self.name,), lambda: self.server_name, operator_timeout_s(self.timeout)):
                replies.append(self.run_shared(intent))
        return replies[-1]

    def release_connections(self) -> None:
        """See `CircuitCore.release_connections`."""
        # In this order: a caller that comes meanwhile either registers again, or has to connect again.
        if self.server is not None:
            self.server.release_member(self)
        self.shared.forget_location()
        self._enter(Mode.UNUSED, only_from=Mode.SHARED)

    # Requests of calls --------------------------------------------------------------------------------------------

    def _decide(self, intent: Intent, budget: CallBudget | None) -> Reply:
        """Carry out an intent on the shared circuit if Redis may be queried and answers, otherwise on the local one."""
        if isinstance(intent, RecordSuccess) and (trusted := self.shared.trusted_reply_to(intent)):
            return trusted
        generation = getattr(intent, "generation", None)
        if generation is not None and generation < 0:
            # The local circuit has admitted the call.
            intent = self.local.to_shared_intent(intent)
        is_in_doubt, server = False, self.server
        if (
            self.mode is Mode.SHARED
            and self._faults.outage is None
            and server is not None
            and server.availability.outage is None
        ) or self._claim_request_turn(budget):
            reply, is_in_doubt = self._try_shared(intent, budget)
            if reply is not None:
                return reply
        return self._answer_locally(intent, is_in_doubt=is_in_doubt)

    def _try_shared(self, intent: Intent, budget: CallBudget | None) -> tuple[Reply | None, bool]:
        """Carry out an intent on the shared circuit, within the time that the call has left.

        Returns:
            The reply, ``None`` if there is no usable one, and whether Redis may have executed the intent nevertheless.
        """
        reply: Reply | None = None
        interruption: BaseException | None = None
        began, is_in_doubt = monotonic(), False
        handled, timeout_s = sys.exc_info()[1], self.timeout
        if budget is not None:
            timeout_s = budget.begin_request(timeout_s, is_report=isinstance(intent, _REPORTS))
        try:
            try:
                with deadline(timeout_s):
                    reply = self._query_shared(intent)
            finally:
                if budget is not None:
                    budget.spent_s += monotonic() - began
        except Exception as error:  # noqa: BLE001
            interruption = find_interruption(error, handled)
            if interruption is None:
                # A callable that returns a client may raise any class, and libraries have bugs.  No error may reach a
                # guarded call.
                is_in_doubt = may_have_executed(error)
                self._note_failure(error, began, budget)
        except BaseException as error:  # noqa: BLE001
            interruption = error
        if reply is None or (self.timeout is not None and monotonic() - began > 2 * self.timeout):
            self._end_request(began, has_reply=reply is not None, is_interrupted=interruption is not None)
        if interruption is not None:
            raise interruption
        return reply, is_in_doubt

    def _claim_request_turn(self, budget: CallBudget | None) -> bool:
        """Return whether a request may be sent now.  Where callers take turns, True claims the turn for this caller."""
        if budget is not None and budget.is_half_spent(self.timeout) and self.uses_local:
            # Contention has used the time of the call: the rest of the call is for the local circuit.
            return False
        # A caller that gets the turn has to send a request.
        return (
            self._faults.is_attempt_due
            and (self.server is None or self.server.claim_caller_turn())
            and self._faults.claim_turn()
        )

    def _query_shared(self, intent: Intent) -> Reply | None:
        """Carry out an intent on the shared circuit, and return to that circuit first if need be.

        Returns:
            The reply.  ``None`` if Redis may not be queried, because another caller has the turn.
        """
        if self.server is None:
            self._locate()
            if self.server is not None and not self.server.claim_caller_turn():
                # The outage of that server is known from its other circuits.
                return None
        outcome = ""
        if self.mode in LOCAL_MODES:
            if (returned := self._return_by_caller()) is None:
                return None
            outcome = returned
        reply = self.run_shared(intent)
        if self.mode is Mode.UNUSED:
            self._enter(Mode.SHARED, only_from=Mode.UNUSED)
        if self._faults.outage:
            self._note_answer()
        if self.server and self.server.availability.outage:
            self.server.report_answer(outcome)
        return reply

    def run_shared(self, intent: Intent, *, logs_repair: bool = True) -> Reply:
        """Carry out an intent on the shared circuit, wherever it is.  An error of the client passes unchanged.

        Args:
            intent: Wanted change, or `Load`.
            logs_repair: Whether to log a repair of the record.
        """
        shared, relocations = self.shared, 0
        while True:
            choice = shared.selector.current or self._locate()
            try:
                reply = shared.execute_at(choice, intent, logs_repair=logs_repair)
                break
            except Exception as error:
                if relocations == RELOCATIONS_MAX or not self._locator.relocate(error, choice.engine.client):
                    raise
                shared.forget_location(choice)
                relocations += 1
        if shared.selector.missing and self.server is not None:
            for feature, reason in shared.selector.take_missing_features():
                self.server.note_missing_feature(feature, reason)
        return reply

    def _return_by_caller(self) -> str | None:
        """Return to the shared circuit: a caller has the turn to query, or the server returned before this circuit.

        Returns:
            Result for the log.  ``None`` if another thread reconciles the circuit.
        """
        server = self.server
        if self.uses_local and server and server.availability.outage and self._locator.refresh_location():
            self.shared.forget_location()
        # While the retry thread has circuits return, its log line covers this one.
        attempt = server.current_return if server else None
        self.load(logs_repair=attempt is None)
        self.verify_writable()
        outcome = self.bring_back()
        if outcome is not None and attempt is not None:
            attempt.outcomes[outcome] += 1
        return outcome

    def _end_request(self, began: float, *, has_reply: bool, is_interrupted: bool) -> None:
        """Clean up after a request that was slow or got no reply."""
        if not has_reply:
            # A turn that this caller took and did not use is for another one.
            self._faults.give_back_turn()
        if self.server is None:
            return
        self.server.log_if_slow(monotonic() - began, self.timeout)
        if not has_reply:
            self.server.availability.give_back_turn()
        if is_interrupted:
            # A connection that was in use may still get the reply to the interrupted request.
            self.server.close_idle_pools()

    def _answer_locally(self, intent: Intent, *, is_in_doubt: bool) -> Reply:
        fault, server = self._faults.outage, self.server
        outage = server.availability.outage if server else None
        availability = self._faults if fault or server is None else server.availability
        mode = self._mode_for(fault, outage)
        return self._decide_locally(intent, self.shared.known, availability, mode=mode, is_in_doubt=is_in_doubt)
