"""Recovery of a fleet: one call at a time finds out whether the dependency is back, and nobody is told more than once.

Every promise is also put to the storage that comes with pybreaker, which must break it.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.support import soak as soaks
from tests.support.fleet import call, calls, flood, held_call, most_at_once, read_state, recover, trip, wait_until


@pytest.mark.sample
def test_burst_at_end_of_reset_timeout_executes_one_call(promised, fleet_of):
    """However many processes wait for ``reset_timeout``, one call is let through; the others fail at once."""
    with fleet_of(32, reset_timeout=1.0) as fleet:
        tripped = trip(fleet[0])
        fleet.run(read_state)
        inside, others = fleet.hold(at=tripped.ended + 1.05)
        half_open = [item for item in fleet.heard(but=inside) if item.new == "half-open"]
        fleet.release(inside, success=True)
    with promised():
        assert len(inside) == 1
        assert all(outcome.rejected for outcome in others)
        assert not half_open


@pytest.mark.slow
def test_flood_on_dead_dependency_reaches_it_8_times_at_most(make, promised, fleet_of, visits):
    """16 workers knock every 20 ms for 10 s: one trial per ``reset_timeout`` gets through, never two at once."""
    with fleet_of(16, reset_timeout=1.0) as fleet:
        trip(fleet[0])
        begin = time.monotonic()
        end = begin + (10.0 if make == "ours" else 3.0)  # by then, 16 have reached it twice
        made = fleet.run(flood, end, every=0.02, dead=[(begin, end + 60.0)], seconds=0.5, within=30.0)
    reached = visits.since(begin)
    print(f"{sum(made)} calls, {len(reached)} reached the dependency, {most_at_once(reached)} at once")
    with promised():
        assert len(reached) <= 8
        assert len(reached) >= 5
        assert most_at_once(reached) == 1


def test_killed_prober_is_succeeded_within_its_lease_one_at_a_time(promised, fleet_of, visits):
    """The lease of a prober that died runs out, then one other takes over; until then nobody is let through."""
    with fleet_of(8, reset_timeout=1.0, probe_lease=1.0) as fleet:
        prober, others = fleet[0], fleet.workers[1:]
        tripped = trip(prober)
        fleet.run(read_state)
        wait_until(tripped.ended + 1.05)
        # The lease cannot have begun earlier.
        asked = time.monotonic()
        prober.begin(held_call)
        prober.wait_for("reached")
        killed = prober.kill()
        end = killed + 4.0
        fleet.run(flood, end, every=0.02, dead=[(killed, end + 60.0)], seconds=0.3, only=others)
    after = visits.since(killed)
    assert after
    with promised():
        assert asked + 0.98 <= after[0].begin <= killed + 1.0 + 0.8
        assert most_at_once(after) == 1


def test_reset_timeout_0_lets_one_call_through_at_a_time(promised, fleet_of, visits):
    """Even with no waiting time at all there is one trial at a time, and no recursion."""
    with fleet_of(8, reset_timeout=0.0) as fleet:
        trip(fleet[0])
        begin = time.monotonic()
        end = begin + 1.5
        fleet.run(flood, end, every=0.005, dead=[(begin, end + 60.0)], seconds=0.05)
    reached = visits.since(begin)
    assert len(reached) > 3
    with promised():
        assert most_at_once(reached) == 1


def test_one_cycle_tells_half_open_to_the_prober_only(promised, fleet_of):
    """Each process hears of each transition at most once, of half-open only the one that probes."""
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
        told = fleet.heard()
    print(f"{len(told)} notifications")
    per_process = Counter((item.worker, item.new) for item in told)
    per_state = Counter(item.new for item in told)
    assert per_state["open"] == per_state["closed"] == 16
    with promised():
        assert max(per_process.values()) == 1
        assert per_state["half-open"] == 1
        assert len(told) == 33


def test_raising_listener_loses_no_trip(promised, fleet_of, shared, visits):
    """The trip is in the record before listeners run: what they raise cannot undo it."""
    with fleet_of(2, listener="raise") as fleet:
        fleet[0].run(calls, 50, fail=True)
        reached = len(visits.read())
        other = fleet[1].run(call)
        state = shared.state
    with promised():
        assert reached == 5
        assert state == "open"
        assert not other.reached


def test_listener_finds_the_state_it_is_told_of(promised, fleet_of):
    """A listener that hears of a transition and asks ``cb.current_state`` gets the new state, not the old one."""
    with fleet_of(1, listener="look", reset_timeout=1.0) as fleet:
        tripped = trip(fleet[0])
        wait_until(tripped.ended + 1.05)
        assert fleet[0].run(call).reached
        told = fleet.heard()
    assert [item.new for item in told] == ["open", "half-open", "closed"]
    with promised():
        assert [item.current for item in told] == ["open", "half-open", "closed"]


def test_threshold_of_3_takes_3_successes_of_any_threads_one_at_a_time(promised, fleet_of, visits):
    """With a thread for each request, in all processes: the third success closes, and no lease is waited for."""
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
    """Through four outages, each costs the calls that were in flight and one trial per ``reset_timeout``."""
    stock, ours = soaks.side_by_side(server.unix_socket, tmp_path)
    report(soaks.table([stock, ours]))
    trials = 4
    # The others may call once more before the fifth failure is counted.
    assert all(0 < calls <= ours.workers + 4 + trials for calls in ours.per_outage), ours
    assert ours.trials_at_once == 1
    assert ours.notifications <= len(ours.per_outage) * (2 * ours.workers + 2 * trials)
    assert sum(stock.per_outage) > 1.5 * sum(ours.per_outage)
    assert stock.notifications > 1.5 * ours.notifications
