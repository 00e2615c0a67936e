"""What is said in the log when a server goes and when it is back?

Knows: words.  Does not know: when to say them.

Whoever wants to do more about it than read attaches a `logging.Handler` to the logger ``pybreaker_redis``: the records
carry what they say as a dictionary, too, in the attribute ``pybreaker_redis``.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from pybreaker_redis._client import longest_wait
from pybreaker_redis._guard import Meaning, Outage

#: Seconds for which a client may make a guarded call wait without being told of.
LONGEST_UNSAID_WAIT = 1.0

_logger = logging.getLogger("pybreaker_redis")


def away(server: str, outage: Outage, *, timeout: float | None, circuit: str, besides: int) -> None:
    """A server has failed.

    Args:
        server: Which.
        outage: What is the matter.
        timeout: Seconds that were waited for an answer at most; ``None``: as long as the client takes.
        circuit: That has met the error.
        besides: How many more circuits of this process live there.
    """
    pause = outage.next_at - outage.since
    _logger.warning(
        "circuit %r%s: Redis at %s %s (%s%s); using this process's own state, next attempt in %.2f s, waiting up to "
        "%.2f s",
        circuit,
        f" and {besides} more" if besides else "",
        server,
        "is away" if outage.meaning is Meaning.AWAY else "takes no writes",
        f"no answer within {timeout * 1000:.0f} ms, " if timeout and outage.is_timeout else "",
        outage.error,
        pause,
        outage.patience,
        extra={"pybreaker_redis": {"event": "away", "server": server, "error": outage.error, "pause": pause}},
    )


def back(server: str, seconds: float | None, outcomes: Counter[str]) -> None:
    """A server answers again.

    Args:
        server: Which.
        seconds: For how long it did not; ``None``: it always did, so nothing is said.
        outcomes: What has come of the circuits that live there, and of how many.
    """
    if seconds is None:
        return
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome)
    _logger.info(
        "Redis at %s is back after %.1f s; circuits: %s",
        server,
        seconds,
        said or "nothing to bring back",
        extra={"pybreaker_redis": {"event": "back", "server": server, "seconds": seconds, "outcomes": dict(outcomes)}},
    )


def may_wait(client: Any) -> None:
    """No connections with deadlines can be made like this client's: say so if it may wait for long."""
    longest = longest_wait(client)
    if longest is None or longest > LONGEST_UNSAID_WAIT:
        _logger.warning(
            "%s: no connections with deadlines can be made of its kind, so a guarded call may wait for Redis %s: give "
            "the client a socket_timeout, a socket_connect_timeout, and few retries",
            type(client).__name__,
            "without end" if longest is None else f"for {longest:.0f} s",
        )
