"""Are changes of this circuit heard in this process?

Knows: one circuit's view, who listens to its server.  Does not know: lines, threads, what is heard.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

from pybreaker_redis import _log
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.selector import EngineSelector
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._replica.connection import PushMode
from pybreaker_redis._replica.listener import REFUSED_RETRY_DELAY_S, Home, Listener, listener_for
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import renew_in_children


class Subscription:
    """Has a view kept true by the thread that listens to the circuit's server.

    Args:
        name: Of the circuit, for log lines.
        view: To be kept true.
        carriers: They know where the circuit lies.
    """

    def __init__(self, name: str, view: View, carriers: EngineSelector) -> None:
        self._name = name
        self._view = view
        self._selector = carriers
        self._listener: Listener | None = None
        #: In which process that is, and when to try once more if there is none, monotonic seconds.
        self._pid = os.getpid()
        self._next_start_at = 0.0
        self._lock = threading.RLock()
        renew_in_children(self)

    def after_fork(self) -> None:
        """In a child: nobody holds the lock, and nobody listens; a parent's thread may have held its own lock."""
        self._lock = threading.RLock()
        self._listener, self._next_start_at, self._pid = None, 0.0, os.getpid()

    def start(self, server: Home) -> None:
        """Have changes heard from now on; nothing to do while nobody has asked, or where there is nothing to hear.

        Args:
            server: Where the circuit lives.
        """
        if self._pid != os.getpid():
            # Forked behind Python's back, as by uWSGI.
            self.after_fork()
        listener = self._listener
        if not self._view.max_staleness or (listener and listener.is_running) or monotonic() < self._next_start_at:
            return
        with self._lock:
            # Another thread may leave meanwhile, or have begun.
            engine = self._selector.current
            if engine is None or self._listener is not listener:
                return
            # A thread that cannot be started now may be startable later.
            self._next_start_at = monotonic() + REFUSED_RETRY_DELAY_S
            endpoint = self._selector.endpoint
            if endpoint is not None:
                endpoint = replace(endpoint, is_one_slot=self._selector.needs_one_slot)
                keys, channel = self._selector.keys, self._selector.channel
                self._listener = listener_for(endpoint, self._view, keys, channel, server)
            elif self._selector.mode == LuaEngine.mode:
                self._next_start_at = float("inf")
                _log.deaf(self._name, engine.client)

    def stop(self, is_left: Callable[[], bool]) -> bool:
        """Cease to hear, if the circuit is left.

        Args:
            is_left: Leaves it; returns whether that was news.
        """
        with self._lock:
            if not is_left():
                return False
            listener, self._listener, self._next_start_at = self._listener, None, 0.0
            if listener is not None and self._pid == os.getpid():
                listener.remove_view(self._view)
            return True

    def expedite(self) -> None:
        """What was refused is permitted again."""
        if (listener := self._listener) is not None:
            listener.expedite_reconnect()

    def share_answer(self, circuit: Circuit, now_ms: float) -> None:
        """What this storage was answered, the others of the process need not wait for."""
        if (listener := self._listener) is not None:
            listener.share_answer_with_siblings(self._view, self._selector.channel, circuit, now_ms)

    @property
    def push_mode(self) -> PushMode | None:
        """How, and of what server; ``None`` if not at all."""
        listener = self._listener
        return listener.push_mode if listener is not None and self._view.is_subscribed else None
