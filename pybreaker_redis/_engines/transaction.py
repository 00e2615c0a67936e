"""How does an intent become one atomic step on a server that runs no scripts?

Knows: WATCH, MULTI, EXEC around the Python model.  Does not know: what an intent is for.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from redis.exceptions import WatchError

from pybreaker_redis._engines.base import TRANSACTION_MODE
from pybreaker_redis._engines.reader import READ_COMMAND_COUNT, decide, parse_read_answers, queue_reads
from pybreaker_redis._model.answers import checked_sequence
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.codec import (
    TTL_RENEWAL_MARGIN_MS,
    VALUE_NAMES,
    RecordChanges,
    lifetime_ms,
)
from pybreaker_redis._model.intents import ClaimProbe, Intent, Load, Reply
from pybreaker_redis._redis.classify import is_instance_of_named
from pybreaker_redis._redis.deadline import seconds_left
from pybreaker_redis._redis.legacy import client_without_decoding
from pybreaker_redis._runtime.clock import monotonic

#: Seconds for which a contended intent is retried where no deadline is set.
CONTENTION_TIMEOUT_S = 2.0
#: Share of the time until the deadline in which a contended intent is retried; the rest is for other steps of the call.
CONTENTION_RETRY_RATIO = 0.8
#: Longest pause between two attempts, seconds.
CONTENTION_PAUSE_MAX_S = 0.05
#: Doublings of the pause, from the duration of one attempt.
CONTENTION_DOUBLINGS_MAX = 5

#: Part of the message of redis-py's `WatchError` for a connection that was lost under WATCH; its context is the reason.
_LOST_UNDER_WATCH = "while watching"

#: How the server says that a key has no TTL.
PTTL_NO_EXPIRY = -1


class TransactionEngine:
    """A circuit in Redis, moved by transactions: a load is one round trip, anything else about seven.

    Args:
        client: Of the server.
        keys: Of the circuit, in the order of the scripts.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
    """

    mode = TRANSACTION_MODE

    def __init__(self, client: Any, keys: tuple[str, ...], ttl_ms: int = 0) -> None:
        self.client = client_without_decoding(client)
        self._keys = keys
        self._ttl_ms = ttl_ms

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Read under WATCH, decide in Python, write under MULTI; retry while other writers are faster.

        The retries end before the deadline.  A claim that is overtaken until then is refused.

        Raises:
            redis.exceptions.WatchError: Other writers were faster in all of that time.  The server did answer; the
                cause is the client's `TimeoutError` if the last transaction may have been executed.
            redis.exceptions.RedisError: No usable answer.
        """
        endless = False
        if isinstance(intent, Load):
            reply, changes, endless = self._load(intent, known, state_if_missing)
            if not (changes or endless):
                return reply
        until = monotonic() + (
            CONTENTION_TIMEOUT_S if (left := seconds_left()) is None else left * CONTENTION_RETRY_RATIO
        )
        overtaken = 0
        while True:
            began = monotonic()
            reply, is_done = self._try_once(intent, known, state_if_missing, endless=endless, again=bool(overtaken))
            if is_done:
                return reply
            took = monotonic() - began
            left = until - monotonic() - took
            if left <= 0:
                break
            # "Full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
            time.sleep(
                random.uniform(
                    0, min(left, CONTENTION_PAUSE_MAX_S, took * 2 ** min(overtaken, CONTENTION_DOUBLINGS_MAX))
                )
            )
            overtaken += 1
        if isinstance(intent, ClaimProbe):
            return replace(reply, accepted=False)
        raise self._contention_error()

    def _load(self, intent: Load, known: Circuit | None, state_if_missing: str) -> tuple[Reply, RecordChanges, bool]:
        """Read the circuit in one round trip; what is to be repaired, and whether a TTL is missing."""
        with self.client.pipeline(transaction=False) as pipe:
            queue_reads(pipe, self._keys)
            if self._ttl_ms:
                pipe.pttl(self._keys[0])
            asked = READ_COMMAND_COUNT + bool(self._ttl_ms)
            *answers, left = (*checked_sequence("a pipeline", pipe.execute(raise_on_error=False), asked), None)[
                : READ_COMMAND_COUNT + 1
            ]
        reply, changes = decide(intent, *parse_read_answers(answers), known, state_if_missing)
        return reply, changes, left == PTTL_NO_EXPIRY

    def _try_once(
        self, intent: Intent, known: Circuit | None, state_if_missing: str, *, endless: bool, again: bool
    ) -> tuple[Reply, bool]:
        """Make one transaction; the circuit as it was, and ``False``, if another writer was faster."""
        with _transaction(self.client) as pipe:
            is_sent = False
            try:
                pipe.watch(*self._keys)
                found = parse_read_answers(queue_reads(pipe, self._keys))
                reply, changes = decide(intent, *found, known, state_if_missing)
                if changes or endless:
                    pipe.multi()
                    self._queue_writes(pipe, changes)
                    self._queue_expiry(pipe, reply)
                    is_sent = True
                    pipe.execute()
            except Exception as error:
                lost = error.__context__ if _LOST_UNDER_WATCH in str(error) else None
                if lost is None and is_instance_of_named(error, "WatchError"):
                    return decide(Load(), *found, known, state_if_missing)[0], False
                if again and is_instance_of_named(lost or error, "TimeoutError"):
                    # The server has answered within this deadline: contention has used the time, not an outage.
                    raise self._contention_error() from ((lost or error) if is_sent else None)
                if lost is not None:
                    raise lost from lost.__cause__
                raise
            return reply, True

    def _contention_error(self) -> WatchError:
        return WatchError(f"circuit {self._keys[0]!r}: transactions were overtaken until the deadline was near")

    def _queue_writes(self, pipe: Any, changes: RecordChanges) -> None:
        keys = dict(zip(VALUE_NAMES, self._keys, strict=True))
        for name, value in changes.plain.items():
            if value is None:
                pipe.delete(keys[name])
            else:
                pipe.set(keys[name], value)
        if changes.is_hash_deleted:
            pipe.delete(keys["circuit"])
        if changes.hash_fields:
            pipe.hset(keys["circuit"], mapping=changes.hash_fields)

    def _queue_expiry(self, pipe: Any, reply: Reply) -> None:
        if self._ttl_ms:
            at_ms = int(reply.now_ms) + lifetime_ms(reply.circuit.state, self._ttl_ms) + TTL_RENEWAL_MARGIN_MS
            for key in self._keys:
                pipe.pexpireat(key, at_ms)


@contextlib.contextmanager
def _transaction(client: Any) -> Iterator[Any]:
    """A pipeline; its connection is dropped unless all that was sent is answered.

    redis-py's pipeline would connect again to send UNWATCH: after the deadline, on whichever thread frees it.
    """
    pipe = client.pipeline()
    try:
        try:
            yield pipe
        except BaseException as error:
            if not is_instance_of_named(error, "ResponseError"):
                _drop_connection(pipe)
            raise
        finally:
            pipe.reset()
    except BaseException:
        _drop_connection(pipe)
        pipe.reset()
        raise


def _drop_connection(pipe: Any) -> None:
    connection = getattr(pipe, "connection", None)
    if connection is not None:
        connection.disconnect()
        pipe.watching = False
