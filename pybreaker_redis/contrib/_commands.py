"""The operator command ``breakers``, independent of the framework that runs it.

A framework passes an action and circuit names, and prints the text that `run_command` returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from pybreaker_redis._runtime.types import State
from pybreaker_redis.errors import StorageUnavailableError
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.operators import storage_of
from pybreaker_redis.registry import BreakerRegistry

#: State that each action puts a circuit into.
_STATE_BY_ACTION: dict[str, State] = {"open": "open", "close": "closed", "half-open": "half-open"}

#: Actions of the command.  The first one is the default.
COMMAND_ACTIONS = ("status", *_STATE_BY_ACTION, "reset")


class CommandRefusedError(Exception):
    """Failure of an operator command.  The message is one line for the operator."""


def run_command(registry: BreakerRegistry, action: str, names: Sequence[str]) -> str:
    """Carry out an operator command.

    Args:
        registry: Registry that has the circuits.
        action: One of `COMMAND_ACTIONS`.
        names: Names of circuits.  An empty sequence means all circuits, and is valid for ``status`` only.

    Returns:
        The status table of the circuits after the command.

    Raises:
        CommandRefusedError: A circuit is unknown, its state ends with this process, or Redis is unavailable.
    """
    if unknown := sorted(set(names) - set(registry)):
        known = ", ".join(sorted(registry)) or "none"
        raise CommandRefusedError(f"no circuit is called {', '.join(map(repr, unknown))}; configured: {known}")
    if not names and action != "status":
        raise CommandRefusedError(
            f"name the circuits to {action}: {', '.join(sorted(registry)) or 'none is configured'}"
        )
    if action != "status" and _is_process_local(registry, names[0]):
        # The process of the command ends before it makes any guarded call.
        raise CommandRefusedError(
            f"each process has its own circuits (no Redis is configured): there is nothing to {action} from here"
        )
    try:
        for name in names:
            if action in _STATE_BY_ACTION:
                registry.set_state(name, _STATE_BY_ACTION[action])
            elif action == "reset":
                registry.reset(name)
        return _status_table(registry, names or sorted(registry))
    except StorageUnavailableError as error:
        # An operator relies on a command that reports no error.
        raise CommandRefusedError(str(error)) from error


def _is_process_local(registry: BreakerRegistry, name: str) -> bool:
    """Whether a circuit exists in this process only."""
    return isinstance(storage_of(registry[name]), CircuitMemoryStorage)


def _status_table(registry: BreakerRegistry, names: Sequence[str]) -> str:
    states = registry.status()
    rows = [("circuit", "state", "failures", "opened at", "retry after")]
    for name in names:
        status = states[name]
        opened_at = status.opened_at.isoformat(timespec="seconds") if status.opened_at else "never"
        retry_after = f"{status.retry_after:.1f} s" if status.retry_after else "-"
        rows.append((name, status.state, str(status.fail_counter), opened_at, retry_after))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
