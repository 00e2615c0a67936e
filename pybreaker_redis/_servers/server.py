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
from functools import partial
from typing import Any, TypeVar

from pybreaker_redis import _log
from pybreaker_redis._circuits.bulk import bring_back_all, bring_back_each
from pybreaker_redis._redis.classify import ErrorKind, MissingFeature, error_kind, suppress_except
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.endpoint import endpoint_of, plain_endpoint_of
from pybreaker_redis._redis.pool import ConnectionPools
from pybreaker_redis._runtime import threads
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.logger import LossThrottle, emit
from pybreaker_redis._runtime.redaction import describe_error, refusal_text
from pybreaker_redis._servers.availability import TURN_DELAY_MIN_S, Availability, Outage
from pybreaker_redis._servers.member import Member

RETRY_THREAD_NAME = "pybreaker_redis keeper"

#: Longest sleep of the thread that asks again, seconds: then it looks whether anybody still needs it.
RETRY_SLEEP_MAX_S = 0.5

#: The same while a line is held that is logged later: an outage may begin meanwhile.
LINE_SLEEP = 0.05

_Thing = TypeVar("_Thing")


class Server:
    """A server, as this process reaches it.

    Args:
        client: The user's.

    Attributes:
        availability: Whether it may be asked now.
        outcomes: What has come of circuits since the server is back, while there are some to bring back; else ``None``.
    """

    def __init__(self, client: Any) -> None:
        #: As long as it lives nobody else has its id.
        self._client = client
        self.availability = Availability(0, has_retry_thread=True)
        self.outcomes: Counter[str] | None = None
        self._name = str(endpoint_of(client) or type(client).__name__)
        self._bulletin = LossThrottle()
        self._connections = ConnectionPools()
        self._in_common: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        #: When each came, monotonic seconds, and which thread has brought it.
        self._members: weakref.WeakKeyDictionary[Member, tuple[float, int]] = weakref.WeakKeyDictionary()
        #: Those that nobody has used since they were let go of.
        self._released_members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._missing_features: set[MissingFeature] = set()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        renew_in_children(self)

    def __str__(self) -> str:
        return self._name

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, nobody asks again."""
        self._lock = threading.RLock()
        self._thread = self.outcomes = None
        self._pid = os.getpid()

    def client_with_timeout(self, client: Any, timeout: float | None) -> Any:
        """Return what to use in the place of a client: the same on the server's own connections, where they can be had.

        Args:
            client: Of the server.
            timeout: Seconds for all of an operation; ``None``: on the client's connections, as long as those take.
        """
        self.availability.extend_answer_wait(timeout or TURN_DELAY_MIN_S)
        return self._connections.client_for(client, timeout)

    def close_idle_pools(self) -> None:
        """Close the connections that are not in use just now."""
        self._connections.close_idle()

    def in_common(self, key: Hashable, offered: _Thing) -> _Thing:
        """Return what was offered first under a key, as long as that lives."""
        with self._lock:
            thing: _Thing = self._in_common.setdefault(key, offered)
            return thing

    def add_member(self, member: Member) -> None:
        """From now on this circuit lives here."""
        with self._lock:
            self._members[member] = monotonic(), threading.get_ident()
            if threading.current_thread() is not self._thread:
                self._released_members.discard(member)
        self.availability.limit_retry_delay(member.max_staleness)

    def remove_member(self, member: Member) -> None:
        """From now on this circuit lives elsewhere."""
        with self._lock:
            self._members.pop(member, None)
        if not self._members and (seconds := self.availability.note_answer()) is not None:
            name = str(self)
            self._bulletin.log_return(lambda more: _log.circuits_left(name, seconds=seconds, more_losses=more))

    def release_member(self, member: Member) -> None:
        """This circuit is not used for now; without any there is no need for connections."""
        with self._lock:
            self._members.pop(member, None)
            self._released_members.add(member)
        if not self._members:
            self.close_idle_pools()

    def _current_members(self) -> list[Member]:
        # Whoever comes while they are counted would make it fail.
        with self._lock:
            return list(self._members)

    @property
    def member_count(self) -> int:
        """How many circuits of this process live here."""
        return len(self._members)

    @property
    def is_unreachable(self) -> bool:
        """Whether nobody answers."""
        outage = self.availability.outage
        return outage is not None and outage.kind is ErrorKind.UNREACHABLE

    def claim_caller_turn(self) -> bool:
        """Whether a caller may ask Redis now."""
        if self.availability.outage is None:
            return True
        return not self._ensure_retry_thread() and self.availability.claim_turn()

    def report_failure(self, error: BaseException, member: Member, began: float) -> None:
        """A circuit got no usable answer, and that says something of the server.

        Args:
            error: What there was instead.
            member: The circuit.
            began: When it asked, monotonic seconds: if the server was back after that, or another thread has since
                brought the circuit here from where it was asked for, it says nothing any more.
        """
        came, thread = self._members.get(member, (began, 0))
        if self.availability.outage is None and (
            began < self.availability.last_recovery_at or (began < came and thread != threading.get_ident())
        ):
            return
        outage = self.availability.note_failure(error)
        # In this order: an answer that another thread gets meanwhile must not be believed while the guard keeps callers
        # away, or calls would be admitted by Redis and settled here.
        for item in [member] if outage is None else self._current_members():
            item.on_server_lost()
        if outage is not None:
            if outage.kind is ErrorKind.UNREACHABLE:
                # They are as dead as the one that has failed; found out one by one, each would be an outage.
                self.close_idle_pools()
            build_line = partial(
                _log.server_lost,
                str(self),
                is_unreachable=outage.kind is ErrorKind.UNREACHABLE,
                error=outage.error,
                timeout_s=member.timeout if outage.is_timeout else None,
                circuit=member.circuit_name,
                other_circuits=len(self._members) - 1,
                pause_s=outage.next_attempt_at - outage.since,
                wait_s=outage.answer_wait_s,
            )
            self._bulletin.log_loss(lambda more: build_line(more_losses=more))
            self._ensure_retry_thread()

    def report_answer(self, outcome: str) -> None:
        """A circuit got an answer.  If it was its turn to ask, the server is back.

        Else it had asked before; the thread that asks again has to bring back the others, too.
        """
        if not self.availability.has_retry_thread:
            self._log_return(self.availability.note_answer(), Counter([outcome]))

    def _log_return(self, seconds: float | None, outcomes: Counter[str]) -> None:
        # Two first answers may have come together; then the other one has ended the outage.
        if seconds is not None:
            build_line = partial(_log.server_returned, str(self), seconds=seconds, outcomes=outcomes)
            self._bulletin.log_return(lambda more: build_line(more_losses=more))

    def note_missing_feature(self, lack: MissingFeature, reason: object) -> None:
        """A circuit has missed something that this server does not have: say so, the first time."""
        with self._lock:
            is_new = lack not in self._missing_features
            self._missing_features.add(lack)
        if is_new:
            emit(_log.feature_missing(str(self), feature=lack.value, error=refusal_text(reason)))

    def log_if_slow(self, seconds: float, timeout: float | None) -> None:
        """An operation has taken so long, and should have taken that at most."""
        self._connections.log_slow_client(self._client, seconds, timeout)

    def verify_reachable(self) -> None:
        """What was heard here is silent: see whether the server is there."""
        if self.availability.outage is not None:
            return
        began = monotonic()
        for member in self._current_members():
            try:
                with deadline(member.timeout):
                    member.load()
            except Exception as error:  # noqa: BLE001
                if error_kind(error) is not ErrorKind.UNREACHABLE:
                    continue
                self.report_failure(error, member, began)
            return

    # The thread ---------------------------------------------------------------------------------------------------

    def _ensure_retry_thread(self) -> bool:
        """See to it that there is a thread that asks again; whether there is."""
        if self._pid != os.getpid():
            # Forked behind Python's back, as by uWSGI.
            self.after_fork()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = None
                with contextlib.suppress(threads.ThreadRefusedError):
                    # It looks at the attribute under the lock, so it cannot end before it is noted.
                    self._thread = threads.start_daemon(self._run_retry_thread, RETRY_THREAD_NAME)
            kept = self._thread is not None
        if kept != self.availability.has_retry_thread:
            self.availability.set_retry_thread(kept)
        return kept

    def _run_retry_thread(self) -> None:
        while True:
            self._release_again()
            self._bulletin.flush_held_line()
            with self._lock:
                outage = self.availability.outage
                if not self._members or not (outage or self._bulletin.has_held_line):
                    # With nobody left to ask for, the next one finds out for himself.
                    self.availability.note_answer()
                    self._thread = None
                    return
            if outage is None:
                # This thread alone logs in the end that the server is back.
                time.sleep(LINE_SLEEP)
                continue
            left = outage.next_attempt_at - monotonic()
            if left > 0:
                time.sleep(min(left, RETRY_SLEEP_MAX_S))
            else:
                self.availability.claim_attempt()
                self._attempt_return(outage)

    def _release_again(self) -> None:
        """Let go of what was let go of while it was asked for, which has brought it back."""
        for member in self._current_members():
            if member in self._released_members:
                member.release_connections()

    def _attempt_return(self, outage: Outage) -> None:
        for member in self._current_members():
            # Whoever lives elsewhere by now need not wait for this one.  To look for it takes half of the time.
            with deadline(member.timeout and 2 * member.timeout), suppress_except():
                member.move_if_relocated()
        outcomes: Counter[str] = Counter()
        try:
            bring_back_all(self._current_members(), outage.answer_wait_s, outcomes)
        except Exception as error:  # noqa: BLE001
            # Whatever a client raises: it is not well yet.
            self.availability.note_failure(error)
            emit(_log.detail("%s: attempt %d failed (%s)", str(self), outage.attempts + 1, describe_error(error)))
        else:
            self.outcomes = outcomes
            seconds = self.availability.note_answer()
            # Callers may do it, too, or go on alone meanwhile.
            ended_by = bring_back_each(self._current_members(), outcomes)
            self.outcomes = None
            is_back = self._members and self.availability.outage is None  # Else it was not asked, or has gone again.
            self._log_return(seconds if is_back else None, outcomes)
            if ended_by is not None:
                self.report_failure(*ended_by)


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
        key = plain_endpoint_of(client) or id(shared)
        with self._lock:
            server = self._of_key.get(key)
            if server is None:
                server = self._of_key[key] = Server(client)
            return server


_servers = _Servers()


def server_for(client: Any) -> Server:
    """The server behind a client; the same for all clients that reach it as the same user."""
    return _servers.of(client)
