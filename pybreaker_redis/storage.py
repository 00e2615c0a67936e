"""A circuit that a fleet shares: what pybreaker is given.

Knows: what may be asked for, pybreaker's settings.  Does not know: Redis, who carries out what it asks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, TypeVar

from pybreaker_redis import _frames
from pybreaker_redis._arguments import (
    check_fallback,
    check_flag,
    check_state,
    client_source,
    kept_ms,
    key_base,
    key_prefix,
    staleness,
    wait,
)
from pybreaker_redis._caller import Caller
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._deadline import deadline
from pybreaker_redis._intents import Intent, Load, ResetProbes, SetOpenedAt, SetState
from pybreaker_redis._keys import BASE
from pybreaker_redis._operated import OperatedStorage
from pybreaker_redis._outside import suppressed
from pybreaker_redis._probes import PROBES
from pybreaker_redis._survey import survey
from pybreaker_redis._tenancy import Tenancy
from pybreaker_redis._twins import Twin
from pybreaker_redis._urls import client_of
from pybreaker_redis._view import View
from pybreaker_redis._whereabouts import Whereabouts
from pybreaker_redis.health import Health

_Storage = TypeVar("_Storage", bound="CircuitRedisStorage")

#: Seconds that an operator waits for Redis, unless a guarded call would wait longer.
PATIENCE = 2.0


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
        timeout: float | None = 0.25,
        ttl: float | None = None,
    ) -> None:
        check_state("state", state)
        check_fallback(fallback_circuit_state)
        check_flag("cluster_mode", cluster_mode)
        base = key_base(type(self), self.BASE_NAMESPACE)
        namespace = key_prefix(namespace)
        view = View(staleness(max_staleness))
        super().__init__("redis", probe_lease, view.shortcut)
        self._timeout = wait(timeout)
        name = namespace or base
        settings = {
            "state": state,
            "fallback_circuit_state": fallback_circuit_state,
            "probe_lease": probe_lease,
            "max_staleness": max_staleness,
            "timeout": timeout,
            "ttl": ttl,
        }
        self._twin = Twin(name, settings, is_nameless=namespace is None)
        self._tenancy = Tenancy(
            name,
            Whereabouts(
                client_source(redis_object),
                namespace,
                one_slot=cluster_mode,
                settles=self._twin.meet,
                base=base,
            ),
            initial_state=state,
            fallback=fallback_circuit_state,
            timeout=self._timeout,
            ttl_ms=kept_ms(ttl),
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
        return cls(state, client_of(url), namespace, **words)

    def health(self) -> Health:
        """What this process knows about the circuit's Redis; asks nobody, and may be called as often as one likes."""
        tenancy = self._tenancy
        server, shared, trouble, heard = tenancy.server, tenancy.shared, tenancy.trouble, tenancy.shared.push
        return Health(
            circuit=tenancy.circuit_name,
            server="" if server is None else str(server),
            server_version=heard.server if heard else "",
            condition=trouble.condition,
            since=trouble.since,
            state=tenancy.last_known_state,
            is_own=tenancy.is_alone,
            last_error=trouble.last_error,
            next_attempt=trouble.next_attempt,
            attempts=trouble.attempts,
            view_age=shared.age,
            push=heard.how if heard else "none",
            mode=shared.mode,
            circuits=server.tenants if server else 0,
        )

    # For operators --------------------------------------------------------------------------------------------------

    def look_at(self, storages: Sequence[OperatedStorage]) -> list[Reply]:
        """See `OperatedStorage.look_at`; one round trip for all, in a cluster one for each node."""
        in_redis = [storage for storage in storages if isinstance(storage, CircuitRedisStorage)]
        with deadline(self._patience):
            found = iter(survey(storage._tenancy.shared for storage in in_redis))  # noqa: SLF001
        return [
            next(found) if isinstance(storage, CircuitRedisStorage) else storage._insist(Load())  # noqa: SLF001
            for storage in storages
        ]

    def let_go(self) -> None:
        """See `OperatedStorage.let_go`."""
        self._tenancy.leave()

    def _insist(self, intent: Intent) -> Reply:
        with deadline(self._patience):
            return self._tenancy.shared.execute(intent)

    @property
    def _patience(self) -> float | None:
        return None if self._timeout is None else max(self._timeout, PATIENCE)

    # Which circuit to go by -----------------------------------------------------------------------------------------

    def _look(self) -> Reply:
        reply = self._tenancy.believed(Load())
        if reply is None:
            return self._execute(Load())
        self._shortcut = self._tenancy.shortcut
        return PROBES.shown(reply)

    def retry_after(self, reset_timeout: float) -> float:
        """See `OperatedStorage.retry_after`."""
        with self._callers.current().asks_apart():
            return super().retry_after(reset_timeout)

    def _count(self, breakers: CodeType, read: Callable[[Circuit], int]) -> int:
        if _frames.asker() is breakers:
            return super()._count(breakers, read)
        # Somebody looks, be it every second.
        with self._callers.current().asks_apart():
            return super()._count(breakers, read)

    def _look_at_state(self, caller: Caller, *, for_a_call: bool) -> Reply:
        if not for_a_call:
            with caller.asks_apart():
                return self._ask(caller)
        # Once an open circuit's timeout is over, pybreaker calls a second time within the call: that is no new one.
        if not (caller.waited and _frames.asked_through(_frames.CHECKS_TIMEOUT)):
            caller.begins()
        return self._ask(caller)

    def _called(self) -> None:
        if self._admissions.are_several:
            self._twin.share()
        # Whatever may go wrong with that, nobody who makes a call is to hear of it.
        with suppressed():
            self._tenancy.listen()

    def _execute(self, intent: Intent) -> Reply:
        with self._callers.current().asks_apart() if _is_by_hand(intent) else contextlib.nullcontext():
            reply = PROBES.execute(self._tenancy.execute, intent)
        self._shortcut = self._tenancy.shortcut
        return reply

    def _state_unasked(self) -> str:
        # pybreaker's constructor reads the state.  Modules create breakers when they are imported, before settings are
        # sure to be there and in masters that fork later: no time to connect.  The first call hears what is true.
        return self._tenancy.last_known_state


def _is_by_hand(intent: Intent) -> bool:
    """Whether it belongs to no call."""
    return isinstance(intent, SetState | SetOpenedAt | ResetProbes) or getattr(intent, "generation", 0) is None
