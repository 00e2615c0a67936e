"""What a process does by itself while a circuit is out of reach: that circuit alone, under a clock that tests move."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import redis

from pybreaker_redis._circuits.local import FALLBACK_LAST, LOCAL_GENERATION_MIN, LocalCircuit
from pybreaker_redis._model.circuit import CLOSED, COUNT_LIMIT, HALF_OPEN, OPEN, STATES, Circuit
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    SetState,
    ShareTrip,
    Trip,
)
from tests.support.clock import Clock

LEASE_MS = 30_000

#: The shared circuit, as it may be known when Redis goes: by the local clock, with counts that others go on with.
KNOWN = {
    CLOSED: Circuit(CLOSED, fail_counter=3, generation=7, opened_at_ms=400, noisy_until_ms=1500),
    OPEN: Circuit(OPEN, fail_counter=5, generation=8, opened_at_ms=900),
    HALF_OPEN: Circuit(
        HALF_OPEN, success_counter=2, generation=9, opened_at_ms=900, probe_token="ab", probe_until_ms=2000
    ),
    "never opened": Circuit(CLOSED),
}


@pytest.fixture
def clock() -> Clock:
    """The local clock."""
    return Clock(1000.0)


class Process:
    """A process that is cut off.

    Args:
        clock: The local one.
        known: The shared circuit, as it was seen last.
        fallback: As in the storage.
        initial: As in the storage.
        answers: Whether the shared circuit can be read.
    """

    def __init__(
        self,
        clock: Clock,
        known: Circuit | None = None,
        fallback: str = CLOSED,
        initial: str = CLOSED,
        answers: bool = False,
    ) -> None:
        self.clock = clock
        self.known = known
        self.answers = answers
        self.own = LocalCircuit(fallback, initial, clock)

    def ask(self, intent: Intent | None = None) -> Circuit:
        """Carry out an intent; the circuit as it is then."""
        return self.own.decide_locally(intent or Load(), self.known, can_read=self.answers).circuit

    def accepted(self, intent: Intent) -> bool:
        """Whether an intent counts."""
        return self.own.decide_locally(intent, self.known, can_read=self.answers).accepted

    def open(self) -> Circuit:
        """By what has been admitted in the present generation, or by hand."""
        return self.ask(Trip(None, ""))

    def half_open(self) -> Circuit:
        """Somebody probes."""
        circuit = self.ask(ClaimProbe(self.own.circuit.generation, "cd", LEASE_MS))
        assert circuit.state == HALF_OPEN
        return circuit

    def close(self) -> Circuit:
        """The dependency is well."""
        return self.ask(Close(None, ""))

    def reports(self, known: Circuit | None = None) -> list[Intent]:
        """What the others have to be told."""
        return list(self.own.draft_report(known or self.known).intents)

    def end(self) -> bool:
        """Whether it ends when the others have been told."""
        return self.own.end_run(self.own.draft_report(self.known))

    def trip(self, known: Circuit | None = None) -> ShareTrip | None:
        """That it has opened, if that is what they have to be told."""
        trips = [report for report in self.reports(known) if isinstance(report, ShareTrip)]
        assert not trips or self.reports(known) == trips, "who has opened the circuit need not say why"
        return trips[0] if trips else None


def own_generation(circuit: Circuit) -> bool:
    """Whether nobody else can have been admitted in it."""
    return LOCAL_GENERATION_MIN < circuit.generation < 0


class TestBeginning:
    """How it begins."""

    def test_there_is_none_until_it_is_needed(self, clock: Clock) -> None:
        """A process that reaches Redis has no circuit of its own."""
        process = Process(clock, KNOWN[OPEN])
        assert not process.own.is_running
        assert process.trip() is None
        process.ask()
        assert process.own.is_running

    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    @pytest.mark.parametrize("answers", [True, False])
    def test_circuit_that_is_known_not_to_be_closed_goes_on_as_it_was(
        self, clock: Clock, fallback: str, known: str, answers: bool
    ) -> None:
        """A circuit that is known to be open never opens its gate because Redis has gone."""
        process = Process(clock, KNOWN[known], fallback, answers=answers)
        began = process.ask()
        assert began == replace(KNOWN[known], generation=began.generation)
        assert own_generation(began)
        assert process.own.circuit.state == known

    @pytest.mark.parametrize("fallback", [OPEN, HALF_OPEN])
    @pytest.mark.parametrize("known", [CLOSED, "never opened", None])
    def test_circuit_that_is_not_known_to_be_open_begins_in_the_fallback_state(
        self, clock: Clock, fallback: str, known: str | None
    ) -> None:
        """The user has said whether calls are to go through while nobody knows."""
        process = Process(clock, KNOWN[known] if known else None, fallback)
        began = process.ask()
        opened_at_ms = clock.now if fallback == OPEN else None
        assert began == Circuit(fallback, generation=began.generation, opened_at_ms=opened_at_ms)
        assert own_generation(began)

    @pytest.mark.parametrize("fallback", [CLOSED, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_circuit_that_is_known_to_be_closed_goes_on_where_it_was(
        self, clock: Clock, fallback: str, known: str
    ) -> None:
        """Three failures before the outage and two in it are five."""
        began = Process(clock, KNOWN[known], fallback).ask()
        assert began == replace(KNOWN[known], generation=began.generation, noisy_until_ms=0)
        assert own_generation(began)

    def test_closed_circuit_that_was_never_known_begins_with_nothing(self, clock: Clock) -> None:
        """As a new one does."""
        began = Process(clock, None, CLOSED).ask()
        assert began == Circuit(CLOSED, generation=began.generation)

    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_circuit_that_can_still_be_read_goes_on_closed_whatever_the_fallback(
        self, clock: Clock, fallback: str, known: str
    ) -> None:
        """The fallback is for what nobody knows; Redis only takes no writes."""
        began = Process(clock, KNOWN[known], fallback, answers=True).ask()
        assert began.state == CLOSED
        assert began.opened_at_ms == KNOWN[known].opened_at_ms

    @pytest.mark.parametrize("initial", STATES)
    def test_last_goes_on_from_a_closed_circuit(self, clock: Clock, initial: str) -> None:
        """As it was known last, not as it was first."""
        assert Process(clock, KNOWN[CLOSED], FALLBACK_LAST, initial).ask().state == CLOSED

    @pytest.mark.parametrize("initial", STATES)
    @pytest.mark.parametrize("answers", [True, False])
    def test_last_of_what_was_never_known_begins_in_the_initial_state(
        self, clock: Clock, initial: str, answers: bool
    ) -> None:
        """There is nothing else to go by."""
        process = Process(clock, None, FALLBACK_LAST, initial, answers=answers)
        assert process.ask().state == initial
        assert process.ask().opened_at_ms == (clock.now if initial == OPEN else None)

    def test_noise_of_others_is_forgotten(self, clock: Clock) -> None:
        """Here everybody sees every failure at once."""
        assert Process(clock, KNOWN[CLOSED], answers=True).ask().noisy_until_ms == 0

    def test_probe_of_somebody_else_ends_with_its_lease(self, clock: Clock) -> None:
        """As it would have: until then one is probing, and he may have died."""
        process = Process(clock, KNOWN[HALF_OPEN])
        process.ask()
        claim = ClaimProbe(process.own.circuit.generation, "cd", LEASE_MS)
        assert not process.accepted(claim)
        clock.now = KNOWN[HALF_OPEN].probe_until_ms
        assert process.accepted(claim)

    def test_shortcut_lets_nobody_pass_before_it_is_told_until_when(self, clock: Clock) -> None:
        """It is for the storage to say how long nobody need ask."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        assert process.own.fast_path.trusted_until == 0
        assert process.own.fast_path.admission is not None
        assert process.own.fast_path.admission.generation == process.own.circuit.generation


class TestReports:
    """What calls report that were admitted before Redis went, or since."""

    @pytest.mark.parametrize("answers", [True, False])
    def test_call_that_redis_admitted_counts_as_long_as_nothing_has_moved(self, clock: Clock, answers: bool) -> None:
        """The first failure of an outage is that of a call that was under way."""
        process = Process(clock, KNOWN[CLOSED], answers=answers)
        generation = KNOWN[CLOSED].generation
        assert process.ask(RecordFailure(generation, "")).fail_counter == 4
        assert process.ask(RecordFailure(generation, "")).fail_counter == 5
        assert process.ask(RecordSuccess(generation, "")).fail_counter == 0
        opened = process.ask(Trip(generation, ""))
        assert opened.state == OPEN

    def test_call_that_this_circuit_admitted_counts(self, clock: Clock) -> None:
        """It is the same circuit."""
        process = Process(clock, KNOWN[CLOSED])
        assert process.ask(RecordFailure(process.ask().generation, "")).fail_counter == 4

    @pytest.mark.parametrize("report", [RecordFailure, RecordSuccess, Trip, Close])
    def test_call_that_redis_admitted_does_not_count_once_the_circuit_has_moved(
        self, clock: Clock, report: type[RecordFailure]
    ) -> None:
        """It speaks for a generation that is over."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        process.ask(RecordFailure(None, ""))
        before = process.ask()
        assert not process.accepted(report(KNOWN[CLOSED].generation, ""))
        assert process.ask() == before

    def test_call_of_another_generation_of_redis_never_counts(self, clock: Clock) -> None:
        """Neither an earlier one nor one that this process has not seen."""
        process = Process(clock, KNOWN[CLOSED])
        for generation in (0, KNOWN[CLOSED].generation - 1, KNOWN[CLOSED].generation + 1):
            assert not process.accepted(RecordFailure(generation, ""))

    def test_call_that_redis_admitted_does_not_count_if_nothing_was_known(self, clock: Clock) -> None:
        """It cannot have been: whoever was admitted knew the circuit."""
        process = Process(clock)
        assert not process.accepted(RecordFailure(0, ""))
        assert not process.accepted(RecordFailure(1, ""))

    def test_call_of_a_circuit_that_began_in_another_state_is_settled_by_that_state(self, clock: Clock) -> None:
        """With `fallback_circuit_state="open"` nobody trips it a second time."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        assert not process.accepted(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert not process.accepted(Trip(KNOWN[CLOSED].generation, ""))

    def test_probe_that_redis_granted_is_reported_to_this_circuit(self, clock: Clock) -> None:
        """The prober's dependency is well, whatever Redis does: its success closes, its failure opens."""
        known, token = KNOWN[HALF_OPEN], KNOWN[HALF_OPEN].probe_token
        assert Process(clock, known).ask(CountProbe(known.generation, token, LEASE_MS)).success_counter == 3
        assert Process(clock, known).ask(Close(known.generation, token)).state == CLOSED
        assert Process(clock, known).ask(Trip(known.generation, token)).state == OPEN
        assert not Process(clock, known).accepted(Close(known.generation, "somebody else's"))

    def test_call_of_this_circuit_is_refused_by_redis(self, clock: Clock) -> None:
        """What one has admitted is never settled in the other."""
        for known in KNOWN.values():
            process = Process(clock, known)
            admitted = process.ask().generation
            assert admitted != known.generation
            assert not RecordFailure(admitted, "").apply(known, clock.now).accepted

    def test_operator_is_always_heard(self, clock: Clock) -> None:
        """By hand there is no generation."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        assert process.ask(SetState(CLOSED)).state == CLOSED
        assert process.ask(SetState(HALF_OPEN)).state == HALF_OPEN


class TestFollowing:
    """A shared circuit that others move meanwhile, seen by a process that can still read it."""

    @pytest.mark.parametrize("to", STATES)
    def test_circuit_that_others_have_moved_is_followed(self, clock: Clock, to: str) -> None:
        """What the fleet has learned later is better than what one process thinks."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.ask(RecordFailure(None, ""))
        before = process.own.circuit.generation
        process.known = KNOWN[CLOSED].after_transition(to, opened_at_ms=950)
        after = process.ask()
        assert after.state == to
        assert after.opened_at_ms == 950
        assert after.fail_counter == KNOWN[CLOSED].fail_counter, "not its own failure"
        assert own_generation(after)
        assert after.generation > before

    def test_trip_of_ones_own_is_given_up_for_what_others_did_later(self, clock: Clock) -> None:
        """And is not told to them any more."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.open()
        assert process.trip() is not None
        process.known = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950).after_transition(CLOSED)
        assert process.ask().state == CLOSED
        assert process.trip() is None

    def test_reports_count_in_the_circuit_that_is_followed(self, clock: Clock) -> None:
        """Those that were admitted in its new generation; no longer those of the old one."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        admitted = process.ask().generation
        process.known = KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED)
        assert process.ask(RecordFailure(process.known.generation, "")).fail_counter == 4
        assert not process.accepted(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert not process.accepted(RecordFailure(admitted, ""))

    def test_same_generation_is_no_news(self, clock: Clock) -> None:
        """Others count failures, too; this process goes on with its own."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.open()
        process.known = replace(KNOWN[CLOSED], fail_counter=4)
        assert process.ask().state == OPEN

    def test_shortcuts_of_the_old_circuit_end(self, clock: Clock) -> None:
        """A thread that has looked at it a moment ago must look again."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.ask()
        old = process.own.fast_path
        process.known = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950)
        process.ask()
        assert process.own.fast_path is not old
        assert (old.admission, old.quiet_admission, old.rejection) == (None, None, None)

    def test_circuit_that_began_from_nothing_is_no_longer_unknown_once_seen(self, clock: Clock) -> None:
        """It goes on by itself until Redis is back: what is seen then is for `reports` to judge."""
        process = Process(clock)
        process.open()
        process.known = KNOWN[CLOSED]
        assert process.ask().state == OPEN


class TestTrip:
    """What the others are told."""

    @pytest.mark.parametrize("known", [*KNOWN, None])
    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("answers", [True, False])
    def test_circuit_that_has_not_opened_since_it_began_is_not_shared(
        self, clock: Clock, known: str | None, fallback: str, answers: bool
    ) -> None:
        """In whatever state it began: that is no news, or a precaution of this process alone."""
        process = Process(clock, KNOWN[known] if known else None, fallback, answers=answers)
        process.ask()
        clock.now += 5000
        process.ask(RecordFailure(process.own.circuit.generation, ""))
        assert process.trip() is None
        assert process.trip(KNOWN[CLOSED]) is None

    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_circuit_that_has_opened_is_shared_with_how_long_it_is_open(self, clock: Clock, known: str) -> None:
        """Lengths of time, not times: clocks differ."""
        process = Process(clock, KNOWN[known])
        clock.now += 100
        process.open()
        clock.now += 2500.4
        assert process.trip() == ShareTrip(KNOWN[known].generation, 2500)

    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    def test_circuit_that_began_not_closed_and_opened_again_is_shared(self, clock: Clock, known: str) -> None:
        """Its probe has failed: the others need not find that out once more."""
        process = Process(clock, KNOWN[known])
        process.ask()
        clock.now = KNOWN[HALF_OPEN].probe_until_ms + 1
        process.half_open()
        assert process.trip() is None, "probing is no news"
        process.open()
        clock.now += 60
        assert process.trip() == ShareTrip(KNOWN[known].generation, 60)

    def test_circuit_that_began_open_by_fallback_and_opened_again_is_shared(self, clock: Clock) -> None:
        """What was a precaution is knowledge now."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        process.ask()
        clock.now += 1000
        process.half_open()
        process.open()
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 0)

    def test_circuit_that_is_probed_since_it_opened_is_shared(self, clock: Clock) -> None:
        """Nobody knows yet that it is well."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 1000)

    @pytest.mark.parametrize("known", [CLOSED, OPEN, HALF_OPEN])
    def test_circuit_that_has_closed_again_is_not_shared(self, clock: Clock, known: str) -> None:
        """The dependency was away, and is well: there is nothing to spare it."""
        process = Process(clock, KNOWN[known])
        process.ask()
        clock.now += 1
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        assert process.trip() is None

    def test_circuit_that_has_closed_and_opened_once_more_is_shared_as_of_the_last_time(self, clock: Clock) -> None:
        """The others wait for the rest of the time that runs."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        process.open()
        clock.now += 30
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 30)

    def test_circuit_that_was_unknown_is_shared_with_a_closed_one(self, clock: Clock) -> None:
        """In the generation that it is found in."""
        process = Process(clock)
        process.open()
        clock.now += 10
        assert process.trip() is None, "nobody knows yet what to share it with"
        assert process.trip(KNOWN[CLOSED]) == ShareTrip(KNOWN[CLOSED].generation, 10)
        assert process.trip(KNOWN["never opened"]) == ShareTrip(0, 10)

    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    def test_circuit_that_was_unknown_gives_way_to_one_that_is_not_closed(self, clock: Clock, known: str) -> None:
        """The others have found out themselves, and go on from there."""
        process = Process(clock)
        process.open()
        assert process.trip(KNOWN[known]) is None

    def test_trip_is_for_the_generation_that_this_process_knew(self, clock: Clock) -> None:
        """Whoever has moved the circuit since knows better, and refuses it."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        moved = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950).after_transition(CLOSED)
        trip = process.trip(moved)
        assert trip == ShareTrip(KNOWN[CLOSED].generation, 0)
        assert not trip.apply(moved, clock.now).accepted
        assert trip.apply(KNOWN[CLOSED], clock.now).accepted

    def test_clock_that_was_set_back_makes_no_negative_time(self, clock: Clock) -> None:
        """A circuit that opens in the future would stay open for too long."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now -= 500
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 0)

    def test_what_is_shared_is_accepted_once(self, clock: Clock) -> None:
        """Of many processes that return only one trips."""
        processes = [Process(clock, KNOWN[CLOSED]) for _ in range(3)]
        shared, accepted = KNOWN[CLOSED], []
        for process in processes:
            process.open()
            trip = process.trip()
            assert trip
            decision = trip.apply(shared, clock.now)
            shared = decision.circuit
            accepted.append(decision.accepted)
        assert accepted == [True, False, False]
        assert shared.generation == KNOWN[CLOSED].generation + 1


class TestCounts:
    """What the others are told of a circuit that has not moved."""

    def test_failures_are_told_once_it_ends(self, clock: Clock) -> None:
        """Those of this outage alone: the others know of the earlier ones."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        assert process.reports() == []
        for _ in range(2):
            process.ask(RecordFailure(process.own.circuit.generation, ""))
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=2)]
        assert told(process) == 5

    def test_success_in_between_is_told_too(self, clock: Clock) -> None:
        """Failures from before it are not consecutive with those after it."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordSuccess(process.ask().generation, ""))
        assert process.reports() == [RecordSuccess(KNOWN[CLOSED].generation, "")]
        assert told(process) == 0
        process.ask(RecordFailure(process.own.circuit.generation, ""))
        generation = KNOWN[CLOSED].generation
        assert process.reports() == [RecordSuccess(generation, ""), RecordFailure(generation, "", times=1)]

    @pytest.mark.parametrize("before", range(4))
    @pytest.mark.parametrize("failures", range(6))
    @pytest.mark.parametrize("success", [None, 0, 1, 3])
    def test_others_come_to_the_same_count(self, clock: Clock, before: int, failures: int, success: int | None) -> None:
        """Wherever the last success lies, if nobody else has counted meanwhile."""
        process = Process(clock, replace(KNOWN[CLOSED], fail_counter=before))
        generation = process.ask().generation
        for number in range(failures):
            if number == success:
                process.ask(RecordSuccess(generation, ""))
            process.ask(RecordFailure(generation, ""))
        assert told(process) == process.ask().fail_counter

    def test_failure_that_made_it_begin_open_is_told(self, clock: Clock) -> None:
        """With `fallback_circuit_state="open"` it has no use for it; the shared circuit has."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        process.ask(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]
        assert process.end()
        process.ask()
        assert process.reports() == [], "it is told once"

    def test_failures_of_a_circuit_that_was_unknown_are_told_to_a_closed_one(self, clock: Clock) -> None:
        """A worker that started in the outage has something to say, too."""
        process = Process(clock)
        process.ask(RecordFailure(process.ask().generation, ""))
        assert process.reports() == []
        assert process.reports(KNOWN[CLOSED]) == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]
        assert process.reports(KNOWN[OPEN]) == []
        assert process.reports(KNOWN[HALF_OPEN]) == []

    def test_counts_of_a_circuit_that_has_moved_are_not_told(self, clock: Clock) -> None:
        """They belong to a generation that the others do not know."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        process.ask(RecordFailure(process.own.circuit.generation, ""))
        assert process.reports() == []

    def test_counts_are_refused_if_the_shared_circuit_has_moved(self, clock: Clock) -> None:
        """They are of calls that were admitted before that."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        moved = KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED)
        assert not any(report.apply(moved, clock.now).accepted for report in process.reports(moved))

    @pytest.mark.parametrize(("since", "told"), [(0, 2), (1, 1), (5, 1)])
    def test_failure_that_may_have_been_counted_is_told_if_none_was(self, clock: Clock, since: int, told: int) -> None:
        """Others may have failed as well, but a server that was slow has done what it was asked for."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.own.decide_locally(RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=True)
        process.ask(RecordFailure(generation, ""))
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + since)
        assert process.reports(shared) == [RecordFailure(shared.generation, "", times=told)]

    @pytest.mark.parametrize(("since", "told"), [(0, 3), (1, 3), (2, 1), (7, 0)])
    def test_report_without_an_answer_is_made_again_if_it_does_not_show(
        self, clock: Clock, since: int, told: int
    ) -> None:
        """All of it at once or nothing of it; what has failed since was not in it, whatever came of asking for that."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        for _ in range(2):
            process.ask(RecordFailure(generation, ""))
        with pytest.raises(redis.TimeoutError), process.own.reporting(process.own.draft_report(process.known)):
            raise redis.TimeoutError
        process.own.decide_locally(RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=since > 1)
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + since)
        # Of more than was told, one may be the last failure.
        assert process.reports(shared) == [RecordFailure(shared.generation, "", times=told)] * bool(told)

    @pytest.mark.parametrize(("counter", "again"), [(3, True), (2, True), (1, False)])
    def test_report_that_forgets_is_made_again_if_it_does_not_show(
        self, clock: Clock, counter: int, again: bool
    ) -> None:
        """A success and a failure: the counter is one when that was done."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.ask(RecordSuccess(generation, ""))
        process.ask(RecordFailure(generation, ""))
        expected = [RecordSuccess(7, ""), RecordFailure(7, "", times=1)]
        assert process.reports() == expected
        with pytest.raises(redis.TimeoutError), process.own.reporting(process.own.draft_report(process.known)):
            raise redis.TimeoutError
        assert process.reports(replace(KNOWN[CLOSED], fail_counter=counter)) == expected * again

    def test_report_that_was_refused_is_made_again(self, clock: Clock) -> None:
        """There was an answer, so whatever the counter is, others have counted that."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        with pytest.raises(redis.ReadOnlyError), process.own.reporting(process.own.draft_report(process.known)):
            raise redis.ReadOnlyError
        assert process.reports(replace(KNOWN[CLOSED], fail_counter=4)) == [RecordFailure(7, "", times=1)]

    def test_report_does_not_show_in_a_circuit_that_has_moved_since(self, clock: Clock) -> None:
        """Its counter began anew; what is told once more is refused there."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        with pytest.raises(redis.TimeoutError), process.own.reporting(process.own.draft_report(process.known)):
            raise redis.TimeoutError
        moved = replace(KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED), fail_counter=9)
        (again,) = process.reports(moved)
        assert not again.apply(moved, clock.now).accepted

    def test_report_of_an_earlier_beginning_is_no_report_of_this_one(self, clock: Clock) -> None:
        """Others have moved the circuit while they were told."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        for _ in range(2):
            process.ask(RecordFailure(generation, ""))
        moved = replace(KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED), fail_counter=0)
        early = process.own.draft_report(moved)
        process.known = moved
        with contextlib.suppress(redis.TimeoutError), process.own.reporting(early):
            process.ask(RecordFailure(process.ask().generation, ""))
            raise redis.TimeoutError
        now = replace(moved, fail_counter=9)
        assert process.reports(now) == [RecordFailure(now.generation, "", times=1)]
        assert not process.own.end_run(early)
        assert process.reports(now) == [RecordFailure(now.generation, "", times=1)]

    def test_doubt_ends_with_a_success(self, clock: Clock) -> None:
        """What was counted before it counts no more; what comes after is in no doubt."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.own.decide_locally(RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=True)
        process.ask(RecordSuccess(generation, ""))
        process.ask(RecordFailure(generation, ""))
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + 1)
        assert process.reports(shared)[-1] == RecordFailure(shared.generation, "", times=1)

    def test_circuit_that_is_not_in_use_has_nothing_to_say(self, clock: Clock) -> None:
        """Before, and afterwards."""
        process = Process(clock, KNOWN[CLOSED])
        assert process.reports() == []
        process.ask(RecordFailure(process.ask().generation, ""))
        assert process.end()
        assert process.reports() == []

    def test_failure_that_was_counted_after_the_reports_keeps_it_from_ending(self, clock: Clock) -> None:
        """Calls go on while the others are being told."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        report = process.own.draft_report(process.known)
        process.ask(RecordFailure(process.own.circuit.generation, ""))
        assert not process.own.end_run(report)
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]


def told(process: Process) -> int:
    """What the others count when they have been told, if nothing else has happened to them."""
    assert process.known
    shared = process.known
    for report in process.reports():
        decision = report.apply(shared, process.clock.now)
        assert decision.accepted
        shared = decision.circuit
    return shared.fail_counter


class TestEnd:
    """When Redis is back."""

    def test_end_is_refused_if_the_circuit_has_moved_since(self, clock: Clock) -> None:
        """What the others were not told would be lost."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        report = process.own.draft_report(process.known)
        process.open()
        assert not process.own.end_run(report)
        assert process.own.is_running
        assert process.own.circuit.state == OPEN
        assert process.trip() is not None
        assert process.end()
        assert not process.own.is_running
        assert process.trip() is None

    def test_end_shuts_the_shortcut(self, clock: Clock) -> None:
        """Nobody goes by a circuit that has ended."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        fast_path = process.own.fast_path
        fast_path.trusted_until = 1e9
        assert fast_path.admission is not None
        assert process.end()
        assert fast_path.trusted_until == 0
        assert (fast_path.admission, fast_path.quiet_admission, fast_path.rejection) == (None, None, None)

    def test_end_of_none_is_no_error(self, clock: Clock) -> None:
        """Storages that were not needed meanwhile rejoin like all others."""
        process = Process(clock)
        assert process.end()

    def test_second_use_begins_anew(self, clock: Clock) -> None:
        """What a process thought in the last outage is not what it thinks in the next."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        process.end()
        assert process.ask().state == CLOSED
        assert process.trip() is None
        process.end()
        process.known = KNOWN[OPEN]
        assert process.ask().opened_at_ms == KNOWN[OPEN].opened_at_ms

    def test_generations_never_repeat(self, clock: Clock) -> None:
        """A call of the last outage that ends in the next one counts nowhere."""
        process = Process(clock, KNOWN[CLOSED])
        seen: list[int] = []
        for _ in range(3):
            seen.append(process.ask().generation)
            seen.extend(process.ask(SetState(state)).generation for state in (OPEN, HALF_OPEN, CLOSED))
            assert process.end()
        # Followed, it is another one, too.
        seen.append(process.ask().generation)
        process.answers, process.known = True, KNOWN[CLOSED].after_transition(CLOSED)
        seen.append(process.ask().generation)
        assert seen == sorted(set(seen))
        assert all(LOCAL_GENERATION_MIN < generation < 0 for generation in seen)
        for generation in seen[:-1]:
            assert not process.accepted(RecordFailure(generation, ""))

    def test_call_of_the_last_outage_counts_neither_in_the_next_nor_in_redis(self, clock: Clock) -> None:
        """Even if nothing has moved in between."""
        process = Process(clock, KNOWN[CLOSED])
        admitted = process.ask().generation
        process.end()
        assert not process.accepted(RecordFailure(admitted, ""))
        assert not RecordFailure(admitted, "").apply(KNOWN[CLOSED], clock.now).accepted

    def test_there_are_generations_for_all_time(self) -> None:
        """A transition a second would take three decades to come to those of shared circuits."""
        assert LOCAL_GENERATION_MIN + 30 * 365 * 24 * 3600 < 0
        assert -LOCAL_GENERATION_MIN <= COUNT_LIMIT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nobody forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_child_goes_on_though_the_lock_was_held(clock: Clock) -> None:
    """It is alone as its parent was, and not for ever in a wait for a thread that was left behind."""
    process = Process(clock, KNOWN[CLOSED])
    process.open()
    with process.own._lock:
        pid = os.fork()
        if pid == 0:
            free = process.own._lock.acquire(timeout=1)
            process.own._lock.release()
            os._exit(0 if free and process.ask().state == OPEN else 1)
    assert os.waitpid(pid, 0)[1] == 0
