"""Benchmark: load of the server by a fleet, while calls succeed, while calls fail, and without calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from benchmarks.bounds import Bounds
from benchmarks.figures import Spread, short, table
from benchmarks.fleets import (
    CALLS_PER_SECOND,
    HOSTS,
    MARGIN_S,
    Usage,
    fail_steadily,
    fleet_of,
    go_about,
    listening,
    turn_often,
)
from benchmarks.ways import EMPTY_SCRIPT, OURS, WAYS, Way
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.fleet import Fleet

#: Guarded calls per second of the process that fails.
FAILING_CALLS_PER_SECOND = 2000.0

#: Seconds of load before and after a measurement of a fleet that is connected.
WARM_MARGIN_S = 0.5

#: Most CPU time of the server for a listening process without failures, in microseconds per second.
LISTENING_LIMIT_US = 50.0


@dataclass(frozen=True)
class Load:
    """Calls of a fleet.

    Attributes:
        name: Name in the table.
        members: Number of listening processes.
        failing_percent: Percentage of failures of the process that calls at `FAILING_CALLS_PER_SECOND`.
        all_call: Whether the listening processes call, too.
        limit: Most CPU time of the server per call, relative to stock.
    """

    name: str
    members: int
    failing_percent: int
    all_call: bool
    limit: float


LOADS = (
    Load("every call fails, one process", members=1, failing_percent=100, all_call=False, limit=0.5),
    Load("3 of 10 calls fail, 100 processes listen", members=100, failing_percent=30, all_call=True, limit=0.7),
)


@dataclass
class Loaded:
    """Fleet on a server of its own, with measurements.

    Attributes:
        fleet: The fleet.  Its first process is the one that fails.
        client: Client of the server.
        per_call: CPU time of the server per call in each round, without that of the idle fleet, in seconds.
        round_trips: Round trips per call in each round, without those of the idle fleet.
    """

    fleet: Fleet
    client: redis.Redis
    per_call: list[float] = field(default_factory=list)
    round_trips: list[float] = field(default_factory=list)

    def watch(self, seconds: float) -> Usage:
        """Return the work of the server during some seconds."""
        before = Usage.of(self.client)
        time.sleep(seconds)
        return Usage.of(self.client).since(before)

    def measure(self, way: Way, load: Load, seconds: float) -> None:
        """Add one measurement."""
        idle = self.watch(seconds / 2)
        failing, *hosts = self.fleet.workers
        whole = seconds + 2 * WARM_MARGIN_S
        failing.begin(
            fail_steadily,
            way,
            whole,
            failing_percent=load.failing_percent,
            calls_per_second=FAILING_CALLS_PER_SECOND,
        )
        calling = [failing, *(hosts if load.all_call else ())]
        for host in calling[1:]:
            host.begin(go_about, whole)
        time.sleep(WARM_MARGIN_S)
        used = self.watch(seconds)
        calls = sum(worker.result() for worker in calling) * used.at
        self.per_call.append((used.cpu - idle.cpu * used.at / idle.at) / calls)
        self.round_trips.append((used.reads - idle.reads * used.at / idle.at) / calls)


@contextlib.contextmanager
def loaded(way: Way, members: int, directory: Path) -> Iterator[Loaded]:
    """Yield a fleet on a new server."""
    with PrivateServer(servers.at_hand()[0].binary) as server:
        log = str(directory / f"{way}-{members}")
        with fleet_of(way, members, server, log) as fleet, contextlib.closing(server.client()) as client:
            yield Loaded(fleet, client)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: f"{load.failing_percent}-percent-{load.members}")
def test_cost_of_a_call(load: Load, quick: bool, tmp_path: Path, show: Callable[[str], None], bounds: Bounds) -> None:
    """All ways make the same number of calls per second, in turn.  The cost of an idle fleet is subtracted.

    The last way sends a script that does nothing.  No breaker that decides in scripts can cost less, so a bound below
    is not enforced.
    """
    # A worker of a fleet ends itself after two minutes.
    rounds, seconds = (1, 1.0) if quick else (5, 2.0)
    with contextlib.ExitStack() as stack:
        ways: tuple[Way, ...] = (*WAYS, "empty")
        made = {way: stack.enter_context(loaded(way, load.members, tmp_path)) for way in ways}
        for _ in range(rounds):
            for way, item in made.items():
                item.measure(way, load, seconds)
    stock = made["stock"]
    ratios_of = {
        way: Spread.of(own / other for own, other in zip(item.per_call, stock.per_call, strict=True))
        for way, item in made.items()
    }
    rows = []
    for way, item in made.items():
        ratios = ratios_of[way]
        rows.append(
            [
                WAYS.get(way, EMPTY_SCRIPT),
                f"{short(Spread.of(item.per_call).median * 1e6)} µs",
                "1" if item is stock else str(ratios),
                short(Spread.of(item.round_trips).median),
            ]
        )
        if way in OURS:
            bounds.at_most(WAYS[way], ratios.median, load.limit, floor=ratios_of["empty"].median)
    show(
        table(
            f"At the server, per call: {load.name}",
            ["", "of a CPU", "relative to pybreaker", "round trips"],
            rows,
            f"One process makes {FAILING_CALLS_PER_SECOND:,.0f} calls per second"
            + (f", and each of the others {CALLS_PER_SECOND:.0f}." if load.all_call else "."),
            f"Medians of {rounds} rounds. {HOSTS} real processes stand for 100, with a listener for each.",
        )
    )
    bounds.check(f"CPU of the server per call, relative to pybreaker: {load.name}")


def test_cost_of_a_quiet_fleet(
    quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None], bounds: Bounds
) -> None:
    """Successful calls cost the server nothing but the heartbeats of the listeners.  The idle server is subtracted."""
    seconds, sizes = (1.0, [100]) if quick else (10.0, [100, 500])
    rows = []
    with contextlib.closing(server.client()) as client:
        before = Usage.of(client)
        time.sleep(seconds)
        alone = Usage.of(client).since(before)
    for members in sizes:
        for way in WAYS:
            with (
                fleet_of(way, members, server, str(tmp_path / f"{way}-{members}")) as fleet,
                contextlib.closing(server.client()) as client,
            ):
                hosts = fleet.workers[1:]
                for host in hosts:
                    host.begin(go_about, seconds + 2 * MARGIN_S)
                time.sleep(MARGIN_S)
                before = Usage.of(client)
                time.sleep(seconds)
                used = Usage.of(client).since(before)
                subscribed = listening(client)
                calls = sum(host.result() for host in hosts)
            cpu = used.cpu / used.at - alone.cpu / alone.at
            per_process_us = cpu / members * 1e6
            rows.append(
                [
                    *(WAYS[way], str(members), str(subscribed), f"{calls:,.0f}"),
                    *(f"{used.reads / used.at:,.0f}", f"{cpu:.2%}", f"{per_process_us:.1f} µs"),
                ]
            )
            if way != "stock":
                bounds.at_most(f"{WAYS[way]}, {members} processes", per_process_us, LISTENING_LIMIT_US)
    show(
        table(
            "At the server, per second, while all calls succeed",
            ["", "processes", "listening", "guarded calls", "round trips", "of a CPU", "per process"],
            rows,
            f"Each process makes {CALLS_PER_SECOND:.0f} guarded calls per second. {HOSTS} real processes stand for "
            "all, with connections and a listener for each.",
        )
    )
    bounds.check("CPU of the server per second and listening process, in microseconds")


def test_cost_of_a_transition(quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None]) -> None:
    """The cost of a transition is the difference to a time without transitions, and includes all listeners."""
    seconds, sizes = (1.0, [100]) if quick else (8.0, [1, 10, 100])
    rows = []
    for members in sizes:
        with (
            fleet_of("storage", members, server, str(tmp_path / f"turns-{members}")) as fleet,
            contextlib.closing(server.client()) as client,
        ):
            turning, *hosts = fleet.workers
            used = []
            for turns in (False, True):
                for host in hosts:
                    host.begin(go_about, seconds + 2 * MARGIN_S)
                if turns:
                    turning.begin(turn_often, seconds + 2 * MARGIN_S)
                time.sleep(MARGIN_S)
                before = Usage.of(client)
                time.sleep(seconds)
                used.append(Usage.of(client).since(before))
                for worker in fleet.workers if turns else hosts:
                    worker.result()
            without, with_turns = used
            moves = with_turns.published
            cpu, commands, reads = (
                (getattr(with_turns, name) - getattr(without, name) * with_turns.at / without.at) / moves
                for name in ("cpu", "commands", "reads")
            )
            rows.append(
                [str(members), short(moves / with_turns.at), f"{cpu * 1e6:,.0f} µs", short(commands), short(reads)]
            )
    show(
        table(
            "At the server, per transition",
            ["listening", "transitions per second", "of a CPU", "commands", "round trips"],
            rows,
            "``open()`` and ``close()`` by hand, the scripts of the process that does it included, without what the "
            "listening processes cost anyway.",
        )
    )
