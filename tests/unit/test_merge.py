"""Order of two records of one circuit: a table of all relations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pybreaker_redis._model.circuit import CLOSED, OPEN, Circuit
from pybreaker_redis._replica.merge import Merge, merge

#: Time of the server in the answer with the cached record, milliseconds.
CACHED_MS = 5000

CACHED = Circuit(CLOSED, fail_counter=2, generation=7, noisy_until_ms=6000)


@pytest.mark.parametrize(
    ("changes", "after_ms", "relation"),
    [
        ({"generation": 8, "state": OPEN}, -1000, Merge.NEWER),
        ({"generation": 6}, 1000, Merge.OLDER),
        ({}, 1, Merge.NEWER),
        ({}, -1, Merge.OLDER),
        ({}, 0, Merge.SAME),
        ({"fail_counter": 3}, 0, Merge.SAME),
        ({"fail_counter": 1}, 0, Merge.OLDER),
        ({"noisy_until_ms": 0, "fail_counter": 9}, 0, Merge.OLDER),
        ({"noisy_until_ms": 7000}, 0, Merge.CONFLICT),
        ({"opened_at_ms": 1}, 0, Merge.CONFLICT),
    ],
)
def test_relation_of_a_record_to_the_cached_one(changes: dict[str, object], after_ms: float, relation: Merge) -> None:
    """The generation decides, then the time of the server, then the noise and the failures."""
    circuit = replace(CACHED, **changes)  # type: ignore[arg-type]
    assert merge(CACHED, CACHED_MS, circuit, CACHED_MS + after_ms, is_sent_later=False) is relation


def test_answer_to_a_later_query_is_not_older_though_it_has_fewer_failures() -> None:
    """A success between two queries within one millisecond has reset the failures."""
    circuit = replace(CACHED, fail_counter=0)
    assert merge(CACHED, CACHED_MS, circuit, CACHED_MS, is_sent_later=True) is Merge.SAME
