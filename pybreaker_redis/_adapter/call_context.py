"""What has this thread said, and what does it hold?

Knows: one thread's side of the conversation with one storage.  Does not know: what is said.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from pybreaker_redis._circuits.probes import PROBE_TOKENS
from pybreaker_redis._model.circuit import BY_HAND, HALF_OPEN, OPEN, Admission, Circuit
from pybreaker_redis._model.intents import Reply
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._runtime.clock import monotonic

#: Tokens of the probes that were claimed last in the running context: tasks share a thread, and each has its context.
#: One variable for all storages, since a variable is never freed.
_CLAIMED: ContextVar[tuple[str, ...]] = ContextVar("probes claimed", default=())

#: Claims that a context remembers: so many circuits may probe in nested calls.
_MOST_CLAIMS = 8

#: Part of the timeout that is left for the last of several questions that belong to one call.
LAST_REQUEST_SHARE_MIN = 0.2


_UNSEEN = Circuit()


class CountedReport(NamedTuple):
    """What came of the report of a call, for what pybreaker does next in the same method.

    Attributes:
        reporter: The identity of that method's frame, which is unique while the method runs.
        admission: What the report spoke for.
        accepted: Whether it counted.
        total: The counter as the report left it; 0 if it came too late to count.
    """

    reporter: int
    admission: Admission
    accepted: bool
    total: int


@dataclass(slots=True)
class CallContext:
    """One thread's side of the conversation.

    Attributes:
        last_seen: The circuit that it saw last, or moved last, as an admission.
        claimed_token: The probe that it has claimed last.
        half_opened_generation: The generation in which it has half-opened the circuit by hand, or given back a probe.
        seen_open: The circuit when it found that the timeout has passed.
        counted: Its last report that was counted or refused.
        trip_admission: What the trip in progress speaks for.
        waited: For how many seconds it has waited for an answer since its call began.
        has_reported: Whether it has reported since; then a further report is that of another call.
        is_apart: Whether it asks for something that belongs to no call.
        was_granted: Whether what it wanted last was granted; if that was a transition, whether this thread made it.
        is_notifying: Whether a breaker may still be telling its listeners of a new state.
        rejected_reply: The answer to its last look, if that was for a call and the circuit is open.
    """

    last_seen: Admission = BY_HAND
    claimed_token: str = ""
    half_opened_generation: int | None = None
    seen_open: Circuit = _UNSEEN
    counted: CountedReport | None = None
    trip_admission: Admission = BY_HAND
    waited: float = 0.0
    has_reported: bool = True
    is_apart: bool = False
    was_granted: bool = True
    is_notifying: bool = False
    rejected_reply: Reply | None = None

    def begins(self) -> None:
        """A call of its begins, whose time has not been used yet."""
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
            with deadline(None if timeout is None else max(timeout - self.waited, timeout * LAST_REQUEST_SHARE_MIN)):
                yield
        finally:
            self.waited += monotonic() - began

    def claim(self, token: str) -> None:
        """It has got the probe."""
        self.claimed_token = token
        _CLAIMED.set((*_CLAIMED.get()[1 - _MOST_CLAIMS :], token))

    def take_over_claim(self, claimer: CallContext, circuit: Circuit) -> None:
        """Use the probe that another thread has claimed: that thread holds it no longer."""
        if claimer is not self:
            claimer.claimed_token = ""
            self.claim(circuit.probe_token)

    def holds(self, circuit: Circuit) -> bool:
        """Whether the probe is this thread's, and was claimed in the running context."""
        is_named = circuit.probe_token == self.claimed_token != "" and self.claimed_token in _CLAIMED.get()
        return is_named and not PROBE_TOKENS.has_ended(self.claimed_token)

    def counted_in(self, frame: FrameType | None) -> CountedReport | None:
        """The report that the running method with this frame has made."""
        report = self.counted
        return report if report is not None and report.reporter == id(frame) else None

    def visible_state(self, circuit: Circuit, now_ms: float) -> str:
        """The state of a circuit, to this thread: half-open only if it is the one that is to probe."""
        if circuit.state != HALF_OPEN:
            return circuit.state
        if not circuit.probe_token:
            return HALF_OPEN if self.half_opened_generation == circuit.generation else OPEN
        # An ended lease has to be claimed again.
        return HALF_OPEN if now_ms < circuit.probe_until_ms and self.holds(circuit) else OPEN


class CallContexts:
    """One `CallContext` for each thread of this process: a forked child inherits the memory, but not the probe.

    The kind of thread is looked up when the process first needs it: gevent replaces it, in gunicorn's workers only
    after the application has been loaded.
    """

    def __init__(self) -> None:
        self._of_process: dict[int, threading.local] = {}

    def current(self) -> CallContext:
        """The calling thread's."""
        pid = os.getpid()
        local = self._of_process.get(pid) or self._of_process.setdefault(pid, threading.local())
        try:
            caller: CallContext = local.caller
        except AttributeError:
            caller = local.caller = CallContext()
        return caller
