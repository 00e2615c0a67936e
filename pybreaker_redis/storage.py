"""A circuit that a fleet shares, and what a process does while nobody answers.

Knows: the shared circuit, the guard, the circuit of one's own.  Does not know: commands, scripts.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from pybreaker_redis._adapter import IntentStorage
from pybreaker_redis._arguments import check_state, staleness
from pybreaker_redis._carrier import Reply
from pybreaker_redis._clock import now_ms
from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._guard import Guard
from pybreaker_redis._intents import Intent, Load, RecordSuccess
from pybreaker_redis._keys import BASE, circuit_keys
from pybreaker_redis._shared import SharedCircuit
from pybreaker_redis._view import View
from pybreaker_redis.memory import MemoryCarrier

#: Where the generations of this process's own circuits begin: below zero, where shared ones never are, so that a call
#: that was admitted by one is never settled in the other.
LOCAL_GENERATIONS = -(10**12)


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
        max_staleness: Seconds for which this process may go by what it knows of the circuit, though it hears of no
            change: from 0.01 to 60, or 0 to ask Redis at every look.

    Raises:
        ValueError: An unknown state, or a number out of range.
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
        cluster_mode: bool = False,
        *,
        probe_lease: float = 30.0,
        max_staleness: float = 1.0,
    ) -> None:
        check_state("state", state)
        check_state("fallback_circuit_state", fallback_circuit_state)
        if namespace is not None and not isinstance(namespace, str):
            msg = f"namespace must be a str or None, not {namespace!r}"
            raise TypeError(msg)
        is_client = hasattr(redis_object, "evalsha") and not isinstance(redis_object, type)
        asynchronous = is_client and "asyncio" in type(redis_object).__module__
        if asynchronous or not (is_client or callable(redis_object)):
            msg = f"redis_object must be a synchronous client or a callable that returns one, not {redis_object!r}"
            raise TypeError(msg)
        view = self._view = View(staleness(max_staleness))
        super().__init__("redis", probe_lease, view.shortcut)
        self._circuit_name = namespace or BASE
        self._shared = SharedCircuit(
            (lambda: redis_object) if is_client else redis_object,
            circuit_keys(namespace, one_slot=cluster_mode),
            name=self._circuit_name,
            initial_state=state,
            fallback_state=fallback_circuit_state,
            clock=now_ms,
            view=view,
            logger=self.logger,
        )
        self._guard = Guard()
        self._lock = threading.Lock()
        self._fallback_circuit_state = fallback_circuit_state
        self._local: MemoryCarrier | None = None
        self._local_generation = LOCAL_GENERATIONS
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock."""
        self._lock = threading.Lock()

    def _look(self) -> Reply:
        return self._shared.believed(Load()) or self._execute(Load())

    def _called(self) -> None:
        self._shared.listen()

    def _execute(self, intent: Intent) -> Reply:
        if isinstance(intent, RecordSuccess) and (reply := self._shared.believed(intent)):
            return reply
        if self._guard.may_ask():
            try:
                if self._guard.refuses_writes:
                    self._shared.check_writable()
                reply = self._shared.execute(intent)
            except Exception as error:  # noqa: BLE001
                # Clients of other libraries raise errors of their own, and callables that return a client whatever
                # they like.  None of it may reach a guarded call; the log says what it was.
                self._went_away(error, writing=not isinstance(intent, Load))
            else:
                self._is_back()
                return reply
        return self._execute_local(intent)

    def _state_unasked(self) -> str:
        # pybreaker's constructor reads the state.  Modules create breakers when they are imported, before settings are
        # sure to be there and in masters that fork later: no time to connect.  The first call hears what is true.
        return self._shared.last_known_state

    def _execute_local(self, intent: Intent) -> Reply:
        with self._lock:
            if self._local is None:
                self._local = MemoryCarrier(self._fallback_circuit_state, first_generation=self._local_generation)
            reply = self._local.execute(intent)
            self._local_generation = reply.circuit.generation + 1
            return reply

    def _went_away(self, error: Exception, *, writing: bool) -> None:
        pause = self._guard.failed(writing=writing)
        # In this order: an answer that another thread gets meanwhile must not be believed while the guard keeps callers
        # away, or calls would be admitted by Redis and settled here.
        self._view.is_unreachable()
        if pause is not None:
            self.logger.warning(
                "circuit %r: Redis gave no usable answer (%s: %s); using this process's own state, "
                "next attempt in %.1f s",
                self._circuit_name,
                type(error).__name__,
                error,
                pause,
            )

    def _is_back(self) -> None:
        seconds = self._guard.answered()
        if seconds is not None:
            with self._lock:
                self._local = None
            self.logger.info("circuit %r: Redis answers again after %.1f s", self._circuit_name, seconds)
