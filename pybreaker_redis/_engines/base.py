"""Interface of the engines that execute intents on one circuit.

An engine executes each intent atomically: in memory, by a Lua script or by a transaction.  `selector.py` chooses one of
the engines on Redis.  The choice is one immutable value, so that readers without a lock see all of it or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Intent, Reply

#: Modes of the engines on Redis, as `Health.mode` shows them.
LUA_MODE = "lua"
TRANSACTION_MODE = "optimistic"


class Engine(Protocol):
    """Executor of intents on one circuit."""

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Execute an intent atomically.

        Args:
            intent: The intent.
            known: Circuit as this process last read it.  An engine that has lost its data restores the circuit from
                this value.
            state_if_missing: Initial state of a circuit that exists neither in the engine nor in `known`.
        """
        ...


class RedisEngine(Engine, Protocol):
    """Engine on a circuit in Redis."""

    @property
    def mode(self) -> str:
        """`LUA_MODE` or `TRANSACTION_MODE`."""
        ...

    @property
    def client(self) -> Any:
        """Client of the server or node that holds the circuit."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Engine of one circuit, with the location for which the engine was chosen.

    Attributes:
        engine: The engine.
        keys: Keys of the circuit, in the order of the scripts.
        channel: Channel on which the engine publishes transitions (empty: the engine does not publish).
        is_one_slot: Whether a command may not name keys of several circuits, because the server is a cluster's node.
    """

    engine: RedisEngine
    keys: tuple[str, ...]
    channel: str
    is_one_slot: bool
