"""Recovery of a fleet: one call at a time probes the dependency, and each process announces a transition once.

Each test also runs with the stock storage, which must break the promise, to prove that the test can fail.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.support import soak as soaks
from tests.support.fleet import call, calls, flood, held_call, most_at_once, read_state, recover, trip, wait_until
from tests.support.ways import is_breaker


@pytest.mark.sample
def test_burst_at_end_of_reset_timeout_executes_one_call(promised, fleet_of):
    """However many processes wait for ``reset_timeout``, one call is admitted and the others fail at once."""
    with fleet_of(32, reset_timeout=1.0) as fleet:
        tripped = trip(fleet[0])
        fleet.run(read_state)
        inside, others = fleet.hold(at=tripped.ended + 1.05)
        half_open = [item for item in fleet.transitions(excluding=inside) if item.new == "half-open"]
        fleet.release(inside, success=True)
        authors = [item.worker for item in fleet.transitions() if item.new == "half-open" and item.noticed is not True]
    with promised():
        assert len(inside) == 1
        assert all(outcome.rejected for outcome in others)
        # A rejected call of our breaker notices that the circuit is half-open.
        assert sorted(item.worker for item in half_open) == (
            sorted(outcome.worker for outcome in others) if is_breaker else []
        )
        assert authors == [inside[0].index]


@pytest.mark.slow
def test_flood_on_dead_dependency_reaches_it_8_times_at_most(make, promised, fleet_of, visits):
    """Of 16 workers that call every 20 ms for 10 s, one probe per ``reset_timeout`` is admitted, never two at once."""
    with fleet_of(16, reset_timeout=1.0) as fleet:
        trip(fleet[0])
        begin = time.monotonic()
        end = begin + (10.0 if make == "ours" else 3.0)  # in this time stock admits 16 calls twice
        made = fleet.run(flood, end, every=0.02, dead=[(begin, end + 60.0)], seconds=0.5, within=30.0)
    reached = visits.since(begin)
    print(f"{sum(made)} calls, {len(reached)} reached the dependency, {most_at_once(reached)} at once")
    with promised():
        assert len(reached) <= 8
        assert len(reached) >= 5
        assert most_at_once(reached) == 1


def test_killed_prober_is_succeeded_within_its_lease_one_at_a_time(promised, fleet_of, visits):
    """After a prober's death no call is admitted until its lease ends, and then one."""
    with fleet_of(8, reset_timeout=1.0, probe_lease=1.0) as fleet:
        prober, others = fleet[0], fleet.workers[1:]
        tripped = trip(prober)
        fleet.run(read_state)
        wait_until(tripped.ended + 1.05)
        # The lease cannot have begun earlier.
        claimed_after = time.monotonic()
        prober.begin(held_call)
        prober.wait_for("reached")
        killed = prober.kill()
        end = killed + 4.0
        fleet.run(flood, end, every=0.02, dead=[(killed, end + 60.0)], seconds=0.3, only=others)
    after = visits.since(killed)
    assert after
    with promised():
        assert claimed_after + 0.98 <= after[0].begin <= killed + 1.0 + 0.8
        assert most_at_once(after) == 1


def test_reset_timeout_0_admits_one_call_at_a_time(promised, fleet_of, visits):
    """Without any reset timeout there is still one probe at a time, and no recursion."""
    with fleet_of(8, reset_timeout=0.0) as fleet:
        trip(fleet[0])
        begin = time.monotonic()
        end = begin + 1.5
        fleet.run(flood, end, every=0.005, dead=[(begin, end + 60.0)], seconds=0.05)
    reached = visits.since(begin)
    assert len(reached) > 3
    with promised():
        assert most_at_once(reached) == 1


def test_one_cycle_announces_half_open_in_the_prober_only(promised, fleet_of):
    """Each process announces each transition at most once, and only the prober announces half-open.

    With our breaker the others announce that they noticed half-open, and each transition has one author.
    """
    with fleet_of(16, reset_timeout=1.0) as fleet:
        prober, others = fleet[0], fleet.workers[1:]
        tripped = trip(prober)
        fleet.run(read_state)
        wait_until(tripped.ended + 1.05)
        prober.begin(held_call)
        prober.wait_for("reached")
        fleet.run(read_state, only=others)
        fleet.release([prober], success=True)
        assert set(fleet.run(read_state)) == {"closed"}
        notified = fleet.transitions()
    print(f"{len(notified)} notifications")
    per_process = Counter((item.worker, item.new) for item in notified)
    per_state = Counter(item.new for item in notified)
    assert per_state["open"] == per_state["closed"] == 16
    with promised():
        assert max(per_process.values()) == 1
        assert per_state["half-open"] == (16 if is_breaker else 1)
        assert len(notified) == (48 if is_breaker else 33)
        authors = {item.new: item.worker for item in notified if item.noticed is not True}
        assert authors["half-open"] == prober.index
        assert not is_breaker or [item.noticed for item in notified].count(False) == len(authors) == 3


def test_error_of_a_listener_does_not_undo_a_trip(promised, fleet_of, shared, visits):
    """The trip is in the record before listeners run, so an error of a listener cannot undo it."""
    with fleet_of(2, listener="raise") as fleet:
        fleet[0].run(calls, 50, fail=True)
        reached = len(visits.read())
        other = fleet[1].run(call)
        state = shared.state
    with promised():
        assert reached == 5
        assert state == "open"
        assert not other.reached


def test_listener_reads_the_state_it_is_notified_of(promised, fleet_of):
    """A listener that reads ``cb.current_state`` gets the state that it was notified of."""
    with fleet_of(1, listener="look", reset_timeout=1.0) as fleet:
        tripped = trip(fleet[0])
        wait_until(tripped.ended + 1.05)
        assert fleet[0].run(call).reached
        notified = fleet.transitions()
    assert [item.new for item in notified] == ["open", "half-open", "closed"]
    with promised():
        assert [item.current for item in notified] == ["open", "half-open", "closed"]


def test_threshold_of_3_takes_3_successes_of_any_threads_one_at_a_time(promised, fleet_of, visits):
    """Of calls on threads of all processes, the third success closes the circuit, without a wait for a lease."""
    with fleet_of(4, reset_timeout=1.0, success_threshold=3, probe_lease=30.0) as fleet:
        tripped = trip(fleet[0])
        fleet.run(read_state)
        gate = tripped.ended + 1.05
        closed = fleet.run(recover, gate, threads=4, seconds=0.05, patience=20.0)
        states = fleet.run(read_state)
    reached = sorted(visits.since(gate), key=lambda visit: visit.begin)
    assert len(reached) >= 3
    with promised():
        assert most_at_once(reached[:3]) == 1
        assert all(visit.begin >= reached[2].end for visit in reached[3:])
        assert set(states) == {"closed"}
        assert max(closed) < gate + 15


@pytest.mark.slow
def test_soak_of_four_outages_spares_dependency_and_listeners(server, tmp_path, report):
    """In each of four outages the dependency receives the calls in flight, and one probe per ``reset_timeout``."""
    stock, ours = soaks.side_by_side(server.unix_socket, tmp_path)
    report(soaks.table([stock, ours]))
    trials = 4
    # The others may make one more call each before the fifth failure is counted.
    assert all(0 < calls <= ours.workers + 4 + trials for calls in ours.per_outage), ours
    assert ours.trials_at_once == 1
    # An outage is a trip and a close that every process notices, and a half-open state for each trial.
    if is_breaker:
        # A failed trial opens the circuit again.  The last trial of an outage succeeds.
        transitions = sum(1 + 2 * failed + 2 for failed in ours.trials)
        assert all(failed <= trials for failed in ours.trials), ours
        assert ours.authored == ours.transitions == transitions
        assert ours.notifications <= ours.workers * transitions
    else:
        assert ours.notifications <= len(ours.per_outage) * (2 * ours.workers + 2 * trials)
    assert sum(stock.per_outage) > 1.5 * sum(ours.per_outage)
    assert stock.authored > 1.5 * ours.authored
