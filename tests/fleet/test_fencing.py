"""Late results and wrong clocks: a result of an earlier generation has no effect, and no process's clock counts.

Each test also runs with the stock storage, which must break the promise, to prove that the test can fail.
"""

from __future__ import annotations

import time

import pytest

from tests.support.fleet import (
    Fleet,
    Outcome,
    WorkerHandle,
    call,
    call_when_admitted,
    calls,
    held_call,
    held_call_when_admitted,
    operator,
    read_state,
    trip,
    wait_until,
)

#: Seconds by which a probe may be early: the two clocks of one host are compared through one round trip.
EARLY = 0.02

#: Seconds by which a waiting call may be late on a busy machine.
LATE = 0.8

HOUR = 3600.0


def two_probes(fleet: Fleet) -> tuple[WorkerHandle, WorkerHandle]:
    """Return a prober that outlived its lease and its successor, both still in the dependency."""
    late, successor = fleet[0], fleet[1]
    tripped = trip(late)
    fleet.run(read_state)
    wait_until(tripped.ended + fleet[0].spec.reset_timeout + 0.05)
    late.begin(held_call)
    late.wait_for("reached")
    successor.begin(held_call_when_admitted, 5.0)
    successor.wait_for("reached")
    return late, successor


def straggler_across_a_recovery(fleet: Fleet) -> WorkerHandle:
    """Return a worker with a call from before a recovery, still in flight after it and after 4 new failures."""
    straggler, application = fleet[0], fleet[1]
    straggler.begin(held_call)
    straggler.wait_for("reached")
    trip(application)
    assert application.run(call_when_admitted, 5.0).reached
    application.run(calls, 4, fail=True)
    return straggler


def open_time(tripped: Outcome, admitted: Outcome) -> tuple[float, float]:
    """Return the shortest and the longest time in seconds for which the circuit can have been open."""
    if not admitted.reached:
        return float("inf"), float("inf")
    return admitted.began - tripped.ended, admitted.ended - tripped.began


def test_late_success_of_a_probe_does_not_close_the_circuit(promised, fleet_of, shared):
    """A prober that outlived its lease succeeds after its successor failed: the circuit stays open."""
    with fleet_of(3, reset_timeout=1.0, probe_lease=0.5) as fleet:
        late, successor = two_probes(fleet)
        (failed,) = fleet.release([successor], success=False)
        assert shared.state == "open"
        fleet.release([late], success=True)
        state = shared.state
        next_call = fleet[2].run(call)
    with promised():
        assert state == "open"
        assert next_call.rejected or next_call.ended > failed.began + 1.0


def test_late_failure_of_a_probe_does_not_open_the_circuit(promised, fleet_of, shared):
    """A prober that outlived its lease fails after its successor succeeded: the circuit stays closed."""
    with fleet_of(3, reset_timeout=1.0, probe_lease=0.5) as fleet:
        late, successor = two_probes(fleet)
        fleet.release([successor], success=True)
        assert shared.state == "closed"
        (outcome,) = fleet.release([late], success=False)
        state, failures = shared.state, shared.failures
        next_call = fleet[2].run(call)
    with promised():
        assert state == "closed"
        assert failures == 0
        assert next_call.reached
        assert outcome.error == "DependencyDown"


def test_late_success_resets_no_failures(promised, fleet_of, shared):
    """A success that was admitted before the outage resets no failure that was counted after it."""
    with fleet_of(2, reset_timeout=1.0) as fleet:
        straggler = straggler_across_a_recovery(fleet)
        assert shared.failures == 4
        (outcome,) = fleet.release([straggler], success=True)
        failures = shared.failures
        fifth = fleet[1].run(call, fail=True)
    assert not outcome.error
    with promised():
        assert failures == 4
        assert fifth.tripped


def test_late_failure_is_not_counted(promised, fleet_of, shared):
    """A failure from before the outage is not counted after it, and its caller gets the dependency's error."""
    with fleet_of(2, reset_timeout=1.0) as fleet:
        straggler = straggler_across_a_recovery(fleet)
        (outcome,) = fleet.release([straggler], success=False)
        state, failures = shared.state, shared.failures
    with promised():
        assert state == "closed"
        assert failures == 4
        assert outcome.error == "DependencyDown"


@pytest.mark.slow
def test_stragglers_one_second_apart_do_not_stretch_reset_timeout(promised, fleet_of, shared):
    """Five calls that fail one by one after the trip neither prolong the reset timeout nor open the circuit again."""
    with fleet_of(7, reset_timeout=2.0) as fleet:
        stragglers, tripper, gate = fleet.workers[:5], fleet[5], fleet[6]
        inside, _ = fleet.hold(only=stragglers)
        assert inside == stragglers
        tripped = trip(tripper)
        gate.begin(call_when_admitted, 9.0)
        outcomes = []
        for seconds, straggler in enumerate(stragglers, start=1):
            wait_until(tripped.ended + seconds)
            outcomes += fleet.release([straggler], success=False)
        admitted = gate.result()
        state = shared.state
    least, most = open_time(tripped, admitted)
    print(f"reset_timeout 2 s, stretched to {least:.2f} s")
    with promised():
        assert 2.0 - EARLY <= most
        assert least <= 2.0 + LATE
        assert state == "closed"
        assert {outcome.error for outcome in outcomes} == {"DependencyDown"}


@pytest.mark.parametrize(
    ("tripper_skew", "observer_skew"),
    [(HOUR, 0.0), (-HOUR, 0.0), (0.0, HOUR), (0.0, -HOUR), (HOUR, -HOUR), (-HOUR, HOUR)],
)
def test_clocks_an_hour_off_wait_exactly_reset_timeout(promised, fleet_of, tripper_skew, observer_skew):
    """The circuit is open for ``reset_timeout``, whatever the clocks of the tripping and the probing process show."""
    with fleet_of(2, reset_timeout=1.0, clock_skew=[tripper_skew, observer_skew]) as fleet:
        tripper, observer = fleet
        tripped = trip(tripper)
        admitted = observer.run(call_when_admitted, 2.5)
    least, most = open_time(tripped, admitted)
    with promised():
        assert 1.0 - EARLY <= most
        assert least <= 1.0 + LATE


def test_trip_after_a_fast_clocks_trip_waits_exactly_reset_timeout(promised, fleet_of):
    """A host with a clock an hour ahead does not keep the circuit open for longer once another host has tripped it."""
    with fleet_of(2, reset_timeout=1.0, clock_skew=[HOUR, 0.0]) as fleet:
        fast, correct = fleet
        trip(fast)
        correct.run(operator, "close")
        tripped = trip(correct)
        admitted = correct.run(call_when_admitted, 2.5)
    least, most = open_time(tripped, admitted)
    with promised():
        assert 1.0 - EARLY <= most
        assert least <= 1.0 + LATE


@pytest.mark.parametrize(
    ("make", "phase"), [("ours", 0.1), ("ours", 0.35), ("ours", 0.6), ("ours", 0.85), ("stock", 0.6)]
)
def test_reset_timeout_of_half_a_second_is_half_a_second(promised, fleet_of, phase):
    """The circuit is open for 0.5 s at whatever fraction of a second it trips."""
    with fleet_of(2, reset_timeout=0.5) as fleet:
        tripper, observer = fleet
        tripper.run(calls, 4, fail=True)
        observer.run(read_state)
        time.sleep((phase - time.time()) % 1.0)
        tripped = tripper.run(call, fail=True)
        assert tripped.tripped
        admitted = observer.run(call_when_admitted, 2.0, every=0.005)
    least, most = open_time(tripped, admitted)
    print(f"reset_timeout 0.5 s was {least:.3f} to {most:.3f} s")
    with promised():
        assert 0.5 - EARLY <= most
        # In whole seconds the first two phases would take longer.
        assert least <= 1.0
