"""Which circuit does this process go by: the shared one, or its own?

Knows: both circuits, the server they belong to, what each error means for them.  Does not know: pybreaker, commands,
scripts, threads.

The shared one as long as Redis serves it.  What is one circuit's own trouble (`_faults`) leaves the others alone; what
is the server's (`_servers/server.py`) concerns all that live there, and so does its return.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pybreaker_redis import _log
from pybreaker_redis._adapter.call_context import CallContexts
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.local import FALLBACK_LAST, LocalCircuit
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._circuits.stand_in import StandIn
from pybreaker_redis._model.circuit import CLOSED
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import CountProbe, Intent, Load, RecordFailure, RecordSuccess, Reply
from pybreaker_redis._redis.classify import ErrorKind, MissingFeature, error_kind, may_have_executed, suppress_except
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.locator import CircuitLocator, Location
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import monotonic, wall_clock_ms
from pybreaker_redis._runtime.interruption import find_interruption, suppress_errors
from pybreaker_redis._runtime.logger import LossThrottle
from pybreaker_redis._servers.availability import (
    TURN_DELAY_MIN_S,
    Availability,
    AvailabilityReport,
    report_availability,
)
from pybreaker_redis._servers.member import Member, MemberFailure
from pybreaker_redis._servers.retry import ReturnAttempt
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.table import server_for

#: What is said of a call when it has ended.
_REPORTS = (RecordFailure, RecordSuccess, CountProbe)


class Failover:
    """A circuit of this process: one of the tenants of its server (`Member`), and what it is while that is away.

    Args:
        name: Of the circuit, for people.
        whereabouts: Of the shared circuit.
        initial_state: Of a circuit that does not exist yet.
        fallback: How a circuit of one's own begins.
        timeout: Seconds to wait for an answer; ``None``: as long as the client takes.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        view: What this process believes of the shared circuit.
        callers: One for each thread.

    Attributes:
        max_staleness: Seconds for which the view may be believed.
        circuit_name, timeout: See above.
        shared: The circuit in Redis.
        server: Where that lives; ``None`` while it was not used.
        fast_path: Of the circuit that this process goes by.
    """

    def __init__(
        self,
        name: str,
        whereabouts: CircuitLocator,
        *,
        initial_state: str,
        fallback: str,
        timeout: float | None,
        ttl_ms: int,
        view: View,
        callers: CallContexts,
        logger: logging.Logger,
    ) -> None:
        self.circuit_name = name
        self.max_staleness = view.max_staleness
        self.server: Server | None = None
        self._stand_in = StandIn(fallback, initial_state)
        self.fast_path: FastPath = view.fast_path
        self._locator = whereabouts
        self.timeout = timeout
        self._view = view
        self._callers = callers
        #: What is only this circuit's trouble, and whether it can be read though it refuses something.
        self._faults, self._may_read = Availability(timeout or TURN_DELAY_MIN_S, has_retry_thread=False), False
        self._bulletin = LossThrottle()
        #: What was to be said of the shared circuit when it was loaded.
        self._event = ""
        self.shared = SharedCircuit(
            self._seat,
            whereabouts.relocate,
            name=name,
            initial_state=initial_state,
            fallback_state=CLOSED if fallback == FALLBACK_LAST else fallback,
            ttl_ms=ttl_ms,
            clock=wall_clock_ms,
            view=view,
            note_missing_feature=self._note_missing_feature,
            logger=logger,
        )

    @property
    def own(self) -> LocalCircuit:
        """The circuit of this process alone; storages that are the same circuit have one together."""
        return self._stand_in.circuit

    @property
    def availability_report(self) -> AvailabilityReport:
        """What is the matter, if anything is."""
        return report_availability(self.server.availability if self.server else None, self._faults)

    @property
    def last_known_state(self) -> str:
        """Of the circuit that this process goes by, without asking."""
        return self.own.now.state if self.uses_local else self.shared.last_known_state

    def believed(self, intent: Intent) -> Reply | None:
        """The shared circuit's answer to an intent that changes nothing, as far as it is known without asking."""
        if (reply := self.shared.believed(intent)) is not None:
            self.fast_path = self._view.fast_path
        return reply

    def release_connections(self) -> None:
        """Release the server until the circuit is used again."""
        # In this order: whoever asks for it meanwhile either is noticed, or has to connect anew.
        if self.server is not None:
            self.server.release_member(self)
        self.shared.forget_location()

    def ensure_subscribed(self) -> None:
        """Have changes of the shared circuit heard from now on."""
        if self.server is not None:
            self.shared.subscribe_to_changes(self.server)

    def carry_out(self, intent: Intent) -> Reply:
        """Carry out an intent on the circuit that this process goes by; no error of Redis comes from here."""
        if isinstance(intent, RecordSuccess) and (reply := self.believed(intent)):
            return reply
        in_doubt, intent = False, self.own.to_shared_intent(intent)
        if not self._has_waited() and self._may_ask():
            began, shared, outside = monotonic(), None, None
            handled = sys.exc_info()[1]
            try:
                with self._callers.current().waits(self.timeout, reports=isinstance(intent, _REPORTS)):
                    shared = self._execute_shared(intent)
            except Exception as error:  # noqa: BLE001
                outside = find_interruption(error, handled)
                if outside is None:
                    # Callables that return a client raise whatever they like, and libraries have bugs.  None of it may
                    # reach a guarded call; the log says what it was.
                    in_doubt = may_have_executed(error)
                    self._failed(error, began)
            except BaseException as error:  # noqa: BLE001
                outside = error
            self._has_asked(began, has_answer=shared is not None, is_interrupted=outside is not None)
            if outside is not None:
                raise outside
            if shared is not None:
                return shared
        return self._execute_own(intent, in_doubt)

    def _has_asked(self, began: float, *, has_answer: bool, is_interrupted: bool) -> None:
        if not has_answer:
            # If it is still one's turn to ask, nothing has come of it.
            self._faults.return_attempt()
        if self.server is None:
            return
        self.server.log_if_slow(monotonic() - began, self.timeout)
        if not has_answer:
            self.server.availability.return_attempt()
        if is_interrupted:
            self.server.close_idle_pools()  # A connection that was in use may still owe its answer.

    def _seat(self) -> Location:
        location = self._locator.locate()
        server = server_for(location.client)
        client = server.client_with_timeout(location.client, self.timeout)
        before, self.server = self.server, server
        if not server.add_member(
            self, circuit=self.circuit_name, timeout_s=self.timeout, max_staleness_s=self.max_staleness
        ):
            msg = f"circuit {self.circuit_name!r} was released while a retry queried it"
            raise LookupError(msg)
        if before not in (None, server):
            before.remove_member(self)
        self._stand_in.lies(server, location.keys)
        return replace(location, client=client)

    def _note_missing_feature(self, lack: MissingFeature, reason: object) -> None:
        assert self.server
        self.server.note_missing_feature(lack, reason)

    def _has_waited(self) -> bool:
        """Whether contention has used the time of the call: the rest of the call is for the local circuit."""
        caller = self._callers.current()
        return self.uses_local and not caller.is_apart and caller.waited > (self.timeout or math.inf) / 2

    def _may_ask(self) -> bool:
        # To be told that it is one's turn is to have to ask.
        return (
            self._faults.is_attempt_due
            and (self.server is None or self.server.claim_caller_turn())
            and self._faults.claim_turn()
        )

    def _execute_shared(self, intent: Intent) -> Reply | None:
        """Carry out an intent on the shared circuit; ``None`` if it is not the time to ask for that."""
        if self.server is None:
            self.shared.connect()
            if self.server is not None and not self.server.claim_caller_turn():
                # The other circuits of that server know already that it is away.
                return None
        outcome = ""
        if self.uses_local or not self._view.may_believe:
            # It is a caller's turn to ask, or the server was back before the circuit: then it says where that lies.
            if self.uses_local and self.server and self.server.availability.outage and self._locator.refresh_location():
                self.shared.forget_location()
            # While the retry thread has circuits return, its log line covers this one.
            attempt = self.server.current_return if self.server else None
            self.load(tell=attempt is None)
            self.verify_writable()
            if (brought_back := self.bring_back()) is None:
                return None
            outcome = brought_back
            if attempt is not None:
                attempt.outcomes[outcome] += 1
        reply = self.shared.execute(intent)
        if self._faults.outage:
            self._may_read = False
            if (seconds := self._faults.note_answer()) is not None:
                build_line = partial(_log.circuit_permitted, self.circuit_name, seconds=seconds)
                self._bulletin.log_return(lambda more: build_line(more_losses=more))
            self.shared.retry_subscription()
        if self.server and self.server.availability.outage:
            self.server.report_answer(outcome)
        return reply

    def _execute_own(self, intent: Intent, in_doubt: bool) -> Reply:
        if not self.uses_local:
            self.on_server_lost()
        availability = self._faults if self.server is None or self._faults.outage else self.server.availability
        outage = availability.outage
        answers = outage is not None and (outage.kind is ErrorKind.READ_ONLY or self._may_read)
        reply, self.fast_path = self._stand_in.execute(
            intent,
            self.shared.known,
            availability,
            answers=answers,
            in_doubt=in_doubt,
            max_staleness=self.max_staleness,
        )
        if self._view.may_believe:
            # Another thread has ended the outage meanwhile, and this circuit has to be brought back, too.
            self.on_server_lost()
        return reply

    def _failed(self, error: Exception, began: float) -> None:
        if error_kind(error) is ErrorKind.CONTENDED:
            # No outage: the local circuit serves this report, and the next look adds it to the shared circuit.
            return
        if self.server is not None and error_kind(error) in (ErrorKind.UNREACHABLE, ErrorKind.READ_ONLY):
            self.server.report_failure(error, self, began)
            return
        outage = self._faults.note_failure(error)
        self.on_server_lost()
        if outage is None:
            self._bulletin.flush_held_line()
        else:
            if outage.kind is ErrorKind.FORBIDDEN:
                with suppress_errors(), self._callers.current().waits(self.timeout):
                    self.load()
                    self._may_read = True
            pause_s = outage.next_attempt_at - outage.since
            build_line = partial(_log.circuit_refused, self.circuit_name, error=outage.error, pause_s=pause_s)
            self._bulletin.log_loss(lambda more: build_line(more_losses=more))

    @property
    def uses_local(self) -> bool:
        """Whether this process goes by its own circuit: another storage may, which has a trouble of its own."""
        return self.own.is_running and not self._view.may_believe

    def on_server_lost(self) -> None:
        """The server is out of reach: what is known of the shared circuit is not believed any more."""
        self._view.pause_trust()

    def verify_server(self) -> None:
        """Query the shared circuit within its timeout."""
        with deadline(self.timeout):
            self.load()

    def move_if_relocated(self) -> bool:
        """Look for the circuit on other nodes, and follow it; see `Member.move_if_relocated`."""
        has_moved = False
        # The search takes half of the time.
        with deadline(self.timeout and 2 * self.timeout), suppress_except():
            has_moved = self._locator.refresh_location()
            if has_moved:
                self._use_new_location()
        return has_moved

    def _use_new_location(self) -> None:
        self.shared.forget_location()
        self.shared.connect()
        if self.server and self.server.availability.outage is None:
            began = monotonic()
            try:
                self.load()
                self.verify_writable()
                self.bring_back()
            except Exception as error:  # noqa: BLE001
                self._failed(error, began)  # The new server has a retry thread of its own.

    def on_server_returned(self, members: Sequence[Member], attempt: ReturnAttempt) -> MemberFailure | None:
        """Have all circuits of a server use it again; see `Member.on_server_returned`."""
        return bulk.return_members(members, attempt)

    def load(self, *, tell: bool = False) -> None:
        """Ask for the shared circuit.

        Args:
            tell: Whether to say in the log what was found; else `rejoin` returns it.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        event = self.shared.execute(Load(), tell=tell).repair_note
        self._event = "" if tell or event == "created" else event

    def verify_writable(self) -> None:
        """See `ReturningCircuit.verify_writable`."""
        self.shared.verify_writable()

    def bring_back(self) -> str | None:
        """Report the local circuit to the shared one; see `ReturningCircuit.bring_back`."""
        with self.own.recovery_turn() as is_first:
            if not is_first:
                return None
            outcome, self._event = self._event, ""
            has_ended, has_opened = self._stand_in.report(
                lambda: self._view.cached, lambda intent: self.shared.execute(intent, tell=False)
            )
            self._goes_by_shared(has_ended)
            return "opened for all" if has_opened else outcome

    def resume_if_unchanged(self) -> None:
        """See `ReturningCircuit.resume_if_unchanged`."""
        with self.own.recovery_turn() as is_first:
            self._goes_by_shared(is_first and self._stand_in.end_unless_it_has_news(self._view.cached))

    def _goes_by_shared(self, has_ended: bool) -> None:
        if has_ended:
            self.fast_path = self._view.fast_path
            self._view.resume_trust()
