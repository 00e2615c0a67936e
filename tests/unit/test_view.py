"""The view of one circuit: how long a process trusts a cached record, under a clock that tests move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from pybreaker_redis._replica.view import SUSPENSION_INTERVAL_MIN_S, View
from pybreaker_redis._runtime.clock import Instant
from tests.support.clock import Clock
from tests.support.inspect import reset_in_child

STALENESS = 2.0

closed = Circuit(CLOSED, generation=4)
opened = Circuit(OPEN, opened_at_ms=900, generation=5)


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the view."""
    return Clock()


@pytest.fixture
def view(clock: Clock) -> View:
    """Return a view with a subscription to changes."""
    view = View(STALENESS, clock)
    view.mark_subscribed()
    return view


def fill(view: View, circuit: Circuit, now_ms: float = 1000) -> None:
    """Store an answer that came without delay."""
    view.store_answer(view.begin_read(), circuit, now_ms)


class TestStaleness:
    """A record is trusted for at most `max_staleness` after its request was sent."""

    def test_answer_is_trusted_until_max_staleness_after_its_request(self, view: View, clock: Clock) -> None:
        """The answer may describe the moment in which the request was sent, so trust counts from there."""
        ticket = view.begin_read()
        clock.now += 0.5
        view.store_answer(ticket, closed, 1000)
        clock.now += 1.4999
        assert view.read_trusted() == closed
        clock.now += 0.0001
        assert view.read_trusted() is None

    def test_no_record_is_trusted_before_the_subscription(self, clock: Clock) -> None:
        """Without push, only the next poll would find a change. That is too late for exact counts."""
        view = View(STALENESS, clock)
        fill(view, closed)
        assert view.read_trusted() is None
        assert view.cached == closed

    def test_answer_requested_before_the_subscription_is_not_trusted(self, clock: Clock) -> None:
        """Changes between the answer and the subscription were published before this process subscribed."""
        view = View(STALENESS, clock)
        ticket = view.begin_read()
        view.mark_subscribed()
        view.store_answer(ticket, closed, 1000)
        assert view.read_trusted() is None

    def test_answer_of_another_storage_does_not_extend_trust(self, view: View, clock: Clock) -> None:
        """The request time of another storage is not passed on with its answer."""
        fill(view, closed)
        clock.now += 1.9
        view.store_sibling_answer(opened, 2900)
        assert view.read_trusted() == opened
        clock.now += 0.1
        assert view.read_trusted() is None

    def test_confirming_poll_extends_trust_from_its_request(self, view: View, clock: Clock) -> None:
        """A poll extends trust from its request time, as any answer does."""
        fill(view, closed)
        clock.now += 1.0
        ticket = view.begin_read()
        clock.now += 0.5
        view.confirm_poll(ticket, 2000, failures=0, quiet=True)
        clock.now += 1.4999
        assert view.read_trusted() == closed
        clock.now += 0.0001
        assert view.read_trusted() is None

    def test_lost_connection_ends_trust_at_once(self, view: View) -> None:
        """After the connection is lost, the view receives no changes."""
        fill(view, closed)
        view.mark_unsubscribed()
        assert view.read_trusted() is None
        fill(view, closed, 1001)
        assert view.read_trusted() is None

    def test_outage_ends_trust_until_redis_is_reachable_again(self, view: View) -> None:
        """A call that Redis admitted must not settle in a local circuit."""
        fill(view, closed)
        ticket = view.begin_read()
        view.pause_trust()
        assert view.read_trusted() is None
        view.confirm_poll(view.begin_read(), 1100, failures=0, quiet=True)
        assert view.read_trusted() is None, "polls of the listener do not make Redis usable for calls"
        view.store_answer(ticket, closed, 1200)
        assert view.read_trusted() is None, "an answer requested before the outage"
        fill(view, closed, 1300)
        assert view.read_trusted() is None, "an answer to an attempt to reach Redis"
        view.resume_trust()
        fill(view, closed, 1400)
        assert view.read_trusted() == closed

    def test_child_of_a_fork_trusts_no_record(self, view: View) -> None:
        """A child of a fork has no listener."""
        fill(view, closed)
        reset_in_child(view)
        assert view.read_trusted() is None
        assert view.cached == closed


def test_server_whose_clock_is_set_back_is_trusted(view: View) -> None:
    """A request sent after the last answer gets a later record, whatever the server's clock shows."""
    fill(view, closed, 3_600_000)
    view.distrust_poll(view.begin_read())
    fill(view, closed, 1000)
    assert view.read_trusted() == closed
    view.confirm_poll(view.begin_read(), 500, failures=0, quiet=True)
    assert view.estimated_server_ms == 500


class TestServerClock:
    """Steps of the server's clock while the circuit is open leave its opening time on the local clock unchanged."""

    OPENED_AT = 500_000

    @staticmethod
    def note_answer(view: View, server_ms: float, local_ms: float) -> None:
        """Note an answer at a local time, by clocks that were not set."""
        now = Instant(local_ms, local_ms)
        view.clock_offset.note_answer_time(server_ms, now, now, is_waiting=True)

    def store_open(self, view: View) -> Circuit:
        """Fill the view with an open circuit.

        The server's clock shows 501,000 ms where the local one shows 1,000 ms.
        """
        circuit = replace(opened, opened_at_ms=self.OPENED_AT)
        self.note_answer(view, 501_000, 1_000)
        fill(view, circuit, 501_000)
        assert view.local_opened_at_ms(circuit) == 0
        return circuit

    @pytest.mark.parametrize("step_ms", [20_000, -20_000])
    @pytest.mark.parametrize("then", ["answer", "poll"])
    def test_step_while_open_moves_no_opening_time(self, view: View, step_ms: int, then: str) -> None:
        """The opening time stays for any number of reads."""
        circuit = self.store_open(view)
        for local_ms in (2_000, 3_000):
            server_ms = 500_000 + local_ms + step_ms
            self.note_answer(view, server_ms, local_ms)
            if then == "answer":
                fill(view, circuit, server_ms)
            else:
                view.confirm_poll(view.begin_read(), server_ms, failures=0, quiet=True)
            assert view.local_opened_at_ms(circuit) == 0

    def test_later_opening_time_is_one_of_the_new_clock(self, view: View) -> None:
        """The answer shows the step of the clock, too."""
        self.store_open(view)
        self.note_answer(view, 522_000, 2_000)
        later = replace(opened, opened_at_ms=521_500)
        fill(view, later, 522_000)
        assert view.local_opened_at_ms(later) == 1_500

    def test_opening_time_repaired_after_a_step_back_stays_where_it_was(self, view: View) -> None:
        """The clock was set back to before the opening time, so the record was repaired to open now."""
        self.store_open(view)
        self.note_answer(view, 482_000, 2_000)
        repaired = replace(opened, opened_at_ms=482_000)
        fill(view, repaired, 482_000)
        assert view.local_opened_at_ms(repaired) == 0

    def test_next_opening_at_an_earlier_time_of_the_new_clock_has_its_own_time(self, view: View) -> None:
        """A new generation is another opening, with its own opening time."""
        self.store_open(view)
        self.note_answer(view, 482_000, 2_000)
        again = replace(opened, generation=7, opened_at_ms=481_900)
        fill(view, again, 482_000)
        assert view.local_opened_at_ms(again) == 1_900

    def test_circuit_that_never_opened_has_no_opening_time(self, view: View) -> None:
        """No clock gives a closed circuit an opening time."""
        assert view.local_opened_at_ms(closed) is None

    def test_shared_answer_after_a_clock_step_is_not_trusted_before_the_next_answer(self, view: View) -> None:
        """The times of a shared answer mean nothing before an answer of this view shows the step of the clock."""
        self.note_answer(view, 501_000, 1_000)
        fill(view, closed, 501_000)
        view.store_sibling_answer(replace(closed, noisy_until_ms=522_000), 521_000)
        circuit = replace(opened, opened_at_ms=521_000)
        view.store_sibling_answer(circuit, 521_000)
        assert view.read_trusted() is None
        self.note_answer(view, 521_100, 1_100)
        fill(view, circuit, 521_100)
        assert view.read_trusted() == circuit
        assert view.local_opened_at_ms(circuit) == 1_000

    def test_shared_answer_by_the_known_clock_sets_the_opening_time(self, view: View) -> None:
        """A later step of the clock does not change that opening time either."""
        self.note_answer(view, 501_000, 1_000)
        fill(view, closed, 501_000)
        circuit = replace(opened, opened_at_ms=501_100)
        view.store_sibling_answer(circuit, 501_100)
        self.note_answer(view, 521_500, 1_500)
        assert view.local_opened_at_ms(circuit) == 1_100

    def test_poll_that_finds_a_lease_beyond_its_length_ends_trust(self, view: View) -> None:
        """The next call queries Redis, which repairs the record."""
        lease = replace(opened, state=HALF_OPEN, probe_token="a0", probe_until_ms=502_000, probe_lease_ms=1_000)
        fill(view, lease, 501_000)
        view.confirm_poll(view.begin_read(), 501_500, failures=0, quiet=True)
        assert view.read_trusted() == lease
        view.confirm_poll(view.begin_read(), 481_500, failures=0, quiet=True)
        assert view.read_trusted() is None


class TestWithoutSubscription:
    """Records that arrive at a view without a subscription."""

    def test_answer_of_another_storage_is_not_cached(self, clock: Clock) -> None:
        """A later change would not arrive."""
        view = View(STALENESS, clock)
        view.store_sibling_answer(opened, 1000)
        assert view.cached is None

    def test_late_push_of_a_closed_connection_needs_no_read(self, view: View) -> None:
        """There is no connection to read on."""
        fill(view, closed)
        view.mark_unsubscribed()
        assert not view.compare_push(opened)
        assert not view.compare_push(None)


class TestPushedRecords:
    """A pushed record changes no view, because users without write access may publish."""

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
    def test_different_pushed_record_causes_a_read_and_is_not_cached(self, view: View, pushed: Circuit | None) -> None:
        """Until the read that follows, calls use the view."""
        fill(view, closed)
        fast_path = (view.fast_path.admission, view.fast_path.quiet_admission, view.fast_path.trusted_until)
        assert view.compare_push(pushed)
        assert view.cached == closed
        assert view.read_trusted() == closed
        assert (view.fast_path.admission, view.fast_path.quiet_admission, view.fast_path.trusted_until) == fast_path

    def test_push_does_not_extend_trust(self, view: View, clock: Clock) -> None:
        """No number of pushes extends trust beyond `max_staleness`."""
        fill(view, closed)
        for _ in range(20):
            clock.now += STALENESS / 16
            view.compare_push(opened)
        assert view.read_trusted() is None

    def test_push_for_an_untrusted_record_causes_no_read(self, view: View, clock: Clock) -> None:
        """The next call queries Redis anyway."""
        fill(view, closed)
        clock.now += STALENESS
        assert not view.compare_push(opened)

    def test_push_during_a_pending_read_causes_a_read(self, view: View, clock: Clock) -> None:
        """The pending answer may be older than the change, and calls will use the answer."""
        fill(view, closed)
        clock.now += STALENESS
        slow = view.begin_read()
        assert view.compare_push(opened)
        assert view.is_in_use
        fill(view, opened, 2000)
        view.store_answer(slow, closed, 1900)
        assert view.read_trusted() == opened

    def test_push_during_an_outage_causes_a_read(self, view: View, clock: Clock) -> None:
        """While the server accepts no writes, the local circuit follows changes of the shared one."""
        fill(view, closed)
        view.pause_trust()
        clock.now += STALENESS
        assert view.compare_push(opened)

    def test_push_before_the_first_answer_is_not_cached(self, view: View) -> None:
        """A generation that was only pushed must reach no script."""
        assert not view.compare_push(opened)
        assert view.cached is None

    def test_push_of_the_cached_record_changes_nothing(self, view: View) -> None:
        """The process that closed the circuit need not read again because of its own push."""
        fill(view, closed)
        admission = view.fast_path.quiet_admission
        assert not view.compare_push(closed)
        assert view.fast_path.quiet_admission is admission

    def test_noise_mark_of_the_known_generation_ends_the_quiet_until_the_next_answer(self, view: View) -> None:
        """Successes are reported again. The answer to the first shows whether there was a failure."""
        fill(view, closed)
        assert not view.compare_push(replace(closed, noisy_until_ms=2500))
        assert view.fast_path.admission is not None
        assert view.fast_path.quiet_admission is None
        assert view.cached == closed
        fill(view, closed, 1500)
        assert view.fast_path.quiet_admission is not None

    def test_noise_mark_of_an_open_circuit_changes_nothing(self, view: View) -> None:
        """An open circuit has no successes to report."""
        fill(view, opened)
        rejection = view.fast_path.rejection
        assert not view.compare_push(replace(opened, noisy_until_ms=2500))
        assert view.fast_path.rejection is rejection is not None

    @pytest.mark.parametrize("arrives", ["answer", "poll"])
    def test_answer_requested_before_a_push_is_not_quiet(self, view: View, arrives: str) -> None:
        """The pushed failure may have been counted after the answer was given."""
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
    """The view keeps the later of two records, in whichever order they arrive."""

    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_older_generation_changes_nothing(self, view: View, arrives: str) -> None:
        """The older record comes from a slow answer, or from one that another storage shared."""
        fill(view, opened, 2000)
        if arrives == "answer":
            fill(view, closed, 3000)
        else:
            view.store_sibling_answer(closed, 3000)
        assert view.read_trusted() == opened

    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_earlier_instant_of_a_generation_changes_nothing(self, view: View, arrives: str) -> None:
        """The server's clock orders records of one generation."""
        later = replace(opened, opened_at_ms=1500)
        slow = view.begin_read()
        fill(view, later, 2000)
        if arrives == "answer":
            view.store_answer(slow, opened, 1999)
        else:
            view.store_sibling_answer(opened, 1999)
        assert view.read_trusted() == later

    def test_later_generation_is_cached_whatever_the_clock_shows(self, view: View) -> None:
        """A new server's clock may be behind. Until an answer shows by how much, the record is not trusted."""
        fill(view, closed, 2000)
        view.store_sibling_answer(opened, 5)
        assert view.cached == opened
        assert view.read_trusted() is None

    def test_reconnect_takes_the_clock_of_the_new_server(self, view: View) -> None:
        """After a failover, the clock of the new server may be behind that of the last one."""
        fill(view, closed, 9000)
        view.mark_subscribed()
        fill(view, replace(closed, opened_at_ms=1), 10)
        assert view.read_trusted() == replace(closed, opened_at_ms=1)

    def test_answer_requested_before_a_distrusted_poll_is_not_trusted(self, view: View) -> None:
        """A change by stock between the read and its storing is seen only once, and must not be lost."""
        fill(view, closed)
        slow = view.begin_read()
        view.distrust_poll(view.begin_read())
        view.store_answer(slow, closed, 1001)
        assert view.read_trusted() is None

    def test_poll_requested_before_a_change_changes_nothing(self, view: View) -> None:
        """The poll read a record from before the change. The next poll reads the new one."""
        fill(view, closed)
        slow = view.begin_read()
        view.store_sibling_answer(opened, 1500)
        view.distrust_poll(slow)
        assert view.read_trusted() == opened
        view.confirm_poll(slow, 1400, failures=0, quiet=True)
        assert view.fast_path.quiet_admission is None


class TestQuiet:
    """A success need not be reported if there is no failure for it to reset."""

    def quiet(self, view: View) -> bool:
        """Return whether a success may go unreported."""
        return view.read_trusted_quiet(closed.generation) is not None and view.fast_path.quiet_admission is not None

    def test_counter_at_zero_after_the_noise_is_quiet(self, view: View) -> None:
        """A later failure begins a new time of noise, which is published."""
        fill(view, replace(closed, noisy_until_ms=1000), 1000)
        assert self.quiet(view)

    def test_counter_at_zero_during_the_noise_is_not(self, view: View) -> None:
        """The next failure may publish nothing, because its time of noise has already begun."""
        fill(view, replace(closed, noisy_until_ms=1001), 1000)
        assert view.read_trusted() is not None
        assert not self.quiet(view)

    def test_failure_counter_above_zero_is_not_quiet_however_old(self, view: View) -> None:
        """A failure an hour ago and the failure after this success are not consecutive."""
        fill(view, replace(closed, fail_counter=1, noisy_until_ms=0), 3_600_000)
        assert not self.quiet(view)

    def test_transition_in_a_shared_answer_is_not_quiet(self, view: View) -> None:
        """A failure may have been pushed before the answer was shared."""
        fill(view, opened)
        view.store_sibling_answer(replace(closed, generation=6), 1500)
        assert view.fast_path.admission is not None
        assert view.fast_path.quiet_admission is None

    def test_shared_answer_of_the_same_instant_changes_nothing(self, view: View) -> None:
        """Both answers are of the same instant."""
        fill(view, closed)
        admission = view.fast_path.quiet_admission
        view.store_sibling_answer(closed, 1000)
        assert view.fast_path.quiet_admission is admission

    @pytest.mark.parametrize("order", ["success first", "noise first"])
    def test_noise_and_success_within_a_millisecond_are_not_quiet(self, view: View, order: str) -> None:
        """The order is unknown, and a needless report costs less than a wrong count."""
        fill(view, closed, 900)
        noise = replace(closed, noisy_until_ms=2000)
        if order == "success first":
            fill(view, closed, 1000)
            view.store_sibling_answer(noise, 1000)
        else:
            view.store_sibling_answer(noise, 1000)
            fill(view, closed, 1000)
        assert not self.quiet(view)

    def test_poll_updates_quiet(self, view: View) -> None:
        """A poll reads the counter, too, because stock counts failures without making noise."""
        fill(view, closed)
        view.confirm_poll(view.begin_read(), 1500, failures=1, quiet=False)
        assert not self.quiet(view)
        view.confirm_poll(view.begin_read(), 2000, failures=0, quiet=True)
        assert self.quiet(view)

    def test_other_generation_is_not_quiet(self, view: View) -> None:
        """Redis refuses a success that was admitted in an earlier generation."""
        fill(view, closed)
        assert view.read_trusted_quiet(3) is None
        assert view.read_trusted_quiet(None) is None, "changes by an operator are always sent"


class TestFastPath:
    """The fast path of calls follows from the trusted record."""

    def test_closed_circuit_admits_every_call(self, view: View) -> None:
        """One admission of the circuit's generation serves all calls."""
        fill(view, closed)
        assert view.fast_path.admission is not None
        assert view.fast_path.admission.generation == closed.generation

    @pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
    def test_circuit_that_is_not_closed_admits_no_call(self, view: View, state: str) -> None:
        """An open or half-open circuit decides about each call individually."""
        fill(view, closed)
        fill(view, replace(opened, state=state), 1500)
        assert view.read_trusted() is not None
        assert view.fast_path.admission is None

    def test_admission_changes_when_trust_was_interrupted(self, view: View) -> None:
        """Anything may have been published during the interruption, so callers must read again."""
        fill(view, closed)
        before = view.fast_path.admission
        view.distrust_poll(view.begin_read())
        fill(view, closed, 1500)
        assert view.fast_path.admission is not None
        assert view.fast_path.admission is not before

    def test_admission_stays_the_same_without_changes(self, view: View) -> None:
        """A new admission with each beat would send every thread to the slow path."""
        fill(view, closed)
        before = view.fast_path.admission
        view.confirm_poll(view.begin_read(), 1500, failures=0, quiet=True)
        fill(view, closed, 1600)
        assert view.fast_path.admission is before

    def test_trusted_read_marks_the_circuit_as_used(self, view: View) -> None:
        """A circuit without calls is not polled."""
        fill(view, closed)
        view.fast_path.was_used = False
        view.read_trusted()
        assert view.fast_path.was_used


def test_estimated_server_time_follows_the_monotonic_clock(view: View, clock: Clock) -> None:
    """A lease ends by the server's clock, which the view estimates."""
    fill(view, closed, 5000)
    clock.now += 1.5
    assert view.estimated_server_ms == 6500


def test_open_circuit_rejects_every_call_until_a_breaker_leaves_open(view: View) -> None:
    """A breaker that holds the rejection has been open since the view created it."""
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


def test_counter_is_that_of_the_last_answer_or_poll(view: View) -> None:
    """A local circuit starts with the cached counters."""
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
    """A push suspends trust until the circuit has been read again, at most ten times a second."""

    @pytest.mark.parametrize("answer", ["same", "other"])
    def test_trust_continues_with_the_next_answer(self, view: View, answer: str) -> None:
        """Trust continues whether the answer repeats the record or changes it."""
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

    def test_second_suspension_within_the_interval_changes_nothing(self, view: View, clock: Clock) -> None:
        """A user with the right to publish must not be able to slow down calls."""
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
    """The server's clock cannot order two answers of one millisecond.

    In one generation, a higher failure count is later.
    """

    noisy = replace(closed, noisy_until_ms=2000, fail_counter=1)

    @pytest.mark.parametrize("earlier", [closed, replace(noisy, fail_counter=0)])
    @pytest.mark.parametrize("arrives", ["answer", "share"])
    def test_record_without_the_known_failure_changes_nothing(self, view: View, arrives: str, earlier: Circuit) -> None:
        """A poll answer may arrive after that of a failure.

        Without the failure, an outage would start with a wrong count.
        """
        fill(view, closed, 900)
        poll = view.begin_read()
        fill(view, self.noisy, 1000)
        if arrives == "answer":
            view.store_answer(poll, earlier, 1000)
        else:
            view.store_sibling_answer(earlier, 1000)
        assert view.cached == self.noisy

    def test_poll_requested_before_the_second_failure_changes_nothing(self, view: View) -> None:
        """The second failure has changed only the counter."""
        fill(view, self.noisy, 1000)
        second = view.begin_read()
        poll = view.begin_read()
        view.store_answer(second, replace(self.noisy, fail_counter=2), 1000)
        view.confirm_poll(poll, 1000, failures=1, quiet=False)
        assert view.cached == replace(self.noisy, fail_counter=2)

    def test_answer_requested_later_is_cached(self, view: View) -> None:
        """The success after the failure has reset the counter."""
        fill(view, self.noisy, 1000)
        fill(view, replace(self.noisy, fail_counter=0), 1000)
        assert view.cached == replace(self.noisy, fail_counter=0)
