"""May this call pass unasked?

Knows: what holds for every call, and until when.  Does not know: who keeps it true.

A closed circuit admits every call, an open one rejects it, and a success that has no failures to forget need not be
reported.  As long as that is known, a guarded success is two comparisons.  Everything else takes the long way, which
comes to the same answers.

The admission is an object, not a number: it is replaced whenever a breaker is put into another state than closed.  So
whoever still holds it got it from a breaker that has been closed ever since, and has nothing to notice.  The same goes
for the rejection and open breakers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pybreaker_redis._model.circuit import CLOSED, OPEN, Admission, Circuit


class FastPath:
    """What is known of one circuit, in the form that costs least to look at.

    Attributes:
        admission: To any call, as long as the circuit is closed; ``None`` while it is not, or not known to be.
        quiet_admission: The same, if besides there are no failures to forget.
        rejection: Of any call, as long as the circuit is open: what is reported in its name is refused.
        trusted_until: When all this ends, seconds on `now`.
        now: Seconds, monotonic.  An attribute, because freezegun replaces what it finds in modules.
        was_used: Whether anybody has relied on it since this was last set to ``False``.
    """

    __slots__ = ("admission", "now", "quiet_admission", "rejection", "trusted_until", "was_used")

    def __init__(self, until: float = math.inf, now: Callable[[], float] = time.monotonic) -> None:
        self.admission: Admission | None = None
        self.quiet_admission: Admission | None = None
        self.rejection: Admission | None = None
        self.trusted_until = until
        self.now = now
        self.was_used = False

    def follow(self, circuit: Circuit, *, quiet: bool) -> None:
        """The circuit is like this; `quiet`: and it has no failures to forget."""
        self.keep_only(circuit.state)
        if circuit.state == CLOSED:
            if self.admission is None or self.admission.generation != circuit.generation:
                self.admission = Admission(circuit.generation)
            self.quiet_admission = self.admission if quiet else None
        elif circuit.state == OPEN and (self.rejection is None or self.rejection.generation != circuit.generation):
            self.rejection = Admission(circuit.generation)

    def keep_only(self, state: str) -> None:
        """The circuit, or a breaker, is in this state: whoever goes by another has to look again."""
        if state != CLOSED:
            self.admission = self.quiet_admission = None
        if state != OPEN:
            self.rejection = None

    def withdraw(self) -> None:
        """From here on everybody has to ask."""
        self.admission = self.quiet_admission = self.rejection = None
