"""The model: what each intent does to a circuit, and properties that hold for every intent and circuit."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybreaker_redis._model import intents
from pybreaker_redis._model.circuit import (
    CLOSED,
    COUNT_LIMIT,
    HALF_OPEN,
    LEASE_MAX_MS,
    NOISE_MAX_MS,
    OPEN,
    STATES,
    Circuit,
    new_circuit,
)
from pybreaker_redis._model.codec import PUSH_MAX_BYTES, changes_for, parse_published, parse_record
from pybreaker_redis._model.intents import (
    INTENTS,
    ClaimProbe,
    Close,
    CountProbe,
    Decision,
    FencedIntent,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    ReleaseProbe,
    ResetProbes,
    SetOpenedAt,
    SetState,
    ShareTrip,
    Trip,
)
from pybreaker_redis._model.repair import resolve_record
from tests.support.records import Wish, circuits, states, wishes

NOW = 1_000_000_000_000

closed = Circuit(CLOSED, fail_counter=3, success_counter=1, opened_at_ms=NOW - 90_000, generation=7)
opened = Circuit(OPEN, fail_counter=5, success_counter=1, opened_at_ms=NOW - 60_000, generation=7)
unclaimed = Circuit(HALF_OPEN, fail_counter=5, success_counter=1, opened_at_ms=NOW - 60_000, generation=7)
probed = replace(unclaimed, probe_token="a0", probe_until_ms=NOW + 10)
deserted = replace(probed, probe_until_ms=NOW)

#: Intents of a call, as a call of generation 7 with the token "a0" sends them.
FENCED = [
    *(RecordFailure(7, "a0"), RecordSuccess(7, "a0"), CountProbe(7, "a0", 500), ReleaseProbe(7, "a0")),
    *(Trip(7, "a0"), Close(7, "a0")),
]


def by_hand(intent: Intent) -> Intent:
    """Return the same intent without a generation and token, as an operator would send it."""
    return replace(intent, generation=None, token="")  # type: ignore[type-var]


def granted(intent: Intent, circuit: Circuit, now_ms: float = NOW) -> Circuit:
    """Apply an intent that must be accepted, and return the circuit."""
    decision = intent.apply(circuit, now_ms)
    assert decision.accepted
    return decision.circuit


def assert_refused(intent: Intent, circuit: Circuit, now_ms: float = NOW) -> None:
    """Assert that the circuit refuses the intent and stays the same object."""
    decision = intent.apply(circuit, now_ms)
    assert not decision.accepted
    assert decision.circuit is circuit


class TestValues:
    """Immutability and completeness of circuits and intents."""

    def test_circuit_and_intents_cannot_be_changed_in_place(self) -> None:
        """A holder of a circuit can rely on its values."""
        with pytest.raises(FrozenInstanceError):
            closed.state = OPEN  # type: ignore[misc]
        with pytest.raises(FrozenInstanceError):
            FENCED[0].token = "b1"  # type: ignore[attr-defined]

    def test_list_of_intents_is_complete(self) -> None:
        """Code that iterates over `INTENTS` covers every intent."""
        defined = {
            value
            for value in vars(intents).values()
            if isinstance(value, type) and issubclass(value, Intent) and hasattr(value, "operation")
        }
        assert set(INTENTS) == defined
        assert len({intent.operation for intent in INTENTS}) == len(INTENTS)

    def test_base_intent_decides_nothing(self) -> None:
        """An intent that does not define `apply` fails at its first use."""
        with pytest.raises(NotImplementedError):
            Intent().apply(closed, NOW)
        with pytest.raises(NotImplementedError):
            FencedIntent(7, "").apply(closed, NOW)

    def test_new_circuit_is_closed_and_never_moved(self) -> None:
        """Generation 0 stands for a circuit without any transition."""
        assert new_circuit(CLOSED, NOW) == Circuit(CLOSED, 0, 0, None, 0, "", 0)

    @pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
    def test_circuit_created_in_another_state_has_moved_once(self, state: str) -> None:
        """A start in another state is a transition, so results of calls from before the start do not count."""
        circuit = new_circuit(state, NOW)
        assert (circuit.state, circuit.generation, circuit.probe_token) == (state, 1, "")
        assert circuit.opened_at_ms == (NOW if state == OPEN else None)


class TestLoad:
    """The intent `Load`."""

    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, probed, deserted])
    def test_load_gives_the_circuit_as_it_is(self, circuit: Circuit) -> None:
        """Reading a circuit returns the same object."""
        assert granted(Load(), circuit) is circuit


class TestFencing:
    """Calls that may change a circuit, by generation and token."""

    @pytest.mark.parametrize("intent", FENCED)
    @pytest.mark.parametrize("generation", [0, 6, 8])
    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, probed])
    def test_call_of_another_generation_is_refused(self, intent: Intent, generation: int, circuit: Circuit) -> None:
        """Results of calls admitted in an earlier generation change nothing."""
        assert_refused(replace(intent, generation=generation), circuit)  # type: ignore[type-var]

    @pytest.mark.parametrize("intent", FENCED)
    def test_open_circuit_refuses_every_call(self, intent: Intent) -> None:
        """An open circuit admits no call, so no call can have a result to report."""
        assert_refused(intent, opened)

    @pytest.mark.parametrize("intent", FENCED)
    @pytest.mark.parametrize("token", ["", "b1"])
    def test_half_open_circuit_accepts_only_its_prober(self, intent: Intent, token: str) -> None:
        """Of all calls in flight, only the probe decides."""
        assert_refused(replace(intent, token=token), probed)  # type: ignore[type-var]
        assert intent.apply(probed, NOW).accepted

    @pytest.mark.parametrize("intent", FENCED)
    def test_prober_is_accepted_after_its_lease_until_another_claim(self, intent: Intent) -> None:
        """The result of a slow probe is still the best information about the dependency."""
        assert intent.apply(deserted, NOW + 10**6).accepted

    @pytest.mark.parametrize("intent", FENCED)
    def test_half_open_circuit_without_prober_accepts_a_call_without_token(self, intent: Intent) -> None:
        """After `half_open()` by an operator, the next call is the trial, although it did not claim the probe."""
        assert replace(intent, token="").apply(unclaimed, NOW).accepted  # type: ignore[type-var]
        assert_refused(intent, unclaimed)

    @pytest.mark.parametrize("intent", FENCED)
    def test_closed_circuit_accepts_calls_whatever_their_token(self, intent: Intent) -> None:
        """While every call is admitted, a token has no meaning."""
        assert intent.apply(closed, NOW).accepted

    @pytest.mark.parametrize("intent", FENCED)
    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, probed, deserted])
    def test_operator_is_always_accepted(self, intent: Intent, circuit: Circuit) -> None:
        """A change by an operator needs neither generation nor token."""
        assert by_hand(intent).apply(circuit, NOW).accepted


class TestCounting:
    """The intents `RecordFailure`, `RecordSuccess`, `CountProbe` and `ResetProbes`."""

    def test_failure_counts_one_and_nothing_else(self) -> None:
        """The caller decides whether to trip, because the circuit has no fail_max."""
        assert granted(RecordFailure(7, ""), closed) == replace(closed, fail_counter=4)
        assert granted(RecordFailure(7, "a0"), probed) == replace(probed, fail_counter=6)

    def test_success_forgets_the_failures_and_nothing_else(self) -> None:
        """Only consecutive failures count."""
        assert granted(RecordSuccess(7, ""), closed) == replace(closed, fail_counter=0)
        assert granted(RecordSuccess(7, "a0"), probed) == replace(probed, fail_counter=0)

    def test_probe_that_reaches_the_threshold_is_kept_to_close(self) -> None:
        """No other call may claim the probe before the close that follows. A lease that has run out is renewed, too."""
        kept = replace(probed, fail_counter=0, success_counter=2, probe_until_ms=NOW + 500, probe_lease_ms=500)
        assert granted(CountProbe(7, "a0", 500, 2), probed) == kept
        assert granted(CountProbe(7, "a0", 500, 1), probed) == kept
        assert granted(CountProbe(7, "a0", 500), deserted, NOW + 7).probe_until_ms == NOW + 507

    def test_probe_below_the_threshold_is_given_back(self) -> None:
        """The successes stay, the failures before them do not, and the next caller can claim the probe at once."""
        given_back = granted(CountProbe(7, "a0", 500, 3), probed)
        assert given_back == Circuit(
            HALF_OPEN, success_counter=2, opened_at_ms=probed.opened_at_ms, generation=probed.generation
        )
        assert not CountProbe(7, "a0", 500, 3).apply(given_back, NOW).accepted
        claimed = granted(ClaimProbe(7, "b1", 500), given_back)
        assert (claimed.generation, claimed.success_counter, claimed.probe_token) == (8, 2, "b1")

    def test_probe_counted_by_hand_renews_no_lease(self) -> None:
        """Only the holder renews a lease, so that a dead prober is not waited for.

        An operator's count leaves the probe alone.
        """
        assert granted(CountProbe(None, "", 500), probed) == replace(probed, success_counter=2)
        assert granted(CountProbe(None, "", 500, 9), probed) == replace(probed, success_counter=2)

    def test_counted_probe_without_claim_makes_no_lease(self) -> None:
        """Without a claimed probe there is no lease to renew."""
        assert granted(CountProbe(7, "", 500), unclaimed) == replace(unclaimed, success_counter=2)

    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, probed])
    def test_reset_of_probes_forgets_successes_only(self, circuit: Circuit) -> None:
        """A counter set by an operator changes no state and keeps the probe."""
        assert granted(ResetProbes(), circuit) == replace(circuit, success_counter=0)


class TestTransitions:
    """The intents `Trip`, `ClaimProbe` and `Close`, each of which begins a generation."""

    @pytest.mark.parametrize(
        ("intent", "circuit"),
        [(Trip(7, ""), closed), (Trip(7, "a0"), probed), (Trip(None, ""), opened), (Trip(None, ""), probed)],
    )
    def test_trip_opens_from_now_on(self, intent: Trip, circuit: Circuit) -> None:
        """The reset timeout starts with the trip. Failures stay readable, successes and the probe are dropped."""
        assert granted(intent, circuit) == Circuit(
            OPEN, fail_counter=circuit.fail_counter, success_counter=0, opened_at_ms=NOW, generation=8
        )

    def test_second_of_two_trips_is_refused(self) -> None:
        """One outage of the dependency causes one transition."""
        assert_refused(Trip(7, ""), granted(Trip(7, ""), closed))

    @pytest.mark.parametrize(
        "circuit", [closed, opened, unclaimed, probed], ids=["closed", "open", "unclaimed", "probed"]
    )
    def test_shared_trip_keeps_its_opening_time(self, circuit: Circuit) -> None:
        """A shared trip opens the circuit for the rest of its time only. It begins a generation like any other trip."""
        shared = granted(ShareTrip(7, 20), circuit)
        assert shared == Circuit(
            OPEN, fail_counter=circuit.fail_counter, success_counter=0, opened_at_ms=NOW - 20, generation=8
        )
        assert_refused(ShareTrip(7, 10), shared)

    @pytest.mark.parametrize(
        ("intent", "circuit"),
        [
            (ShareTrip(6, 20), closed),
            (ShareTrip(8, 20), closed),
            (ShareTrip(7, 20), replace(opened, opened_at_ms=NOW - 20)),
            (ShareTrip(7, 20), replace(opened, opened_at_ms=NOW)),
        ],
        ids=["moved since", "never in that generation", "opened then", "opened later"],
    )
    def test_shared_trip_is_refused_after_a_later_change(self, intent: ShareTrip, circuit: Circuit) -> None:
        """A later transition or a later opening time is more recent information than the shared trip."""
        assert_refused(intent, circuit)

    def test_shared_trip_from_before_the_epoch_opens_at_the_epoch(self) -> None:
        """A record in Redis holds no negative times."""
        assert granted(ShareTrip(7, NOW + 5), closed).opened_at_ms == 0

    def test_open_circuit_grants_its_probe_to_the_first_claim(self) -> None:
        """One claim begins one generation with a success counter of zero. The opening time stays."""
        claimed = granted(ClaimProbe(7, "b1", 500), opened)
        assert claimed == Circuit(HALF_OPEN, 5, 0, opened.opened_at_ms, 8, "b1", NOW + 500, probe_lease_ms=500)
        assert_refused(ClaimProbe(7, "c2", 500), claimed)
        assert_refused(ClaimProbe(8, "c2", 500), claimed)

    @pytest.mark.parametrize("circuit", [unclaimed, deserted])
    def test_free_probe_is_given_with_the_successes_so_far(self, circuit: Circuit) -> None:
        """Successes of a prober that died are not lost."""
        assert granted(ClaimProbe(7, "b1", 500), circuit) == replace(
            circuit, generation=8, probe_token="b1", probe_until_ms=NOW + 500, probe_lease_ms=500
        )

    @pytest.mark.parametrize("circuit", [probed, deserted])
    def test_claim_repeated_by_the_holder_renews_the_lease(self, circuit: Circuit) -> None:
        """A process without an answer to its claim resumes the probe that it holds, for a whole lease."""
        assert granted(ClaimProbe(6, "a0", 500), circuit, NOW + 5) == replace(
            circuit, probe_until_ms=NOW + 505, probe_lease_ms=500
        )

    def test_lost_probe_is_claimed_by_the_process_that_has_its_token(self) -> None:
        """The claim begins a new generation with the successes so far.

        A lost token that is no longer stored gives no claim.
        """
        assert granted(ClaimProbe(7, "b1", 500, "a0"), probed) == replace(
            probed, generation=8, probe_token="b1", probe_until_ms=NOW + 500, probe_lease_ms=500
        )
        assert_refused(ClaimProbe(7, "b1", 500, "c2"), probed)
        assert_refused(ClaimProbe(6, "b1", 500, "a0"), probed)
        assert_refused(ClaimProbe(7, "b1", 500, ""), closed)

    def test_held_probe_is_refused_until_its_lease_is_over(self) -> None:
        """A lease of 10 ms lasts 10 ms, and not a millisecond longer."""
        assert_refused(ClaimProbe(7, "b1", 500), probed, NOW + 9)
        assert granted(ClaimProbe(7, "b1", 500), probed, NOW + 10).probe_token == "b1"

    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, deserted])
    @pytest.mark.parametrize("generation", [0, 6, 8])
    def test_claim_of_another_generation_is_refused(self, circuit: Circuit, generation: int) -> None:
        """A caller that saw another opening cannot decide whether this one has lasted for the reset timeout."""
        assert_refused(ClaimProbe(generation, "b1", 500), circuit)

    def test_closed_circuit_has_no_probe_to_claim(self) -> None:
        """A claim that arrives after the recovery does not undo the recovery."""
        assert_refused(ClaimProbe(7, "b1", 500), closed)

    @pytest.mark.parametrize(
        ("intent", "circuit"),
        [(Close(7, "a0"), probed), (Close(7, ""), unclaimed), (Close(None, ""), opened), (Close(None, ""), probed)],
    )
    def test_close_forgets_all_counts(self, intent: Close, circuit: Circuit) -> None:
        """After a recovery, fail_max failures are needed again."""
        assert granted(intent, circuit) == Circuit(CLOSED, 0, 0, circuit.opened_at_ms, 8)

    def test_closing_a_closed_circuit_forgets_counts_and_moves_nothing(self) -> None:
        """There is no transition, so calls in flight can still report."""
        assert granted(Close(None, ""), closed) == replace(closed, fail_counter=0, success_counter=0)
        assert granted(Close(7, ""), closed).generation == 7


class TestByHand:
    """The intents `SetState` and `SetOpenedAt`."""

    @pytest.mark.parametrize("circuit", [closed, opened])
    def test_setting_the_current_state_changes_nothing(self, circuit: Circuit) -> None:
        """Setting the same state twice does not invalidate calls in flight."""
        assert granted(SetState(circuit.state), circuit) is circuit

    @pytest.mark.parametrize("circuit", [closed, opened, unclaimed, probed])
    @pytest.mark.parametrize("state", STATES)
    def test_setting_another_state_is_a_transition_that_keeps_the_counters(self, circuit: Circuit, state: str) -> None:
        """The transition changes the state, begins a generation and removes the prober."""
        if state == circuit.state != HALF_OPEN:
            return
        assert granted(SetState(state), circuit) == replace(
            circuit, state=state, generation=8, probe_token="", probe_until_ms=0
        )

    @pytest.mark.parametrize(("circuit", "token"), [(probed, "a0"), (unclaimed, "")])
    def test_half_open_by_hand_takes_the_trial_from_its_holder(self, circuit: Circuit, token: str) -> None:
        """An operator can offer the probe again without waiting for the lease."""
        taken = granted(SetState(HALF_OPEN), circuit)
        assert taken.is_probe_free(NOW)
        assert_refused(Close(7, token), taken)

    def test_open_by_hand_without_a_time_opens_now(self) -> None:
        """Without an opening time, the circuit would admit a probe at once."""
        assert granted(SetState(OPEN), replace(closed, opened_at_ms=None)).opened_at_ms == NOW

    def test_opening_time_only_moves_forward_while_open(self) -> None:
        """A late write with an earlier time cannot admit a probe early."""
        assert opened.opened_at_ms is not None
        later = granted(SetOpenedAt(opened.opened_at_ms + 1), opened)
        assert later == replace(opened, opened_at_ms=opened.opened_at_ms + 1)
        assert_refused(SetOpenedAt(opened.opened_at_ms), opened)
        assert_refused(SetOpenedAt(opened.opened_at_ms - 1), opened)

    @pytest.mark.parametrize("circuit", [closed, unclaimed, probed, replace(closed, opened_at_ms=None)])
    def test_opening_time_of_a_circuit_that_is_not_open_may_be_any(self, circuit: Circuit) -> None:
        """The opening time has no effect before the circuit opens again."""
        assert granted(SetOpenedAt(NOW - 10**6), circuit) == replace(circuit, opened_at_ms=NOW - 10**6)

    def test_opening_time_without_one_may_be_set_while_open(self) -> None:
        """A record that lost its opening time accepts any."""
        assert granted(SetOpenedAt(NOW - 5), replace(opened, opened_at_ms=None)).opened_at_ms == NOW - 5

    @pytest.mark.parametrize("circuit", [closed, opened])
    def test_opening_time_is_never_in_the_future(self, circuit: Circuit) -> None:
        """A clock that is an hour ahead cannot keep the fleet open."""
        assert granted(SetOpenedAt(NOW + 3_600_000), circuit).opened_at_ms == NOW

    def test_opening_time_is_never_before_the_epoch(self) -> None:
        """Stock reads a decimal without a sign."""
        assert granted(SetOpenedAt(-1), closed).opened_at_ms == 0


class TestNoise:
    """The time after a failure in which successes are reported."""

    def test_failure_makes_a_closed_circuit_noisy(self) -> None:
        """A success after the failure has a failure to reset."""
        circuit = granted(RecordFailure(7, "", 1000), closed)
        assert circuit.noisy_until_ms == NOW + 1000

    def test_failure_without_push_makes_no_noise(self) -> None:
        """Without push, the keys of stock hold everything."""
        assert granted(RecordFailure(7, ""), closed).noisy_until_ms == 0

    @pytest.mark.parametrize(("left_ms", "moves"), [(501, False), (500, False), (499, True), (0, True), (-5000, True)])
    def test_noise_moves_on_when_half_of_it_is_over(self, left_ms: int, moves: bool) -> None:
        """Each move is published. At least half of the time always lies ahead, so two moves in that time suffice."""
        circuit = granted(RecordFailure(7, "", 1000), replace(closed, noisy_until_ms=NOW + left_ms))
        assert circuit.noisy_until_ms == NOW + (1000 if moves else left_ms)

    @pytest.mark.parametrize("circuit", [opened, unclaimed, probed])
    def test_failure_of_a_circuit_that_is_not_closed_makes_no_noise(self, circuit: Circuit) -> None:
        """In other states, every success is reported anyway."""
        assert granted(RecordFailure(None, "", 1000), circuit).noisy_until_ms == 0

    @given(circuit=circuits(NOW), count=st.integers(0, COUNT_LIMIT))
    def test_with_failures_changes_only_the_failure_counter(self, circuit: Circuit, count: int) -> None:
        """`with_failures` names each field, so a new field must be added there."""
        assert circuit.with_failures(count) == replace(circuit, fail_counter=count)

    @given(circuit=circuits(NOW), wish=wishes)
    def test_nothing_but_a_failure_makes_noise(self, circuit: Circuit, wish: Wish) -> None:
        """Only a failure gives other processes something to reset."""
        after = wish.intent(circuit, NOW).apply(circuit, NOW).circuit
        assert after.noisy_until_ms == circuit.noisy_until_ms or wish.kind is RecordFailure


class TestEveryIntent:
    """Properties of every intent on every circuit."""

    @given(circuit=circuits(NOW), wish=wishes)
    def test_refused_intent_leaves_the_very_same_circuit(self, circuit: Circuit, wish: Wish) -> None:
        """A refusal changes nothing, leases included."""
        decision = wish.intent(circuit, NOW).apply(circuit, NOW)
        assert decision.accepted or decision.circuit is circuit

    @given(circuit=circuits(NOW), wish=wishes)
    def test_generation_grows_by_one_with_each_transition_only(self, circuit: Circuit, wish: Wish) -> None:
        """The generation is the fencing token: the same generation means the same state, and no other prober."""
        after = wish.intent(circuit, NOW).apply(circuit, NOW).circuit
        assert after.generation - circuit.generation in (0, 1)
        if after.generation == circuit.generation:
            assert after.state == circuit.state
            # A successful probe below the threshold is free again.
            assert after.probe_token in (circuit.probe_token, "")
        elif after.state == circuit.state:
            # The state is the same, but there was a transition: a new trip, or another prober.
            assert (
                after.opened_at_ms == NOW
                or after.probe_token != circuit.probe_token
                or wish.kind in (ClaimProbe, SetState, ShareTrip)
            )

    @given(circuit=circuits(NOW), wish=wishes)
    def test_only_a_half_open_circuit_has_a_prober(self, circuit: Circuit, wish: Wish) -> None:
        """Leaving half-open ends every lease."""
        after = wish.intent(circuit, NOW).apply(circuit, NOW).circuit
        if after.state != HALF_OPEN:
            assert (after.probe_token, after.probe_until_ms, after.probe_lease_ms) == ("", 0, 0)

    @given(circuit=circuits(NOW), wish=wishes)
    def test_open_circuit_always_has_an_opening_time(self, circuit: Circuit, wish: Wish) -> None:
        """Without an opening time, a probe would be admitted at once. With one in the future, none would be."""
        after = wish.intent(circuit, NOW).apply(circuit, NOW).circuit
        if after.state == OPEN:
            assert after.opened_at_ms is not None
            assert after.opened_at_ms <= NOW

    @given(circuit=circuits(NOW), wish=wishes)
    def test_counters_are_never_negative_and_move_by_one_or_to_zero(self, circuit: Circuit, wish: Wish) -> None:
        """No call is counted twice."""
        after = wish.intent(circuit, NOW).apply(circuit, NOW).circuit
        for counter in ("fail_counter", "success_counter"):
            before, now = getattr(circuit, counter), getattr(after, counter)
            assert now in (before, before + 1, 0)

    @given(state=states, steps=st.lists(st.tuples(wishes, st.integers(0, 40_000)), max_size=40))
    def test_open_never_turns_closed_without_a_probe_or_a_hand(self, state: str, steps: list[tuple[Wish, int]]) -> None:
        """No order of events lets a call close a circuit that was not probed."""
        now = NOW
        circuit = new_circuit(state, now)
        for wish, pause in steps:
            now += pause
            intent = wish.intent(circuit, now)
            after = intent.apply(circuit, now).circuit
            if circuit.state == OPEN and after.state == CLOSED:
                assert isinstance(intent, SetState) or intent == Close(None, intent.token)  # type: ignore[attr-defined]
            circuit = after

    @given(steps=st.lists(st.tuples(wishes, st.integers(0, 40_000)), max_size=40))
    def test_probe_changes_hands_only_when_free_or_by_hand(self, steps: list[tuple[Wish, int]]) -> None:
        """Of any number of callers, one holds the probe."""
        now = NOW
        circuit = new_circuit(OPEN, now)
        for wish, pause in steps:
            now += pause
            intent = wish.intent(circuit, now)
            after = intent.apply(circuit, now).circuit
            if circuit.probe_token and after.probe_token and after.generation != circuit.generation:
                assert isinstance(intent, ClaimProbe)
                assert circuit.probe_until_ms <= now or circuit.probe_token == intent.lost_token
            circuit = after


def test_fields_of_circuit_are_those_of_the_record() -> None:
    """A new field of the circuit needs a place in the record."""
    assert [field.name for field in fields(Circuit)] == [
        "state",
        "fail_counter",
        "success_counter",
        "opened_at_ms",
        "generation",
        "probe_token",
        "probe_until_ms",
        "noisy_until_ms",
        "probe_lease_ms",
    ]


@pytest.mark.parametrize(
    "value",
    [
        Circuit(),
        Decision(True, closed),
        Load(),
        *FENCED,
        ClaimProbe(7, "", 1),
        SetState(OPEN),
        SetOpenedAt(0),
        ResetProbes(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_can_neither_be_changed_nor_extended(value: Any) -> None:
    """A value can be shared safely. A typo in the name of an attribute is an error and adds no attribute."""
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, None)
    assert not hasattr(value, "__dict__")


def test_largest_count_is_reached_and_is_its_own_successor() -> None:
    """A larger number could not be read again, and would be repaired for ever."""
    last = COUNT_LIMIT - 1
    full = replace(probed, fail_counter=last, success_counter=last, generation=last)
    below = replace(full, fail_counter=last - 1, success_counter=last - 1, generation=last - 1)
    for circuit in (below, full):
        assert granted(RecordFailure(None, ""), circuit).fail_counter == last
        assert granted(CountProbe(None, "", 500), circuit).success_counter == last
        assert granted(Trip(None, ""), circuit).generation == last


class TestRecord:
    """Cases of `_model/codec.py` that random records hardly ever reach."""

    def test_count_is_read_up_to_the_limit_and_not_from_there_on(self) -> None:
        """The limit itself is damage, as in the scripts."""
        for number, read in ((COUNT_LIMIT - 1, COUNT_LIMIT - 1), (COUNT_LIMIT, None), (COUNT_LIMIT + 1, None)):
            found = parse_record((CLOSED, str(number), "0", None), (str(number), CLOSED, "", "", "0", "0", "0"))
            assert found.fail_counter == read
            assert (found.hash_circuit is None) == (read is None)

    def test_circuit_opened_by_stock_without_a_time_is_open_from_now_on(self) -> None:
        """The time of an earlier opening would let a probe through at once."""
        found = parse_record((OPEN, "0", "0", None), ("3", CLOSED, "1000", "", "0", "0", "0"))
        assert resolve_record(found, None, CLOSED, NOW).circuit == Circuit(OPEN, opened_at_ms=NOW, generation=4)

    def test_circuit_opened_on_an_emptied_server_continues_in_a_new_generation(self) -> None:
        """A later, closed circuit in the cache does not lose the trip.

        The opening time keeps its milliseconds.
        """
        found = parse_record((OPEN, "5", "0", "2"), ("1", OPEN, "2500", "", "0", "0", "0"))
        circuit = resolve_record(found, Circuit(CLOSED, generation=6), CLOSED, NOW).circuit
        assert circuit == Circuit(OPEN, fail_counter=5, opened_at_ms=2500, generation=7)

    def test_older_circuit_does_not_close_one_that_is_known_to_be_open(self) -> None:
        """A server that has lost a trip gets the trip back."""
        known = Circuit(OPEN, opened_at_ms=NOW - 10, generation=6)
        found = parse_record((CLOSED, "0", "0", None), ("5", CLOSED, "", "", "0", "0", "0"))
        assert resolve_record(found, known, CLOSED, NOW).circuit == known

    def test_circuit_closed_by_stock_keeps_its_opening_time(self) -> None:
        """A lost opening time is restored from the hash, if no caller has to wait for it."""
        found = parse_record((CLOSED, "0", "0", None), ("3", OPEN, "1000", "", "0", "0", "0"))
        assert resolve_record(found, None, CLOSED, NOW).circuit == Circuit(CLOSED, opened_at_ms=1000, generation=4)

    @pytest.mark.parametrize(("state", "marked"), [(CLOSED, CLOSED), (OPEN, OPEN), (HALF_OPEN, OPEN)])
    def test_prober_is_trusted_only_in_a_half_open_circuit_of_this_package(self, state: str, marked: str) -> None:
        """A token left in any other state gives no call the probe."""
        found = parse_record((state, "0", "0", "1"), ("3", marked, "1000", "a0", str(NOW + 10), "0", "0"))
        circuit = resolve_record(found, None, CLOSED, NOW).circuit
        assert (circuit.state, circuit.probe_token, circuit.probe_until_ms) == (state, "", 0)

    @pytest.mark.parametrize(("beyond", "until_ms"), [(0, NOW + LEASE_MAX_MS), (1, 0)])
    def test_longest_lease_is_trusted_and_a_longer_one_is_over(self, beyond: int, until_ms: int) -> None:
        """No caller can have requested a longer lease, and callers would wait for its end."""
        found = parse_record(
            (HALF_OPEN, "0", "0", "1"), ("3", HALF_OPEN, "1000", "a0", str(NOW + LEASE_MAX_MS + beyond), "0", "0")
        )
        circuit = resolve_record(found, None, CLOSED, NOW).circuit
        assert (circuit.probe_token, circuit.probe_until_ms) == ("a0", until_ms)

    @pytest.mark.parametrize(
        ("until_ms", "lease_ms", "ends_ms"),
        [
            (NOW + 500, 500, NOW + 500),
            (NOW + 501, 500, NOW + 500),
            (NOW + 20_000, 500, NOW + 500),
            (NOW + LEASE_MAX_MS + 1, 500, NOW + 500),
            (NOW + 400, LEASE_MAX_MS + 1, NOW + 400),
            (NOW + LEASE_MAX_MS + 1, LEASE_MAX_MS + 1, 0),
        ],
    )
    def test_lease_has_never_more_left_than_its_length(self, until_ms: int, lease_ms: int, ends_ms: int) -> None:
        """After the server's clock was set back, a dead prober would otherwise block the circuit for that long."""
        found = parse_record(
            (HALF_OPEN, "0", "0", "1"), ("3", HALF_OPEN, "1000", "a0", str(until_ms), "0", str(lease_ms))
        )
        circuit = resolve_record(found, None, CLOSED, NOW).circuit
        assert (circuit.probe_token, circuit.probe_until_ms) == ("a0", ends_ms)
        assert bool(changes_for(circuit, found)) == (until_ms != ends_ms or lease_ms > LEASE_MAX_MS), (
            "written once, and only if it differs"
        )

    @pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
    def test_record_from_before_a_lost_recovery_has_a_free_probe(self, state: str) -> None:
        """The prober has already reported, so callers must not wait for its lease."""
        found = parse_record((state, "0", "1", "1"), ("5", state, "1000", "a0", str(NOW + 500), "0", "500"))
        circuit = resolve_record(found, Circuit(CLOSED, generation=6), CLOSED, NOW).circuit
        assert circuit == Circuit(state, success_counter=1, opened_at_ms=1000, generation=7)

    @pytest.mark.parametrize("token", ["", "b1"])
    def test_record_from_before_a_lost_report_has_a_free_probe(self, token: str) -> None:
        """In a generation, the probe is given back once. Its next holder begins the next generation."""
        found = parse_record((HALF_OPEN, "0", "1", "1"), ("5", HALF_OPEN, "1000", "a0", str(NOW + 500), "0", "500"))
        known = Circuit(HALF_OPEN, generation=5, opened_at_ms=1000, probe_token=token, success_counter=2)
        circuit = resolve_record(found, known, CLOSED, NOW).circuit
        assert (circuit.generation, circuit.probe_token) == (5, "a0" if token else "")
        assert circuit.is_probe_free(NOW) == (not token)

    @pytest.mark.parametrize("left_ms", [400, 20_000])
    @pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
    def test_lost_claim_is_restored_with_the_rest_of_its_lease(self, state: str, left_ms: int) -> None:
        """There is one probe at a time, even if the server has lost its holder, and for no longer than a lease."""
        found = parse_record((state, "0", "0", "1"), ("5", state, "1000", "", "0", "0", "0"))
        known = replace(
            probed, opened_at_ms=1000, generation=6, probe_until_ms=NOW + left_ms, probe_lease_ms=500, fail_counter=0
        )
        resolved = resolve_record(found, known, CLOSED, NOW)
        assert resolved.repair_note == "restored"
        assert resolved.circuit == replace(known, success_counter=0, probe_until_ms=NOW + min(left_ms, 500))

    @pytest.mark.parametrize("state", [CLOSED, HALF_OPEN])
    def test_lost_trip_is_restored_with_its_time(self, state: str) -> None:
        """Neither the state before nor the holder of the probe makes a difference."""
        found = parse_record((state, "2", "1", "1"), ("5", state, "1000", "a0", str(NOW + 500), "0", "500"))
        known = Circuit(OPEN, generation=6, opened_at_ms=NOW - 10)
        resolved = resolve_record(found, known, CLOSED, NOW)
        assert resolved.repair_note == "restored"
        assert resolved.circuit == replace(known, fail_counter=2, success_counter=1)

    @pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN])
    @pytest.mark.parametrize("fail_counter", [1, 4])
    def test_lost_counts_are_those_of_the_server(self, state: str, fail_counter: int) -> None:
        """In one generation, no order of two counts is known.

        Some failures may be lost or repeated, a transition never is.
        """
        found = parse_record((state, str(fail_counter), "0", "1"), ("5", state, "1000", "", "0", "0", "0"))
        known = Circuit(state, fail_counter=3, success_counter=1, opened_at_ms=1000, generation=5)
        circuit = resolve_record(found, known, CLOSED, NOW).circuit
        assert circuit == replace(known, fail_counter=fail_counter, success_counter=0)

    @pytest.mark.parametrize(("beyond", "until_ms"), [(0, NOW + NOISE_MAX_MS), (1, 0)])
    def test_noise_beyond_its_limit_is_dropped(self, beyond: int, until_ms: int) -> None:
        """Until then, successes would be reported, and no failure would be published."""
        found = parse_record(
            (CLOSED, "0", "0", "1"), ("3", CLOSED, "1000", "", "0", str(NOW + NOISE_MAX_MS + beyond), "0")
        )
        assert resolve_record(found, None, CLOSED, NOW).circuit.noisy_until_ms == until_ms

    @pytest.mark.parametrize(
        "payload",
        [
            *(b"", b"5", b"x 3 closed 1000  0 0 0", b"5 3 ajar 1000  0 0 0", b"5 -3 closed 1000  0 0 0"),
            *(
                b"5 3 closed 1000  0 0",
                b"5 3 closed 1000  0 0 0 0",
                b"\xff\xfe",
                None,
                b"9" * 10**6,
                b"5 closed 3 1000  0 0 0",
            ),
            # Times that cannot have been reached yet. Each call would publish a time without a date.
            *(b"1005 3 open 999999999999999  0 0 0", b"1005 3 open 1006  0 0 0"),
            f"1005 3 half-open 1000 a0 {1006 + LEASE_MAX_MS} 0 0".encode(),
            f"1005 3 closed 1000  0 {1006 + NOISE_MAX_MS} 0".encode(),
        ],
    )
    def test_invalid_push_is_dropped(self, payload: bytes | None) -> None:
        """Any client may publish on a channel."""
        assert parse_published(payload) is None

    def test_huge_push_is_not_even_decoded(self) -> None:
        """Decoding a flood of huge messages would cost the listener more than the read that follows."""

        class Huge(bytes):
            def decode(self, *_: str) -> str:
                raise AssertionError

        assert parse_published(Huge(b"1005 3 closed   0 0 0" + b" " * PUSH_MAX_BYTES)) is None

    def test_push_is_read_as_scripts_write_it(self) -> None:
        """A push holds all fields but the counters."""
        pushed = parse_published(b"1005 3 half-open 1000 a0 2000 1500 1000")
        assert pushed == Circuit(HALF_OPEN, 0, 0, 1000, 3, "a0", 2000, 1500, 1000)
        assert parse_published(b"1005 3 closed   0 0 0") == Circuit(generation=3)

    @pytest.mark.parametrize("token", ["A0", "a0 ", "g", "a" * 65])
    def test_invalid_token_gives_no_process_the_probe(self, token: str) -> None:
        """Callers would wait for a probe that no process can hold."""
        found = parse_record((HALF_OPEN, "0", "0", "1"), ("3", HALF_OPEN, "1000", token, str(NOW + 10), "0", "0"))
        assert resolve_record(found, None, CLOSED, NOW).circuit.probe_token == ""

    @pytest.mark.parametrize("field", range(7))
    def test_hash_with_only_one_field_is_damaged(self, field: int) -> None:
        """A hash with one field is not the same as a missing hash."""
        alone = ["3", CLOSED, "1000", "a0", "5", "6", "7"]
        mark = [value if index == field else None for index, value in enumerate(alone)]
        assert parse_record((CLOSED, "0", "0", None), mark).is_hash_damaged
        assert not parse_record((CLOSED, "0", "0", None), (None,) * 7).is_hash_damaged

    @pytest.mark.parametrize("mark", [(None,) * 7, ("3", CLOSED, "2000", "", "0", "0", "0")])
    def test_sound_record_is_left_as_it_is(self, mark: tuple[str | None, ...]) -> None:
        """Reading writes nothing, and a circuit that the keys of stock can describe needs no hash."""
        found = parse_record((CLOSED, "1", "0", "2"), mark)
        assert not changes_for(resolve_record(found, None, CLOSED, NOW).circuit, found)

    def test_records_and_changes_cannot_be_changed_in_place(self) -> None:
        """Read records, resolved records and changes are values, too."""
        found = parse_record((CLOSED, "1", "0", "2"), (None,) * 7)
        resolved = resolve_record(found, None, CLOSED, NOW)
        for value in (found, resolved, changes_for(resolved.circuit, found)):
            with pytest.raises(FrozenInstanceError):
                setattr(value, fields(value)[0].name, None)
            assert not hasattr(value, "__dict__")
