"""State that one thread keeps between the operations of pybreaker on one storage.

pybreaker reports a call, trips and probes by several reads and writes in a row.  A `CallContext` connects them: what
the thread saw last, what became of its report, and how long its call has waited for Redis.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

from pybreaker_redis._circuits.budget import CallBudget
from pybreaker_redis._circuits.probes import HeldProbes
from pybreaker_redis._model.circuit import BY_HAND, HALF_OPEN, OPEN, Admission, Circuit
from pybreaker_redis._model.intents import Reply
from pybreaker_redis._runtime import fork

_UNSEEN = Circuit()


class CountedReport(NamedTuple):
    """Result of a call's report, for what pybreaker does next in the same method.

    Attributes:
        reporter: Identity of the frame of that method, which is unique while the method runs.
        admission: Admission of the call.
        accepted: Whether the report counted.
        total: Counter after the report.  0 if the report came too late to count.
    """

    reporter: int
    admission: Admission
    accepted: bool
    total: int


@dataclass(slots=True)
class CallContext:
    """One thread's state between operations on one storage.

    Attributes:
        held_probes: Probes that threads of this process claimed through the storage.
        last_seen: Circuit that the thread saw or moved last, as an admission.
        half_opened_generation: Generation in which the thread half-opened the circuit by hand, or returned a probe.
        seen_open: Circuit when the thread found that the reset timeout is over.
        counted: Last report of the thread that was counted or refused.
        trip_admission: Admission for which the trip in progress happens.
        budget: Time budget of the thread's present call.
        was_accepted: Whether the last intent was granted.  For a transition, whether this thread made the transition.
        is_notifying: Whether a breaker may still be notifying its listeners of a new state.
        rejected_reply: Reply to the last read, if that read was for a call and the circuit is open.
    """

    held_probes: HeldProbes
    last_seen: Admission = BY_HAND
    half_opened_generation: int | None = None
    seen_open: Circuit = _UNSEEN
    counted: CountedReport | None = None
    trip_admission: Admission = BY_HAND
    budget: CallBudget = field(default_factory=lambda: CallBudget(has_reported=True))
    was_accepted: bool = True
    is_notifying: bool = False
    rejected_reply: Reply | None = None

    def counted_in(self, frame: FrameType | None) -> CountedReport | None:
        """Return the report that the running method with this frame has made."""
        report = self.counted
        return report if report is not None and report.reporter == id(frame) else None

    def visible_state(self, reply: Reply) -> str:
        """Return the state of a circuit for this thread: half-open only for the thread that may probe."""
        circuit = reply.circuit
        if circuit.state != HALF_OPEN:
            return circuit.state
        if not circuit.probe_token:
            return HALF_OPEN if self.half_opened_generation == circuit.generation else OPEN
        # An ended lease has to be claimed again.
        is_leased = reply.now_ms < circuit.probe_until_ms
        return HALF_OPEN if is_leased and self.held_probes.is_held_here(circuit.probe_token) else OPEN


class CallContexts:
    """One `CallContext` for each thread of this process.  A forked child starts without any.

    The kind of thread-local storage is looked up at first use in a process, because gevent replaces it.  In gunicorn's
    workers that happens after the application was loaded.

    Args:
        held_probes: Probes that threads of this process claimed through the storage.
    """

    def __init__(self, held_probes: HeldProbes) -> None:
        self._held_probes = held_probes
        self._of_process: dict[int, threading.local] = {}

    def current(self) -> CallContext:
        """Return the context of the calling thread."""
        pid = os.getpid()
        local = self._of_process.get(pid) or self._enter_process(pid)
        try:
            context: CallContext = local.context
        except AttributeError:
            context = local.context = CallContext(self._held_probes)
        return context

    def _enter_process(self, pid: int) -> threading.local:
        # uWSGI forks without Python's hooks.  No call of this process may use an object before all are renewed.
        fork.renew()
        return self._of_process.setdefault(pid, threading.local())
