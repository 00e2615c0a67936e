"""What does a fleet cost the server, when all is well and while calls fail?"""

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

#: Processes, each of which stands for many.
HOSTS = 5

#: Guarded calls that each one makes for which it stands, per second.
PACE = 5.0

#: Of 100 calls in a storm so many fail.
FAILING = 30

#: Transitions per second, in turn to open and to closed.
TURNS = 20.0

#: Seconds that a fleet has to listen.
DEADLINE = 30.0

#: Seconds of load before what is measured, and after it: in the first of them connections and subscriptions are made.
MARGIN = 1.5


def address(unix_socket: str, number: int) -> str:
    """One of the names of a server: a process has one listener for each server, and tells them apart by their names."""
    return f"{unix_socket}.{number}"


# In a worker process: those for which it stands.
_members: list[pybreaker.CircuitBreaker] = []


def enlist(worker: Worker, members: int) -> None:
    """Begin to stand for so many processes, each with a storage, connections and a listener of its own."""
    for number in range(members):
        client = redis.Redis(unix_socket_path=address(worker.spec.place, number))
        storage = make_storage(worker.spec, client)
        _members.append(pybreaker.CircuitBreaker(fail_max=NEVER, state_storage=storage))
        for _ in range(2):
            # With the first call the server is found, with the second one listening begins.
            _members[-1].call(lambda: None)


def go_about(worker: Worker, seconds: float) -> float:
    """Calls at the usual pace, in turn; how many they were per second, which is fewer if there is not the CPU."""
    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            _members[made % len(_members)].call(lambda: None)
        made += 1
        time.sleep(max(0.0, began + made / PACE / len(_members) - time.monotonic()))
    return made / seconds


def fail_often(worker: Worker, seconds: float) -> float:
    """Calls as fast as possible, of which many fail and none trips the circuit; how many they were per second."""

    def dependency(number: int) -> None:
        if number % 100 < FAILING:
            raise DependencyDown

    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        with contextlib.suppress(DependencyDown):
            # Multiples of a prime: failures come scattered, the same way each time.
            worker.breaker.call(dependency, made * 37)
        made += 1
    return made / seconds


def turn_often(worker: Worker, seconds: float) -> float:
    """Open and close the circuit by hand, in turn; how often per second."""
    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        (worker.breaker.close if made % 2 else worker.breaker.open)()
        made += 1
        time.sleep(max(0.0, began + made / TURNS - time.monotonic()))
    return made / seconds


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server has done since it was started.

    Attributes:
        at: When, monotonic seconds.
        cpu: Seconds.
        reads: Times that it has read from a connection: round trips.
        published: Messages that it was given to publish.
        commands: Commands that it has carried out, those of scripts among them.
    """

    at: float
    cpu: float
    reads: int
    published: int
    commands: int

    @classmethod
    def of(cls, client: redis.Redis) -> Usage:
        """Up to now."""
        info = client.info("everything")
        published = sum(info.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("publish", "spublish"))
        cpu = info["used_cpu_sys"] + info["used_cpu_user"]
        commands = sum(stat["calls"] for name, stat in info.items() if name.startswith("cmdstat_"))
        return cls(time.monotonic(), cpu, info["total_reads_processed"], published, commands)

    def since(self, before: Usage) -> Usage:
        """What was done in between; `at` is how long that took."""
        return Usage(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


def listening(client: redis.Redis) -> int:
    """Subscriptions to circuits."""
    # Not PUBSUB NUMSUB: Valkey 9.1.2 answers it with 119551434 where there are 500.
    return sum(int(connection["sub"]) for connection in client.client_list())


@contextlib.contextmanager
def fleet_of(make: Make, members: int, server: PrivateServer, log: str) -> Iterator[Fleet]:
    """A fleet, all of which listen if they are ours, and one more process."""
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
        until = time.monotonic() + DEADLINE
        while make == "ours" and (heard_by := listening(client)) != members:
            if time.monotonic() > until:
                pytest.fail(f"{heard_by} listen instead of {members}")
            time.sleep(0.1)
        yield fleet


def measured(fleet: Fleet, server: PrivateServer, seconds: float, *, storming: bool) -> list[str]:
    """What is done per second while a fleet goes about its business, without or with the process that fails often."""
    failing, *hosts = fleet.workers
    with contextlib.closing(server.client()) as client:
        for host in hosts:
            host.begin(go_about, seconds + 2 * MARGIN)
        if storming:
            failing.begin(fail_often, seconds + 2 * MARGIN)
        time.sleep(MARGIN)
        before = Usage.of(client)
        time.sleep(seconds)
        after = Usage.of(client)
        heard_by = listening(client)
        calls = sum(worker.result() for worker in (fleet.workers if storming else hosts))
    seconds = after.at - before.at
    published = (after.published - before.published) / seconds
    cpu = (after.cpu - before.cpu) / seconds
    return [
        f"{calls:,.0f}",
        f"{(after.reads - before.reads) / seconds:,.0f}",
        short(published),
        f"{published * heard_by:,.0f}",
        f"{cpu:.1%}",
        f"{cpu / calls * 1e6:.0f} µs",
    ]


def test_cost_at_the_server(quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None]) -> None:
    """A fleet that calls at a usual pace; then one process more, which calls as fast as it can and often fails."""
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
            f"Each process makes {PACE:.0f} guarded calls per second. In the storm one more calls as fast as it can, "
            f"and {FAILING} of 100 of its calls fail. In truth {HOSTS} processes stand for all, with connections and a "
            "listening thread for each; where they make fewer calls than that, the callers' CPUs are busy.",
        )
    )


def test_cost_of_a_transition(quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None]) -> None:
    """What a transition costs the server, each listening process included: the difference to a time without any."""
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
                    host.begin(go_about, seconds + 2 * MARGIN)
                if turns:
                    turning.begin(turn_often, seconds + 2 * MARGIN)
                time.sleep(MARGIN)
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
