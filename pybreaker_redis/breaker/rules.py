"""Rules of a breaker: when the circuit opens, for how long, and when it closes."""

from __future__ import annotations

from typing import Any

import pybreaker

from pybreaker_redis._runtime.validation import DURATION_MAX_S, check_seconds, format_value


def check_rules(fail_max: Any, reset_timeout: Any, success_threshold: Any) -> None:
    """Raise an error unless the rules of a breaker are in their ranges.

    Raises:
        TypeError: A value is no number.
        ValueError: A number is out of range.
    """
    for argument, value in (("fail_max", fail_max), ("success_threshold", success_threshold)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            msg = f"{argument} must be a whole number, not {format_value(value)}"
            raise TypeError(msg)
        if value < 1:
            msg = f"{argument} must be at least 1, not {format_value(value)}"
            raise ValueError(msg)
    check_seconds("reset_timeout", reset_timeout)
    if not 0 <= reset_timeout <= DURATION_MAX_S:
        msg = f"reset_timeout must lie between 0 and {DURATION_MAX_S} seconds, not {format_value(reset_timeout)}"
        raise ValueError(msg)


class CheckedRules(pybreaker.CircuitBreaker):
    """Breaker of pybreaker that checks its rules also when they are changed."""

    @property
    def fail_max(self) -> int:
        """Number of consecutive failures that opens the circuit."""
        return self._fail_max

    @fail_max.setter
    def fail_max(self, number: int) -> None:
        check_rules(number, self._reset_timeout, self._success_threshold)
        self._fail_max = number

    @property
    def reset_timeout(self) -> float:
        """Seconds for which an open circuit rejects calls."""
        return self._reset_timeout

    @reset_timeout.setter
    def reset_timeout(self, timeout: float) -> None:
        check_rules(self._fail_max, timeout, self._success_threshold)
        self._reset_timeout = timeout

    @property
    def success_threshold(self) -> int:
        """Number of successful probes that closes the circuit."""
        return self._success_threshold

    @success_threshold.setter
    def success_threshold(self, threshold: int) -> None:
        check_rules(self._fail_max, self._reset_timeout, threshold)
        self._success_threshold = threshold
