"""Which circuit does this process go by: the shared one, or its own?

Knows: both circuits, the server they belong to, what each error means for them.  Does not know: pybreaker, commands,
scripts, threads.

The shared one as long as Redis serves it.  What is one circuit's own trouble (`_faults`) leaves the others alone; what
is the server's (`_server.py`) concerns all that live there, and so does its return.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace

from pybreaker_redis import _said
from pybreaker_redis._bulletin import Bulletin
from pybreaker_redis._caller import Callers
from pybreaker_redis._carrier import Lack, Reply
from pybreaker_redis._circuit import CLOSED
from pybreaker_redis._clock import monotonic, now_ms
from pybreaker_redis._examination import Trouble, examine
from pybreaker_redis._guard import FIRST_TURN, Guard, Meaning, meaning_of
from pybreaker_redis._intents import CountProbe, Intent, Load, RecordFailure, RecordSuccess
from pybreaker_redis._outside import from_outside, suppressed
from pybreaker_redis._own import LAST, OwnCircuit
from pybreaker_redis._server import Server, server_of
from pybreaker_redis._shared import SharedCircuit
from pybreaker_redis._shortcut import Shortcut
from pybreaker_redis._stand_in import StandIn
from pybreaker_redis._view import View
from pybreaker_redis._whereabouts import Seat, Whereabouts
from pybreaker_redis.errors import is_in_doubt

#: What is said of a call when it has ended.
_REPORTS = (RecordFailure, RecordSuccess, CountProbe)


class Tenancy:
    """A circuit of this process: one of the tenants of its server (`Tenant`), and what it is while that is away.

    Args:
        name: Of the circuit, for people.
        whereabouts: Of the shared circuit.
        initial_state: Of a circuit that does not exist yet.
        fallback: How a circuit of one's own begins.
        timeout: Seconds to wait for an answer; ``None``: as long as the client takes.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
        view: What this process believes of the shared circuit.
        callers: One for each thread.

    Attributes:
        max_staleness: Seconds for which the view may be believed.
        circuit_name, timeout: See above.
        shared: The circuit in Redis.
        server: Where that lives; ``None`` while it was not used.
        shortcut: Of the circuit that this process goes by.
    """

    def __init__(
        self,
        name: str,
        whereabouts: Whereabouts,
        *,
        initial_state: str,
        fallback: str,
        timeout: float | None,
        ttl_ms: int,
        view: View,
        callers: Callers,
        logger: logging.Logger,
    ) -> None:
        self.circuit_name = name
        self.max_staleness = view.max_staleness
        self.server: Server | None = None
        self._stand_in = StandIn(fallback, initial_state)
        self.shortcut: Shortcut = view.shortcut
        self._whereabouts = whereabouts
        self.timeout = timeout
        self._view = view
        self._callers = callers
        #: What is only this circuit's trouble, and whether it can be read though it refuses something.
        self._faults, self._may_read = Guard(timeout or FIRST_TURN, kept=False), False
        self._bulletin = Bulletin()
        #: What was to be said of the shared circuit when it was loaded.
        self._event = ""
        self.shared = SharedCircuit(
            self._seat,
            whereabouts.has_moved,
            name=name,
            initial_state=initial_state,
            fallback_state=CLOSED if fallback == LAST else fallback,
            ttl_ms=ttl_ms,
            clock=now_ms,
            view=view,
            say_lack=self._say_lack,
            logger=logger,
        )

    @property
    def own(self) -> OwnCircuit:
        """The circuit of this process alone; storages that are the same circuit have one together."""
        return self._stand_in.circuit

    @property
    def trouble(self) -> Trouble:
        """What is the matter, if anything is."""
        return examine(self.server.guard if self.server else None, self._faults)

    @property
    def last_known_state(self) -> str:
        """Of the circuit that this process goes by, without asking."""
        return self.own.now.state if self.is_alone else self.shared.last_known_state

    def believed(self, intent: Intent) -> Reply | None:
        """The shared circuit's answer to an intent that changes nothing, as far as it is known without asking."""
        if (reply := self.shared.believed(intent)) is not None:
            self.shortcut = self._view.shortcut
        return reply

    def leave(self) -> None:
        """See `Tenant.leave`."""
        # In this order: whoever asks for it meanwhile either is noticed, or has to connect anew.
        if self.server is not None:
            self.server.let_go(self)
        self.shared.leave()

    def listen(self) -> None:
        """Have changes of the shared circuit heard from now on."""
        if self.server is not None:
            self.shared.listen(self.server)

    def execute(self, intent: Intent) -> Reply:
        """Carry out an intent on the circuit that this process goes by; no error of Redis comes from here."""
        if isinstance(intent, RecordSuccess) and (reply := self.believed(intent)):
            return reply
        in_doubt, intent = False, self.own.as_shared(intent)
        if not self._has_waited() and self._may_ask():
            began, shared, outside = monotonic(), None, None
            handled = sys.exc_info()[1]
            try:
                with self._callers.current().waits(self.timeout, reports=isinstance(intent, _REPORTS)):
                    shared = self._execute_shared(intent)
            except Exception as error:  # noqa: BLE001
                outside = from_outside(error, handled)
                if outside is None:
                    # Callables that return a client raise whatever they like, and libraries have bugs.  None of it may
                    # reach a guarded call; the log says what it was.
                    in_doubt = is_in_doubt(error)
                    self._failed(error, began)
            except BaseException as error:  # noqa: BLE001
                outside = error
            self._has_asked(began, has_answer=shared is not None, is_interrupted=outside is not None)
            if outside is not None:
                raise outside
            if shared is not None:
                return shared
        return self._execute_own(intent, in_doubt)

    def _has_asked(self, began: float, *, has_answer: bool, is_interrupted: bool) -> None:
        if not has_answer:
            # If it is still one's turn to ask, nothing has come of it.
            self._faults.give_back()
        if self.server is None:
            return
        self.server.took(monotonic() - began, self.timeout)
        if not has_answer:
            self.server.guard.give_back()
        if is_interrupted:
            self.server.hang_up()  # A connection that was in use may still owe its answer.

    def _seat(self) -> Seat:
        seat = self._whereabouts.seat()
        server = server_of(seat.client)
        client = server.client_like(seat.client, self.timeout)
        before, self.server = self.server, server
        server.admit(self)
        if before not in (None, server):
            before.dismiss(self)
        self._stand_in.lies(server, seat.keys)
        return replace(seat, client=client)

    def _say_lack(self, lack: Lack, reason: object) -> None:
        assert self.server
        self.server.say_lack(lack, reason)

    def _has_waited(self) -> bool:
        """Whether contention has used the time of the call: the rest of the call is for the local circuit."""
        caller = self._callers.current()
        return self.is_alone and not caller.is_apart and caller.waited > (self.timeout or math.inf) / 2

    def _may_ask(self) -> bool:
        # To be told that it is one's turn is to have to ask.
        return self._faults.is_due() and (self.server is None or self.server.may_ask()) and self._faults.may_ask()

    def _execute_shared(self, intent: Intent) -> Reply | None:
        """Carry out an intent on the shared circuit; ``None`` if it is not the time to ask for that."""
        if self.server is None:
            self.shared.connect()
            if self.server is not None and not self.server.may_ask():
                # The other circuits of that server know already that it is away.
                return None
        outcome = ""
        if self.is_alone or not self._view.may_believe:
            # It is a caller's turn to ask, or the server was back before the circuit: then it says where that lies.
            if self.is_alone and self.server and self.server.guard.outage and self._whereabouts.look_again():
                self.shared.leave()
            # While the thread brings circuits back, what becomes of this one is in its line.
            outcomes = self.server.outcomes if self.server else None
            self.load(tell=outcomes is None)
            self.check_writable()
            if (brought_back := self.rejoin()) is None:
                return None
            outcome = brought_back
            if outcomes is not None:
                outcomes[outcome] += 1
        reply = self.shared.execute(intent)
        if self._faults.outage:
            self._may_read = False
            if (seconds := self._faults.answered()) is not None:
                self._bulletin.returned(lambda more: _said.permitted(self.circuit_name, seconds, more))
            self.shared.is_permitted()
        if self.server and self.server.guard.outage:
            self.server.answered(outcome)
        return reply

    def _execute_own(self, intent: Intent, in_doubt: bool) -> Reply:
        if not self.is_alone:
            self.lose()
        guard = self._faults if self.server is None or self._faults.outage else self.server.guard
        outage = guard.outage
        answers = outage is not None and (outage.meaning is Meaning.READ_ONLY or self._may_read)
        reply, self.shortcut = self._stand_in.execute(
            intent, self.shared.known, guard, answers=answers, in_doubt=in_doubt, max_staleness=self.max_staleness
        )
        if self._view.may_believe:
            self.lose()  # Another thread has ended the outage meanwhile, and this has to be brought back, too.
        return reply

    def _failed(self, error: Exception, began: float) -> None:
        if meaning_of(error) is Meaning.CONTENDED:
            # No outage: the local circuit serves this report, and the next look adds it to the shared circuit.
            return
        if self.server is not None and meaning_of(error) in (Meaning.AWAY, Meaning.READ_ONLY):
            self.server.failed(error, self, began)
            return
        outage = self._faults.failed(error)
        self.lose()
        if outage is None:
            self._bulletin.flush()
        else:
            if outage.meaning is Meaning.FORBIDDEN:
                with suppressed(), self._callers.current().waits(self.timeout):
                    self.load()
                    self._may_read = True
            self._bulletin.lost(lambda more: _said.in_trouble(self.circuit_name, outage, more))

    @property
    def is_alone(self) -> bool:
        """Whether this process goes by its own circuit: another storage may, which has a trouble of its own."""
        return self.own.in_use and not self._view.may_believe

    def lose(self) -> None:
        """The server is out of reach: what is known of the shared circuit is not believed any more."""
        self._view.is_unreachable()

    def moves(self) -> bool:
        """See `Tenant.moves`."""
        if not self._whereabouts.look_again():
            return False
        self.shared.leave()
        self.shared.connect()
        if self.server and self.server.guard.outage is None:
            began = monotonic()
            try:
                self.load()
                self.check_writable()
                self.rejoin()
            except Exception as error:  # noqa: BLE001
                self._failed(error, began)  # It is for those there to ask again.
        return True

    def load(self, *, tell: bool = False) -> None:
        """Ask for the shared circuit.

        Args:
            tell: Whether to say in the log what was found; else `rejoin` returns it.

        Raises:
            Exception: No usable answer; whatever the client raises then.
        """
        event = self.shared.execute(Load(), tell=tell).event
        self._event = "" if tell or event == "created" else event

    def check_writable(self) -> None:
        """See `Tenant.check_writable`."""
        self.shared.check_writable()

    def rejoin(self) -> str | None:
        """Go by the shared circuit again, and open it for all if one's own has opened; see `Tenant.rejoin`."""
        with self.own.returning() as is_first:
            if not is_first:
                return None
            outcome, self._event = self._event, ""
            has_ended, has_opened = self._stand_in.report(
                lambda: self._view.known, lambda intent: self.shared.execute(intent, tell=False)
            )
            self._goes_by_shared(has_ended)
            return "opened for all" if has_opened else outcome

    def rejoins_at_once(self) -> None:
        """See `Tenant.rejoins_at_once`."""
        with self.own.returning() as is_first:
            self._goes_by_shared(is_first and self._stand_in.end_unless_it_has_news(self._view.known))

    def _goes_by_shared(self, has_ended: bool) -> None:
        if has_ended:
            self.shortcut = self._view.shortcut
            self._view.is_reachable()
