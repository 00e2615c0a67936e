"""Storage for circuits that the processes of a fleet share through Redis."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypedDict, TypeVar

from pybreaker_redis._adapter.inference import InferringStorage, made_transition
from pybreaker_redis._circuits.core import CircuitSettings, client_source, client_source_from_url, shared_circuit
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._model.circuit import STATES
from pybreaker_redis._runtime.types import ClientSource, FallbackState
from pybreaker_redis._runtime.validation import (
    check_bool,
    check_choice,
    checked_base_namespace,
    checked_max_staleness,
    checked_namespace,
    checked_timeout,
    checked_ttl_ms,
)
from pybreaker_redis.health import Health

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ("CircuitRedisStorage", "client_source_from_url", "made_transition")

_Storage = TypeVar("_Storage", bound="CircuitRedisStorage")


class StorageOptions(TypedDict, total=False):
    """Keyword arguments of `CircuitRedisStorage`, which has their meaning."""

    fallback_circuit_state: FallbackState
    cluster_mode: bool
    probe_lease: float
    max_staleness: float
    timeout: float | None
    ttl: float | None


class CircuitRedisStorage(InferringStorage):
    """Circuit that all processes with the same Redis and namespace share, in place of pybreaker's class of that name.

    Nothing is sent to Redis before the circuit is first used.  No error of Redis reaches a guarded call: while Redis
    does not answer, the process uses a local circuit.

    Args:
        state: State of a circuit that does not exist yet: ``closed``, ``open`` or ``half-open``.
        redis_object: Client (`redis.Redis` or a similar class), or a callable without arguments that returns one.
        namespace: Prefix of the keys.  Storages with the same namespace are the same circuit.
        fallback_circuit_state: State in which the local circuit begins when Redis does not answer, unless the shared
            circuit was last seen open or half-open.  ``last``: the last seen state, or `state` if there is none.  The
            shared circuit begins in this state, too, when its keys have vanished.
        cluster_mode: Whether all keys of the circuit share one slot of a Redis Cluster.
        probe_lease: Seconds until a probe without a report is offered to another call, from 0.001 to 86400.  Must
            exceed the slowest guarded call.
        max_staleness: Seconds for which this process may use its copy of the circuit without notice of a change, from
            0.01 to 60.  0: this process queries Redis at every read.
        timeout: Seconds a guarded call may wait for Redis, from 0.01 to 60, on connections that are made like the
            client's.  ``None``: on the client's connections, without a limit.
        ttl: Seconds after the last write when the keys of the circuit expire, from 60 to 315360000 (ten years).  While
            the circuit is not closed, at least a day.  ``None``: never.  All users of the circuit need the same value.

    Raises:
        ValueError: A state is unknown, or a number is out of range.
        TypeError: Another argument is of the wrong type, or a subclass has an attribute ``_namespace``, which would be
            ignored.
    """

    #: Part of each key between the namespace and the name of the value.  Subclasses may change it.
    BASE_NAMESPACE = "pybreaker"
    logger = logging.getLogger("pybreaker_redis")
    _core: Failover

    def __init__(
        self,
        state: str,
        redis_object: ClientSource,
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
        checked_max_staleness(max_staleness)
        checked_timeout(timeout)
        settings = CircuitSettings(
            state=state,
            fallback_circuit_state=fallback_circuit_state,
            probe_lease=probe_lease,
            max_staleness=max_staleness,
            timeout=timeout,
            ttl=ttl,
        )
        core = shared_circuit(
            client_source(redis_object),
            checked_namespace(namespace),
            base=base,
            needs_one_slot=cluster_mode,
            settings=settings,
            ttl_ms=checked_ttl_ms(ttl),
            logger=self.logger,
        )
        super().__init__("redis", probe_lease, core)

    @classmethod
    def from_url(
        cls: type[_Storage],
        url: str,
        state: str = "closed",
        namespace: str | None = None,
        **options: Unpack[StorageOptions],
    ) -> _Storage:
        """Return a storage on the server, the master or the cluster that a URL names.

        Args:
            url: ``redis://``, ``unix://``, ``redis+sentinel://host,host/service``, ``redis+cluster://host,host``.
                ``rediss`` uses TLS.  ``valkey`` and ``valkeys`` mean the same.  The query has further arguments of the
                client.  By default the client waits for 1 s and tries once.
            state: See the class.
            namespace: See the class.
            options: All other arguments of the class, by keyword.

        Raises:
            ValueError: The URL names no client.
            TypeError: The URL is no text.
            ModuleNotFoundError: The URL names a cluster, and no library for clusters is installed.
        """
        return cls(state, client_source_from_url(url), namespace, **options)

    def health(self) -> Health:
        """Return the last observed condition of the circuit's Redis, without a request and at any rate of calls."""
        return self._core.report_health()

    def __repr__(self) -> str:
        core = self._core
        server = f", server={core.server_name!r}" if core.server_name else ""
        return f"<{type(self).__name__} {core.name!r}, mode={core.mode.value!r}{server}>"
