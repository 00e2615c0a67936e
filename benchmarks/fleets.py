"""Fleets of which a process stands for many, and the work of their server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybreaker
import pytest
import redis

from benchmarks.contenders import NEVER
from benchmarks.ways import OURS, EmptyScript, Way, breaker_on, make_of
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import DependencyDown, Fleet, Spec, Worker, make_storage

#: Number of processes, each of which stands for many.
HOSTS = 5

#: Guarded calls per second of each process that a host stands for.
CALLS_PER_SECOND = 5.0

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


def enlist(worker: Worker, way: Way, members: int) -> None:
    """Create a storage, connections and a listener for each of a number of processes."""
    for number in range(members):
        client = redis.Redis(unix_socket_path=address(worker.spec.place, number))
        storage = make_storage(worker.spec, client)
        _members.append(breaker_on(storage, way, fail_max=NEVER))
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


def fail_steadily(worker: Worker, way: Way, seconds: float, *, failing_percent: int, calls_per_second: float) -> float:
    """Call at a fixed rate, with failures that do not open the circuit, and return the calls per second."""
    breaker: Any
    if way == "empty":
        breaker = EmptyScript(redis.Redis(unix_socket_path=worker.spec.place))
    else:
        breaker = breaker_on(worker.storage, way, fail_max=NEVER)

    def dependency(number: int) -> None:
        if number % 100 < failing_percent:
            raise DependencyDown

    made, began = 0, time.monotonic()
    while time.monotonic() < began + seconds and not worker.dismissed:
        with contextlib.suppress(DependencyDown):
            # Multiples of a prime scatter the failures in the same way in each run.
            breaker.call(dependency, made * 37)
        made += 1
        time.sleep(max(0.0, began + made / calls_per_second - time.monotonic()))
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
def fleet_of(way: Way, members: int, server: PrivateServer, log: str) -> Iterator[Fleet]:
    """Yield a fleet with active subscriptions, and one more process, which is the first."""
    spec = Spec(make_of(way), server.unix_socket, log, fail_max=NEVER)
    hosts = min(HOSTS, members)
    for number in range(members // hosts):
        name = Path(address(server.unix_socket, number))
        name.unlink(missing_ok=True)
        name.symlink_to(server.unix_socket)
    with Fleet([spec] * (hosts + 1)) as fleet, contextlib.closing(server.client()) as client:
        for host in fleet.workers[1:]:
            host.begin(enlist, way, members // hosts)
        for host in fleet.workers[1:]:
            host.result()
        until = time.monotonic() + DEADLINE_S
        while way in OURS and (subscribed := listening(client)) != members:
            if time.monotonic() > until:
                pytest.fail(f"{subscribed} subscriptions instead of {members}")
            time.sleep(0.1)
        yield fleet
