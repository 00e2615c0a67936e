"""Tests of what all storages of a process share in an outage: its notice, the local circuit, the return, the log."""

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
from pybreaker_redis._servers.member import MemberFailure, ReturnProgress
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import Down, breaker_on, down, fails, settled, up
from tests.support.clock import Clock
from tests.support.faults import Site
from tests.support.inspect import (
    attempt_return,
    circuit_name_of,
    core_of,
    end_log_window,
    fail_circuit,
    faults_of,
    outage_log_of,
    replace_retry_thread,
    reset_in_child,
)
from tests.support.logs import lines_of, records_of
from tests.support.outages import health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


def failover_of(breaker: pybreaker.CircuitBreaker) -> Any:
    """Return the object that switches between the shared and the local circuit of a breaker."""
    return core_of(breaker)


@contextlib.contextmanager
def unreachable(site: Site, *breakers: pybreaker.CircuitBreaker) -> Iterator[None]:
    """Make Redis unreachable for the block, noticed by all these breakers without a call."""
    site.proxy.refuse()
    site.proxy.close_connections()
    wait_for(
        lambda: all(health_of(breaker).condition == "unreachable" for breaker in breakers), "the outage is noticed"
    )
    yield
    site.proxy.listen()
    wait_for(lambda: all(health_of(breaker).condition == "connected" for breaker in breakers), "the return is noticed")


# -- one server --------------------------------------------------------------------------------------------------------


def test_circuits_with_different_timeouts_notice_a_dead_server_together(site: Site) -> None:
    """Circuits of one server with different timeouts share its listener, so all of them notice an outage at once."""
    breakers = [
        settled(breaker_on(site.client(), f"timeout {seconds}", timeout=seconds)) for seconds in (5.0, 6.0, None)
    ]
    assert len({id(failover_of(breaker).server) for breaker in breakers}) == 1
    with unreachable(site, *breakers):
        assert {health_of(breaker).condition for breaker in breakers} == {"unreachable"}
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "the shared circuit is in use again")


def test_circuit_waits_no_longer_than_its_own_timeout_beside_a_longer_one(site: Site) -> None:
    """A timeout belongs to a circuit, although all circuits share one server."""
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
    wait_for(lambda: is_back(patient) and is_back(hasty), "both have returned")


def test_first_attempt_waits_as_long_as_the_longest_timeout() -> None:
    """The retry thread acts for all circuits, so its first attempt waits as long as the longest timeout."""
    availability = Availability(0, has_retry_thread=True)
    for timeout in (0.25, 2.0, 0.5):
        availability.extend_answer_wait(timeout)
    outage = availability.note_failure(redis.ConnectionError())
    assert outage is not None
    assert outage.answer_wait_s == 2.0


# -- one local circuit -------------------------------------------------------------------------------------------------


def storages(site: Site, number: int = 3, **options: Any) -> list[pybreaker.CircuitBreaker]:
    """Return breakers of one circuit, each with its own storage, as in an application of several modules."""
    return [breaker_on(site.client(), **{"timeout": 5.0, "reset_timeout": 60, **options}) for _ in range(number)]


@pytest.mark.parametrize("was_used", [True, False], ids=["used before", "unreachable from the start"])
def test_storages_of_one_circuit_trip_after_fail_max_failures_in_all(site: Site, was_used: bool) -> None:
    """In an outage a process has one local circuit, not one for each storage."""
    breakers = storages(site, fail_max=4)
    if was_used:
        for breaker in breakers:
            settled(breaker)
    site.proxy.refuse()
    site.proxy.close_connections()
    wait_for(lambda: is_unreachable_for(breakers[0]), "the outage is noticed")
    reached = []
    for _ in range(4):
        for breaker in breakers:
            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                breaker.call(lambda: reached.append(1) or down())  # type: ignore[func-returns-value]
    assert len(reached) == 4
    assert {breaker.current_state for breaker in breakers} == {"open"}
    site.proxy.listen()
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "the return is noticed")
    assert site.administrator.get("viewed:pybreaker:state") == b"open"
    assert {breaker.current_state for breaker in breakers} == {"open"}


def test_storages_of_one_circuit_probe_one_at_a_time(site: Site) -> None:
    """In an outage a process makes one probe at a time, not one for each storage."""
    breakers = [settled(breaker) for breaker in storages(site, fail_max=1, reset_timeout=0.05)]
    site.proxy.refuse()
    site.proxy.close_connections()
    wait_for(lambda: is_unreachable_for(breakers[0]), "the outage is noticed")
    fails(breakers[0])
    time.sleep(0.06)  # the reset timeout, so that a probe is due
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
        wait_for(lambda breaker=breaker: is_back(breaker), "the return is noticed")


def test_storages_of_one_circuit_report_their_failures_once(site: Site) -> None:
    """On return each failure counts once, whichever storage it was reported to."""
    breakers = [settled(breaker) for breaker in storages(site, fail_max=100)]
    with unreachable(site, *breakers):
        for breaker in breakers:
            fails(breaker, 2)
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all storages use the shared circuit")
    assert site.administrator.get("viewed:pybreaker:fail_counter") == b"6"


def test_failure_in_the_local_circuit_at_the_moment_of_return_is_reported(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that reaches the local circuit just after its end starts that circuit again, and is reported."""
    breaker = settled(breaker_on(site.client(), fail_max=9, timeout=5.0))
    failover = failover_of(breaker)
    execute = LocalCircuit.decide_locally

    def late(own: LocalCircuit, intent: Any, *arguments: Any, **options: Any) -> Reply:
        if isinstance(intent, RecordFailure):
            monkeypatch.undo()
            site.proxy.listen()
            wait_for(lambda: not own.is_active and failover.server.availability.outage is None, "the return is noticed")
        return execute(own, intent, *arguments, **options)

    site.proxy.refuse()
    site.proxy.close_connections()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    breaker.call(up)
    monkeypatch.setattr(LocalCircuit, "decide_locally", late)
    fails(breaker)
    wait_for(lambda: breaker.fail_counter == 1 and is_back(breaker), "the failure is reported to Redis")


def test_storages_with_different_fallback_states_have_a_local_circuit_each(site: Site) -> None:
    """A storage keeps its `fallback_circuit_state`, although another storage of the circuit has another one."""
    closed = settled(breaker_on(site.client(), timeout=5.0))
    opened = settled(breaker_on(site.client(), timeout=5.0, fallback_circuit_state="open"))
    with unreachable(site, closed, opened):
        assert closed.call(up) == "answer"
        with pytest.raises(pybreaker.CircuitBreakerError):
            opened.call(up)
    for breaker in (closed, opened):
        wait_for(lambda breaker=breaker: is_back(breaker), "the return is noticed")


def test_error_of_one_storage_does_not_stop_the_others_from_using_redis(site: Site) -> None:
    """An error that concerns one storage alone keeps no other storage from the shared circuit."""
    failing, well = (settled(breaker) for breaker in storages(site, 2))
    fail_circuit(failover_of(failing), TypeError("of one circuit"))
    failing.call(up)
    assert health_of(failing).is_own
    assert well.call(up) == "answer"
    assert not health_of(well).is_own
    wait_for(lambda: is_back(failing), "the return is noticed", within=15)


def test_local_circuit_of_an_unknown_server_is_reported_once_it_is_known(site: Site) -> None:
    """A client source that fails at first: failures in the local circuit are reported once it returns a client."""
    other = settled(breaker_on(site.client(), fail_max=100, timeout=5.0))
    client, tries = site.client(), []

    def client_source() -> redis.Redis:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no setting yet")
        return client

    late = breaker_on(client_source, fail_max=100, timeout=5.0)
    late.call(up)
    assert health_of(late).is_own
    wait_for(lambda: is_back(late), "the return is noticed", within=15)
    assert failover_of(late).local is failover_of(other).local


# -- the return --------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_circuits_without_local_changes_are_read_in_batches(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many circuits return in a few round trips.  A circuit that opened in the outage is reported individually."""
    monkeypatch.setattr(bulk, "READ_BATCH_CIRCUITS", 20)
    breakers = [breaker_on(site.client(), f"circuit{number}", fail_max=2, timeout=5.0) for number in range(50)]
    for breaker in breakers:
        settled(breaker)
    own_circuits = {id(failover_of(breaker).shared) for breaker in breakers}
    executed: list[str] = []
    execute = SharedCircuit.execute_at

    def recorded(shared: SharedCircuit, choice: Any, intent: Any, **options: Any) -> Reply:
        # Circuits of an earlier test may have the same names.
        if id(shared) in own_circuits:
            executed.append(circuit_name_of(shared))
        return execute(shared, choice, intent, **options)

    with unreachable(site, *breakers):
        for breaker in breakers:
            breaker.call(up)
        assert all(health_of(breaker).is_own for breaker in breakers)
        fails(breakers[7], 2)
        monkeypatch.setattr(SharedCircuit, "execute_at", recorded)
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all have returned")
    assert set(executed) == {"circuit7"}
    assert site.administrator.get("circuit7:pybreaker:state") == b"open"


def test_circuit_changed_by_another_process_is_updated_by_the_batch(site: Site) -> None:
    """The batch updates the views: a circuit that another process opened rejects calls at once."""
    own_circuits = settled(breaker_on(site.client(), reset_timeout=60, timeout=5.0))
    with contextlib.closing(site.server.client()) as direct:
        theirs = breaker_on(direct, reset_timeout=60, timeout=5.0)
        with unreachable(site, own_circuits):
            own_circuits.call(up)
            theirs.open()
    with pytest.raises(pybreaker.CircuitBreakerError):
        own_circuits.call(up)


def test_circuits_of_an_emptied_server_are_restored(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Circuits of an emptied server are restored one by one, because each needs a write, and counted as restored."""
    caplog.set_level("INFO", "pybreaker_redis")
    breakers = [breaker_on(site.client(), f"circuit{number}", reset_timeout=60, timeout=5.0) for number in range(3)]
    for breaker in breakers:
        settled(breaker).open()
    with unreachable(site, *breakers):
        for breaker in breakers:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)
        site.administrator.flushall()
    wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all have returned")
    for number in range(3):
        assert site.administrator.get(f"circuit{number}:pybreaker:state") == b"open"
    wait_for(lambda: any("is available again" in line for line in lines_of(caplog, site)), "the return is logged")
    assert lines_of(caplog, site)[-1].endswith("circuits: 3 restored")


def test_circuit_restored_by_a_caller_is_counted_in_the_line_of_the_return(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A circuit that a caller restores during the return is counted in the log line of the return."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=1, reset_timeout=60, timeout=5.0))

    def callers_come(attempt: ReturnProgress) -> None:
        if not health_of(breaker).next_attempt:
            with pytest.raises(pybreaker.CircuitBreakerError):
                breaker.call(up)

    monkeypatch.setattr(bulk, "RETURN_FIRST_CIRCUITS_MAX", 0)
    monkeypatch.setattr(bulk, "bring_back_rest", callers_come)
    with unreachable(site, breaker):
        fails(breaker)
    wait_for(lambda: any("is available again" in line for line in lines_of(caplog, site)), "the return is logged")
    assert "circuits: 1 opened for all" in lines_of(caplog, site)[-1]


def test_error_during_the_return_starts_another_outage(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error during the return starts another outage, so the retry thread continues."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    failover, gone = failover_of(breaker), redis.ConnectionError("gone again")
    ended = [MemberFailure(gone, failover, time.monotonic() + 60)]
    monkeypatch.setattr(bulk, "bring_back_rest", lambda attempt: ended.pop() if ended else None)
    with unreachable(site, breaker):
        breaker.call(up)
    wait_for(lambda: not ended, "the second outage begins")
    assert health_of(breaker).last_error == "ConnectionError: gone again"
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_outage_of_a_node_without_circuits_ends_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """If no circuit of a cluster node answered before all moved away, one line ends the outage of this node."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    lone: Any = Lone()
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)
    server.remove_member(lone)
    assert lines_of(caplog, str(server)) == []
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)
    server.availability.note_failure(redis.ConnectionError("gone"))
    server.remove_member(lone)
    assert "all circuits have moved to other nodes of the cluster" in lines_of(caplog, str(server))[0]


def test_two_answers_that_end_an_error_log_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of two answers finds that the first one has ended the error."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    faults = faults_of(failover_of(breaker))
    fail_circuit(failover_of(breaker), TypeError("of one circuit"))
    answered = faults.note_answer
    with monkeypatch.context() as patched:
        patched.setattr(faults, "note_answer", lambda: answered() and None)
        faults.outage = replace(faults.outage, next_attempt_at=0.0)
        breaker.call(up)
    assert len(lines_of(caplog, site)) == 1
    assert is_back(breaker)


class Lone:
    """Member of a server without any other member.

    Args:
        error: Raised by every method that queries Redis.
        read_request: Request that a batch would send for this circuit, or `None` if its location is unknown.
    """

    timeout, uses_local = 1.0, True

    def __init__(self, error: Exception | None = None, read_request: Any = None) -> None:
        self.loaded = 0
        self._error = error
        self._question = read_request
        self.shared: Any = self

    def locate_read_request(self) -> Any:
        """Request that a batch would send for this circuit."""
        if self._question is None:
            raise LookupError
        return self._question

    def begin_bulk_read(self) -> None:
        """Return nothing: the circuit is unknown."""

    def on_server_lost(self) -> None:
        """Do nothing: the circuit is local already."""

    def move_if_relocated(self) -> bool:
        """Return False: the circuit stays on its server."""
        return False

    def load(self) -> None:
        """Count the query."""
        self.loaded += 1
        if self._error:
            raise self._error

    def bring_back(self) -> str:
        """Return the outcome of a return."""
        return "restored"

    def verify_writable(self) -> None:
        """Accept the circuit."""

    def resume_if_unchanged(self) -> None:
        """Fail: the circuit could not be read."""
        pytest.fail("it could not be read")


def test_loss_during_the_return_is_logged_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A return that a new loss has overtaken is not logged."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    lone: Any = Lone()
    server.add_member(lone, circuit="lone", timeout_s=1.0, max_staleness_s=1.0)

    def lose(text: str) -> None:
        server.report_failure(redis.ConnectionError(text), lone, time.monotonic())

    def returns(members: Any, attempt: ReturnProgress) -> None:
        attempt.let_callers_in()
        lose("again")

    replace_retry_thread(monkeypatch, server, runs=True)
    lone.on_server_returned = returns
    lose("at first")
    assert server.availability.outage is not None
    attempt_return(server, server.availability.outage)
    end_log_window(server)
    outage_log_of(server).flush_held_line()
    assert ["at first" in line or "again" in line for line in lines_of(caplog, str(server))] == [True, True]


def test_server_that_fails_during_the_return_is_not_queried_for_each_circuit() -> None:
    """A server that fails during the return is not queried once per circuit.  Other errors skip one circuit only."""
    members: Any = [Lone(TypeError()), Lone(), Lone(redis.ConnectionError("gone")), Lone()]
    outcomes: Counter[str] = Counter()
    ended_by = bring_back_each(members, outcomes)
    assert ended_by is not None
    assert ended_by.member is members[2]
    assert [member.loaded for member in members] == [1, 1, 1, 0]
    assert outcomes == {"restored": 1}


def test_circuit_with_an_unknown_location_is_left_out_of_the_batch() -> None:
    """A circuit with an unknown location is not in the batch, but is loaded individually."""
    bring_back_first([Lone()], 1.0, Counter())  # type: ignore[list-item]


@pytest.mark.parametrize("why", ["the pipeline fails", "the circuit may not be read", "the server is loading"])
def test_error_of_a_batch_is_left_for_later_or_raised(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one circuit leaves it for later.  An error of the server is raised."""
    found = {
        "the circuit may not be read": redis.exceptions.NoPermissionError("no"),
        "the server is loading": redis.exceptions.BusyLoadingError("loading"),
    }

    def read(read_requests: Any) -> Any:
        if why == "the pipeline fails":
            raise AttributeError("pipeline")
        return [ReadResult(error=found[why])]

    monkeypatch.setattr(bulk, "read_circuits", read)
    lone: Any = Lone(read_request=type("ReadRequest", (), {"client": object()}))
    if why == "the server is loading":
        with pytest.raises(redis.ConnectionError):
            bring_back_first([lone], 1.0, Counter())
    else:
        bring_back_first([lone], 1.0, Counter())


@pytest.mark.slow
def test_two_thousand_circuits_return_quickly_beside_a_busy_thread(site: Site, report: Callable[[str], None]) -> None:
    """Circuits return together: beside a busy thread each round trip takes about 5 ms, whatever it carries."""
    breakers = [breaker_on(site.client(), f"circuit{number}", timeout=10.0) for number in range(2000)]
    for breaker in breakers:
        breaker.call(up)
    is_over = threading.Event()

    def spin() -> None:
        while not is_over.is_set():
            sum(range(1000))

    site.proxy.refuse()
    site.proxy.close_connections()
    wait_for(lambda: is_unreachable_for(breakers[0]), "the outage is noticed")
    for breaker in breakers:
        breaker.call(up)
    # An attempt that began before the last call does not read all circuits together.
    attempts = health_of(breakers[0]).attempts
    wait_for(lambda: health_of(breakers[0]).attempts > attempts, "an attempt fails")
    busy = threading.Thread(target=spin)
    busy.start()
    try:
        began = time.monotonic()
        requests_before = site.proxy.request_count
        site.proxy.listen()
        wait_for(lambda: not any(health_of(breaker).is_own for breaker in breakers), "all have returned", within=60)
        seconds = time.monotonic() - began
    finally:
        is_over.set()
        busy.join()
    requests = site.proxy.request_count - requests_before
    report(f"2,000 circuits returned in {seconds:.1f} s beside a busy thread, with {requests} requests")
    assert requests < 200
    assert seconds < 6


# -- the log -----------------------------------------------------------------------------------------------------------


def test_flapping_server_is_logged_once_a_minute_with_a_count(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first loss and the first return are logged at once.  Later ones are counted, and the last state is logged."""
    caplog.set_level("INFO", "pybreaker_redis")
    breakers = [settled(breaker_on(site.client(), f"circuit{number}", timeout=5.0)) for number in range(3)]
    server = failover_of(breakers[0]).server
    for _ in range(10):
        with unreachable(site, *breakers):
            pass
    assert len(lines_of(caplog, site)) == 2, lines_of(caplog, site)
    assert ["is unreachable" in line for line in lines_of(caplog, site)] == [True, False]
    wait_for(lambda: outage_log_of(server).has_held_line, "the last return is held")
    end_log_window(server)  # the window is over
    wait_for(lambda: len(lines_of(caplog, site)) == 3, "the last state is logged")
    last = records_of(caplog, site)[-1]
    assert "is available again" in last.getMessage()
    assert last.getMessage().endswith("; 9 more losses since the last such line")
    assert last.pybreaker_redis["more_losses"] == 9  # type: ignore[attr-defined]


def test_flapping_error_of_one_circuit_is_logged_once_a_minute(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Errors of one circuit are limited to one pair of lines a minute, too."""
    caplog.set_level("INFO", "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    failover = failover_of(breaker)
    for _ in range(3):
        fail_circuit(failover, TypeError("of one circuit"))
        faults_of(failover).outage = replace(faults_of(failover).outage, next_attempt_at=0.0)
        wait_for(lambda: is_back(breaker), "the shared circuit is in use again")
    assert len(lines_of(caplog, site)) == 2
    end_log_window(failover)
    fail_circuit(failover, TypeError("of one circuit"))
    assert lines_of(caplog, site)[-1].endswith("; 2 more losses since the last such line")
    fail_circuit(failover, TypeError("of one circuit"))
    assert len(lines_of(caplog, site)) == 3


class TestLossThrottle:
    """Limit of the log lines about one subject, with a fake clock."""

    @pytest.fixture
    def clock(self) -> Clock:
        """The throttle's clock."""
        return Clock()

    @pytest.fixture
    def lines(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Messages that were emitted."""
        messages: list[str] = []
        monkeypatch.setattr(logger, "emit", lambda line: messages.append(line.message))
        return messages

    @pytest.fixture
    def throttle(self, clock: Clock, lines: list[str]) -> Any:
        """A throttle with two example lines."""

        class ExampleThrottle(LossThrottle):
            def lose(self) -> None:
                self.log_loss(lambda more: _log.detail(f"lost {more}"))

            def recover(self) -> None:
                self.log_return(lambda more: _log.detail(f"back {more}"))

        return ExampleThrottle(clock)

    def test_first_pair_is_logged_at_once_and_further_ones_are_counted(self, throttle: Any, lines: list[str]) -> None:
        """The first pair of lines leaves no line held."""
        throttle.lose()
        throttle.recover()
        assert not throttle.has_held_line
        for _ in range(3):
            throttle.lose()
            throttle.recover()
        assert lines == ["lost 0", "back 0"]
        assert throttle.has_held_line

    @pytest.mark.parametrize(("ends", "line"), [("lose", "lost 2"), ("recover", "back 3")])
    def test_last_condition_is_logged_when_the_window_is_over(
        self, throttle: Any, lines: list[str], clock: Clock, ends: str, line: str
    ) -> None:
        """The held line is logged when the window ends.  A loss that is logged is not counted again."""
        for _ in range(3):
            throttle.lose()
            throttle.recover()
        throttle.lose()
        if ends == "recover":
            throttle.recover()
        clock.now += logger.LOSS_WINDOW_S - 1
        throttle.flush_held_line()
        assert len(lines) == 2
        clock.now += 1
        throttle.flush_held_line()
        throttle.flush_held_line()
        assert lines[2:] == [line]

    def test_return_of_a_loss_that_was_logged_late_is_logged(
        self, throttle: Any, lines: list[str], clock: Clock
    ) -> None:
        """The line of a return completes the pair and begins a new window."""
        throttle.lose()
        throttle.recover()
        throttle.lose()
        clock.now += logger.LOSS_WINDOW_S
        throttle.flush_held_line()
        throttle.recover()
        throttle.lose()
        assert lines == ["lost 0", "back 0", "lost 0", "back 0"]

    def test_return_after_the_window_is_logged_at_once(self, throttle: Any, lines: list[str], clock: Clock) -> None:
        """A return after the window is logged, although its loss was only counted."""
        throttle.lose()
        throttle.recover()
        throttle.lose()
        clock.now += logger.LOSS_WINDOW_S
        throttle.recover()
        assert lines == ["lost 0", "back 0", "back 1"]

    def test_forked_child_logs_no_line_of_its_parent(self, throttle: Any, lines: list[str], clock: Clock) -> None:
        """A forked child does not log the lines that its parent holds."""
        throttle.lose()
        throttle.recover()
        throttle.lose()
        reset_in_child(throttle)
        clock.now += logger.LOSS_WINDOW_S
        throttle.flush_held_line()
        assert len(lines) == 2


@pytest.mark.parametrize(
    ("error", "text"),
    [(TimeoutError(), "TimeoutError"), (KeyError("name"), "KeyError: 'name'")],
    ids=["empty", "with text"],
)
def test_empty_error_is_described_by_its_class_alone(
    site: Site, error: Exception, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No colon without text follows the class of an error."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    assert describe_error(error) == text
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    failover = failover_of(breaker)
    fail_circuit(failover, error)
    assert health_of(breaker).last_error == text
    assert text + ")" in lines_of(caplog, site)[0]
