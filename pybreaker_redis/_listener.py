"""Who hears what others do?

Knows: threads, processes, when to try again.  Does not know: circuits, what is said on a line.

One thread and one line for each server that this process uses, whatever the number of clients and circuits.  It begins
with the first guarded call, so never where modules are merely imported, and it is made anew in each forked child.

What is done on the line stands in `_session.py`.  Whatever goes wrong with it, everything is forgotten, and after a
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

from pybreaker_redis import _said
from pybreaker_redis._carrier import Lack
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._client import Origin
from pybreaker_redis._clock import monotonic
from pybreaker_redis._forks import renew_in_children
from pybreaker_redis._hearings import Hearings
from pybreaker_redis._line import Heard, Line
from pybreaker_redis._secrets import described
from pybreaker_redis._session import LONGEST_WAIT, Session
from pybreaker_redis._threads import NoThreads, start
from pybreaker_redis._view import View
from pybreaker_redis.errors import PushUnavailable

THREAD_NAME = "pybreaker_redis listener"

#: Shortest time that an answer is waited for, seconds.
SHORTEST_TIMEOUT = 0.25

#: Pause after the first failure, seconds; twice as long after each further one.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0

#: Seconds until a server that refuses to publish is asked again.
REFUSED_PAUSE = 60.0

#: So many lines in a row that came to nothing are said: somebody hangs up on them.  While Redis is away none is made.
MANY_FAILURES = 5

#: Seconds between two looks at whether a server is back.
AWAY_WAIT = 0.05


class Home(Protocol):
    """The server that is listened to, for everything but listening."""

    @property
    def is_away(self) -> bool:
        """Whether it is known that nobody answers."""

    def doubt(self) -> None:
        """The line is dead: see whether the server is, too."""

    def say_lack(self, lack: Lack, reason: object) -> None:
        """It does not have something: say so, the first time."""


class Listener:
    """The thread that listens to one server, as long as there are views.

    Attributes:
        session: What is going on, if anything.
        hearings: What is heard.
    """

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._server: Home | None = None
        self._lock = threading.RLock()
        self.hearings = Hearings()
        self._thread: threading.Thread | None = None
        self._refused = False
        self._losses, self._refusals = _said.Repeats(), _said.Repeats()
        self._unheard: set[str] = set()
        self._hurried = False
        self.session: Session | None = None

    def add(self, view: View, keys: tuple[str, ...], channel: str, server: Home) -> None:
        """Listen for a view, too; starts the thread if there is none.

        Raises:
            NoThreads: None can be started.
        """
        with self._lock:
            self._server = server
            self.hearings.add(view, keys, channel)
            if self._thread is None or not self._thread.is_alive():
                self._thread = start(self._run, THREAD_NAME)

    def remove(self, view: View) -> None:
        """Listen no more for a view: its circuit lives elsewhere by now."""
        self.hearings.remove(view)
        view.is_heard(False)

    @property
    def runs(self) -> bool:
        """Whether there is a thread that listens."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def hurry(self) -> None:
        """What was refused is permitted again: there is no reason to wait."""
        self._hurried = True

    @property
    def heard(self) -> Heard | None:
        """How, and of what server, if at all."""
        session = self.session
        return session.line.heard if session else None

    def tell(self, source: View, channel: str, circuit: Circuit, now_ms: float) -> None:
        """Pass an answer that one storage of this process was given to the others: they need not wait for the push."""
        for view in self.hearings.views(channel):
            if view is not source:
                view.share(circuit, now_ms)

    def _leave(self) -> bool:
        """Whether nobody needs this thread any more; then it has to end."""
        with self._lock:
            if self.hearings:
                return False
            # It has connections, which nobody needs any more either.
            self._thread = self._server = None
            return True

    def _run(self) -> None:
        failures, reason = 0, ""
        while not self._leave():
            try:
                session = self.session = Session(
                    partial(Line, self._origin, self._timeout()), self.hearings, self._unheard
                )
                try:
                    if not session.line.tracks:
                        assert self._server
                        self._server.say_lack(Lack.TRACKING, session.line.untracked)
                    session.serve()
                finally:
                    self.session = None
                    session.line.close()
                    if session.polled:
                        failures, self._refused = 0, False
            except PushUnavailable as error:
                self.say_refused(error)
                pause = REFUSED_PAUSE
            except Exception as error:  # noqa: BLE001
                # Whatever a client library raises: the way out is a new line.
                reason = described(error)
                if (left_out := self._losses.next()) is not None:
                    _said.detail("no push from %s (%s)%s", self._origin, reason, left_out)
                pause = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**failures))
                failures += 1
            else:
                continue
            self._forget_all()
            assert self._server
            self._server.doubt()
            if failures >= MANY_FAILURES:
                self.say_refused(reason)
            self._rest(pause)

    def _rest(self, seconds: float) -> None:
        """Wait, but not for long once nobody needs this thread any more.

        While the server is away it is for somebody else to ask again; once it is back there is no reason to wait.
        """
        assert self._server
        until = monotonic() + seconds
        was_away = self._hurried = False
        while self.hearings and not self._hurried:
            if self._server.is_away:
                was_away = True
                time.sleep(AWAY_WAIT)
            elif was_away or (left := until - monotonic()) <= 0:
                return
            else:
                time.sleep(min(left, LONGEST_WAIT))

    def _forget_all(self) -> None:
        for item in self.hearings.all():
            item.view.is_heard(False)

    def _timeout(self) -> float:
        return max([SHORTEST_TIMEOUT, *(item.view.max_staleness for item in self.hearings.all())])

    def say_refused(self, reason: object) -> None:
        """Log why nothing is heard, once until a poll is answered."""
        if not self._refused:
            self._refused = True
            if (left_out := self._refusals.next()) is not None:
                _said.unheard(str(self._origin), reason, left_out)


class _Listeners:
    """The listeners of this process, one for each server."""

    def __init__(self) -> None:
        #: As long as anybody uses one, or it runs.
        self._of_origin: weakref.WeakValueDictionary[Origin, Listener] = weakref.WeakValueDictionary()
        self.after_fork()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: none of the parent's threads is there, and its connections are not ours to keep open."""
        self._lock = threading.RLock()
        self._pid = os.getpid()
        for listener in self._of_origin.values():
            if listener.session is not None:
                listener.session.line.close()
        self._of_origin.clear()

    def of(self, origin: Origin) -> Listener:
        """The listener to a server."""
        if self._pid != os.getpid():
            # Forked behind Python's back, as by uWSGI: from a master, where nobody listens and nobody holds a lock.
            self.after_fork()
        with self._lock:
            return self._of_origin.setdefault(origin, Listener(origin))


_listeners = _Listeners()


def listen(origin: Origin, view: View, keys: tuple[str, ...], channel: str, server: Home) -> Listener:
    """Have a view kept true from now on, as long as it lives and as long as that is possible; by whom."""
    listener = _listeners.of(origin)
    try:
        listener.add(view, keys, channel, server)
    except NoThreads as reason:
        if str(reason):
            listener.say_refused(reason)
    return listener
