"""The difference of the clocks is learned from every answer, and never overestimated."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given

from pybreaker_redis._clock import Offset


def test_slow_first_contact_is_corrected_by_a_fast_answer():
    """Connecting may take its time; that must not hold the gate shut for as long."""
    offset = Offset()
    assert (offset.known, offset.ms) == (False, 0)
    offset.learn(5_000, before_ms=500, after_ms=1_000, waiting=True)
    assert (offset.known, offset.ms) == (True, 4_000)
    offset.learn(6_000, before_ms=1_499.8, after_ms=1_500.2, waiting=True)
    assert offset.ms == 4_499.8


def test_moved_clock_is_not_learned():
    """A test or an administrator who moves the local clock wants the timeout to be seen to pass."""
    offset = Offset()
    offset.learn(5_000, before_ms=1_000, after_ms=1_001, waiting=True)
    offset.learn(5_100, before_ms=61_100, after_ms=61_101, waiting=True)
    assert offset.ms == 3_999
    offset.learn(5_200, before_ms=61_200, after_ms=61_201, waiting=False)
    assert offset.ms == -56_001, "nobody waits for anything any more"
    offset.forget()
    assert not offset.known


def test_clock_that_was_set_back_is_learned():
    """Else all circuits that are open just then would stay open for as long as that, in this process."""
    offset = Offset()
    offset.learn(5_000_000, before_ms=4_000_000, after_ms=4_000_001, waiting=True)
    offset.learn(5_000_100, before_ms=400_100, after_ms=400_101, waiting=True)
    assert offset.ms == 4_599_999
    offset.learn(5_000_200, before_ms=4_000_200, after_ms=4_000_201, waiting=True)
    assert offset.ms == 4_599_999, "and not again until it is"


def test_answer_that_took_long_sets_no_clock_back():
    """Of two threads one may have asked long before the other, and be answered later."""
    offset = Offset()
    offset.learn(5_000, before_ms=1_000, after_ms=1_001, waiting=True)
    offset.learn(5_100, before_ms=61_100, after_ms=61_101, waiting=True)
    offset.learn(5_090, before_ms=58_000, after_ms=61_102, waiting=True)
    assert offset.ms == 3_999


def test_small_contradictions_change_nothing():
    """What was said to the millisecond is not forgotten for a few."""
    offset = Offset()
    offset.set(4_000)
    offset.learn(6_000, before_ms=1_990, after_ms=1_995, waiting=False)
    assert offset.ms == 4_000
    offset.learn(6_000, before_ms=1_700, after_ms=1_701, waiting=False)
    assert offset.ms == 4_299


def test_what_is_set_holds():
    """What this process did by both clocks is better known than any answer tells."""
    offset = Offset()
    offset.learn(5_000, before_ms=1_000, after_ms=1_001, waiting=True)
    offset.set(123)
    offset.learn(6_000, before_ms=2_000, after_ms=2_001, waiting=True)
    assert offset.ms == 123


@given(
    true=st.integers(-(10**8), 10**8),
    answers=st.lists(st.tuples(st.floats(0, 10**6), st.floats(0, 500), st.floats(0, 500)), min_size=1),
)
def test_offset_is_never_overestimated_and_never_worse_than_the_best_answer(true, answers):
    """Whatever the delays on the way there and back."""
    offset, best = Offset(), 10.0**9
    for asked, there, back in answers:
        offset.learn(math.floor(asked + there + true), asked, asked + there + back, waiting=True)
        best = min(best, back)
        assert true - best - 1.01 <= offset.ms <= true + 0.01
