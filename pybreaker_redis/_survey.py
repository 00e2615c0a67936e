"""What is true of many circuits, in as few round trips as can be?

Knows: which circuits can be asked for together.  Does not know: who wants to know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pybreaker_redis._carrier import Reply
from pybreaker_redis._clock import instant
from pybreaker_redis._guard import ErrorKind, error_kind, is_authentication_error
from pybreaker_redis._intents import Load
from pybreaker_redis._optimistic import ReadRequest, read_all_circuits
from pybreaker_redis._outside import find_interruption
from pybreaker_redis._secrets import mask_error
from pybreaker_redis._shared import SharedCircuit


def read_for_operator(circuits: Iterable[SharedCircuit]) -> list[Reply]:
    """Look at circuits, all that live on one server or node at once; nothing is created, repaired or believed.

    Returns:
        For each what is true of it, in the same order, times by the local clock.

    Raises:
        Exception: No usable answer; whatever the client raises then.
    """
    asked = [(circuit, circuit.read_request) for circuit in circuits]
    together: dict[int, list[tuple[SharedCircuit, ReadRequest]]] = {}
    for circuit, question in asked:
        pool = getattr(question.client, "connection_pool", question.client)
        together.setdefault(id(pool), []).append((circuit, question))
    replies: dict[SharedCircuit, Reply] = {}
    for group in together.values():
        replies.update(_look_at(group))
    return [replies[circuit] for circuit, _ in asked]


def _look_at(group: list[tuple[SharedCircuit, ReadRequest]]) -> dict[SharedCircuit, Reply]:
    before, handled = instant(), sys.exc_info()[1]
    try:
        replies = read_all_circuits([question for _, question in group])
    except Exception as error:
        mask_error(error)
        may_move = error_kind(error) in (ErrorKind.UNUSABLE, ErrorKind.MIGRATING) or is_authentication_error(error)
        if not may_move or find_interruption(error, handled):
            raise
        # They lie elsewhere by now, or in a cluster that nobody knew of, or there are other credentials.  Who asks for
        # one circuit finds that out.
        return {circuit: circuit.execute(Load()) for circuit, _ in group}
    after = instant()
    return {
        circuit: circuit.to_local_reply(reply, before, after)
        for (circuit, _), reply in zip(group, replies, strict=True)
    }
