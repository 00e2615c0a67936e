"""What is true of the circuit in Redis, by this process's clock?

Knows: which carrier serves, what was seen last, the difference of the clocks.  Does not know: what if nobody answers.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED, Circuit, Intent, Load, SetOpenedAt, Trip
from pybreaker_redis._clock import Offset
from pybreaker_redis._optimistic import OptimisticCarrier
from pybreaker_redis._scripts import LuaCarrier
from pybreaker_redis.errors import ScriptingUnavailable


class SharedCircuit:
    """One circuit in Redis.  Times go in and come out by the local clock; in Redis they are the server's.

    Args:
        client: Returns the Redis client; called once, when the circuit is first used.
        keys: Of the circuit, in the order of the scripts.
        name: For log lines.
        initial_state: Of a circuit that does not exist yet.
        fallback_state: Of a circuit that vanished and was not open.
        clock: The local clock, milliseconds since the epoch.
        logger: Where to say what was found.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        keys: tuple[str, ...],
        *,
        name: str,
        initial_state: str,
        fallback_state: str,
        clock: Callable[[], float],
        logger: logging.Logger,
    ) -> None:
        self._client = client
        self._keys = keys
        self._name = name
        self._initial_state = initial_state
        self._fallback_state = fallback_state
        self._clock = clock
        self._logger = logger
        self._lock = threading.Lock()
        self._carrier: LuaCarrier | OptimisticCarrier | None = None
        self._known: Circuit | None = None
        self._offset = Offset()

    def execute(self, intent: Intent) -> Reply:
        """Carry out an intent.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        if isinstance(intent, SetOpenedAt):
            return self._set_opened_at(intent)
        before_ms = self._clock()
        try:
            reply = self._carry_out(intent)
        except Exception:
            self._offset.forget()
            raise
        after_ms = self._clock()
        if isinstance(intent, Trip) and reply.accepted:
            # This process has opened the circuit just now by both clocks: wherever a test has moved or frozen the local
            # one, `opened_at` is found there.
            self._offset.set(reply.now_ms - after_ms)
        else:
            self._offset.learn(reply.now_ms, before_ms, after_ms, waiting=reply.circuit.state != CLOSED)
        return _by_local_clock(reply, self._offset.ms)

    def check_writable(self) -> None:
        """See whether the server takes writes, by one that changes nothing unless the circuit is gone.

        Raises:
            Exception: It does not.
        """
        self._get_carrier().client.setnx(self._keys[0], self._fallback_state)

    @property
    def last_known_state(self) -> str:
        """The state that was seen last, or else that a new circuit begins in."""
        return self._known.state if self._known else self._initial_state

    def _set_opened_at(self, intent: SetOpenedAt) -> Reply:
        if not self._offset.known:
            self.execute(Load())
        at_ms = math.floor(intent.at_ms + self._offset.ms)
        reply = self._carry_out(SetOpenedAt(at_ms))
        if reply.accepted and reply.circuit.opened_at_ms == at_ms:
            # Redis keeps whole milliseconds; what was said shall be read again as it was said.
            self._offset.set(at_ms - intent.at_ms)
        return _by_local_clock(reply, self._offset.ms)

    def _carry_out(self, intent: Intent) -> Reply:
        create = self._initial_state if self._known is None else self._fallback_state
        carrier = self._get_carrier()
        try:
            reply = carrier.execute(intent, self._known, create)
        except ScriptingUnavailable as reason:
            reply = self._do_without_scripts(carrier, reason).execute(intent, self._known, create)
        if self._known is None or reply.circuit.generation >= self._known.generation:
            self._known = reply.circuit
        self._log(reply)
        return reply

    def _get_carrier(self) -> LuaCarrier | OptimisticCarrier:
        with self._lock:
            if self._carrier is None:
                self._carrier = LuaCarrier(self._client(), self._keys)
            return self._carrier

    def _do_without_scripts(self, carrier: LuaCarrier | OptimisticCarrier, reason: Exception) -> OptimisticCarrier:
        with self._lock:
            if not isinstance(self._carrier, OptimisticCarrier):
                self._logger.warning(
                    "circuit %r: the server runs no scripts (%s); using transactions, which take more round trips",
                    self._name,
                    reason,
                )
                self._carrier = OptimisticCarrier(carrier.client, self._keys)
            return self._carrier

    def _log(self, reply: Reply) -> None:
        state = reply.circuit.state
        if reply.event.startswith("repaired"):
            self._logger.warning(
                "circuit %r: values in Redis were missing or made no sense; %s; it is %s",
                self._name,
                reply.event,
                state,
            )
        elif reply.event == "restored":
            self._logger.warning("circuit %r: Redis has lost it; restored as %s", self._name, state)


def _by_local_clock(reply: Reply, offset_ms: float) -> Reply:
    circuit = reply.circuit
    opened_at_ms = None if circuit.opened_at_ms is None else circuit.opened_at_ms - offset_ms
    moved = replace(circuit, opened_at_ms=opened_at_ms, probe_until_ms=circuit.probe_until_ms - offset_ms)
    return replace(reply, circuit=moved, now_ms=reply.now_ms - offset_ms)
