"""A circuit that lives in Redis and is shared by a fleet.

Knows: which carrier serves, what to do while Redis is away, whose clock is whose.  Does not know: commands, scripts.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import replace
from typing import Any

from pybreaker_redis._adapter import IntentStorage, check_state
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import Circuit, Intent, Load, SetOpenedAt, Trip
from pybreaker_redis._clock import now_ms
from pybreaker_redis._guard import PAUSE, REDIS_ERRORS, Guard
from pybreaker_redis._keys import BASE, circuit_keys
from pybreaker_redis._optimistic import OptimisticCarrier
from pybreaker_redis._scripts import LuaCarrier
from pybreaker_redis.errors import ScriptingUnavailable
from pybreaker_redis.memory import MemoryCarrier

#: Where the generations of circuits in this process begin: the shared record holds at most 15 digits, so a call that
#: was admitted by one is never settled in the other.
LOCAL_GENERATIONS = 10**15


class CircuitRedisStorage(IntentStorage):
    """A circuit that all processes with the same Redis and namespace share; in place of pybreaker's own class.

    Nothing is sent to Redis before the circuit is first used.  No error of Redis reaches a guarded call: while there is
    no answer, this process keeps a circuit of its own.

    Args:
        state: ``closed``, ``open`` or ``half-open``: how a circuit begins that does not exist yet.
        redis_object: A client (`redis.Redis` and its kin), or a callable without arguments that returns one.
        namespace: Prefix of the keys; circuits with the same namespace are the same circuit.
        fallback_circuit_state: How this process's own circuit begins when Redis does not answer, and how the shared
            one does when its keys have vanished.
        cluster_mode: Put all keys of the circuit into one slot of a Redis Cluster.
        probe_lease: Seconds until a probe that nobody reported on is offered again, from 0.001 to 86400.  Must exceed
            the slowest guarded call.

    Raises:
        ValueError: An unknown state, or a `probe_lease` out of range.
        TypeError: Any other argument that is not what it should be.
    """

    BASE_NAMESPACE = BASE

    logger = logging.getLogger("pybreaker_redis")

    def __init__(
        self,
        state: str,
        redis_object: Any,
        namespace: str | None = None,
        fallback_circuit_state: str = "closed",
        cluster_mode: bool = False,  # noqa: FBT001, FBT002
        *,
        probe_lease: float = 30.0,
    ) -> None:
        check_state("state", state)
        check_state("fallback_circuit_state", fallback_circuit_state)
        if namespace is not None and not isinstance(namespace, str):
            msg = f"namespace must be a str or None, not {namespace!r}"
            raise TypeError(msg)
        if not hasattr(redis_object, "evalsha") and not callable(redis_object):
            msg = f"redis_object must be a Redis client or a callable that returns one, not {redis_object!r}"
            raise TypeError(msg)
        super().__init__("redis", probe_lease)
        self._initial_state = state
        self._fallback_circuit_state = fallback_circuit_state
        self._redis = redis_object
        self._keys = circuit_keys(namespace, one_slot=cluster_mode)
        self._circuit_name = namespace or BASE

        self._lock = threading.Lock()
        self._guard = Guard()
        self._carrier: LuaCarrier | OptimisticCarrier | None = None
        self._known: Circuit | None = None
        #: Server's clock minus local clock, milliseconds.
        self._offset_ms: int | None = None
        self._local: MemoryCarrier | None = None
        self._local_generation = LOCAL_GENERATIONS

    def _execute(self, intent: Intent) -> Reply:
        if self._guard.may_ask():
            try:
                reply = self._execute_shared(intent)
            except REDIS_ERRORS as error:
                self._went_away(error)
            else:
                self._is_back()
                return reply
        return self._execute_local(intent)

    # Shared -------------------------------------------------------------------------------------------------------

    def _execute_shared(self, intent: Intent) -> Reply:
        if isinstance(intent, SetOpenedAt):
            if self._offset_ms is None:
                self._execute_shared(Load())
            intent = SetOpenedAt(intent.at_ms + (self._offset_ms or 0))
        create = self._initial_state if self._known is None else self._fallback_circuit_state
        reply = self._run(intent, create)
        known = self._known
        if known is None or reply.circuit.generation >= known.generation:
            self._known = reply.circuit
        if self._offset_ms is None or isinstance(intent, Trip):
            # On first contact, and when this process opens the circuit: then both clocks are known, and a test that
            # freezes the local one finds `opened_at` at the frozen instant.  Never per read: a clock that is moved
            # afterwards must see the timeout pass.  Rounded so that the gate never opens early.
            self._offset_ms = math.floor(reply.now_ms - now_ms())
        self._log_event(reply)
        return _by_local_clock(reply, self._offset_ms)

    def _run(self, intent: Intent, create: str) -> Reply:
        carrier = self._carrier
        if carrier is None:
            client = self._redis if hasattr(self._redis, "evalsha") else self._redis()
            carrier = self._carrier = LuaCarrier(client, self._keys)
        try:
            return carrier.execute(intent, self._known, create)
        except ScriptingUnavailable as reason:
            with self._lock:
                if self._carrier is carrier:
                    self.logger.warning(
                        "circuit %r: the server runs no scripts (%s); using transactions, which take more round trips",
                        self._circuit_name,
                        reason,
                    )
                    self._carrier = OptimisticCarrier(carrier.client, self._keys)
            return self._run(intent, create)

    def _log_event(self, reply: Reply) -> None:
        if reply.event.startswith("repaired"):
            self.logger.warning(
                "circuit %r: Redis held values that make no sense or none at all; %s; the circuit is %s",
                self._circuit_name,
                reply.event,
                reply.circuit.state,
            )
        elif reply.event == "restored":
            self.logger.warning(
                "circuit %r: Redis has lost its record; restored as %s", self._circuit_name, reply.circuit.state
            )

    # Local --------------------------------------------------------------------------------------------------------

    def _execute_local(self, intent: Intent) -> Reply:
        with self._lock:
            if self._local is None:
                self._local = MemoryCarrier(self._fallback_circuit_state, first_generation=self._local_generation)
            local = self._local
        reply = local.execute(intent)
        self._local_generation = reply.circuit.generation + 1
        return reply

    def _went_away(self, error: Exception) -> None:
        if self._guard.failed():
            self.logger.warning(
                "circuit %r: Redis gave no answer (%s: %s); using this process's own state, next attempt in %.1f s",
                self._circuit_name,
                type(error).__name__,
                error,
                PAUSE,
            )

    def _is_back(self) -> None:
        seconds = self._guard.answered()
        if seconds is not None:
            with self._lock:
                self._local = None
            self.logger.info("circuit %r: Redis answers again after %.1f s", self._circuit_name, seconds)


def _by_local_clock(reply: Reply, offset_ms: int) -> Reply:
    circuit = reply.circuit
    opened_at_ms = None if circuit.opened_at_ms is None else circuit.opened_at_ms - offset_ms
    moved = replace(circuit, opened_at_ms=opened_at_ms, probe_until_ms=circuit.probe_until_ms - offset_ms)
    return replace(reply, circuit=moved, now_ms=reply.now_ms - offset_ms)
