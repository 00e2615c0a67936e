"""Listener of one server: the thread that keeps the views of its circuits current.

One thread and one push connection for each server, whatever the number of clients and circuits.  The thread starts with
the first guarded call, never with an import, and a forked child starts its own.

`Session` holds what happens on one connection.  When a connection fails, the listener marks all views unsubscribed, so
that callers query Redis themselves, and connects again after a delay.  While the server is unreachable, the listener
waits for the end of the outage.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Sequence

from pybreaker_redis import _log
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._redis.classify import MissingFeature, PushUnavailableError
from pybreaker_redis._replica.connection import Push, PushConnection, PushMode
from pybreaker_redis._replica.session import LISTENER_WAIT_MAX_S, Session
from pybreaker_redis._replica.subscribers import SubscriberTable
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import fork, logger
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.redaction import describe_error, refusal_text
from pybreaker_redis._runtime.threads import ThreadRefusedError, start_daemon
from pybreaker_redis._servers.server import Server

LISTENER_THREAD_NAME = "pybreaker_redis listener"

#: Shortest wait for an answer, seconds.
ANSWER_TIMEOUT_MIN_S = 0.25

#: Upper bound of the delay after the first failed connection, and of the longest delay, seconds.  The bound doubles.
RECONNECT_DELAY_MIN_S = 0.1
RECONNECT_DELAY_MAX_S = 5.0

#: Delay after a server has refused subscriptions, seconds.
REFUSED_RETRY_DELAY_S = 60.0

#: Failed connections in a row after which a line is logged, as for a refusal.  During an outage none is made.
LOGGED_AFTER_FAILURES = 5


class Listener:
    """Thread that listens to one server as long as there are views.

    Args:
        server: The server.

    Attributes:
        session: The present connection, ``None`` between two.
        subscriber_table: Views that are kept current.
        thread: The thread, ``None`` if there is none.  A thread that died may still be here.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock = threading.RLock()
        self.subscriber_table = SubscriberTable()
        self.thread: threading.Thread | None = None
        self._is_refusal_logged = False
        self._reconnect_log, self._refusal_log = logger.RepeatThrottle(), logger.RepeatThrottle()
        self._logged_channels: set[str] = set()
        self._is_expedited = False
        #: Sources and digests of the scripts that calls will need.
        self.scripts: Sequence[tuple[bytes, str]] = ()
        self.session: Session | None = None

    def add_view(
        self, view: View, keys: tuple[str, ...], channel: str, *, is_one_slot: bool = False, is_armable: bool = False
    ) -> None:
        """Keep a view current from now on, until the view is garbage collected.  Start the thread if there is none.

        Args:
            view: The view.
            keys: Keys of its circuit, in the order of the scripts.
            channel: Channel of its circuit.
            is_one_slot: Whether no command may name keys of other circuits, too.
            is_armable: Whether a server that tracks keys reports every change of the circuit.
        """
        refusal = ""
        with self._lock:
            self.subscriber_table.add_subscriber(view, keys, channel, is_one_slot=is_one_slot, is_armable=is_armable)
            if not self.is_running:
                self.thread = None
                try:
                    self.thread = start_daemon(self._run, LISTENER_THREAD_NAME)
                except ThreadRefusedError as reason:
                    refusal = str(reason)
        if refusal:
            self.log_refused(refusal)

    def remove_view(self, view: View) -> None:
        """Keep a view current no longer: its circuit has moved, or was released."""
        self.subscriber_table.remove_subscriber(view)
        view.mark_unsubscribed()
        self._server.availability.wake_waiters()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs."""
        thread = self.thread
        return thread is not None and thread.is_alive()

    def expedite_reconnect(self) -> None:
        """Connect again at once: the server permits what it refused."""
        self._is_expedited = True
        self._server.availability.wake_waiters()

    @property
    def session_push_mode(self) -> PushMode | None:
        """How changes are received, ``None`` without a connection."""
        session = self.session
        return session.connection.push_mode if session else None

    def share_answer_with_siblings(self, source: View, channel: str, circuit: Circuit, now_ms: float) -> None:
        """Pass an answer to the other views of a circuit, so that they need not wait for the push.

        Args:
            source: View of the storage that got the answer.
            channel: Channel of the circuit.
            circuit: The record in the answer.
            now_ms: Time of the server in the answer, milliseconds.
        """
        for view in self.subscriber_table.views_of(channel):
            if view is not source:
                view.store_sibling_answer(circuit, now_ms)

    def log_refused(self, reason: object) -> None:
        """Log why no changes are received, once until a poll is answered."""
        if not self._is_refusal_logged:
            self._is_refusal_logged = True
            if (left_out := self._refusal_log.admit_line()) is not None:
                logger.emit(_log.push_refused(str(self._server), error=refusal_text(reason), left_out=left_out))

    # On the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures, reason = 0, ""
        while not self._end_if_unused():
            try:
                session = self.session = Session(self._connect, self.subscriber_table, self._logged_channels)
                try:
                    if not session.connection.is_tracking:
                        self._server.note_missing_feature(MissingFeature.TRACKING, session.connection.tracking_refusal)
                    if refusal := session.load_scripts(self.scripts):
                        self._server.note_missing_feature(MissingFeature.PRELOADING, refusal)
                    session.run_session()
                finally:
                    self.session = None
                    session.connection.close()
                    if session.has_polled:
                        failures, self._is_refusal_logged = 0, False
            except PushUnavailableError as error:
                self.log_refused(error)
                delay_s = REFUSED_RETRY_DELAY_S
            except Exception as error:  # noqa: BLE001
                # A client library may raise any class.  A new connection is the remedy for all of them.
                reason = describe_error(error)
                if (left_out := self._reconnect_log.admit_line()) is not None:
                    logger.emit(_log.push_interrupted(str(self._server), error=reason, left_out=left_out))
                delay_s = random.uniform(0, min(RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S * 2**failures))
                failures += 1
            else:
                continue
            self._unsubscribe_views()
            self._server.verify_reachable()
            if failures >= LOGGED_AFTER_FAILURES:
                self.log_refused(reason)
            self._pause(delay_s)

    def _end_if_unused(self) -> bool:
        """End the thread if no view is left, and return whether it ends."""
        with self._lock:
            if self.subscriber_table:
                return False
            self.thread = None
            return True

    def _connect(self, on_push: Callable[[Push], None]) -> PushConnection:
        endpoint = self._server.push_endpoint
        if endpoint is None:
            msg = "no connection like those of the client can be made"
            raise PushUnavailableError(msg)
        stalenesses = (item.view.max_staleness for item in self.subscriber_table.snapshot())
        return PushConnection(endpoint, max([ANSWER_TIMEOUT_MIN_S, *stalenesses]), on_push)

    def _pause(self, seconds: float) -> None:
        """Wait before the next connection, in an outage until it ends.

        The wait is cut short when `expedite_reconnect` is called, and when no view is left.  Views vanish with the
        garbage collector, which must take no lock and so wakes no thread: `LISTENER_WAIT_MAX_S` bounds each wait.
        """
        availability, until = self._server.availability, monotonic() + seconds
        was_unreachable = self._is_expedited = False
        while self.subscriber_table and not self._is_expedited:
            # Read before the check, so that no change is missed.
            seen = availability.change_number
            if self._server.is_unreachable:
                was_unreachable, left_s = True, LISTENER_WAIT_MAX_S
            else:
                left_s = until - monotonic()
                if was_unreachable or left_s <= 0:
                    return
            availability.wait_for_change(seen, min(left_s, LISTENER_WAIT_MAX_S))

    def _unsubscribe_views(self) -> None:
        for item in self.subscriber_table.snapshot():
            item.view.mark_unsubscribed()


class ListenerTable(ForkSafe):
    """Listeners of this process, one for each server."""

    def __init__(self) -> None:
        #: An entry lasts as long as a subscription uses the listener, or its thread runs.
        self._by_server: weakref.WeakValueDictionary[Server, Listener] = weakref.WeakValueDictionary()
        super().__init__()

    def _reset_in_child(self) -> None:
        # The connections belong to the parent.  The child closes its copies.
        for listener in self._by_server.values():
            if listener.session is not None:
                listener.session.connection.close()
        self._by_server.clear()

    def listener_of(self, server: Server) -> Listener:
        """Return the listener of a server.  Add it if it is new."""
        fork.renew()
        with self._lock:
            listener = self._by_server.get(server)
            if listener is None:
                listener = self._by_server[server] = Listener(server)
            return listener


_listeners = ListenerTable()


def listener_for(server: Server) -> Listener:
    """Return the listener of a server in this process."""
    return _listeners.listener_of(server)
