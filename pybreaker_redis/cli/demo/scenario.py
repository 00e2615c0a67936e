"""Acts of the demo, and the promise that each of them checks.

An act is a function of the stage.  The act causes an event, waits for its consequences, and records what it measured.
A new act is a function and an entry of `ACTS`.
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
    """Part of the demo.

    Attributes:
        title: Text that is shown when the act begins.
        play: Function that plays the act.
        kills_server: Whether the act kills the server.  Such an act is skipped on a server of the user.
    """

    title: str
    play: Callable[[Stage], None]
    kills_server: bool = False


def healthy(stage: Stage) -> None:
    """Show that all calls succeed."""
    stage.wait_until(
        "every worker's calls succeed",
        lambda: stage.each_worker("success", since=0.0, times=3),
        at_least=stage.beat,
    )


def outage(stage: Stage) -> None:
    """Show that the failures of all workers are counted together, and that all workers reject once it is open."""
    stage.switch("down")
    trip = stage.wait_until("the circuit opens", lambda: stage.seen("state", state="open"))[0]
    rejections = stage.wait_until(
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
    """Show that one call at a time probes the dependency, and that its success admits the calls of all workers.

    Raises:
        BrokenPromise: Two probes were admitted within one reset timeout.
    """
    up = stage.switch("up")
    successes = stage.wait_until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=1.5 * stage.beat,
        expected=stage.reset_timeout,
    )
    # Each process reports its own events, and a busy machine delivers them late.
    probes = sorted(stage.seen("state", state="half-open"), key=lambda event: event.at)
    stage.note("calls that reached the dead dependency", str(len(stage.seen("reached", state="down"))))
    stage.note(f"probes that {WORKERS} workers let through", str(len(probes)))
    stage.note(
        f"from recovery to the last worker's first success (reset_timeout {stage.reset_timeout:g} s)",
        _s(max(e.at for e in successes) - up.at),
    )
    # After a failed probe the circuit is open for another reset_timeout.  An earlier probe is a second one.
    if any(later.at - earlier.at < stage.reset_timeout / 2 for earlier, later in pairwise(probes)):
        raise BrokenPromise(f"more than one probe at a time: {', '.join(e.source for e in probes)}")


def prober_killed(stage: Stage) -> None:
    """Kill the worker that probes the dependency, and show that another worker probes after it, one at a time.

    Raises:
        BrokenPromise: Another worker probed before the lease ended, or two calls reached the dependency at once.
    """
    hanging = stage.switch("hanging")
    trip = stage.wait_until("the circuit opens", lambda: stage.seen("state", state="open", since=hanging.at))[0]
    rejections = stage.wait_until("every worker rejects calls", lambda: stage.each_worker("rejected", since=trip.at))
    # From here on no call is under way that the closed circuit admitted.
    noticed = max(e.at for e in rejections)
    probe = stage.wait_until(
        "one worker's call reaches the dependency that hangs",
        # A probe that is older than this may reach its timeout before the kill.
        lambda: stage.seen("reached", since=noticed, within=CALL_TIMEOUT_S / 2),
        expected=stage.reset_timeout,
    )[0]
    killed = stage.replace(probe.caller)
    again = stage.wait_until(
        "another worker's call reaches the dependency",
        lambda: stage.seen("reached", since=killed.at),
        expected=PROBE_LEASE_S,
    )[0]
    stage.wait_until("that call fails", lambda: stage.seen("failure", source=again.caller, since=again.at))
    up = stage.switch("up")
    stage.wait_until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=2 * stage.beat,
        expected=stage.reset_timeout,
    )
    # The first call that was answered closed the circuit.
    closed = stage.seen("left", state="up", since=up.at)[0].at
    crowd = _most_at_once(stage, noticed, closed)
    stage.note(f"from the prober's death to the next probe (probe_lease {PROBE_LEASE_S:g} s)", _s(again.at - killed.at))
    stage.note("calls at the dependency at the same time, until the circuit closed", f"{crowd} at the most")
    if stage.seen("failure", source=probe.caller, since=probe.at):
        raise BrokenPromise("the call of the prober ended before the prober was killed (a busy machine?)")
    # The prober claimed the probe after its last rejection, and held it for the whole lease.
    claimed = max(e.at for e in stage.seen("rejected", source=probe.caller) if e.at < probe.at)
    if again.at < claimed + PROBE_LEASE_S:
        raise BrokenPromise("another worker took over before the lease of the dead prober had run out")
    if crowd != 1:
        raise BrokenPromise(f"{crowd} calls were at the dependency at the same time")


def server_killed(stage: Stage) -> None:
    """Kill the server while the dependency is dead, and show that workers protect the dependency and agree later.

    Raises:
        BrokenPromise: A worker made too many calls alone, or the workers did not agree after the server's return.
    """
    killed = stage.kill_server()
    stage.switch("down")
    alone = stage.wait_until("every worker rejects calls", lambda: stage.each_worker("rejected", since=killed.at))
    stage.wait_until(
        "every worker probes the dependency by its local circuit",
        lambda: stage.each_worker("failure", since=max(e.at for e in alone)),
        expected=stage.reset_timeout,
    )
    started = stage.start_server()
    returned = stage.wait_until(
        "every worker reaches the server again", lambda: stage.each_worker("returned", since=killed.at)
    )
    # After this rejection no call is under way that a local circuit admitted.
    together = stage.wait_until(
        "every worker rejects calls by the shared circuit",
        lambda: stage.each_worker("rejected", since=max(e.at for e in returned)),
        expected=stage.reset_timeout,
    )
    agreed = max(e.at for e in together)
    stage.wait_until("the circuit is open in the server, for all", lambda: stage.recorded("open"))
    stage.wait_until(
        "one worker probes the dependency for all",
        lambda: stage.seen("failure", since=agreed),
        at_least=stage.beat / 2,
        expected=stage.reset_timeout,
    )
    up = stage.switch("up")
    stage.wait_until(
        "every worker's calls succeed again",
        lambda: stage.each_worker("success", since=up.at),
        at_least=1.5 * stage.beat,
        expected=stage.reset_timeout,
    )
    closed = stage.seen("left", state="up", since=up.at)[0].at
    crowd = _most_at_once(stage, agreed, closed)

    calls = [e for kind in ("success", "failure", "rejected") for e in stage.seen(kind, since=killed.at)]
    protections = [_measure_protection(stage, name, killed.at, started.at) for name in stage.names]
    reached, bound = sum(each.reached for each in protections), sum(each.bound for each in protections)
    stage.note("slowest call while the server was unreachable", _ms(max(e.took for e in calls if e.at < started.at)))
    stage.note(
        f"calls that reached the dead dependency meanwhile ({FAIL_MAX} of each worker, and one per reset_timeout)",
        f"{reached}, of {bound} at the most",
    )
    stage.note("from the start of the empty server until all workers used one open circuit", _s(agreed - started.at))
    stage.note("calls at the dependency at the same time, from then until that circuit closed", f"{crowd} at the most")
    for each in protections:
        if each.unhindered > FAIL_MAX:
            raise BrokenPromise(f"{each.worker} made {each.unhindered} calls by itself before it rejected one")
        if each.reached > each.bound:
            raise BrokenPromise(f"{each.worker} tried the dead dependency more often than once per reset_timeout")
    for call in calls:
        if started.at < call.at <= agreed and call.state == "closed":
            raise BrokenPromise(
                f"{call.source} had opened its circuit, and used a closed one after the server returned"
            )
    if crowd != 1:
        raise BrokenPromise(f"{crowd} calls were at the dependency at the same time, after all workers had agreed")


@dataclass(frozen=True)
class WorkerProtection:
    """Calls of one worker to the dead dependency while the server was unreachable.

    Attributes:
        worker: Name of the worker.
        reached: Number of its calls that reached the dependency.
        unhindered: Number of these before its first rejection.
        bound: Highest permitted value of `reached`.
    """

    worker: str
    reached: int
    unhindered: int
    bound: int


def _measure_protection(stage: Stage, worker: str, since: float, until: float) -> WorkerProtection:
    reached = [e.at for e in stage.seen("reached", state="down", since=since) if e.caller == worker and e.at < until]
    rejected = stage.seen("rejected", source=worker, since=since)[0].at
    # The call that opened the circuit opened it after its own begin.
    failures = [e.at - e.took for e in stage.seen("failure", source=worker, since=since) if e.at < rejected]
    open_for = until - max(failures, default=since)
    bound = FAIL_MAX + int(open_for / stage.reset_timeout)
    return WorkerProtection(worker, len(reached), sum(at < rejected for at in reached), bound)


def _most_at_once(stage: Stage, since: float, until: float) -> int:
    current = most = 0
    for event in sorted(stage.seen("reached") + stage.seen("left"), key=lambda e: e.at):
        current += 1 if event.kind == "reached" else -1
        if since <= event.at <= until:
            most = max(most, current)
    return most


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


ACTS = (
    Act("the dependency is healthy", healthy),
    Act(f"the dependency dies: {FAIL_MAX} failures, counted over all workers, open the circuit for all", outage),
    Act("the dependency recovers: one probe closes the circuit for all", recovery),
    Act("the dependency hangs, and its prober is killed: another worker probes, one call at a time", prober_killed),
    Act(
        "server and dependency are dead: each worker protects the dependency; then an empty server returns: all agree",
        server_killed,
        kills_server=True,
    ),
)
