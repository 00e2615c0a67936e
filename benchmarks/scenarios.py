"""Fleets through failures of their dependency: ``python -m benchmarks.scenarios``.

Eight processes with eight threads each call one dependency.  It fails in four ways: suddenly, gradually, now and then,
and by slowness.  Each run has a private server.  Half of each run is healthy.  ``--quick`` takes seconds.

The compared ways are pybreaker's breaker on its own storage, and our breaker on ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pybreaker

from benchmarks.figures import percentile, short, table
from benchmarks.ways import Way, breaker_on, make_of
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import DependencyDown, Fleet, Spec, Worker
from tests.support.servers import at_hand

#: Processes, and threads of each process.  The threads of a process share a breaker.
PROCESSES, THREADS = 8, 8

#: Compared ways, with their names in the table.
COMPARED: dict[Way, str] = {"stock": "pybreaker", "breaker": "our breaker"}

#: Rules of all breakers: failures in a row, and seconds until a probe.
FAIL_MAX, RESET_TIMEOUT_S = 5, 0.5

#: Duration of a healthy call, of a failing call, and of a slow one, which its caller gives up, in seconds.
HEALTHY_S, FAILING_S, SLOW_S = 0.01, 0.02, 0.2

#: Pause of a thread between two calls, in seconds.
PAUSE_S = 0.04

#: Seconds before the first calls, in which all processes connect and subscribe.
BEGIN_IN_S = 1.5


@dataclass(frozen=True)
class Dependency:
    """State of the dependency at one moment.

    Attributes:
        failing_share: Share of the calls that fail.
        failing_s: Duration of a failing call, in seconds.
    """

    failing_share: float = 0.0
    failing_s: float = FAILING_S


def sudden(progress: float) -> Dependency:
    """All calls fail in the second and third quarter."""
    return Dependency(1.0 if 0.25 <= progress < 0.75 else 0.0)


def gradual(progress: float) -> Dependency:
    """More and more calls fail from the first quarter on, all of them in the middle, and fewer and fewer after it."""
    return Dependency(max(0.0, 1.0 - abs(progress - 0.5) / 0.25))


def oscillating(progress: float) -> Dependency:
    """All calls fail in every other eighth."""
    return Dependency(float(int(progress * 8) % 2))


def slow(progress: float) -> Dependency:
    """Calls hang in the second and third quarter, until their callers give up."""
    return Dependency(1.0 if 0.25 <= progress < 0.75 else 0.0, failing_s=SLOW_S)


#: Scenarios by name: the dependency by the share of the run that is over.
SCENARIOS: dict[str, Callable[[float], Dependency]] = {
    "sudden": sudden,
    "gradual": gradual,
    "oscillating": oscillating,
    "slow": slow,
}


@dataclass(frozen=True)
class Call:
    """One guarded call.

    Attributes:
        seconds: Wait of the caller, in seconds.
        reached: Whether the call reached the dependency.
        is_wasted: Whether the call reached the dependency, and failed there.
        is_success: Whether the call succeeded.
    """

    seconds: float
    reached: bool
    is_wasted: bool
    is_success: bool


def take_part(worker: Worker, way: Way, scenario: str, begin: float, seconds: float) -> list[Call]:
    """Call on several threads from a monotonic time on, and return the calls."""
    breaker = breaker_on(
        worker.storage, way, fail_max=FAIL_MAX, reset_timeout=RESET_TIMEOUT_S, throw_new_error_on_trip=False
    )
    breaker.call(str)
    calls: list[Call] = []
    # A list, because `append` and `extend` need no lock.
    threads = [
        threading.Thread(
            target=lambda seed: calls.extend(_calls_of_thread(breaker, SCENARIOS[scenario], begin, seconds, seed)),
            args=(worker.index * THREADS + number,),
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return calls


def _calls_of_thread(
    breaker: pybreaker.CircuitBreaker,
    dependency_at: Callable[[float], Dependency],
    begin: float,
    seconds: float,
    seed: int,
) -> list[Call]:
    # The same seed makes the same calls fail in all ways.
    dice = random.Random(seed)
    reached = False

    def dependency() -> None:
        nonlocal reached
        reached = True
        now = dependency_at((time.monotonic() - begin) / seconds)
        if dice.random() < now.failing_share:
            time.sleep(now.failing_s)
            raise DependencyDown
        time.sleep(HEALTHY_S)

    calls = []
    time.sleep(max(0.0, begin - time.monotonic()) + dice.random() * PAUSE_S)
    while (began := time.monotonic()) < begin + seconds:
        reached, succeeded = False, False
        with contextlib.suppress(DependencyDown, pybreaker.CircuitBreakerError):
            breaker.call(dependency)
            succeeded = True
        calls.append(Call(time.monotonic() - began, reached, reached and not succeeded, succeeded))
        time.sleep(PAUSE_S)
    return calls


@dataclass(frozen=True)
class Figures:
    """Figures of one run.

    Attributes:
        scenario: Name of the scenario.
        way: Name of the way.
        p50_ms: Median of the callers' waits, in milliseconds.
        p99_ms: 99th percentile of the callers' waits, in milliseconds.
        reached: Calls that reached the dependency.
        wasted: Calls that reached the dependency, and failed there.
        failed_share: Share of the calls that failed or were rejected.
        successes_per_second: Successful calls per second.
    """

    scenario: str
    way: str
    p50_ms: float
    p99_ms: float
    reached: int
    wasted: int
    failed_share: float
    successes_per_second: float


def run(scenario: str, way: Way, seconds: float, directory: Path) -> Figures:
    """Run one fleet through a scenario, and return its figures."""
    with PrivateServer(at_hand()[0].binary) as server:
        spec = Spec(make_of(way), server.unix_socket, str(directory / f"{scenario}-{way}"))
        with Fleet([spec] * PROCESSES) as fleet:
            begin = time.monotonic() + BEGIN_IN_S
            for worker in fleet.workers:
                worker.begin(take_part, way, scenario, begin, seconds)
            calls = [call for worker in fleet.workers for call in worker.result(seconds + 30.0)]
    waits = [call.seconds * 1000 for call in calls]
    successes = sum(call.is_success for call in calls)
    return Figures(
        scenario,
        COMPARED[way],
        percentile(waits, 50),
        percentile(waits, 99),
        sum(call.reached for call in calls),
        sum(call.is_wasted for call in calls),
        1 - successes / len(calls),
        successes / seconds,
    )


def summary(runs: list[Figures], seconds: float) -> str:
    """Return the table of all runs."""
    rows = [
        [
            *(item.scenario, item.way, f"{short(item.p50_ms)} ms", f"{short(item.p99_ms)} ms"),
            *(f"{item.reached:,}", f"{item.wasted:,}"),
            *(f"{item.failed_share:.1%}", f"{item.successes_per_second:,.0f}"),
        ]
        for item in runs
    ]
    return table(
        f"{PROCESSES} processes with {THREADS} threads each, {seconds:.0f} s",
        ["failure", "", "wait, p50", "wait, p99", "at the dependency", "failed there", "no result", "successes per s"],
        rows,
    )


def main() -> None:
    """Run all scenarios both ways, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenarios", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seconds for each run")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    seconds = 2.0 if options.quick else 16.0
    with tempfile.TemporaryDirectory() as directory:
        runs = [run(scenario, way, seconds, Path(directory)) for scenario in SCENARIOS for way in COMPARED]
    print(summary(runs, seconds))
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in runs], indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
