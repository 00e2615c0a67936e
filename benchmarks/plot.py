"""Chart of the waits of guarded calls while a dependency dies and recovers: ``python -m benchmarks.plot OUT.png``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pybreaker

from benchmarks.contenders import STORAGES
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import DependencyDown, Fleet, Make, Spec, Worker
from tests.support.servers import at_hand

#: Processes that share the circuit.
WORKERS = 4

#: Times of the outage, its end and the end of the chart, in seconds from the begin.
DIES_S, RETURNS_S, END_S = 1.0, 2.6, 4.5

#: Reset timeout of the breakers, in seconds.
RESET_TIMEOUT_S = 1.0

#: Duration of a call while the dependency is down, in seconds.  A healthy dependency takes no time.
DEAD_CALL_S = 0.02

#: Pause between the calls of a process, in seconds.
PAUSE_S = 0.005

#: Results of a call and their colours, which are distinct without seeing red and green.
COLOURS = {"success": "#0072b2", "rejected": "#999999", "failure": "#d55e00"}


@dataclass(frozen=True)
class Call:
    """One guarded call.

    Attributes:
        at: Time of the call, in seconds of the monotonic clock.
        seconds: Wait of the caller, in seconds.
        kind: Key of `COLOURS`.
    """

    at: float
    seconds: float
    kind: str


def caller(worker: Worker, begin: float) -> list[Call]:
    """Call in a loop from `begin` to the end of the chart, and return the calls."""
    reached = False

    def dependency() -> None:
        nonlocal reached
        reached = True
        if DIES_S <= time.monotonic() - begin < RETURNS_S:
            time.sleep(DEAD_CALL_S)
            raise DependencyDown

    calls = []
    # The first calls connect and subscribe, and are left out of the chart.
    while time.monotonic() < begin + END_S and not worker.dismissed:
        reached, kind, began = False, "success", time.monotonic()
        try:
            worker.breaker.call(dependency)
        except (DependencyDown, pybreaker.CircuitBreakerError):
            kind = "failure" if reached else "rejected"
        calls.append(Call(began, time.monotonic() - began, kind))
        time.sleep(PAUSE_S)
    return [call for call in calls if call.at >= begin]


def story(make: Make, directory: Path) -> list[Call]:
    """Run a fleet through the outage, and return its calls with times from the begin."""
    with PrivateServer(at_hand()[0].binary) as server:
        spec = Spec(make, server.unix_socket, str(directory / make), reset_timeout=RESET_TIMEOUT_S)
        with Fleet([spec] * WORKERS) as fleet:
            begin = time.monotonic() + 1.5
            results = fleet.run(caller, begin)
    return [Call(call.at - begin, call.seconds, call.kind) for calls in results for call in calls]


def draw(stories: dict[Make, list[Call]], target: Path) -> None:
    """Draw the calls of both storages, one above the other, in one scale."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(stories), sharex=True, sharey=True, figsize=(10, 7), layout="constrained")
    for panel, (make, calls) in zip(panels, stories.items(), strict=True):
        draw_story(
            panel, calls, f"{STORAGES[make]}, Redis: {count(calls, 'failure')} calls reached the dead dependency"
        )
    panels[-1].set_xlabel("seconds")
    # Both panels have the same legend.  Outside of them it covers no calls.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(COLOURS))
    figure.suptitle(f"What a guarded call waits: {WORKERS} processes, reset_timeout {RESET_TIMEOUT_S:.0f} s")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def draw_story(panel: Any, calls: Sequence[Call], title: str) -> None:
    """Draw the calls of one storage."""
    panel.axvspan(DIES_S, RETURNS_S, color="#d55e00", alpha=0.1, linewidth=0, label="dependency is down")
    for kind, colour in COLOURS.items():
        chosen = [call for call in calls if call.kind == kind]
        waits = [call.seconds * 1000 for call in chosen]
        panel.scatter([call.at for call in chosen], waits, s=9, color=colour, label=kind, linewidth=0)
    panel.set_yscale("log")
    panel.set_ylabel("call, ms")
    panel.set_title(title, loc="left")
    panel.grid(visible=True, alpha=0.3)


def count(calls: Sequence[Call], kind: str) -> int:
    """Return the number of calls with a result."""
    return sum(call.kind == kind for call in calls)


def main() -> None:
    """Run both storages through the outage, one after the other, and draw the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("target", type=Path, help="file to write; its suffix selects the format")
    target = parser.parse_args().target
    # The backend Agg needs no display.
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as directory:
        draw({make: story(make, Path(directory)) for make in STORAGES}, target)


if __name__ == "__main__":
    main()
