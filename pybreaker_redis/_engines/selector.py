"""Who carries out intents on the shared circuit: scripts, or transactions, and on which server?

Knows: both carriers, where the circuit lies.  Does not know: the view, the local clock, who listens.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from pybreaker_redis._engines.base import NoteMissingFeature
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._redis.classify import MissingFeature, ScriptingUnavailableError, is_instance_of_named
from pybreaker_redis._redis.endpoint import Endpoint, plain_endpoint_of
from pybreaker_redis._redis.keys import channel_of
from pybreaker_redis._redis.locator import Location

Engine = LuaEngine | TransactionEngine


class EngineSelector:
    """The carrier of one circuit: scripts, until it turns out that the server runs none.

    Args:
        location: Returns where the circuit lies; called when it is first used, and when it has moved.
        note_missing_feature: Told what the server does not have.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.

    Attributes:
        current: The carrier; ``None`` while nobody has asked.
        keys: Of the circuit; empty while nobody has asked.
        channel: Of the circuit; empty if nobody would hear of what this process does.
        needs_one_slot: Whether keys of other circuits cannot be asked for together with these.
    """

    def __init__(
        self, location: Callable[[], Location], note_missing_feature: NoteMissingFeature, *, ttl_ms: int
    ) -> None:
        self.current: Engine | None = None
        self.keys: tuple[str, ...] = ()
        self.channel = ""
        self.needs_one_slot = False
        self._seat = location
        self._note_missing_feature = note_missing_feature
        self._ttl_ms = ttl_ms
        self._locks: dict[int, Any] = {}

    @property
    def mode(self) -> str:
        """How intents are carried out: ``lua``, ``optimistic``, or empty: none was yet."""
        now = self.current
        return now.mode if now else ""

    @property
    def endpoint(self) -> Endpoint | None:
        """Of the server, if changes are told there, and further connections to it can be made."""
        now = self.current
        return plain_endpoint_of(now.client) if now and self.channel else None

    def get(self) -> Engine:
        """The carrier; the first time, and when the circuit has moved, it has to be found out which.

        Raises:
            Exception: Whatever the callable raises that returns the client.
        """
        if self.current is not None:
            return self.current
        with self._lock():
            if self.current is None:
                location = self._seat()
                endpoint = plain_endpoint_of(location.client)
                self.keys, self.needs_one_slot = location.keys, location.needs_one_slot
                self.channel = channel_of(self.keys, endpoint.db) if endpoint else ""
                self.current = LuaEngine(
                    location.client,
                    self.keys,
                    self.channel,
                    self._ttl_ms,
                    note_missing_feature=self._note_missing_feature,
                )
            return self.current

    def discard(self, engine: Engine | None) -> bool:
        """The circuit lies elsewhere by now.

        Args:
            engine: That has found it out; ``None``: whichever there is.

        Returns:
            Whether that was news: else another one has taken its place since.
        """
        with self._lock():
            if engine not in (None, self.current):
                return False
            self.current = None
            return True

    def run_intent(self, engine: Engine, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Have an intent carried out, without scripts if need be; see `base.Engine.execute`.

        Raises:
            Exception: No usable answer.
        """
        try:
            return engine.execute(intent, known, state_if_missing)
        except ScriptingUnavailableError as reason:
            optimistic: Any = self.current
            if not isinstance(optimistic, TransactionEngine):
                optimistic = TransactionEngine(engine.client, self.keys, self._ttl_ms)
            # If that is refused, too, it is not about scripts, and they may be permitted again.
            try:
                reply: Reply = optimistic.execute(intent, known, state_if_missing)
            except Exception as error:
                if is_instance_of_named(error, "NoPermissionError") and is_instance_of_named(
                    reason.__cause__ or reason, "NoPermissionError"
                ):
                    # Rights to run scripts are what this user should have, and what the log should name.
                    raise (reason.__cause__ or reason) from error
                raise
            self._replace_lua(engine, optimistic, reason)
            return reply

    def _replace_lua(self, engine: Engine, optimistic: TransactionEngine, reason: Exception) -> None:
        with self._lock():
            if self.current is not engine:
                # Another thread has found it out, or has left.
                return
            # Nobody would hear of what is done without scripts, so nobody relies on hearing.
            self.channel = ""
            self.current = optimistic
        self._note_missing_feature(MissingFeature.SCRIPTS, reason)

    def _lock(self) -> Any:
        """This process's, and of the kind that is in use when it is first needed: gevent replaces them.

        It is held while a callable returns a client, and who knows what that waits for.
        """
        return self._locks.setdefault(os.getpid(), threading.RLock())
