"""A circuit that a fleet shares: what pybreaker is given.

Knows: what may be asked for, pybreaker's settings.  Does not know: Redis, who carries out what it asks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, TypeVar

from pybreaker_redis._adapter import callsite
from pybreaker_redis._adapter.call_context import CallContext
from pybreaker_redis._adapter.operated import OperatedStorage
from pybreaker_redis._circuits.bulk import read_for_operator
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._circuits.source import client_source
from pybreaker_redis._model.circuit import STATES, Circuit
from pybreaker_redis._model.intents import Intent, Load, Reply, ResetProbes, SetOpenedAt, SetState
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.keys import KEY_BASE
from pybreaker_redis._redis.locator import CircuitLocator
from pybreaker_redis._redis.url import client_source_from_url
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.interruption import suppress_errors
from pybreaker_redis._runtime.validation import (
    check_bool,
    check_choice,
    checked_base_namespace,
    checked_max_staleness,
    checked_namespace,
    checked_timeout,
    checked_ttl_ms,
)
from pybreaker_redis._servers.settings_check import SettingsCheck
from pybreaker_redis.health import Health

_Storage = TypeVar("_Storage", bound="CircuitRedisStorage")

#: Seconds that an operator waits for Redis, unless a guarded call would wait longer.
OPERATOR_TIMEOUT_MIN_S = 2.0


class CircuitRedisStorage(OperatedStorage):
    """A circuit that all processes with the same Redis and namespace share; in place of pybreaker's own class.

    Nothing is sent to Redis before the circuit is first used.  No error of Redis reaches a guarded call: while there is
    no answer, this process keeps a circuit of its own.

    Args:
        state: ``closed``, ``open`` or ``half-open``: how a circuit begins that does not exist yet.
        redis_object: A client (`redis.Redis` and its kin), or a callable without arguments that returns one.
        namespace: Prefix of the keys; circuits with the same namespace are the same circuit.
        fallback_circuit_state: How this process's own circuit begins when Redis does not answer, unless the shared one
            was known to be open or half-open; ``last``: as that was known last, or else in `state`.  The shared one
            begins in it, too, when its keys have vanished.
        cluster_mode: Put all keys of the circuit into one slot of a Redis Cluster.
        probe_lease: Seconds until a probe that nobody reported on is offered again, from 0.001 to 86400.  Must exceed
            the slowest guarded call.
        max_staleness: Seconds for which this process may go by what it knows of the circuit, though it hears of no
            change: from 0.01 to 60, or 0 to ask Redis at every look.
        timeout: Seconds that a guarded call waits for Redis at most, on connections of its own made like the client's:
            from 0.01 to 60; ``None``: on the client's connections, as long as those take.
        ttl: Seconds after the last write when the keys of the circuit expire: from 60 to 315360000, ten years; while it
            is not closed a day, if that is more.  ``None``: never.  Give all who use the circuit the same.

    Raises:
        ValueError: An unknown state, or a number out of range.
        TypeError: Any other argument that is not what it should be, or a subclass that has a ``_namespace`` of its own,
            which nothing here would ask.
    """

    #: Stands between the namespace and the names of the keys; subclasses may have another one, as of pybreaker's class.
    BASE_NAMESPACE = KEY_BASE
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
        timeout: float | None = 0.25,
        ttl: float | None = None,
    ) -> None:
        check_choice("state", state, STATES)
        check_choice("fallback_circuit_state", fallback_circuit_state, (*STATES, "last"))
        check_bool("cluster_mode", cluster_mode)
        base = checked_base_namespace(type(self), self.BASE_NAMESPACE)
        namespace = checked_namespace(namespace)
        view = View(checked_max_staleness(max_staleness))
        super().__init__("redis", probe_lease, view.fast_path)
        self._timeout = checked_timeout(timeout)
        name = namespace or base
        settings = {
            "state": state,
            "fallback_circuit_state": fallback_circuit_state,
            "probe_lease": probe_lease,
            "max_staleness": max_staleness,
            "timeout": timeout,
            "ttl": ttl,
        }
        self._twin = SettingsCheck(name, settings, is_nameless=namespace is None)
        self._core = Failover(
            name,
            CircuitLocator(
                client_source(redis_object),
                namespace,
                needs_one_slot=cluster_mode,
                settles=self._twin.register,
                base=base,
            ),
            initial_state=state,
            fallback=fallback_circuit_state,
            timeout=self._timeout,
            ttl_ms=checked_ttl_ms(ttl),
            view=view,
            callers=self._callers,
            logger=self.logger,
        )

    @classmethod
    def from_url(
        cls: type[_Storage], url: str, state: str = "closed", namespace: str | None = None, **words: Any
    ) -> _Storage:
        """A storage on the server, the master or the cluster that a URL names.

        Args:
            url: ``redis://``, ``unix://``, ``redis+sentinel://host,host/service``, ``redis+cluster://host,host``; with
                ``rediss`` by TLS; with ``valkey`` and ``valkeys`` the same.  The query has further words for the
                client; unless it says something else, that waits for 1 s and tries once.
            state: As for the class.
            namespace: As for the class.
            words: All others of the class, by keyword.

        Raises:
            ValueError: The URL names no client.
            TypeError: It is no text.
            ModuleNotFoundError: It names a cluster, and no library is installed that knows clusters.
        """
        return cls(state, client_source_from_url(url), namespace, **words)

    def health(self) -> Health:
        """What this process knows about the circuit's Redis; asks nobody, and may be called as often as one likes."""
        tenancy = self._core
        server, shared, availability_report, heard = (
            tenancy.server,
            tenancy.shared,
            tenancy.availability_report,
            tenancy.shared.push,
        )
        return Health(
            circuit=tenancy.circuit_name,
            server="" if server is None else str(server),
            server_version=heard.server if heard else "",
            condition=availability_report.condition,
            since=availability_report.since,
            state=tenancy.last_known_state,
            is_own=tenancy.uses_local,
            last_error=availability_report.last_error,
            next_attempt=availability_report.next_attempt,
            attempts=availability_report.attempts,
            view_age=shared.view_age,
            push=heard.how if heard else "none",
            mode=shared.mode,
            circuits=server.member_count if server else 0,
        )

    # For operators --------------------------------------------------------------------------------------------------

    def look_at(self, storages: Sequence[OperatedStorage]) -> list[Reply]:
        """See `OperatedStorage.look_at`; one round trip for all, in a cluster one for each node."""
        in_redis = [storage for storage in storages if isinstance(storage, CircuitRedisStorage)]
        with deadline(self._patience):
            found = iter(read_for_operator(storage._core.shared for storage in in_redis))  # noqa: SLF001
        return [
            next(found) if isinstance(storage, CircuitRedisStorage) else storage._insist(Load())  # noqa: SLF001
            for storage in storages
        ]

    def release_connections(self) -> None:
        """See `OperatedStorage.release_connections`."""
        self._core.release_connections()

    def _insist(self, intent: Intent) -> Reply:
        with deadline(self._patience):
            return self._core.shared.execute(intent)

    @property
    def _patience(self) -> float | None:
        return None if self._timeout is None else max(self._timeout, OPERATOR_TIMEOUT_MIN_S)

    # Which circuit to go by -----------------------------------------------------------------------------------------

    def _look(self) -> Reply:
        reply = self._core.believed(Load())
        if reply is None:
            return self._execute(Load())
        self._shortcut = self._core.fast_path
        return PROBE_TOKENS.shown(reply)

    def retry_after(self, reset_timeout: float) -> float:
        """See `OperatedStorage.retry_after`."""
        with self._callers.current().asks_apart():
            return super().retry_after(reset_timeout)

    def _count(self, breakers: CodeType, read: Callable[[Circuit], int]) -> int:
        if callsite.caller_code() is breakers:
            return super()._count(breakers, read)
        # Somebody looks, be it every second.
        with self._callers.current().asks_apart():
            return super()._count(breakers, read)

    def _read_circuit(self, caller: CallContext, *, for_a_call: bool) -> Reply:
        if not for_a_call:
            with caller.asks_apart():
                return self._execute_for(caller)
        # Once an open circuit's timeout is over, pybreaker calls a second time within the call: that is no new one.
        if not (caller.waited and callsite.frame_among(callsite.CHECKS_TIMEOUT)):
            caller.begins()
        return self._execute_for(caller)

    def _before_guarded_call(self) -> None:
        if self._admissions.has_several_breakers:
            self._twin.note_second_breaker()
        # Whatever may go wrong with that, nobody who makes a call is to hear of it.
        with suppress_errors():
            self._core.ensure_subscribed()

    def _execute(self, intent: Intent) -> Reply:
        with self._callers.current().asks_apart() if _is_by_hand(intent) else contextlib.nullcontext():
            reply = PROBE_TOKENS.track(self._core.carry_out, intent)
        self._shortcut = self._core.fast_path
        return reply

    def _state_without_query(self) -> str:
        # pybreaker's constructor reads the state.  Modules create breakers when they are imported, before settings are
        # sure to be there and in masters that fork later: no time to connect.  The first call hears what is true.
        return self._core.last_known_state


def _is_by_hand(intent: Intent) -> bool:
    """Whether it belongs to no call."""
    return isinstance(intent, SetState | SetOpenedAt | ResetProbes) or getattr(intent, "generation", 0) is None
