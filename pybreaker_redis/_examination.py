"""What is the matter with a circuit's Redis, for people?

Knows: the server's guard and the circuit's own, the wall clock.  Does not know: who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pybreaker_redis._clock import from_ms, now_ms
from pybreaker_redis._guard import Guard, Meaning
from pybreaker_redis.health import Condition


@dataclass(frozen=True, slots=True)
class Trouble:
    """What there is to say; the attributes are those of `Health`."""

    condition: Condition
    since: datetime | None
    last_error: str
    next_attempt: float | None
    attempts: int


def examine(server: Guard | None, circuit: Guard) -> Trouble:
    """Look at both guards.

    Args:
        server: Of the server; ``None``: it is not known yet which that is.
        circuit: Of what is only this circuit's trouble.
    """
    guard = circuit if server is None or circuit.outage else server
    outage = guard.outage
    condition: Condition = "unused" if server is None else "connected"
    if outage is not None:
        condition = "refused" if guard is circuit else "away" if outage.meaning is Meaning.AWAY else "read-only"
    return Trouble(
        condition=condition,
        since=None if condition == "unused" else from_ms(now_ms() - (guard.clock() - guard.since) * 1000),
        last_error=circuit.last_error or (server.last_error if server else ""),
        next_attempt=None if outage is None else max(0.0, outage.next_at - guard.clock()),
        attempts=outage.attempts if outage else 0,
    )
