"""The local circuit of one process while Redis is unreachable, under a clock that tests move."""

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
from tests.support.inspect import lock_of

LEASE_MS = 30_000

#: Shared circuits that a process may have cached when Redis becomes unreachable. Times are of the local clock, in ms.
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
    """Return the local clock."""
    return Clock(1000.0)


class Process:
    """A process without a connection to Redis.

    Args:
        clock: Local clock, in ms.
        known: Last state of the shared circuit that the process has read.
        fallback: Option `fallback_circuit_state` of the storage.
        initial: Initial state of the storage.
        answers: Whether the shared circuit can still be read.
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
        self.local = LocalCircuit(fallback, initial, clock)

    def ask(self, intent: Intent | None = None) -> Circuit:
        """Apply an intent, `Load` by default, and return the resulting circuit."""
        return self.local.decide_locally(intent or Load(), self.known, can_read=self.answers).circuit

    def accepted(self, intent: Intent) -> bool:
        """Apply an intent and return whether the circuit accepted it."""
        return self.local.decide_locally(intent, self.known, can_read=self.answers).accepted

    def open(self) -> Circuit:
        """Trip the circuit without a generation, as an operator would."""
        return self.ask(Trip(None, ""))

    def half_open(self) -> Circuit:
        """Claim the probe."""
        circuit = self.ask(ClaimProbe(self.local.circuit.generation, "cd", LEASE_MS))
        assert circuit.state == HALF_OPEN
        return circuit

    def close(self) -> Circuit:
        """Close the circuit without a generation, as an operator would."""
        return self.ask(Close(None, ""))

    def reports(self, known: Circuit | None = None) -> list[Intent]:
        """Return the intents that this process has to report to the shared circuit."""
        return list(self.local.draft_report(known or self.known).intents)

    def end(self) -> bool:
        """Report to the shared circuit, and return whether the local circuit ended."""
        return self.local.end_run(self.local.draft_report(self.known))

    def trip(self, known: Circuit | None = None) -> ShareTrip | None:
        """Return the trip that the process has to share, if there is one."""
        trips = [report for report in self.reports(known) if isinstance(report, ShareTrip)]
        assert not trips or self.reports(known) == trips, "a process that shares a trip reports no counts"
        return trips[0] if trips else None


def is_local_generation(circuit: Circuit) -> bool:
    """Return whether the circuit's generation is one that only a local circuit can have."""
    return LOCAL_GENERATION_MIN < circuit.generation < 0


class TestBeginning:
    """The first state of a local circuit."""

    def test_local_circuit_starts_with_the_first_call_of_an_outage(self, clock: Clock) -> None:
        """While Redis is reachable, a process has no local circuit."""
        process = Process(clock, KNOWN[OPEN])
        assert not process.local.is_active
        assert process.trip() is None
        process.ask()
        assert process.local.is_active

    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    @pytest.mark.parametrize("answers", [True, False])
    def test_known_open_or_half_open_circuit_continues_unchanged(
        self, clock: Clock, fallback: str, known: str, answers: bool
    ) -> None:
        """A circuit known to be open or half-open does not start to admit calls because Redis became unreachable."""
        process = Process(clock, KNOWN[known], fallback, answers=answers)
        began = process.ask()
        assert began == replace(KNOWN[known], generation=began.generation)
        assert is_local_generation(began)
        assert process.local.circuit.state == known

    @pytest.mark.parametrize("fallback", [OPEN, HALF_OPEN])
    @pytest.mark.parametrize("known", [CLOSED, "never opened", None])
    def test_circuit_not_known_to_be_open_starts_in_the_fallback_state(
        self, clock: Clock, fallback: str, known: str | None
    ) -> None:
        """The fallback state decides about calls unless the circuit is known to be open."""
        process = Process(clock, KNOWN[known] if known else None, fallback)
        began = process.ask()
        opened_at_ms = clock.now if fallback == OPEN else None
        assert began == Circuit(fallback, generation=began.generation, opened_at_ms=opened_at_ms)
        assert is_local_generation(began)

    @pytest.mark.parametrize("fallback", [CLOSED, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_known_closed_circuit_continues_with_its_counts(self, clock: Clock, fallback: str, known: str) -> None:
        """Three failures before the outage and two during the outage make five."""
        began = Process(clock, KNOWN[known], fallback).ask()
        assert began == replace(KNOWN[known], generation=began.generation, noisy_until_ms=0)
        assert is_local_generation(began)

    def test_unknown_circuit_starts_without_counts(self, clock: Clock) -> None:
        """Without a known circuit, the local circuit starts without failures, as a new one does."""
        began = Process(clock, None, CLOSED).ask()
        assert began == Circuit(CLOSED, generation=began.generation)

    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_readable_closed_circuit_stays_closed_whatever_the_fallback(
        self, clock: Clock, fallback: str, known: str
    ) -> None:
        """The fallback is for circuits that cannot be read. Here, Redis only rejects writes."""
        began = Process(clock, KNOWN[known], fallback, answers=True).ask()
        assert began.state == CLOSED
        assert began.opened_at_ms == KNOWN[known].opened_at_ms

    @pytest.mark.parametrize("initial", STATES)
    def test_fallback_last_of_a_known_closed_circuit_starts_closed(self, clock: Clock, initial: str) -> None:
        """The fallback `last` continues the last known state, not the initial one."""
        assert Process(clock, KNOWN[CLOSED], FALLBACK_LAST, initial).ask().state == CLOSED

    @pytest.mark.parametrize("initial", STATES)
    @pytest.mark.parametrize("answers", [True, False])
    def test_fallback_last_without_a_known_circuit_starts_in_the_initial_state(
        self, clock: Clock, initial: str, answers: bool
    ) -> None:
        """Without a known state, only the configured initial state is left to start from."""
        process = Process(clock, None, FALLBACK_LAST, initial, answers=answers)
        assert process.ask().state == initial
        assert process.ask().opened_at_ms == (clock.now if initial == OPEN else None)

    def test_noise_of_other_processes_is_dropped(self, clock: Clock) -> None:
        """Every call of this process sees every failure at once, so the local circuit needs no time of noise."""
        assert Process(clock, KNOWN[CLOSED], answers=True).ask().noisy_until_ms == 0

    def test_probe_of_another_process_ends_with_its_lease(self, clock: Clock) -> None:
        """The process that holds the probe may have died, so another call may claim the probe when the lease ends."""
        process = Process(clock, KNOWN[HALF_OPEN])
        process.ask()
        claim = ClaimProbe(process.local.circuit.generation, "cd", LEASE_MS)
        assert not process.accepted(claim)
        clock.now = KNOWN[HALF_OPEN].probe_until_ms
        assert process.accepted(claim)

    def test_fast_path_admits_no_call_before_the_storage_sets_its_end(self, clock: Clock) -> None:
        """Only the storage decides how long the fast path may be used."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        assert process.local.fast_path.trusted_until == 0
        assert process.local.fast_path.admission is not None
        assert process.local.fast_path.admission.generation == process.local.circuit.generation


class TestReports:
    """Results of calls that were admitted before the outage or during the outage."""

    @pytest.mark.parametrize("answers", [True, False])
    def test_call_that_redis_admitted_counts_before_any_transition(self, clock: Clock, answers: bool) -> None:
        """The first failure of an outage may be that of a call that Redis admitted."""
        process = Process(clock, KNOWN[CLOSED], answers=answers)
        generation = KNOWN[CLOSED].generation
        assert process.ask(RecordFailure(generation, "")).fail_counter == 4
        assert process.ask(RecordFailure(generation, "")).fail_counter == 5
        assert process.ask(RecordSuccess(generation, "")).fail_counter == 0
        opened = process.ask(Trip(generation, ""))
        assert opened.state == OPEN

    def test_call_that_this_circuit_admitted_counts(self, clock: Clock) -> None:
        """A call that the local circuit admitted reports to the same circuit."""
        process = Process(clock, KNOWN[CLOSED])
        assert process.ask(RecordFailure(process.ask().generation, "")).fail_counter == 4

    @pytest.mark.parametrize("report", [RecordFailure, RecordSuccess, Trip, Close])
    def test_call_that_redis_admitted_does_not_count_after_a_transition(
        self, clock: Clock, report: type[RecordFailure]
    ) -> None:
        """The call was admitted in a generation that is over."""
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
        """Neither an earlier generation counts nor one that this process has not seen."""
        process = Process(clock, KNOWN[CLOSED])
        for generation in (0, KNOWN[CLOSED].generation - 1, KNOWN[CLOSED].generation + 1):
            assert not process.accepted(RecordFailure(generation, ""))

    def test_call_with_a_generation_of_redis_does_not_count_for_an_unknown_circuit(self, clock: Clock) -> None:
        """Without a known circuit, no call of this process can have been admitted by Redis."""
        process = Process(clock)
        assert not process.accepted(RecordFailure(0, ""))
        assert not process.accepted(RecordFailure(1, ""))

    def test_call_that_redis_admitted_does_not_count_in_a_circuit_opened_by_fallback(self, clock: Clock) -> None:
        """With `fallback_circuit_state="open"`, a call that Redis admitted cannot trip the circuit again."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        assert not process.accepted(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert not process.accepted(Trip(KNOWN[CLOSED].generation, ""))

    def test_probe_that_redis_granted_is_reported_to_this_circuit(self, clock: Clock) -> None:
        """A probe tests the dependency and not Redis: a success closes the local circuit, a failure opens it."""
        known, token = KNOWN[HALF_OPEN], KNOWN[HALF_OPEN].probe_token
        assert Process(clock, known).ask(CountProbe(known.generation, token, LEASE_MS)).success_counter == 3
        assert Process(clock, known).ask(Close(known.generation, token)).state == CLOSED
        assert Process(clock, known).ask(Trip(known.generation, token)).state == OPEN
        assert not Process(clock, known).accepted(Close(known.generation, "of another process"))

    def test_call_of_this_circuit_is_refused_by_redis(self, clock: Clock) -> None:
        """Redis refuses the result of a call that the local circuit admitted."""
        for known in KNOWN.values():
            process = Process(clock, known)
            admitted = process.ask().generation
            assert admitted != known.generation
            assert not RecordFailure(admitted, "").apply(known, clock.now).accepted

    def test_change_by_an_operator_is_always_accepted(self, clock: Clock) -> None:
        """Changes by an operator carry no generation, so the circuit accepts them in any state."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        assert process.ask(SetState(CLOSED)).state == CLOSED
        assert process.ask(SetState(HALF_OPEN)).state == HALF_OPEN


class TestSharedTransitions:
    """A process that can still read the shared circuit while other processes change its state."""

    @pytest.mark.parametrize("to", STATES)
    def test_transition_of_another_process_replaces_the_local_state(self, clock: Clock, to: str) -> None:
        """A later transition by other processes replaces the local state."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.ask(RecordFailure(None, ""))
        before = process.local.circuit.generation
        process.known = KNOWN[CLOSED].after_transition(to, opened_at_ms=950)
        after = process.ask()
        assert after.state == to
        assert after.opened_at_ms == 950
        assert after.fail_counter == KNOWN[CLOSED].fail_counter, "the failure of this process is dropped"
        assert is_local_generation(after)
        assert after.generation > before

    def test_local_trip_is_dropped_after_a_later_shared_transition(self, clock: Clock) -> None:
        """A process does not share its trip after other processes have moved the circuit on."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.open()
        assert process.trip() is not None
        process.known = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950).after_transition(CLOSED)
        assert process.ask().state == CLOSED
        assert process.trip() is None

    def test_results_count_in_the_generation_of_the_shared_transition(self, clock: Clock) -> None:
        """Calls admitted in the new generation count. Calls of the old generation no longer count."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        admitted = process.ask().generation
        process.known = KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED)
        assert process.ask(RecordFailure(process.known.generation, "")).fail_counter == 4
        assert not process.accepted(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert not process.accepted(RecordFailure(admitted, ""))

    def test_counts_in_the_same_generation_do_not_replace_the_local_state(self, clock: Clock) -> None:
        """Failures of other processes change no generation, so the local circuit keeps its own state."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.open()
        process.known = replace(KNOWN[CLOSED], fail_counter=4)
        assert process.ask().state == OPEN

    def test_fast_path_of_the_replaced_circuit_ends(self, clock: Clock) -> None:
        """A thread that still holds the old fast path must read the new one."""
        process = Process(clock, KNOWN[CLOSED], answers=True)
        process.ask()
        old = process.local.fast_path
        process.known = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950)
        process.ask()
        assert process.local.fast_path is not old
        assert (old.admission, old.quiet_admission, old.rejection) == (None, None, None)

    def test_unknown_circuit_is_not_replaced_when_it_is_first_read(self, clock: Clock) -> None:
        """A circuit that is first read during the outage does not replace the local one.

        `report` compares the two later.
        """
        process = Process(clock)
        process.open()
        process.known = KNOWN[CLOSED]
        assert process.ask().state == OPEN


class TestTrip:
    """Trips that a process shares when Redis is reachable again."""

    @pytest.mark.parametrize("known", [*KNOWN, None])
    @pytest.mark.parametrize("fallback", [*STATES, FALLBACK_LAST])
    @pytest.mark.parametrize("answers", [True, False])
    def test_circuit_that_has_not_opened_since_it_began_is_not_shared(
        self, clock: Clock, known: str | None, fallback: str, answers: bool
    ) -> None:
        """The first state is either known to the other processes or a precaution of this process alone."""
        process = Process(clock, KNOWN[known] if known else None, fallback, answers=answers)
        process.ask()
        clock.now += 5000
        process.ask(RecordFailure(process.local.circuit.generation, ""))
        assert process.trip() is None
        assert process.trip(KNOWN[CLOSED]) is None

    @pytest.mark.parametrize("known", [CLOSED, "never opened"])
    def test_circuit_that_has_opened_is_shared_with_how_long_it_is_open(self, clock: Clock, known: str) -> None:
        """Clocks differ between hosts, so a process shares a duration and not a point in time."""
        process = Process(clock, KNOWN[known])
        clock.now += 100
        process.open()
        clock.now += 2500.4
        assert process.trip() == ShareTrip(KNOWN[known].generation, 2500)

    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    def test_circuit_that_began_not_closed_and_opened_again_is_shared(self, clock: Clock, known: str) -> None:
        """The probe failed, so the other processes do not have to probe again."""
        process = Process(clock, KNOWN[known])
        process.ask()
        clock.now = KNOWN[HALF_OPEN].probe_until_ms + 1
        process.half_open()
        assert process.trip() is None, "a claimed probe is not shared"
        process.open()
        clock.now += 60
        assert process.trip() == ShareTrip(KNOWN[known].generation, 60)

    def test_circuit_that_began_open_by_fallback_and_opened_again_is_shared(self, clock: Clock) -> None:
        """A failed probe turns the precaution into a known failure."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        process.ask()
        clock.now += 1000
        process.half_open()
        process.open()
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 0)

    def test_circuit_that_is_probed_since_it_opened_is_shared(self, clock: Clock) -> None:
        """The result of the probe is not known yet."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 1000)

    @pytest.mark.parametrize("known", [CLOSED, OPEN, HALF_OPEN])
    def test_circuit_that_has_closed_again_is_not_shared(self, clock: Clock, known: str) -> None:
        """The dependency has recovered, so the other processes have no reason to open."""
        process = Process(clock, KNOWN[known])
        process.ask()
        clock.now += 1
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        assert process.trip() is None

    def test_circuit_that_has_closed_and_opened_once_more_is_shared_as_of_the_last_time(self, clock: Clock) -> None:
        """The other processes wait for the rest of the current reset timeout."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        process.open()
        clock.now += 30
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 30)

    def test_circuit_that_was_unknown_is_shared_with_a_closed_one(self, clock: Clock) -> None:
        """The trip is for the generation in which the shared circuit is found."""
        process = Process(clock)
        process.open()
        clock.now += 10
        assert process.trip() is None, "the shared circuit is not known yet"
        assert process.trip(KNOWN[CLOSED]) == ShareTrip(KNOWN[CLOSED].generation, 10)
        assert process.trip(KNOWN["never opened"]) == ShareTrip(0, 10)

    @pytest.mark.parametrize("known", [OPEN, HALF_OPEN])
    def test_circuit_that_was_unknown_gives_way_to_one_that_is_not_closed(self, clock: Clock, known: str) -> None:
        """The other processes have already found the dependency to be down."""
        process = Process(clock)
        process.open()
        assert process.trip(KNOWN[known]) is None

    def test_trip_is_for_the_generation_that_this_process_knew(self, clock: Clock) -> None:
        """A transition of another process is more recent, so the shared circuit refuses the trip."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        moved = KNOWN[CLOSED].after_transition(OPEN, opened_at_ms=950).after_transition(CLOSED)
        trip = process.trip(moved)
        assert trip == ShareTrip(KNOWN[CLOSED].generation, 0)
        assert not trip.apply(moved, clock.now).accepted
        assert trip.apply(KNOWN[CLOSED], clock.now).accepted

    def test_clock_that_was_set_back_makes_no_negative_time(self, clock: Clock) -> None:
        """An opening time in the future would keep the circuit open for too long."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now -= 500
        assert process.trip() == ShareTrip(KNOWN[CLOSED].generation, 0)

    def test_trip_of_several_processes_is_accepted_once(self, clock: Clock) -> None:
        """Of several processes that share a trip, only one changes the shared circuit."""
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
    """Counts that a process reports for a circuit without a transition."""

    def test_failures_of_the_outage_are_reported_at_its_end(self, clock: Clock) -> None:
        """Only failures of this outage are reported. Redis has counted the earlier ones."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        assert process.reports() == []
        for _ in range(2):
            process.ask(RecordFailure(process.local.circuit.generation, ""))
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=2)]
        assert counts_after_report(process) == 5

    def test_success_between_failures_is_reported(self, clock: Clock) -> None:
        """Failures before a success and failures after a success are not consecutive."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordSuccess(process.ask().generation, ""))
        assert process.reports() == [RecordSuccess(KNOWN[CLOSED].generation, "")]
        assert counts_after_report(process) == 0
        process.ask(RecordFailure(process.local.circuit.generation, ""))
        generation = KNOWN[CLOSED].generation
        assert process.reports() == [RecordSuccess(generation, ""), RecordFailure(generation, "", times=1)]

    @pytest.mark.parametrize("before", range(4))
    @pytest.mark.parametrize("failures", range(6))
    @pytest.mark.parametrize("success", [None, 0, 1, 3])
    def test_reported_counts_give_the_local_count(
        self, clock: Clock, before: int, failures: int, success: int | None
    ) -> None:
        """If no other process has counted, the shared counter equals the local one, wherever the last success lies."""
        process = Process(clock, replace(KNOWN[CLOSED], fail_counter=before))
        generation = process.ask().generation
        for number in range(failures):
            if number == success:
                process.ask(RecordSuccess(generation, ""))
            process.ask(RecordFailure(generation, ""))
        assert counts_after_report(process) == process.ask().fail_counter

    def test_failure_in_a_circuit_opened_by_fallback_is_reported(self, clock: Clock) -> None:
        """With `fallback_circuit_state="open"`, the failure has no local effect, but counts in the shared circuit."""
        process = Process(clock, KNOWN[CLOSED], OPEN)
        process.ask(RecordFailure(KNOWN[CLOSED].generation, ""))
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]
        assert process.end()
        process.ask()
        assert process.reports() == [], "the failure is reported once"

    def test_failures_of_an_unknown_circuit_are_reported_to_a_closed_one(self, clock: Clock) -> None:
        """A worker that started during the outage reports its failures."""
        process = Process(clock)
        process.ask(RecordFailure(process.ask().generation, ""))
        assert process.reports() == []
        assert process.reports(KNOWN[CLOSED]) == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]
        assert process.reports(KNOWN[OPEN]) == []
        assert process.reports(KNOWN[HALF_OPEN]) == []

    def test_counts_after_a_local_transition_are_not_reported(self, clock: Clock) -> None:
        """The counts belong to a generation of this process alone."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        clock.now += 1000
        process.half_open()
        process.close()
        process.ask(RecordFailure(process.local.circuit.generation, ""))
        assert process.reports() == []

    def test_counts_are_refused_after_a_shared_transition(self, clock: Clock) -> None:
        """The counts are of calls that were admitted before the transition."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        moved = KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED)
        assert not any(report.apply(moved, clock.now).accepted for report in process.reports(moved))

    @pytest.mark.parametrize(("since", "times"), [(0, 2), (1, 1), (5, 1)])
    def test_failure_without_an_answer_is_reported_if_the_counter_has_not_grown(
        self, clock: Clock, since: int, times: int
    ) -> None:
        """A slow server may have counted a failure and lost the answer.

        A counter that has not grown shows that it did not.
        """
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.local.decide_locally(RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=True)
        process.ask(RecordFailure(generation, ""))
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + since)
        assert process.reports(shared) == [RecordFailure(shared.generation, "", times=times)]

    @pytest.mark.parametrize(("since", "times"), [(0, 3), (1, 3), (2, 1), (7, 0)])
    def test_report_without_an_answer_is_repeated_if_the_counter_has_not_grown(
        self, clock: Clock, since: int, times: int
    ) -> None:
        """The server applies a report as a whole or not at all.

        Failures after the report were not part of the report.
        """
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        for _ in range(2):
            process.ask(RecordFailure(generation, ""))
        with pytest.raises(redis.TimeoutError), process.local.reporting(process.local.draft_report(process.known)):
            raise redis.TimeoutError
        process.local.decide_locally(
            RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=since > 1
        )
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + since)
        # If the counter grew by more than the report, one of the increments may be the last failure.
        assert process.reports(shared) == [RecordFailure(shared.generation, "", times=times)] * bool(times)

    @pytest.mark.parametrize(("counter", "again"), [(3, True), (2, True), (1, False)])
    def test_report_with_a_success_is_repeated_if_the_counter_was_not_reset(
        self, clock: Clock, counter: int, again: bool
    ) -> None:
        """A success and a failure leave a counter of one, if the report was applied."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.ask(RecordSuccess(generation, ""))
        process.ask(RecordFailure(generation, ""))
        expected = [RecordSuccess(7, ""), RecordFailure(7, "", times=1)]
        assert process.reports() == expected
        with pytest.raises(redis.TimeoutError), process.local.reporting(process.local.draft_report(process.known)):
            raise redis.TimeoutError
        assert process.reports(replace(KNOWN[CLOSED], fail_counter=counter)) == expected * again

    def test_refused_report_is_repeated(self, clock: Clock) -> None:
        """A refusal is an answer, so an increased counter comes from other processes."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        with pytest.raises(redis.ReadOnlyError), process.local.reporting(process.local.draft_report(process.known)):
            raise redis.ReadOnlyError
        assert process.reports(replace(KNOWN[CLOSED], fail_counter=4)) == [RecordFailure(7, "", times=1)]

    def test_report_is_not_looked_for_after_a_shared_transition(self, clock: Clock) -> None:
        """The transition reset the counter. The shared circuit refuses a repeated report."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        with pytest.raises(redis.TimeoutError), process.local.reporting(process.local.draft_report(process.known)):
            raise redis.TimeoutError
        moved = replace(KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED), fail_counter=9)
        (again,) = process.reports(moved)
        assert not again.apply(moved, clock.now).accepted

    def test_report_of_an_earlier_generation_does_not_settle_a_later_one(self, clock: Clock) -> None:
        """Other processes moved the circuit while this process reported."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        for _ in range(2):
            process.ask(RecordFailure(generation, ""))
        moved = replace(KNOWN[CLOSED].after_transition(OPEN).after_transition(CLOSED), fail_counter=0)
        early = process.local.draft_report(moved)
        process.known = moved
        with contextlib.suppress(redis.TimeoutError), process.local.reporting(early):
            process.ask(RecordFailure(process.ask().generation, ""))
            raise redis.TimeoutError
        now = replace(moved, fail_counter=9)
        assert process.reports(now) == [RecordFailure(now.generation, "", times=1)]
        assert not process.local.end_run(early)
        assert process.reports(now) == [RecordFailure(now.generation, "", times=1)]

    def test_doubt_ends_with_a_success(self, clock: Clock) -> None:
        """The success resets the counter, so failures before the success no longer matter."""
        process = Process(clock, KNOWN[CLOSED])
        generation = process.ask().generation
        process.local.decide_locally(RecordFailure(generation, ""), process.known, can_read=False, is_in_doubt=True)
        process.ask(RecordSuccess(generation, ""))
        process.ask(RecordFailure(generation, ""))
        shared = replace(KNOWN[CLOSED], fail_counter=KNOWN[CLOSED].fail_counter + 1)
        assert process.reports(shared)[-1] == RecordFailure(shared.generation, "", times=1)

    def test_circuit_that_is_not_running_reports_nothing(self, clock: Clock) -> None:
        """Neither before its start nor after its end does a local circuit report counts."""
        process = Process(clock, KNOWN[CLOSED])
        assert process.reports() == []
        process.ask(RecordFailure(process.ask().generation, ""))
        assert process.end()
        assert process.reports() == []

    def test_failure_after_the_report_keeps_the_circuit_running(self, clock: Clock) -> None:
        """Calls continue while the process reports."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask(RecordFailure(process.ask().generation, ""))
        report = process.local.draft_report(process.known)
        process.ask(RecordFailure(process.local.circuit.generation, ""))
        assert not process.local.end_run(report)
        assert process.reports() == [RecordFailure(KNOWN[CLOSED].generation, "", times=1)]


def counts_after_report(process: Process) -> int:
    """Return the shared counter after the report, if no other process counts."""
    assert process.known
    shared = process.known
    for report in process.reports():
        decision = report.apply(shared, process.clock.now)
        assert decision.accepted
        shared = decision.circuit
    return shared.fail_counter


class TestEnd:
    """The end of a local circuit, when Redis is reachable again."""

    def test_end_is_refused_after_an_unreported_trip(self, clock: Clock) -> None:
        """The trip has not been reported yet, and would be lost."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        report = process.local.draft_report(process.known)
        process.open()
        assert not process.local.end_run(report)
        assert process.local.is_active
        assert process.local.circuit.state == OPEN
        assert process.trip() is not None
        assert process.end()
        assert not process.local.is_active
        assert process.trip() is None

    def test_end_withdraws_the_fast_path(self, clock: Clock) -> None:
        """No call may use the fast path of a circuit that has ended."""
        process = Process(clock, KNOWN[CLOSED])
        process.ask()
        fast_path = process.local.fast_path
        fast_path.trusted_until = 1e9
        assert fast_path.admission is not None
        assert process.end()
        assert fast_path.trusted_until == 0
        assert (fast_path.admission, fast_path.quiet_admission, fast_path.rejection) == (None, None, None)

    def test_end_without_a_local_circuit_succeeds(self, clock: Clock) -> None:
        """A storage that made no call during the outage ends like any other."""
        process = Process(clock)
        assert process.end()

    def test_second_outage_starts_from_the_shared_circuit(self, clock: Clock) -> None:
        """A second outage does not continue the local circuit of the first."""
        process = Process(clock, KNOWN[CLOSED])
        process.open()
        process.end()
        assert process.ask().state == CLOSED
        assert process.trip() is None
        process.end()
        process.known = KNOWN[OPEN]
        assert process.ask().opened_at_ms == KNOWN[OPEN].opened_at_ms

    def test_generations_never_repeat(self, clock: Clock) -> None:
        """A call of the first outage that ends during the second counts nowhere."""
        process = Process(clock, KNOWN[CLOSED])
        seen: list[int] = []
        for _ in range(3):
            seen.append(process.ask().generation)
            seen.extend(process.ask(SetState(state)).generation for state in (OPEN, HALF_OPEN, CLOSED))
            assert process.end()
        # A circuit that follows the shared one has another generation, too.
        seen.append(process.ask().generation)
        process.answers, process.known = True, KNOWN[CLOSED].after_transition(CLOSED)
        seen.append(process.ask().generation)
        assert seen == sorted(set(seen))
        assert all(LOCAL_GENERATION_MIN < generation < 0 for generation in seen)
        for generation in seen[:-1]:
            assert not process.accepted(RecordFailure(generation, ""))

    def test_call_of_the_last_outage_counts_neither_in_the_next_nor_in_redis(self, clock: Clock) -> None:
        """The call counts nowhere, even if no circuit has changed its state in between."""
        process = Process(clock, KNOWN[CLOSED])
        admitted = process.ask().generation
        process.end()
        assert not process.accepted(RecordFailure(admitted, ""))
        assert not RecordFailure(admitted, "").apply(KNOWN[CLOSED], clock.now).accepted

    def test_local_generations_last_for_decades(self) -> None:
        """With one transition a second, local generations would reach those of shared circuits after three decades."""
        assert LOCAL_GENERATION_MIN + 30 * 365 * 24 * 3600 < 0
        assert -LOCAL_GENERATION_MIN <= COUNT_LIMIT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_child_of_a_fork_has_a_free_lock_and_the_same_circuit(clock: Clock) -> None:
    """A fork while another thread holds the lock gives the child a free lock and the same circuit."""
    process = Process(clock, KNOWN[CLOSED])
    process.open()
    with lock_of(process.local):
        pid = os.fork()
        if pid == 0:
            free = lock_of(process.local).acquire(timeout=1)
            lock_of(process.local).release()
            os._exit(0 if free and process.ask().state == OPEN else 1)
    assert os.waitpid(pid, 0)[1] == 0
