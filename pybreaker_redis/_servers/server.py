"""One server of this process: its members, its connections and its outages.

A `Server` stands for one endpoint and one user.  Every circuit of the process that is stored there is a `Member`.

When the server fails, all members are informed at once, and one retry thread (`retry.py`) queries the server.  When the
server answers again, that thread has the members return, then callers may query the server.  A caller therefore waits
for Redis at most once per outage.  Where no thread may be started (uWSGI without ``--enable-threads``), callers take
turns, one at a time.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from functools import partial
from typing import Any

from pybreaker_redis import _log
from pybreaker_redis._redis.classify import ErrorKind, MissingFeature, error_kind
from pybreaker_redis._redis.connections.pool import ConnectionPools
from pybreaker_redis._redis.endpoint import Endpoint, endpoint_of, plain_endpoint_of
from pybreaker_redis._runtime import fork
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.logger import LossThrottle, emit
from pybreaker_redis._runtime.redaction import describe_error, refusal_text
from pybreaker_redis._servers.availability import TURN_DELAY_MIN_S, Availability, Outage
from pybreaker_redis._servers.member import Member, Registration, ReturnProgress
from pybreaker_redis._servers.retry import RetryThread

#: Stands for a member that was removed while its query was under way.
_REMOVED_MEMBER = Registration(-math.inf, 0, "(moved)", None)


class Server(ForkSafe):
    """One Redis server, as this process reaches it.

    Args:
        client: Client of a user of this package.

    Attributes:
        availability: Whether the server may be queried now.
    """

    def __init__(self, client: Any) -> None:
        #: Kept alive: the table of servers may use the id of its pool as the key.
        self._client = client
        self.availability = Availability(0, has_retry_thread=True)
        #: The attempt that the retry thread makes now.
        self._attempt: ReturnProgress | None = None
        #: State of `availability` when the retry thread last looked.
        self._seen_change = 0
        self._name = str(endpoint_of(client) or type(client).__name__)
        self._loss_log = LossThrottle()
        self._connections = ConnectionPools()
        self._members: weakref.WeakKeyDictionary[Member, Registration] = weakref.WeakKeyDictionary()
        #: Members that were released, and that no caller has used since.
        self._released_members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._missing_features: set[MissingFeature] = set()
        self._retry_thread = RetryThread(self._seconds_until_retry, self._retry, self._wait_for_change)
        super().__init__()

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        condition = "unreachable" if self.is_unreachable else "available"
        return f"<Server {self._name} {condition}, {self.member_count} members>"

    def _reset_in_child(self) -> None:
        self._attempt = None

    # Connections --------------------------------------------------------------------------------------------------

    def client_with_timeout(self, client: Any, timeout: float | None) -> Any:
        """Return a client on the connections of this package, where those can be made.

        Args:
            client: A client of the server.
            timeout: Seconds for a whole operation, ``None`` to return the client as it is.
        """
        self.availability.extend_answer_wait(timeout or TURN_DELAY_MIN_S)
        return self._connections.client_for(client, timeout)

    @property
    def push_endpoint(self) -> Endpoint | None:
        """Endpoint for push connections, ``None`` where no connection like those of the client can be made."""
        return plain_endpoint_of(self._connections.any_client(self._client))

    def close_idle_pools(self) -> None:
        """Close all connections that are not in use."""
        self._connections.close_idle()

    def log_if_slow(self, seconds: float, timeout: float | None) -> None:
        """Log a client that waits longer than its timeout, once.

        Args:
            seconds: Seconds that an operation took.
            timeout: Seconds that the operation was allowed, ``None`` for no limit.
        """
        self._connections.log_slow_client(self._client, seconds, timeout)

    # Members ------------------------------------------------------------------------------------------------------

    def add_member(self, member: Member, *, circuit: str, timeout_s: float | None, max_staleness_s: float) -> bool:
        """Register a circuit that is stored on the server.

        A retry can query a circuit that its owner has just released.  Only callers register such a circuit again.

        Args:
            member: The circuit.
            circuit: Name of the circuit, for log lines.
            timeout_s: Seconds that the circuit waits for an answer, ``None`` for as long as the client does.
            max_staleness_s: Seconds for which the circuit may trust its view, 0: never.

        Returns:
            Whether the circuit is a member now.
        """
        with self._lock:
            if self._retry_thread.is_current_thread and member in self._released_members:
                return False
            self._released_members.discard(member)
            self._members[member] = Registration(monotonic(), threading.get_ident(), circuit, timeout_s)
        self.availability.limit_retry_delay(max_staleness_s)
        return True

    def remove_member(self, member: Member) -> None:
        """Remove a circuit that is stored on another server now."""
        with self._lock:
            self._members.pop(member, None)
        if not self._members and (seconds := self.availability.note_answer()) is not None:
            build_line = partial(_log.circuits_left, self._name, seconds=seconds)
            self._loss_log.log_return(lambda more: build_line(more_losses=more))

    def release_member(self, member: Member) -> None:
        """Remove a circuit until its next use.  The last one closes the idle connections."""
        with self._lock:
            self._members.pop(member, None)
            self._released_members.add(member)
        if not self._members:
            self.close_idle_pools()

    def current_members(self) -> list[Member]:
        """Return the members as of now."""
        # A registration by another thread would break the iteration.
        with self._lock:
            return list(self._members)

    @property
    def member_count(self) -> int:
        """Number of circuits of this process that are stored on the server."""
        return len(self._members)

    # Outages ------------------------------------------------------------------------------------------------------

    @property
    def is_unreachable(self) -> bool:
        """Whether the present outage is one of a server that does not answer."""
        outage = self.availability.outage
        return outage is not None and outage.kind is ErrorKind.UNREACHABLE

    @property
    def current_return(self) -> ReturnProgress | None:
        """Attempt that has let callers in while members are still returning, `None` at other times."""
        attempt = self._attempt
        return attempt if attempt is not None and attempt.has_let_callers_in else None

    def claim_caller_turn(self) -> bool:
        """Claim the turn to query the server, and return whether a caller may query it.

        Without an outage every caller may.  In an outage the retry thread is started, and while it runs no caller may.
        """
        if self.availability.outage is None:
            return True
        return not self._ensure_retry_thread() and self.availability.claim_turn()

    def report_failure(self, error: BaseException, member: Member, began_at: float) -> None:
        """Note that a member got no usable answer, by the fault of the server.

        A failure is ignored if the server has answered since the query began.  So is one that another thread has
        overtaken by moving the circuit here from the server that was queried.

        Args:
            error: What the client library raised.
            member: The circuit.
            began_at: When the query began, monotonic seconds.
        """
        entry = self._members.get(member, _REMOVED_MEMBER)
        if self.availability.outage is None and (
            began_at < self.availability.last_recovery_at
            or (began_at < entry.registered_at and entry.thread_id != threading.get_ident())
        ):
            return
        outage = self.availability.note_failure(error)
        # In this order: no member may trust an answer that another thread gets once callers may not query.  A call
        # would be admitted by the shared circuit and settled on the local one.
        for item in [member] if outage is None else self.current_members():
            item.on_server_lost()
        if outage is not None:
            if outage.kind is ErrorKind.UNREACHABLE:
                # Each idle connection is as dead as the one that failed, and would be an outage of its own.
                self.close_idle_pools()
            build_line = partial(
                _log.server_lost,
                self._name,
                is_unreachable=outage.kind is ErrorKind.UNREACHABLE,
                error=outage.error,
                timeout_s=entry.timeout_s if outage.is_timeout else None,
                circuit=entry.circuit,
                other_circuits=len(self._members) - (member in self._members),
                pause_s=outage.next_attempt_at - outage.since,
                wait_s=outage.answer_wait_s,
            )
            self._loss_log.log_loss(lambda more: build_line(more_losses=more))
            self._ensure_retry_thread()

    def report_answer(self, outcome: str) -> None:
        """End the outage, if it was the turn of a caller to query the server.

        With a retry thread the query began before the outage, and the thread has the other members return.

        Args:
            outcome: Result of the caller's own return, for the log.
        """
        if not self.availability.has_retry_thread:
            self._log_return(self.availability.note_answer(), Counter([outcome]))

    def verify_reachable(self) -> None:
        """Query the server by way of a member: its push connection was lost."""
        if self.availability.outage is not None:
            return
        began_at = monotonic()
        for member in self.current_members():
            try:
                member.verify_server()
            except Exception as error:  # noqa: BLE001
                if error_kind(error) is not ErrorKind.UNREACHABLE:
                    continue
                self.report_failure(error, member, began_at)
            return

    def note_missing_feature(self, feature: MissingFeature, reason: object) -> None:
        """Log a feature that the server does not have, once.

        Args:
            feature: The feature.
            reason: Reply of the server.
        """
        with self._lock:
            is_new = feature not in self._missing_features
            self._missing_features.add(feature)
        if is_new:
            emit(_log.feature_missing(self._name, feature=feature.value, error=refusal_text(reason)))

    def _log_return(self, seconds: float | None, outcomes: Counter[str]) -> None:
        # Two first answers may arrive together.  The other one has then ended the outage.
        if seconds is not None:
            build_line = partial(_log.server_returned, self._name, seconds=seconds, outcomes=outcomes)
            self._loss_log.log_return(lambda more: build_line(more_losses=more))

    # On the retry thread ------------------------------------------------------------------------------------------

    def _ensure_retry_thread(self) -> bool:
        """Start the retry thread unless it runs, and return whether it runs."""
        fork.renew()
        is_running = self._retry_thread.ensure_running()
        if is_running != self.availability.has_retry_thread:
            self.availability.set_retry_thread(is_running)
        return is_running

    def _seconds_until_retry(self) -> float | None:
        self._seen_change = self.availability.change_number
        outage, held_s = self.availability.outage, self._loss_log.seconds_until_due
        if not self.member_count or (outage is None and held_s is None):
            # Without members no outage is kept: the next caller queries the server.
            self.availability.note_answer()
            return None
        due_s = math.inf if outage is None else outage.next_attempt_at - monotonic()
        return max(0.0, min(due_s, math.inf if held_s is None else held_s))

    def _wait_for_change(self, seconds: float) -> None:
        self.availability.wait_for_change(self._seen_change, seconds)

    def _retry(self) -> None:
        # A line about the last loss or return may be held.  No other thread logs it.
        self._loss_log.flush_held_line()
        outage = self.availability.outage
        if outage is not None and self.availability.claim_attempt():
            self._attempt_return(outage)

    def _attempt_return(self, outage: Outage) -> None:
        for member in self.current_members():
            # A circuit that is stored on another node need not wait for this server.
            member.move_if_relocated()
        members, failure = self.current_members(), None
        self._attempt = attempt = ReturnProgress(self.availability, outage.answer_wait_s, self.current_members)
        try:
            if members:
                failure = members[0].on_server_returned(members, attempt)
            attempt.let_callers_in()
        except Exception as error:  # noqa: BLE001
            # A client library may raise any class.  No caller was let in.
            self.availability.note_failure(error)
            emit(_log.detail("%s: attempt %d failed (%s)", self._name, outage.attempts + 1, describe_error(error)))
            return
        finally:
            self._attempt = None
        # With no member left the server was not queried, and with an outage it has failed again.
        is_back = self.member_count and self.availability.outage is None
        self._log_return(attempt.outage_s if is_back else None, attempt.outcomes)
        if failure is not None:
            self.report_failure(*failure)
