"""What does an operator ask of the circuits, and what is printed?

Knows: words of a command line, the registry.  Does not know: which framework's command it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from pybreaker import STATE_CLOSED, STATE_HALF_OPEN, STATE_OPEN

from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.operators import storage_of
from pybreaker_redis.registry import BreakerRegistry

#: What puts a circuit into which state.
_STATE_BY_ACTION = {"open": STATE_OPEN, "close": STATE_CLOSED, "half-open": STATE_HALF_OPEN}

#: What can be asked for; the first is what is meant if nothing is said.
COMMAND_ACTIONS = ("status", *_STATE_BY_ACTION, "reset")


class CommandRefusedError(Exception):
    """It could not be done; the message is a line for whoever asked."""


def run_command(registry: BreakerRegistry, action: str, names: Sequence[str]) -> str:
    """Do what is asked for.

    Args:
        registry: Whose circuits.
        action: One of `ACTIONS`.
        names: Of circuits; none at all is all of them, but only to look at.

    Returns:
        What to print.

    Raises:
        CommandRefusedError: An unknown circuit, one that ends with the command's process, or Redis has not done it.
    """
    if unknown := sorted(set(names) - set(registry)):
        known = ", ".join(sorted(registry)) or "none"
        raise CommandRefusedError(f"no circuit is called {', '.join(map(repr, unknown))}; configured: {known}")
    if not names and action != "status":
        raise CommandRefusedError(
            f"name the circuits to {action}: {', '.join(sorted(registry)) or 'none is configured'}"
        )
    if action != "status" and _is_process_local(registry, names[0]):
        # The command's process ends before anybody makes a call in it.
        ours = "the circuits are each process's own (no Redis is configured)"
        raise CommandRefusedError(f"{ours}: there is nothing to {action} from here")
    try:
        for name in names:
            if action in _STATE_BY_ACTION:
                registry.set_state(name, _STATE_BY_ACTION[action])
            elif action == "reset":
                registry.reset(name)
        return _status_table(registry, names or sorted(registry))
    except Exception as error:
        # An operator who has seen no error relies on it; of which library's kind it is, is of no interest.
        raise CommandRefusedError(f"Redis has not done it: {type(error).__name__}: {error}") from error


def _is_process_local(registry: BreakerRegistry, name: str) -> bool:
    """Whether a circuit is this process's alone."""
    return isinstance(storage_of(registry[name]), CircuitMemoryStorage)


def _status_table(registry: BreakerRegistry, names: Sequence[str]) -> str:
    states = registry.status()
    rows = [("circuit", "state", "failures", "opened at", "retry after")]
    for name in names:
        status = states[name]
        opened_at = status.opened_at.isoformat(timespec="seconds") if status.opened_at else "never"
        rest = f"{status.retry_after:.1f} s" if status.retry_after else "-"
        rows.append((name, status.state, str(status.fail_counter), opened_at, rest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
