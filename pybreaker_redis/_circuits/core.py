"""What all kinds of circuits have in common.

Knows: replies of engines.  Does not know: engines, breakers.
"""

from __future__ import annotations

from pybreaker_redis._model.circuit import OPEN
from pybreaker_redis._model.intents import Reply
from pybreaker_redis._runtime.clock import wall_clock_ms


def rejection_time_s(reply: Reply, reset_timeout: float) -> float:
    """How long a circuit goes on rejecting calls, seconds; 0 if it lets one pass.

    Args:
        reply: What is true of it, by the local clock.
        reset_timeout: Of its breaker, seconds.
    """
    circuit, left_ms = reply.circuit, 0.0
    if circuit.state == OPEN:
        # pybreaker compares with the local wall clock, wherever a test has moved it.
        left_ms = (circuit.opened_at_ms or 0) + reset_timeout * 1000 - wall_clock_ms()
    elif circuit.is_probe_leased(reply.now_ms):
        left_ms = circuit.probe_until_ms - reply.now_ms
    return max(0.0, left_ms / 1000)
