"""Part of a circuit in Redis that deals with its server: location, failures, and the return after an outage.

A failure is the fault of one circuit, or of the server.  A server that fails concerns all circuits of this process on
that server (`_servers/server.py`), and so does its return.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pybreaker_redis import _log
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.budget import CallBudget, request_wait
from pybreaker_redis._circuits.local import FALLBACK_LAST
from pybreaker_redis._circuits.mode import Mode, SwitchedCircuit
from pybreaker_redis._circuits.probes import HeldProbes
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._engines.base import EngineChoice
from pybreaker_redis._engines.reader import ReadRequest
from pybreaker_redis._model.circuit import CLOSED
from pybreaker_redis._model.intents import Intent, Load, Reply
from pybreaker_redis._redis.classify import ErrorKind, error_kind, suppress_except
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.locator import CircuitLocator, Location
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import suppress_errors
from pybreaker_redis._runtime.logger import LossThrottle
from pybreaker_redis._servers.availability import TURN_DELAY_MIN_S, Availability
from pybreaker_redis._servers.member import Member, MemberFailure, ReturnProgress
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.settings_check import SettingsCheck
from pybreaker_redis._servers.table import server_for


class MemberCircuit(SwitchedCircuit):
    """Base of `Failover`: one circuit in Redis as a `Member` of its server.

    Args:
        name: Name of the circuit, for people.
        locator: Finder of the shared circuit.
        initial_state: State of a circuit that does not exist yet.
        fallback: State in which a local circuit begins.
        timeout: Seconds a guarded call may wait for Redis.  ``None``: no limit.
        ttl_ms: Milliseconds after the last write when the circuit expires.  0: never.
        view: This process's copy of the shared circuit.
        settings_check: Comparison with the other storages of the same circuit.
        logger: Logger for what is found in Redis.

    Attributes:
        name: Name of the circuit, for people.
        timeout: Seconds a guarded call may wait for Redis.  ``None``: no limit.
        shared: The circuit in Redis.
        server: Server of the circuit.  ``None`` while the circuit was not used.
        held_probes: Probes that threads of this process claimed.
    """

    def __init__(
        self,
        name: str,
        locator: CircuitLocator,
        *,
        initial_state: str,
        fallback: str,
        timeout: float | None,
        ttl_ms: int,
        view: View,
        settings_check: SettingsCheck,
        logger: logging.Logger,
    ) -> None:
        super().__init__(view, fallback=fallback, initial=initial_state)
        self.name = name
        self.timeout = timeout
        self.server: Server | None = None
        self.held_probes = HeldProbes()
        self._locator = locator
        self._settings_check = settings_check
        self._is_settings_check_done = False
        #: Faults of this circuit alone.
        self._faults = Availability(timeout or TURN_DELAY_MIN_S, has_retry_thread=False)
        self._fault_log = LossThrottle()
        #: Repair of the record that the last load found, for the log.
        self._event = ""
        self.shared = SharedCircuit(
            name=name,
            initial_state=initial_state,
            fallback_state=CLOSED if fallback == FALLBACK_LAST else fallback,
            ttl_ms=ttl_ms,
            view=view,
            logger=logger,
        )

    # Location -----------------------------------------------------------------------------------------------------

    def run_shared(self, intent: Intent, *, logs_repair: bool = True) -> Reply:
        """Carry out an intent on the shared circuit, wherever it is.  See `Failover.run_shared`."""
        raise NotImplementedError

    def locate_read_request(self) -> ReadRequest:
        """Locate the circuit, and return the request that reads it together with others."""
        return self.shared.read_request_at(self.shared.selector.current or self._locate())

    def verify_writable(self) -> None:
        """Write to the server without changing the circuit.  An error of the client passes unchanged."""
        self.shared.write_unchanged(self.shared.selector.current or self._locate())

    def _locate(self) -> EngineChoice:
        """Locate the circuit, join its server, and choose an engine."""
        shared = self.shared
        with shared.selector.lock:
            # Another thread may have located the circuit meanwhile.
            return shared.selector.current or shared.selector.choose(self._join_server())

    def _join_server(self) -> Location:
        location = self._locator.locate()
        if not self._is_settings_check_done:
            self._is_settings_check_done = True
            self._settings_check.register(location.client, location.keys)
        server = server_for(location.client)
        client = server.client_with_timeout(location.client, self.timeout)
        before, self.server = self.server, server
        if not server.add_member(
            self, circuit=self.name, timeout_s=self.timeout, max_staleness_s=self._view.max_staleness
        ):
            msg = f"circuit {self.name!r} was released while a retry queried it"
            raise LookupError(msg)
        if before not in (None, server):
            before.remove_member(self)
        self._share_local(server, location.keys)
        return replace(location, client=client)

    # Failures -----------------------------------------------------------------------------------------------------

    def on_server_lost(self) -> None:
        """See `Member.on_server_lost`."""
        self._enter(self._mode_for(self._faults.outage, self.server.availability.outage if self.server else None))

    def _note_failure(self, error: Exception, began: float, budget: CallBudget | None = None) -> None:
        """Note that a request got no usable reply.

        Args:
            error: What the client raised.
            began: Time at which the request began, monotonic seconds.
            budget: Time budget of the call.  ``None``: the request belongs to no call.
        """
        kind = error_kind(error)
        if kind is ErrorKind.CONTENDED:
            # No outage: the local circuit serves this report, and the next read adds the report to the shared circuit.
            return
        if self.server is not None and kind in (ErrorKind.UNREACHABLE, ErrorKind.READ_ONLY):
            self.server.report_failure(error, self, began)
            return
        outage = self._faults.note_failure(error)
        if outage is None:
            self._enter(self._mode_for(self._faults.outage, None))
            self._fault_log.flush_held_line()
            return
        self._enter(Mode.LOCAL)
        if outage.kind is ErrorKind.FORBIDDEN:
            with suppress_errors(), request_wait(budget, self.timeout):
                self.load()
                self._enter(Mode.FOLLOWING)
        pause_s = outage.next_attempt_at - outage.since
        build_line = partial(_log.circuit_refused, self.name, error=outage.error, pause_s=pause_s)
        self._fault_log.log_loss(lambda more: build_line(more_losses=more))

    def _note_answer(self) -> None:
        """End the fault of this circuit: a request got a reply."""
        if (seconds := self._faults.note_answer()) is not None:
            build_line = partial(_log.circuit_permitted, self.name, seconds=seconds)
            self._fault_log.log_return(lambda more: build_line(more_losses=more))
        self.shared.retry_subscription()

    # Return -------------------------------------------------------------------------------------------------------

    def verify_server(self) -> None:
        """See `Member.verify_server`."""
        with deadline(self.timeout):
            self.load()

    def move_if_relocated(self) -> bool:
        """See `Member.move_if_relocated`."""
        is_relocated = False
        # The search takes half of the time.
        with deadline(self.timeout and 2 * self.timeout), suppress_except():
            is_relocated = self._locator.refresh_location()
            if is_relocated:
                self._use_new_location()
        return is_relocated

    def _use_new_location(self) -> None:
        self.shared.forget_location()
        self._locate()
        if self.server and self.server.availability.outage is None:
            began = monotonic()
            try:
                self.load()
                self.verify_writable()
                self.bring_back()
            except Exception as error:  # noqa: BLE001
                # The retry thread of the new server makes the next attempt.
                self._note_failure(error, began)

    def on_server_returned(self, members: Sequence[Member], attempt: ReturnProgress) -> MemberFailure | None:
        """See `Member.on_server_returned`."""
        return bulk.return_members(members, attempt)

    def load(self, *, logs_repair: bool = False) -> None:
        """Read the shared circuit, and repair its record.  An error of the client passes unchanged.

        Args:
            logs_repair: Whether to log a repair.  Otherwise `bring_back` returns it.
        """
        event = self.run_shared(Load(), logs_repair=logs_repair).repair_note
        self._event = "" if logs_repair or event == "created" else event

    def bring_back(self) -> str | None:
        """Report what the local circuit learned, and use the shared circuit again.

        Returns:
            Result for the log, empty if there was nothing.  ``None`` if another thread reconciles the circuit.
        """
        with self.local.recovery_turn() as has_turn:
            if not has_turn:
                return None
            outcome, self._event = self._event, ""
            result = self.local.reconcile(lambda: self._view.cached, partial(self.run_shared, logs_repair=False))
            self._use_shared(has_ended=result.has_ended)
            return "opened for all" if result.has_opened else outcome

    def resume_if_unchanged(self) -> None:
        """Use the shared circuit again if the local one has nothing to report.  No request is made."""
        with self.local.recovery_turn() as has_turn:
            self._use_shared(has_ended=has_turn and self.local.end_if_unchanged(self._view.cached))
