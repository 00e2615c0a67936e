"""How does an intent become one atomic step on a server that runs no scripts?

Knows: WATCH, MULTI, EXEC around the Python model.  Does not know: what an intent is for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import WatchError

from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import Circuit
from pybreaker_redis._intents import Intent, Load
from pybreaker_redis._lifetime import COUNTS_MS, lifetime_ms
from pybreaker_redis._record import MARK_FIELDS, VALUE_NAMES, WRONG_TYPE, Found, Writes, believe, parse, writes
from pybreaker_redis.errors import is_a

#: Attempts before a contended circuit counts as out of reach.
ATTEMPTS = 200
#: Longest pause between two attempts, seconds.
LONGEST_PAUSE = 0.02

#: How the server says that a key has no TTL.
ENDLESS = -1

#: Whether redis-py can be asked not to decode the answer to a single command.
CAN_LEAVE_UNDECODED = hasattr(redis.client, "NEVER_DECODE")


@dataclass(frozen=True, slots=True)
class Question:
    """What has to be known to look at a circuit.

    Attributes:
        client: Of its server.
        keys: Of the circuit, in the order of the scripts.
        known: The circuit as this process saw it last.
        create: The state of a circuit that nobody knows.
    """

    client: Any
    keys: tuple[str, ...]
    known: Circuit | None
    create: str


class OptimisticCarrier:
    """A circuit in Redis, moved by transactions: a load is one round trip, anything else about seven.

    Args:
        client: Of the server.
        keys: Of the circuit, in the order of the scripts.
        ttl_ms: For how long an untouched circuit is kept at least, milliseconds; 0: for ever.
    """

    mode = "optimistic"

    def __init__(self, client: Any, keys: tuple[str, ...], ttl_ms: int = 0) -> None:
        self.client = _undecoded(client)
        self._keys = keys
        self._ttl_ms = ttl_ms

    def execute(self, intent: Intent, known: Circuit | None, create: str) -> Reply:
        """Read under WATCH, decide in Python, write under MULTI, again if somebody was faster; see `Carrier.execute`.

        Raises:
            redis.exceptions.WatchError: Somebody was faster 200 times.
            redis.exceptions.RedisError: No usable answer.
        """
        endless = False
        if isinstance(intent, Load):
            with self.client.pipeline(transaction=False) as pipe:
                _ask(pipe, self._keys)
                if self._ttl_ms:
                    pipe.pttl(self._keys[0])
                *answers, left = (*pipe.execute(raise_on_error=False), None)[:5]
                reply, changes = _decide(intent, *_understand(answers), known, create)
            endless = left == ENDLESS
            if not (changes or endless):
                return reply
        for attempt in range(ATTEMPTS):
            with self.client.pipeline() as pipe:
                pipe.watch(*self._keys)
                reply, changes = _decide(intent, *_understand(_ask(pipe, self._keys)), known, create)
                if not (changes or endless):
                    return reply
                pipe.multi()
                self._write(pipe, changes)
                self._keep(pipe, reply)
                try:
                    pipe.execute()
                except Exception as error:
                    if not is_a(error, "WatchError"):
                        raise
                    time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.0002 * 2**attempt)))
                else:
                    return reply
        msg = f"circuit {self._keys[0]!r}: {ATTEMPTS} transactions in a row were overtaken by others"
        raise WatchError(msg)

    def _write(self, pipe: Any, changes: Writes) -> None:
        keys = dict(zip(VALUE_NAMES, self._keys, strict=True))
        for name, value in changes.plain.items():
            if value is None:
                pipe.delete(keys[name])
            else:
                pipe.set(keys[name], value)
        if changes.drop_mark:
            pipe.delete(keys["circuit"])
        if changes.mark:
            pipe.hset(keys["circuit"], mapping=changes.mark)

    def _keep(self, pipe: Any, reply: Reply) -> None:
        if self._ttl_ms:
            at_ms = int(reply.now_ms) + lifetime_ms(reply.circuit.state, self._ttl_ms) + COUNTS_MS
            for key in self._keys:
                pipe.pexpireat(key, at_ms)


def look(questions: Sequence[Question]) -> list[Reply]:
    """Look at circuits of one server in one round trip, and change nothing; one at least.

    Raises:
        Exception: No usable answer; whatever the client raises then.
    """
    with _undecoded(questions[0].client).pipeline(transaction=False) as pipe:
        for question in questions:
            _ask(pipe, question.keys)
        answers = pipe.execute(raise_on_error=False)
    step = len(answers) // len(questions)
    return [
        _decide(Load(), *_understand(answers[step * index :][:step]), question.known, question.create)[0]
        for index, question in enumerate(questions)
    ]


def _ask(pipe: Any, keys: tuple[str, ...]) -> list[Any]:
    """Queue the reads of one circuit, or run them at once on a pipeline that watches."""
    commands = (("MGET", *keys[:4]), ("EXISTS", keys[3]), ("HMGET", keys[4], *MARK_FIELDS), ("TIME",))
    answers = []
    for command in commands:
        try:
            # Whatever bytes lie there are ours to judge: a client that decodes would fail on some of them.
            options = {"NEVER_DECODE": True} if command[0] in ("MGET", "HMGET") else {}
            answers.append(pipe.execute_command(*command, **options))
        except Exception as error:
            if not is_a(error, "ResponseError"):
                raise
            answers.append(error)
    return answers


def _undecoded(client: Any) -> Any:
    """The client, or one of the same server: redis-py 3, if it decodes, cannot be asked not to for a single command."""
    pool = getattr(client, "connection_pool", None)
    if CAN_LEAVE_UNDECODED or not pool or not pool.connection_kwargs.get("decode_responses"):
        return client
    words = {**pool.connection_kwargs, "decode_responses": False}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **words))


def _understand(answers: list[Any]) -> tuple[Found, int]:
    plain, opened_at_exists, mark, clock = answers
    for answer in (plain, opened_at_exists, clock):
        if isinstance(answer, Exception):
            raise answer
    if plain[3] is None and opened_at_exists:
        plain = [*plain[:3], WRONG_TYPE]
    wrong_type = isinstance(mark, Exception) and str(mark).startswith("WRONGTYPE")
    if isinstance(mark, Exception) and not wrong_type:
        raise mark
    found = parse(plain, (None,) * len(MARK_FIELDS) if wrong_type else mark, mark_is_hash=not wrong_type)
    seconds, microseconds = (int(part) for part in clock)
    return found, seconds * 1000 + microseconds // 1000


def _decide(intent: Intent, found: Found, now_ms: int, known: Circuit | None, create: str) -> tuple[Reply, Writes]:
    believed = believe(found, known, create, now_ms)
    decision = intent.apply(believed.circuit, now_ms)
    reply = Reply(decision.accepted, decision.circuit, now_ms, believed.event)
    return reply, writes(decision.circuit, found)
