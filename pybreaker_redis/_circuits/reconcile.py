"""Account of a local circuit: what it counted, and what of that the shared circuit must add.

A local circuit goes on from the shared one.  As long as the local circuit has not moved, reports of calls that were
admitted in that very generation of the shared circuit count.  From then on the two have different generations, so that
a call that one circuit admitted is never settled in the other.

A recovery is not reported: where the shared circuit is open, one probe will find the recovery out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pybreaker_redis._model.circuit import CLOSED, OPEN, Circuit
from pybreaker_redis._model.intents import FencedIntent, Intent, RecordFailure, RecordSuccess, Reply, ShareTrip


@dataclass(frozen=True, slots=True)
class LocalReport:
    """Intents that carry the account of a local circuit over to the shared one.

    Attributes:
        intents: Intents for the shared circuit.
        known: The shared circuit when the report was drafted.
        circuit: The local circuit at that time.
        unused_failures: Failures that the local circuit did not count, because it began open.
        in_doubt: Failures that Redis may have counted.
    """

    intents: tuple[Intent, ...]
    known: Circuit | None
    circuit: Circuit
    unused_failures: int
    in_doubt: int

    @property
    def failures(self) -> int:
        """Number of reported failures."""
        return sum(intent.times for intent in self.intents if isinstance(intent, RecordFailure))

    @property
    def starts_from_zero(self) -> bool:
        """Whether earlier failures are set to zero first."""
        return any(isinstance(intent, RecordSuccess) for intent in self.intents)

    @property
    def counted(self) -> int:
        """Shared counter of failures after all intents."""
        return self.failures + (0 if self.starts_from_zero or self.known is None else self.known.fail_counter)

    def is_visible_in(self, now: Circuit) -> bool:
        """Whether the shared circuit looks as if all intents had been executed."""
        if self.known is None or now.generation != self.known.generation:
            return False
        # Other processes may have counted more failures since, but not after their counts were set to zero.
        return now.fail_counter == self.counted or (not self.starts_from_zero and now.fail_counter > self.counted)


class Ledger:
    """Account of one run of a local circuit.

    Args:
        base: The shared circuit from which the run went on.  ``None``: unknown.
        begun: The local circuit at the beginning.

    Attributes:
        base: The shared circuit from which the run went on (``None``: unknown).
        begun: The local circuit at the beginning, with the failures that have been reported.
        now: The local circuit at present, or at the end of the run.
    """

    def __init__(self, base: Circuit | None, begun: Circuit) -> None:
        self.base = base
        self.begun = self.now = begun
        self._unused_failures = self._in_doubt = 0
        self._has_opened = False
        #: A report that got no reply in time.
        self._unanswered: LocalReport | None = None

    @property
    def has_transitioned(self) -> bool:
        """Whether the local circuit has made a transition."""
        return self.now.generation != self.begun.generation

    def forget_in_child(self) -> None:
        """Forget the counts in a forked child: the parent reports them."""
        self.begun = replace(self.begun, fail_counter=self.now.fail_counter)
        self._unused_failures = self._in_doubt = 0
        self._unanswered = None

    def local_intent_for(self, intent: Intent) -> Intent:
        """Return the intent for the local circuit: calls that the shared circuit admitted count, if neither moved."""
        if self.base is None or self.has_transitioned:
            return intent
        if isinstance(intent, FencedIntent) and intent.generation == self.base.generation:
            return replace(intent, generation=self.begun.generation)
        return intent

    def shared_intent_for(self, intent: Intent) -> Intent:
        """Return the intent for the shared circuit: calls that the local circuit admitted count, if neither moved."""
        if self.base is None or self.begun.state != CLOSED or self.has_transitioned:
            return intent
        if isinstance(intent, FencedIntent) and intent.generation == self.begun.generation:
            return replace(intent, generation=self.base.generation)
        return intent

    def note_reply(self, intent: Intent, reply: Reply, *, is_in_doubt: bool) -> None:
        """Enter an intent that the local circuit carried out.

        Args:
            intent: The intent, as the local circuit got it.
            reply: Reply of the local circuit.
            is_in_doubt: Whether Redis may have executed the same intent.
        """
        if reply.circuit.state == OPEN and reply.circuit.generation != self.now.generation:
            # Times would not tell: clocks are set back.
            self._has_opened = True
        self.now = reply.circuit
        if isinstance(intent, RecordFailure) and intent.generation == self.begun.generation:
            # A local circuit that began open does not count the failure that made it begin.  The shared one does.
            self._unused_failures += not reply.accepted
            self._in_doubt += is_in_doubt
        elif isinstance(intent, RecordSuccess) and reply.accepted:
            self._in_doubt = 0

    def compile_report(self, known: Circuit | None, now_ms: float, *, is_active: bool) -> LocalReport:
        """Return what the shared circuit must add: the trip, or the counts of a circuit that never moved.

        Args:
            known: The shared circuit at present.  A ledger without a base can report to a closed one only.
            now_ms: Milliseconds since the epoch, by the local clock.
            is_active: Whether the run has not ended.
        """
        unanswered, self._unanswered = self._unanswered, None
        begun = self.begun.generation
        if unanswered and known and unanswered.circuit.generation == begun and unanswered.is_visible_in(known):
            self.mark_reported(unanswered)
            # The failures of that report must not be taken for those of other calls.
            self.base = self.base and replace(self.base, fail_counter=unanswered.counted)
        intents = tuple(self._intents(known, now_ms)) if is_active else ()
        return LocalReport(intents, known, self.now, self._unused_failures, self._in_doubt)

    def _intents(self, known: Circuit | None, now_ms: float) -> Iterator[Intent]:
        base = self.base or (known if known and known.state == CLOSED else None)
        if base is None:
            return
        now, begun = self.now, self.begun
        if now.state != CLOSED and self._has_opened:
            yield ShareTrip(base.generation, max(0, round(now_ms - (now.opened_at_ms or 0))))
        elif not self.has_transitioned:
            failures = now.fail_counter - begun.fail_counter + self._unused_failures
            if known is not None and (counted := known.fail_counter - base.fail_counter) > 0:
                # Failures were counted since: most likely these, by a server that was slow.
                failures -= min(self._in_doubt, counted)
            if now.fail_counter < begun.fail_counter:
                # A call has succeeded in between, and other processes may have counted failures since.
                if known is not None and known.fail_counter <= begun.fail_counter:
                    yield RecordSuccess(base.generation, "")
                failures = now.fail_counter
            if failures > 0:
                yield RecordFailure(base.generation, "", times=failures)

    def needs_second_report(self, replies: Sequence[Reply]) -> bool:
        """Whether a ledger without a base has to report again: another process has just restored the shared circuit.

        Args:
            replies: Replies to the intents of the last report.
        """
        return self.base is None and any(not reply.accepted and reply.circuit.state == CLOSED for reply in replies)

    def note_unanswered(self, report: LocalReport) -> None:
        """Keep a report that may have been executed, until the shared circuit shows whether it was."""
        self._unanswered = report

    def mark_reported(self, report: LocalReport) -> None:
        """Take off what a report has carried over, unless the local circuit has moved since."""
        if report.circuit.generation != self.begun.generation:
            return
        self.begun = replace(self.begun, fail_counter=report.circuit.fail_counter)
        self._unused_failures -= report.unused_failures
        self._in_doubt = max(0, self._in_doubt - report.in_doubt)

    def is_settled_by(self, report: LocalReport) -> bool:
        """Whether nothing has happened since a report that was marked as reported."""
        has_counted = self.now.fail_counter != self.begun.fail_counter or self._unused_failures
        generation = report.circuit.generation
        return generation == self.now.generation and not (has_counted and generation == self.begun.generation)
