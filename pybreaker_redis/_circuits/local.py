"""Circuit of this process alone, for the time in which the shared one cannot be used.

The local circuit goes on from the shared one.  A circuit that is known to be open stays open: the loss of Redis opens
no gate.  `_circuits/reconcile.py` keeps the account of what the shared circuit must add afterwards.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pybreaker_redis._circuits.reconcile import Ledger, LocalReport
from pybreaker_redis._engines.memory import MemoryEngine
from pybreaker_redis._model.circuit import CLOSED, Circuit, new_circuit, next_count
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._redis.classify import may_have_executed
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._runtime.fork import ForkSafe

#: First generation of local circuits: below zero, where shared generations never are.
LOCAL_GENERATION_MIN = -(10**12)

#: Fallback state "as the shared circuit was seen last".
FALLBACK_LAST = "last"

#: Most drafts of a report in one reconciliation: the local circuit may move while a report is under way.
RECONCILE_ROUNDS_MAX = 3


class Reconciliation(NamedTuple):
    """Result of a reconciliation.

    Attributes:
        has_ended: Whether the run of the local circuit has ended: everything was reported.
        has_opened: Whether the report has opened the shared circuit.
    """

    has_ended: bool
    has_opened: bool


class LocalCircuit(ForkSafe):
    """Local circuit, which runs as often as the shared one cannot be used.  Times are by the local clock.

    Args:
        fallback: State in which a run begins if the shared circuit was seen closed: ``closed``, ``open``,
            ``half-open``, or ``last``, which means closed.
        initial: State in which a run begins if the shared circuit was never seen and `fallback` is ``last``.
        clock: Function that returns milliseconds since the epoch.

    Attributes:
        fast_path: Decisions that hold for every call of the present run.  Each run has an object of its own, so that a
            late writer of a former run does no harm.
    """

    def __init__(self, fallback: str, initial: str, clock: Callable[[], float] = wall_clock_ms) -> None:
        self.fast_path = FastPath(0)
        self._fallback = fallback
        self._initial = initial
        self._clock = clock
        self._recovery_lock = threading.Lock()
        self._engine: MemoryEngine | None = None
        self._ledger = Ledger(None, Circuit(generation=LOCAL_GENERATION_MIN))
        super().__init__()

    def _reset_in_child(self) -> None:
        # The parent reports what the parent has counted.
        self._recovery_lock = threading.Lock()
        self._ledger.forget_in_child()

    @contextlib.contextmanager
    def recovery_turn(self) -> Iterator[bool]:
        """Yield whether the caller has the turn to reconcile: at the same time, no other caller has."""
        recovery_lock = self._recovery_lock
        has_turn = recovery_lock.acquire(blocking=False)
        try:
            yield has_turn
        finally:
            if has_turn:
                recovery_lock.release()

    @property
    def is_active(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._engine is not None

    @property
    def circuit(self) -> Circuit:
        """The circuit at present, or at the end of the last run.  Each transition gives a new generation."""
        return self._ledger.now

    def decide_locally(
        self, intent: Intent, known: Circuit | None, *, can_read: bool, is_in_doubt: bool = False
    ) -> Reply:
        """Carry out an intent.  The first one begins a run.

        Args:
            intent: Wanted change, or `Load`.
            known: The shared circuit as it was seen last.  If other processes have moved it since, a new run begins.
            can_read: Whether Redis can be read, so that `known` is the present shared circuit.
            is_in_doubt: Whether Redis may have executed the same intent.
        """
        with self._lock:
            if self._engine is None or self._was_overtaken(known):
                self._begin_run(known, can_read=can_read)
            assert self._engine
            intent = self._ledger.local_intent_for(intent)
            reply = self._engine.execute(intent)
            self._ledger.note_reply(intent, reply, is_in_doubt=is_in_doubt)
            return reply

    def to_shared_intent(self, intent: Intent) -> Intent:
        """Return the intent for the shared circuit.  See `Ledger.shared_intent_for`."""
        with self._lock:
            return self._ledger.shared_intent_for(intent)

    def reconcile(
        self, read_known: Callable[[], Circuit | None], run_shared: Callable[[Intent], Reply]
    ) -> Reconciliation:
        """Report what the shared circuit must add, and end the run if everything was reported.

        An error of the client passes unchanged, and the run goes on.

        Args:
            read_known: Function that returns the shared circuit as it was seen last.
            run_shared: Function that carries out an intent on the shared circuit.
        """
        has_opened = False
        for _ in range(RECONCILE_ROUNDS_MAX):
            report = self.draft_report(read_known())
            with self.reporting(report):
                replies = [run_shared(intent) for intent in report.intents]
            if self.must_report_again(replies):
                continue
            has_opened = has_opened or bool(replies and replies[0].accepted and replies[0].circuit.state != CLOSED)
            if self.end_run(report):
                return Reconciliation(True, has_opened)
        return Reconciliation(False, has_opened)

    def end_if_unchanged(self, known: Circuit | None) -> bool:
        """End the run if there is nothing to report.  Return whether the run has ended."""
        report = self.draft_report(known)
        return not report.intents and self.end_run(report)

    def draft_report(self, known: Circuit | None) -> LocalReport:
        """Return what the shared circuit must add.  See `Ledger.compile_report`."""
        with self._lock:
            return self._ledger.compile_report(known, self._clock(), is_active=self.is_active)

    def must_report_again(self, replies: Sequence[Reply]) -> bool:
        """Whether the report has to be repeated.  See `Ledger.needs_second_report`."""
        return self._ledger.needs_second_report(replies)

    @contextlib.contextmanager
    def reporting(self, report: LocalReport) -> Iterator[None]:
        """Keep the report if the block ends without a reply that would show whether Redis executed the report."""
        try:
            yield
        except Exception as error:
            if may_have_executed(error):
                self._ledger.note_unanswered(report)
            raise

    def end_run(self, report: LocalReport) -> bool:
        """End the run, unless more has happened since a report.

        Args:
            report: The report that was executed.

        Returns:
            Whether the run has ended.
        """
        with self._lock:
            self._ledger.mark_reported(report)
            if not self._ledger.is_settled_by(report):
                return False
            self._engine = None
            self.fast_path.trusted_until = 0
            self.fast_path.withdraw()
            return True

    def _was_overtaken(self, known: Circuit | None) -> bool:
        base = self._ledger.base
        if known is None or base is None:
            return known is not None and known.state != CLOSED
        return known.generation > base.generation

    def _begin_run(self, known: Circuit | None, *, can_read: bool) -> None:
        goes_on = known and (can_read or known.state != CLOSED or self._fallback in (FALLBACK_LAST, CLOSED))
        if known and goes_on:
            circuit = replace(known, noisy_until_ms=0)
        else:
            circuit = new_circuit(self._initial if self._fallback == FALLBACK_LAST else self._fallback, self._clock())
        # A new generation: no call has been admitted in it before.
        begun = replace(circuit, generation=next_count(self._ledger.now.generation))
        self._ledger = Ledger(known, begun)
        self.fast_path.withdraw()
        self.fast_path = FastPath(0)
        self._engine = MemoryEngine(begun, self._clock, self.fast_path, repair_note="" if goes_on else "created")


class _LocalCircuits(ForkSafe):
    """Local circuits of this process that several storages share, as long as one of the storages lives."""

    def __init__(self) -> None:
        self._of_key: weakref.WeakValueDictionary[Hashable, LocalCircuit] = weakref.WeakValueDictionary()
        super().__init__()

    def offer(self, key: Hashable, circuit: LocalCircuit) -> LocalCircuit:
        """Return the circuit that was offered first under a key."""
        with self._lock:
            return self._of_key.setdefault(key, circuit)


_local_circuits = _LocalCircuits()


def common_local_circuit(key: Hashable, offered: LocalCircuit) -> LocalCircuit:
    """Return the local circuit that all storages of one shared circuit use.

    Args:
        key: Server and keys of the shared circuit, and the settings of local circuits.
        offered: Circuit to use if there is none yet.
    """
    return _local_circuits.offer(key, offered)
