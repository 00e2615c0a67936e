"""The difference between the local and the server's clock: measured with every answer, never overestimated."""

from __future__ import annotations

import math
from datetime import timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pybreaker_redis._replica.clock_offset import ClockOffset
from pybreaker_redis._runtime.clock import Instant, utc_from_ms, wall_clock_ms


def note_answer(offset, server_ms, before_ms, after_ms, *, is_waiting, local_moved_ms=0):
    """Note an answer between two local times.

    Args:
        offset: Offset under test.
        server_ms: Time of the server in the answer, ms.
        before_ms: Local time before the request, ms.
        after_ms: Local time after the answer, ms.
        is_waiting: Whether a caller waits for a time to pass.
        local_moved_ms: Step of the local clock since the server's clock was last set, ms.
    """
    before, after = (Instant(wall_ms, wall_ms - local_moved_ms) for wall_ms in (before_ms, after_ms))
    offset.note_answer_time(server_ms, before, after, is_waiting=is_waiting)


def test_slow_first_contact_is_corrected_by_a_fast_answer():
    """A slow first connect must not delay the probe for as long."""
    offset = ClockOffset()
    assert (offset.is_confirmed, offset.ms) == (False, 0)
    note_answer(offset, 5_000, before_ms=500, after_ms=1_000, is_waiting=True)
    assert (offset.is_confirmed, offset.ms) == (True, 4_000)
    note_answer(offset, 6_000, before_ms=1_499.8, after_ms=1_500.2, is_waiting=True)
    assert offset.ms == 4_499.8


def test_move_of_the_local_clock_changes_no_offset_while_a_caller_waits():
    """A test or an administrator that moves the local clock expects the reset timeout to pass."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    note_answer(offset, 5_100, before_ms=61_100, after_ms=61_101, is_waiting=True, local_moved_ms=60_000)
    assert offset.ms == 3_999
    note_answer(offset, 5_200, before_ms=61_200, after_ms=61_201, is_waiting=False, local_moved_ms=60_000)
    assert offset.ms == -56_001, "no caller waits for a time to pass any more"
    offset.mark_unconfirmed()
    assert not offset.is_confirmed


def test_step_back_of_the_local_clock_changes_the_offset():
    """Otherwise, every circuit that is open at that moment would stay open for that long in this process."""
    offset = ClockOffset()
    note_answer(offset, 5_000_000, before_ms=4_000_000, after_ms=4_000_001, is_waiting=True)
    note_answer(offset, 5_000_100, before_ms=400_100, after_ms=400_101, is_waiting=True, local_moved_ms=-3_600_000)
    assert offset.ms == 4_599_999
    note_answer(offset, 5_000_200, before_ms=4_000_200, after_ms=4_000_201, is_waiting=True)
    assert offset.ms == 4_599_999, "the next step is measured only when no caller waits"


def test_slow_answer_changes_no_offset():
    """Of two threads, one may have sent its request long before the other, and get its answer later."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    note_answer(offset, 5_100, before_ms=61_100, after_ms=61_101, is_waiting=True, local_moved_ms=60_000)
    note_answer(offset, 5_090, before_ms=58_000, after_ms=61_102, is_waiting=True, local_moved_ms=60_000)
    assert offset.ms == 3_999


@pytest.mark.parametrize("step_ms", [20_000, -20_000, 150, -150])
@pytest.mark.parametrize("local_moved_ms", [0, 3_600_000])
def test_step_of_the_server_changes_the_offset_while_a_caller_waits(step_ms, local_moved_ms):
    """Otherwise, a probe would be admitted too early or too late, wherever a test has moved the local clock before."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    wall_clock_ms = 2_000 + local_moved_ms
    note_answer(
        offset, 6_000 + step_ms, wall_clock_ms, wall_clock_ms + 1, is_waiting=True, local_moved_ms=local_moved_ms
    )
    assert offset.ms == 3_999 + step_ms - local_moved_ms
    assert offset.step_count == 1
    assert offset.monotonic_ms == 3_999 + step_ms


def test_small_step_is_no_step():
    """Clocks are slewed all the time."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    note_answer(offset, 6_100, before_ms=2_000, after_ms=2_001, is_waiting=True)
    assert (offset.ms, offset.step_count) == (3_999, 0)


def test_host_that_was_suspended_sees_no_step():
    """The monotonic clock stood still during the suspension, and the wall clock is right again."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    note_answer(offset, 3_605_100, before_ms=3_601_100, after_ms=3_601_101, is_waiting=True, local_moved_ms=3_600_000)
    assert (offset.ms, offset.step_count) == (3_999, 0)
    note_answer(offset, 3_605_200, before_ms=3_661_200, after_ms=3_661_201, is_waiting=True, local_moved_ms=3_660_000)
    assert (offset.ms, offset.step_count) == (3_999, 0), "the loss of the monotonic clock is known"


def test_another_server_is_a_step_only_if_its_clock_differs():
    """After an error, another server may answer. Times in its record are from the clock of the first one."""
    for step_ms, step_count in ((60_000, 1), (50, 0)):
        offset = ClockOffset()
        note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
        offset.mark_unconfirmed()
        note_answer(offset, 6_000 + step_ms, before_ms=2_000, after_ms=2_001, is_waiting=True)
        assert (offset.is_confirmed, offset.ms, offset.step_count) == (True, 3_999 + step_ms, step_count)


def test_small_contradictions_change_nothing():
    """An offset known to the millisecond is not replaced for a few milliseconds."""
    offset = ClockOffset()
    offset.pin(4_000)
    note_answer(offset, 6_000, before_ms=1_990, after_ms=1_995, is_waiting=False)
    assert offset.ms == 4_000
    note_answer(offset, 6_000, before_ms=1_700, after_ms=1_701, is_waiting=False)
    assert offset.ms == 4_299


def test_pinned_offset_holds():
    """A pinned offset is more exact than any answer."""
    offset = ClockOffset()
    note_answer(offset, 5_000, before_ms=1_000, after_ms=1_001, is_waiting=True)
    offset.pin(123)
    note_answer(offset, 6_000, before_ms=2_000, after_ms=2_001, is_waiting=True)
    assert offset.ms == 123


@given(
    true=st.integers(-(10**8), 10**8),
    answers=st.lists(st.tuples(st.floats(0, 10**6), st.floats(0, 500), st.floats(0, 500)), min_size=1),
)
def test_offset_is_never_overestimated_and_never_worse_than_the_best_answer(true, answers):
    """The bounds hold for any delay of the request and of the answer."""
    offset, best = ClockOffset(), 10.0**9
    for asked, there, back in answers:
        note_answer(offset, math.floor(asked + there + true), asked, asked + there + back, is_waiting=True)
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
    """A step larger than any delay shows in the first answer after the step."""
    offset, step_count = ClockOffset(), 0
    for number, (asked, there, back, step) in enumerate(answers):
        true += step
        step_count += number > 0 and step != 0
        note_answer(offset, math.floor(asked + there + true), asked, asked + there + back, is_waiting=True)
        assert offset.ms <= true + 0.01
        assert offset.monotonic_ms <= true + 0.01
        assert offset.step_count == step_count


@pytest.mark.parametrize("at_ms", [10.0**15, 10.0**30, -(10.0**15), -(10.0**30), 0.0])
def test_time_beyond_all_calendars_can_be_compared_and_added_to(at_ms):
    """Whatever time a record or a push contains, pybreaker adds the reset timeout and compares."""
    until = utc_from_ms(at_ms) + timedelta(days=365_000)
    assert (until > utc_from_ms(wall_clock_ms())) == (at_ms > -(10**15))
