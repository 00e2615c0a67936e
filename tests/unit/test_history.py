"""The checker of histories: each rule reports a small history that breaks this rule, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support import history as checker
from tests.support.history import (
    Call,
    History,
    Limits,
    Loss,
    Write,
    calm_windows,
    check,
    describe,
    longest_rejection,
    union,
)

#: Bounds of these histories. A recovery takes at most 2 * 0.5 + 0.25 + 0.4 + 2 * 0.1 + 1.0 = 2.85 s.
LIMITS = Limits()

#: A fault that ends too late for a recovery to be due.
QUIET = [(0.0, 3.0, "frozen")]

#: Tokens of probes.
ONE, TWO = "1a", "2b"


def history(*calls: Call, seconds: float = 10.0, **words: Any) -> History:
    """Return a history of one circuit that begins at 0."""
    return History(0.0, seconds, {"c": LIMITS}, calls=list(calls), **words)


def ok(began: float, process: int = 0, **words: Any) -> Call:
    """Return a call that succeeds."""
    return Call(process, 0, "c", began, began + 0.002, "ok", reached=began, left=began + 0.001, **words)


def rejected(began: float, process: int = 0) -> Call:
    """Return a call that is rejected."""
    return Call(process, 0, "c", began, began + 0.001, "rejected")


def probe(began: float, seconds: float = 0.1, *, process: int = 0, is_own: bool | None = False, **words: Any) -> Call:
    """Return a call that is admitted half-open."""
    words = {"reached": began, "left": began + seconds, "admitted": "half-open", "is_own": is_own, **words}
    return Call(process, 0, "c", began, began + seconds, "ok", **words)


def steady(begin: float = 0.0, end: float = 10.0, process: int = 0) -> list[Call]:
    """Return ten successful calls a second."""
    return [ok(begin + number / 10, process) for number in range(int((end - begin) * 10))]


def rules_broken(of: History) -> set[str]:
    """Return the names of the rules that a history breaks."""
    return {problem.rule for problem in check(of)}


def test_history_without_violation_has_no_problems() -> None:
    """A trip, a failed probe, a successful probe, a loss and a return break no rule."""
    good = history(
        *steady(0.0, 1.0),
        Call(0, 0, "c", 1.0, 1.001, "failed", reached=1.0, left=1.001),
        *(rejected(1.0 + number / 10) for number in range(1, 5)),
        probe(1.5, outcome_at := 0.05),
        *steady(1.6),
        seconds=10.0,
        faults=[(0.5, 0.8, "frozen"), (6.0, 6.5, "emptied")],
        down={"c": [(0.9, 1.45)]},
        trace=[
            Write(1.0, "c", 1, "open"),
            Write(1.5, "c", 2, "half-open", ONE, 6.5),
            Write(1.5 + outcome_at, "c", 3, "closed"),
            Loss(6.0, "emptied"),
            Write(6.4, "c", 3, "closed"),
        ],
    )
    assert check(good) == []


def test_error_in_a_call_is_reported() -> None:
    """A call may raise only errors of the dependency and of the breaker."""
    bad = history(*steady(), Call(1, 2, "c", 3.0, 3.1, "error", "ConnectionError: closed"))
    (problem,) = [problem for problem in check(bad) if problem.rule == "errors"]
    assert "process 1, thread 2" in problem.text
    assert "ConnectionError: closed" in problem.text


def test_call_that_waits_longer_than_the_timeout_is_reported() -> None:
    """Time in the guarded function does not count, all other time does."""
    waits = Call(0, 0, "c", 3.0, 3.6, "ok", reached=3.5, left=3.55)
    assert rules_broken(history(*steady(), waits)) == {"slow_calls"}


@pytest.mark.parametrize(
    ("call", "stalls"),
    [
        (Call(0, 0, "c", 3.0, 5.0, "ok", reached=3.0, left=5.0), []),
        (Call(0, 0, "c", 3.0, 3.45, "rejected"), []),
        (Call(0, 0, "c", 3.0, 3.6, "ok", waited=0.2), []),
        (Call(0, 0, "c", 3.0, 3.6, "ok"), [(2.5, 3.1), (3.05, 3.2)]),
    ],
    ids=["slow function", "within the bound", "no processor", "stalled process"],
)
def test_call_that_waits_for_something_else_is_no_problem(call: Call, stalls: list[tuple[float, float]]) -> None:
    """Time of the guarded function and of the machine is not the storage's."""
    assert check(history(*steady(0.0, 2.5), call, stalls=stalls, seconds=5.0, faults=QUIET)) == []


def test_rejection_long_after_the_last_fault_is_reported() -> None:
    """An orphaned claim rejects calls of the fleet for a lease, which is longer than any rule allows."""
    bad = history(
        *steady(0.0, 1.0),
        *(rejected(2.0 + number / 10, process) for number in range(50) for process in (0, 1)),
        *steady(7.0),
        *steady(7.0, process=1),
        faults=[(1.0, 2.0, "frozen")],
    )
    problems = check(bad)
    assert [problem.rule for problem in problems] == ["slow_recoveries"] * 2
    assert "process 0, circuit c" in problems[0].text
    assert "process 1" in problems[1].text


def test_failure_long_after_the_dependency_came_up_is_reported() -> None:
    """Long after the fault, only successes are expected."""
    fails = Call(0, 0, "c", 9.0, 9.001, "failed", reached=9.0, left=9.001)
    assert rules_broken(history(*steady(), fails, down={"c": [(1.0, 1.1)]})) == {"slow_recoveries"}


def test_process_without_a_success_is_reported() -> None:
    """Without a success since the last fault, a process has not shown that it recovered."""
    bad = history(*steady(), rejected(2.1, 1), rejected(2.2, 1), faults=[(1.0, 2.0, "frozen")])
    assert rules_broken(bad) == {"slow_recoveries"}


def test_rejections_within_the_bound_are_no_problem() -> None:
    """A circuit may be open for `Limits.recovery` seconds after a fault."""
    until = 2.0 + LIMITS.recovery - 0.1
    good = history(*(rejected(2.0 + n / 10) for n in range(10)), ok(until), *steady(5.0), faults=[(0.0, 2.0, "frozen")])
    assert check(good) == []


def test_rejections_while_something_is_wrong_are_no_problem() -> None:
    """Rejections are allowed in a fault, while the dependency is down, and in a window that is too short to judge."""
    rejections = [rejected(number / 10) for number in range(100)]
    assert check(history(*rejections, faults=[(0.0, 10.0, "frozen")])) == []
    assert check(history(*rejections, down={"c": [(0.0, 10.0)]})) == []
    assert check(history(*rejections, faults=[(0.0, 4.0, "a"), (6.5, 10.0, "b")])) == []


def test_stalls_after_the_last_fault_prolong_the_bound() -> None:
    """A machine that stood still for a second may take a second longer."""
    late = rejected(2.0 + LIMITS.recovery + 0.5)
    calls = [ok(2.5), late, *steady(6.5)]
    assert rules_broken(history(*calls, faults=[(0.0, 2.0, "frozen")])) == {"slow_recoveries"}
    assert check(history(*calls, faults=[(0.0, 2.0, "frozen")], stalls=[(3.0, 4.0)])) == []


def test_probe_given_away_while_its_lease_lives_is_reported() -> None:
    """The second claim comes before the lease of the first one ends."""
    first = Write(1.0, "c", 1, "half-open", ONE, 6.0)
    assert rules_broken(history(*steady(), trace=[first, Write(2.0, "c", 2, "half-open", TWO, 7.0)])) == {
        "stolen_leases"
    }


@pytest.mark.parametrize(
    "between",
    [
        [Write(6.1, "c", 2, "half-open", TWO, 11.0)],
        [Write(2.0, "c", 1, "half-open", "", 0.0), Write(2.1, "c", 2, "half-open", TWO, 7.0)],
        [Write(2.0, "c", 1, "half-open", ONE, 7.0)],
        [Write(2.0, "c", 2, "open"), Write(3.0, "c", 3, "half-open", TWO, 8.0)],
        [Loss(2.0), Write(2.1, "c", 2, "half-open", TWO, 7.0)],
        # Two processes restore the different records that they have cached.
        [Loss(2.0), Write(2.1, "c", 1, "half-open", ONE, 6.0), Write(2.2, "c", 2, "half-open", TWO, 7.0)],
    ],
    ids=["lease over", "given back", "renewed", "open in between", "lost", "brought back twice"],
)
def test_probe_given_away_for_a_reason_is_no_problem(between: list[Write | Loss]) -> None:
    """The lease has run out, was given back, or was lost."""
    first = Write(1.0, "c", 1, "half-open", ONE, 6.0)
    assert check(history(*steady(), trace=[first, *between])) == []


@pytest.mark.parametrize(("released", "is_fine"), [({ONE: 1.9}, True), ({ONE: 2.1}, False), ({TWO: 1.9}, False)])
def test_probe_taken_instead_of_a_lost_one_is_no_problem(released: dict[str, float], is_fine: bool) -> None:
    """Another process may claim the probe only after its holder has noted that no call holds the probe."""
    trace = [Write(1.0, "c", 1, "half-open", ONE, 6.0), Write(2.0, "c", 2, "half-open", TWO, 7.0)]
    assert (check(history(*steady(), trace=trace, released=released)) == []) is is_fine


def test_two_probes_of_a_shared_circuit_at_once_are_reported() -> None:
    """One call at a time probes the dependency, whichever processes make the calls."""
    bad = history(*steady(), probe(1.0), probe(1.05, process=1))
    assert rules_broken(bad) == {"shared_probes"}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (probe(1.1, process=1), {}),
        (probe(1.05, process=1, is_own=True), {}),
        (probe(1.05, process=1, is_own=None), {}),
        (probe(1.05, process=1), {"trace": [Write(1.02, "c", 1, "open")]}),
        (probe(1.05, process=1), {"trace": [Loss(1.02)]}),
    ],
    ids=["afterwards", "local", "unclear", "opened in between", "lost in between"],
)
def test_probes_that_may_overlap_are_no_problem(second: Call, words: dict[str, Any]) -> None:
    """A later probe, a probe of another circuit and a probe after a transition do not overlap."""
    assert check(history(*steady(), *steady(process=1), probe(1.0), second, **words)) == []


def test_probe_after_the_lease_of_a_slow_one_is_no_problem() -> None:
    """A probe that takes longer than its lease may overlap with the next."""
    slow = probe(1.0, LIMITS.probe_lease + 1.0)
    assert check(history(*steady(), *steady(process=1), slow, probe(6.5, process=1))) == []
    assert rules_broken(history(*steady(), *steady(process=1), slow, probe(5.5, process=1))) == {"shared_probes"}


def test_two_probes_of_one_process_while_local_are_reported() -> None:
    """A process on its local circuit makes one probe at a time. Other processes probe independently."""
    first = probe(1.0, is_own=True, own_since=0.5)
    assert rules_broken(history(*steady(), first, probe(1.05, is_own=True, own_since=0.5))) == {"local_probes"}
    unclear = probe(1.05, is_own=None, own_since=0.5)
    assert check(history(*steady(), first, unclear)) == []
    other = probe(1.05, process=1, is_own=True, own_since=0.5)
    assert check(history(*steady(), *steady(process=1), first, other)) == []


def test_local_probe_of_a_later_outage_is_no_problem() -> None:
    """In between, the process used the shared circuit, or its local circuit followed a shared transition."""
    first, second = probe(1.0, is_own=True, own_since=0.5), probe(1.05, is_own=True, own_since=0.5, local=1)
    # The answer that shows the transition may be late.
    for moved in (0.9, 1.02):
        assert check(history(*steady(), first, second, trace=[Write(moved, "c", 1, "open")])) == []
    before, after = Write(0.2, "c", 1, "open"), Write(1.1, "c", 1, "open")
    assert rules_broken(history(*steady(), first, second, trace=[before, after])) == {"local_probes"}
    same = replace(second, local=0)
    assert rules_broken(history(*steady(), first, same, trace=[Write(1.02, "c", 1, "open")])) == {"local_probes"}
    later = probe(1.05, is_own=True, own_since=1.02)
    assert check(history(*steady(), probe(1.0, is_own=True, own_since=0.5), later)) == []


@pytest.mark.parametrize(
    ("trace", "is_right"),
    [
        ([Write(1.0, "c", 0, "closed"), Write(2.0, "c", 1, "open"), Write(2.1, "c", 1, "open")], True),
        ([Write(1.0, "c", 2, "open")], False),
        ([Write(1.0, "c", 1, "open"), Write(2.0, "c", 3, "closed")], False),
        ([Write(1.0, "c", 1, "open"), Write(2.0, "c", 0, "closed")], False),
        # Another circuit has its own generations.
        ([Write(1.0, "c", 1, "open"), Write(2.0, "d", 1, "open")], True),
        # After a loss, a created record starts again. A restored record continues, at most one adoption further.
        ([Write(1.0, "c", 1, "open"), Loss(2.0), Write(3.0, "c", 0, "closed"), Write(3.0, "c", 1, "open")], True),
        ([Write(1.0, "c", 1, "open"), Loss(2.0), Write(3.0, "c", 3, "half-open")], True),
        ([Write(1.0, "c", 1, "open"), Loss(2.0), Write(3.0, "c", 4, "half-open")], False),
        ([Write(1.0, "c", 1, "open"), Loss(2.0), Write(3.0, "c", 0, "closed"), Write(4.0, "c", 2, "open")], True),
        ([Write(1.0, "c", 1, "open"), Loss(2.0), Write(3.0, "c", 2, "open"), Write(4.0, "c", 1, "open")], False),
        ([Loss(2.0), Write(3.0, "c", 3, "open")], False),
    ],
)
def test_generations_rise_by_one_between_losses(trace: list[Write | Loss], is_right: bool) -> None:
    """No transition is skipped or undone."""
    words = History(0.0, 10.0, {"c": LIMITS, "d": LIMITS}, trace=trace)
    assert check(words) == [] if is_right else {problem.rule for problem in check(words)} == {"generations"}


def test_calm_is_what_faults_and_the_dependency_leave() -> None:
    """Only the circuit's own dependency counts."""
    words = history(faults=[(1.0, 2.0, "a"), (1.5, 3.0, "b")], down={"c": [(2.5, 4.0)], "d": [(5.0, 6.0)]})
    assert calm_windows(words, "c") == [(0.0, 1.0), (4.0, 10.0)]
    assert calm_windows(history(), "c") == [(0.0, 10.0)]
    assert union([(3.0, 4.0), (1.0, 2.0), (1.5, 2.5)]) == [(1.0, 2.5), (3.0, 4.0)]


def test_report_names_the_fault_before_each_problem() -> None:
    """The report for people starts with figures, and lists each broken rule with its first violations."""
    bad = history(*steady(), rejected(4.0), rejected(9.0), faults=[(1.0, 2.0, "frozen")])
    text = describe(bad, check(bad))
    assert "10 s, 1 faults, 0 losses" in text
    assert "slow_recoveries: 1 violations" in text
    assert "frozen: process 0" in text
    assert longest_rejection(bad) == pytest.approx(7.0)
    assert {rule.__name__ for rule in checker.RULES} >= {problem.rule for problem in check(bad)}
