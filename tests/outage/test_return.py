"""What comes back from an outage: each failure once, and nobody else's counts; and nobody waits for nothing."""

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
from tests.support.logs import lines_of
from tests.support.outages import health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for

#: More failures than any of these circuits sees.
MANY = 100


def counter(site: Site) -> int:
    """The failures that all have counted."""
    return int(site.administrator.get("viewed:pybreaker:fail_counter") or 0)


def is_connected(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether this process goes by the shared circuit; makes no call."""
    health = health_of(breaker)
    return health.condition == "connected" and not health.is_own


@contextlib.contextmanager
def cut_off(site: Site) -> Iterator[None]:
    """Nobody gets through to the server, which is well."""
    site.proxy.refuse()
    yield
    site.proxy.listen()


class SlowCall:
    """One that was admitted long before it fails."""

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
        """It fails."""
        self._goes_on.set()
        self._thread.join(10)

    @property
    def has_ended(self) -> bool:
        """Whether it has failed."""
        return not self._thread.is_alive()


def test_child_of_an_outage_reports_nothing_of_its_parent(site: Site) -> None:
    """Three failures and three forks are three failures."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))

    def looks_back() -> bool:
        # No call: a success would forget failures.
        return breaker.current_state == "closed" and is_connected(breaker)

    children = []
    with cut_off(site):
        wait_for(lambda: is_unreachable_for(breaker), "it is away")
        fails(breaker, 3)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    wait_for(looks_back, "the child is back")
                    os._exit(0)
                os._exit(1)
            children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    wait_for(looks_back, "the parent is back")
    assert counter(site) == 3


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("fallback", ["closed", "open"])
def test_failure_whose_answer_is_late_counts_once(site: Site, dies: bool, fallback: str) -> None:
    """Of a server that stood still for a moment, which then does what it was told; or dies, and has not done it."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, fallback_circuit_state=fallback, timeout=1.0))
    # So that the server knows the script, and that nothing else is done first.
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
    wait_for(lambda: is_connected(breaker), "it is back")
    assert counter(site) == 2


def test_turn_that_comes_to_nothing_is_another_ones(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A circuit with a trouble of its own is told to ask, finds that the server is away, and asks again soon after."""
    caplog.set_level("INFO", "pybreaker_redis")
    client, tries = site.client(), []

    def given() -> redis.Redis:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no settings, either")
        return client

    other, late = settled(breaker_on(client, "other")), breaker_on(given, "late")
    with cut_off(site):
        wait_for(lambda: is_unreachable_for(other), "the server is away")
        late.call(up)
        assert health_of(late).condition == "refused"
        wait_for(lambda: late.call(up) and len(tries) == 2, "its turn")
        assert (health_of(late).next_attempt or 0) < 1
    # Half a minute, when nobody gave the turn back.
    wait_for(lambda: is_back(late), "it is back", within=15)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_turn_that_a_signal_ends_is_another_ones(
    site: Site, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may go on after it."""
    breaker = settled(breaker_on(site.client()))
    tenancy = breaker._state_storage._core  # type: ignore[attr-defined]
    tenancy._note_failure(ValueError("of its own"), time.monotonic())
    wait_for(lambda: tenancy._faults.is_attempt_due, "its turn")

    def interrupted(_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(tenancy, "_ask_shared", interrupted)
        with pytest.raises(error):
            _ = breaker.fail_counter
    wait_for(lambda: is_back(breaker), "it is back", within=15)


def test_connections_that_lead_nowhere_are_one_outage(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A network that forgets connections forgets all of them: to find each out by itself takes as many calls."""
    caplog.set_level("INFO", "pybreaker_redis")
    words = {"fail_max": 10**6, "timeout": 2.0}
    breakers = [settled(breaker_on(site.client(), f"circuit{number}", **words)) for number in range(6)]
    pool = breakers[0]._state_storage._core.server._connections._pools[2.0]  # type: ignore[attr-defined]

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
        return sum(connection is not None and connection._sock is not None for connection in pool.pool.queue)

    wait_for(lambda: all_at_once() or connected() > 2, "several connections")
    site.proxy.forget()
    fails(breakers[0])
    # But for the one on which the server may have been asked again already.
    assert connected() <= 1
    wait_for(lambda: all(is_back(breaker) for breaker in breakers), "all are back")
    all_at_once()
    assert all(is_back(breaker) for breaker in breakers)
    lines = lines_of(caplog, site)
    assert len([line for line in lines if "is away" in line]) == 1, lines


@pytest.mark.parametrize("step", [0, -60])
def test_trip_is_told_wherever_the_clock_stands(site: Site, step: float) -> None:
    """Set back in the outage, it says that the circuit opened before the outage."""
    breaker = settled(breaker_on(site.client(), fail_max=2, reset_timeout=300))
    breaker.open()
    breaker.close()
    settled(breaker)
    with time_machine.travel(time.time() + step, tick=True):
        with cut_off(site):
            wait_for(lambda: is_unreachable_for(breaker), "it is away")
            fails(breaker, 2)
            assert breaker.current_state == "open"
        wait_for(lambda: is_back(breaker), "it is back")
        assert site.administrator.get("viewed:pybreaker:state") == b"open"
        assert breaker.current_state == "open"


def test_success_forgets_no_failures_that_others_have_counted_since(site: Site) -> None:
    """It was before them, though it is reported after."""
    with contextlib.closing(redis.Redis(unix_socket_path=site.server.unix_socket)) as client:
        other = breaker_on(client, fail_max=MANY, max_staleness=0, timeout=10)
        breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))
        fails(other)
        wait_for(lambda: breaker.fail_counter == 1, "the failure is known")
        with cut_off(site):
            wait_for(lambda: is_unreachable_for(breaker), "it is away, and has succeeded")
            fails(other, 3)
        # To look is enough, and no success of afterwards.
        wait_for(lambda: breaker.fail_counter == 4 and is_connected(breaker), "it is back")
        assert counter(site) == 4


@pytest.mark.parametrize("happens", [True, False])
@pytest.mark.parametrize(("before", "of_others"), [(0, 0), (2, 0), (2, 5)])
def test_failures_that_are_told_and_not_answered_in_time_count_once(
    site: Site, before: int, of_others: int, happens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an outage, all in one: the server that is slow has counted them; of one that lost them they are told again."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, timeout=10))
    fails(breaker, before)
    execute = SharedCircuit.execute_at
    told: list[RecordFailure] = []

    def late(shared: SharedCircuit, choice: Any, intent: Intent, **words: Any) -> Reply:
        if not isinstance(intent, RecordFailure) or told:
            return execute(shared, choice, intent, **words)
        told.append(intent)
        if happens:
            execute(shared, choice, intent, **words)
        raise redis.TimeoutError("Timeout reading from socket")

    with cut_off(site):
        fails(breaker, 3)
        assert health_of(breaker).is_own
        site.administrator.incrby("viewed:pybreaker:fail_counter", of_others)
        monkeypatch.setattr(SharedCircuit, "execute_at", late)
    wait_for(lambda: told and is_connected(breaker), "it is back")
    assert [intent.times for intent in told] == [3]
    assert counter(site) == before + of_others + 3


@pytest.mark.parametrize("fallback", ["closed", "open"])
def test_failure_in_the_middle_of_the_return_counts_once(
    site: Site, fallback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls go on while the others are told of earlier ones; some were admitted before the outage."""
    breaker = settled(breaker_on(site.client(), fail_max=MANY, fallback_circuit_state=fallback, timeout=10))
    report: Callable[[LocalCircuit, Any], LocalReport] = LocalCircuit.draft_report

    def interrupted(own: LocalCircuit, known: Any) -> LocalReport:
        made = report(own, known)
        late.end()
        return made

    # A breaker makes one call at a time; these have the same storage.
    storage = breaker._state_storage
    early, late = (SlowCall(pybreaker.CircuitBreaker(fail_max=MANY, state_storage=storage)) for _ in range(2))
    with cut_off(site):
        early.end()
        assert health_of(breaker).is_own
        monkeypatch.setattr(LocalCircuit, "draft_report", interrupted)
    wait_for(lambda: late.has_ended and is_connected(breaker), "it is back")
    assert counter(site) == 2
