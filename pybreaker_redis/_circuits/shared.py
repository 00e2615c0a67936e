"""The circuit in Redis, with times by the local clock, and this process's copy of it.

A `SharedCircuit` sends intents to one location and keeps the view up to date.  `_circuits/membership.py` finds the
location, and decides what follows from an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from pybreaker_redis import _log
from pybreaker_redis._engines.base import LUA_MODE, EngineChoice
from pybreaker_redis._engines.reader import ReadRequest
from pybreaker_redis._engines.scripts import preloaded_scripts
from pybreaker_redis._engines.selector import EngineSelector
from pybreaker_redis._model.circuit import CLOSED, NOISE_DURATION_MS, OPEN, Circuit
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    Reply,
    SetOpenedAt,
    Trip,
)
from pybreaker_redis._redis.connections.deadline import LostConnection, take_lost_connection
from pybreaker_redis._redis.connections.pool import close_idle_connections
from pybreaker_redis._replica.clock_offset import OffsetBounds, OpeningTime
from pybreaker_redis._replica.connection import PushMode
from pybreaker_redis._replica.subscription import Subscription
from pybreaker_redis._replica.trust import ReadTicket
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import fork
from pybreaker_redis._runtime.clock import Instant, instant, wall_clock_ms
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import mask_error
from pybreaker_redis._servers.server import Server

#: Intents that may be executed twice without a difference.
_REPEATABLE = (Load, ClaimProbe, RecordSuccess)


class SharedCircuit:
    """One circuit in Redis.  Times go in and come out by the local clock.  In Redis they are the server's.

    Args:
        name: Name of the circuit, for log lines.
        initial_state: State of a circuit that does not exist yet.
        fallback_state: State of a circuit that vanished and was not open.
        ttl_ms: Milliseconds after the last write when the circuit expires.  0: never.
        view: This process's copy of the circuit.
        logger: Logger for what is found in Redis.
        clock: Function that returns milliseconds since the epoch, by the local clock.

    Attributes:
        selector: Holder of the engine for the present location.
    """

    def __init__(
        self,
        *,
        name: str,
        initial_state: str,
        fallback_state: str,
        ttl_ms: int,
        view: View,
        logger: logging.Logger,
        clock: Callable[[], float] = wall_clock_ms,
    ) -> None:
        self.selector = EngineSelector(ttl_ms=ttl_ms)
        self._name = name
        self._initial_state = initial_state
        # A circuit that expired was closed.
        self._fallback_state = CLOSED if ttl_ms else fallback_state
        self._expires = bool(ttl_ms)
        self._clock = clock
        self._view = view
        self._logger = logger
        #: Last circuit that was converted to the local clock, with the clock's data: reads are many, changes are few.
        self._converted: tuple[Circuit, OffsetBounds | None, OpeningTime | None, Circuit] = (
            Circuit(),
            None,
            None,
            Circuit(),
        )
        self._subscription = Subscription(view)

    # Copy of this process -----------------------------------------------------------------------------------------

    def trusted_reply(self) -> Reply | None:
        """Return the circuit, all but the counters, without a request.  ``None`` if the view is not trusted."""
        circuit = self._view.read_trusted()
        return None if circuit is None else self._reply_from_view(circuit)

    def trusted_reply_to(self, success: RecordSuccess) -> Reply | None:
        """Return the reply to a success that has no failure to forget.  ``None`` if that is not certain."""
        circuit = self._view.read_trusted_quiet(success.generation)
        return None if circuit is None else self._reply_from_view(circuit)

    @property
    def known(self) -> Circuit | None:
        """The circuit as it was seen last.  ``None`` if never."""
        cached = self._view.cached
        return None if cached is None else self._by_local_clock(cached)

    @property
    def last_seen_state(self) -> str:
        """State that was seen last, otherwise the state in which a new circuit begins."""
        return self._view.cached.state if self._view.cached else self._initial_state

    @property
    def view_age_s(self) -> float | None:
        """Seconds since the circuit was seen last.  ``None`` if never."""
        age = self._view.seconds_since_read
        return None if age == math.inf else age

    def _reply_from_view(self, circuit: Circuit) -> Reply:
        now_ms = self._view.estimated_server_ms - self._view.clock_offset.ms
        return Reply(True, self._by_local_clock(circuit), now_ms)

    def _by_local_clock(self, circuit: Circuit) -> Circuit:
        bounds, opening_time = self._view.clock_offset.known_bounds, self._view.opening_time
        source, bounds_then, opening_then, converted = self._converted
        if source is not circuit or bounds_then is not bounds or opening_then is not opening_time:
            converted = self._local_reply(Reply(True, circuit, 0)).circuit
            self._converted = circuit, bounds, opening_time, converted
        return converted

    def _local_reply(self, reply: Reply) -> Reply:
        """Return a reply with the times of the local clock."""
        circuit, offset_ms = reply.circuit, self._view.clock_offset.ms
        # Most failures meet a circuit without any time in it.
        if circuit.opened_at_ms is not None or circuit.probe_token:
            opened_at_ms, until_ms = self._view.local_opened_at_ms(circuit), circuit.probe_until_ms - offset_ms
            circuit = replace(circuit, opened_at_ms=opened_at_ms, probe_until_ms=until_ms)
        return Reply(reply.accepted, circuit, reply.now_ms - offset_ms, reply.repair_note)

    # Subscription -------------------------------------------------------------------------------------------------

    @property
    def is_subscription_due(self) -> bool:
        """Whether the circuit should be subscribed and is not."""
        return self._subscription.is_start_due

    def subscribe_to_changes(self, server: Server) -> None:
        """Subscribe the circuit to the listener of its server, unless that was done.

        Args:
            server: Server of the circuit.
        """
        fork.renew()
        with self._subscription.lock:
            # Another thread may have subscribed the circuit, or left its location.
            choice = self.selector.current
            if choice is None or not self._subscription.is_start_due:
                return
            if choice.channel:
                # An expiry is no write, so the server may report it late.
                self._subscription.begin(
                    server,
                    choice.keys,
                    choice.channel,
                    is_one_slot=choice.is_one_slot,
                    is_armable=not choice.is_one_slot and not self._expires,
                    scripts=preloaded_scripts(),
                )
                return
            self._subscription.disable()
            if choice.engine.mode == LUA_MODE:
                emit(_log.push_impossible(self._name, client_class=type(choice.engine.client).__name__))

    def retry_subscription(self) -> None:
        """Retry a subscription that was refused: rights may have been granted."""
        self._subscription.expedite()

    @property
    def push(self) -> PushMode | None:
        """Kind of the subscription, and version of the server.  ``None`` if the circuit is not subscribed."""
        return self._subscription.active_push_mode

    # Location -----------------------------------------------------------------------------------------------------

    def forget_location(self, choice: EngineChoice | None = None) -> None:
        """Forget the location, and end the subscription there.

        Args:
            choice: Engine that is no longer valid: nothing is done if another one has replaced it.  ``None``: the
                present one.
        """
        with self._subscription.lock:
            if not self.selector.discard(choice):
                return
            self._subscription.end()
        # The next server has another clock.
        self._view.clock_offset.mark_unconfirmed()

    @property
    def engine_mode(self) -> str:
        """Kind of the engine: ``lua``, ``optimistic``, or empty while there is none."""
        choice = self.selector.current
        return choice.engine.mode if choice else ""

    # Requests: errors of the client pass unchanged ----------------------------------------------------------------

    def execute_at(self, choice: EngineChoice, intent: Intent, *, logs_repair: bool = True) -> Reply:
        """Carry out an intent.

        Args:
            choice: Engine of the present location.
            intent: Wanted change, or `Load`.
            logs_repair: Whether to log a repair of the record.  Otherwise the caller does.
        """
        offset = self._view.clock_offset
        if isinstance(intent, SetOpenedAt):
            return self._set_opened_at(choice, intent)
        try:
            reply = self._send(choice, intent)
        except Exception:
            offset.mark_unconfirmed()
            raise
        if reply.accepted and reply.circuit.state == OPEN and isinstance(intent, (Trip, RecordFailure)):
            # Both clocks show now: the circuit was opened by this process.  So `opened_at` is right even if a test has
            # moved or frozen the local clock.
            offset.pin(reply.now_ms - self._clock())
        if logs_repair and reply.repair_note:
            self._log_repair(reply)
        return self._local_reply(reply)

    def _set_opened_at(self, choice: EngineChoice, intent: SetOpenedAt) -> Reply:
        offset = self._view.clock_offset
        if not offset.is_confirmed:
            self.execute_at(choice, Load())
        at_ms = math.floor(intent.at_ms + offset.ms)
        reply = self._send(choice, SetOpenedAt(at_ms))
        if reply.accepted and reply.circuit.opened_at_ms == at_ms:
            # Redis keeps whole milliseconds.  The time is read as it was set.
            offset.pin(at_ms - intent.at_ms)
        self._log_repair(reply)
        return self._local_reply(reply)

    def _send(self, choice: EngineChoice, intent: Intent) -> Reply:
        """Carry out an intent, and keep what the reply shows.  Times of the reply are the server's."""
        cached = self._view.cached
        if isinstance(intent, RecordFailure) and choice.channel:
            intent = RecordFailure(intent.generation, intent.token, NOISE_DURATION_MS, intent.times, intent.threshold)
        may_repeat = True
        while True:
            ticket, before = self._view.begin_read(), instant(self._clock)
            try:
                reply = self.selector.run_intent(
                    choice, intent, cached, self._initial_state if cached is None else self._fallback_state
                )
                break
            except Exception as error:
                mask_error(error)
                lost = take_lost_connection()
                if not may_repeat or not (lost is LostConnection.UNSENT or (lost and isinstance(intent, _REPEATABLE))):
                    raise
                # A load balancer has dropped idle connections.  The other ones are no better.
                close_idle_connections(choice.engine.client.connection_pool)
                may_repeat = False
        after = instant(self._clock)
        if self._expires and reply.repair_note == "restored" and reply.circuit.state == CLOSED:
            # The circuit has expired as configured, which looks like a loss.
            reply = replace(reply, repair_note="created")
        self.accept_bulk_read(ticket, reply, before, after)
        return reply

    def accept_bulk_read(self, ticket: ReadTicket, reply: Reply, before: Instant, after: Instant) -> None:
        """Keep what a reply shows.

        Args:
            ticket: Ticket that was taken before the request.
            reply: The reply, times by the server's clock.
            before: Time of the request.
            after: Time of the reply.
        """
        # First the clock: the record was read by this clock.
        self._learn_clock(reply, before, after)
        self._view.store_answer(ticket, reply.circuit, reply.now_ms)
        self._subscription.share_answer(reply.circuit, reply.now_ms)

    def begin_bulk_read(self) -> ReadTicket:
        """Return the ticket to take before the circuit is read together with others."""
        return self._view.begin_read()

    def read_request_at(self, choice: EngineChoice) -> ReadRequest:
        """Return what is needed to read the circuit together with others."""
        cached = self._view.cached
        state_if_missing = self._initial_state if cached is None else self._fallback_state
        return ReadRequest(choice.engine.client, choice.keys, cached, state_if_missing)

    def to_local_reply(self, reply: Reply, before: Instant, after: Instant) -> Reply:
        """Return a reply with the times of the local clock, and keep only what the reply shows of the clocks.

        Args:
            reply: The reply, times by the server's clock.
            before: Time of the request.
            after: Time of the reply.
        """
        self._learn_clock(reply, before, after)
        return self._local_reply(reply)

    def write_unchanged(self, choice: EngineChoice) -> None:
        """Write to the server without changing the circuit, unless the circuit is gone."""
        choice.engine.client.set(choice.keys[0], self.last_seen_state, nx=True)

    def _learn_clock(self, reply: Reply, before: Instant, after: Instant) -> None:
        self._view.clock_offset.note_answer_time(reply.now_ms, before, after, is_waiting=reply.circuit.state != CLOSED)

    def _log_repair(self, reply: Reply) -> None:
        state = reply.circuit.state
        if reply.repair_note.startswith("repaired"):
            emit(_log.record_repaired(self._name, repair=reply.repair_note, state=state), logger=self._logger)
        elif reply.repair_note == "restored":
            emit(_log.record_restored(self._name, state=state), logger=self._logger)
