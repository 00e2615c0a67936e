"""Fleets that lose their Redis: each process protects itself, and together they come back."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import DependencyDown, Fleet, Make, Shared, Spec, Worker, call, calls, flood, operator
from tests.support.wait import wait_for

#: Seconds; the fleet is to agree again after twice as many.
STALENESS = 0.5

pytestmark = pytest.mark.slow


@pytest.fixture
def mortal_fleet(make: Make, killable_server: PrivateServer, tmp_path: Path) -> Any:
    """Build a fleet on a server that the test may kill."""

    def build(workers: int, **words: Any) -> Fleet:
        spec = Spec(make, killable_server.unix_socket, str(tmp_path / "calls"), timeout=10.0, **words)
        return Fleet([spec] * workers)

    return build


@pytest.fixture
def record(killable_server: PrivateServer) -> Iterator[Shared]:
    """The shared record on the server that the test may kill."""
    with contextlib.closing(killable_server.client()) as client:
        yield Shared(client)


def test_every_process_spares_the_dead_dependency_by_itself(promised, mortal_fleet, killable_server, visits):
    """Redis and the dependency die together: `fail_max` calls of each process, then a probe per timeout."""
    with mortal_fleet(8, reset_timeout=1.0) as fleet:
        fleet.run(calls, 2)
        killable_server.kill()
        dead = time.monotonic()
        until = dead + 2.5
        fleet.run(flood, until, every=0.02, dead=[(dead, until)], seconds=0.01, within=60)
    reached = [sum(visit.worker == worker for visit in visits.since(dead)) for worker in range(8)]
    with promised():
        # Two timeouts have passed.
        assert max(reached) <= 5 + 2


def test_emptied_server_recovers_nobody(promised, mortal_fleet, killable_server, visits, record):
    """Defect l: FLUSHALL during an outage, 32 workers: no false recovery, no call to the dead dependency."""
    with mortal_fleet(32, reset_timeout=60) as fleet:
        fleet.run(calls, 1)
        fleet[0].run(calls, 5, fail=True)
        fleet.run(call, fail=True)
        opened = time.monotonic()
        killable_server.kill()
        fleet.run(calls, 3, fail=True)
        killable_server.restart(keep_data=False)
        fleet.run(flood, time.monotonic() + 3, every=0.05, dead=[(0.0, time.monotonic() + 60)], seconds=0, within=60)
        states = [item.new for item in fleet.heard() if item.at > opened]
    with promised():
        assert visits.since(opened) == []
        assert states == []
        assert record.state == "open"


@pytest.mark.parametrize("make", ["ours"])
@pytest.mark.parametrize("keep_data", [True, False], ids=["with data", "empty"])
def test_herd_that_returns_trips_once(mortal_fleet, killable_server, record, keep_data):
    """16 processes have tripped alone; to Redis that is one trip, and to nobody a second timeout."""
    with mortal_fleet(16, reset_timeout=60, max_staleness=STALENESS) as fleet:
        fleet.run(calls, 2)
        if keep_data:
            with contextlib.closing(killable_server.client()) as client:
                client.save()
        killable_server.kill()
        fleet.run(calls, 8, fail=True)
        tripped = time.time()
        time.sleep(2)  # long beside what a busy machine adds to the news
        killable_server.restart(keep_data=keep_data)
        wait_for(lambda: record.state == "open", "the trip is shared")
        fleet.run(wait_until_connected)
        assert (record.state, record.generation) == ("open", 1)
        assert set(fleet.run(is_open)) == {True}
        with contextlib.closing(killable_server.client()) as client:
            opened_at = int(client.hget("fleet:pybreaker:circuit", "opened_at_ms")) / 1000
        assert opened_at <= tripped + 1.0, "for the rest of its time"


def wait_until_connected(worker: Worker) -> None:
    """Wait until this process goes by the shared circuit."""
    wait_for(lambda: worker.storage.health().condition == "connected", "it is back")


def is_open(worker: Worker) -> bool:
    """Whether a call would be rejected."""
    return call(worker).rejected


def patrol(worker: Worker, until: float, sick: str, board: str) -> int:
    """Call, and put up on a board how the circuit stands, until told to stop; how many calls were made.

    Args:
        worker: This worker.
        until: Monotonic time of the end.
        sick: File that is there while the dependency is down.
        board: Directory in which each worker has a file.
    """

    def dependency() -> None:
        if Path(sick).exists():
            raise DependencyDown

    shown = ""
    made = 0
    while time.monotonic() < until and not worker.dismissed:
        worker.guarded(dependency)
        made += 1
        health = worker.storage.health()
        state = f"{worker.breaker.current_state} {'alone' if health.is_own else health.condition}"
        if state != shown:
            shown = state
            partial = Path(board) / f".{worker.index}"
            partial.write_text(state)
            partial.rename(Path(board) / str(worker.index))
        time.sleep(0.005)
    return made


@pytest.mark.parametrize("make", ["ours"])
def test_fleet_agrees_after_each_of_50_returns(mortal_fleet, killable_server, record, tmp_path, report):
    """Under load, at random instants, empty or not, dependency dead or not: within twice `max_staleness` each time."""
    chance = random.Random(50)
    sick, board = tmp_path / "sick", tmp_path / "board"
    board.mkdir()
    workers = 6
    took: list[float] = []

    def agree_on(state: str) -> bool:
        shown = [path.read_text() for path in board.iterdir() if path.name.isdigit()]
        return shown == [f"{state} connected"] * workers and record.state == state

    with mortal_fleet(workers, reset_timeout=60, max_staleness=STALENESS) as fleet, Shepherd(mortal_fleet) as shepherd:
        fleet.begin(patrol, time.monotonic() + 110, str(sick), str(board))
        wait_for(lambda: agree_on("closed"), "the fleet works")
        for cycle in range(50):
            keep_data = chance.random() < 0.5
            dies = chance.random() < 0.5
            if keep_data:
                with contextlib.closing(killable_server.client()) as client:
                    client.save()
            killable_server.kill()
            if dies:
                sick.touch()
            time.sleep(chance.choice([0.05, 0.1, 0.2, 0.4, 1.5]))  # how long it is away
            killable_server.restart(keep_data=keep_data)
            expected = "open" if dies else "closed"
            took.append(wait_for(lambda expected=expected: agree_on(expected), f"cycle {cycle}: all are {expected}"))
            sick.unlink(missing_ok=True)
            if dies:
                shepherd.close_circuit()
                wait_for(lambda: agree_on("closed"), f"cycle {cycle}: all are closed again")
        for worker in fleet.workers:
            worker.release(None)
    report(f"50 returns, {workers} processes, max_staleness {STALENESS} s: all agree after {max(took):.2f} s at most")
    *usual, last_but_one, last = sorted(took)
    assert max(usual) < 2 * STALENESS
    # Once or twice a busy machine may not have let somebody run.
    assert max(last_but_one, last) < 2 * STALENESS + 2.0


class Shepherd:
    """One more process, for an operator's commands."""

    def __init__(self, mortal_fleet: Any) -> None:
        self._fleet = mortal_fleet(1, reset_timeout=60, max_staleness=0)

    def __enter__(self) -> Shepherd:  # typing.Self is new in 3.11
        self._fleet.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._fleet.__exit__()

    def close_circuit(self) -> None:
        """An operator's ``breaker.close()``."""
        self._fleet[0].run(wait_until_asked)
        self._fleet[0].run(operator, "close")


def wait_until_asked(worker: Worker) -> None:
    """Ask Redis, which this process may not have noticed to be back."""
    wait_for(lambda: worker.breaker.current_state and worker.storage.health().condition == "connected", "it is back")
