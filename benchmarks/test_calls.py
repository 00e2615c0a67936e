"""Benchmark: time of a guarded call, relative to pybreaker's memory storage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.calls import ACTIONS, Action, Entrant, Race, entrant
from benchmarks.contenders import REFERENCE, at_hand
from benchmarks.figures import Spread, short, table
from pybreaker_redis.testing.servers import PrivateServer


@pytest.mark.parametrize("threads", [1, 8], ids=["one-thread", "eight-threads"])
def test_guarded_calls(
    threads: int, quick: bool, server: PrivateServer, benchmark: Any, show: Callable[[str], None]
) -> None:
    """The dependency does nothing, so the time of a call is the breaker's.  Threads share one circuit of each kind."""
    rounds, leg = (5, 0.005) if quick else (40, 0.02)
    with contextlib.ExitStack() as stack:
        entrants = [stack.enter_context(entrant(item, action, server)) for action in ACTIONS for item in at_hand()]
        race = stack.enter_context(Race(entrants, threads=threads, leg=leg))
        benchmark.pedantic(race.round, rounds=rounds, warmup_rounds=0)
    ratios = {(item.name, item.action): compared(item, entrants) for item in entrants}
    benchmark.extra_info.update({", ".join(of): asdict(ratio) for of, ratio in ratios.items()})
    show(summary(threads, entrants, ratios))


def reference_of(item: Entrant, entrants: list[Entrant]) -> Entrant:
    """Return the entrant of the reference with the same action."""
    return next(other for other in entrants if (other.name, other.action) == (REFERENCE.name, item.action))


def compared(item: Entrant, entrants: list[Entrant]) -> Spread:
    """Return the ratio of an entrant's time to the time of the reference in the same round."""
    reference = reference_of(item, entrants)
    return Spread.of(own / other for own, other in zip(item.seconds, reference.seconds, strict=True))


def summary(threads: int, entrants: list[Entrant], ratios: dict[tuple[str, Action], Spread]) -> str:
    """Return the table for one number of threads."""
    rows = [
        [f"{REFERENCE.name} (= 1)", *("1" for _ in ACTIONS)],
        *(
            [item.name, *(str(ratios[item.name, action]) for action in ACTIONS)]
            for item in at_hand()
            if item is not REFERENCE
        ),
    ]
    microseconds = ", ".join(
        f"{short(Spread.of(item.seconds).median * 1e6)} µs ({item.action})"
        for item in entrants
        if item.name == REFERENCE.name
    )
    what = "one thread" if threads == 1 else f"{threads} threads that share the circuit: wall time over all their calls"
    return table(
        f"Time of a guarded call, {what}; medians, in brackets the middle half of {len(entrants[0].seconds)} rounds",
        ["", *ACTIONS],
        rows,
        f"1 is {microseconds}.",
    )
