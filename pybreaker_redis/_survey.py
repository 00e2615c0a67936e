"""What is true of many circuits, in as few round trips as can be?

Knows: which circuits can be asked for together.  Does not know: who wants to know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pybreaker_redis._carrier import Reply
from pybreaker_redis._clock import moment
from pybreaker_redis._guard import Meaning, is_rejected, meaning_of
from pybreaker_redis._intents import Load
from pybreaker_redis._optimistic import Question, look
from pybreaker_redis._outside import from_outside
from pybreaker_redis._secrets import mask
from pybreaker_redis._shared import SharedCircuit


def survey(circuits: Iterable[SharedCircuit]) -> list[Reply]:
    """Look at circuits, all that live on one server or node at once; nothing is created, repaired or believed.

    Returns:
        For each what is true of it, in the same order, times by the local clock.

    Raises:
        Exception: No usable answer; whatever the client raises then.
    """
    asked = [(circuit, circuit.question) for circuit in circuits]
    together: dict[int, list[tuple[SharedCircuit, Question]]] = {}
    for circuit, question in asked:
        pool = getattr(question.client, "connection_pool", question.client)
        together.setdefault(id(pool), []).append((circuit, question))
    replies: dict[SharedCircuit, Reply] = {}
    for group in together.values():
        replies.update(_look_at(group))
    return [replies[circuit] for circuit, _ in asked]


def _look_at(group: list[tuple[SharedCircuit, Question]]) -> dict[SharedCircuit, Reply]:
    before, handled = moment(), sys.exc_info()[1]
    try:
        replies = look([question for _, question in group])
    except Exception as error:
        mask(error)
        may_move = meaning_of(error) in (Meaning.FAULT, Meaning.MIGRATING) or is_rejected(error)
        if not may_move or from_outside(error, handled):
            raise
        # They lie elsewhere by now, or in a cluster that nobody knew of, or there are other credentials.  Who asks for
        # one circuit finds that out.
        return {circuit: circuit.execute(Load()) for circuit, _ in group}
    after = moment()
    return {circuit: circuit.answered(reply, before, after) for (circuit, _), reply in zip(group, replies, strict=True)}
