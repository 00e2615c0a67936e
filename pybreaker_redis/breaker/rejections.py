"""Errors of calls that an open circuit rejects, and of calls that open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pybreaker import CircuitBreaker

from pybreaker_redis._circuits.core import CircuitCore
from pybreaker_redis._model.circuit import HALF_OPEN, Admission, Circuit
from pybreaker_redis._runtime.clock import utc_from_ms
from pybreaker_redis.breaker.calls import AdmissionDecision
from pybreaker_redis.breaker.transitions import notify
from pybreaker_redis.errors import CircuitOpenError

# Messages begin as pybreaker's do: filters of logs and tests of applications look for them.
_STILL_OPEN = "Timeout not elapsed yet, circuit breaker still open"
_PROBE_TAKEN = "Another caller is testing the dependency, circuit breaker still open"
_TOO_MANY_FAILURES = "Failures threshold reached, circuit breaker opened"
_TRIAL_FAILED = "Trial call failed, circuit breaker opened"


@dataclass(slots=True)
class _OpenSpell:
    """What the rejections of one open circuit have in common, so that a rejection costs little.

    Attributes:
        opened_at_ms: `FastPath.opened_at_ms` when the values were read.
        trusted_until: `FastPath.trusted_until` then.  With each read of the circuit, the values are read again, because
            clocks may have been set.
        local_opened_at_s: When the circuit opened, by the local clock, seconds.
        attributes: Attributes of the errors.
        tenths: Tenths of a second in the message.
        message: Message of the errors.
    """

    opened_at_ms: float | None
    trusted_until: float
    local_opened_at_s: float
    attributes: dict[str, Any]
    tenths: int = -1
    message: str = ""


class Rejections:
    """Errors of the calls of one breaker.

    Args:
        breaker: The breaker.
        core: Circuit of the breaker.
        clock_ms: Function that returns the local time, milliseconds since the epoch.
    """

    def __init__(self, breaker: CircuitBreaker, core: CircuitCore, clock_ms: Callable[[], float]) -> None:
        self._breaker = breaker
        self._core = core
        self._clock_ms = clock_ms
        self._spell: _OpenSpell | None = None
        #: Generation of the last opening that this breaker made, and class and message of its error.
        self._opening: tuple[int, str] = (0, "")

    def note_opening(self, generation: int, cause: str) -> None:
        """Note an opening that this breaker made.

        Args:
            generation: Generation of the open circuit.
            cause: Class and message of the error.
        """
        self._opening = generation, cause

    def quick_error(self, followed: Admission) -> CircuitOpenError | None:
        """Return the error of a call that the view of this process rejects.  ``None``: the circuit decides.

        Args:
            followed: Decision of the fast path that the breaker has followed.
        """
        fast_path, spell = self._core.fast_path, self._spell
        if (
            spell is None
            or fast_path.rejection is not followed
            or fast_path.opened_at_ms != spell.opened_at_ms
            or fast_path.trusted_until != spell.trusted_until
            or fast_path.now() >= fast_path.trust.until
        ):
            return None
        wait_s = spell.local_opened_at_s - self._clock_ms() / 1000 + self._breaker._reset_timeout
        if wait_s <= 0:
            return None
        fast_path.was_used = True
        tenths = int(wait_s * 10)
        if tenths != spell.tenths:
            spell.message, spell.tenths = self._open_message(wait_s), tenths
        error = CircuitOpenError(spell.message)
        error.__dict__.update(spell.attributes, retry_after=wait_s)
        if self._breaker._listeners:
            notify(self._breaker, "rejected", error)
        return error

    def error_of(self, decision: AdmissionDecision, followed: Admission) -> CircuitOpenError:
        """Return the error of a rejected call, and notify the listeners.

        Args:
            decision: The rejection.
            followed: Decision of the fast path that the breaker has followed.
        """
        circuit = decision.circuit
        if circuit.state == HALF_OPEN:
            message = f"{_PROBE_TAKEN} (circuit {self._breaker.name!r})"
        else:
            message = self._open_message(decision.wait_s)
        error = self._open_error(message, circuit, decision.wait_s)
        fast_path = self._core.fast_path
        if followed is fast_path.rejection and circuit.opened_at_ms is not None:
            self._spell = _OpenSpell(
                fast_path.opened_at_ms, fast_path.trusted_until, circuit.opened_at_ms / 1000, dict(vars(error))
            )
        if self._breaker._listeners:
            notify(self._breaker, "rejected", error)
        return error

    def error_of_trip(self, circuit: Circuit, cause: str, *, is_probe: bool) -> CircuitOpenError:
        """Return the error of the call that has opened the circuit.

        Args:
            circuit: The open circuit, times by the local clock.
            cause: Class and message of the error of the dependency.
            is_probe: Whether the call was a probe.
        """
        reason = _TRIAL_FAILED if is_probe else _TOO_MANY_FAILURES
        message = f"{reason} (circuit {self._breaker.name!r}, {cause})"
        return self._open_error(message, circuit, self._breaker.reset_timeout)

    def _open_message(self, wait_s: float) -> str:
        return f"{_STILL_OPEN} (circuit {self._breaker.name!r}, next attempt in {wait_s:.1f} s)"

    def _open_error(self, message: str, circuit: Circuit, wait_s: float) -> CircuitOpenError:
        error = CircuitOpenError(message)
        error.circuit = self._breaker.name or ""
        error.retry_after = wait_s
        error.state = circuit.state
        if circuit.opened_at_ms is not None:
            error.opened_at = utc_from_ms(circuit.opened_at_ms)
        generation, cause = self._opening
        if generation == circuit.generation:
            error.cause = cause
        return error
