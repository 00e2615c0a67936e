"""What is logged when a circuit moves?

Knows: what listeners are told.  Does not know: storages, Redis.

Listeners are told whether or not the circuit is shared.  In a fleet each process notices what another one has brought
about; a line tells the two apart, so that one transition is one warning.
"""

from __future__ import annotations

import logging

from pybreaker import STATE_OPEN as OPEN
from pybreaker import CircuitBreaker, CircuitBreakerListener, CircuitBreakerState

from pybreaker_redis.storage import made_transition

__all__ = ("LogListener",)


class LogListener(CircuitBreakerListener):
    """One line for each change of state, and none for calls.

    The process that brings the change about says so: with the level WARNING if the circuit opens, else INFO.  The
    others say at the level INFO that they have noticed.  Each record carries what it says as a dictionary, too, in the
    attribute ``pybreaker_redis``: ``event`` (``state_change``), ``breaker``, ``old`` and ``new`` (states), ``noticed``
    (whether somebody else has moved it), ``reset_timeout`` (seconds).

    Args:
        logger: Where to.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("pybreaker_redis")

    def state_change(
        self, cb: CircuitBreaker, old_state: CircuitBreakerState | None, new_state: CircuitBreakerState
    ) -> None:
        """See `pybreaker.CircuitBreakerListener`."""
        noticed = not made_transition(cb)
        old, new = old_state.name if old_state else "", new_state.name
        self._logger.log(
            logging.WARNING if new == OPEN and not noticed else logging.INFO,
            "breaker %r: %s%s",
            cb.name,
            f"it was {old} and is {new}",
            ", as somebody else has it" if noticed else "",
            extra={
                "pybreaker_redis": {
                    "event": "state_change",
                    "breaker": cb.name,
                    "old": old,
                    "new": new,
                    "noticed": noticed,
                    "reset_timeout": cb.reset_timeout,
                }
            },
        )
