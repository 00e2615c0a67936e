"""Benchmark: lag of an event loop with tasks that share one breaker, with Redis, without, and while Redis is frozen."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pybreaker_redis
from benchmarks.bounds import Bounds
from benchmarks.calls import Down
from benchmarks.contenders import NEVER
from benchmarks.figures import percentile, short, table
from pybreaker_redis.testing.servers import PrivateServer

#: Tasks that share the breaker.
TASKS = 1000

#: Mean duration of a call, in seconds.  Durations differ by half, so that tasks that waited together part again.
CALL_S = 0.5

#: Seconds between two cancellations of a task, each of which is replaced by a new one.
CANCEL_EVERY_S = 1.0

#: Seconds between two looks at the loop.
LOOK_EVERY_S = 0.002

#: Most additional lag by Redis at the 99th percentile, in seconds.
LAG_LIMIT_S = 0.005

#: Place of the circuit.
Place = Literal["in memory", "in Redis", "Redis frozen"]
PLACES: tuple[Place, ...] = ("in memory", "in Redis", "Redis frozen")


@dataclass
class Run:
    """Tasks on one event loop.

    Attributes:
        breaker: Breaker of all tasks.
        failing_every: Number of calls of which one fails.  0: none.
        calls: Number of calls so far.
        dice: Source of the durations, the same in each run.
    """

    breaker: pybreaker_redis.CircuitBreaker
    failing_every: int
    calls: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    async def dependency(self) -> None:
        """Answer after `CALL_S`, on average."""
        await asyncio.sleep(self.dice.uniform(0.5, 1.5) * CALL_S)
        self.calls += 1
        if self.failing_every and self.calls % self.failing_every == 0:
            raise Down

    async def caller(self, delay: float) -> None:
        """Call until this task is cancelled."""
        await asyncio.sleep(delay)
        while True:
            with contextlib.suppress(Down):
                await self.breaker.acall(self.dependency)

    async def lags(self, seconds: float, lose_redis: Callable[[], None]) -> list[float]:
        """Return by how much the loop was late at each look, in seconds.

        Args:
            seconds: Duration of the measurement.
            lose_redis: Function that is called after a third of that time.
        """
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self.caller(number * CALL_S / TASKS)) for number in range(TASKS)]
        await asyncio.sleep(2 * CALL_S)
        late: list[float] = []
        began = loop.time()
        cancel_at, lose_at = began + CANCEL_EVERY_S, began + seconds / 3
        while (now := loop.time()) < began + seconds:
            if now >= cancel_at:
                tasks.pop(0).cancel()
                tasks.append(asyncio.create_task(self.caller(0.0)))
                cancel_at += CANCEL_EVERY_S
            if now >= lose_at:
                lose_redis()
                lose_at = began + seconds
            before = loop.time()
            await asyncio.sleep(LOOK_EVERY_S)
            late.append(loop.time() - before - LOOK_EVERY_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return late


def measure(
    place: Place, server: PrivateServer, failing_every: int, seconds: float, name: str
) -> tuple[Run, list[float]]:
    """Return the run with the circuit in a place, and the lags of its loop."""
    with contextlib.closing(server.client()) as client:
        where = {} if place == "in memory" else {"redis": client}
        run = Run(pybreaker_redis.CircuitBreaker(fail_max=NEVER, name=name, **where), failing_every)
        run.breaker.call(str)
        gc.collect()
        try:
            lose = server.pause if place == "Redis frozen" else lambda: None
            return run, asyncio.run(run.lags(seconds, lose))
        finally:
            server.resume()


def test_lag_of_the_event_loop(quick: bool, server: PrivateServer, show: Callable[[str], None], bounds: Bounds) -> None:
    """One task is cancelled per second.  The server freezes after a third of a run."""
    seconds, rounds = (1.0, 1) if quick else (4.0, 2)
    rows = []
    for failing_every in (0, 100):
        lags: dict[Place, list[float]] = {place: [] for place in PLACES}
        calls = dict.fromkeys(PLACES, 0)
        for number in range(rounds):
            for place in PLACES:
                run, late = measure(place, server, failing_every, seconds, f"loop-{failing_every}-{number}-{place}")
                lags[place] += late
                calls[place] += run.calls
        what = f"1 of {failing_every} calls fails" if failing_every else "no call fails"
        for place in PLACES:
            values = (percentile(lags[place], percent) * 1000 for percent in (50, 99, 100))
            rows.append([what, place, f"{calls[place] / rounds / (seconds + 2 * CALL_S):,.0f}", *map(short, values)])
            if place != "in memory":
                more = percentile(lags[place], 99) - percentile(lags["in memory"], 99)
                bounds.at_most(f"p99, {place}, {what}", more * 1000, LAG_LIMIT_S * 1000)
    show(
        table(
            f"Lag of an event loop with {TASKS:,} tasks, milliseconds",
            ["", "circuit", "calls per second", "p50", "p99", "max"],
            rows,
            f"A look each {LOOK_EVERY_S * 1000:.0f} ms, {rounds} runs of {seconds:.0f} s in turn, calls of {CALL_S} s.",
        )
    )
    bounds.check("Additional lag of the event loop by Redis, milliseconds")
