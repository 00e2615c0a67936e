"""Benchmark: CPU time of a process with many quiet circuits, compared with a process that has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pybreaker_redis
from benchmarks.bounds import Bounds
from benchmarks.contenders import NEVER
from benchmarks.figures import Spread, short, table
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import Fleet, Spec, Worker

#: Circuits of the two processes.
FEW, MANY = 1, 1000

#: Processes of each kind.
PROCESSES = 3

#: Calls per second of each process, in turn on its circuits, so that each circuit is in use.
CALLS_PER_SECOND = 40.0

#: Most CPU time that many circuits cost more than one, in milliseconds per second.
LIMIT_MS = 1.0

#: Seconds until all circuits of a process must be read and armed.
SETTLED_AFTER_S = 3.0

# Breakers of this process.
_breakers: list[pybreaker_redis.CircuitBreaker] = []


def begin_use(worker: Worker, circuits: int) -> None:
    """Create breakers, and call each of them."""
    for number in range(circuits):
        storage = pybreaker_redis.CircuitRedisStorage(
            "closed", worker.client, f"armed-{number}", timeout=worker.spec.timeout
        )
        _breakers.append(pybreaker_redis.CircuitBreaker(fail_max=NEVER, state_storage=storage))
    for _ in range(2):
        for breaker in _breakers:
            breaker.call(str)
        time.sleep(SETTLED_AFTER_S / 2)


def use(worker: Worker, seconds: float) -> tuple[float, float]:
    """Call each breaker in turn, and return the CPU time of process and listener, in milliseconds per second."""
    made, began, cpu, own_cpu = 0, time.monotonic(), time.process_time(), time.thread_time()
    while time.monotonic() < began + seconds and not worker.dismissed:
        _breakers[made % len(_breakers)].call(str)
        made += 1
        time.sleep(max(0.0, began + made / CALLS_PER_SECOND - time.monotonic()))
    lasted, used, own = time.monotonic() - began, time.process_time() - cpu, time.thread_time() - own_cpu
    return used / lasted * 1000, (used - own) / lasted * 1000


def test_cpu_of_armed_circuits(
    quick: bool, server: PrivateServer, tmp_path: Path, show: Callable[[str], None], bounds: Bounds
) -> None:
    """The processes run at the same time.  A full run lasts as long as the interval in which each circuit is read."""
    # Each armed circuit is read again after 30 seconds.
    seconds = 2.0 if quick else 30.0
    spec = Spec("ours", server.unix_socket, str(tmp_path / "armed"))
    with Fleet([spec] * (2 * PROCESSES)) as fleet:
        few, many = fleet.workers[:PROCESSES], fleet.workers[PROCESSES:]
        for workers, circuits in ((few, FEW), (many, MANY)):
            for worker in workers:
                worker.begin(begin_use, circuits)
        for worker in fleet.workers:
            worker.result()
        for worker in fleet.workers:
            worker.begin(use, seconds)
        results = [[worker.result(2 * seconds + 30) for worker in workers] for workers in (few, many)]
    used = [Spread.of(whole for whole, _ in result) for result in results]
    listeners = [Spread.of(listener for _, listener in result) for result in results]
    rows = [
        [f"{circuits:,}", str(whole), str(listener)]
        for circuits, whole, listener in zip((FEW, MANY), used, listeners, strict=True)
    ]
    show(
        table(
            "CPU time of a process with quiet circuits, milliseconds per second",
            ["circuits", "process", "its listener"],
            rows,
            f"{CALLS_PER_SECOND:.0f} calls per second in each process, {PROCESSES} processes of each kind, "
            f"{seconds:.0f} s.",
        )
    )
    # Calls cost the same in all processes, and their number makes the figures of whole processes imprecise.
    more = listeners[1].median - listeners[0].median
    bounds.at_most(f"{MANY:,} circuits more than {FEW}, ms/s", more, LIMIT_MS)
    bounds.check(f"CPU time of a listener: {short(listeners[0].median)} ms/s with one circuit")
