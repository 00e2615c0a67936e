"""The return from an outage reports each failure once, keeps the counts of other processes, and lets no call wait."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pybreaker
import pytest
import redis
import time_machine

from pybreaker_redis._circuits.local import LocalCircuit
from pybreaker_redis._circuits.reconcile import LocalReport
from pybreaker_redis._circuits.shared import SharedCircuit
from pybreaker_redis._model.intents import Intent, RecordFailure, Reply
from tests.support.breakers import Down, breaker_on, fails, settled, up
from tests.support.faults import Site
from tests.support.inspect import (
    core_of,
    fail_circuit,
    faults_of,
    idle_connections_of,
    pools_of,
    replace_shared_execution,
    storage_of,
)
from tests.support.logs import lines_of
from tests.support.outages import health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for

#: A failure limit that none of these circuits reaches.
MANY = 100


def counter(site: Site) -> int:
    """Return the failures that the shared circuit has counted."""
    return int(site.administrator.get("viewed:pybreaker:fail_counter") or 0)


def is_connected(breaker: pybreaker.CircuitBreaker) -> bool:
    """Return whether this process uses the shared circuit, without a call."""
    health = health_of(breaker)
    return health.condition == "connected" and not health.is_own


@contextlib.contextmanager
def cut_off(site: Site) -> Iterator[None]:
    """Make the server unreachable for the block, while it keeps running."""
    site.proxy.refuse()
    yield
    site.proxy.listen()


class SlowCall:
    """Call that was admitted long before it fails."""

    def __init__(self, breaker: pybreaker.CircuitBreaker) -> None:
        self._breaker = breaker
        self._goes_on, under_way = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._call, args=(under_way,))
        self._thread.start()
        assert under_way.wait(10)

    def _call(self, under_way: threading.Event) -> None:
        def fails_late() -> None:
            under_way.set()
            self._goes_on.wait(10)
            raise Down

        with contextlib.suppress(Down):
            self._breaker.call(fails_late)

    def end(self) -> None:
        """Make the call fail."""
        self._goes_on.set()
        self._thread.join(10)

    @property
    def has_ended(self) -> bool:
        """Whether the call has failed."""
        return not self._thread.is_alive()


def test_child_forked_in_an_outage_reports_no_failure_of_its_parent(site: Site) -> None:
    """Three failures and three forks are three failures, because a forked child reports none of its parent's."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))

    def has_returned() -> bool:
        # No call, because a success would reset the failures.
        return breaker.current_state == "closed" and is_connected(breaker)

    children = []
    with cut_off(site):
        wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
        fails(breaker, 3)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    wait_for(has_returned, "the child has returned")
                    os._exit(0)
                os._exit(1)
            children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    wait_for(has_returned, "the parent has returned")
    assert counter(site) == 3


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("fallback", ["closed", "open"])
def test_failure_with_a_late_reply_counts_once(site: Site, dies: bool, fallback: str) -> None:
    """A failure counts once if the frozen server executes it later, and if the server dies before it does."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, fallback_circuit_state=fallback, timeout=1.0))
    # The server loads the script, and no other command precedes the failure.
    fails(breaker)
    site.administrator.execute_command("SAVE")
    early = SlowCall(breaker)
    site.server.pause()
    early.end()
    assert health_of(breaker).is_own
    if dies:
        site.server.kill()
        site.restart(keep_data=True)
    else:
        site.server.resume()
    wait_for(lambda: is_connected(breaker), "the return is noticed")
    assert counter(site) == 2


def test_attempt_on_an_unreachable_server_is_repeated_soon(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An attempt of one circuit that finds the server unreachable is repeated soon after the return."""
    caplog.set_level("INFO", "pybreaker_redis")
    client, tries = site.client(), []

    def client_source() -> redis.Redis:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no settings yet")
        return client

    other, late = settled(breaker_on(client, "other")), breaker_on(client_source, "late")
    with cut_off(site):
        wait_for(lambda: is_unreachable_for(other), "the server is unreachable")
        late.call(up)
        assert health_of(late).condition == "refused"
        wait_for(lambda: late.call(up) and len(tries) == 2, "the next attempt")
        assert (health_of(late).next_attempt or 0) < 1
    # Without the repetition the return would take half a minute.
    wait_for(lambda: is_back(late), "the return is noticed", within=15)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_attempt_is_repeated_soon(
    site: Site, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that an exception from outside ends can be made again, because the process may go on."""
    breaker = settled(breaker_on(site.client()))
    failover = core_of(breaker)
    fail_circuit(failover, ValueError("of one circuit"))
    wait_for(lambda: faults_of(failover).is_attempt_due, "the next attempt")

    def interrupted(_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        replace_shared_execution(patched, failover, interrupted)
        with pytest.raises(error):
            _ = breaker.fail_counter
    wait_for(lambda: is_back(breaker), "the return is noticed", within=15)


@pytest.mark.full
def test_connections_that_a_network_forgot_are_one_outage(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """If a network forgets connections, one failed call closes all of them instead of one call for each."""
    caplog.set_level("INFO", "pybreaker_redis")
    settings = {"fail_max": 10**6, "timeout": 2.0}
    breakers = [settled(breaker_on(site.client(), f"circuit{number}", **settings)) for number in range(6)]
    pool = pools_of(breakers[0])[2.0]

    def all_at_once() -> None:
        together = threading.Barrier(len(breakers))

        def one(breaker: Any) -> None:
            together.wait()
            fails(breaker)

        threads = [threading.Thread(target=one, args=(breaker,)) for breaker in breakers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def connected() -> int:
        return len(idle_connections_of(pool))

    wait_for(lambda: all_at_once() or connected() > 2, "several connections")
    site.proxy.drop_silently()
    fails(breakers[0])
    # The retry thread may already have a new connection.
    assert connected() <= 1
    wait_for(lambda: all(is_back(breaker) for breaker in breakers), "all have returned")
    all_at_once()
    assert all(is_back(breaker) for breaker in breakers)
    lines = lines_of(caplog, site)
    assert len([line for line in lines if "is unreachable" in line]) == 1, lines


@pytest.mark.parametrize("step", [0, -60])
def test_trip_is_shared_although_the_clock_was_set_back(site: Site, step: float) -> None:
    """A clock that is set back dates the trip before the outage.  The trip is shared all the same."""
    breaker = settled(breaker_on(site.client(), fail_max=2, reset_timeout=300))
    breaker.open()
    breaker.close()
    settled(breaker)
    with time_machine.travel(time.time() + step, tick=True):
        with cut_off(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
            fails(breaker, 2)
            assert breaker.current_state == "open"
        wait_for(lambda: is_back(breaker), "the return is noticed")
        assert site.administrator.get("viewed:pybreaker:state") == b"open"
        assert breaker.current_state == "open"


def test_success_from_before_later_failures_resets_none_of_them(site: Site) -> None:
    """A success from before the failures of other processes does not reset them, although it is reported later."""
    with contextlib.closing(redis.Redis(unix_socket_path=site.server.unix_socket)) as client:
        other = breaker_on(client, fail_max=MANY, max_staleness=0, timeout=10)
        breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))
        fails(other)
        wait_for(lambda: breaker.fail_counter == 1, "the failure is read")
        with cut_off(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed by a success")
            fails(other, 3)
        # A read starts the return, without a later success that would reset the count.
        wait_for(lambda: breaker.fail_counter == 4 and is_connected(breaker), "the return is noticed")
        assert counter(site) == 4


@pytest.mark.parametrize("happens", [True, False])
@pytest.mark.parametrize(("before", "of_others"), [(0, 0), (2, 0), (2, 5)])
def test_failures_reported_without_an_answer_count_once(
    site: Site, before: int, of_others: int, happens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures of an outage are reported in one command, and reported again only if the server did not execute it."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))
    fails(breaker, before)
    execute = SharedCircuit.execute_at
    reported: list[RecordFailure] = []

    def late(shared: SharedCircuit, choice: Any, intent: Intent, **settings: Any) -> Reply:
        if not isinstance(intent, RecordFailure) or reported:
            return execute(shared, choice, intent, **settings)
        reported.append(intent)
        if happens:
            execute(shared, choice, intent, **settings)
        raise redis.TimeoutError("Timeout reading from socket")

    with cut_off(site):
        fails(breaker, 3)
        assert health_of(breaker).is_own
        site.administrator.incrby("viewed:pybreaker:fail_counter", of_others)
        monkeypatch.setattr(SharedCircuit, "execute_at", late)
    wait_for(lambda: reported and is_connected(breaker), "the return is noticed")
    assert [intent.times for intent in reported] == [3]
    assert counter(site) == before + of_others + 3


@pytest.mark.parametrize("fallback", ["closed", "open"])
def test_failure_during_the_return_counts_once(site: Site, fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls fail while the return reports earlier failures, and some of these calls are older than the outage."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, fallback_circuit_state=fallback, timeout=10))
    report: Callable[[LocalCircuit, Any], LocalReport] = LocalCircuit.draft_report

    def interrupted(own: LocalCircuit, known: Any) -> LocalReport:
        made = report(own, known)
        late.end()
        return made

    # A breaker makes one call at a time, so these two share a storage.
    storage = storage_of(breaker)
    early, late = (SlowCall(pybreaker.CircuitBreaker(fail_max=MANY, state_storage=storage)) for _ in range(2))
    with cut_off(site):
        early.end()
        assert health_of(breaker).is_own
        monkeypatch.setattr(LocalCircuit, "draft_report", interrupted)
    wait_for(lambda: late.has_ended and is_connected(breaker), "the return is noticed")
    assert counter(site) == 2
