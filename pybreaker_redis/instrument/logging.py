"""Listener that logs each change of a circuit's state.

Every process that shares a circuit calls its listeners about every change.  The lines distinguish the process that made
a change from those that noticed it, so one shared transition is one warning.  In an outage each process has its own
circuit, and logs its own transitions.
"""

from __future__ import annotations

import logging

from pybreaker import STATE_OPEN, CircuitBreaker, CircuitBreakerListener, CircuitBreakerState

from pybreaker_redis.instrument.authors import is_author

__all__ = ("LogListener",)


class LogListener(CircuitBreakerListener):
    """Listener that logs one line for each change of state, and none for calls.

    The process that makes a change logs it with level WARNING if the circuit opens, and INFO otherwise.  Other
    processes log with level INFO that they noticed the change.  The attribute ``pybreaker_redis`` of each record is a
    dictionary:

    - ``event``: ``state_change``.
    - ``breaker``: Name of the breaker.
    - ``old`` and ``new``: States.
    - ``noticed``: Whether another process made the change.
    - ``reset_timeout``: Seconds that the circuit stays open.

    Args:
        logger: Logger to use.  The default is the logger ``pybreaker_redis``.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("pybreaker_redis")

    def state_change(
        self, cb: CircuitBreaker, old_state: CircuitBreakerState | None, new_state: CircuitBreakerState
    ) -> None:
        """Log a change of state, as `pybreaker.CircuitBreakerListener` defines it."""
        noticed = not is_author(cb)
        old, new = old_state.name if old_state else "", new_state.name
        self._logger.log(
            logging.WARNING if new == STATE_OPEN and not noticed else logging.INFO,
            "breaker %r: %s%s",
            cb.name,
            f"{old or 'unknown'} → {new}",
            ", changed by another process" if noticed else "",
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
