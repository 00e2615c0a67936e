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

from pybreaker_redis.cli.demo.stage import FAIL_MAX, WORKERS, BrokenPromise
from pybreaker_redis.cli.demo.worker import CALL_TIMEOUT_S, PROBE_LEASE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybreaker_redis.cli.demo.stage import Stage


@dataclass(frozen=True)
class Act:
    """A part of the demo."""

    #: Shown when it begins.
    title: str
    #: Makes it happen.
    play: Callable[[Stage], None]
    #: Left out where the server is not ours.
    kills_server: bool = False


def healthy(stage: Stage) -> None:
    """All calls succeed."""
    stage.until(
        "every worker's calls succeed",
        lambda: stage.each_worker("success", since=0.0, times=3),
        at_least=stage.beat,
    )


def outage(stage: Stage) -> None:
    """The failures of all workers add up; once the circuit is open, all workers reject."""
    stage.switch("down")
    trip = stage.until("the circuit opens", lambda: stage.seen("state", state="open"))[0]
    rejections = stage.until(
        "every worker rejects calls",
        lambda: stage.each_worker("rejected", since=trip.at),
        at_least=2 * stage.beat,
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
        at_least=1.5 * stage.beat,
        expected=stage.reset_timeout,
    )
    # Each process tells of its own, and is heard when the machine finds the time.
    probes = sorted(stage.seen("state", state="half-open"), key=lambda event: event.at)
    stage.note("calls that reached the dead dependency", str(len(stage.seen("reached", state="down"))))
    stage.note(f"probes that {WORKERS} workers let through", str(len(probes)))
    stage.note(
        f"from recovery to the last worker's first success (reset_timeout {stage.reset_timeout:g} s)",
        _s(max(e.at for e in successes) - up.at),
    )
    # After a probe that fails the circuit is open for another reset_timeout: what comes sooner is a second probe.
    if any(later.at - earlier.at < stage.reset_timeout / 2 for earlier, later in pairwise(probes)):
        raise BrokenPromise(f"more than one probe at a time: {', '.join(e.source for e in probes)}")


def prober_killed(stage: Stage) -> None:
    """Who tries the dependency dies while doing so; another worker tries, and no two ever do at the same time."""
    hanging = stage.switch("hanging")
    trip = stage.until("the circuit opens", lambda: stage.seen("state", state="open", since=hanging.at))[0]
    rejections = stage.until("every worker rejects calls", lambda: stage.each_worker("rejected", since=trip.at))
    # From here on no call is on its way that the closed circuit has let through.
    noticed = max(e.at for e in rejections)
    probe = stage.until(
        "one worker's call reaches the dependency that hangs",
        # Who has waited for most of its patience may have given up before it is killed.
        lambda: stage.seen("reached", since=noticed, within=CALL_TIMEOUT_S / 2),
        expected=stage.reset_timeout,
    )[0]
    killed = stage.replace(probe.caller)
    again = stage.until(
        "another worker's call reaches the dependency",
        lambda: stage.seen("reached", since=killed.at),
        expected=PROBE_LEASE_S,
    )[0]
    stage.until("that call fails", lambda: stage.seen("failure", source=again.caller, since=again.at))
    up = stage.switch("up")
    stage.until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=2 * stage.beat,
        expected=stage.reset_timeout,
    )
    # The first call that was answered has closed the circuit.
    closed = stage.seen("left", state="up", since=up.at)[0].at
    crowd = _most_at_once(stage, noticed, closed)
    stage.note(f"from the prober's death to the next probe (probe_lease {PROBE_LEASE_S:g} s)", _s(again.at - killed.at))
    stage.note("calls at the dependency at the same time, until the circuit closed", f"{crowd} at the most")
    if stage.seen("failure", source=probe.caller, since=probe.at):
        raise BrokenPromise("the prober was to be killed in the middle of its call; that was over (a busy machine?)")
    # It asked for the probe after its last rejection, and had it for the whole lease.
    asked = max(e.at for e in stage.seen("rejected", source=probe.caller) if e.at < probe.at)
    if again.at < asked + PROBE_LEASE_S:
        raise BrokenPromise("another worker took over before the lease of the dead prober had run out")
    if crowd != 1:
        raise BrokenPromise(f"{crowd} calls were at the dependency at the same time")


def server_killed(stage: Stage) -> None:
    """The server dies, and so does the dependency: each worker protects itself; when the server is back all agree."""
    killed = stage.kill_server()
    stage.switch("down")
    alone = stage.until("every worker rejects calls", lambda: stage.each_worker("rejected", since=killed.at))
    stage.until(
        "every worker tries the dependency for itself",
        lambda: stage.each_worker("failure", since=max(e.at for e in alone)),
        expected=stage.reset_timeout,
    )
    started = stage.start_server()
    back = stage.until("every worker finds the server back", lambda: stage.each_worker("back", since=killed.at))
    # With this rejection, whatever a worker's own circuit has let through is over.
    together = stage.until(
        "every worker rejects calls by what all share",
        lambda: stage.each_worker("rejected", since=max(e.at for e in back)),
        expected=stage.reset_timeout,
    )
    agreed = max(e.at for e in together)
    stage.until("the circuit is open in the server, for all", lambda: stage.recorded("open"))
    stage.until(
        "one worker tries the dependency for all",
        lambda: stage.seen("failure", since=agreed),
        at_least=stage.beat / 2,
        expected=stage.reset_timeout,
    )
    up = stage.switch("up")
    stage.until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=1.5 * stage.beat,
        expected=stage.reset_timeout,
    )
    closed = stage.seen("left", state="up", since=up.at)[0].at
    crowd = _most_at_once(stage, agreed, closed)

    calls = [e for kind in ("success", "failure", "rejected") for e in stage.seen(kind, since=killed.at)]
    guards = [_guard(stage, name, killed.at, started.at) for name in stage.names]
    reached, bound = sum(guard.reached for guard in guards), sum(guard.bound for guard in guards)
    stage.note("slowest call while the server was away", _ms(max(e.took for e in calls if e.at < started.at)))
    stage.note(
        f"calls that reached the dead dependency meanwhile ({FAIL_MAX} of each worker, and one per reset_timeout)",
        f"{reached}, of {bound} at the most",
    )
    stage.note("from the start of the empty server until all workers went by one open circuit", _s(agreed - started.at))
    stage.note("calls at the dependency at the same time, from then until that circuit closed", f"{crowd} at the most")
    for guard in guards:
        if guard.unhindered > FAIL_MAX:
            raise BrokenPromise(f"{guard.worker} made {guard.unhindered} calls by itself before it rejected one")
        if guard.reached > guard.bound:
            raise BrokenPromise(f"{guard.worker} tried the dead dependency more often than once per reset_timeout")
    for call in calls:
        if started.at < call.at <= agreed and call.state == "closed":
            raise BrokenPromise(
                f"{call.source} had opened its circuit, and went by a closed one when the server was back"
            )
    if crowd != 1:
        raise BrokenPromise(f"{crowd} calls were at the dependency at the same time, after all workers had agreed")


@dataclass(frozen=True)
class WorkerProtection:
    """How a worker guarded the dead dependency while it was alone."""

    worker: str
    #: Its calls that reached the dependency.
    reached: int
    #: Those of them that did so before it rejected one.
    unhindered: int
    #: How many may have reached it.
    bound: int


def _guard(stage: Stage, worker: str, since: float, until: float) -> WorkerProtection:
    reached = [e.at for e in stage.seen("reached", state="down", since=since) if e.caller == worker and e.at < until]
    rejected = stage.seen("rejected", source=worker, since=since)[0].at
    # The call that opened its circuit cannot have done so before it began.
    failures = [e.at - e.took for e in stage.seen("failure", source=worker, since=since) if e.at < rejected]
    open_for = until - max(failures, default=since)
    bound = FAIL_MAX + int(open_for / stage.reset_timeout)
    return WorkerProtection(worker, len(reached), sum(at < rejected for at in reached), bound)


def _most_at_once(stage: Stage, since: float, until: float) -> int:
    there = most = 0
    for event in sorted(stage.seen("reached") + stage.seen("left"), key=lambda e: e.at):
        there += 1 if event.kind == "reached" else -1
        if since <= event.at <= until:
            most = max(most, there)
    return most


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


ACTS = (
    Act("the dependency is healthy", healthy),
    Act(f"the dependency dies: {FAIL_MAX} failures, counted over all workers, open the circuit for all", outage),
    Act("the dependency is back: one probe closes the circuit for all", recovery),
    Act("it hangs, and the worker that probes it is killed: another takes over, one call at a time", prober_killed),
    Act(
        "server and dependency are dead: each worker protects itself; an empty server comes back: all agree again",
        server_killed,
        kills_server=True,
    ),
)
