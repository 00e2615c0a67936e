"""Who carries out intents on the shared circuit: scripts, or transactions, and on which server?

Knows: both carriers, where the circuit lies.  Does not know: the view, the local clock, who listens.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from pybreaker_redis._carrier import Lack, Reply, SayLack
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._client import Origin, known_origin_of
from pybreaker_redis._intents import Intent
from pybreaker_redis._keys import channel_of
from pybreaker_redis._optimistic import OptimisticCarrier
from pybreaker_redis._scripts import LuaCarrier
from pybreaker_redis._whereabouts import Seat
from pybreaker_redis.errors import ScriptingUnavailable, is_a

Carrier = LuaCarrier | OptimisticCarrier


class Carriers:
    """The carrier of one circuit: scripts, until it turns out that the server runs none.

    Args:
        seat: Returns where the circuit lies; called when it is first used, and when it has moved.
        say_lack: Told what the server does not have.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.

    Attributes:
        now: The carrier; ``None`` while nobody has asked.
        keys: Of the circuit; empty while nobody has asked.
        channel: Of the circuit; empty if nobody would hear of what this process does.
        one_slot: Whether keys of other circuits cannot be asked for together with these.
    """

    def __init__(self, seat: Callable[[], Seat], say_lack: SayLack, *, ttl_ms: int) -> None:
        self.now: Carrier | None = None
        self.keys: tuple[str, ...] = ()
        self.channel = ""
        self.one_slot = False
        self._seat = seat
        self._say_lack = say_lack
        self._ttl_ms = ttl_ms
        self._locks: dict[int, Any] = {}

    @property
    def mode(self) -> str:
        """How intents are carried out: ``lua``, ``optimistic``, or empty: none was yet."""
        now = self.now
        return now.mode if now else ""

    @property
    def origin(self) -> Origin | None:
        """Of the server, if changes are told there, and further connections to it can be made."""
        now = self.now
        return known_origin_of(now.client) if now and self.channel else None

    def get(self) -> Carrier:
        """The carrier; the first time, and when the circuit has moved, it has to be found out which.

        Raises:
            Exception: Whatever the callable raises that returns the client.
        """
        if self.now is not None:
            return self.now
        with self._lock():
            if self.now is None:
                seat = self._seat()
                origin = known_origin_of(seat.client)
                self.keys, self.one_slot = seat.keys, seat.one_slot
                self.channel = channel_of(self.keys, origin.db) if origin else ""
                self.now = LuaCarrier(seat.client, self.keys, self.channel, self._ttl_ms, say_lack=self._say_lack)
            return self.now

    def leave(self, carrier: Carrier | None) -> bool:
        """The circuit lies elsewhere by now.

        Args:
            carrier: That has found it out; ``None``: whichever there is.

        Returns:
            Whether that was news: else another one has taken its place since.
        """
        with self._lock():
            if carrier not in (None, self.now):
                return False
            self.now = None
            return True

    def execute(self, carrier: Carrier, intent: Intent, known: Circuit | None, create: str) -> Reply:
        """Have an intent carried out, without scripts if need be; see `_carrier.Carrier.execute`.

        Raises:
            Exception: No usable answer.
        """
        try:
            return carrier.execute(intent, known, create)
        except ScriptingUnavailable as reason:
            optimistic: Any = self.now
            if not isinstance(optimistic, OptimisticCarrier):
                optimistic = OptimisticCarrier(carrier.client, self.keys, self._ttl_ms)
            # If that is refused, too, it is not about scripts, and they may be permitted again.
            try:
                reply: Reply = optimistic.execute(intent, known, create)
            except Exception as error:
                if is_a(error, "NoPermissionError") and is_a(reason.__cause__ or reason, "NoPermissionError"):
                    # Rights to run scripts are what this user should have, and what the log should name.
                    raise (reason.__cause__ or reason) from error
                raise
            self._do_without_scripts(carrier, optimistic, reason)
            return reply

    def _do_without_scripts(self, carrier: Carrier, optimistic: OptimisticCarrier, reason: Exception) -> None:
        with self._lock():
            if self.now is not carrier:
                # Another thread has found it out, or has left.
                return
            # Nobody would hear of what is done without scripts, so nobody relies on hearing.
            self.channel = ""
            self.now = optimistic
        self._say_lack(Lack.SCRIPTS, reason)

    def _lock(self) -> Any:
        """This process's, and of the kind that is in use when it is first needed: gevent replaces them.

        It is held while a callable returns a client, and who knows what that waits for.
        """
        return self._locks.setdefault(os.getpid(), threading.RLock())
