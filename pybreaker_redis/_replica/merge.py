"""Order of two records of one circuit that arrive as answers on different connections."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum, auto
from operator import attrgetter

from pybreaker_redis._model.circuit import Circuit

#: Values of a circuit without its counters.  Each failed call compares them, and a getter in C is the fastest way.
_but_counters = attrgetter(*(field.name for field in fields(Circuit) if not field.name.endswith("_counter")))


class Merge(Enum):
    """Relation of a record to the cached record."""

    #: The record is older, or not later for sure.  It is dropped.
    OLDER = auto()
    #: The record was read at the same instant and differs in its counters at most.
    SAME = auto()
    #: The record was read at the same instant and differs.
    CONFLICT = auto()
    #: The record is later.
    NEWER = auto()


def merge(cached: Circuit, cached_ms: float, circuit: Circuit, now_ms: float, *, is_sent_later: bool) -> Merge:
    """Compare a record with the cached record.

    A higher generation is later, and within a generation a later time of the server.

    Args:
        cached: The cached record.
        cached_ms: Time of the server in the answer that held the cached record, milliseconds.
        circuit: The other record.
        now_ms: Time of the server in its answer, milliseconds.
        is_sent_later: Whether the query was sent after the cached record had arrived.
    """
    before, after = (cached.generation, cached_ms), (circuit.generation, now_ms)
    if after < before:
        return Merge.OLDER
    if after > before:
        return Merge.NEWER
    if not is_sent_later and (circuit.noisy_until_ms, circuit.fail_counter) < (
        cached.noisy_until_ms,
        cached.fail_counter,
    ):
        # The answers to a poll and to a failure within one millisecond arrive in the wrong order.  Without the failure,
        # the next one would be taken for it in an outage.
        return Merge.OLDER
    return Merge.SAME if is_same_but_counters(circuit, cached) else Merge.CONFLICT


def is_same_but_counters(one: Circuit, other: Circuit) -> bool:
    """Return whether two circuits are equal except for their counters."""
    return _but_counters(one) == _but_counters(other)
