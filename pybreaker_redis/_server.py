"""What does this process share about one server?

Knows: the client, the guard, which circuits live there, the thread that asks again.  Does not know: states of circuits,
commands.

When the server fails, every circuit of the process that lives there is out of reach at once, and one thread alone asks
again.  When the server answers, that thread reads all circuits in batches.  Circuits that have learned nothing rejoin
at once, the thread brings back one by one what some have learned, and then lets the callers in.  If there are many, it
brings back the others after that.  So a caller waits for Redis once in an outage, at most.  Where no thread may be
started (uWSGI without ``--enable-threads``) callers take turns, one at a time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import Any, TypeVar

from pybreaker_redis import _said, _threads
from pybreaker_redis._bulletin import Bulletin
from pybreaker_redis._carrier import Lack
from pybreaker_redis._client import known_origin_of, origin_of
from pybreaker_redis._clock import monotonic
from pybreaker_redis._connections import Connections
from pybreaker_redis._deadline import deadline
from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._guard import FIRST_TURN, Guard, Meaning, Outage, meaning_of
from pybreaker_redis._rejoin import bring_back, rejoin
from pybreaker_redis._secrets import described
from pybreaker_redis._tenant import Tenant

THREAD_NAME = "pybreaker_redis keeper"

#: Longest sleep of the thread that asks again, seconds: then it looks whether anybody still needs it.
LONGEST_SLEEP = 0.5

#: The same while a line is held that is logged later: an outage may begin meanwhile.
LINE_SLEEP = 0.05

_Thing = TypeVar("_Thing")


class Server:
    """A server, as this process reaches it.

    Args:
        client: The user's.

    Attributes:
        guard: Whether it may be asked now.
        outcomes: What has come of circuits since the server is back, while there are some to bring back; else ``None``.
    """

    def __init__(self, client: Any) -> None:
        #: As long as it lives nobody else has its id.
        self._client = client
        self.guard = Guard(0, kept=True)
        self.outcomes: Counter[str] | None = None
        self._name = str(origin_of(client) or type(client).__name__)
        self._bulletin = Bulletin()
        self._connections = Connections()
        self._in_common: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        #: When each came, monotonic seconds, and which thread has brought it.
        self._tenants: weakref.WeakKeyDictionary[Tenant, tuple[float, int]] = weakref.WeakKeyDictionary()
        #: Those that nobody has used since they were let go of.
        self._let_go: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._lacks: set[Lack] = set()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        renew_in_children(self)

    def __str__(self) -> str:
        return self._name

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, nobody asks again."""
        self._lock = threading.RLock()
        self._connections.after_fork()
        self._thread = self.outcomes = None
        self._pid = os.getpid()

    def client_like(self, client: Any, timeout: float | None) -> Any:
        """Return what to use in the place of a client: the same on the server's own connections, where they can be had.

        Args:
            client: Of the server.
            timeout: Seconds for all of an operation; ``None``: on the client's connections, as long as those take.
        """
        self.guard.expect(timeout or FIRST_TURN)
        return self._connections.client_like(client, timeout)

    def hang_up(self) -> None:
        """Close the connections that are not in use just now."""
        self._connections.hang_up()

    def in_common(self, key: Hashable, offered: _Thing) -> _Thing:
        """Return what was offered first under a key, as long as that lives."""
        with self._lock:
            thing: _Thing = self._in_common.setdefault(key, offered)
            return thing

    def admit(self, tenant: Tenant) -> None:
        """From now on this circuit lives here."""
        with self._lock:
            self._tenants[tenant] = monotonic(), threading.get_ident()
            if threading.current_thread() is not self._thread:
                self._let_go.discard(tenant)
        self.guard.hurry(tenant.max_staleness)

    def dismiss(self, tenant: Tenant) -> None:
        """From now on this circuit lives elsewhere."""
        with self._lock:
            self._tenants.pop(tenant, None)
        if not self._tenants and (seconds := self.guard.answered()) is not None:
            self._bulletin.returned(lambda more: _said.left(str(self), seconds, more))

    def let_go(self, tenant: Tenant) -> None:
        """This circuit is not used for now; without any there is no need for connections."""
        with self._lock:
            self._tenants.pop(tenant, None)
            self._let_go.add(tenant)
        if not self._tenants:
            self.hang_up()

    def _present(self) -> list[Tenant]:
        # Whoever comes while they are counted would make it fail.
        with self._lock:
            return list(self._tenants)

    @property
    def tenants(self) -> int:
        """How many circuits of this process live here."""
        return len(self._tenants)

    @property
    def is_away(self) -> bool:
        """Whether nobody answers."""
        outage = self.guard.outage
        return outage is not None and outage.meaning is Meaning.AWAY

    def may_ask(self) -> bool:
        """Whether a caller may ask Redis now."""
        if self.guard.outage is None:
            return True
        return not self._is_kept() and self.guard.may_ask()

    def failed(self, error: BaseException, tenant: Tenant, began: float) -> None:
        """A circuit got no usable answer, and that says something of the server.

        Args:
            error: What there was instead.
            tenant: The circuit.
            began: When it asked, monotonic seconds: if the server was back after that, or another thread has since
                brought the circuit here from where it was asked for, it says nothing any more.
        """
        came, thread = self._tenants.get(tenant, (began, 0))
        if self.guard.outage is None and (
            began < self.guard.returned_at or (began < came and thread != threading.get_ident())
        ):
            return
        outage = self.guard.failed(error)
        # In this order: an answer that another thread gets meanwhile must not be believed while the guard keeps callers
        # away, or calls would be admitted by Redis and settled here.
        for item in [tenant] if outage is None else self._present():
            item.lose()
        if outage is not None:
            if outage.meaning is Meaning.AWAY:
                # They are as dead as the one that has failed; found out one by one, each would be an outage.
                self.hang_up()
            timeout, circuit, besides = tenant.timeout, tenant.circuit_name, len(self._tenants) - 1
            self._bulletin.lost(
                lambda more: _said.away(str(self), outage, timeout=timeout, circuit=circuit, besides=besides, more=more)
            )
            self._is_kept()

    def answered(self, outcome: str) -> None:
        """A circuit got an answer.  If it was its turn to ask, the server is back.

        Else it had asked before; the thread that asks again has to bring back the others, too.
        """
        if not self.guard.kept:
            self._is_back(self.guard.answered(), Counter([outcome]))

    def _is_back(self, seconds: float | None, outcomes: Counter[str]) -> None:
        # Two first answers may have come together; then the other one has ended the outage.
        if seconds is not None:
            self._bulletin.returned(lambda more: _said.back(str(self), seconds, outcomes, more))

    def say_lack(self, lack: Lack, reason: object) -> None:
        """A circuit has missed something that this server does not have: say so, the first time."""
        with self._lock:
            is_new = lack not in self._lacks
            self._lacks.add(lack)
        if is_new:
            _said.lacking(str(self), lack, reason)

    def took(self, seconds: float, timeout: float | None) -> None:
        """An operation has taken so long, and should have taken that at most."""
        self._connections.took(self._client, seconds, timeout)

    def doubt(self) -> None:
        """What was heard here is silent: see whether the server is there."""
        if self.guard.outage is not None:
            return
        began = monotonic()
        for tenant in self._present():
            try:
                with deadline(tenant.timeout):
                    tenant.load()
            except Exception as error:  # noqa: BLE001
                if meaning_of(error) is not Meaning.AWAY:
                    continue
                self.failed(error, tenant, began)
            return

    # The thread ---------------------------------------------------------------------------------------------------

    def _is_kept(self) -> bool:
        """See to it that there is a thread that asks again; whether there is."""
        if self._pid != os.getpid():
            # Forked behind Python's back, as by uWSGI.
            self.after_fork()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = None
                with contextlib.suppress(_threads.NoThreads):
                    # It looks at the attribute under the lock, so it cannot end before it is noted.
                    self._thread = _threads.start(self._ask_again, THREAD_NAME)
            kept = self._thread is not None
        if kept != self.guard.kept:
            self.guard.keep(kept)
        return kept

    def _ask_again(self) -> None:
        while True:
            self._leave_again()
            self._bulletin.flush()
            with self._lock:
                outage = self.guard.outage
                if not self._tenants or not (outage or self._bulletin.holds_a_line):
                    # With nobody left to ask for, the next one finds out for himself.
                    self.guard.answered()
                    self._thread = None
                    return
            if outage is None:
                # This thread alone logs in the end that the server is back.
                time.sleep(LINE_SLEEP)
                continue
            left = outage.next_at - monotonic()
            if left > 0:
                time.sleep(min(left, LONGEST_SLEEP))
            else:
                self.guard.begin()
                self._try_to_return(outage)

    def _leave_again(self) -> None:
        """Let go of what was let go of while it was asked for, which has brought it back."""
        for tenant in self._present():
            if tenant in self._let_go:
                tenant.leave()

    def _try_to_return(self, outage: Outage) -> None:
        for tenant in self._present():
            # Whoever lives elsewhere by now need not wait for this one.  To look for it takes half of the time.
            with deadline(tenant.timeout and 2 * tenant.timeout), _said.unless():
                tenant.moves()
        outcomes: Counter[str] = Counter()
        try:
            rejoin(self._present(), outage.patience, outcomes)
        except Exception as error:  # noqa: BLE001
            # Whatever a client raises: it is not well yet.
            self.guard.failed(error)
            _said.detail("%s: attempt %d failed (%s)", self, outage.attempts + 1, described(error))
        else:
            self.outcomes = outcomes
            seconds = self.guard.answered()
            # Callers may do it, too, or go on alone meanwhile.
            ended_by = bring_back(self._present(), outcomes)
            self.outcomes = None
            is_back = self._tenants and self.guard.outage is None  # Else it was not asked, or has gone again.
            self._is_back(seconds if is_back else None, outcomes)
            if ended_by is not None:
                self.failed(*ended_by)


class _Servers:
    """The servers of this process, as long as circuits live there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._of_key: weakref.WeakValueDictionary[Hashable, Server] = weakref.WeakValueDictionary()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock."""
        self._lock = threading.RLock()

    def of(self, client: Any) -> Server:
        shared: Any = getattr(client, "connection_pool", client)
        key = known_origin_of(client) or id(shared)
        with self._lock:
            server = self._of_key.get(key)
            if server is None:
                server = self._of_key[key] = Server(client)
            return server


_servers = _Servers()


def server_of(client: Any) -> Server:
    """The server behind a client; the same for all clients that reach it as the same user."""
    return _servers.of(client)
