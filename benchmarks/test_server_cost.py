"""Benchmark: load of the server by a fleet, while calls succeed and while calls fail."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pybreaker
import pytest
import redis

from benchmarks.contenders import NEVER, STORAGES
from benchmarks.figures import short, table
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import DependencyDown, Fleet, Make, Spec, Worker, make_storage

#: Number of processes, each of which stands for many.
HOSTS = 5

#: Guarded calls per second of each process that a host stands for.
CALLS_PER_SECOND = 5.0

#: Percentage of failing calls in a storm.
FAILING_PERCENT = 30

#: Transitions per second, alternately to open and to closed.
TRANSITIONS_PER_SECOND = 20.0

#: Seconds within which all processes of a fleet must subscribe.
DEADLINE_S = 30.0

#: Seconds of load before and after a measurement.  Processes connect and subscribe in the first of them.
MARGIN_S = 1.5


def address(unix_socket: str, number: int) -> str:
    """Return one of several addresses of a server.  A process has one listener for each address."""
    return f"{unix_socket}.{number}"


# Breakers of the processes that this worker stands for.
_members: list[pybreaker.CircuitBreaker] = []


def enlist(worker: Worker, members: int) -> None:
    """Create a storage, connections and a listener for each of a number of processes."""
    for number in range(members):
        client = redis.Redis(unix_socket_path=address(worker.spec.place, number))
        storage = make_storage(worker.spec, client)
        _members.append(pybreaker.CircuitBreaker(fail_max=NEVER, state_storage=storage))
        for _ in range(2):
            # The first call finds the server, and the second one starts the listener.
            _members[-1].call(lambda: None)


def go_about(worker: Worker, seconds: float) -> float:
    """Call each breaker in turn at the usual rate, and return the calls per second that the CPU permitted."""
    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            _members[made % len(_members)].call(lambda: None)
        made += 1
        time.sleep(max(0.0, began + made / CALLS_PER_SECOND / len(_members) - time.monotonic()))
    return made / seconds


def fail_often(worker: Worker, seconds: float) -> float:
    """Call as fast as possible, with many failures that do not open the circuit, and return the calls per second."""

    def dependency(number: int) -> None:
        if number % 100 < FAILING_PERCENT:
            raise DependencyDown

    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        with contextlib.suppress(DependencyDown):
            # Multiples of a prime scatter the failures in the same way in each run.
            worker.breaker.call(dependency, made * 37)
        made += 1
    return made / seconds


def turn_often(worker: Worker, seconds: float) -> float:
    """Open and close the circuit by hand, and return the transitions per second."""
    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        (worker.breaker.close if made % 2 else worker.breaker.open)()
        made += 1
        time.sleep(max(0.0, began + made / TRANSITIONS_PER_SECOND - time.monotonic()))
    return made / seconds


@dataclass(frozen=True, slots=True)
class Usage:
    """Work of the server since its start.

    Attributes:
        at: Time of the measurement, in seconds of the monotonic clock.
        cpu: CPU time, in seconds.
        reads: Number of reads from connections, that is round trips.
        published: Number of PUBLISH commands.
        commands: Number of commands, including those of scripts.
    """

    at: float
    cpu: float
    reads: int
    published: int
    commands: int

    @classmethod
    def of(cls, client: redis.Redis) -> Usage:
        """Return the work until now."""
        info = client.info("everything")
        published = sum(info.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("publish", "spublish"))
        cpu = info["used_cpu_sys"] + info["used_cpu_user"]
        commands = sum(stat["calls"] for name, stat in info.items() if name.startswith("cmdstat_"))
        return cls(time.monotonic(), cpu, info["total_reads_processed"], published, commands)

    def since(self, before: Usage) -> Usage:
        """Return the difference to an earlier measurement, with its duration in `at`."""
        return Usage(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


def listening(client: redis.Redis) -> int:
    """Return the number of subscriptions."""
    # Valkey 9.1.2 answers PUBSUB NUMSUB with 119551434 instead of 500.
    return sum(int(connection["sub"]) for connection in client.client_list())


@contextlib.contextmanager
def fleet_of(make: Make, members: int, server: PrivateServer, log: str) -> Iterator[Fleet]:
    """Yield a fleet with active subscriptions, and one more process."""
    spec = Spec(make, server.unix_socket, log, fail_max=NEVER)
    hosts = min(HOSTS, members)
    for number in range(members // hosts):
        name = Path(address(server.unix_socket, number))
        name.unlink(missing_ok=True)
        name.symlink_to(server.unix_socket)
    with Fleet([spec] * (hosts + 1)) as fleet, contextlib.closing(server.client()) as client:
        for host in fleet.workers[1:]:
            host.begin(enlist, members // hosts)
        for host in fleet.workers[1:]:
            host.result()
        until = time.monotonic() + DEADLINE_S
        while make == "ours" and (subscribed := listening(client)) != members:
            if time.monotonic() > until:
                pytest.fail(f"{subscribed} subscriptions instead of {members}")
            time.sleep(0.1)
        yield fleet


def measured(fleet: Fleet, server: PrivateServer, seconds: float, *, storming: bool) -> list[str]:
    """Return the server's work per second under a fleet, with or without a process that often fails."""
    failing, *hosts = fleet.workers
    with contextlib.closing(server.client()) as client:
        for host in hosts:
            host.begin(go_about, seconds + 2 * MARGIN_S)
        if storming:
            failing.begin(fail_often, seconds + 2 * MARGIN_S)
        time.sleep(MARGIN_S)
        before = Usage.of(client)
        time.sleep(seconds)
        after = Usage.of(client)
        subscribed = listening(client)
        calls = sum(worker.result() for worker in (fleet.workers if storming else hosts))
    seconds = after.at - before.at
    published = (after.published - before.published) / seconds
    cpu = (after.cpu - before.cpu) / seconds
    return [
        f"{calls:,.0f}",
        f"{(after.reads - before.reads) / seconds:,.0f}",
        short(published),
        f"{published * subscribed:,.0f}",
        f"{cpu:.1%}",
        f"{cpu / calls * 1e6:.0f} µs",
    ]


def test_cost_at_the_server(quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None]) -> None:
    """A fleet calls at its usual rate.  In the storm one more process calls as fast as it can, and often fails."""
    seconds, sizes = (1.0, [100]) if quick else (8.0, [100, 500])
    rows = []
    for members in sizes:
        for make in STORAGES:
            with fleet_of(make, members, server, str(tmp_path / f"{make}-{members}")) as fleet:
                for storming in (False, True):
                    figures = measured(fleet, server, seconds, storming=storming)
                    rows.append([STORAGES[make], str(members), "storm" if storming else "quiet", *figures])
    show(
        table(
            "At the server, per second",
            ["", "processes", "", "guarded calls", "round trips", "published", "messages out", "of a CPU", "per call"],
            rows,
            f"Each process makes {CALLS_PER_SECOND:.0f} guarded calls per second. In the storm one more calls as fast "
            f"as it can, and {FAILING_PERCENT} of 100 of its calls fail. {HOSTS} real processes stand for all, with "
            "connections and a listener for each. Fewer calls than that mean that the CPUs of the callers are busy.",
        )
    )


def test_cost_of_a_transition(quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None]) -> None:
    """The cost of a transition is the difference to a time without transitions, and includes all listeners."""
    seconds, sizes = (2.0, [100]) if quick else (8.0, [1, 10, 100])
    rows = []
    for members in sizes:
        with (
            fleet_of("ours", members, server, str(tmp_path / f"turns-{members}")) as fleet,
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
