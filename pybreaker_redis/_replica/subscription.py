"""Are changes of this circuit heard in this process?

Knows: one circuit's view, who listens to its server.  Does not know: lines, threads, what is heard.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace

from pybreaker_redis import _log
from pybreaker_redis._engines.base import LUA_MODE, EngineChoice, EngineSource
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._replica.connection import PushMode
from pybreaker_redis._replica.listener import REFUSED_RETRY_DELAY_S, Home, Listener, listener_for
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import renew_in_children
from pybreaker_redis._runtime.logger import emit


class Subscription:
    """Has a view kept true by the thread that listens to the circuit's server.

    Args:
        name: Of the circuit, for log lines.
        view: To be kept true.
        engines: Holder of the circuit's engine.
    """

    def __init__(self, name: str, view: View, engines: EngineSource) -> None:
        self._name = name
        self._view = view
        self._engines = engines
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
            choice = self._engines.current
            if choice is None or self._listener is not listener:
                return
            # A thread that cannot be started now may be startable later.
            self._next_start_at = monotonic() + REFUSED_RETRY_DELAY_S
            endpoint = choice.endpoint
            if endpoint is not None:
                endpoint = replace(endpoint, is_one_slot=choice.is_one_slot)
                self._listener = listener_for(endpoint, self._view, choice.keys, choice.channel, server)
            elif choice.engine.mode == LUA_MODE:
                self._next_start_at = float("inf")
                emit(_log.push_impossible(self._name, client_class=type(choice.engine.client).__name__))

    def discard_engine(self, choice: EngineChoice | None) -> bool:
        """Discard the circuit's engine, and unsubscribe from the server that the engine used.

        Args:
            choice: Choice to discard; ``None``: the present one.

        Returns:
            Whether the choice was discarded; False if another one has replaced it.
        """
        with self._lock:
            if not self._engines.discard(choice):
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
        if (listener := self._listener) is not None and (choice := self._engines.current) is not None:
            listener.share_answer_with_siblings(self._view, choice.channel, circuit, now_ms)

    @property
    def push_mode(self) -> PushMode | None:
        """How, and of what server; ``None`` if not at all."""
        listener = self._listener
        return listener.push_mode if listener is not None and self._view.is_subscribed else None
