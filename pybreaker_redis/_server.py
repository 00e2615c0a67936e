"""What does this process share about one server?

Knows: the client, the guard, which circuits live there, the thread that asks again.  Does not know: states of circuits,
commands.

When the server fails, every circuit of the process that lives there is out of reach at once, and one thread alone asks
again.  When it answers, that thread first brings back what the circuits have learned by themselves, and then lets the
callers in.  So a caller waits for Redis once in an outage, at most.  Where no thread may be started (uWSGI without
``--enable-threads``) callers take turns, one at a time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import Any

from pybreaker_redis import _said, _threads
from pybreaker_redis._carrier import Lack
from pybreaker_redis._client import bounded, hang_up, known_origin_of, on_pool, origin_of
from pybreaker_redis._clock import monotonic
from pybreaker_redis._deadline import deadline
from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._guard import FIRST_TURN, Guard, Meaning, Outage, meaning_of
from pybreaker_redis._tenant import Tenant

THREAD_NAME = "pybreaker_redis keeper"

#: Longest sleep of the thread that asks again, seconds: then it looks whether anybody still needs it.
LONGEST_SLEEP = 0.5


class Server:
    """A server, as this process reaches it.

    Args:
        client: The user's.
        timeout: Seconds for all of an operation; ``None``: as long as the client takes.

    Attributes:
        guard: Whether it may be asked now.
    """

    def __init__(self, client: Any, timeout: float | None) -> None:
        own = None if timeout is None else bounded(client, timeout)
        self._pool = own and own.connection_pool
        #: As long as it lives nobody else has its id.
        self._client = client
        self.guard = Guard(timeout or FIRST_TURN, kept=True)
        self._name = str(origin_of(client) or type(client).__name__)
        self._timeout = timeout
        #: When each came, monotonic seconds, and which thread has brought it.
        self._tenants: weakref.WeakKeyDictionary[Tenant, tuple[float, int]] = weakref.WeakKeyDictionary()
        #: Those that nobody has used since they were let go of.
        self._let_go: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._lacks: set[Lack] = set()
        self._has_waited = False
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        renew_in_children(self)
        if own is None and timeout is not None:
            _said.may_wait(client)

    def __str__(self) -> str:
        return self._name

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, nobody asks again."""
        self._lock = threading.RLock()
        self._thread = None
        self._pid = os.getpid()

    def client_like(self, client: Any) -> Any:
        """What to use in the place of a client: the same on the server's own connections, where they can be had."""
        return client if self._pool is None else on_pool(client, self._pool)

    def hang_up(self) -> None:
        """Close the connections that are not in use just now."""
        if self._pool is not None:
            hang_up(self._pool)

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
        if not self._tenants:
            _said.left(str(self), self.guard.answered())

    def let_go(self, tenant: Tenant) -> None:
        """This circuit is not used for now; without any there is no need for connections."""
        with self._lock:
            self._tenants.pop(tenant, None)
            self._let_go.add(tenant)
        if self._pool is not None and not self._tenants:
            hang_up(self._pool)

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
            if self._pool is not None and outage.meaning is Meaning.AWAY:
                # They are as dead as the one that has failed; found out one by one, each would be an outage.
                hang_up(self._pool)
            besides = len(self._tenants) - 1
            _said.away(str(self), outage, timeout=self._timeout, circuit=tenant.circuit_name, besides=besides)
            self._is_kept()

    def answered(self, outcome: str) -> None:
        """A circuit got an answer.  If it was its turn to ask, the server is back.

        Else it had asked before; the thread that asks again has to bring back the others, too.
        """
        if self.guard.kept:
            return
        _said.back(str(self), self.guard.answered(), Counter([outcome]))

    def say_lack(self, lack: Lack, reason: object) -> None:
        """A circuit has missed something that this server does not have: say so, the first time."""
        with self._lock:
            is_new = lack not in self._lacks
            self._lacks.add(lack)
        if is_new:
            _said.lacking(str(self), lack, reason)

    def took(self, seconds: float) -> None:
        """An operation has taken so long; say so, once, if a client that is used as it is has waited by itself."""
        if self._timeout is None or self._pool is not None or seconds <= 2 * self._timeout or self._has_waited:
            return
        self._has_waited = True
        _said.waited(self._client, seconds, self._timeout)

    def doubt(self) -> None:
        """What was heard here is silent: see whether the server is there."""
        if self.guard.outage is not None:
            return
        began = monotonic()
        for tenant in self._present():
            try:
                with deadline(self._timeout):
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
            with self._lock:
                outage = self.guard.outage
                if outage is None or not self._tenants:
                    # With nobody left to ask for, the next one finds out for himself.
                    self.guard.answered()
                    self._thread = None
                    return
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
            with deadline(self._timeout and 2 * self._timeout), _said.unless():
                tenant.moves()
        try:
            outcomes = self._return(outage.patience)
        except Exception as error:  # noqa: BLE001
            # Whatever a client raises: it is not well yet.
            self.guard.failed(error)
            _said.detail("%s: attempt %d failed (%s)", self, outage.attempts + 1, error)
        else:
            seconds = self.guard.answered()
            # Callers who were still under way have begun anew, or for the first time: then nothing is known of theirs.
            for tenant in [tenant for tenant in self._present() if tenant.is_alone]:
                try:
                    with deadline(self._timeout):
                        tenant.load()
                        tenant.rejoin()
                except Exception as error:  # noqa: BLE001
                    # It is for the next caller to say what is the matter.
                    _said.detail("not brought back: %s", error)
            _said.back(str(self), seconds if self._tenants else None, outcomes)  # Else nobody has asked it.

    def _return(self, patience: float) -> Counter[str]:
        """Have the circuits rejoin; whatever is a single circuit's own trouble keeps only that one away."""
        tenants = self._present()
        asked = [tenant for tenant in tenants if tenant.is_alone] or tenants[:1]
        for tenant in asked:
            with deadline(self._timeout and max(patience, self._timeout)), _said.unless(Meaning.AWAY):
                tenant.load()
            # The others are asked on the same connection.
            patience = 0
        # Where a server takes no writes, loading has failed only if something had to be repaired.
        for tenant in asked:
            with deadline(self._timeout), _said.unless(Meaning.AWAY, Meaning.READ_ONLY):
                tenant.check_writable()
                break
        outcomes: Counter[str] = Counter()
        for tenant in tenants:
            with deadline(self._timeout), _said.unless(Meaning.AWAY, Meaning.READ_ONLY):
                outcomes[tenant.rejoin() or ""] += 1
        return outcomes


class _Servers:
    """The servers of this process, as long as circuits live there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._of_key: weakref.WeakValueDictionary[Hashable, Server] = weakref.WeakValueDictionary()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock."""
        self._lock = threading.RLock()

    def of(self, client: Any, timeout: float | None) -> Server:
        origin = known_origin_of(client)
        shared: Any = getattr(client, "connection_pool", client)
        key = (origin, timeout) if origin and timeout is not None else (id(shared), timeout)
        with self._lock:
            server = self._of_key.get(key)
            if server is None:
                server = self._of_key[key] = Server(client, timeout)
            return server


_servers = _Servers()


def server_of(client: Any, timeout: float | None) -> Server:
    """The server behind a client; the same for all clients that reach it, as the same user, with the same timeout."""
    return _servers.of(client, timeout)
