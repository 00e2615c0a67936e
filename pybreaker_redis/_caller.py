"""What has this thread said, and what does it hold?

Knows: one thread's side of the conversation with one storage.  Does not know: what is said.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from pybreaker_redis._admissions import BY_HAND
from pybreaker_redis._circuit import HALF_OPEN, OPEN, Admission, Circuit
from pybreaker_redis._clock import monotonic
from pybreaker_redis._deadline import deadline

#: Part of the timeout that is left for the last of several questions that belong to one call.
LEAST_SHARE = 0.2


@dataclass(slots=True)
class Caller:
    """One thread's side of the conversation.

    Attributes:
        looked: What it was told when it looked at the circuit last without calling.
        claimed: The probe that it has claimed last.
        fresh: Whether it has claimed a probe and not yet been admitted with it.
        half_opened: The generation in which it has half-opened the circuit by hand.
        opened_generation: The generation in which it found that the timeout has passed.
        reported: What its last failure spoke for.
        refused: Whether that failure came too late to count.
        count: The counter as its last report left it, until it is read.
        fence: What the trip in progress speaks for.
        waited: For how many seconds it has waited for an answer since its call began.
        has_reported: Whether it has reported since; then a further report is that of another call.
        is_apart: Whether it asks for something that belongs to no call.
        won: Whether what it wanted last was granted; if that was a transition, whether it is the one who made it.
        telling: Whether a breaker may still be telling its listeners of a new state.
    """

    looked: Admission = BY_HAND
    claimed: str = ""
    fresh: bool = False
    half_opened: int | None = None
    opened_generation: int = 0
    reported: Admission = BY_HAND
    refused: bool = False
    count: int | None = None
    fence: Admission = BY_HAND
    waited: float = 0.0
    has_reported: bool = True
    is_apart: bool = False
    won: bool = True
    telling: bool = False

    def begins(self) -> None:
        """It looks at the circuit, so it may be about to call."""
        self.waited, self.has_reported = 0.0, False

    @contextlib.contextmanager
    def asks_apart(self) -> Iterator[None]:
        """What it asks meanwhile belongs to no call, or not to the one it is in: that has a timeout of its own."""
        before, self.is_apart = self.is_apart, True
        try:
            yield
        finally:
            self.is_apart = before

    @contextlib.contextmanager
    def waits(self, timeout: float | None, *, reports: bool = False) -> Iterator[None]:
        """What is asked for one call ends within one timeout, all of it together.

        Args:
            timeout: Seconds; ``None``: as long as it takes.
            reports: Whether it is said now how the call has ended.
        """
        if self.is_apart:
            with deadline(timeout):
                yield
            return
        if reports and self.has_reported:
            # Of a call that was admitted without a look.
            self.waited = 0.0
        self.has_reported = self.has_reported or reports
        began = monotonic()
        try:
            # Not nothing: it may have been this process that was slow, which is no reason to take Redis for away.
            with deadline(None if timeout is None else max(timeout - self.waited, timeout * LEAST_SHARE)):
                yield
        finally:
            self.waited += monotonic() - began

    def claim(self, token: str) -> None:
        """It has got the probe."""
        self.claimed, self.fresh = token, True

    def sees(self, circuit: Circuit, now_ms: float) -> str:
        """The state of a circuit, to this thread: half-open only if it is the one that is to probe."""
        if circuit.state != HALF_OPEN:
            return circuit.state
        if not circuit.probe_token:
            return HALF_OPEN if self.half_opened == circuit.generation else OPEN
        # A claim that has not admitted its call yet does so even if the lease has ended meanwhile: the report will be
        # fenced off if somebody else has claimed.  Later an ended lease has to be claimed anew.
        live = self.fresh or now_ms < circuit.probe_until_ms
        return HALF_OPEN if live and self.claimed == circuit.probe_token else OPEN


class Callers:
    """One `Caller` for each thread of this process: a forked child inherits the memory, but not the probe.

    The kind of thread is looked up when the process first needs it: gevent replaces it, in gunicorn's workers only
    after the application has been loaded.
    """

    def __init__(self) -> None:
        self._of_process: dict[int, threading.local] = {}

    def current(self) -> Caller:
        """The calling thread's."""
        pid = os.getpid()
        local = self._of_process.get(pid) or self._of_process.setdefault(pid, threading.local())
        try:
            caller: Caller = local.caller
        except AttributeError:
            caller = local.caller = Caller()
        return caller
