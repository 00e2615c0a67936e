"""Fast path: decide a call from memory, without locks or Redis.

A closed circuit admits every call, and an open one rejects every call.  A success without failures before it need not
be reported.  While the process trusts a record of that kind, the fast path decides a guarded success by two
comparisons.  Every other call takes the slow path, which decides alike.

An admission is an object, and not only a number.  `FastPath.keep_only` drops the object when a breaker leaves the
closed state.  So a breaker that still carries the object has been closed since, and has no transition to notice.  The
same holds for the rejection and open breakers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pybreaker_redis._model.circuit import CLOSED, OPEN, Admission, Circuit


class Trust:
    """Time until which decisions hold.  Several fast paths may share one, so that one step extends all of them.

    Attributes:
        until: End of the validity, seconds on the monotonic clock.
    """

    __slots__ = ("until",)

    def __init__(self, until: float) -> None:
        self.until = until


class FastPath:
    """Decisions about the calls of one circuit, in the form that is cheapest to read.

    Attributes:
        admission: Admission of every call (``None``: the circuit is not known to be closed).
        quiet_admission: Same as `admission` while there are no failures to reset, and ``None`` otherwise.
        rejection: Rejection of every call (``None``: the circuit is not known to be open).  Reports of its
            generation are refused.
        opened_at_ms: When the rejecting circuit opened, by the clock of the engine.  Another value shows that the time
            was set by hand, within one generation.
        trust: End of the validity of all decisions, on the clock `now`.
        now: Monotonic clock, seconds.  An attribute, because freezegun replaces functions that it finds in modules.
        was_used: Whether a call has used a decision since the last reset of this attribute to ``False``.
    """

    __slots__ = ("_own_trust", "admission", "now", "opened_at_ms", "quiet_admission", "rejection", "trust", "was_used")

    def __init__(self, until: float = math.inf, now: Callable[[], float] = time.monotonic) -> None:
        self.admission: Admission | None = None
        self.quiet_admission: Admission | None = None
        self.rejection: Admission | None = None
        self.opened_at_ms: float | None = None
        self.trust = self._own_trust = Trust(until)
        self.now = now
        self.was_used = False

    @property
    def trusted_until(self) -> float:
        """End of the validity of all decisions, seconds on `now`.  To set it ends the use of a shared trust."""
        return self.trust.until

    @trusted_until.setter
    def trusted_until(self, until: float) -> None:
        self._own_trust.until = until
        self.trust = self._own_trust

    def follow(self, circuit: Circuit, *, is_quiet: bool) -> None:
        """Derive the decisions from the circuit.

        Args:
            circuit: Present circuit.
            is_quiet: Whether the circuit has no failures to reset.
        """
        self.keep_only(circuit.state)
        if circuit.state == CLOSED:
            if self.admission is None or self.admission.generation != circuit.generation:
                self.admission = Admission(circuit.generation)
            self.quiet_admission = self.admission if is_quiet else None
        elif circuit.state == OPEN:
            self.opened_at_ms = circuit.opened_at_ms
            if self.rejection is None or self.rejection.generation != circuit.generation:
                self.rejection = Admission(circuit.generation)

    def keep_only(self, state: str) -> None:
        """Drop the decisions that belong to other states than this one."""
        if state != CLOSED:
            self.admission = self.quiet_admission = None
        if state != OPEN:
            self.rejection = None

    def withdraw(self) -> None:
        """Drop all decisions, so that every call takes the slow path."""
        self.admission = self.quiet_admission = self.rejection = None
