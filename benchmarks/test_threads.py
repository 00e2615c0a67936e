"""Benchmark: throughput of threads that share one breaker, relative to the same calls without a breaker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.bounds import Bounds
from benchmarks.calls import guard_of
from benchmarks.contenders import OUR_BREAKER, OUR_STORAGE, REFERENCE, Contender
from benchmarks.figures import Spread, ratio, short, table
from pybreaker_redis.testing.servers import PrivateServer

#: Threads that share the breaker.
THREADS = 64

#: Duration of a call, in seconds.
CALL_S = 0.05

#: Least throughput of our breaker, relative to no breaker.
THROUGHPUT_MIN = 0.95

#: Contenders with a lock, for which threads take turns: one short round is enough.
TAKING_TURNS: tuple[Contender, ...] = (REFERENCE, OUR_STORAGE)


def dependency() -> None:
    """Succeed after `CALL_S`."""
    time.sleep(CALL_S)


def throughput(crew: ThreadPoolExecutor, call: Callable[[], Any], calls: int) -> float:
    """Return the calls per second of all threads.

    Args:
        crew: The threads.
        call: Function that makes one call.
        calls: Number of calls of each thread.
    """
    start = threading.Barrier(THREADS + 1)

    def run() -> None:
        start.wait()
        for _ in range(calls):
            call()

    running = [crew.submit(run) for _ in range(THREADS)]
    start.wait()
    began = time.perf_counter()
    for each in running:
        each.result()
    return THREADS * calls / (time.perf_counter() - began)


def test_throughput_of_threads(quick: bool, server: PrivateServer, show: Callable[[str], None], bounds: Bounds) -> None:
    """The unguarded calls and those of our breaker take turns.  The others have one round."""
    rounds, calls = (3, 4) if quick else (15, 20)
    with ThreadPoolExecutor(THREADS) as crew, contextlib.ExitStack() as stack:
        guarded = {
            item: stack.enter_context(guard_of(item, server.client)).around(dependency)
            for item in (OUR_BREAKER, *TAKING_TURNS)
        }
        guarded[OUR_BREAKER]()
        unguarded, ours = [], []
        for _ in range(rounds):
            unguarded.append(throughput(crew, dependency, calls))
            ours.append(throughput(crew, guarded[OUR_BREAKER], calls))
        single = {item.name: throughput(crew, guarded[item], 1) for item in TAKING_TURNS}
    relative = ratio(ours, unguarded)
    median = Spread.of(unguarded).median
    rows = [
        ["no breaker", short(median), "1"],
        [OUR_BREAKER.name, short(Spread.of(ours).median), str(relative)],
        *([name, short(value), short(value / median)] for name, value in single.items()),
    ]
    show(
        table(
            f"Calls per second of {THREADS} threads that share a breaker, calls of {CALL_S * 1000:.0f} ms",
            ["", "calls per second", "relative"],
            rows,
            f"Medians of {rounds} rounds. Breakers that take turns have one round.",
        )
    )
    bounds.at_most("time of a call, relative to no breaker", 1 / relative.median, 1 / THROUGHPUT_MIN)
    bounds.check(f"{THREADS} threads, one breaker")
