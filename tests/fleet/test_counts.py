"""Counts of a fleet: each failure once, each success once, one trip, whatever other processes read.

Each test also runs with the stock storage, which must break the promise, to prove that the test can fail.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.support import fleet as fleets
from tests.support.fleet import (
    Fleet,
    call,
    calls,
    monitor,
    operator,
    read_state,
    trip,
    uncounted_failures,
    wait_until,
)


def recover(fleet: Fleet) -> None:
    """Trip the circuit, let every worker notice that, and recover by a probe of the first worker."""
    tripped = trip(fleet[0])
    fleet.run(read_state)
    wait_until(tripped.ended + fleet[0].spec.reset_timeout + 0.05)
    while fleet[0].run(call).rejected:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["ours"])
def test_32_processes_with_1000_failures_each_count_32000(fleet_of, shared):
    """Each failure counts once in the fleet, however many processes report at the same time."""
    with fleet_of(32, fail_max=10**6) as fleet:
        failures = fleet.run(uncounted_failures, 1000, within=100)
    assert failures == [1000] * 32
    assert shared.failures == 32_000
    assert shared.state == "closed"


@pytest.mark.parametrize("workers", [pytest.param(16, marks=pytest.mark.sample), 32])
def test_simultaneous_failures_make_one_trip(make, promised, fleet_of, shared, workers):
    """One outage is one transition: of the calls that fail together, one opens the circuit."""
    with fleet_of(workers) as fleet:
        inside, outcomes = fleet.hold()
        assert len(inside) == workers
        assert not outcomes
        before = shared.generation
        outcomes = fleet.release(inside, success=False)
        steps = shared.generation - before
        fleet.run(read_state)
        notified = Counter(item.worker for item in fleet.transitions())
    assert shared.state == "open"
    assert notified == dict.fromkeys(range(workers), 1)
    # Stock keeps no generation, but with stock each call that announces a trip in its error has written one.
    trips = steps if make == "ours" else sum(outcome.tripped for outcome in outcomes)
    with promised():
        assert trips == 1
        assert 5 <= shared.failures <= workers


@pytest.mark.parametrize(("make", "workers"), [("ours", 1), ("ours", 8), ("ours", 32), ("stock", 8), ("stock", 32)])
def test_recovery_with_threshold_3_closes_on_third_success(promised, fleet_of, shared, workers):
    """The successes that close a circuit are counted in the fleet, and a process that notices the probe resets none."""
    successes = 0
    with fleet_of(workers, reset_timeout=1.0, success_threshold=3) as fleet:
        tripped = trip(fleet[0])
        fleet.run(read_state)
        wait_until(tripped.ended + 1.05)
        for turn in range(5 * workers + 5):
            successes += fleet[turn % workers].run(call).reached
            if shared.state == "closed":
                break
        else:
            pytest.fail(f"still {shared.state} after {successes} successes")
    with promised():
        assert successes == 3


def test_successor_of_dead_prober_adds_to_its_successes(promised, fleet_of, shared):
    """Two successes of a prober that dies count, so one more of its successor closes the circuit."""
    with fleet_of(2, reset_timeout=1.0, success_threshold=3, probe_lease=1.0) as fleet:
        prober, successor = fleet
        tripped = trip(prober)
        successor.run(read_state)
        wait_until(tripped.ended + 1.05)
        assert [outcome.reached for outcome in prober.run(calls, 2)] == [True, True]
        prober.kill()
        successes = 2
        while shared.state != "closed" and successes < 10:
            outcome = successor.run(fleets.call_when_admitted, 5.0)
            assert outcome.reached
            successes += 1
    with promised():
        assert successes == 3


@pytest.mark.parametrize(("make", "workers"), [("ours", 1), ("ours", 8), ("ours", 32), ("stock", 8), ("stock", 32)])
def test_failures_after_recovery_trip_on_fifth(promised, fleet_of, shared, workers):
    """A process that notices the recovery late does not reset the failures that others have counted since."""
    failures = 0
    with fleet_of(workers, reset_timeout=1.0) as fleet:
        recover(fleet)
        assert shared.state == "closed"
        for turn in range(5 * workers + 5):
            failures += fleet[turn % workers].run(call, fail=True).reached
            if shared.state == "open":
                break
        else:
            pytest.fail(f"still {shared.state} after {failures} failures")
    with promised():
        assert failures == 5


def test_monitor_that_notices_recovery_leaves_counter_alone(promised, fleet_of, shared):
    """A health endpoint may read ``breaker.state`` at any time without an effect on the circuit."""
    with fleet_of(2, reset_timeout=1.0) as fleet:
        application, endpoint = fleet
        recover(fleet)
        application.run(calls, 4, fail=True)
        assert shared.failures == 4
        assert endpoint.run(read_state, 100) == "closed"
        failures = shared.failures
        fifth = application.run(call, fail=True)
    with promised():
        assert failures == 4
        assert fifth.tripped


@pytest.mark.parametrize("make", ["ours"])
def test_monitors_hammering_reads_disturb_no_count(fleet_of, shared):
    """Reads disturb no count: each cycle trips on the fifth failure and closes on the third success."""
    with fleet_of(5, reset_timeout=0.3, success_threshold=3) as fleet:
        application, monitors = fleet[0], fleet.workers[1:]
        fleet.begin(monitor, time.monotonic() + 5.0, only=monitors)
        for _ in range(4):
            assert not any(outcome.tripped for outcome in application.run(calls, 4, fail=True))
            assert shared.failures == 4
            assert application.run(call, fail=True).tripped
            first = application.run(fleets.call_when_admitted, 3.0)
            assert first.reached
            assert shared.successes == 1
            assert [outcome.reached for outcome in application.run(calls, 2)] == [True, True]
            assert shared.state == "closed"
        rounds = [worker.result() for worker in monitors]
        assert all(count > 20 for count in rounds), rounds
    # The trip, a claim for each of three probes, and the close.
    assert shared.generation == 4 * 5


@pytest.mark.parametrize("make", ["ours"])
def test_transitions_by_operators_are_one_generation_each(fleet_of, shared):
    """An operator's ``open()``, ``half_open()`` and ``close()`` are one transition each, noticed everywhere."""
    with fleet_of(4) as fleet:
        for number, (verb, seen) in enumerate([("open", "open"), ("close", "closed"), ("open", "open")], start=1):
            fleet[number].run(operator, verb)
            assert fleet.run(read_state) == [seen] * 4
            assert shared.generation == number
