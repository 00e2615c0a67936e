"""A circuit that a fleet shares, and what a process does while it is out of reach.

Knows: the shared circuit, the circuit of one's own, which of them to go by.  Does not know: commands, scripts, threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

from pybreaker_redis import _said
from pybreaker_redis._adapter import IntentStorage
from pybreaker_redis._arguments import check_fallback, check_namespace, check_state, client_source, staleness, wait
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED
from pybreaker_redis._clock import monotonic, now_ms
from pybreaker_redis._examination import examine
from pybreaker_redis._guard import FIRST_TURN, Guard, Meaning, meaning_of
from pybreaker_redis._intents import CountProbe, Intent, Load, RecordFailure, RecordSuccess
from pybreaker_redis._keys import BASE, circuit_keys
from pybreaker_redis._own import LAST, OwnCircuit
from pybreaker_redis._server import Server, server_of
from pybreaker_redis._shared import SharedCircuit
from pybreaker_redis._shortcut import Shortcut
from pybreaker_redis._signals import raised_by_a_handler
from pybreaker_redis._view import View
from pybreaker_redis.health import Health

#: Seconds, at most, until a process that goes by its own circuit follows what others do to one that it can still read.
FOLLOWS_WITHIN = 0.1
#: The same where it cannot be read: then nothing is to be noticed but that it can.
LOOKS_WITHIN = 0.5

#: How often what a circuit learned alone is looked at again because it has moved just then.
ROUNDS = 3

#: What is said of a call when it has ended.
_REPORTS = (RecordFailure, RecordSuccess, CountProbe)


class CircuitRedisStorage(IntentStorage):
    """A circuit that all processes with the same Redis and namespace share; in place of pybreaker's own class.

    Nothing is sent to Redis before the circuit is first used.  No error of Redis reaches a guarded call: while there is
    no answer, this process keeps a circuit of its own.

    Args:
        state: ``closed``, ``open`` or ``half-open``: how a circuit begins that does not exist yet.
        redis_object: A client (`redis.Redis` and its kin), or a callable without arguments that returns one.
        namespace: Prefix of the keys; circuits with the same namespace are the same circuit.
        fallback_circuit_state: How this process's own circuit begins when Redis does not answer, unless the shared one
            was known to be open or half-open; ``last``: as that was known last, or else in `state`.  The shared one
            begins in it, too, when its keys have vanished.
        cluster_mode: Put all keys of the circuit into one slot of a Redis Cluster.
        probe_lease: Seconds until a probe that nobody reported on is offered again, from 0.001 to 86400.  Must exceed
            the slowest guarded call.
        max_staleness: Seconds for which this process may go by what it knows of the circuit, though it hears of no
            change: from 0.01 to 60, or 0 to ask Redis at every look.
        timeout: Seconds that a guarded call waits for Redis at most, on connections of its own made like the client's:
            from 0.01 to 60; ``None``: on the client's connections, as long as those take.

    Raises:
        ValueError: An unknown state, or a number out of range.
        TypeError: Any other argument that is not what it should be.
    """

    BASE_NAMESPACE = BASE
    logger = logging.getLogger("pybreaker_redis")

    def __init__(
        self,
        state: str,
        redis_object: Any,
        namespace: str | None = None,
        fallback_circuit_state: str = "closed",
        cluster_mode: bool = False,
        *,
        probe_lease: float = 30.0,
        max_staleness: float = 1.0,
        timeout: float | None = 0.25,
    ) -> None:
        check_state("state", state)
        check_fallback(fallback_circuit_state)
        check_namespace(namespace)
        self.max_staleness = staleness(max_staleness)
        view = self._view = View(self.max_staleness)
        super().__init__("redis", probe_lease, view.shortcut)
        self.circuit_name = namespace or BASE
        self._timeout = wait(timeout)
        self._given = client_source(redis_object)
        self._server: Server | None = None
        self._own = OwnCircuit(fallback_circuit_state, state)
        #: What is only this circuit's trouble, and whether it can be read though it refuses something.
        self._faults, self._may_read = Guard(self._timeout or FIRST_TURN, kept=False), False
        #: What was to be said of the shared circuit when it was loaded.
        self._event = ""
        self._shared = SharedCircuit(
            self._client,
            circuit_keys(namespace, one_slot=cluster_mode),
            name=self.circuit_name,
            initial_state=state,
            fallback_state=CLOSED if fallback_circuit_state == LAST else fallback_circuit_state,
            clock=now_ms,
            view=view,
            logger=self.logger,
        )

    def health(self) -> Health:
        """What this process knows about the circuit's Redis; asks nobody, and may be called as often as one likes."""
        server = self._server
        trouble = examine(server.guard if server else None, self._faults)
        heard = self._shared.push
        return Health(
            circuit=self.circuit_name,
            server="" if server is None else str(server),
            server_version=heard.server if heard else "",
            condition=trouble.condition,
            since=trouble.since,
            state=self._state_unasked(),
            is_own=self.is_alone,
            last_error=trouble.last_error,
            next_attempt=trouble.next_attempt,
            attempts=trouble.attempts,
            view_age=None if self._view.age == math.inf else self._view.age,
            push=heard.how if heard else "none",
            mode=self._shared.mode,
            circuits=server.tenants if server else 0,
        )

    # Which circuit to go by -----------------------------------------------------------------------------------------

    def _look(self) -> Reply:
        if not self.is_alone and (reply := self._shared.believed(Load())):
            if self._shortcut is not self._view.shortcut:
                self._go_by(self._view.shortcut)
            return reply
        return self._execute(Load())

    def _read_state(self) -> str:
        self._callers.current().begins()
        return super()._read_state()

    def _called(self) -> None:
        if self._server is not None:
            self._shared.listen(self._server)

    def _execute(self, intent: Intent) -> Reply:
        if isinstance(intent, RecordSuccess) and not self.is_alone and (reply := self._shared.believed(intent)):
            return reply
        if self._may_ask():
            began = monotonic()
            try:
                with self._callers.current().waits(self._timeout, reports=isinstance(intent, _REPORTS)):
                    shared = self._execute_shared(intent)
            except Exception as error:
                if raised_by_a_handler(error):
                    raise
                # Clients of other libraries raise errors of their own, and callables that return a client whatever
                # they like.  None of it may reach a guarded call; the log says what it was.
                self._failed(error, began)
            else:
                if shared is not None:
                    return shared
        return self._execute_own(intent)

    def _state_unasked(self) -> str:
        # pybreaker's constructor reads the state.  Modules create breakers when they are imported, before settings are
        # sure to be there and in masters that fork later: no time to connect.  The first call hears what is true.
        return self._own.now.state if self.is_alone else self._shared.last_known_state

    def _client(self) -> Any:
        client = self._given()
        self._server = server = server_of(client, self._timeout)
        server.admit(self)
        return server.client_like(client)

    def _may_ask(self) -> bool:
        # To be told that it is one's turn is to have to ask.
        return self._faults.is_due() and (self._server is None or self._server.may_ask()) and self._faults.may_ask()

    def _execute_shared(self, intent: Intent) -> Reply | None:
        """Carry out an intent on the shared circuit; ``None`` if it is not the time to ask for that."""
        if self._server is None:
            self._shared.connect()
            if self._server is not None and not self._server.may_ask():
                # The other circuits of that server know already that it is away.
                return None
        outcome = ""
        if self.is_alone or not self._view.may_believe:
            # It is a caller's turn to ask, or the server was back before this circuit was.
            self.load(tell=True)
            self.check_writable()
            if (brought_back := self.rejoin()) is None:
                return None
            outcome = brought_back
        reply = self._shared.execute(intent)
        if self._faults.outage:
            self._may_read = False
            _said.permitted(self.circuit_name, self._faults.answered())
            self._shared.is_permitted()
        if self._server and self._server.guard.outage:
            self._server.answered(outcome)
        return reply

    def _execute_own(self, intent: Intent) -> Reply:
        if not self.is_alone:
            self.lose()
        guard = self._faults if self._server is None or self._faults.outage else self._server.guard
        outage = guard.outage
        answers = outage is not None and (outage.meaning is Meaning.READ_ONLY or self._may_read)
        reply = self._own.execute(intent, self._shared.known, answers=answers)
        shortcut = self._own.shortcut
        # Not for long: whoever goes by it is to notice what others do, and that it has ended.
        follows_within = min(FOLLOWS_WITHIN, self.max_staleness) if answers else LOOKS_WITHIN
        shortcut.until = shortcut.now() + follows_within
        if outage is not None and not guard.kept:
            shortcut.until = min(shortcut.until, outage.next_at)
        if outage is None or guard.outage is not outage:
            # It has ended, or been asked about, just now: nobody may go by this circuit unasked.
            shortcut.until = 0
        self._go_by(shortcut)
        return reply

    def _failed(self, error: Exception, began: float) -> None:
        if self._server is not None and meaning_of(error) in (Meaning.AWAY, Meaning.READ_ONLY):
            self._server.failed(error, self, began)
            return
        outage = self._faults.failed(error)
        self.lose()
        if outage is not None:
            if outage.meaning is Meaning.FORBIDDEN:
                with contextlib.suppress(Exception), self._callers.current().waits(self._timeout):
                    self.load()
                    self._may_read = True
            _said.in_trouble(self.circuit_name, outage)

    def _go_by(self, shortcut: Shortcut) -> None:
        if self._shortcut is not shortcut:
            self._shortcut = shortcut
            self._admissions.go_by(shortcut)

    # For the server, when it goes and when it is back ---------------------------------------------------------------

    @property
    def is_alone(self) -> bool:
        """Whether this process goes by its own circuit."""
        return self._own.in_use

    def lose(self) -> None:
        """The server is out of reach: what is known of the shared circuit is not believed any more."""
        self._view.is_unreachable()

    def load(self, *, tell: bool = False) -> None:
        """Ask for the shared circuit.

        Args:
            tell: Whether to say in the log what was found; else `rejoin` returns it.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        event = self._shared.execute(Load(), tell=tell).event
        self._event = "" if tell or event == "created" else event

    def check_writable(self) -> None:
        """See whether the server takes writes.

        Raises:
            Exception: It does not.
        """
        self._shared.check_writable()

    def rejoin(self) -> str | None:
        """Go by the shared circuit again, and open it for all if one's own has opened.

        Returns:
            What has come of it, in words; empty if there was nothing to bring back; ``None`` if somebody is just at it.

        Raises:
            Exception: No usable answer; then the process goes on by itself.
        """
        with self._own.returning() as is_first:
            if not is_first:
                return None
            outcome, self._event = self._event, ""
            for _ in range(ROUNDS):
                now = self._own.now
                replies = [self._shared.execute(report, tell=False) for report in self._own.reports(self._view.known)]
                if self._own.is_told_in_vain(replies):
                    continue
                if replies and replies[0].accepted and replies[0].circuit.state != CLOSED:
                    outcome = "opened for all"
                self._own.told(now.fail_counter)
                if self._own.end(now.generation):
                    self._go_by(self._view.shortcut)
                    self._view.is_reachable()
                    break
            return outcome
