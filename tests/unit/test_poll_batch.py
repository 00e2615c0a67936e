"""Batch of one poll: commands for quiet circuits, for others, and for those that share no command."""

from __future__ import annotations

from typing import Any

import pytest

from pybreaker_redis._replica.subscribers import PollBatch, Subscriber
from pybreaker_redis._replica.view import View


def subscriber(name: str) -> Subscriber:
    """Return a subscriber with short keys."""
    return Subscriber(View(1.0), tuple(f"{name}:{key}" for key in ("state", "fail", "success", "opened", "hash")), name)


Q1, Q2, O1, O2, S1 = map(subscriber, ("q1", "q2", "o1", "o2", "s1"))

#: Reads of these five circuits.
READS = [
    (b"0", [b"closed", None], "hash q1"),
    (b"0", [b"closed", b"7"], "hash q2"),
    (b"1", [b"closed", None], "hash o1"),
    (b"2", [b"open", b"8"], "hash o2"),
    (b"3", [b"open", b"9"], "hash s1"),
]


def answer_to(command: tuple[Any, ...]) -> Any:
    """Answer as a server does."""
    values = {
        "q1:fail": b"0",
        "q1:state": b"closed",
        "q2:fail": b"0",
        "q2:state": b"closed",
        "q2:opened": b"7",
        "o1:fail": b"1",
        "o1:state": b"closed",
        "o2:fail": b"2",
        "o2:state": b"open",
        "o2:opened": b"8",
        "s1:fail": b"3",
        "s1:state": b"open",
        "s1:opened": b"9",
    }
    if command[0] == "MGET":
        return [values.get(key) for key in command[1:]]
    return f"hash {command[1].partition(':')[0]}" if command[0] == "HMGET" else command[0]


@pytest.mark.parametrize("is_tracking", [False, True])
@pytest.mark.parametrize("quiet", [[], [Q1], [Q1, Q2]], ids=len)
@pytest.mark.parametrize("others", [[], [O1, O2]], ids=len)
@pytest.mark.parametrize("single", [[], [S1]], ids=len)
def test_each_circuit_gets_its_own_values(
    quiet: list[Subscriber], others: list[Subscriber], single: list[Subscriber], is_tracking: bool
) -> None:
    """Whatever the circuits share, the answers are sorted by circuit."""
    batch = PollBatch(quiet, others, single, is_tracking=is_tracking)
    assert batch.commands[0] == ("TIME",)
    reads = batch.reads(list(map(answer_to, batch.commands)))
    expected = dict(zip((Q1, Q2, O1, O2, S1), READS, strict=True))
    assert reads == [expected[item] for item in batch.subscribers]
    assert batch.common_error(list(map(answer_to, batch.commands))) is None


def test_quiet_circuits_share_one_tracked_command() -> None:
    """Counters above zero are read untracked, right after the command that says so."""
    commands = PollBatch([Q1, Q2], [O1, O2], [S1], is_tracking=True).commands
    assert commands[1:6] == [
        ("MGET", "q1:fail", "q1:state", "q1:opened", "q2:fail", "q2:state", "q2:opened"),
        ("CLIENT", "CACHING", "NO"),
        ("MGET", "o1:fail", "o2:fail"),
        ("CLIENT", "CACHING", "NO"),
        ("MGET", "s1:fail"),
    ]


def test_refusal_stands_in_the_place_of_the_values() -> None:
    """An error concerns the circuits of its command only."""
    batch = PollBatch([Q1, Q2], [O1], [S1], is_tracking=False)
    refusal = ValueError("NOPERM")
    answers = [
        refusal if command[:2] in {("MGET", "q1:fail"), ("MGET", "s1:fail")} else answer_to(command)
        for command in batch.commands
    ]
    assert [read[:2] for read in batch.reads(answers)] == [(refusal, refusal)] * 2 + [READS[2][:2], (refusal, refusal)]
    assert batch.common_error(answers) is refusal
    assert PollBatch([], [], [S1], is_tracking=False).common_error(["TIME", refusal, [None, None], "hash"]) is None
