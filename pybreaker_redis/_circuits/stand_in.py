"""The circuit of this process that stands in for a shared one that is out of reach.

Knows: circuits of this process, which storages have one together, for how long calls may go by one without a look.
Does not know: Redis, why the shared circuit is out of reach.
"""

from __future__ import annotations

from collections.abc import Callable

from pybreaker_redis._circuits.local import LocalCircuit
from pybreaker_redis._circuits.reconcile import LocalReport
from pybreaker_redis._model.circuit import CLOSED, Circuit
from pybreaker_redis._model.fast_path import FastPath
from pybreaker_redis._model.intents import ClaimProbe, Intent, Reply
from pybreaker_redis._runtime.clock import wall_clock_ms
from pybreaker_redis._servers.availability import Availability
from pybreaker_redis._servers.server import Server

#: Seconds, at most, until a process that goes by its own circuit follows what others do to one that it can still read.
FOLLOWING_TRUST_MAX_S = 0.1
#: The same where it cannot be read: then nothing is to be noticed but that it can.
LOCAL_TRUST_MAX_S = 0.5

#: How often what a circuit learned alone is looked at again because it has moved just then.
RECONCILE_ROUNDS_MAX = 3


class StandIn:
    """What one storage goes by while the shared circuit is out of reach.

    Args:
        fallback: How it begins.
        initial: State of a circuit that exists nowhere yet.

    Attributes:
        circuit: The one that is in use, or will be.
    """

    def __init__(self, fallback: str, initial: str) -> None:
        self.circuit = self._common = LocalCircuit(fallback, initial)
        self._settings = fallback, initial

    def lies(self, server: Server, keys: tuple[str, ...]) -> None:
        """Have one circuit together with all storages of this process that lie there, and begin alike.

        One that is in use already is used until it ends: it has to be reported.
        """
        self._common = server.in_common((keys, *self._settings), self._common)
        if not self.circuit.is_running:
            self.circuit = self._common

    def report(self, known: Callable[[], Circuit | None], execute: Callable[[Intent], Reply]) -> tuple[bool, bool]:
        """Report what was learned, and end if that was all.

        Args:
            known: Returns the shared circuit as it is now.
            execute: Carries out an intent on the shared circuit.

        Returns:
            Whether the circuit has ended, and whether it has opened the shared one.

        Raises:
            Exception: No usable answer.
        """
        circuit, has_opened = self.circuit, False
        for _ in range(RECONCILE_ROUNDS_MAX):
            report = circuit.report(known())
            with circuit.reporting(report):
                replies = [execute(intent) for intent in report.intents]
            if circuit.must_report_again(replies):
                continue
            has_opened = has_opened or bool(replies and replies[0].accepted and replies[0].circuit.state != CLOSED)
            if self._end(circuit, report):
                return True, has_opened
        return False, has_opened

    def end_unless_it_has_news(self, known: Circuit | None) -> bool:
        """End the circuit if there is nothing to report; whether it has ended."""
        report = self.circuit.report(known)
        return not report.intents and self._end(self.circuit, report)

    def _end(self, circuit: LocalCircuit, told: LocalReport) -> bool:
        if not circuit.end(told):
            return False
        self.circuit = self._common
        return True

    def execute(
        self,
        intent: Intent,
        known: Circuit | None,
        availability: Availability,
        *,
        answers: bool,
        in_doubt: bool,
        max_staleness: float,
    ) -> tuple[Reply, FastPath]:
        """Carry out an intent.

        A claim is refused while there is no outage, as after contention, or after a connection was lost just before
        the server was back: other calls of this process may get the shared probe meanwhile.

        Args:
            intent: What is wanted.
            known: The shared circuit as it was seen last.
            availability: Keeps callers away from Redis.
            answers: Whether the shared circuit can be read.
            in_doubt: Whether Redis was asked for the same, and has not answered in time.
            max_staleness: Seconds for which calls may go by what is known.

        Returns:
            The answer, and what follows for calls.
        """
        circuit, outage = self.circuit, availability.outage
        if isinstance(intent, ClaimProbe) and outage is None and known is not None:
            circuit.fast_path.trusted_until = 0
            return Reply(False, known, wall_clock_ms()), circuit.fast_path
        reply = circuit.execute(intent, known, answers=answers, in_doubt=in_doubt)
        fast_path = circuit.fast_path
        # Not for long: calls are to notice what others do, and that it has ended.
        until = fast_path.now() + (min(FOLLOWING_TRUST_MAX_S, max_staleness) if answers else LOCAL_TRUST_MAX_S)
        if outage is None or availability.outage is not outage:
            # It has ended, or been asked about, just now: no call may go by this circuit without a look.
            until = 0
        elif not availability.has_retry_thread:
            until = min(until, outage.next_attempt_at)
        fast_path.trusted_until = until
        return reply, fast_path
