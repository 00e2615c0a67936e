"""Who hears what others do?

Knows: threads, processes, when to try again.  Does not know: circuits, what is said on a line.

One thread and one line for each server that this process uses, whatever the number of clients and circuits.  It begins
with the first guarded call, so never where modules are merely imported, and it is made anew in each forked child.

What is done on the line stands in `session.py`.  Whatever goes wrong with it, everything is forgotten, and after a
pause there is a new line.  Until then callers ask Redis themselves, which is slower and never wrong.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from functools import partial
from typing import Protocol

from pybreaker_redis import _log
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._redis.classify import MissingFeature, PushUnavailableError
from pybreaker_redis._redis.endpoint import Endpoint
from pybreaker_redis._replica.connection import PushConnection, PushMode
from pybreaker_redis._replica.session import LISTENER_WAIT_MAX_S, Session
from pybreaker_redis._replica.subscribers import SubscriberTable
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import logger
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.redaction import describe_error, refusal_text
from pybreaker_redis._runtime.threads import ThreadRefusedError, start_daemon

LISTENER_THREAD_NAME = "pybreaker_redis listener"

#: Shortest time that an answer is waited for, seconds.
ANSWER_TIMEOUT_MIN_S = 0.25

#: Pause after the first failure, seconds; twice as long after each further one.
RECONNECT_DELAY_MIN_S = 0.1
RECONNECT_DELAY_MAX_S = 5.0

#: Seconds until a server that refuses to publish is asked again.
REFUSED_RETRY_DELAY_S = 60.0

#: So many lines in a row that came to nothing are said: somebody hangs up on them.  While Redis is away none is made.
LOGGED_AFTER_FAILURES = 5

#: Seconds between two looks at whether a server is back.
AWAY_WAIT = 0.05


class Home(Protocol):
    """The server that is listened to, for everything but listening."""

    @property
    def is_unreachable(self) -> bool:
        """Whether it is known that nobody answers."""

    def verify_reachable(self) -> None:
        """The line is dead: see whether the server is, too."""

    def note_missing_feature(self, lack: MissingFeature, reason: object) -> None:
        """It does not have something: say so, the first time."""


class Listener:
    """The thread that listens to one server, as long as there are views.

    Attributes:
        session: What is going on, if anything.
        subscriber_table: What is heard.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._server: Home | None = None
        self._lock = threading.RLock()
        self.subscriber_table = SubscriberTable()
        self._thread: threading.Thread | None = None
        self._is_refusal_logged = False
        self._reconnect_log, self._refusal_log = logger.RepeatThrottle(), logger.RepeatThrottle()
        self._logged_channels: set[str] = set()
        self._is_expedited = False
        self.session: Session | None = None

    def add_view(self, view: View, keys: tuple[str, ...], channel: str, server: Home) -> None:
        """Listen for a view, too; starts the thread if there is none.

        Raises:
            ThreadRefusedError: None can be started.
        """
        with self._lock:
            self._server = server
            self.subscriber_table.add_subscriber(view, keys, channel)
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_daemon(self._run, LISTENER_THREAD_NAME)

    def remove_view(self, view: View) -> None:
        """Listen no more for a view: its circuit lives elsewhere by now."""
        self.subscriber_table.remove_subscriber(view)
        view.is_heard(False)

    @property
    def is_running(self) -> bool:
        """Whether there is a thread that listens."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def expedite_reconnect(self) -> None:
        """What was refused is permitted again: there is no reason to wait."""
        self._is_expedited = True

    @property
    def push_mode(self) -> PushMode | None:
        """How, and of what server, if at all."""
        session = self.session
        return session.connection.push_mode if session else None

    def share_answer_with_siblings(self, source: View, channel: str, circuit: Circuit, now_ms: float) -> None:
        """Pass an answer that one storage of this process was given to the others: they need not wait for the push."""
        for view in self.subscriber_table.views_of(channel):
            if view is not source:
                view.store_sibling_answer(circuit, now_ms)

    def _end_if_unused(self) -> bool:
        """Whether nobody needs this thread any more; then it has to end."""
        with self._lock:
            if self.subscriber_table:
                return False
            # It has connections, which nobody needs any more either.
            self._thread = self._server = None
            return True

    def _run(self) -> None:
        failures, reason = 0, ""
        while not self._end_if_unused():
            try:
                session = self.session = Session(
                    partial(PushConnection, self._endpoint, self._timeout()),
                    self.subscriber_table,
                    self._logged_channels,
                )
                try:
                    if not session.connection.is_tracking:
                        assert self._server
                        self._server.note_missing_feature(MissingFeature.TRACKING, session.connection.tracking_refusal)
                    session.run_session()
                finally:
                    self.session = None
                    session.connection.close()
                    if session.has_polled:
                        failures, self._is_refusal_logged = 0, False
            except PushUnavailableError as error:
                self.log_refused(error)
                pause = REFUSED_RETRY_DELAY_S
            except Exception as error:  # noqa: BLE001
                # Whatever a client library raises: the way out is a new line.
                reason = describe_error(error)
                if (left_out := self._reconnect_log.admit_line()) is not None:
                    logger.emit(_log.push_interrupted(str(self._endpoint), error=reason, left_out=left_out))
                pause = random.uniform(0, min(RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S * 2**failures))
                failures += 1
            else:
                continue
            self._unsubscribe_views()
            assert self._server
            self._server.verify_reachable()
            if failures >= LOGGED_AFTER_FAILURES:
                self.log_refused(reason)
            self._pause(pause)

    def _pause(self, seconds: float) -> None:
        """Wait, but not for long once nobody needs this thread any more.

        While the server is away it is for somebody else to ask again; once it is back there is no reason to wait.
        """
        assert self._server
        until = monotonic() + seconds
        was_away = self._is_expedited = False
        while self.subscriber_table and not self._is_expedited:
            if self._server.is_unreachable:
                was_away = True
                time.sleep(AWAY_WAIT)
            elif was_away or (left := until - monotonic()) <= 0:
                return
            else:
                time.sleep(min(left, LISTENER_WAIT_MAX_S))

    def _unsubscribe_views(self) -> None:
        for item in self.subscriber_table.snapshot():
            item.view.is_heard(False)

    def _timeout(self) -> float:
        return max([ANSWER_TIMEOUT_MIN_S, *(item.view.max_staleness for item in self.subscriber_table.snapshot())])

    def log_refused(self, reason: object) -> None:
        """Log why nothing is heard, once until a poll is answered."""
        if not self._is_refusal_logged:
            self._is_refusal_logged = True
            if (left_out := self._refusal_log.admit_line()) is not None:
                logger.emit(_log.push_refused(str(self._endpoint), error=refusal_text(reason), left_out=left_out))


class ListenerTable:
    """The listeners of this process, one for each server."""

    def __init__(self) -> None:
        #: As long as anybody uses one, or it runs.
        self._by_server: weakref.WeakValueDictionary[Endpoint, Listener] = weakref.WeakValueDictionary()
        self.after_fork()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: none of the parent's threads is there, and its connections are not ours to keep open."""
        self._lock = threading.RLock()
        self._pid = os.getpid()
        for listener in self._by_server.values():
            if listener.session is not None:
                listener.session.connection.close()
        self._by_server.clear()

    def of(self, endpoint: Endpoint) -> Listener:
        """The listener to a server."""
        if self._pid != os.getpid():
            # Forked behind Python's back, as by uWSGI: from a master, where nobody listens and nobody holds a lock.
            self.after_fork()
        with self._lock:
            return self._by_server.setdefault(endpoint, Listener(endpoint))


_listeners = ListenerTable()


def listener_for(endpoint: Endpoint, view: View, keys: tuple[str, ...], channel: str, server: Home) -> Listener:
    """Have a view kept true from now on, as long as it lives and as long as that is possible; by whom."""
    listener = _listeners.of(endpoint)
    try:
        listener.add_view(view, keys, channel, server)
    except ThreadRefusedError as reason:
        if str(reason):
            listener.log_refused(reason)
    return listener
