"""What does a caller wait for while its dependency dies and comes back?  ``python -m benchmarks.plot OUT.png``.

Knows: fleets, matplotlib.  Does not know: pytest, the other benchmarks.
"""

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

#: The story, seconds from its begin.
DIES, RETURNS, END = 1.0, 2.6, 4.5

#: Of the breakers, seconds.
RESET_TIMEOUT = 1.0

#: What a call takes while the dependency is down, seconds; otherwise it takes no time, so that the breaker's is seen.
DEAD_CALL = 0.02

#: Pause between the calls of a process, seconds.
PAUSE = 0.005

#: What a call can come to, and its colour: such as can be told apart without seeing red and green.
COLOURS = {"success": "#0072b2", "rejected": "#999999", "failure": "#d55e00"}


@dataclass(frozen=True)
class Call:
    """One guarded call.

    Attributes:
        at: When it was made, monotonic seconds.
        seconds: How long the caller waited.
        kind: One of `COLOURS`.
    """

    at: float
    seconds: float
    kind: str


def caller(worker: Worker, begin: float) -> list[Call]:
    """Call from `begin` to the end of the story."""
    reached = False

    def dependency() -> None:
        nonlocal reached
        reached = True
        if DIES <= time.monotonic() - begin < RETURNS:
            time.sleep(DEAD_CALL)
            raise DependencyDown

    calls = []
    # The first calls connect and subscribe; they are no part of the story.
    while time.monotonic() < begin + END and not worker.dismissed:
        reached, kind, began = False, "success", time.monotonic()
        try:
            worker.breaker.call(dependency)
        except (DependencyDown, pybreaker.CircuitBreakerError):
            kind = "failure" if reached else "rejected"
        calls.append(Call(began, time.monotonic() - began, kind))
        time.sleep(PAUSE)
    return [call for call in calls if call.at >= begin]


def story(make: Make, directory: Path) -> list[Call]:
    """All calls of a fleet, by seconds from the begin."""
    with PrivateServer(at_hand()[0].binary) as server:
        spec = Spec(make, server.unix_socket, str(directory / make), reset_timeout=RESET_TIMEOUT)
        with Fleet([spec] * WORKERS) as fleet:
            begin = time.monotonic() + 1.5
            told = fleet.run(caller, begin)
    return [Call(call.at - begin, call.seconds, call.kind) for calls in told for call in calls]


def draw(stories: dict[Make, list[Call]], target: Path) -> None:
    """Both stories, one above the other, in one scale."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(stories), sharex=True, sharey=True, figsize=(10, 7), layout="constrained")
    for panel, (make, calls) in zip(panels, stories.items(), strict=True):
        draw_story(
            panel, calls, f"{STORAGES[make]}, Redis: {count(calls, 'failure')} calls reached the dead dependency"
        )
    panels[-1].set_xlabel("seconds")
    # Both panels have the same, and outside it covers no calls.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(COLOURS))
    figure.suptitle(f"What a guarded call waits: {WORKERS} processes, reset_timeout {RESET_TIMEOUT:.0f} s")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def draw_story(panel: Any, calls: Sequence[Call], title: str) -> None:
    """One panel."""
    panel.axvspan(DIES, RETURNS, color="#d55e00", alpha=0.1, linewidth=0, label="dependency is down")
    for kind, colour in COLOURS.items():
        chosen = [call for call in calls if call.kind == kind]
        waits = [call.seconds * 1000 for call in chosen]
        panel.scatter([call.at for call in chosen], waits, s=9, color=colour, label=kind, linewidth=0)
    panel.set_yscale("log")
    panel.set_ylabel("call, ms")
    panel.set_title(title, loc="left")
    panel.grid(visible=True, alpha=0.3)


def count(calls: Sequence[Call], kind: str) -> int:
    """How many came to this."""
    return sum(call.kind == kind for call in calls)


def main() -> None:
    """Let both storages go through the story, one after the other, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("target", type=Path, help="the picture to write; its suffix names the format")
    target = parser.parse_args().target
    # No window, whatever the machine has.
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as directory:
        draw({make: story(make, Path(directory)) for make in STORAGES}, target)


if __name__ == "__main__":
    main()
