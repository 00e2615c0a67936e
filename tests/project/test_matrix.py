"""A short test of each promise, in every kind of place of every server, with the installed client library.

The results become cells of the table in ``docs/reference/compatibility.rst`` (`matrix.py`).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pybreaker
import pytest

from tests.support import servers
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.fleet import Fleet, Spec, call, call_when_admitted, read_state
from tests.support.inspect import storage_of
from tests.support.matrix import FAILED, NOT_RUN, Results, main, read, table, written
from tests.support.outages import calls, health_of, is_back
from tests.support.places import KINDS, Place, client_at, has_clusters
from tests.support.servers import no_server
from tests.support.wait import wait_for

NAMESPACE = "matrix"

#: Seconds for a round trip and for the notice of a change, on a busy machine.
SLACK = 1.0

FIELDS = {name: number for number, name in enumerate(("state", "fail_counter", "success_counter", "opened_at"))}


def _places() -> list[Any]:
    kinds = [kind for kind in KINDS if kind != "Cluster" or has_clusters()]
    return [
        pytest.param((kind, found), id=f"{kind}-{servers.name_of(found)}", marks=pytest.mark.full)
        for found in servers.at_hand()
        for kind in kinds
    ]


@pytest.fixture(scope="module", params=_places() or [None])
def _made(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param is None:
        no_server()
    with Place(*request.param) as place:
        yield place


@pytest.fixture
def place(_made: Place, matrix_cell) -> Place:
    """Return a place without data, and record the result of the test."""
    # Storages of earlier tests hold generations of the circuit that this place has lost.
    gc.collect()
    _made.restore()
    matrix_cell(_made)
    return _made


def value_of(place: Place, name: str) -> bytes | None:
    """Return the value of a key in Redis."""
    with place.client_of(NAMESPACE) as client:
        found: bytes | None = client.get(place.keys(NAMESPACE)[FIELDS[name]])
        return found


def test_counters_trip_and_recovery_follow_pybreaker(place: Place):
    """Counters, trip, rejection, probes and recovery follow pybreaker's documentation."""
    breaker = breaker_on(
        client_at(place.address), NAMESPACE, fail_max=2, reset_timeout=60, success_threshold=2, timeout=10
    )
    assert breaker.call(up) == "answer"
    fails(breaker)
    assert (breaker.fail_counter, breaker.current_state) == (1, "closed")
    with pytest.raises(pybreaker.CircuitBreakerError, match="Failures threshold reached"):
        breaker.call(lambda: 1 / 0)
    opened_at = storage_of(breaker).opened_at
    assert abs(datetime.now(timezone.utc) - opened_at) < timedelta(seconds=5)
    assert (value_of(place, "state"), value_of(place, "fail_counter")) == (b"open", b"2")
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = 0.5
    time.sleep(0.51)
    breaker.call(up)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    breaker.call(up)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert value_of(place, "state") == b"closed"


def test_three_processes_share_one_circuit(place: Place, tmp_path, visits):
    """In three processes the fifth failure trips, and one of the waiting calls probes the dependency."""
    spec = Spec("ours", place.address, str(tmp_path / "calls"), NAMESPACE, reset_timeout=0.5)
    with Fleet([spec] * 3) as fleet:
        outcomes = [fleet[number % 3].run(call, fail=True) for number in range(5)]
        assert [outcome.tripped for outcome in outcomes] == [False] * 4 + [True]
        wait_for(lambda: fleet.run(read_state) == ["open"] * 3, "all processes have noticed the trip")
        trials = fleet.run(call_when_admitted, 10, seconds=0.3)
        first, *others = visits.read()[5:]
        # The other calls were admitted after the one probe had closed the circuit.
        assert all(trial.reached for trial in trials)
        assert len(others) == 2
        assert all(visit.begin >= first.end for visit in others)
        assert fleet.run(read_state) == ["closed"] * 3


def test_calls_without_round_trips_follow_changes(place: Place, matrix_push):
    """Successes and rejections send nothing, and changes by other processes and by foreign writers are noticed."""
    one, other = (
        settled(breaker_on(client_at(place.address), NAMESPACE, fail_max=1, max_staleness=0.5, timeout=10))
        for _ in range(2)
    )
    with place.client_of(NAMESPACE) as client:
        client.config_resetstat()
        for _ in range(500):
            one.call(up)
        # The listener may just have returned, which costs a round trip or two, but not 500.
        assert client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"] <= 2
        fails(one)
        wait_for(lambda: other.current_state == "open", "the trip is noticed")
        one.close()
        wait_for(lambda: other.current_state == "closed", "the recovery is noticed")
        settled(one)
        # Beyond the time for which the view is trusted without a notice.
        client.set(place.keys(NAMESPACE)[0], "open")
        began = time.monotonic()
        wait_for(lambda: one.current_state == "open", "the foreign writer is noticed")
        assert time.monotonic() - began < 0.5 + SLACK
    health = health_of(one)
    assert (health.mode, health.condition) == ("lua", "connected")
    matrix_push(health.push)


def test_trip_in_an_outage_is_shared_on_return(place: Place):
    """In an outage calls raise no error, wait once, and use a local circuit, and a trip is shared on return."""
    breaker = settled(breaker_on(client_at(place.address), NAMESPACE, fail_max=3, reset_timeout=60))
    with place.killed(NAMESPACE):
        series = calls(breaker, 0.3, failing=1.0)
        assert (series.unexpected, series.reached) == ([], 3)
        assert max(series.took) < 0.5
        assert health_of(breaker).is_own
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)
    assert value_of(place, "state") == b"open"
    other = breaker_on(client_at(place.address), NAMESPACE, timeout=10)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        other.call(up)
    assert other.current_state == "open"


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_shows_failures_and_missing_runs(tmp_path, monkeypatch, capsys):
    """A failure is shown although another test passed, and a combination that was not run is shown as such."""
    results = Results("redis-py 8")
    results.passed("Redis 8.2", "Cluster", "tracking")
    results.passed("Redis 8.2", "Cluster", "")
    results.failed("Redis 6.2", "Sentinel")
    results.passed("Redis 6.2", "Sentinel", "channel")
    results.write(tmp_path)
    cells = read(tmp_path)
    assert cells == {
        ("Redis 8.2", "Cluster", "redis-py 8"): "tracking",
        ("Redis 6.2", "Sentinel", "redis-py 8"): FAILED,
    }
    made = table(cells)
    assert made.count("tracking") == 1
    assert made.count(FAILED) == 1
    assert made.count(NOT_RUN) == 4 * 3 * 7 - 2
    assert main([str(tmp_path), "--check"]) == 1
    output = capsys.readouterr().out
    assert "not run: Valkey 9.1, single server, redis-py 8\n" in output
    (tmp_path / "other.json").write_text('["redis-py 9", {"Redis 9.0": {"Cluster": "tracking"}}]')
    assert (
        "run, but not in the table: Redis 9.0 Cluster redis-py 9" in (main([str(tmp_path)]), capsys.readouterr().out)[1]
    )


def test_each_cell_that_was_run_is_compared_with_the_page(tmp_path, capsys):
    """Client libraries take turns, so a run has some of the cells."""
    results = Results("redis-py 8")
    results.passed("Redis 8.2", "Cluster", "tracking")
    results.write(tmp_path)
    assert main([str(tmp_path), "--check"]) == 0
    results.passed("Redis 6.2", "Sentinel", "carrier pigeon")
    results.write(tmp_path)
    assert main([str(tmp_path), "--check"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("another cell"))
    assert line.endswith("Redis 6.2, Sentinel, redis-py 8: carrier pigeon, and not tracking")


def test_page_has_no_cell_that_fails():
    """Every cell of the page's table was run, and none failed."""
    assert written().startswith("=====")
    assert FAILED not in written()
    assert NOT_RUN not in written()
