"""What a process may believe, told apart second by second: the view alone, under a clock that tests move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from pybreaker_redis._replica.view import SUSPENSION_INTERVAL_MIN_S, View
from pybreaker_redis._runtime.clock import Instant
from tests.support.clock import Clock

STALENESS = 2.0

closed = Circuit(CLOSED, generation=4)
opened = Circuit(OPEN, opened_at_ms=900, generation=5)


@pytest.fixture
def clock() -> Clock:
    """The view's clock."""
    return Clock()


@pytest.fixture
def view(clock: Clock) -> View:
    """A view that hears."""
    view = View(STALENESS, clock)
    view.mark_subscribed()
    return view


def fill(view: View, circuit: Circuit, now_ms: float = 1000) -> None:
    """An answer that came at once."""
    view.store_answer(view.begin_read(), circuit, now_ms)


class TestStaleness:
    """Nothing is believed for longer than `max_staleness` after it was asked for."""

    def test_answer_is_believed_until_max_staleness_after_it_was_asked_for(self, view: View, clock: Clock) -> None:
        """What comes back may have been true when the question left, and not since."""
        ticket = view.begin_read()
        clock.now += 0.5
        view.store_answer(ticket, closed, 1000)
        clock.now += 1.4999
        assert view.read_trusted() == closed
        clock.now += 0.0001
        assert view.read_trusted() is None

    def test_nothing_is_believed_before_changes_are_heard(self, clock: Clock) -> None:
        """Without push a change would be noticed by the next poll only: too late to count by."""
        view = View(STALENESS, clock)
        fill(view, closed)
        assert view.read_trusted() is None
        assert view.cached == closed

    def test_answer_that_was_asked_for_before_changes_were_heard_is_not_believed(self, clock: Clock) -> None:
        """What changed between the answer and the subscription was told to nobody."""
        view = View(STALENESS, clock)
        ticket = view.begin_read()
        view.mark_subscribed()
        view.store_answer(ticket, closed, 1000)
        assert view.read_trusted() is None

    def test_answer_of_another_storage_extends_no_belief(self, view: View, clock: Clock) -> None:
        """When it was asked for is not passed on."""
        fill(view, closed)
        clock.now += 1.9
        view.store_sibling_answer(opened, 2900)
        assert view.read_trusted() == opened
        clock.now += 0.1
        assert view.read_trusted() is None

    def test_poll_that_agrees_extends_belief_from_when_it_was_sent(self, view: View, clock: Clock) -> None:
        """As any answer does."""
        fill(view, closed)
        clock.now += 1.0
        ticket = view.begin_read()
        clock.now += 0.5
        view.confirm_poll(ticket, 2000, failures=0, quiet=True)
        clock.now += 1.4999
        assert view.read_trusted() == closed
        clock.now += 0.0001
        assert view.read_trusted() is None

    def test_lost_line_ends_all_belief_at_once(self, view: View) -> None:
        """What changes from here on is not heard."""
        fill(view, closed)
        view.mark_unsubscribed()
        assert view.read_trusted() is None
        fill(view, closed, 1001)
        assert view.read_trusted() is None

    def test_unreachable_redis_ends_all_belief_until_it_is_reachable_again(self, view: View) -> None:
        """Calls must not be admitted by what Redis said and settled in a circuit of one's own."""
        fill(view, closed)
        ticket = view.begin_read()
        view.pause_trust()
        assert view.read_trusted() is None
        view.confirm_poll(view.begin_read(), 1100, failures=0, quiet=True)
        assert view.read_trusted() is None, "that the listener still gets answers does not help callers"
        view.store_answer(ticket, closed, 1200)
        assert view.read_trusted() is None, "an answer that was asked for before"
        fill(view, closed, 1300)
        assert view.read_trusted() is None, "an answer to somebody who only looks whether Redis is back"
        view.resume_trust()
        fill(view, closed, 1400)
        assert view.read_trusted() == closed

    def test_child_believes_nothing(self, view: View) -> None:
        """Nobody listens there."""
        fill(view, closed)
        view.after_fork()
        assert view.read_trusted() is None
        assert view.cached == closed


def test_server_whose_clock_is_set_back_is_believed_all_the_same(view: View) -> None:
    """An answer to what was asked after the last news is later than these, whatever the server's clock says."""
    fill(view, closed, 3_600_000)
    view.distrust_poll(view.begin_read())
    fill(view, closed, 1000)
    assert view.read_trusted() == closed
    view.confirm_poll(view.begin_read(), 500, failures=0, quiet=True)
    assert view.estimated_server_ms == 500


class TestServerClock:
    """The server's clock is set while the circuit is open: the time at which it opened stays where it was here."""

    OPENED_AT = 500_000

    @staticmethod
    def learn(view: View, server_ms: float, local_ms: float) -> None:
        """An answer at a local time, by clocks that were not set."""
        now = Instant(local_ms, local_ms)
        view.clock_offset.note_answer_time(server_ms, now, now, is_waiting=True)

    def seen_open(self, view: View) -> Circuit:
        """The circuit was open at 501,000 by the server's clock, which was 1,000 by the local one."""
        circuit = replace(opened, opened_at_ms=self.OPENED_AT)
        self.learn(view, 501_000, 1_000)
        fill(view, circuit, 501_000)
        assert view.local_opened_at_ms(circuit) == 0
        return circuit

    @pytest.mark.parametrize("step_ms", [20_000, -20_000])
    @pytest.mark.parametrize("then", ["answer", "poll"])
    def test_step_while_open_moves_no_opening_time(self, view: View, step_ms: int, then: str) -> None:
        """However often it is read again."""
        circuit = self.seen_open(view)
        for local_ms in (2_000, 3_000):
            server_ms = 500_000 + local_ms + step_ms
            self.learn(view, server_ms, local_ms)
            if then == "answer":
                fill(view, circuit, server_ms)
            else:
                view.confirm_poll(view.begin_read(), server_ms, failures=0, quiet=True)
            assert view.local_opened_at_ms(circuit) == 0

    def test_later_opening_time_is_one_of_the_new_clock(self, view: View) -> None:
        """The answer shows the step, too."""
        self.seen_open(view)
        self.learn(view, 522_000, 2_000)
        later = replace(opened, opened_at_ms=521_500)
        fill(view, later, 522_000)
        assert view.local_opened_at_ms(later) == 1_500

    def test_opening_time_that_was_to_come_and_was_repaired_stays_where_it_was(self, view: View) -> None:
        """The clock was set back behind it, so that the record now says that the circuit opens just now."""
        self.seen_open(view)
        self.learn(view, 482_000, 2_000)
        repaired = replace(opened, opened_at_ms=482_000)
        fill(view, repaired, 482_000)
        assert view.local_opened_at_ms(repaired) == 0

    def test_next_spell_that_opened_earlier_by_the_new_clock_is_another_one(self, view: View) -> None:
        """It opened when it says."""
        self.seen_open(view)
        self.learn(view, 482_000, 2_000)
        again = replace(opened, generation=7, opened_at_ms=481_900)
        fill(view, again, 482_000)
        assert view.local_opened_at_ms(again) == 1_900

    def test_circuit_that_never_opened_has_no_opening_time(self, view: View) -> None:
        """By any clock."""
        assert view.local_opened_at_ms(closed) is None

    def test_answer_to_another_storage_by_a_clock_that_was_set_has_to_be_asked_about(self, view: View) -> None:
        """Its times mean nothing until an answer of its own has shown how far that clock is ahead."""
        self.learn(view, 501_000, 1_000)
        fill(view, closed, 501_000)
        view.store_sibling_answer(replace(closed, noisy_until_ms=522_000), 521_000)
        circuit = replace(opened, opened_at_ms=521_000)
        view.store_sibling_answer(circuit, 521_000)
        assert view.read_trusted() is None
        self.learn(view, 521_100, 1_100)
        fill(view, circuit, 521_100)
        assert view.read_trusted() == circuit
        assert view.local_opened_at_ms(circuit) == 1_000

    def test_answer_to_another_storage_by_the_known_clock_is_where_the_spell_begins(self, view: View) -> None:
        """A later step of the clock does not move it either."""
        self.learn(view, 501_000, 1_000)
        fill(view, closed, 501_000)
        circuit = replace(opened, opened_at_ms=501_100)
        view.store_sibling_answer(circuit, 501_100)
        self.learn(view, 521_500, 1_500)
        assert view.local_opened_at_ms(circuit) == 1_100

    def test_poll_that_finds_more_left_of_a_lease_than_its_length_ends_belief(self, view: View) -> None:
        """The next caller asks, which repairs the record."""
        lease = replace(opened, state=HALF_OPEN, probe_token="a0", probe_until_ms=502_000, probe_lease_ms=1_000)
        fill(view, lease, 501_000)
        view.confirm_poll(view.begin_read(), 501_500, failures=0, quiet=True)
        assert view.read_trusted() == lease
        view.confirm_poll(view.begin_read(), 481_500, failures=0, quiet=True)
        assert view.read_trusted() is None


class TestDeaf:
    """What arrives at a view that is not listened for."""

    def test_answer_of_another_storage_is_not_taken(self, clock: Clock) -> None:
        """A later change would not arrive."""
        view = View(STALENESS, clock)
        view.store_sibling_answer(opened, 1000)
        assert view.cached is None

    def test_late_push_of_a_line_that_was_given_up_needs_no_read(self, view: View) -> None:
        """There is no line to read on."""
        fill(view, closed)
        view.mark_unsubscribed()
        assert not view.compare_push(opened)
        assert not view.compare_push(None)


class TestHints:
    """A pushed record changes no view: users who may write no key may publish."""

    @pytest.mark.parametrize(
        "pushed",
        [
            None,
            opened,
            replace(opened, generation=999_999_999_999),
            replace(closed, state=HALF_OPEN, probe_token="abcd", probe_until_ms=9e14),
            replace(closed, generation=3),
            replace(closed, opened_at_ms=1),
        ],
        ids=["garbage", "a transition", "a far generation", "a lease", "an old generation", "a time"],
    )
    def test_record_that_differs_is_to_be_read_and_nothing_of_it_is_kept(
        self, view: View, pushed: Circuit | None
    ) -> None:
        """Until it was read, calls use the view."""
        fill(view, closed)
        fast_path = (view.fast_path.admission, view.fast_path.quiet_admission, view.fast_path.trusted_until)
        assert view.compare_push(pushed)
        assert view.cached == closed
        assert view.read_trusted() == closed
        assert (view.fast_path.admission, view.fast_path.quiet_admission, view.fast_path.trusted_until) == fast_path

    def test_hint_extends_no_belief(self, view: View, clock: Clock) -> None:
        """Never beyond `max_staleness`, however much is pushed."""
        fill(view, closed)
        for _ in range(20):
            clock.now += STALENESS / 16
            view.compare_push(opened)
        assert view.read_trusted() is None

    def test_circuit_that_calls_do_not_rely_on_is_not_read(self, view: View, clock: Clock) -> None:
        """The next caller asks anyway."""
        fill(view, closed)
        clock.now += STALENESS
        assert not view.compare_push(opened)

    def test_change_while_an_answer_is_under_way_is_read(self, view: View, clock: Clock) -> None:
        """That answer may have been given before the change, and calls will go by it."""
        fill(view, closed)
        clock.now += STALENESS
        slow = view.begin_read()
        assert view.compare_push(opened)
        assert view.is_in_use
        fill(view, opened, 2000)
        view.store_answer(slow, closed, 1900)
        assert view.read_trusted() == opened

    def test_circuit_that_is_followed_in_an_outage_is_read(self, view: View, clock: Clock) -> None:
        """Where the server takes no writes, this process's own circuit follows the known one."""
        fill(view, closed)
        view.pause_trust()
        clock.now += STALENESS
        assert view.compare_push(opened)

    def test_record_before_the_first_answer_is_not_kept(self, view: View) -> None:
        """A generation that was only pushed must reach no script."""
        assert not view.compare_push(opened)
        assert view.cached is None

    def test_known_record_that_is_pushed_changes_nothing(self, view: View) -> None:
        """Who closes the circuit need not ask again because of the push."""
        fill(view, closed)
        admission = view.fast_path.quiet_admission
        assert not view.compare_push(closed)
        assert view.fast_path.quiet_admission is admission

    def test_noise_mark_of_the_known_generation_ends_the_quiet_until_the_next_answer(self, view: View) -> None:
        """Successes are reported; the answer to the first tells whether there was a failure."""
        fill(view, closed)
        assert not view.compare_push(replace(closed, noisy_until_ms=2500))
        assert view.fast_path.admission is not None
        assert view.fast_path.quiet_admission is None
        assert view.cached == closed
        fill(view, closed, 1500)
        assert view.fast_path.quiet_admission is not None

    def test_noise_mark_of_an_open_circuit_changes_nothing(self, view: View) -> None:
        """There are no successes to report."""
        fill(view, opened)
        rejection = view.fast_path.rejection
        assert not view.compare_push(replace(opened, noisy_until_ms=2500))
        assert view.fast_path.rejection is rejection is not None

    @pytest.mark.parametrize("arrives", ["answer", "poll"])
    def test_answer_that_was_asked_for_before_a_push_is_not_quiet(self, view: View, arrives: str) -> None:
        """The failure that was pushed may have been counted after the answer was given."""
        fill(view, closed)
        slow = view.begin_read()
        view.compare_push(replace(closed, noisy_until_ms=2500))
        if arrives == "answer":
            view.store_answer(slow, closed, 1400)
        else:
            view.confirm_poll(slow, 1400, failures=0, quiet=True)
        assert view.read_trusted() == closed
        assert view.fast_path.quiet_admission is None


class TestOrder:
    """The later of two records is kept, however they arrive."""

    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_older_generation_changes_nothing(self, view: View, arrives: str) -> None:
        """A slow answer, or one that another storage was given."""
        fill(view, opened, 2000)
        if arrives == "answer":
            fill(view, closed, 3000)
        else:
            view.store_sibling_answer(closed, 3000)
        assert view.read_trusted() == opened

    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_earlier_instant_of_a_generation_changes_nothing(self, view: View, arrives: str) -> None:
        """The server's clock orders what happens within a generation."""
        later = replace(opened, opened_at_ms=1500)
        slow = view.begin_read()
        fill(view, later, 2000)
        if arrives == "answer":
            view.store_answer(slow, opened, 1999)
        else:
            view.store_sibling_answer(opened, 1999)
        assert view.read_trusted() == later

    def test_later_generation_is_taken_whatever_the_clock_says(self, view: View) -> None:
        """A server that took over may be behind: an answer will tell how far, so nothing is believed until then."""
        fill(view, closed, 2000)
        view.store_sibling_answer(opened, 5)
        assert view.cached == opened
        assert view.read_trusted() is None

    def test_reconnect_takes_the_clock_of_the_new_server(self, view: View) -> None:
        """After a failover to a server that is behind, its answers are not older than those of the last one."""
        fill(view, closed, 9000)
        view.mark_subscribed()
        fill(view, replace(closed, opened_at_ms=1), 10)
        assert view.read_trusted() == replace(closed, opened_at_ms=1)

    def test_answer_does_not_bring_back_what_was_doubted_meanwhile(self, view: View) -> None:
        """Read, then stored: a foreign change in between was told once, and must not be forgotten."""
        fill(view, closed)
        slow = view.begin_read()
        view.distrust_poll(view.begin_read())
        view.store_answer(slow, closed, 1001)
        assert view.read_trusted() is None

    def test_poll_that_was_overtaken_by_a_change_says_nothing(self, view: View) -> None:
        """It read what was true before; the next one will tell."""
        fill(view, closed)
        slow = view.begin_read()
        view.store_sibling_answer(opened, 1500)
        view.distrust_poll(slow)
        assert view.read_trusted() == opened
        view.confirm_poll(slow, 1400, failures=0, quiet=True)
        assert view.fast_path.quiet_admission is None


class TestQuiet:
    """A success need not be reported when it is known that there is nothing to forget."""

    def quiet(self, view: View) -> bool:
        """Whether a success may be kept to oneself."""
        return view.read_trusted_quiet(closed.generation) is not None and view.fast_path.quiet_admission is not None

    def test_counter_at_zero_after_the_noise_is_quiet(self, view: View) -> None:
        """Whoever fails from now on makes noise again, and is heard."""
        fill(view, replace(closed, noisy_until_ms=1000), 1000)
        assert self.quiet(view)

    def test_counter_at_zero_during_the_noise_is_not(self, view: View) -> None:
        """The next failure may make none."""
        fill(view, replace(closed, noisy_until_ms=1001), 1000)
        assert view.read_trusted() is not None
        assert not self.quiet(view)

    def test_failures_to_forget_are_not_quiet_however_long_ago(self, view: View) -> None:
        """A failure an hour ago and a success now are not two failures in a row."""
        fill(view, replace(closed, fail_counter=1, noisy_until_ms=0), 3_600_000)
        assert not self.quiet(view)

    def test_transition_that_another_storage_was_answered_is_not_quiet(self, view: View) -> None:
        """A failure may have been pushed before that answer was passed on."""
        fill(view, opened)
        view.store_sibling_answer(replace(closed, generation=6), 1500)
        assert view.fast_path.admission is not None
        assert view.fast_path.quiet_admission is None

    def test_answer_that_two_storages_were_given_changes_nothing(self, view: View) -> None:
        """It is the same instant."""
        fill(view, closed)
        admission = view.fast_path.quiet_admission
        view.store_sibling_answer(closed, 1000)
        assert view.fast_path.quiet_admission is admission

    @pytest.mark.parametrize("order", ["success first", "noise first"])
    def test_noise_and_success_within_a_millisecond_are_not_quiet(self, view: View, order: str) -> None:
        """Which was first cannot be told: reporting in vain is cheaper than not counting right."""
        fill(view, closed, 900)
        noise = replace(closed, noisy_until_ms=2000)
        if order == "success first":
            fill(view, closed, 1000)
            view.store_sibling_answer(noise, 1000)
        else:
            view.store_sibling_answer(noise, 1000)
            fill(view, closed, 1000)
        assert not self.quiet(view)

    def test_poll_tells_of_quiet_and_of_noise(self, view: View) -> None:
        """It reads the counter too: stock workers count without making noise."""
        fill(view, closed)
        view.confirm_poll(view.begin_read(), 1500, failures=1, quiet=False)
        assert not self.quiet(view)
        view.confirm_poll(view.begin_read(), 2000, failures=0, quiet=True)
        assert self.quiet(view)

    def test_other_generation_is_not_quiet(self, view: View) -> None:
        """A straggler's success is for Redis to refuse."""
        fill(view, closed)
        assert view.read_trusted_quiet(3) is None
        assert view.read_trusted_quiet(None) is None, "by hand is literal"


class TestShortcut:
    """What calls look at follows from what is believed."""

    def test_closed_circuit_admits_everybody(self, view: View) -> None:
        """One admission for all, of the circuit's generation."""
        fill(view, closed)
        assert view.fast_path.admission is not None
        assert view.fast_path.admission.generation == closed.generation

    @pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
    def test_circuit_that_is_not_closed_admits_nobody(self, view: View, state: str) -> None:
        """There everybody asks for himself."""
        fill(view, closed)
        fill(view, replace(opened, state=state), 1500)
        assert view.read_trusted() is not None
        assert view.fast_path.admission is None

    def test_admission_changes_when_belief_was_interrupted(self, view: View) -> None:
        """Meanwhile anything may have been told to anybody: they have to look again."""
        fill(view, closed)
        before = view.fast_path.admission
        view.distrust_poll(view.begin_read())
        fill(view, closed, 1500)
        assert view.fast_path.admission is not None
        assert view.fast_path.admission is not before

    def test_admission_stays_the_same_while_nothing_happens(self, view: View) -> None:
        """Or every beat would send every thread the long way."""
        fill(view, closed)
        before = view.fast_path.admission
        view.confirm_poll(view.begin_read(), 1500, failures=0, quiet=True)
        fill(view, closed, 1600)
        assert view.fast_path.admission is before

    def test_look_marks_the_circuit_as_used(self, view: View) -> None:
        """What nobody uses is not polled."""
        fill(view, closed)
        view.fast_path.was_used = False
        view.read_trusted()
        assert view.fast_path.was_used


def test_servers_time_goes_on_with_the_monotonic_clock(view: View, clock: Clock) -> None:
    """A lease ends by the server's clock, wherever a test has moved the local one."""
    fill(view, closed, 5000)
    clock.now += 1.5
    assert view.estimated_server_ms == 6500


def test_open_circuit_rejects_everybody_until_a_breaker_was_otherwise(view: View) -> None:
    """As with admissions: whoever holds the rejection has it from a breaker that has been open since."""
    fill(view, opened)
    rejection = view.fast_path.rejection
    assert rejection is not None
    assert rejection.generation == opened.generation
    fill(view, opened, 1100)
    assert view.fast_path.rejection is rejection
    view.fast_path.keep_only(CLOSED)
    assert view.fast_path.rejection is None
    fill(view, replace(opened, opened_at_ms=950), 1200)
    assert view.fast_path.rejection is not rejection


def test_counter_is_the_last_that_was_answered_or_polled(view: View) -> None:
    """A circuit of this process's own goes on from the one that is known."""
    fill(view, replace(closed, fail_counter=1), 1000)
    fill(view, replace(closed, fail_counter=2), 1000)
    assert view.cached == replace(closed, fail_counter=2), "within the same millisecond"
    view.compare_push(replace(closed, noisy_until_ms=2100))
    assert view.cached == replace(closed, fail_counter=2)
    view.confirm_poll(view.begin_read(), 1200, failures=0, quiet=False)
    assert view.cached == closed
    view.store_sibling_answer(replace(closed, fail_counter=3), 1300)
    assert view.cached == replace(closed, fail_counter=3)


class TestSuspension:
    """A push suspends belief until the circuit has been read again, ten times a second at most."""

    @pytest.mark.parametrize("answer", ["same", "other"])
    def test_belief_goes_on_from_the_answer(self, view: View, answer: str) -> None:
        """Whatever it is."""
        fill(view, closed)
        poll = view.begin_read()
        view.suspend_trust()
        assert view.read_trusted() is None
        assert view.cached == closed
        if answer == "same":
            view.confirm_poll(poll, 1100, failures=0, quiet=True)
            assert view.read_trusted() == closed
        else:
            view.store_answer(poll, opened, 1100)
            assert view.read_trusted() == opened

    def test_second_one_soon_after_changes_nothing(self, view: View, clock: Clock) -> None:
        """A user who may publish must not be able to make calls slow."""
        fill(view, closed)
        view.suspend_trust()
        fill(view, closed, 1100)
        clock.now += SUSPENSION_INTERVAL_MIN_S - 0.001
        view.suspend_trust()
        assert view.read_trusted() == closed
        clock.now += 0.001
        view.suspend_trust()
        assert view.read_trusted() is None


class TestSameMillisecond:
    """The server's clock cannot order two answers of one millisecond; within a generation, failures only add up."""

    noisy = replace(closed, noisy_until_ms=2000, fail_counter=1)

    @pytest.mark.parametrize("earlier", [closed, replace(noisy, fail_counter=0)])
    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_record_without_the_failure_that_is_known_changes_nothing(
        self, view: View, arrives: str, earlier: Circuit
    ) -> None:
        """A poll whose answer arrives after that of a failure: in an outage the failure would count for another one."""
        fill(view, closed, 900)
        poll = view.begin_read()
        fill(view, self.noisy, 1000)
        if arrives == "answer":
            view.store_answer(poll, earlier, 1000)
        else:
            view.store_sibling_answer(earlier, 1000)
        assert view.cached == self.noisy

    def test_poll_that_was_sent_before_the_second_failure_changes_nothing(self, view: View) -> None:
        """The second failure has changed nothing but the counter."""
        fill(view, self.noisy, 1000)
        second = view.begin_read()
        poll = view.begin_read()
        view.store_answer(second, replace(self.noisy, fail_counter=2), 1000)
        view.confirm_poll(poll, 1000, failures=1, quiet=False)
        assert view.cached == replace(self.noisy, fail_counter=2)

    def test_answer_that_was_asked_for_later_is_later(self, view: View) -> None:
        """A success has forgotten the failure."""
        fill(view, self.noisy, 1000)
        fill(view, replace(self.noisy, fail_counter=0), 1000)
        assert view.cached == replace(self.noisy, fail_counter=0)
