"""Engine that executes each intent by a transaction, for servers that run no scripts.

WATCH, MULTI and EXEC surround the decision in Python.
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
    StoredRecord,
    lifetime_ms,
)
from pybreaker_redis._model.intents import ClaimProbe, Intent, Load, Reply
from pybreaker_redis._redis.classify import is_instance_of_named
from pybreaker_redis._redis.connections.deadline import seconds_left
from pybreaker_redis._redis.legacy import client_without_decoding
from pybreaker_redis._runtime.clock import monotonic

#: Seconds for which a contended intent is retried where no deadline is set.
CONTENTION_TIMEOUT_S = 2.0
#: Share of the time until the deadline in which a contended intent is retried.  The rest is for the other steps.
CONTENTION_RETRY_RATIO = 0.8
#: Longest pause between two attempts, seconds.
CONTENTION_PAUSE_MAX_S = 0.05
#: Doublings of the pause, from the duration of one attempt.
CONTENTION_DOUBLINGS_MAX = 5

#: Part of redis-py's `WatchError` for a connection that was lost under WATCH.  The context of the error is the cause.
_LOST_UNDER_WATCH = "while watching"

#: Reply to PTTL for a key without TTL.
PTTL_NO_EXPIRY = -1


class TransactionEngine:
    """Engine of a circuit in Redis that runs transactions.

    A load takes one round trip, and every other intent takes about seven.

    Args:
        client: Client of the server.
        keys: Keys of the circuit, in the order of the scripts.
        ttl_ms: Shortest time to live of an unused circuit, milliseconds (0: the circuit never expires).
    """

    mode = TRANSACTION_MODE

    def __init__(self, client: Any, keys: tuple[str, ...], ttl_ms: int = 0) -> None:
        self.client = client_without_decoding(client)
        self._keys = keys
        self._ttl_ms = ttl_ms

    def execute(self, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        """Read under WATCH, decide in Python, write under MULTI, and retry while other writers are faster.

        The retries end before the deadline.  A claim is refused if other writers were faster until then.

        Args:
            intent: See `Engine.execute`.
            known: See `Engine.execute`.
            state_if_missing: See `Engine.execute`.

        Raises:
            redis.WatchError: Other writers were faster until the retries ended, and the server has answered.  The cause
                is the client's `TimeoutError` if the server may have executed the last transaction.
            redis.RedisError: No usable reply, or the class of that name of the client's library.
            OSError: No connection.
            UnusableReplyError: A reply that no server returns.
        """
        lacks_ttl = False
        if isinstance(intent, Load):
            reply, changes, lacks_ttl = self._load(intent, known, state_if_missing)
            if not (changes or lacks_ttl):
                return reply
        until = monotonic() + (
            CONTENTION_TIMEOUT_S if (left := seconds_left()) is None else left * CONTENTION_RETRY_RATIO
        )
        lost_race_count = 0
        while True:
            started_at = monotonic()
            reply, is_done = self._try_once(
                intent, known, state_if_missing, lacks_ttl=lacks_ttl, is_retry=bool(lost_race_count)
            )
            if is_done:
                return reply
            duration_s = monotonic() - started_at
            left = until - monotonic() - duration_s
            if left <= 0:
                break
            pause_s = duration_s * 2 ** min(lost_race_count, CONTENTION_DOUBLINGS_MAX)
            # "Full jitter": M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
            time.sleep(random.uniform(0, min(left, CONTENTION_PAUSE_MAX_S, pause_s)))
            lost_race_count += 1
        if isinstance(intent, ClaimProbe):
            return replace(reply, accepted=False)
        raise self._contention_error()

    def _load(self, intent: Load, known: Circuit | None, state_if_missing: str) -> tuple[Reply, RecordChanges, bool]:
        """Read the circuit in one round trip.

        Returns:
            The reply, the changes that a repair would write, and whether a TTL is missing.
        """
        with self.client.pipeline(transaction=False) as pipe:
            queue_reads(pipe, self._keys)
            if self._ttl_ms:
                pipe.pttl(self._keys[0])
            command_count = READ_COMMAND_COUNT + bool(self._ttl_ms)
            *answers, left = (*checked_sequence("a pipeline", pipe.execute(raise_on_error=False), command_count), None)[
                : READ_COMMAND_COUNT + 1
            ]
        reply, changes = decide(intent, *parse_read_answers(answers), known, state_if_missing)
        return reply, changes, left == PTTL_NO_EXPIRY

    def _try_once(
        self, intent: Intent, known: Circuit | None, state_if_missing: str, *, lacks_ttl: bool, is_retry: bool
    ) -> tuple[Reply, bool]:
        """Run one transaction.

        Returns:
            The reply and ``True``, or the circuit as it was and ``False`` if another writer was faster.
        """
        with _transaction(self.client) as pipe:
            is_sent = False
            found: tuple[StoredRecord, int] | None = None
            try:
                pipe.watch(*self._keys)
                found = parse_read_answers(queue_reads(pipe, self._keys))
                reply, changes = decide(intent, *found, known, state_if_missing)
                if changes or lacks_ttl:
                    pipe.multi()
                    self._queue_writes(pipe, changes)
                    self._queue_expiry(pipe, reply)
                    is_sent = True
                    pipe.execute()
            except Exception as error:
                lost = error.__context__ if _LOST_UNDER_WATCH in str(error) else None
                if lost is None and found is not None and is_instance_of_named(error, "WatchError"):
                    return decide(Load(), *found, known, state_if_missing)[0], False
                if is_retry and is_instance_of_named(lost or error, "TimeoutError"):
                    # The server has answered within this deadline, so contention has used the time, and no outage.
                    raise self._contention_error() from ((lost or error) if is_sent else None)
                if lost is not None:
                    raise lost from lost.__cause__
                raise
            return reply, True

    def _contention_error(self) -> WatchError:
        return WatchError(f"circuit {self._keys[0]!r}: transactions were overtaken until the deadline was near")

    def _queue_writes(self, pipe: Any, changes: RecordChanges) -> None:
        keys: dict[str, str] = dict(zip(VALUE_NAMES, self._keys, strict=True))
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
    """Yield a pipeline, and disconnect its connection unless the server has answered every command.

    redis-py's pipeline would connect again to send UNWATCH, after the deadline, on the thread that frees the pipeline.
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
