"""What the storages of one process share in an outage: the news, one local circuit, the way back, and the log."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import _log
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.bulk import bring_back_each, bring_back_first
from pybreaker_redis._circuits.local import LocalCircuit
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._engines.reader import ReadResult
from pybreaker_redis._model.intents import RecordFailure, Reply
from pybreaker_redis._runtime import logger
from pybreaker_redis._runtime.logger import LossThrottle
from pybreaker_redis._runtime.redaction import describe_error
from pybreaker_redis._servers.availability import Availability
from pybreaker_redis._servers.member import MemberFailure
from pybreaker_redis._servers.retry import ReturnAttempt
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import Down, breaker_on, down, fails, settled, up
from tests.support.clock import Clock
from tests.support.faults import Site
from tests.support.inspect import reset_in_child
from tests.support.logs import lines_of
from tests.support.outages import health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


def tenancy_of(breaker: pybreaker.CircuitBreaker) -> Any:
    """The breaker's tenancy."""
    return breaker._state_storage._core  # type: ignore[attr-defined]


@contextlib.contextmanager
def away(site: Site, *breakers: pybreaker.CircuitBreaker) -> Iterator[None]:
    """Redis is away, which all of these notice without a call."""
    site.proxy.refuse()
    site.proxy.hang_up()
    wait_for(lambda: all(health_of(breaker).condition == "unreachable" for breaker in breakers), "it is away")
    yield
    site.proxy.listen()
    wait_for(lambda: all(health_of(breaker).condition == "connected" for breaker in breakers), "it is back")


# -- one server --------------------------------------------------------------------------------------------------------


def test_circuits_with_different_timeouts_notice_a_dead_server_together(site: Site) -> None:
    """Of two timeouts on one server, both circuits are informed by the one listener."""
    breakers = [
        settled(breaker_on(site.client(), f"timeout {seconds}", timeout=seconds)) for seconds in (5.0, 6.0, None)
    ]
    assert len({id(tenancy_of(breaker).server) for breaker in breakers}) == 1
    with away(site, *breakers):
        assert {health_of(breaker).condition for breaker in breakers} == {"unreachable"}
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "the shared circuit")


def test_circuit_waits_no_longer_than_its_own_timeout_though_others_do(site: Site) -> None:
    """Timeouts belong to the circuits, though the server is one."""
    patient = breaker_on(site.client(), "patient", max_staleness=0, timeout=20.0)
    hasty = breaker_on(site.client(), "hasty", max_staleness=0, timeout=0.5)
    for breaker in (patient, hasty):
        breaker.call(up)
    site.server.pause()
    try:
        began = time.monotonic()
        hasty.call(up)
        assert time.monotonic() - began < 5
        assert health_of(patient).condition == "unreachable"
    finally:
        site.server.resume()
    wait_for(lambda: is_back(patient) and is_back(hasty), "both are back")


def test_first_attempt_waits_as_long_as_the_longest_timeout() -> None:
    """The thread that asks again asks for all circuits."""
    guard = Availability(0, has_retry_thread=True)
    for timeout in (0.25, 2.0, 0.5):
        guard.extend_answer_wait(timeout)
    outage = guard.note_failure(redis.ConnectionError())
    assert outage is not None
    assert outage.answer_wait_s == 2.0


# -- one local circuit -------------------------------------------------------------------------------------------------


def storages(site: Site, number: int = 3, **words: Any) -> list[pybreaker.CircuitBreaker]:
    """Breakers whose storages are one circuit, as in an application that makes one in each module."""
    return [breaker_on(site.client(), **{"timeout": 5.0, "reset_timeout": 60, **words}) for _ in range(number)]


@pytest.mark.parametrize("known", [True, False], ids=["used before", "away from the start"])
def test_storages_of_one_circuit_trip_after_fail_max_failures_in_all(site: Site, known: bool) -> None:
    """While Redis is away a process has one local circuit, not one for each storage."""
    breakers = storages(site, fail_max=4)
    if known:
        for breaker in breakers:
            settled(breaker)
    site.proxy.refuse()
    site.proxy.hang_up()
    wait_for(lambda: is_unreachable_for(breakers[0]), "it is away")
    reached = []
    for _ in range(4):
        for breaker in breakers:
            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                breaker.call(lambda: reached.append(1) or down())  # type: ignore[func-returns-value]
    assert len(reached) == 4
    assert {breaker.current_state for breaker in breakers} == {"open"}
    site.proxy.listen()
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "it is back")
    assert site.administrator.get("viewed:pybreaker:state") == b"open"
    assert {breaker.current_state for breaker in breakers} == {"open"}


def test_storages_of_one_circuit_probe_one_at_a_time(site: Site) -> None:
    """One probe of a process, not one for each storage."""
    breakers = [settled(breaker) for breaker in storages(site, fail_max=1, reset_timeout=0.05)]
    site.proxy.refuse()
    site.proxy.hang_up()
    wait_for(lambda: is_unreachable_for(breakers[0]), "it is away")
    fails(breakers[0])
    time.sleep(0.06)  # the timeout, so that it is time to try
    probes: list[int] = []

    def probe() -> None:
        probes.append(1)
        for other in breakers[1:]:
            with pytest.raises(pybreaker.CircuitBreakerError):
                other.call(lambda: probes.append(1))

    breakers[0].call(probe)
    assert len(probes) == 1
    assert [breaker.current_state for breaker in breakers] == ["closed"] * 3
    site.proxy.listen()
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "it is back")


def test_storages_of_one_circuit_report_their_failures_once(site: Site) -> None:
    """Each failure counts once, whichever storage it was reported to."""
    breakers = [settled(breaker) for breaker in storages(site, fail_max=100)]
    with away(site, *breakers):
        for breaker in breakers:
            fails(breaker, 2)
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all go by the shared circuit")
    assert site.administrator.get("viewed:pybreaker:fail_counter") == b"6"


def test_failure_that_is_counted_alone_just_when_redis_is_back_is_reported(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller was on the way to the local circuit when that ended; the circuit begins again, and is brought back."""
    breaker = settled(breaker_on(site.client(), fail_max=9, timeout=5.0))
    tenancy = tenancy_of(breaker)
    execute = LocalCircuit.decide_locally

    def late(own: LocalCircuit, intent: Any, *arguments: Any, **words: Any) -> Reply:
        if isinstance(intent, RecordFailure):
            monkeypatch.undo()
            site.proxy.listen()
            wait_for(lambda: not own.is_running and tenancy.server.availability.outage is None, "it is back")
        return execute(own, intent, *arguments, **words)

    site.proxy.refuse()
    site.proxy.hang_up()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    breaker.call(up)
    monkeypatch.setattr(LocalCircuit, "decide_locally", late)
    fails(breaker)
    wait_for(lambda: breaker.fail_counter == 1 and is_back(breaker), "the failure is reported")


def test_storages_that_begin_differently_have_a_local_circuit_each(site: Site) -> None:
    """A storage does what it was told, though another one of its circuit was told something else."""
    closed = settled(breaker_on(site.client(), timeout=5.0))
    opened = settled(breaker_on(site.client(), timeout=5.0, fallback_circuit_state="open"))
    with away(site, closed, opened):
        assert closed.call(up) == "answer"
        with pytest.raises(pybreaker.CircuitBreakerError):
            opened.call(up)
    for breaker in (closed, opened):
        wait_for(lambda breaker=breaker: is_back(breaker), "it is back")


def test_trouble_of_one_storage_leaves_the_others_with_redis(site: Site) -> None:
    """A storage that is alone for a reason of its own keeps no other away from the shared circuit."""
    troubled, well = (settled(breaker) for breaker in storages(site, 2))
    tenancy_of(troubled)._note_failure(TypeError("of its own"), time.monotonic())
    troubled.call(up)
    assert health_of(troubled).is_own
    assert well.call(up) == "answer"
    assert not health_of(well).is_own
    wait_for(lambda: is_back(troubled), "it is back", within=15)


def test_circuit_in_use_before_its_place_was_known_is_reported(site: Site) -> None:
    """A callable that returned no client at first: what was learned then is reported when the place is known."""
    other = settled(breaker_on(site.client(), fail_max=100, timeout=5.0))
    client, tries = site.client(), []

    def given() -> redis.Redis:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no setting yet")
        return client

    late = breaker_on(given, fail_max=100, timeout=5.0)
    late.call(up)
    assert health_of(late).is_own
    wait_for(lambda: is_back(late), "it is back", within=15)
    assert tenancy_of(late).local is tenancy_of(other).local


# -- the way back ------------------------------------------------------------------------------------------------------


def test_circuits_that_have_learned_nothing_are_read_in_batches(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand circuits are back after a few round trips; the one that has opened alone is reported for itself."""
    monkeypatch.setattr(bulk, "READ_BATCH_CIRCUITS", 20)
    breakers = [breaker_on(site.client(), f"circuit{number}", fail_max=2, timeout=5.0) for number in range(50)]
    for breaker in breakers:
        settled(breaker)
    ours = {id(tenancy_of(breaker).shared) for breaker in breakers}
    executed: list[str] = []
    execute = SharedCircuit.execute_at

    def noted(shared: SharedCircuit, choice: Any, intent: Any, **words: Any) -> Reply:
        # Circuits of an earlier test may have the same names.
        if id(shared) in ours:
            executed.append(shared._name)
        return execute(shared, choice, intent, **words)

    with away(site, *breakers):
        for breaker in breakers:
            breaker.call(up)
        assert all(health_of(breaker).is_own for breaker in breakers)
        fails(breakers[7], 2)
        monkeypatch.setattr(SharedCircuit, "execute_at", noted)
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all are back")
    assert set(executed) == {"circuit7"}
    assert site.administrator.get("circuit7:pybreaker:state") == b"open"


def test_circuit_that_others_have_moved_is_read_with_the_batch(site: Site) -> None:
    """The views hold what was read: an open circuit rejects at once."""
    ours = settled(breaker_on(site.client(), reset_timeout=60, timeout=5.0))
    with contextlib.closing(site.server.client()) as direct:
        theirs = breaker_on(direct, reset_timeout=60, timeout=5.0)
        with away(site, ours):
            ours.call(up)
            theirs.open()
    with pytest.raises(pybreaker.CircuitBreakerError):
        ours.call(up)


def test_circuits_of_an_emptied_server_are_restored(site: Site) -> None:
    """Their records have to be written, so they are loaded one by one, and one line counts them."""
    breakers = [breaker_on(site.client(), f"circuit{number}", reset_timeout=60, timeout=5.0) for number in range(3)]
    for breaker in breakers:
        settled(breaker).open()
    with away(site, *breakers):
        for breaker in breakers:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)
        site.administrator.flushall()
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all are back")
    for number in range(3):
        assert site.administrator.get(f"circuit{number}:pybreaker:state") == b"open"


def test_caller_that_brings_a_circuit_back_meanwhile_is_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers are let in before the last circuit is back, and what they find is in the one line, too."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=1, reset_timeout=60, timeout=5.0))

    def callers_come(attempt: ReturnAttempt) -> None:
        if not health_of(breaker).next_attempt:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)

    monkeypatch.setattr(bulk, "RETURN_FIRST_CIRCUITS_MAX", 0)
    monkeypatch.setattr(bulk, "bring_back_rest", callers_come)
    with away(site, breaker):
        fails(breaker)
    wait_for(lambda: any("is back" in line for line in lines_of(caplog, site)), "it is logged")
    assert "circuits: 1 opened for all" in lines_of(caplog, site)[-1]


def test_error_that_ends_the_bringing_back_is_an_outage(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has gone again, so that the thread goes on to ask."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    tenancy, gone = tenancy_of(breaker), redis.ConnectionError("gone again")
    ended = [MemberFailure(gone, tenancy, time.monotonic() + 60)]
    monkeypatch.setattr(bulk, "bring_back_rest", lambda attempt: ended.pop() if ended else None)
    with away(site, breaker):
        breaker.call(up)
    wait_for(lambda: not ended, "it has gone again")
    assert health_of(breaker).last_error == "ConnectionError: gone again"
    wait_for(lambda: is_back(breaker), "it is back")


def test_server_that_all_circuits_have_left_in_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """They live on other nodes of a cluster; of a server that answered nothing is logged."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    lone: Any = Lone()
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)
    server.remove_member(lone)
    assert lines_of(caplog) == []
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)
    server.availability.note_failure(redis.ConnectionError("gone"))
    server.remove_member(lone)
    assert "its circuits live on other nodes of the cluster" in lines_of(caplog)[0]


def test_first_answers_that_come_together_are_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one has ended the trouble already."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    faults = tenancy_of(breaker)._faults
    tenancy_of(breaker)._note_failure(TypeError("of its own"), time.monotonic())
    answered = faults.note_answer
    with monkeypatch.context() as patched:
        patched.setattr(faults, "note_answer", lambda: answered() and None)
        faults.outage = replace(faults.outage, next_attempt_at=0.0)
        breaker.call(up)
    assert len(lines_of(caplog, site)) == 1
    assert is_back(breaker)


class Lone:
    """A tenant that is alone.

    Args:
        error: Raised by all that it does.
    """

    timeout, uses_local = 1.0, True

    def __init__(self, error: Exception | None = None, question: Any = None) -> None:
        self.loaded = 0
        self._error = error
        self._question = question
        self.shared: Any = self

    @property
    def read_request(self) -> Any:
        """What has to be known to read it."""
        if self._question is None:
            raise LookupError
        return self._question

    def begin_bulk_read(self) -> None:
        """Nothing is known."""

    def on_server_lost(self) -> None:
        """It is alone already."""

    def move_if_relocated(self) -> bool:
        """The circuit has not moved."""
        return False

    def load(self) -> None:
        """It is asked for."""
        self.loaded += 1
        if self._error:
            raise self._error

    def bring_back(self) -> str:
        """It is back."""
        return "restored"

    def verify_writable(self) -> None:
        """It is."""

    def resume_if_unchanged(self) -> None:
        """It does not."""
        pytest.fail("it could not be read")


def test_loss_that_a_caller_meets_while_circuits_are_brought_back_is_logged_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The return of before is no news any more."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    lone: Any = Lone()
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)

    def goes(said: str) -> None:
        server.report_failure(redis.ConnectionError(said), lone, time.monotonic())

    def returns(members: Any, attempt: ReturnAttempt) -> None:
        attempt.let_callers_in()
        goes("again")

    monkeypatch.setattr(server, "_ensure_retry_thread", lambda: True)
    lone.on_server_returned = returns
    goes("at first")
    assert server.availability.outage is not None
    server._attempt_return(server.availability.outage)
    monkeypatch.setattr(server._loss_log, "_window_ends_at", 0.0)
    server._loss_log.flush_held_line()
    assert ["at first" in line or "again" in line for line in lines_of(caplog)] == [True, True]


def test_server_that_goes_while_circuits_are_brought_back_is_not_asked_for_each() -> None:
    """Each of the others would wait for it; a circuit with a trouble of its own keeps no other away."""
    tenants: Any = [Lone(TypeError()), Lone(), Lone(redis.ConnectionError("gone")), Lone()]
    outcomes: Counter[str] = Counter()
    ended_by = bring_back_each(tenants, outcomes)
    assert ended_by is not None
    assert ended_by.member is tenants[2]
    assert [tenant.loaded for tenant in tenants] == [1, 1, 1, 0]
    assert outcomes == {"restored": 1}


def test_circuit_whose_place_is_not_known_is_left_for_later() -> None:
    """It is loaded by itself."""
    bring_back_first([Lone()], 1.0, Counter())  # type: ignore[list-item]


@pytest.mark.parametrize("why", ["the pipeline fails", "the circuit may not be read", "the server is loading"])
def test_batch_that_cannot_be_read(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a circuit's own trouble leaves it for later; what is the server's is raised."""
    found = {
        "the circuit may not be read": redis.exceptions.NoPermissionError("no"),
        "the server is loading": redis.exceptions.BusyLoadingError("loading"),
    }

    def read(questions: Any) -> Any:
        if why == "the pipeline fails":
            raise AttributeError("pipeline")
        return [ReadResult(error=found[why])]

    monkeypatch.setattr(bulk, "read_circuits", read)
    lone: Any = Lone(question=type("ReadRequest", (), {"client": object()}))
    if why == "the server is loading":
        with pytest.raises(redis.ConnectionError):
            bring_back_first([lone], 1.0, Counter())
    else:
        bring_back_first([lone], 1.0, Counter())


@pytest.mark.slow
def test_two_thousand_circuits_rejoin_beside_a_busy_thread(site: Site, report: Callable[[str], None]) -> None:
    """One round trip for each circuit takes a turn of the interpreter each: half a minute for 5,000."""
    breakers = [breaker_on(site.client(), f"circuit{number}", timeout=10.0) for number in range(2000)]
    for breaker in breakers:
        breaker.call(up)
    is_over = threading.Event()

    def spin() -> None:
        while not is_over.is_set():
            sum(range(1000))

    site.proxy.refuse()
    site.proxy.hang_up()
    wait_for(lambda: is_unreachable_for(breakers[0]), "it is away")
    for breaker in breakers:
        breaker.call(up)
    busy = threading.Thread(target=spin)
    busy.start()
    try:
        began = time.monotonic()
        site.proxy.listen()
        wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all are back", within=60)
        seconds = time.monotonic() - began
    finally:
        is_over.set()
        busy.join()
    report(f"2,000 circuits rejoined in {seconds:.1f} s beside a busy thread")
    assert seconds < 6


# -- the log -----------------------------------------------------------------------------------------------------------


def test_flapping_server_is_logged_once_a_minute_with_a_count(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first loss and the first return at once, further ones are counted, and how it is in the end is logged."""
    caplog.set_level("INFO", "pybreaker_redis")
    breakers = [settled(breaker_on(site.client(), f"circuit{number}", timeout=5.0)) for number in range(3)]
    server = tenancy_of(breakers[0]).server
    for _ in range(10):
        with away(site, *breakers):
            pass
    assert len(lines_of(caplog, site)) == 2, lines_of(caplog, site)
    assert ["is away" in line for line in lines_of(caplog, site)] == [True, False]
    wait_for(lambda: server._loss_log.has_held_line, "the last return is held")
    server._loss_log._window_ends_at = 0.0  # the minute is over
    wait_for(lambda: len(lines_of(caplog, site)) == 3, "how it is in the end")
    last = caplog.records[-1]
    assert "is back after" in last.getMessage()
    assert last.getMessage().endswith("; and 9 more losses in the last 60 s")
    assert last.pybreaker_redis["more_losses"] == 9  # type: ignore[attr-defined]


def test_circuit_with_a_flapping_trouble_is_logged_once_a_minute(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The same for what is one circuit's own trouble."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    tenancy = tenancy_of(breaker)
    for _ in range(3):
        tenancy._note_failure(TypeError("of its own"), time.monotonic())
        tenancy._faults.outage = replace(tenancy._faults.outage, next_attempt_at=0.0)
        wait_for(lambda: is_back(breaker), "it is served")
    assert len(lines_of(caplog, site)) == 2
    tenancy._fault_log._window_ends_at = 0.0
    tenancy._note_failure(TypeError("of its own"), time.monotonic())
    assert lines_of(caplog, site)[-1].endswith("; and 2 more losses in the last 60 s")
    tenancy._note_failure(TypeError("of its own"), time.monotonic())
    assert len(lines_of(caplog, site)) == 3


class TestBulletin:
    """The lines about one subject, under a clock that tests move."""

    @pytest.fixture
    def clock(self) -> Clock:
        """The bulletin's clock."""
        return Clock()

    @pytest.fixture
    def lines(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Messages that were emitted."""
        messages: list[str] = []
        monkeypatch.setattr(logger, "emit", lambda line: messages.append(line.message))
        return messages

    @pytest.fixture
    def bulletin(self, clock: Clock, lines: list[str]) -> Any:
        """A bulletin, with two words of its own."""

        class Noted(LossThrottle):
            def goes(self) -> None:
                self.log_loss(lambda more: _log.detail(f"away {more}"))

            def comes(self) -> None:
                self.log_return(lambda more: _log.detail(f"back {more}"))

        return Noted(clock)

    def test_first_pair_is_logged_at_once_and_further_ones_are_counted(self, bulletin: Any, lines: list[str]) -> None:
        """Nothing is held after the first pair."""
        bulletin.goes()
        bulletin.comes()
        assert not bulletin.has_held_line
        for _ in range(3):
            bulletin.goes()
            bulletin.comes()
        assert lines == ["away 0", "back 0"]
        assert bulletin.has_held_line

    @pytest.mark.parametrize(("ends", "line"), [("goes", "away 2"), ("comes", "back 3")])
    def test_last_condition_is_logged_when_the_window_is_over(
        self, bulletin: Any, lines: list[str], clock: Clock, ends: str, line: str
    ) -> None:
        """Whichever it is; a loss that is named is not among those that are counted."""
        for _ in range(3):
            bulletin.goes()
            bulletin.comes()
        bulletin.goes()
        if ends == "comes":
            bulletin.comes()
        clock.now += logger.LOSS_WINDOW_S - 1
        bulletin.flush_held_line()
        assert len(lines) == 2
        clock.now += 1
        bulletin.flush_held_line()
        bulletin.flush_held_line()
        assert lines[2:] == [line]

    def test_return_of_a_loss_that_was_logged_late_is_logged(
        self, bulletin: Any, lines: list[str], clock: Clock
    ) -> None:
        """A pair is complete, and begins a new window."""
        bulletin.goes()
        bulletin.comes()
        bulletin.goes()
        clock.now += logger.LOSS_WINDOW_S
        bulletin.flush_held_line()
        bulletin.comes()
        bulletin.goes()
        assert lines == ["away 0", "back 0", "away 0", "back 0"]

    def test_return_after_the_window_is_logged_at_once(self, bulletin: Any, lines: list[str], clock: Clock) -> None:
        """Though its loss was counted only."""
        bulletin.goes()
        bulletin.comes()
        bulletin.goes()
        clock.now += logger.LOSS_WINDOW_S
        bulletin.comes()
        assert lines == ["away 0", "back 0", "back 1"]

    def test_child_logs_nothing_of_its_parents(self, bulletin: Any, lines: list[str], clock: Clock) -> None:
        """The parent has counted it, and logs it."""
        bulletin.goes()
        bulletin.comes()
        bulletin.goes()
        reset_in_child(bulletin)
        clock.now += logger.LOSS_WINDOW_S
        bulletin.flush_held_line()
        assert len(lines) == 2


@pytest.mark.parametrize(
    ("error", "text"), [(TimeoutError(), "TimeoutError"), (KeyError("name"), "KeyError: 'name'")], ids=["empty", "not"]
)
def test_empty_error_is_described_by_its_class_alone(
    site: Site, error: Exception, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No colon that nothing follows."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    assert describe_error(error) == text
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    tenancy = tenancy_of(breaker)
    tenancy._note_failure(error, time.monotonic())
    assert health_of(breaker).last_error == text
    assert text + ")" in lines_of(caplog, site)[0]
