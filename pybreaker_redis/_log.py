"""What is said in the log when a server goes and when it is back?

Knows: words, what errors mean.  Does not know: when to say them.

Whoever wants to do more about it than read attaches a `logging.Handler` to the logger ``pybreaker_redis``: the records
carry what they say as a dictionary, too, in the attribute ``pybreaker_redis``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pybreaker_redis._redis.classify import ErrorKind, MissingFeature
from pybreaker_redis._redis.endpoint import command_wait_limit
from pybreaker_redis._runtime.logger import LOSS_WINDOW_S, _say
from pybreaker_redis._runtime.redaction import mask_text
from pybreaker_redis._servers.availability import Outage

#: Seconds for which a client may make a guarded call wait without being told of.
CLIENT_WAIT_WARNING_S = 1.0


_logger = logging.getLogger("pybreaker_redis")


def away(server: str, outage: Outage, *, timeout: float | None, circuit: str, besides: int, more: int) -> None:
    """A server has failed.

    Args:
        server: Which.
        outage: What is the matter.
        timeout: Seconds that were waited for an answer at most; ``None``: as long as the client takes.
        circuit: That has met the error.
        besides: How many more circuits of this process live there.
        more: How many losses were not logged since the last line about the server.
    """
    pause = outage.next_attempt_at - outage.since
    _say(
        logging.WARNING,
        "circuit %r%s: Redis at %s %s (%s%s); using this process's own state, next attempt in %.2f s, waiting up to "
        "%.2f s%s",
        circuit,
        f" and {besides} more" if besides else "",
        server,
        "is away" if outage.kind is ErrorKind.UNREACHABLE else "takes no writes",
        f"no answer within {timeout * 1000:.0f} ms, " if timeout and outage.is_timeout else "",
        outage.error,
        pause,
        outage.answer_wait_s,
        _and_more(more),
        extra=_extra(event="away", server=server, error=outage.error, pause=pause, more_losses=more),
    )


def _extra(**words: Any) -> dict[str, Any]:
    return {"pybreaker_redis": words}


def _and_more(losses: int) -> str:
    return f"; and {losses} more losses in the last {LOSS_WINDOW_S:.0f} s" if losses else ""


def in_trouble(circuit: str, outage: Outage, more: int = 0) -> None:
    """A circuit has met an error that is its own: it is refused something, or nothing makes sense.

    Args:
        circuit: Which.
        outage: What is the matter.
        more: How often it had such an error without a line since the last one about it.
    """
    _say(
        logging.WARNING,
        "circuit %r: Redis gave no usable answer (%s); using this process's own state, next attempt in %.1f s%s",
        circuit,
        outage.error,
        outage.next_attempt_at - outage.since,
        _and_more(more),
    )


def permitted(circuit: str, seconds: float, more: int = 0) -> None:
    """A circuit is served again.

    Args:
        circuit: Which.
        seconds: For how long it was not.
        more: See `in_trouble`.
    """
    _say(logging.INFO, "circuit %r: Redis serves it again after %.1f s%s", circuit, seconds, _and_more(more))


def back(server: str, seconds: float, outcomes: Counter[str], more: int = 0) -> None:
    """A server answers again.

    Args:
        server: Which.
        seconds: For how long it did not.
        outcomes: What has come of the circuits that live there, and of how many.
        more: See `away`.
    """
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome)
    _say(
        logging.INFO,
        "Redis at %s is back after %.1f s; circuits: %s%s",
        server,
        seconds,
        said or "nothing to bring back",
        _and_more(more),
        extra=_extra(event="back", server=server, seconds=seconds, outcomes=dict(outcomes), more_losses=more),
    )


def left(server: str, seconds: float, more: int = 0) -> None:
    """All circuits that lived on a server live elsewhere by now.

    Args:
        server: Which.
        seconds: For how long it had not answered.
        more: See `away`.
    """
    _say(
        logging.INFO,
        "Redis at %s: its circuits live on other nodes of the cluster after %.1f s%s",
        server,
        seconds,
        _and_more(more),
        extra=_extra(event="moved", server=server, seconds=seconds, more_losses=more),
    )


#: How much it matters that something is missing, and what becomes of it.
_LACKS = {
    MissingFeature.SCRIPTS: (
        logging.WARNING,
        "runs no scripts (%s); using transactions, which take more round trips, also for every look at a circuit",
    ),
    MissingFeature.EVALSHA: (logging.INFO, "runs scripts, but not by name (%s); each is sent as a whole, about 12 KiB"),
    MissingFeature.PUBLISH: (
        logging.WARNING,
        "lets nobody publish changes of circuits (%s); processes that it does not tell itself notice them late",
    ),
    MissingFeature.TRACKING: (
        logging.INFO,
        "does not tell of changes itself (%s); what nobody publishes, as redis-cli, is noticed within max_staleness",
    ),
}


def lacking(server: str, lack: MissingFeature, reason: object) -> None:
    """A server does not have something, and circuits do without.

    Args:
        server: Which.
        lack: What is missing.
        reason: What it has answered.
    """
    level, message = _LACKS[lack]
    said = mask_text(reason).partition(", with args")[0]
    words = _extra(event="lack", server=server, lack=lack.value, error=said)
    _say(level, "Redis at %s " + message, server, said, extra=words)


def differ(circuit: str, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Two storages of this process are one circuit, and not alike.

    Args:
        circuit: Which.
        settings: What each of them was given, by the name of the argument.
    """
    _say(
        logging.WARNING,
        "circuit %r: two storages of this process differ: %s; give both the same, or let their breakers use one",
        circuit,
        ", ".join(f"{name}={one!r} and {name}={other!r}" for name, (one, other) in settings.items()),
    )


def nameless(circuit: str) -> None:
    """Several breakers of this process are one circuit because none of them was given a name.

    Args:
        circuit: Which.
    """
    _say(
        logging.WARNING,
        "circuit %r: several breakers of this process use it, because their storages have no namespace: what opens one "
        "opens all; give each storage one of its own, as in CircuitRedisStorage(..., namespace='payments')",
        circuit,
    )


def may_wait(client: Any) -> None:
    """No connections with deadlines can be made like this client's: say so if it may wait for long."""
    longest = command_wait_limit(client)
    if longest is None or longest > CLIENT_WAIT_WARNING_S:
        _say(
            logging.WARNING,
            "%s: no connections with deadlines can be made of its kind, so a guarded call may wait for Redis %s: give "
            "the client a socket_timeout, a socket_connect_timeout, and few retries",
            type(client).__name__,
            "without end" if longest is None else f"for {longest:.0f} s",
        )


def waited(client: Any, seconds: float, timeout: float) -> None:
    """A client of an unknown kind has waited by itself.

    Args:
        client: That was used as it is.
        seconds: That an operation has taken.
        timeout: Seconds that it should have taken at most.
    """
    _say(
        logging.WARNING,
        "%s: a command took %.1f s, and a guarded call is to wait for %.2f s at most; the client waits by itself: give "
        "the storage a plain one",
        type(client).__name__,
        seconds,
        timeout,
    )


def deaf(circuit: str, client: Any) -> None:
    """Changes of a circuit cannot be heard because no further connections can be made like its client's."""
    _say(
        logging.INFO,
        "circuit %r: changes cannot be heard by way of %s; every look at the circuit is a round trip",
        circuit,
        type(client).__name__,
    )


def repaired(logger: logging.Logger, circuit: str, what: str, state: str) -> None:
    """What lay in Redis made no sense.

    Args:
        logger: Of the storage.
        circuit: Which.
        what: Was made of it.
        state: That it is in.
    """
    _say(
        logging.WARNING,
        "circuit %r: values in Redis were missing or made no sense; %s; it is %s",
        circuit,
        what,
        state,
        logger=logger,
    )


def restored(logger: logging.Logger, circuit: str, state: str) -> None:
    """Redis had lost a circuit that this process knew."""
    _say(logging.WARNING, "circuit %r: Redis has lost it; restored as %s", circuit, state, logger=logger)


def unheard(what: str, reason: object, left_out: str = "") -> None:
    """Changes of circuits are not told.

    Args:
        what: Of a server, or of one circuit.
        reason: What it has answered.
        left_out: How many such lines were left out, as `RepeatThrottle` says it.
    """
    _say(
        logging.WARNING,
        "%s: changes of circuits cannot be heard (%s); every look at a circuit is a round trip%s",
        what,
        mask_text(reason).partition(", with args")[0],
        left_out,
    )


def detail(message: str, *arguments: object) -> None:
    """What helps whoever looks for a cause, and nobody else."""
    # In the log of a level that few read, and of no less interest to those who should not.
    said = (mask_text(item) if isinstance(item, BaseException | str) else item for item in arguments)
    _say(logging.DEBUG, message, *said)
