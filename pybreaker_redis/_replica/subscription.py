"""Subscription of one circuit to the listener of its server."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._replica.connection import PushMode
from pybreaker_redis._replica.listener import REFUSED_RETRY_DELAY_S, Listener, listener_for
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import fork
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._servers.server import Server


class Subscription(ForkSafe):
    """Link between one view and the listener that keeps the view current.

    Args:
        view: The view.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._listener: Listener | None = None
        self._channel = ""
        #: When a start is tried again, monotonic seconds.
        self._next_start_at = 0.0
        super().__init__()

    def _reset_in_child(self) -> None:
        # The listener thread exists in the parent only.
        self._listener, self._next_start_at = None, 0.0

    @property
    def lock(self) -> threading.RLock:
        """Lock that the owner holds while it checks the location of the circuit, and starts or stops."""
        return self._lock

    @property
    def is_start_due(self) -> bool:
        """Whether the circuit should be subscribed and is not.

        A process that was forked without the hooks of Python still has the listener of its parent.
        """
        if not self._view.max_staleness:
            return False
        if os.getpid() != fork.process_id:
            return True
        # As `Listener.is_running`, but without a call: every query of a guarded call passes here.
        listener = self._listener
        thread = listener.thread if listener else None
        return not (thread and thread.is_alive()) and monotonic() >= self._next_start_at

    def begin(
        self,
        server: Server,
        keys: tuple[str, ...],
        channel: str,
        *,
        is_one_slot: bool,
        is_armable: bool,
        scripts: Sequence[tuple[bytes, str]],
    ) -> None:
        """Subscribe the circuit.

        Args:
            server: Server of the circuit.
            keys: Keys of the circuit, in the order of the scripts.
            channel: Channel of the circuit.
            is_one_slot: Whether no command may name keys of other circuits, too.
            is_armable: Whether a server that tracks keys reports every change of the circuit.
            scripts: Sources and digests of the scripts that calls will need.
        """
        with self._lock:
            # A thread that cannot be started now may be startable later.
            self._next_start_at = monotonic() + REFUSED_RETRY_DELAY_S
            self._channel = channel
            self._listener = listener_for(server)
            self._listener.scripts = scripts
            self._listener.add_view(self._view, keys, channel, is_one_slot=is_one_slot, is_armable=is_armable)

    def disable(self) -> None:
        """Make no start due until the next `end`: there is no channel, or no way to connect."""
        with self._lock:
            self._next_start_at = math.inf

    def end(self) -> None:
        """End the subscription.  A new start is due at once."""
        with self._lock:
            listener, self._listener, self._next_start_at = self._listener, None, 0.0
            if listener is not None and os.getpid() == fork.process_id:
                listener.remove_view(self._view)

    def expedite(self) -> None:
        """Retry a refused connection at once."""
        if (listener := self._listener) is not None:
            listener.expedite_reconnect()

    def share_answer(self, circuit: Circuit, now_ms: float) -> None:
        """Pass an answer to the other storages of this process, so that they need not wait for the push.

        Args:
            circuit: The record in the answer.
            now_ms: Time of the server in the answer, milliseconds.
        """
        listener = self._listener
        if listener is not None and self._channel in listener.subscriber_table.shared_channels:
            listener.share_answer_with_siblings(self._view, self._channel, circuit, now_ms)

    @property
    def active_push_mode(self) -> PushMode | None:
        """How the circuit is subscribed, ``None`` if it is not."""
        listener = self._listener
        return listener.session_push_mode if listener is not None and self._view.is_subscribed else None
