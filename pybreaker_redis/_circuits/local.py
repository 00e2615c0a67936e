"""What does this process do by itself while a circuit is out of reach?

Knows: the model behind a lock, the circuit as it was known last.  Does not know: why it is out of reach, Redis.

A circuit of one's own goes on from the shared one: as that was, if it was not closed, because a circuit that is known
to be open never opens its gate because Redis has gone.  As long as it has not moved, reports of calls that were
admitted in that very generation of the shared circuit count.  From then on the two have different generations, so that
what one has admitted is never settled in the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from pybreaker_redis._circuits.reconcile import LocalReport
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import CLOSED, OPEN, Circuit, new_circuit, next_count
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import FencedIntent, Intent, RecordFailure, RecordSuccess, Reply, ShareTrip
from pybreaker_redis._redis.classify import may_have_executed
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import ForkSafe

#: Where the generations of circuits of one's own begin: below zero, where shared ones never are.
LOCAL_GENERATION_MIN = -(10**12)

#: How a circuit of one's own begins whatever the shared one was: as it was.
FALLBACK_LAST = "last"


class LocalCircuit(ForkSafe):
    """One circuit of this process's own, as often as it is needed.  Times are by the local clock.

    Args:
        fallback: ``closed``, ``open``, ``half-open``, how to go on from a closed circuit; ``last``: closed.
        initial: In which state to begin if nothing is known and `fallback` is ``last``.
        clock: Milliseconds since the epoch.

    Attributes:
        fast_path: What follows for calls while it is in use.
    """

    def __init__(self, fallback: str, initial: str, clock: Callable[[], float] = wall_clock_ms) -> None:
        self.fast_path = FastPath(0)
        self._fallback = fallback
        self._initial = initial
        self._clock = clock
        self._returning = threading.Lock()
        self._engine: MemoryEngine | None = None
        #: The shared circuit that it went on from, how it began, and how it is.
        self._base: Circuit | None = None
        self._missed = self._doubtful = 0
        self._has_opened = False
        #: What others were told, and may have been told in vain.
        self._unanswered: LocalReport | None = None
        self._begun = self._now = Circuit(generation=LOCAL_GENERATION_MIN)
        super().__init__()

    def _reset_in_child(self) -> None:
        # The parent reports what the parent has counted.
        self._returning = threading.Lock()
        self._begun = replace(self._begun, fail_counter=self._now.fail_counter)
        self._missed = self._doubtful = 0
        self._unanswered = None

    @contextlib.contextmanager
    def recovery_turn(self) -> Iterator[bool]:
        """Whether the caller is the one who brings back what was learned; another one at the same time is not."""
        recovery_turn = self._returning
        is_first = recovery_turn.acquire(blocking=False)
        try:
            yield is_first
        finally:
            if is_first:
                recovery_turn.release()

    @property
    def is_running(self) -> bool:
        """Whether there is one."""
        return self._engine is not None

    @property
    def now(self) -> Circuit:
        """As it is, or was when it ended; its generation is another one after each of its transitions."""
        return self._now

    def execute(self, intent: Intent, known: Circuit | None, *, answers: bool, in_doubt: bool = False) -> Reply:
        """Carry out an intent; the first one makes the circuit.

        Args:
            intent: What is wanted.
            known: The shared circuit as it was seen last.  If others have moved it since, it is gone on from again.
            answers: Whether Redis can be read, so that the shared circuit is what it is known to be.
            in_doubt: Whether Redis was asked for the same, and has not answered in time.
        """
        with self._lock:
            if self._engine is None or self._was_overtaken(known):
                self._begin(known, answers=answers)
            assert self._engine
            moved = self._now.generation != self._begun.generation
            if (
                isinstance(intent, FencedIntent)
                and self._base
                and not moved
                and intent.generation == self._base.generation
            ):
                intent = replace(intent, generation=self._begun.generation)
            reply = self._engine.execute(intent)
            if reply.circuit.state == OPEN and reply.circuit.generation != self._now.generation:
                # Not to be told from the times: clocks are set back.
                self._has_opened = True
            self._now = reply.circuit
            if isinstance(intent, RecordFailure) and intent.generation == self._begun.generation:
                # It may have begun open, and has no use for the failure that made it begin; the shared one has.
                self._missed += not reply.accepted
                self._doubtful += in_doubt
            elif isinstance(intent, RecordSuccess) and reply.accepted:
                self._doubtful = 0
            return reply

    def to_shared_intent(self, intent: Intent) -> Intent:
        """Return the intent for the shared circuit: calls admitted here speak there, if neither circuit has moved."""
        with self._lock:
            begun, base = self._begun, self._base
            if base is None or begun.state != CLOSED or begun.generation != self._now.generation:
                return intent
            if isinstance(intent, FencedIntent) and intent.generation == begun.generation:
                return replace(intent, generation=base.generation)
            return intent

    def report(self, known: Circuit | None) -> LocalReport:
        """What the others have to be told of it: that it has opened, if it has since it began and is not closed again.

        Or, if it never moved, what it has counted.  That it has recovered they are not told: where the shared circuit
        is open, one probe will find it out.

        Args:
            known: The shared circuit as it is now; whoever never saw it before has something to say to a closed one.
        """
        with self._lock:
            unanswered, self._unanswered = self._unanswered, None
            begun = self._begun.generation
            if unanswered and known and unanswered.circuit.generation == begun and unanswered.is_visible_in(known):
                self._is_told(unanswered)
                # What has been counted for it has not been counted for anything else.
                self._base = self._base and replace(self._base, fail_counter=unanswered.counted)
            return LocalReport(tuple(self._intents(known)), known, self._now, self._missed, self._doubtful)

    def _intents(self, known: Circuit | None) -> Iterator[Intent]:
        base = self._base or (known if known and known.state == CLOSED else None)
        if self._engine is None or base is None:
            return
        now, begun = self._now, self._begun
        if now.state != CLOSED and self._has_opened:
            yield ShareTrip(base.generation, max(0, round(self._clock() - (now.opened_at_ms or 0))))
        elif now.generation == begun.generation:
            failures = now.fail_counter - begun.fail_counter + self._missed
            if known is not None and (counted := known.fail_counter - base.fail_counter) > 0:
                # Somebody's have been counted since: most likely these, by a server that was slow.
                failures -= min(self._doubtful, counted)
            if now.fail_counter < begun.fail_counter:
                # Some call has succeeded in between; what others have counted since it knows nothing of.
                if known is not None and known.fail_counter <= begun.fail_counter:
                    yield RecordSuccess(base.generation, "")
                failures = now.fail_counter
            if failures > 0:
                yield RecordFailure(base.generation, "", times=failures)

    def must_report_again(self, replies: list[Reply]) -> bool:
        """Whether it has to be told again: it goes on from nothing, and somebody has just restored what was lost."""
        return self._base is None and any(not reply.accepted and reply.circuit.state == CLOSED for reply in replies)

    @contextlib.contextmanager
    def reporting(self, report: LocalReport) -> Iterator[None]:
        """The others are being told; if there is no answer in time, whether they were is to be seen the next time."""
        try:
            yield
        except Exception as error:
            if may_have_executed(error):
                self._unanswered = report
            raise

    def end(self, told: LocalReport) -> bool:
        """There is no need for it any more.

        Args:
            told: What the others have been told of it.

        Returns:
            Whether that was all; else it goes on, and they have to be told the rest.
        """
        with self._lock:
            self._is_told(told)
            counted = self._now.fail_counter != self._begun.fail_counter or self._missed
            generation = told.circuit.generation
            if generation != self._now.generation or (counted and generation == self._begun.generation):
                return False
            self._engine = None
            self.fast_path.trusted_until = 0
            self.fast_path.withdraw()
            return True

    def _is_told(self, told: LocalReport) -> None:
        if told.circuit.generation != self._begun.generation:
            # It has moved, or begun anew since: what it has counted then is of no more use.
            return
        self._begun = replace(self._begun, fail_counter=told.circuit.fail_counter)
        self._missed -= told.unused_failures
        self._doubtful = max(0, self._doubtful - told.in_doubt)

    def _was_overtaken(self, known: Circuit | None) -> bool:
        if known is None or self._base is None:
            return known is not None and known.state != CLOSED
        return known.generation > self._base.generation

    def _begin(self, known: Circuit | None, *, answers: bool) -> None:
        goes_on = known and (answers or known.state != CLOSED or self._fallback in (FALLBACK_LAST, CLOSED))
        if known and goes_on:
            circuit = replace(known, noisy_until_ms=0)
        else:
            circuit = new_circuit(self._initial if self._fallback == FALLBACK_LAST else self._fallback, self._clock())
        self._base = known
        self._missed = self._doubtful = 0
        self._has_opened, self._unanswered = False, None
        # Never one that a call may have been admitted in before.
        self._begun = self._now = replace(circuit, generation=next_count(self._now.generation))
        self.fast_path.withdraw()
        self.fast_path = FastPath(0)
        self._engine = MemoryEngine(self._begun, self._clock, self.fast_path, repair_note="" if goes_on else "created")
