"""A circuit that a fleet shares, and what a process does while it is out of reach.

Knows: the shared circuit, the circuit of one's own, which of them to go by.  Does not know: commands, scripts, threads.
"""

from __future__ import annotations

import logging
import math
from datetime import datetime
from typing import Any

from pybreaker_redis._adapter import IntentStorage
from pybreaker_redis._arguments import check_fallback, check_state, staleness, wait
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import CLOSED
from pybreaker_redis._clock import from_ms, monotonic, now_ms
from pybreaker_redis._deadline import deadline
from pybreaker_redis._guard import FIRST_TURN, Guard, Meaning, meaning_of
from pybreaker_redis._intents import Intent, Load, RecordSuccess, ShareTrip
from pybreaker_redis._keys import BASE, circuit_keys
from pybreaker_redis._own import LAST, OwnCircuit
from pybreaker_redis._server import Server, server_of
from pybreaker_redis._shared import SharedCircuit
from pybreaker_redis._shortcut import Shortcut
from pybreaker_redis._view import View
from pybreaker_redis.health import Condition, Health

#: Seconds, at most, until a process that goes by its own circuit follows what others do to one that it can still read.
FOLLOWS_WITHIN = 0.1

#: How often what a circuit learned alone is looked at again because it has moved just then.
ROUNDS = 3


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
        if namespace is not None and not isinstance(namespace, str):
            msg = f"namespace must be a str or None, not {namespace!r}"
            raise TypeError(msg)
        is_client = hasattr(redis_object, "evalsha") and not isinstance(redis_object, type)
        asynchronous = is_client and "asyncio" in type(redis_object).__module__
        if asynchronous or not (is_client or callable(redis_object)):
            msg = f"redis_object must be a synchronous client or a callable that returns one, not {redis_object!r}"
            raise TypeError(msg)
        self.max_staleness = staleness(max_staleness)
        view = self._view = View(self.max_staleness)
        super().__init__("redis", probe_lease, view.shortcut)
        self.circuit_name = namespace or BASE
        self._timeout = wait(timeout)
        self._given = (lambda: redis_object) if is_client else redis_object
        self._server: Server | None = None
        #: What is only this circuit's trouble.
        self._faults = Guard(self._timeout or FIRST_TURN, kept=False)
        self._own = OwnCircuit(fallback_circuit_state, state)
        #: Whether the shared circuit can be read, though it refuses something.
        self._may_read = False
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
        server, faults = self._server, self._faults
        guard = faults if server is None or faults.outage else server.guard
        outage = guard.outage
        condition: Condition = "unused" if server is None else "connected"
        if outage is not None:
            condition = "refused" if guard is faults else "away" if outage.meaning is Meaning.AWAY else "read-only"
        heard = self._shared.push
        return Health(
            circuit=self.circuit_name,
            server="" if server is None else str(server),
            server_version=heard.server if heard else "",
            condition=condition,
            since=None if condition == "unused" else self._wall_clock(guard),
            state=self._state_unasked(),
            is_own=self.is_alone,
            last_error=faults.last_error or (server.guard.last_error if server else ""),
            next_attempt=None if outage is None else max(0.0, outage.next_at - guard.clock()),
            attempts=outage.attempts if outage else 0,
            view_age=None if self._view.age == math.inf else self._view.age,
            push=heard.how if heard else "none",
            mode=self._shared.mode,
            circuits=server.tenants if server else 0,
        )

    # Which circuit to go by -----------------------------------------------------------------------------------------

    def _look(self) -> Reply:
        return self._shared.believed(Load()) or self._execute(Load())

    def _called(self) -> None:
        if self._server is not None:
            self._shared.listen(self._server)

    def _execute(self, intent: Intent) -> Reply:
        if isinstance(intent, RecordSuccess) and (reply := self._shared.believed(intent)):
            return reply
        if self._may_ask():
            began = monotonic()
            try:
                with deadline(self._timeout):
                    return self._execute_shared(intent)
            except Exception as error:  # noqa: BLE001
                # Clients of other libraries raise errors of their own, and callables that return a client whatever
                # they like.  None of it may reach a guarded call; the log says what it was.
                self._failed(error, began)
        return self._execute_own(intent)

    def _state_unasked(self) -> str:
        # pybreaker's constructor reads the state.  Modules create breakers when they are imported, before settings are
        # sure to be there and in masters that fork later: no time to connect.  The first call hears what is true.
        return self._own.now.state if self.is_alone else self._shared.last_known_state

    def _client(self) -> Any:
        server = server_of(self._given(), self._timeout)
        server.admit(self)
        self._server = server
        return server.client

    def _may_ask(self) -> bool:
        return self._faults.may_ask() and (self._server is None or self._server.may_ask())

    def _execute_shared(self, intent: Intent) -> Reply:
        outcome = ""
        if self.is_alone or not self._view.may_believe:
            # It is a caller's turn to ask, or the server was back before this circuit was.
            self.load(tell=True)
            self.check_writable()
            outcome = self.rejoin()
        reply = self._shared.execute(intent)
        if self._faults.outage:
            self._may_read = False
            seconds = self._faults.answered() or 0.0
            self.logger.info("circuit %r: Redis serves it again after %.1f s", self.circuit_name, seconds)
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
        until = 0.0
        if outage is not None:
            until = math.inf if guard.kept else outage.next_at
        if answers:
            until = min(until, shortcut.now() + min(FOLLOWS_WITHIN, self.max_staleness))
        shortcut.until = until
        if guard.outage is not outage:
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
            self._may_read = outage.meaning is Meaning.FORBIDDEN and self._can_load()
            self.logger.warning(
                "circuit %r: Redis gave no usable answer (%s); using this process's own state, next attempt in %.1f s",
                self.circuit_name,
                outage.error,
                outage.next_at - self._faults.clock(),
            )

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
        self._event = "" if tell else event

    def check_writable(self) -> None:
        """See whether the server takes writes.

        Raises:
            Exception: It does not.
        """
        self._shared.check_writable()

    def rejoin(self) -> str:
        """Go by the shared circuit again, and open it for all if one's own has opened.

        Returns:
            What has come of it, in words; empty if there was nothing to bring back.

        Raises:
            Exception: No usable answer; then the process goes on by itself.
        """
        outcome, self._event = self._event, ""
        for _ in range(ROUNDS):
            now = self._own.now
            for report in self._own.reports(self._view.known):
                accepted = self._shared.execute(report, tell=False).accepted
                if accepted and isinstance(report, ShareTrip):
                    outcome = "opened for all"
            self._own.told(now.fail_counter)
            if self._own.end(now.generation):
                self._go_by(self._view.shortcut)
                self._view.is_reachable()
                break
        return outcome

    def _can_load(self) -> bool:
        try:
            with deadline(self._timeout):
                self.load()
        except Exception:  # noqa: BLE001
            return False
        return True

    def _wall_clock(self, guard: Guard) -> datetime:
        return from_ms(now_ms() - (guard.clock() - guard.since) * 1000)
