"""What is true of the circuit in Redis, by this process's clock?

Knows: the view, the local clock, who carries out what is wanted.  Does not know: what if nobody answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._engines.base import LUA_MODE, EngineChoice
from pybreaker_redis._engines.reader import ReadRequest
from pybreaker_redis._engines.selector import EngineSelector
from pybreaker_redis._model.circuit import CLOSED, NOISE_DURATION_MS, Circuit
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
from pybreaker_redis._redis.classify import MissingFeature
from pybreaker_redis._redis.deadline import LostConnection, take_lost_connection
from pybreaker_redis._redis.locator import Location
from pybreaker_redis._redis.pool import close_idle_connections
from pybreaker_redis._replica.clock_offset import OffsetBounds, OpeningTime
from pybreaker_redis._replica.connection import PushMode
from pybreaker_redis._replica.subscription import Subscription
from pybreaker_redis._replica.view import ReadTicket, View
from pybreaker_redis._runtime.clock import Instant, instant
from pybreaker_redis._runtime.logger import emit
from pybreaker_redis._runtime.redaction import mask_error
from pybreaker_redis._servers.server import Server

#: What may be done twice without a difference.
_REPEATABLE = (Load, ClaimProbe, RecordSuccess)

#: How often a circuit may turn out to lie elsewhere while it is asked: its keys need a tag, and another node has them.
RELOCATIONS_MAX = 2


class SharedCircuit:
    """One circuit in Redis.  Times go in and come out by the local clock; in Redis they are the server's.

    Args:
        location: Returns where it lies; called when the circuit is first used, and when it has moved.
        has_moved: Returns whether an error, for somebody who asked with a client, says that the circuit lies elsewhere:
            then nothing was done, and the same is asked again, there.
        name: For log lines.
        initial_state: Of a circuit that does not exist yet.
        fallback_state: Of a circuit that vanished and was not open.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        clock: The local clock, milliseconds since the epoch.
        view: What this process believes; kept true from here and by the listener.
        note_missing_feature: Told what the server does not have.
        logger: Where to say what was found.
    """

    def __init__(
        self,
        location: Callable[[], Location],
        has_moved: Callable[[Exception, Any], bool],
        *,
        name: str,
        initial_state: str,
        fallback_state: str,
        ttl_ms: int,
        clock: Callable[[], float],
        view: View,
        note_missing_feature: Callable[[MissingFeature, object], None],
        logger: logging.Logger,
    ) -> None:
        self._selector = EngineSelector(ttl_ms=ttl_ms)
        self._location = location
        self._note_missing_feature = note_missing_feature
        self._has_moved = has_moved
        self._name = name
        self._initial_state = initial_state
        # What expired was well: it is closed as it was.
        self._fallback_state = CLOSED if ttl_ms else fallback_state
        self._expires = bool(ttl_ms)
        self._clock = clock
        self._view = view
        self._logger = logger
        #: What is believed, by the local clock: it is looked at often, and changes rarely.
        self._moved: tuple[Circuit, OffsetBounds | None, OpeningTime | None, Circuit] = (
            Circuit(),
            None,
            None,
            Circuit(),
        )
        self._subscription = Subscription(view)

    def believed(self, intent: Intent) -> Reply | None:
        """The answer to an intent that changes nothing, as far as it is known without asking."""
        if isinstance(intent, RecordSuccess):
            circuit = self._view.read_trusted_quiet(intent.generation)
        else:
            circuit = self._view.read_trusted()
        if circuit is None:
            return None
        return Reply(
            True, self._moved_to_local_clock(circuit), self._view.estimated_server_ms - self._view.clock_offset.ms
        )

    @property
    def known(self) -> Circuit | None:
        """The circuit as it was seen last; ``None`` if never."""
        known = self._view.cached
        return None if known is None else self._moved_to_local_clock(known)

    def _moved_to_local_clock(self, circuit: Circuit) -> Circuit:
        learned, spell = self._view.clock_offset.known_bounds, self._view.opening_time
        of, when, since, by_local_clock = self._moved
        if of is not circuit or when is not learned or since is not spell:
            by_local_clock = self._by_local_clock(Reply(True, circuit, 0)).circuit
            self._moved = circuit, learned, spell, by_local_clock
        return by_local_clock

    def _by_local_clock(self, reply: Reply) -> Reply:
        circuit, offset_ms = reply.circuit, self._view.clock_offset.ms
        # Most failures meet a circuit without any time in it.
        if circuit.opened_at_ms is not None or circuit.probe_token:
            opened_at_ms, until_ms = self._view.local_opened_at_ms(circuit), circuit.probe_until_ms - offset_ms
            circuit = replace(circuit, opened_at_ms=opened_at_ms, probe_until_ms=until_ms)
        return Reply(reply.accepted, circuit, reply.now_ms - offset_ms, reply.repair_note)

    def subscribe_to_changes(self, server: Server) -> None:
        """Subscribe the circuit to the listener of its server, unless that was done.

        Args:
            server: Server of the circuit.
        """
        if not self._subscription.is_start_due:
            return
        with self._subscription.lock:
            # Another thread may have subscribed the circuit, or left its location.
            choice = self._selector.current
            if choice is None or not self._subscription.is_start_due:
                return
            if choice.channel:
                self._subscription.start(server, choice.keys, choice.channel, is_one_slot=choice.is_one_slot)
                return
            self._subscription.disable()
            if choice.engine.mode == LUA_MODE:
                emit(_log.push_impossible(self._name, client_class=type(choice.engine.client).__name__))

    def connect(self) -> None:
        """Get the client, if it was not asked for yet.

        Raises:
            Exception: Whatever the callable that returns it raises.
        """
        self._choose_engine()

    def _choose_engine(self) -> EngineChoice:
        if (choice := self._selector.current) is not None:
            return choice
        with self._selector.lock:
            # Another thread may have located the circuit meanwhile.
            return self._selector.current or self._selector.choose(self._location())

    def retry_subscription(self) -> None:
        """What was refused is permitted again."""
        self._subscription.expedite()

    @property
    def mode(self) -> str:
        """How intents are carried out: ``lua``, ``optimistic``, or empty: none was yet."""
        choice = self._selector.current
        return choice.engine.mode if choice else ""

    @property
    def view_age(self) -> float | None:
        """Seconds since it was seen last; ``None`` if it never was."""
        age = self._view.seconds_since_read
        return None if age == math.inf else age

    @property
    def push(self) -> PushMode | None:
        """How changes are heard, and of what server; ``None`` if they are not."""
        return self._subscription.push_mode

    def execute(self, intent: Intent, *, tell: bool = True) -> Reply:
        """Carry out an intent.

        Args:
            intent: What is wanted.
            tell: Whether to say in the log what was found; else the caller does.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        if isinstance(intent, SetOpenedAt):
            return self._set_opened_at(intent)
        offset = self._view.clock_offset
        try:
            reply = self._carry_out(intent, tell=tell)
        except Exception:
            offset.mark_unconfirmed()
            raise
        if self._selector.missing:
            for feature, reason in self._selector.take_missing_features():
                self._note_missing_feature(feature, reason)
        if isinstance(intent, Trip) and reply.accepted:
            # This process has opened the circuit just now by both clocks: wherever a test has moved or frozen the local
            # one, `opened_at` is found there.
            offset.pin(reply.now_ms - self._clock())
        return self._by_local_clock(reply)

    @property
    def read_request(self) -> ReadRequest:
        """What has to be known to look at it together with others.

        Raises:
            Exception: Whatever the callable raises that returns the client.
        """
        known, choice = self._view.cached, self._choose_engine()
        return ReadRequest(choice.engine.client, choice.keys, known, self._create)

    def ticket(self) -> ReadTicket:
        """To be taken before it is looked at together with others."""
        return self._view.begin_read()

    def accept_bulk_read(self, ticket: ReadTicket, reply: Reply, before: Instant, after: Instant) -> None:
        """It was looked at together with others: from here on that is what is known.

        Args:
            ticket: Taken before.
            reply: By the server's clock.
            before: When it was asked for.
            after: When it had come.
        """
        self._learn(reply, before, after)
        self._view.store_answer(ticket, reply.circuit, reply.now_ms)
        self._subscription.share_answer(reply.circuit, reply.now_ms)

    def to_local_reply(self, reply: Reply, before: Instant, after: Instant) -> Reply:
        """Return an answer by the local clock.

        Args:
            reply: By the server's.
            before: When it was asked for.
            after: When it had come.
        """
        self._learn(reply, before, after)
        return self._by_local_clock(reply)

    def _learn(self, reply: Reply, before: Instant, after: Instant) -> None:
        self._view.clock_offset.note_answer_time(reply.now_ms, before, after, is_waiting=reply.circuit.state != CLOSED)

    @property
    def _create(self) -> str:
        return self._initial_state if self._view.cached is None else self._fallback_state

    def verify_writable(self) -> None:
        """See whether the server takes writes, by one that changes nothing unless the circuit is gone.

        Raises:
            Exception: It does not.
        """
        choice = self._choose_engine()
        choice.engine.client.set(choice.keys[0], self.last_known_state, nx=True)

    @property
    def last_known_state(self) -> str:
        """The state that was seen last, or else that a new circuit begins in."""
        return self._view.cached.state if self._view.cached else self._initial_state

    def _set_opened_at(self, intent: SetOpenedAt) -> Reply:
        offset = self._view.clock_offset
        if not offset.is_confirmed:
            self.execute(Load())
        at_ms = math.floor(intent.at_ms + offset.ms)
        reply = self._carry_out(SetOpenedAt(at_ms), tell=True)
        if reply.accepted and reply.circuit.opened_at_ms == at_ms:
            # Redis keeps whole milliseconds; what was said shall be read again as it was said.
            offset.pin(at_ms - intent.at_ms)
        return self._by_local_clock(reply)

    def _carry_out(self, intent: Intent, *, tell: bool) -> Reply:
        known, state_if_missing = self._view.cached, self._create
        selector = self._selector
        moves, repeats = 0, 1
        while True:
            choice = selector.current or self._choose_engine()
            if isinstance(intent, RecordFailure) and choice.channel:
                intent = RecordFailure(intent.generation, intent.token, NOISE_DURATION_MS, intent.times)
            ticket, before = self._view.begin_read(), instant(self._clock)
            try:
                reply = selector.run_intent(choice, intent, known, state_if_missing)
                after = instant(self._clock)
            except Exception as error:
                mask_error(error)
                drop = take_lost_connection()
                if repeats and (drop is LostConnection.UNSENT or (drop and isinstance(intent, _REPEATABLE))):
                    # Idle connections that a load balancer has forgotten; the others are no better.
                    close_idle_connections(choice.engine.client.connection_pool)
                    repeats -= 1
                    continue
                if moves == RELOCATIONS_MAX or not self._has_moved(error, choice.engine.client):
                    raise
                self.forget_location(choice)
                moves += 1
            else:
                break
        if self._expires and reply.repair_note == "restored" and reply.circuit.state == CLOSED:
            # It has expired, as it was to, and nobody can tell that from a loss.
            reply = replace(reply, repair_note="created")
        # First the clock: it was this one when the record was read.
        self._learn(reply, before, after)
        self._view.store_answer(ticket, reply.circuit, reply.now_ms)
        self._subscription.share_answer(reply.circuit, reply.now_ms)
        if tell:
            self._log(reply)
        return reply

    def forget_location(self, choice: EngineChoice | None = None) -> None:
        """It lies elsewhere by now.

        Args:
            choice: Choice of the engine that is no longer valid; ``None``: the present one.
        """
        with self._subscription.lock:
            if not self._selector.discard(choice):
                return
            self._subscription.stop()
        # The next server has another clock.
        self._view.clock_offset.mark_unconfirmed()

    def _log(self, reply: Reply) -> None:
        state = reply.circuit.state
        if reply.repair_note.startswith("repaired"):
            emit(_log.record_repaired(self._name, repair=reply.repair_note, state=state), logger=self._logger)
        elif reply.repair_note == "restored":
            emit(_log.record_restored(self._name, state=state), logger=self._logger)
