"""Benchmark: time of a failing call, and the caller's CPU time, relative to pybreaker's storage in Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks.bounds import Bounds
from benchmarks.calls import Action, Entrant, race_of
from benchmarks.clients import LINES, Line
from benchmarks.contenders import OUR_BREAKER, OUR_STORAGE, STOCK, Contender
from benchmarks.figures import Spread, ratio, short, table
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support import servers

#: Most time and most CPU time of the caller, relative to `STOCK`.
LIMITS: dict[Contender, tuple[float, float]] = {OUR_BREAKER: (0.5, 0.6), OUR_STORAGE: (0.8, 0.9)}

#: Contenders in the order of the rounds.
TAKING_TURNS = (STOCK, *LIMITS)


@pytest.fixture
def open_server() -> Iterator[PrivateServer]:
    """Yield a server with a port and a unix socket."""
    with PrivateServer(servers.at_hand()[0].binary, port=free_port()) as server:
        yield server


def race(line: Line, server: PrivateServer, rounds: int, leg: float) -> dict[str, Entrant]:
    """Return the contenders after rounds of failing calls on one line."""
    runners: list[tuple[Contender, Action]] = [(item, "failure") for item in TAKING_TURNS]
    with race_of(runners, server, leg=leg, connect=line.connect_to(server)) as turns:
        for _ in range(rounds):
            turns.round()
    return {item.name: item for item in turns.entrants}


def test_failing_calls(quick: bool, open_server: PrivateServer, show: Callable[[str], None], bounds: Bounds) -> None:
    """The function fails at once, so the time of a call is the breaker's and the server's.  No failure opens."""
    rounds, leg = (5, 0.02) if quick else (60, 0.05)
    rows = []
    columns = [f"{item.name}: {what}" for item in LIMITS for what in ("time", "CPU")]
    for line in (line for line in LINES if not line.missing()):
        made = race(line, open_server, rounds, leg)
        stock = made[STOCK.name]
        row = [str(line), *(f"{short(Spread.of(of).median * 1e6)} µs" for of in (stock.seconds, stock.cpu_seconds))]
        for contender, limits in LIMITS.items():
            own = made[contender.name]
            ratios = ratio(own.seconds, stock.seconds), ratio(own.cpu_seconds, stock.cpu_seconds)
            row += map(str, ratios)
            for what, of, limit in zip(("time", "caller's CPU"), ratios, limits, strict=True):
                bounds.at_most(f"{contender.name}: {what}, {line}", of.median, limit)
        rows.append(row)
    show(
        table(
            f"A failing call, relative to pybreaker, Redis; medians, in brackets the middle half of {rounds} rounds",
            ["", f"{STOCK.name}: time", "CPU", *columns],
            rows,
            "CPU is the CPU time of the calling thread.",
        )
    )
    bounds.check("A failing call, relative to pybreaker, Redis")
