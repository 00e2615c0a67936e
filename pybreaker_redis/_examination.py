"""What is the matter with a circuit's Redis, for people?

Knows: the server's guard and the circuit's own, the wall clock.  Does not know: who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pybreaker_redis._clock import utc_from_ms, wall_clock_ms
from pybreaker_redis._guard import Availability, ErrorKind
from pybreaker_redis.health import Condition


@dataclass(frozen=True, slots=True)
class AvailabilityReport:
    """What there is to say; the attributes are those of `Health`."""

    condition: Condition
    since: datetime | None
    last_error: str
    next_attempt: float | None
    attempts: int


def report_availability(server: Availability | None, circuit: Availability) -> AvailabilityReport:
    """Look at both guards.

    Args:
        server: Of the server; ``None``: it is not known yet which that is.
        circuit: Of what is only this circuit's trouble.
    """
    availability = circuit if server is None or circuit.outage else server
    outage = availability.outage
    condition: Condition = "unused" if server is None else "connected"
    if outage is not None:
        condition = (
            "refused" if availability is circuit else "away" if outage.kind is ErrorKind.UNREACHABLE else "read-only"
        )
    return AvailabilityReport(
        condition=condition,
        since=None
        if condition == "unused"
        else utc_from_ms(wall_clock_ms() - (availability.clock() - availability.since) * 1000),
        last_error=circuit.last_error or (server.last_error if server else ""),
        next_attempt=None if outage is None else max(0.0, outage.next_attempt_at - availability.clock()),
        attempts=outage.attempts if outage else 0,
    )
