"""Every promise in a nutshell, on every kind of place of every server, with the client library that is installed.

What was shown becomes a cell of the README's table (`matrix.py`).
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

#: A round trip and the time to notice, on a machine that does other things too, seconds.
SLACK = 1.0

FIELDS = {name: number for number, name in enumerate(("state", "fail_counter", "success_counter", "opened_at"))}


def _places() -> list[Any]:
    kinds = [kind for kind in KINDS if kind != "Cluster" or has_clusters()]
    return [
        pytest.param(
            (kind, found), id=f"{kind}-{servers.name_of(found)}", marks=pytest.mark.full if kind != KINDS[0] else ()
        )
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
    """A place, with nothing in it; what becomes of the test is noted."""
    # Storages of earlier tests know the circuit in generations that this place has lost.
    gc.collect()
    _made.whole()
    matrix_cell(_made)
    return _made


def value(place: Place, name: str) -> bytes | None:
    """What lies in Redis."""
    with place.asked(NAMESPACE) as client:
        found: bytes | None = client.get(place.keys(NAMESPACE)[FIELDS[name]])
        return found


def test_contract(place: Place):
    """A whole life, as pybreaker's documentation has it: counters, trip, rejection, trials, recovery."""
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
    assert (value(place, "state"), value(place, "fail_counter")) == (b"open", b"2")
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(up)
    breaker.reset_timeout = 0.5
    time.sleep(0.51)
    breaker.call(up)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
    breaker.call(up)
    assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
    assert value(place, "state") == b"closed"


def test_fleet(place: Place, tmp_path, visits):
    """One truth in three processes: the fifth failure trips, and one of those who wait tries the dependency."""
    spec = Spec("ours", place.address, str(tmp_path / "calls"), NAMESPACE, reset_timeout=0.5)
    with Fleet([spec] * 3) as fleet:
        outcomes = [fleet[number % 3].run(call, fail=True) for number in range(5)]
        assert [outcome.tripped for outcome in outcomes] == [False] * 4 + [True]
        wait_for(lambda: fleet.run(read_state) == ["open"] * 3, "all have heard it")
        trials = fleet.run(call_when_admitted, 10, seconds=0.3)
        first, *others = visits.read()[5:]
        # Whoever else got through did so when the one trial had closed the circuit.
        assert all(trial.reached for trial in trials)
        assert len(others) == 2
        assert all(visit.begin >= first.end for visit in others)
        assert fleet.run(read_state) == ["closed"] * 3


def test_view(place: Place, matrix_heard):
    """Successes and rejections ask nobody; what others do is heard, whoever they are."""
    one, other = (
        settled(breaker_on(client_at(place.address), NAMESPACE, fail_max=1, max_staleness=0.5, timeout=10))
        for _ in range(2)
    )
    with place.asked(NAMESPACE) as client:
        client.config_resetstat()
        for _ in range(500):
            one.call(up)
        # The listener may just have come back from a doubt; 500 round trips it is not.
        assert client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"] <= 2
        fails(one)
        wait_for(lambda: other.current_state == "open", "the trip is heard")
        one.close()
        wait_for(lambda: other.current_state == "closed", "the recovery is heard")
        settled(one)
        # Beyond the time for which it is believed that nobody has moved it.
        client.set(place.keys(NAMESPACE)[0], "open")
        began = time.monotonic()
        wait_for(lambda: one.current_state == "open", "the foreign writer is noticed")
        assert time.monotonic() - began < 0.5 + SLACK
    health = health_of(one)
    assert (health.mode, health.condition) == ("lua", "connected")
    matrix_heard(health.push)


def test_outage(place: Place):
    """No error, one wait, a circuit of one's own; and what it has learned is there when the server is."""
    breaker = settled(breaker_on(client_at(place.address), NAMESPACE, fail_max=3, reset_timeout=60))
    with place.gone(NAMESPACE):
        spell = calls(breaker, 0.3, failing=1.0)
        assert (spell.unexpected, spell.reached) == ([], 3)
        assert max(spell.took) < 0.5
        assert health_of(breaker).is_own
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
    assert value(place, "state") == b"open"
    other = breaker_on(client_at(place.address), NAMESPACE, timeout=10)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        other.call(up)
    assert other.current_state == "open"


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_says_what_runs_have_shown(tmp_path, monkeypatch, capsys):
    """A failure cannot hide behind a success, nor behind a cell that was not run."""
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
    said = capsys.readouterr().out
    assert "not run: Valkey 9.1, single server, redis-py 8\n" in said
    (tmp_path / "other.json").write_text('["redis-py 9", {"Redis 9.0": {"Cluster": "tracking"}}]')
    assert (
        "run, but not in the table: Redis 9.0 Cluster redis-py 9" in (main([str(tmp_path)]), capsys.readouterr().out)[1]
    )


def test_readme_has_no_cell_that_fails():
    """The table is written by the runs; what they could not show is not shown as working."""
    assert written().startswith("=====")
    assert FAILED not in written()
    assert NOT_RUN not in written()
