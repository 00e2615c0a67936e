"""The difference of the clocks is learned from every answer, and never overestimated."""

from __future__ import annotations

import math
from datetime import timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pybreaker_redis._replica.clock_offset import ClockOffset
from pybreaker_redis._runtime.clock import Instant, utc_from_ms, wall_clock_ms


def learn(offset, server_ms, before_ms, after_ms, *, is_waiting, local_moved_ms=0):
    """An answer between two local times; by so much the local clock was moved since the server's was last set."""
    before, after = (Instant(wall_ms, wall_ms - local_moved_ms) for wall_ms in (before_ms, after_ms))
    offset.note_answer_time(server_ms, before, after, is_waiting=is_waiting)


def test_slow_first_contact_is_corrected_by_a_fast_answer():
    """Connecting may take its time; that must not hold the gate shut for as long."""
    offset = ClockOffset()
    assert (offset.is_confirmed, offset.ms) == (False, 0)
    learn(offset, 5_000, before_ms=500, after_ms=1_000, is_waiting=True)
    assert (offset.is_confirmed, offset.ms) == (True, 4_000)
    learn(offset, 6_000, before_ms=1_499.8, after_ms=1_500.2, is_waiting=True)
    assert offset.ms == 4_499.8


def test_moved_clock_is_not_learned():
    """A test or an administrator who moves the local clock wants the timeout to be seen to pass."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    learn(offset, 5_100, before_ms=61_100, after_ms=61_101, is_waiting=True, local_moved_ms=60_000)
    assert offset.ms == 3_999
    learn(offset, 5_200, before_ms=61_200, after_ms=61_201, is_waiting=False, local_moved_ms=60_000)
    assert offset.ms == -56_001, "nobody waits for anything any more"
    offset.mark_unconfirmed()
    assert not offset.is_confirmed


def test_clock_that_was_set_back_is_learned():
    """Else all circuits that are open just then would stay open for as long as that, in this process."""
    offset = ClockOffset()
    learn(offset, 5_000_000, before_ms=4_000_000, after_ms=4_000_001, is_waiting=True)
    learn(offset, 5_000_100, before_ms=400_100, after_ms=400_101, is_waiting=True, local_moved_ms=-3_600_000)
    assert offset.ms == 4_599_999
    learn(offset, 5_000_200, before_ms=4_000_200, after_ms=4_000_201, is_waiting=True)
    assert offset.ms == 4_599_999, "and not again until it is"


def test_answer_that_took_long_sets_no_clock_back():
    """Of two threads one may have asked long before the other, and be answered later."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    learn(offset, 5_100, before_ms=61_100, after_ms=61_101, is_waiting=True, local_moved_ms=60_000)
    learn(offset, 5_090, before_ms=58_000, after_ms=61_102, is_waiting=True, local_moved_ms=60_000)
    assert offset.ms == 3_999


@pytest.mark.parametrize("step_ms", [20_000, -20_000, 150, -150])
@pytest.mark.parametrize("local_moved_ms", [0, 3_600_000])
def test_step_of_the_server_is_learned_at_once_though_a_caller_waits(step_ms, local_moved_ms):
    """Else the gate would open too early or too late by as much; wherever a test has moved the local clock before."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    wall_clock_ms = 2_000 + local_moved_ms
    learn(offset, 6_000 + step_ms, wall_clock_ms, wall_clock_ms + 1, is_waiting=True, local_moved_ms=local_moved_ms)
    assert offset.ms == 3_999 + step_ms - local_moved_ms
    assert offset.step_count == 1
    assert offset.monotonic_ms == 3_999 + step_ms


def test_step_that_does_not_matter_is_none():
    """Clocks are slewed all the time."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    learn(offset, 6_100, before_ms=2_000, after_ms=2_001, is_waiting=True)
    assert (offset.ms, offset.step_count) == (3_999, 0)


def test_host_that_was_suspended_sees_no_step():
    """Its monotonic clock has stood still, and its wall clock is right again."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    learn(offset, 3_605_100, before_ms=3_601_100, after_ms=3_601_101, is_waiting=True, local_moved_ms=3_600_000)
    assert (offset.ms, offset.step_count) == (3_999, 0)
    learn(offset, 3_605_200, before_ms=3_661_200, after_ms=3_661_201, is_waiting=True, local_moved_ms=3_660_000)
    assert (offset.ms, offset.step_count) == (3_999, 0), "and what the monotonic clock has lost is known"


def test_other_server_with_another_clock_is_a_step_and_one_with_the_same_is_none():
    """After an error another server may answer; times in its record are from the clock of the one before."""
    for step_ms, step_count in ((60_000, 1), (50, 0)):
        offset = ClockOffset()
        learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
        offset.mark_unconfirmed()
        learn(offset, 6_000 + step_ms, before_ms=2_000, after_ms=2_001, is_waiting=True)
        assert (offset.is_confirmed, offset.ms, offset.step_count) == (True, 3_999 + step_ms, step_count)


def test_small_contradictions_change_nothing():
    """What was said to the millisecond is not forgotten for a few."""
    offset = ClockOffset()
    offset.pin(4_000)
    learn(offset, 6_000, before_ms=1_990, after_ms=1_995, is_waiting=False)
    assert offset.ms == 4_000
    learn(offset, 6_000, before_ms=1_700, after_ms=1_701, is_waiting=False)
    assert offset.ms == 4_299


def test_what_is_set_holds():
    """What this process did by both clocks is better known than any answer tells."""
    offset = ClockOffset()
    learn(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    offset.pin(123)
    learn(offset, 6_000, before_ms=2_000, after_ms=2_001, is_waiting=True)
    assert offset.ms == 123


@given(
    true=st.integers(-(10**8), 10**8),
    answers=st.lists(st.tuples(st.floats(0, 10**6), st.floats(0, 500), st.floats(0, 500)), min_size=1),
)
def test_offset_is_never_overestimated_and_never_worse_than_the_best_answer(true, answers):
    """Whatever the delays on the way there and back."""
    offset, best = ClockOffset(), 10.0**9
    for asked, there, back in answers:
        learn(offset, math.floor(asked + there + true), asked, asked + there + back, is_waiting=True)
        best = min(best, back)
        assert true - best - 1.01 <= offset.ms <= true + 0.01


@given(
    true=st.integers(-(10**8), 10**8),
    answers=st.lists(
        st.tuples(
            *(st.floats(0, 10**6), st.floats(0, 500), st.floats(0, 500)),
            st.sampled_from([0, 0, 0, 5_000, -5_000, 60_000, -20_000]),
        ),
        min_size=1,
    ),
)
def test_offset_is_never_overestimated_whatever_steps_the_server_makes(true, answers):
    """A step that is larger than any delay is seen in the first answer after it."""
    offset, step_count = ClockOffset(), 0
    for number, (asked, there, back, step) in enumerate(answers):
        true += step
        step_count += number > 0 and step != 0
        learn(offset, math.floor(asked + there + true), asked, asked + there + back, is_waiting=True)
        assert offset.ms <= true + 0.01
        assert offset.monotonic_ms <= true + 0.01
        assert offset.step_count == step_count


@pytest.mark.parametrize("at_ms", [10.0**15, 10.0**30, -(10.0**15), -(10.0**30), 0.0])
def test_time_beyond_all_calendars_can_be_compared_and_added_to(at_ms):
    """Whatever a record or a push says, pybreaker adds the timeout and compares."""
    until = utc_from_ms(at_ms) + timedelta(days=365_000)
    assert (until > utc_from_ms(wall_clock_ms())) == (at_ms > -(10**15))
