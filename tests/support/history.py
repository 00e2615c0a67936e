"""Checker of a recorded history: what guarded calls and the shared record did while faults came and went.

The checker is pure: `check` takes a `History` and returns `Problem` objects.  All times are seconds on the monotonic
clock that all processes of one machine share.  `fault_run.py` records histories.  `tests/unit/test_history.py` holds
small histories that break each rule, and some that keep it.

The rules, and the sentences of the README that they follow from:

1. `errors`, `slow_calls`: "No error of Redis reaches a guarded call." "One call of a process waits for Redis, once, for
   ``timeout`` seconds at most."
2. `slow_recoveries`: with Redis and the dependency healthy, every process recovers within `Limits.recovery`.
3. `stolen_leases`, `shared_probes`: "one call tries the dependency, however many workers wait."
4. `local_probes`: the local circuit "recovers by one probe at a time, like the shared one."
5. `generations`: each transition of the shared record raises its generation by one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

HALF_OPEN = "half-open"

Outcome = Literal["ok", "failed", "rejected", "error"]

#: Two times this close are the same, because they come from the monotonic clock by way of the wall clock.  Seconds.
SAME = 0.005

#: An interval of time: begin and end.
Interval = tuple[float, float]


@dataclass(frozen=True)
class Limits:
    """Settings of a circuit, and the bounds that follow from them.  All values are seconds.

    Attributes:
        reset_timeout: As in ``pybreaker.CircuitBreaker``.
        probe_lease: As in ``CircuitRedisStorage``.  The lease is longer than `recovery`, so that a lost one is visible.
        max_staleness: As in ``CircuitRedisStorage``.
        timeout: As in ``CircuitRedisStorage``.
        longest_call: Longest call of the dependency.
        probes: Successful probes that close the circuit.
        slack: Allowance for a busy machine in a recovery.
        call_slack: Allowance for a busy machine in one call.
    """

    reset_timeout: float = 0.4
    probe_lease: float = 5.0
    max_staleness: float = 0.5
    timeout: float = 0.25
    longest_call: float = 0.1
    probes: int = 1
    slack: float = 1.0
    call_slack: float = 0.25

    @property
    def recovery(self) -> float:
        """Longest time from the end of the last fault until every call succeeds.

        The terms of the sum:

        - one `max_staleness` until the next query of Redis, which is the longest pause between two attempts
        - one `max_staleness` until the view is fresh
        - the `timeout` of an attempt under way
        - the rest of the open state, at most `reset_timeout`
        - a probe that began before the dependency was healthy and failed, with the `reset_timeout` after it
        - the probes that succeed, one after the other
        - the slack.

        The `probe_lease` is not in the sum.  In this history no process dies, so every probe reports.
        """
        probing = (1 + self.probes) * self.longest_call
        return 2 * self.max_staleness + self.timeout + self.reset_timeout + probing + self.slack


@dataclass(frozen=True, slots=True)
class Call:
    """One guarded call, as its caller saw it.

    Attributes:
        process: Number of the process.
        thread: Number of the thread's slot in its process.
        circuit: Name of the circuit.
        began: Time at which the call was made.
        ended: Time at which the caller had the outcome.
        outcome: ``ok``, ``failed`` (the dependency's error), ``rejected`` (the breaker's) or ``error`` (any other).
        what: Text of the error.
        reached: Time at which the guarded function began, or ``None`` if it did not.
        left: Time at which the guarded function ended.
        admitted: Name of the breaker's state in the guarded function.
        is_own: Whether the process used its local circuit from before the call until the function began.  ``None``
            after a change.
        own_since: Time since which the process has used its local circuit.
        waited: Seconds for which the thread waited for a processor.
        local: Number of the local circuit that the process used then, or last.  Each has another number.
    """

    process: int
    thread: int
    circuit: str
    began: float
    ended: float
    outcome: Outcome
    what: str = ""
    reached: float | None = None
    left: float | None = None
    admitted: str = ""
    is_own: bool | None = None
    own_since: float = 0.0
    waited: float = 0.0
    local: int = 0

    @property
    def is_probe(self) -> bool:
        """Whether the call reached the dependency through a half-open circuit."""
        return self.reached is not None and self.admitted == HALF_OPEN


@dataclass(frozen=True, slots=True)
class Write:
    """One write of the shared record, as the server executed it.

    Attributes:
        at: Time of the write.
        circuit: Name of the circuit.
        generation: The record's generation.
        state: The record's state.
        token: The probe's token, or empty without a claim.
        until: Time at which the probe's lease ends.
    """

    at: float
    circuit: str
    generation: int
    state: str
    token: str = ""
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss of data: the server was emptied, or restarted with no snapshot or an older one.

    Attributes:
        at: Time of the loss.
        what: Name of the fault.
    """

    at: float
    what: str = ""


@dataclass
class History:
    """Everything that was recorded.

    Attributes:
        began: Time at which everything ran.
        ended: Time at which the first process was stopped.
        limits: Limits by circuit.
        calls: Calls in any order.
        trace: Writes and losses in the order in which the server executed them.
        faults: Intervals with a fault of Redis or of the way to Redis, with the fault's name.
        down: Intervals in which the dependency of a circuit was down, by circuit.
        stalls: Intervals in which some process could not run.
        released: Times at which calls released their probes, by the probe's token.
    """

    began: float
    ended: float
    limits: dict[str, Limits]
    calls: list[Call] = field(default_factory=list)
    trace: list[Write | Loss] = field(default_factory=list)
    faults: list[tuple[float, float, str]] = field(default_factory=list)
    down: dict[str, list[Interval]] = field(default_factory=dict)
    stalls: list[Interval] = field(default_factory=list)
    released: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One violation of a rule.

    Attributes:
        rule: Name of the rule's function.
        at: Time of the violation.
        text: Description for people.
    """

    rule: str
    at: float
    text: str


class Stalls:
    """Time for which the machine did not let every process run."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self._intervals = union(intervals)

    def __call__(self, begin: float, end: float) -> float:
        """Return the seconds of stalls in an interval."""
        first = bisect_left(self._intervals, (begin, begin))
        seconds = 0.0
        for stall_begin, stall_end in self._intervals[max(0, first - 1) :]:
            if stall_begin >= end:
                break
            seconds += max(0.0, min(end, stall_end) - max(begin, stall_begin))
        return seconds


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same time as intervals that do not overlap, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def calm_windows(history: History, circuit: str) -> list[Interval]:
    """Return the intervals in which neither Redis nor the dependency of a circuit had a fault."""
    disturbed = union([*((begin, end) for begin, end, _ in history.faults), *history.down.get(circuit, [])])
    edges = [(history.began, history.began), *disturbed, (history.ended, history.ended)]
    return [(end, begin) for (_, end), (begin, _) in pairwise(edges) if end < begin]


# -- the rules ---------------------------------------------------------------------------------------------------------


def errors(history: History) -> Iterator[Problem]:
    """A guarded call raises only errors of the dependency and of the breaker."""
    for call in history.calls:
        if call.outcome == "error":
            yield Problem("errors", call.ended, f"{_caller_of(call)} raised {call.what}")


def slow_calls(history: History) -> Iterator[Problem]:
    """A guarded call takes the function's time plus `timeout`, without stalls of the machine."""
    stalls = Stalls(history.stalls)
    for call in history.calls:
        limits = history.limits[call.circuit]
        inside = call.left - call.reached if call.left is not None and call.reached is not None else 0.0
        seconds = call.ended - call.began - inside
        bound = limits.timeout + limits.call_slack
        if seconds > bound and seconds - call.waited - stalls(call.began, call.ended) > bound:
            yield Problem("slow_calls", call.ended, f"{_caller_of(call)} waited {seconds:.3f} s, bound {bound:.3f} s")


def slow_recoveries(history: History) -> Iterator[Problem]:
    """From `Limits.recovery` after the last fault on, each process has had a success, and all calls succeed.

    Stalls of the machine since the last fault are added to the bound.  A window that is shorter than the bound is not
    checked.
    """
    stalls = Stalls(history.stalls)
    of_circuit: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in history.calls:
        of_circuit[call.circuit, call.process].append(call)
    for (circuit, process), calls in sorted(of_circuit.items()):
        calls.sort(key=lambda call: call.began)
        begins = [call.began for call in calls]
        for begin, end in calm_windows(history, circuit):
            recovery = history.limits[circuit].recovery
            due = begin + recovery + stalls(begin, min(end, begin + 2 * recovery))
            if due >= end:
                continue
            inside = [
                call for call in calls[bisect_left(begins, begin) : bisect_left(begins, end)] if call.ended <= end
            ]
            late = [call for call in inside if call.began >= due and call.outcome != "ok"]
            where = f"process {process}, circuit {circuit}"
            if late:
                first, last = late[0].began - begin, late[-1].ended - begin
                kinds = ", ".join(sorted({call.outcome for call in late}))
                text = f"{where}: {len(late)} calls {kinds} from {first:.2f} to {last:.2f} s, bound {due - begin:.2f} s"
                yield Problem(
                    "slow_recoveries", late[0].began, f"{text}; {_record_at(history, circuit, late[0].began)}"
                )
            elif not any(call.outcome == "ok" and call.ended <= due for call in inside):
                yield Problem("slow_recoveries", due, f"{where}: no success within {due - begin:.2f} s")


def stolen_leases(history: History) -> Iterator[Problem]:
    """While a probe's lease lives, no other caller gets the probe, unless the circuit changed or data was lost.

    A process may have lost the reply to a claim or to a report.  Then no call of that process holds the probe, and only
    this process has the token: the process may claim instead of that probe.

    After a loss, processes with different records restore theirs one after the other, until the generation is higher
    than all before the loss.
    """
    last: dict[str, Write] = {}
    top: dict[str, int] = defaultdict(int)
    top_at_loss: dict[str, int] = defaultdict(lambda: -1)
    for item in history.trace:
        if isinstance(item, Loss):
            top_at_loss.update(top)
            continue
        before = last.get(item.circuit)
        if (
            before is not None
            and before.state == item.state == HALF_OPEN
            and before.token
            and item.token not in ("", before.token)
            and item.at < before.until
            and before.generation > top_at_loss[item.circuit]
            and not history.released.get(before.token, math.inf) <= item.at + SAME
        ):
            text = f"circuit {item.circuit}: the lease had {before.until - item.at:.3f} s left, generation "
            yield Problem("stolen_leases", item.at, f"{text}{before.generation} to {item.generation}")
        last[item.circuit] = item
        top[item.circuit] = max(top[item.circuit], item.generation)


def shared_probes(history: History) -> Iterator[Problem]:
    """At most one probe of a shared circuit is in the dependency while its lease lives.

    A second one may begin if, after the first one was admitted, the circuit was opened or closed, or data was lost.
    """
    changes: dict[str, list[float]] = defaultdict(list)
    losses = [item.at for item in history.trace if isinstance(item, Loss)]
    for item in history.trace:
        if isinstance(item, Write) and item.state != HALF_OPEN:
            changes[item.circuit].append(item.at)

    def excused(first: Call, second: Call) -> bool:
        assert second.reached is not None
        times = changes[first.circuit]
        has_changed = _any_between(times, first.began, second.reached) or _any_between(
            losses, first.began, second.reached
        )
        return has_changed or second.reached >= first.began + history.limits[first.circuit].probe_lease

    probes = [call for call in history.calls if call.is_probe and call.is_own is False]
    yield from _overlaps("shared_probes", probes, lambda call: (call.circuit,), excused)


def local_probes(history: History) -> Iterator[Problem]:
    """At most one probe of each process and local circuit is in the dependency while its lease lives.

    A second one may begin if, after the first one was admitted, the process has used the shared circuit again.

    A second one may also begin with another local circuit, if the shared one changed since the process began to use a
    local one.  The process then continues from what it reads.  That may be long after the change, as replies are late
    during a fault.
    """
    changes: dict[str, list[float]] = defaultdict(list)
    for item in history.trace:
        if isinstance(item, Write):
            changes[item.circuit].append(item.at)

    def excused(first: Call, second: Call) -> bool:
        assert second.reached is not None
        since = second.own_since - history.limits[first.circuit].timeout
        follows = second.local != first.local and _any_between(changes[first.circuit], since, second.reached)
        return (
            second.own_since > first.began
            or follows
            or second.reached >= first.began + history.limits[first.circuit].probe_lease
        )

    probes = [call for call in history.calls if call.is_probe and call.is_own is True]
    yield from _overlaps("local_probes", probes, lambda call: (call.circuit, call.process), excused)


def generations(history: History) -> Iterator[Problem]:
    """Each write of a record keeps its generation or raises it by one.

    After a loss the first write may have any generation.  Later ones may continue from the highest before the loss,
    with one step for a record that is adopted, and one for the transition.
    """
    last: dict[str, Write] = {}
    lost: set[str] = set()
    top: dict[str, int] = defaultdict(int)
    top_at_loss: dict[str, int] = {}
    for item in history.trace:
        if isinstance(item, Loss):
            lost.update(history.limits)
            top_at_loss.update(top)
            continue
        before = last[item.circuit].generation if item.circuit in last else 0
        highest = top_at_loss.get(item.circuit, -3) + 2
        steps_up = before <= item.generation <= before + 1
        brings_back = (before < item.generation or item.circuit in lost) and item.generation <= highest
        if not (steps_up or brings_back):
            text = f"circuit {item.circuit}: generation {before} ({_state(last.get(item.circuit))}) to "
            yield Problem("generations", item.at, f"{text}{item.generation} ({item.state})")
        last[item.circuit] = item
        lost.discard(item.circuit)
        top[item.circuit] = max(top[item.circuit], item.generation)


RULES: tuple[Callable[[History], Iterator[Problem]], ...] = (
    errors,
    slow_calls,
    slow_recoveries,
    stolen_leases,
    shared_probes,
    local_probes,
    generations,
)


def check(history: History) -> list[Problem]:
    """Return all violations of all rules, in the order of time."""
    return sorted((problem for rule in RULES for problem in rule(history)), key=lambda problem: problem.at)


def longest_rejection(history: History) -> float:
    """Return the longest time in seconds from the begin of a calm window to its last rejected call."""
    longest = 0.0
    rejected: dict[str, list[float]] = defaultdict(list)
    for call in history.calls:
        if call.outcome == "rejected":
            rejected[call.circuit].append(call.began)
    for circuit, times in rejected.items():
        times.sort()
        for begin, end in calm_windows(history, circuit):
            inside = times[bisect_left(times, begin) : bisect_left(times, end)]
            longest = max(longest, inside[-1] - begin if inside else 0.0)
    return longest


def describe(history: History, problems: Sequence[Problem], most: int = 8) -> str:
    """Return a report for people: the figures, and the first problems of each rule with the fault before each."""
    losses = sum(isinstance(item, Loss) for item in history.trace)
    probes = [call for call in history.calls if call.is_probe]
    kinds = {is_own: sum(call.is_own is is_own for call in probes) for is_own in (False, True, None)}
    seconds, writes = history.ended - history.began, len(history.trace) - losses
    lines = [
        f"{seconds:.0f} s, {len(history.faults)} faults, {losses} losses, {len(history.calls)} calls, {writes} writes",
        f"probes: {kinds[False]} shared, {kinds[True]} local, {kinds[None]} admitted while that changed",
        f"longest rejection after the begin of a calm window: {longest_rejection(history):.2f} s",
        f"stalls of the machine: {Stalls(history.stalls)(history.began, history.ended):.2f} s",
    ]
    for rule in RULES:
        found = [problem for problem in problems if problem.rule == rule.__name__]
        if found:
            lines.append(f"{rule.__name__}: {len(found)} violations")
            lines += [
                f"  {problem.at - history.began:8.3f} s, {_fault_before(history, problem.at)}: {problem.text}"
                for problem in found[:most]
            ]
    return "\n".join(lines)


# -- details -----------------------------------------------------------------------------------------------------------


def _overlaps(
    rule: str,
    probes: Iterable[Call],
    key: Callable[[Call], tuple[object, ...]],
    excused: Callable[[Call, Call], bool],
) -> Iterator[Problem]:
    groups: dict[tuple[object, ...], list[Call]] = defaultdict(list)
    for call in probes:
        groups[key(call)].append(call)
    for calls in groups.values():
        calls.sort(key=lambda call: call.reached or 0.0)
        inside: list[Call] = []
        for second in calls:
            assert second.reached is not None
            inside = [first for first in inside if first.left is None or first.left > second.reached]
            for first in inside:
                if not excused(first, second):
                    text = f"{_caller_of(second)} probes while {_caller_of(first)} does"
                    yield Problem(rule, second.reached, text)
            inside.append(second)


def _any_between(times: Sequence[float], begin: float, end: float) -> bool:
    """Return whether one of these times, which are in order, lies in an interval."""
    return bisect_left(times, begin) < bisect_right(times, end)


def _fault_before(history: History, at: float) -> str:
    begun = [(begin, name) for begin, _, name in history.faults if begin <= at]
    return max(begun)[1] if begun else "before all faults"


def _record_at(history: History, circuit: str, at: float) -> str:
    """Describe the shared record of a circuit at some time."""
    record: Write | None = None
    for item in history.trace:
        if item.at > at:
            break
        if isinstance(item, Loss):
            record = None
        elif item.circuit == circuit:
            record = item
    if record is None:
        return "no record was written"
    lease = f", lease left {record.until - at:.2f} s" if record.token else ""
    return f"the record is {record.state} for {at - record.at:.2f} s{lease}"


def _state(write: Write | None) -> str:
    return write.state if write else "none"


def _caller_of(call: Call) -> str:
    return f"process {call.process}, thread {call.thread}, circuit {call.circuit}"
