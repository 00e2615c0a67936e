"""Log lines of this package.

Each function returns one line as a value, made of plain values.  `_runtime/logger.py` emits lines and masks secrets.
A `logging.Handler` of the logger ``pybreaker_redis`` finds the same facts as a dictionary in the attribute
``pybreaker_redis`` of the record.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple


class Name(str):
    """Name of a circuit or channel, which is never masked, even if it looks like a secret, as ``password:reset``."""

    __slots__ = ()


class Line(NamedTuple):
    """One log line.

    Attributes:
        level: Level of the logging module.
        message: Format string of the logging module.
        arguments: Values for the format string.
        extra: Facts for handlers (``None``: none).
    """

    level: int
    message: str
    arguments: tuple[object, ...] = ()
    extra: Mapping[str, Any] | None = None


def server_lost(
    server: str,
    *,
    is_unreachable: bool,
    error: str,
    timeout_s: float | None,
    circuit: str,
    other_circuits: int,
    pause_s: float,
    wait_s: float,
    more_losses: int,
) -> Line:
    """Return the line about a server that has failed.

    Args:
        server: Name of the server.
        is_unreachable: Whether the server does not answer, and not only refuses writes.
        error: Class and text of the error, masked.
        timeout_s: Seconds that the call waited, if the error is a timeout (``None``: another error).
        circuit: Name of the circuit that met the error.
        other_circuits: Number of other circuits of this process on the server.
        pause_s: Seconds until the next attempt.
        wait_s: Seconds that the next attempt waits for an answer.
        more_losses: Number of losses since the last line about the server that were not logged.
    """
    return Line(
        logging.WARNING,
        "Redis at %s %s (%s%s); circuit %r %s local state, next attempt in %.2f s, waiting up to %.2f s%s",
        (
            server,
            "is unreachable" if is_unreachable else "refuses writes",
            f"timeout after {timeout_s * 1000:.0f} ms, " if timeout_s else "",
            error,
            Name(circuit),
            f"and {other_circuits} other{'s' if other_circuits > 1 else ''} use" if other_circuits else "uses",
            pause_s,
            wait_s,
            _and_more(more_losses),
        ),
        {"event": "away", "server": server, "error": error, "pause": pause_s, "more_losses": more_losses},
    )


def _and_more(losses: int) -> str:
    return f"; {losses} more losses since the last such line" if losses else ""


def circuit_refused(circuit: str, *, error: str, pause_s: float, more_losses: int) -> Line:
    """Return the line about one circuit that the server refuses, or answers with no usable reply.

    Args:
        circuit: Name of the circuit.
        error: Class and text of the error, masked.
        pause_s: Seconds until the next attempt.
        more_losses: Number of such errors since the last line about them that were not logged.
    """
    return Line(
        logging.WARNING,
        "circuit %r: Redis gave no usable reply (%s); the circuit uses local state, next attempt in %.1f s%s",
        (Name(circuit), error, pause_s, _and_more(more_losses)),
    )


def circuit_permitted(circuit: str, *, seconds: float, more_losses: int) -> Line:
    """Return the line about one circuit that the server accepts again.

    Args:
        circuit: Name of the circuit.
        seconds: Duration of the refusal.
        more_losses: Number of refusals since the last line about them that were not logged.
    """
    return Line(
        logging.INFO,
        "circuit %r: Redis serves the circuit again (after %.1f s)%s",
        (Name(circuit), seconds, _and_more(more_losses)),
    )


def server_returned(server: str, *, seconds: float, outcomes: Mapping[str, int], more_losses: int) -> Line:
    """Return the line about a server that answers again.

    Args:
        server: Name of the server.
        seconds: Duration of the outage.
        outcomes: Number of circuits for each outcome of the reconciliation, where an empty key means no outcome.
        more_losses: Number of losses since the last line about the server that were not logged.
    """
    text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome)
    return Line(
        logging.INFO,
        "Redis at %s is available again (after %.1f s); circuits: %s%s",
        (server, seconds, text or "nothing to reconcile", _and_more(more_losses)),
        {
            "event": "back",
            "server": server,
            "seconds": seconds,
            "outcomes": dict(outcomes),
            "more_losses": more_losses,
        },
    )


def circuits_left(server: str, *, seconds: float, more_losses: int) -> Line:
    """Return the line about a node of a cluster after all of its circuits have moved to other nodes.

    Args:
        server: Name of the node.
        seconds: Duration of the outage of the node.
        more_losses: Number of losses since the last line about the node that were not logged.
    """
    return Line(
        logging.INFO,
        "Redis at %s: all circuits have moved to other nodes of the cluster (after %.1f s)%s",
        (server, seconds, _and_more(more_losses)),
        {"event": "moved", "server": server, "seconds": seconds, "more_losses": more_losses},
    )


#: Level and text of the line about each missing feature, by the value of `MissingFeature`.
_MISSING_FEATURES = {
    "scripts": (
        logging.WARNING,
        "runs no scripts (%s); circuits use transactions, which take more round trips, also to read a circuit",
    ),
    "preloading": (
        logging.INFO,
        "does not permit SCRIPT (%s); the first use of each script on an empty server sends its source, 10 to 12 KiB",
    ),
    "names": (logging.INFO, "does not accept EVALSHA (%s); each call sends the source of its script, 10 to 12 KiB"),
    "publishing": (
        logging.WARNING,
        "does not permit PUBLISH (%s); processes without tracking notice transitions at their next poll",
    ),
    "tracking": (
        logging.INFO,
        "does not track keys (%s); unpublished changes, as by redis-cli, are noticed within max_staleness",
    ),
}


def feature_missing(server: str, *, feature: str, error: str) -> Line:
    """Return the line about a feature that a server does not have, or forbids.

    Args:
        server: Name of the server.
        feature: Value of `MissingFeature`.
        error: Text of the server's refusal, masked.
    """
    level, message = _MISSING_FEATURES[feature]
    extra = {"event": "lack", "server": server, "lack": feature, "error": error}
    return Line(level, "Redis at %s " + message, (server, error), extra)


def settings_differ(circuit: str, settings: Mapping[str, tuple[object, object]]) -> Line:
    """Return the line about two storages of this process that share a circuit and have different settings.

    Args:
        circuit: Name of the circuit.
        settings: Values of both storages, by the name of the argument.
    """
    return Line(
        logging.WARNING,
        "circuit %r: two storages of this process have different settings (%s); give both the same, or share one "
        "storage",
        (Name(circuit), ", ".join(f"{name}={one!r} and {name}={other!r}" for name, (one, other) in settings.items())),
    )


def namespace_missing(circuit: str) -> Line:
    """Return the line about several breakers of this process that share a circuit for want of a namespace.

    Args:
        circuit: Name of the circuit.
    """
    return Line(
        logging.WARNING,
        "circuit %r: several breakers of this process share the circuit, because their storages have no namespace; "
        "a trip opens all of them, so pass a namespace, as in CircuitRedisStorage(..., namespace='payments')",
        (Name(circuit),),
    )


def client_may_block(client_class: str, *, wait_s: float | None) -> Line:
    """Return the line about a client that may block a guarded call, because no connections with deadlines can be made.

    Args:
        client_class: Name of the client's class.
        wait_s: Seconds that a command of the client may take (``None``: without end).
    """
    return Line(
        logging.WARNING,
        "%s: no connections with deadlines can be made like this client's; a guarded call may wait for Redis %s, so "
        "set the client's socket_timeout and socket_connect_timeout, and few retries",
        (client_class, "without end" if wait_s is None else f"for {wait_s:.0f} s"),
    )


def client_blocked(client_class: str, *, seconds: float, timeout_s: float) -> Line:
    """Return the line about a client of an unknown kind that has exceeded the timeout.

    Args:
        client_class: Name of the client's class.
        seconds: Duration of the command.
        timeout_s: Seconds that a guarded call may wait for Redis.
    """
    return Line(
        logging.WARNING,
        "%s: a command took %.1f s, longer than the timeout of %.2f s (the client waits or retries by itself); pass a "
        "plain client to the storage",
        (client_class, seconds, timeout_s),
    )


def push_impossible(circuit: str, *, client_class: str) -> Line:
    """Return the line about a circuit without push, because no further connections like the client's can be made.

    Args:
        circuit: Name of the circuit.
        client_class: Name of the client's class.
    """
    return Line(
        logging.INFO,
        "circuit %r: no push by way of a client of class %s; every read of the circuit is a round trip",
        (Name(circuit), client_class),
    )


def record_repaired(circuit: str, *, repair: str, state: str) -> Line:
    """Return the line about a record in Redis that was damaged.

    Args:
        circuit: Name of the circuit.
        repair: Note of the engine about the repair.
        state: State of the circuit after the repair.
    """
    return Line(
        logging.WARNING,
        "circuit %r: values in Redis were missing or damaged (%s); the circuit is %s",
        (Name(circuit), repair, state),
    )


def record_restored(circuit: str, *, state: str) -> Line:
    """Return the line about a record that Redis had lost, and that this process has restored.

    Args:
        circuit: Name of the circuit.
        state: State of the restored circuit.
    """
    return Line(logging.WARNING, "circuit %r: Redis has lost the circuit; restored as %s", (Name(circuit), state))


def push_refused(subject: str, *, error: str, left_out: int = 0) -> Line:
    """Return the line about a server or a channel that sends no pushes.

    Args:
        subject: Name of the server or the channel.
        error: Text of the refusal, masked.
        left_out: Number of such lines since the last one that were not logged.
    """
    return Line(
        logging.WARNING,
        "%s: no push of changes (%s); every read of a circuit is a round trip%s",
        (Name(subject), error, _left_out(left_out)),
    )


def _left_out(lines: int) -> str:
    return f"; {lines} more such lines were left out" if lines else ""


def push_interrupted(server: str, *, error: str, left_out: int = 0) -> Line:
    """Return the line about a push connection that was lost.

    Args:
        server: Name of the server.
        error: Class and text of the error, masked.
        left_out: Number of such lines since the last one that were not logged.
    """
    return detail("%s: no push until the next connection (%s)%s", server, error, _left_out(left_out))


def detail(message: str, *arguments: object) -> Line:
    """Return a line for the search for a cause, at level DEBUG.

    Args:
        message: Format string of the logging module.
        arguments: Values for the format string.
    """
    return Line(logging.DEBUG, message, arguments)


def listener_failed(circuit: str, *, listener: str, method: str, error: str, left_out: int) -> Line:
    """Return the line about a listener of the application that has raised an error.

    Args:
        circuit: Name of the breaker.
        listener: Class of the listener.
        method: Method that raised the error.
        error: Class and text of the error, masked.
        left_out: Number of such errors since the last line.
    """
    return Line(
        logging.ERROR,
        "circuit %r: listener %s failed in %s (%s); the call continues%s",
        (Name(circuit), listener, method, error, f" ({left_out} more such errors before)" if left_out else ""),
        {"event": "listener_failed", "circuit": Name(circuit), "listener": listener, "method": method, "error": error},
    )
