"""Reads of one or many circuits in one round trip.

Knows: records and transactions.  Does not know: intents other than loads.
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

#: How many commands read one circuit.
READ_COMMAND_COUNT = 4


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What has to be known to look at a circuit.

    Attributes:
        client: Of its server.
        keys: Of the circuit, in the order of the scripts.
        known: The circuit as this process saw it last.
        state_if_missing: The state of a circuit that nobody knows.
    """

    client: Any
    keys: tuple[str, ...]
    known: Circuit | None
    state_if_missing: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a look at one of several circuits has found.

    Attributes:
        reply: The circuit; ``None`` if Redis does not hold it like this, so that something has to be written.
        believed: The circuit, whatever would have to be written; ``None`` if it could not be read.
        error: Why it could not be read.
    """

    reply: Reply | None = None
    believed: Reply | None = None
    error: Exception | None = None


def read_circuits(questions: Sequence[ReadRequest]) -> list[ReadResult]:
    """Look at circuits of one server in one round trip, and change nothing; what is wrong with one concerns no other.

    Raises:
        Exception: No answer at all; whatever the client raises then.
    """
    with client_without_decoding(questions[0].client).pipeline(transaction=False) as pipe:
        # What is read after this is true then or later.
        _queue(pipe, _CLOCK)
        for question in questions:
            _queue(pipe, *read_commands(question.keys))
        each = READ_COMMAND_COUNT - 1
        clock, *answers = checked_sequence("a pipeline", pipe.execute(raise_on_error=False), 1 + each * len(questions))
    return [
        _judge([*answers[each * index : each * (index + 1)], clock], question)
        for index, question in enumerate(questions)
    ]


def _judge(answers: list[Any], question: ReadRequest) -> ReadResult:
    try:
        reply, changes = decide(Load(), *parse_read_answers(answers), question.known, question.state_if_missing)
    except Exception as error:  # noqa: BLE001
        return ReadResult(error=error)
    return ReadResult(None if changes or reply.event else reply, reply)


_CLOCK = ("TIME",)


def read_commands(keys: tuple[str, ...]) -> tuple[tuple[Any, ...], ...]:
    return ("MGET", *keys[:4]), ("EXISTS", keys[3]), ("HMGET", keys[4], *HASH_FIELDS)


def queue_reads(pipe: Any, keys: tuple[str, ...]) -> list[Any]:
    """Queue the reads of one circuit, or run them at once on a pipeline that watches."""
    return _queue(pipe, *read_commands(keys), _CLOCK)


def _queue(pipe: Any, *commands: tuple[Any, ...]) -> list[Any]:
    answers = []
    for command in commands:
        try:
            # Whatever bytes lie there are ours to judge: a client that decodes would fail on some of them.
            options = {"NEVER_DECODE": True} if command[0] in ("MGET", "HMGET") else {}
            answers.append(pipe.execute_command(*command, **options))
        except Exception as error:
            if not is_instance_of_named(error, "ResponseError"):
                raise
            answers.append(error)
    return answers


def parse_read_answers(answers: Sequence[Any]) -> tuple[StoredRecord, int]:
    answered, opened_at_exists, mark, clock = answers
    for answer in (answered, opened_at_exists, clock):
        if isinstance(answer, Exception):
            raise answer
    plain = checked_strings("MGET", answered, len(VALUE_NAMES) - 1)
    if plain[3] is None and opened_at_exists:
        plain = [*plain[:3], WRONG_TYPE_VALUE]
    wrong_type = isinstance(mark, Exception) and str(mark).startswith("WRONGTYPE")
    if isinstance(mark, Exception) and not wrong_type:
        raise mark
    fields = (None,) * len(HASH_FIELDS) if wrong_type else checked_strings("HMGET", mark, len(HASH_FIELDS))
    return parse_record(plain, fields, mark_is_hash=not wrong_type), server_time_ms(clock)


def decide(
    intent: Intent, found: StoredRecord, now_ms: int, known: Circuit | None, state_if_missing: str
) -> tuple[Reply, RecordChanges]:
    believed = resolve_record(found, known, state_if_missing, now_ms)
    decision = intent.apply(believed.circuit, now_ms)
    reply = Reply(decision.accepted, decision.circuit, now_ms, believed.event)
    return reply, changes_for(decision.circuit, found)
