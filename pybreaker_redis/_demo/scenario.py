"""What happens in the demo, act by act, and what each act promises.

Knows: the story.  Does not know: processes, pipes, the terminal.

An act is a function of the stage.  It makes something happen, waits for what must follow, and notes what it measured;
one more act is one more entry in :data:`ACTS`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pybreaker_redis._demo.stage import FAIL_MAX, WORKERS, BrokenPromise

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybreaker_redis._demo.stage import Stage


@dataclass(frozen=True)
class Act:
    """A part of the demo."""

    #: Shown when it begins.
    title: str
    #: Makes it happen.
    play: Callable[[Stage], None]


def healthy(stage: Stage) -> None:
    """All calls succeed."""
    stage.until(
        "every worker's calls succeed",
        lambda: stage.each_worker("success", since=0.0, times=3),
        at_least=stage.seconds / 5,
    )


def outage(stage: Stage) -> None:
    """The failures of all workers add up; once the circuit is open, all workers reject."""
    stage.switch("down")
    trip = stage.until("the circuit opens", lambda: stage.seen("state", state="open"))[0]
    rejections = stage.until(
        "every worker rejects calls",
        lambda: stage.each_worker("rejected", since=trip.at),
        at_least=stage.seconds * 2 / 5,
    )
    stage.note("from trip to the last worker's first rejection", _ms(max(e.at for e in rejections) - trip.at))
    failed = statistics.median(e.took for e in stage.seen("failure"))
    rejected = statistics.median(e.took for e in stage.seen("rejected"))
    stage.note("a call that failed took", _ms(failed))
    stage.note("a call that was rejected took", _ms(rejected))
    stage.note("calls rejected", str(len(stage.seen("rejected"))))


def recovery(stage: Stage) -> None:
    """One call at a time tries the dependency; when it succeeds, all workers go on."""
    up = stage.switch("up")
    successes = stage.until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=stage.seconds / 5,
        expected=stage.reset_timeout,
    )
    probes = stage.seen("state", state="half-open")
    stage.note("calls that reached the dead dependency", str(len(stage.seen("reached", state="down"))))
    stage.note(f"probes that {WORKERS} workers let through", str(len(probes)))
    stage.note(
        f"from recovery to the last worker's first success (reset_timeout {stage.reset_timeout:g} s)",
        f"{max(e.at for e in successes) - up.at:.2f} s",
    )
    # After a probe that fails the circuit is open for another reset_timeout: what comes sooner is a second probe.
    if any(later.at - earlier.at < stage.reset_timeout / 2 for earlier, later in pairwise(probes)):
        raise BrokenPromise(f"more than one probe at a time: {', '.join(e.source for e in probes)}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


ACTS = (
    Act("the dependency is healthy", healthy),
    Act(f"the dependency dies: {FAIL_MAX} failures, counted over all workers, open the circuit for all", outage),
    Act("the dependency is back: one probe closes the circuit for all", recovery),
)
