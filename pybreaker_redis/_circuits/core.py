"""Circuits as their users see them: one Protocol for circuits in Redis, in memory, and for tests.

The adapter, the operators' commands and the registry work with a `CircuitCore`, wherever the circuit is.  A circuit in
Redis is a `Failover`, which `shared_circuit` makes from what a user gives.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._circuits.probes import PROBE_TOKENS, HeldProbes
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import OPEN, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Intent, Load, Reply
from pybreaker_redis._redis.locator import CircuitLocator
from pybreaker_redis._redis.url import client_source_from_url
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import renew
from pybreaker_redis._runtime.validation import format_value
from pybreaker_redis._servers.settings_check import SettingsCheck

__all__ = (
    "CircuitCore",
    "CircuitSettings",
    "FixedCore",
    "MemoryCore",
    "client_source",
    "client_source_from_url",
    "rejection_time_s",
    "shared_circuit",
)


class CircuitCore(Protocol):
    """One circuit of this process.

    Attributes:
        fast_path: Decisions that hold for every call at present.  Only the core replaces the object.
        held_probes: Probes that threads of this process claimed through this core.
        lease_ms: Milliseconds until a probe without a report is offered to another call.
        sends_requests: Whether the circuit has a server, so that decisions may wait for a reply.
    """

    fast_path: FastPath
    held_probes: HeldProbes
    lease_ms: int
    sends_requests: bool

    @property
    def name(self) -> str:
        """Name of the circuit, for people."""
        ...

    @property
    def last_known_state(self) -> str:
        """State of the circuit, without a request."""
        ...

    @property
    def state_for_constructor(self) -> str | None:
        """State for a breaker under construction.  ``None``: the breaker reads the circuit, which needs no request."""

    def read_without_request(self) -> Reply | None:
        """Return the circuit without a request, times by the local clock.  ``None`` if a request is needed."""

    def carry_out(self, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """Carry out an intent.  An error of Redis never leaves this method.

        Args:
            intent: The wanted change, or `Load`.
            budget: Time budget of the guarded call.  ``None``: the request belongs to no call.
        """
        ...

    def carry_out_or_raise(self, *intents: Intent) -> Reply:
        """Carry out an operator's intents on the shared circuit, and return the last reply.

        Raises:
            StorageUnavailableError: Redis did not execute one of the intents.
        """
        ...

    def prepare_call(self, *, has_several_breakers: bool) -> None:
        """Prepare for a guarded call of this process: subscribe to changes.

        Args:
            has_several_breakers: Whether several breakers of this process use the circuit.
        """

    def release_connections(self) -> None:
        """Release connections and threads that only this circuit needs, until its next use."""


class _CoreWithoutServer:
    """What cores without a server have in common."""

    #: A breaker under construction may read the circuit.
    state_for_constructor = None
    sends_requests = False
    lease_ms = 0

    def __init__(self, name: str, fast_path: FastPath) -> None:
        self.name = name
        self.fast_path = fast_path
        self.held_probes = HeldProbes()

    def carry_out(self, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """See `CircuitCore.carry_out`."""
        raise NotImplementedError

    @property
    def last_known_state(self) -> str:
        """See `CircuitCore.last_known_state`."""
        return self.carry_out(Load()).circuit.state

    def read_without_request(self) -> Reply | None:
        """See `CircuitCore.read_without_request`."""
        return self.carry_out(Load())

    def carry_out_or_raise(self, *intents: Intent) -> Reply:
        """See `CircuitCore.carry_out_or_raise`.  Raises nothing."""
        return [self.carry_out(intent) for intent in intents][-1]

    def prepare_call(self, *, has_several_breakers: bool) -> None:
        """Do nothing: a circuit without a server sends no changes."""

    def release_connections(self) -> None:
        """Do nothing: there are no connections."""


class MemoryCore(_CoreWithoutServer):
    """Circuit in the memory of this process.

    Args:
        circuit: Circuit to begin with.
        clock_ms: Function that returns the local time, milliseconds since the epoch.
    """

    def __init__(self, circuit: Circuit, clock_ms: Callable[[], float] = wall_clock_ms) -> None:
        super().__init__("memory", FastPath())
        self._engine = MemoryEngine(circuit, clock_ms, self.fast_path)

    def carry_out(self, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """See `CircuitCore.carry_out`."""
        # Another thread may have held the lock of the engine during a fork.
        renew()
        return PROBE_TOKENS.mask_free_probe(self._engine.execute(intent))


class FixedCore(_CoreWithoutServer):
    """Circuit that stays in one state, whatever becomes of calls and whatever operators command.

    Args:
        state: ``closed``, ``open`` or ``half-open``.
        opened_ahead_ms: Milliseconds by which `opened_at` lies in the future.
    """

    def __init__(self, state: str, *, opened_ahead_ms: float = 0) -> None:
        super().__init__("fixed", FastPath())
        self._state = state
        self._opened_ahead_ms = opened_ahead_ms

    def carry_out(self, intent: Intent, budget: CallBudget | None = None) -> Reply:
        """See `CircuitCore.carry_out`.  Changes nothing."""
        now = wall_clock_ms()
        return Reply(True, Circuit(self._state, opened_at_ms=now + self._opened_ahead_ms), now)


def rejection_time_s(reply: Reply, reset_timeout_s: float, clock_ms: Callable[[], float] = wall_clock_ms) -> float:
    """Return the seconds until a circuit admits a call.  0 if the circuit admits one now.

    Args:
        reply: The circuit, times by the local clock.
        reset_timeout_s: Seconds for which its breaker keeps an open circuit open.
        clock_ms: Function that returns the local time, milliseconds since the epoch.
    """
    circuit, left_ms = reply.circuit, 0.0
    if circuit.state == OPEN:
        # pybreaker compares with the local wall clock, also where a test has moved that clock.
        left_ms = (circuit.opened_at_ms or 0) + reset_timeout_s * 1000 - clock_ms()
    elif circuit.is_probe_leased(reply.now_ms):
        left_ms = circuit.probe_until_ms - reply.now_ms
    return max(0.0, left_ms / 1000)


@dataclass(frozen=True, slots=True)
class CircuitSettings:
    """Settings of a circuit in Redis as its user gave them.  All storages of the circuit should have the same.

    See `pybreaker_redis.storage.CircuitRedisStorage` for the attributes.
    """

    state: str
    fallback_circuit_state: str
    probe_lease: float
    max_staleness: float
    timeout: float | None
    ttl: float | None


def client_source(redis_object: Any) -> Callable[[], Any]:
    """Return a callable that returns a client.

    Args:
        redis_object: Client, or a callable without arguments that returns one.

    Raises:
        TypeError: The object is neither, or the client is asynchronous.
    """
    is_client = hasattr(redis_object, "evalsha") and not isinstance(redis_object, type)
    # Clients for tests derive from an asynchronous class, and lie in a module of another name.
    is_asynchronous = is_client and any("asyncio" in base.__module__ for base in inspect.getmro(type(redis_object)))
    if is_asynchronous or not (is_client or callable(redis_object)):
        shown = format_value(redis_object)
        msg = f"redis_object must be a synchronous client or a callable that returns one, not {shown}"
        raise TypeError(msg)
    source: Callable[[], Any] = (lambda: redis_object) if is_client else redis_object
    return source


def shared_circuit(
    source: Callable[[], Any],
    namespace: str | None,
    *,
    base: str,
    needs_one_slot: bool,
    settings: CircuitSettings,
    ttl_ms: int,
    logger: logging.Logger,
) -> Failover:
    """Return a circuit in Redis.  Nothing is sent before its first use.

    Args:
        source: Callable that returns the client.
        namespace: Prefix of the keys.  ``None``: no prefix.
        base: Part of each key between the namespace and the name of the value.
        needs_one_slot: Whether the keys share one slot of a cluster.
        settings: Validated settings.
        ttl_ms: `CircuitSettings.ttl` in milliseconds.  0: never.
        logger: Logger for what is found in Redis.
    """
    name = namespace or base
    settings_check = SettingsCheck(name, asdict(settings), is_nameless=namespace is None)
    return Failover(
        name,
        CircuitLocator(source, namespace, needs_one_slot=needs_one_slot, base=base),
        initial_state=settings.state,
        fallback=settings.fallback_circuit_state,
        timeout=settings.timeout,
        ttl_ms=ttl_ms,
        view=View(settings.max_staleness),
        settings_check=settings_check,
        logger=logger,
    )
