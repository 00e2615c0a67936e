"""Randomised faults: no call gets an error of Redis, and every process recovers within its limits.

``PYBREAKER_REDIS_CHAOS_SEED`` repeats a schedule.  ``PYBREAKER_REDIS_CHAOS_SECONDS=600`` makes the long run.
``PYBREAKER_REDIS_CHAOS_ENGINE=watch`` makes either without Lua.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import fault_run, servers
from tests.support.breakers import Down, down, up
from tests.support.faults import Site
from tests.support.history import Loss, Write, check, describe
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: Seconds of the slow test's schedule.
SECONDS = 55.0


@pytest.fixture
def site(killable_server: PrivateServer) -> Iterator[Site]:
    """A server of this test alone, behind a proxy."""
    with contextlib.closing(Site(killable_server)) as site:
        yield site


@pytest.mark.slow
def test_processes_keep_all_rules_under_random_faults(preferred, tmp_path, report):
    """Processes and threads under random faults: no error in a call, timely recovery, one probe, no lost generation."""
    seed = int(os.environ.get(fault_run.SEED_VARIABLE) or random.SystemRandom().getrandbits(32))
    seconds = float(os.environ.get(fault_run.SECONDS_VARIABLE) or SECONDS)
    engine: Any = os.environ.get(fault_run.ENGINE_VARIABLE) or "lua"
    print(f"{fault_run.SEED_VARIABLE}={seed}")
    made = fault_run.run(preferred.binary, tmp_path, seed=seed, seconds=seconds, engine=engine, report_step=print)
    problems = check(made.history)
    result = f"{engine}, seed {seed}: {describe(made.history, problems)}"
    report(result)
    assert not problems, result
    # A run in which nothing happened proves nothing.
    probes = [call for call in made.history.calls if call.is_probe]
    assert len(made.history.calls) > 100 * seconds
    assert sum(call.is_own is False for call in probes) >= seconds // 6
    assert sum(call.is_own is True for call in probes) >= seconds // 30
    assert len({item.generation for item in made.history.trace if isinstance(item, Write)}) >= seconds // 6


def test_same_seed_makes_the_same_schedule() -> None:
    """A seed makes a failed run repeatable, and a schedule contains every fault before it repeats one."""
    steps = fault_run.plan(7, 60.0)
    assert steps == fault_run.plan(7, 60.0) != fault_run.plan(8, 60.0)
    assert sum(step.seconds for step in steps) >= 60.0
    drawn = [name for step in fault_run.plan(7, 300.0) for name, _ in step.faults]
    assert set(drawn[: len(fault_run.FAULTS)]) == set(fault_run.FAULTS)


def test_lease_is_longer_than_a_recovery() -> None:
    """A lease is longer than a recovery, so a lost lease violates a rule within the calm after the faults."""
    for limits in fault_run.limits().values():
        assert limits.recovery + 0.5 < limits.probe_lease
        assert limits.recovery < fault_run.calm_seconds()


@pytest.mark.full
def test_run_that_fails_leaves_no_process_behind(preferred, tmp_path, monkeypatch):
    """An error in a fault ends server, workers and proxy, and is raised."""
    started: list[Any] = []

    class RecordedPopen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    def fails(stage: fault_run.Stage, seconds: float) -> None:
        stage.server.pause()
        raise LookupError("no such fault")

    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    monkeypatch.setattr(fault_run, "FAULTS", {"fails": fails})
    with pytest.raises(LookupError, match="no such fault"):
        fault_run.run(preferred.binary, tmp_path, seed=1, seconds=1.0)
    assert len(started) >= 3
    assert [process.poll() is None for process in started] == [False] * len(started)


@pytest.mark.full
def test_worker_that_ends_early_is_an_error(site, tmp_path):
    """A run without one of its workers is an error, and the other workers are killed."""
    with contextlib.closing(fault_run.Dependencies(tmp_path / "up")) as dependencies:
        crew = fault_run.Crew(site, dependencies, tmp_path, processes=2, threads=1, seed=1, seconds=1.0)
        with contextlib.closing(crew):
            crew.check()
            crew.workers[0].kill()
            crew.workers[0].wait()
            with pytest.raises(AssertionError, match="ended early"):
                crew.check()
            with pytest.raises(AssertionError, match="failed"):
                crew.finish()


@pytest.mark.parametrize("engine", list(fault_run.RIGHTS))
@pytest.mark.parametrize("found", servers.at_hand(), ids=servers.name_of)
def test_monitor_records_each_transition(found, engine):
    """Trip, claim and close of a circuit and the loss are recorded for scripts and for transactions."""
    with (
        PrivateServer(found.binary) as server,
        contextlib.closing(Site(server, fault_run.RIGHTS[engine])) as site,
        contextlib.closing(fault_run.Monitor(server)) as monitor,
        contextlib.closing(site.client(**ONCE)) as client,
    ):
        monitor.attach()
        storage = CircuitRedisStorage("closed", client, "once", timeout=10.0, probe_lease=5.0)
        breaker = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0.05, state_storage=storage)
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(down)
        wait_for(lambda: _answers(breaker), "a probe")
        site.administrator.flushall()
        wait_for(lambda: any(isinstance(item, Loss) for item in monitor.trace), "the loss is recorded")
        assert storage.health().mode == {"lua": "lua", "watch": "optimistic"}[engine]
    # Writes after the loss restore the circuit.
    before = [item for item in monitor.trace[: monitor.trace.index(_loss(monitor))] if isinstance(item, Write)]
    # A claim may be renewed, and a write of noise precedes the trip.
    moves = {(write.generation, write.state): write for write in before if write.generation}
    assert list(moves) == [(1, "open"), (2, "half-open"), (3, "closed")]
    claim = moves[2, "half-open"]
    assert claim.token
    assert claim.until - claim.at == pytest.approx(5.0, abs=0.1)
    assert moves[1, "open"].token == moves[3, "closed"].token == ""


def _loss(monitor: fault_run.Monitor) -> Loss:
    return next(item for item in monitor.trace if isinstance(item, Loss))


def _answers(breaker: pybreaker.CircuitBreaker) -> bool:
    with contextlib.suppress(pybreaker.CircuitBreakerError, Down):
        return bool(breaker.call(up))
    return False


def test_restarted_server_is_recorded_before_a_worker_reaches_it(site):
    """An orderly shutdown loses nothing, and the monitor records every write after the restart."""
    with (
        contextlib.closing(fault_run.Monitor(site.server)) as monitor,
        contextlib.closing(site.client(**ONCE)) as client,
    ):
        monitor.attach()
        client.hset("once:pybreaker:circuit", mapping={"generation": 4, "state": "open"})
        fault_run.FAULTS["shut down, whole"](fault_run.Stage(site, monitor), 0.0)
        client.hset("once:pybreaker:circuit", "generation", 5)
        wait_for(lambda: len(monitor.trace) == 2, "the second write is recorded")
        fault_run.FAULTS["killed, empty"](fault_run.Stage(site, monitor), 0.0)
    shown = [(item.generation, item.state) if isinstance(item, Write) else "lost" for item in monitor.trace]
    assert shown == [(4, "open"), (5, "open"), "lost"]


def test_reset_connection_ends_with_rst(site):
    """The proxy ends connections by RST, the client reads ECONNRESET, and new connections are served."""
    with socket.create_connection(("127.0.0.1", site.proxy.port)) as connection:
        connection.settimeout(10.0)
        connection.sendall(b"PING\r\n")
        assert connection.recv(7)
        site.proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with contextlib.closing(site.client(**ONCE)) as client:
        assert client.ping()


def test_dependency_is_down_for_as_long_as_recorded(tmp_path):
    """The recorded interval contains the real one, flapping ends in the last state, and closing restores all."""
    dependencies = fault_run.Dependencies(tmp_path / "up")
    dependencies.set("once", up=False)
    assert (tmp_path / "up").read_bytes()[0] == 0
    dependencies.set("once", up=True)
    assert (tmp_path / "up").read_bytes()[0] == 1
    with dependencies.flapping(1):
        wait_for(lambda: dependencies.since, "one of them is down")
    dependencies.close()
    assert set((tmp_path / "up").read_bytes()) == {1}
    assert all(begin <= end for intervals in dependencies.down.values() for begin, end in intervals)
    assert dependencies.down["once"]


def test_server_works_after_each_fault(site):
    """After each fault the server answers and accepts writes through the proxy."""
    with contextlib.closing(fault_run.Monitor(site.server)) as monitor:
        monitor.attach()
        for name, fault in fault_run.FAULTS.items():
            fault(fault_run.Stage(site, monitor), 0.05)
            with contextlib.closing(site.client(**ONCE)) as client:
                assert client.set("key", name), name
            monitor.check()
    assert {item.what for item in monitor.trace if isinstance(item, Loss)} == {
        "flushed",
        "killed, empty",
        "killed, older snapshot",
    }
