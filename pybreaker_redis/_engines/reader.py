"""Reads of the records of one or many circuits, and decisions in Python.

`transaction.py` uses these functions under WATCH.  `read_circuits` reads many circuits in one round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pybreaker_redis._model.answers import checked_sequence, checked_strings, server_time_ms
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.codec import (
    HASH_FIELDS,
    VALUE_NAMES,
    WRONG_TYPE_VALUE,
    RecordChanges,
    StoredRecord,
    changes_for,
    parse_record,
)
from pybreaker_redis._model.intents import Intent, Load, Reply
from pybreaker_redis._model.repair import resolve_record
from pybreaker_redis._redis.classify import is_instance_of_named
from pybreaker_redis._redis.legacy import client_without_decoding

#: Number of commands that read one circuit.
READ_COMMAND_COUNT = 4


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Request to read one circuit together with others.

    Attributes:
        client: Client of the circuit's server.
        keys: Keys of the circuit, in the order of the scripts.
        known: Circuit as this process last read it (``None``: never).
        state_if_missing: Initial state of a circuit that exists neither in Redis nor in `known`.
    """

    client: Any
    keys: tuple[str, ...]
    known: Circuit | None
    state_if_missing: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Result of reading one circuit together with others.

    Attributes:
        reply: The circuit (``None`` if it could not be read).
        is_intact: Whether the record holds exactly this circuit, so that no repair has to write.
        error: Error of this circuit (``None`` if the circuit was read).
    """

    reply: Reply | None = None
    is_intact: bool = False
    error: Exception | None = None


def read_circuits(requests: Sequence[ReadRequest]) -> list[ReadResult]:
    """Read circuits of one server in one round trip, without writes.

    Args:
        requests: One request for each circuit, at least one, all with clients of the same server.

    Returns:
        One result for each request.  The error of one circuit does not affect the others.

    Raises:
        redis.RedisError: No reply at all, or the class of that name of the client's library.
        OSError: No connection.
        UnusableReplyError: A reply that no pipeline returns.
    """
    with client_without_decoding(requests[0].client).pipeline(transaction=False) as pipe:
        # TIME comes first: the circuits are read at that time or later.
        _queue(pipe, _CLOCK)
        for request in requests:
            _queue(pipe, *read_commands(request.keys))
        each = READ_COMMAND_COUNT - 1
        clock, *answers = checked_sequence("a pipeline", pipe.execute(raise_on_error=False), 1 + each * len(requests))
    return [
        _read_result([*answers[each * index : each * (index + 1)], clock], request)
        for index, request in enumerate(requests)
    ]


def _read_result(answers: list[Any], request: ReadRequest) -> ReadResult:
    try:
        reply, changes = decide(Load(), *parse_read_answers(answers), request.known, request.state_if_missing)
    except Exception as error:  # noqa: BLE001
        return ReadResult(error=error)
    return ReadResult(reply, is_intact=not (changes or reply.repair_note))


_CLOCK = ("TIME",)


def read_commands(keys: tuple[str, ...]) -> tuple[tuple[Any, ...], ...]:
    """Return the commands that read the values of one circuit."""
    return ("MGET", *keys[:4]), ("EXISTS", keys[3]), ("HMGET", keys[4], *HASH_FIELDS)


def queue_reads(pipe: Any, keys: tuple[str, ...]) -> list[Any]:
    """Queue the reads of one circuit and of the server's time.

    A pipeline under WATCH executes the commands at once.
    """
    return _queue(pipe, *read_commands(keys), _CLOCK)


def _queue(pipe: Any, *commands: tuple[Any, ...]) -> list[Any]:
    answers = []
    for command in commands:
        try:
            # Any bytes may be stored there, and a client that decodes replies would fail on some of them.
            options = {"NEVER_DECODE": True} if command[0] in ("MGET", "HMGET") else {}
            answers.append(pipe.execute_command(*command, **options))
        except Exception as error:
            if not is_instance_of_named(error, "ResponseError"):
                raise
            answers.append(error)
    return answers


def parse_read_answers(answers: Sequence[Any]) -> tuple[StoredRecord, int]:
    """Return the record of the replies to `queue_reads`, and the server's time, milliseconds since the epoch.

    Args:
        answers: One reply, or one error reply, for each command.

    Raises:
        redis.ResponseError: Error reply that is no damage of the record.
        UnusableReplyError: A reply that no server returns.
    """
    values, opened_at_exists, hash_fields, clock = answers
    for answer in (values, opened_at_exists, clock):
        if isinstance(answer, Exception):
            raise answer
    plain = checked_strings("MGET", values, len(VALUE_NAMES) - 1)
    if plain[3] is None and opened_at_exists:
        plain = [*plain[:3], WRONG_TYPE_VALUE]
    has_wrong_type = isinstance(hash_fields, Exception) and str(hash_fields).startswith("WRONGTYPE")
    if isinstance(hash_fields, Exception) and not has_wrong_type:
        raise hash_fields
    fields = (None,) * len(HASH_FIELDS) if has_wrong_type else checked_strings("HMGET", hash_fields, len(HASH_FIELDS))
    return parse_record(plain, fields, is_hash=not has_wrong_type), server_time_ms(clock)


def decide(
    intent: Intent, found: StoredRecord, now_ms: int, known: Circuit | None, state_if_missing: str
) -> tuple[Reply, RecordChanges]:
    """Decide an intent on a record.

    Args:
        intent: The intent.
        found: Record as it was read.
        now_ms: Time of the read by the server's clock, milliseconds since the epoch.
        known: Circuit as this process last read it (``None``: never).
        state_if_missing: Initial state of a circuit that exists neither in Redis nor in `known`.

    Returns:
        The reply, and the writes that make the record hold the circuit of the reply.
    """
    resolved = resolve_record(found, known, state_if_missing, now_ms)
    decision = intent.apply(resolved.circuit, now_ms)
    reply = Reply(decision.accepted, decision.circuit, now_ms, resolved.repair_note)
    return reply, changes_for(decision.circuit, found)
