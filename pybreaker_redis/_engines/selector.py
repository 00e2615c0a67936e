"""Choice of the engine for one circuit in Redis.

The selector chooses Lua first.  When a server refuses scripts, the selector replaces the Lua engine by transactions.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import replace
from typing import Any

from pybreaker_redis._engines.base import EngineChoice
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import Intent, Reply
from pybreaker_redis._redis.classify import MissingFeature, ScriptingUnavailableError, is_instance_of_named
from pybreaker_redis._redis.endpoint import plain_endpoint_of
from pybreaker_redis._redis.keys import channel_of
from pybreaker_redis._redis.locator import Location

#: Missing features that wait for `EngineSelector.take_missing_features`, at most.
MISSING_FEATURES_MAX = 8


class EngineSelector:
    """Holder of one circuit's engine.

    Args:
        ttl_ms: Shortest time to live of an unused circuit, milliseconds (0: the circuit never expires).

    Attributes:
        current: The present choice (``None`` until the circuit is used).  Readers need no lock.
        missing: Features that engines have missed, each with the server's refusal, until
            `take_missing_features` removes them.
    """

    def __init__(self, *, ttl_ms: int) -> None:
        self.current: EngineChoice | None = None
        self.missing: deque[tuple[MissingFeature, str]] = deque(maxlen=MISSING_FEATURES_MAX)
        self._ttl_ms = ttl_ms
        self._locks: dict[int, Any] = {}

    @property
    def lock(self) -> Any:
        """Reentrant lock that a caller holds while the caller locates the circuit and chooses its engine.

        The user's client source runs under this lock and may wait.  So the lock is created at first use in each
        process: gevent's worker for gunicorn replaces the kind of lock only after the fork.
        """
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def choose(self, location: Location) -> EngineChoice:
        """Choose the Lua engine for a location, while the caller holds `lock`.

        Args:
            location: Location of the circuit, with the client that the engine uses.
        """
        endpoint = plain_endpoint_of(location.client)
        channel = channel_of(location.keys, endpoint.db) if endpoint else ""
        engine = LuaEngine(location.client, location.keys, channel, self._ttl_ms, missing=self.missing)
        choice = self.current = EngineChoice(engine, location.keys, channel, location.needs_one_slot)
        return choice

    def discard(self, choice: EngineChoice | None) -> bool:
        """Discard a choice, so that the next use of the circuit chooses again.

        Args:
            choice: Choice to discard (``None``: the present one).

        Returns:
            Whether the choice was discarded (False if another one has replaced it).
        """
        with self.lock:
            if choice is not None and choice is not self.current:
                return False
            self.current = None
            return True

    def run_intent(self, choice: EngineChoice, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Execute an intent on the chosen engine, or by a transaction if the server refuses scripts.

        Args:
            choice: Choice of the engine, `current` or an earlier one.
            intent: See `Engine.execute`.
            known: See `Engine.execute`.
            state_if_missing: See `Engine.execute`.

        Raises:
            redis.RedisError: No usable reply, or the class of that name of the client's library.
            OSError: No connection.
            UnusableReplyError: A reply that no Redis command of this package returns.
        """
        try:
            return choice.engine.execute(intent, known, state_if_missing)
        except ScriptingUnavailableError as reason:
            transactions = TransactionEngine(choice.engine.client, choice.keys, self._ttl_ms)
            # If the server refuses the transaction, too, the refusal is not about scripts: they may be permitted later.
            try:
                reply = transactions.execute(intent, known, state_if_missing)
            except Exception as error:
                if is_instance_of_named(error, "NoPermissionError") and is_instance_of_named(
                    reason.__cause__ or reason, "NoPermissionError"
                ):
                    # The right to run scripts is what the user needs, so the log has to name that right.
                    raise (reason.__cause__ or reason) from error
                raise
            self._replace_lua(choice, transactions, reason)
            return reply

    def _replace_lua(self, choice: EngineChoice, transactions: TransactionEngine, reason: Exception) -> None:
        with self.lock:
            if self.current is not choice:
                # Another thread has replaced the engine, or has discarded the location.
                return
            # Transactions publish nothing, so no process may rely on the channel.
            self.current = replace(choice, engine=transactions, channel="")
        self.missing.append((MissingFeature.SCRIPTS, str(reason)))

    def take_missing_features(self) -> list[tuple[MissingFeature, str]]:
        """Return and remove the features that engines have missed, each with the server's refusal."""
        # One thread at a time.  Others may add features meanwhile.
        with self.lock:
            return [self.missing.popleft() for _ in range(len(self.missing))]
