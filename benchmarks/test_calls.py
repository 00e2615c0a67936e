"""Benchmark: time of a guarded call, relative to pybreaker's memory storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.bounds import Bounds
from benchmarks.calls import ACTIONS, Action, Entrant, race_of
from benchmarks.contenders import HEARD, OUR_BREAKER, OUR_STORAGE, REFERENCE, Contender, at_hand
from benchmarks.figures import Spread, ratio, short, table
from pybreaker_redis.testing.servers import PrivateServer

#: Most time of a call in one thread, relative to the same call of `REFERENCE`.
LIMITS: dict[tuple[Contender, Action], float] = {
    (OUR_BREAKER, "success"): 0.5,
    (OUR_BREAKER, "rejected"): 1.0,
    (HEARD, "success"): 0.7,
    (OUR_STORAGE, "success"): 1.25,
}


@pytest.mark.parametrize("threads", [1, 8], ids=["one-thread", "eight-threads"])
def test_guarded_calls(  # noqa: PLR0917 (fixtures)
    threads: int, quick: bool, server: PrivateServer, benchmark: Any, show: Callable[[str], None], bounds: Bounds
) -> None:
    """The dependency does nothing, so the time of a call is the breaker's.  Threads share one circuit of each kind."""
    rounds, leg = (5, 0.005) if quick else (40, 0.02)
    runners = [(item, action) for action in ACTIONS for item in at_hand()]
    with race_of(runners, server, threads=threads, leg=leg) as race:
        benchmark.pedantic(race.round, rounds=rounds, warmup_rounds=0)
    entrants = race.entrants
    ratios = {(item.name, item.action): compared(item, entrants) for item in entrants}
    benchmark.extra_info.update({", ".join(of): asdict(ratio) for of, ratio in ratios.items()})
    show(summary(threads, entrants, ratios))
    if threads == 1:
        for (contender, action), limit in LIMITS.items():
            bounds.at_most(f"{contender.name}: {action}", ratios[contender.name, action].median, limit)
        bounds.check("Time of a call, relative to pybreaker in memory")


def reference_of(item: Entrant, entrants: list[Entrant]) -> Entrant:
    """Return the entrant of the reference with the same action."""
    return next(other for other in entrants if (other.name, other.action) == (REFERENCE.name, item.action))


def compared(item: Entrant, entrants: list[Entrant]) -> Spread:
    """Return the ratio of an entrant's time to the time of the reference in the same round."""
    return ratio(item.seconds, reference_of(item, entrants).seconds)


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
