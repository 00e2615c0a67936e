"""What goes wrong with a Redis that comes and goes while everything else goes on: forks, threads, signals, slowness.

Most of these were found by review, and stand here as they were shown.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._servers.retry import RETRY_THREAD_NAME
from pybreaker_redis.registry import retry_after
from tests.support.breakers import Down, breaker_on, down, fails, settled, up
from tests.support.clock import Stopwatch
from tests.support.faults import FAULTS, Site
from tests.support.inspect import view_of
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


def rejected(breaker: pybreaker.CircuitBreaker) -> bool:
    """Whether a call is."""
    try:
        breaker.call(up)
    except pybreaker.CircuitBreakerError:
        return True
    return False


def test_answer_that_was_under_way_does_not_end_the_outage(site: Site):
    """That is for whoever brings back all circuits: else the others would go by their own for ever."""
    first, second = (settled(breaker_on(site.client(), name, fail_max=2, reset_timeout=60)) for name in ("a", "b"))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(first) and is_unreachable_for(second), "both are alone")
    calls(second, 0.05, failing=1.0)
    server = first._state_storage._core.server
    server.report_answer("")
    assert health_of(first).condition == "unreachable"
    site.proxy.listen()
    wait_for(lambda: is_back(first) and is_back(second), "both are back")
    assert site.administrator.get("b:pybreaker:state") == b"open"


def test_circuits_that_are_first_used_in_an_outage_wait_for_nothing(site: Site):
    """A worker that has waited for one need not wait for ten."""
    timeout = 1.0
    settled_one = settled(breaker_on(site.client(), timeout=timeout))
    site.server.pause()
    try:
        wait_for(lambda: is_unreachable_for(settled_one), "it is away")
        for number in range(10):
            storage = CircuitRedisStorage("closed", site.client(), f"new {number}", timeout=timeout)
            breaker = pybreaker.CircuitBreaker(state_storage=storage)
            with Stopwatch() as watch:
                assert breaker.call(up) == "answer"
            assert watch.seconds < 0.9 * timeout
    finally:
        site.server.resume()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nobody forks here")
def test_child_that_is_forked_in_an_outage_comes_back_by_itself(site: Site):
    """Its parent's threads are not there; what it inherited it does not go by."""
    breaker = settled(breaker_on(site.client(), reset_timeout=60))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    breaker.call(up)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            # Only calls that succeed: they take the short way, if there is one.
            wait_for(lambda: rejected(breaker) and health_of(breaker).condition == "connected", "it hears", within=8)
            code = 0
        os._exit(code)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the parent is back")
    breaker.open()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_circuit_that_others_have_opened_is_followed_when_only_reads_work(site: Site):
    """The server comes back open, and takes no writes: nobody tries what it says is dead."""
    with contextlib.closing(site.server.client()) as direct:
        ours = settled(breaker_on(site.client(), reset_timeout=60))
        late = breaker_on(site.client(), "viewed, seen late", reset_timeout=60)
        # What an operator does shall be done.
        other = breaker_on(direct, reset_timeout=60, timeout=10)
        late_other = breaker_on(direct, "viewed, seen late", timeout=10)
        site.proxy.refuse()
        wait_for(lambda: is_unreachable_for(ours) and is_unreachable_for(late), "it is away")
        other.open()
        late_other.open()
        site.administrator.config_set("maxmemory", 1)
        site.proxy.listen()
        wait_for(lambda: health_of(ours).condition == "read-only", "no writes")
        wait_for(lambda: rejected(ours) and rejected(late), "what others have done is followed")
        site.administrator.config_set("maxmemory", 0)
        wait_for(lambda: is_back(ours) and is_back(late), "all is well")


def test_handler_that_raises_stops_nothing(site: Site):
    """A log that cannot be written is no reason to stay away from Redis."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> NoReturn:
            raise OSError("disk full")

    logger, handler = logging.getLogger("pybreaker_redis"), Broken()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        breaker = settled(breaker_on(site.client()))
        for _ in range(3):
            site.proxy.refuse()
            wait_for(lambda: is_unreachable_for(breaker), "it is away")
            site.proxy.listen()
            wait_for(lambda: is_back(breaker), "it is back")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_handler_that_is_guarded_itself_waits_for_no_one(site: Site):
    """Logs are shipped to somewhere that may be down; of that circuit there is something to log, too."""
    ships = breaker_on(site.client(), "logs")
    # The same circuit with another setting, which is worth a line at its first use.
    breaker_on(site.client(), "logs", max_staleness=0.5).call(up)

    class Shipping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ships.call(up)

    logger = logging.getLogger("pybreaker_redis")
    handler = Shipping()
    logger.addHandler(handler)
    try:
        thread = threading.Thread(target=logger.warning, args=("of the application",), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        logger.removeHandler(handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_asks_again_is_replaced_if_it_dies(site: Site, monkeypatch):
    """Whatever it died of: nobody else would ever ask."""
    breaker = settled(breaker_on(site.client()))
    server = breaker._state_storage._core.server
    died = threading.Event()

    def dies() -> NoReturn:
        monkeypatch.undo()
        died.set()
        raise SystemExit

    monkeypatch.setattr(server.availability, "claim_attempt", dies)
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    assert died.wait(5)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


def test_listener_does_not_wait_for_a_server_that_nobody_asks_for(site: Site):
    """Two timeouts are two guards and one listener; one of the two loses its last circuit in the outage."""
    breaker = settled(breaker_on(site.client()))
    other = settled(breaker_on(site.client(), "other", timeout=0.3))
    site.proxy.refuse()
    for item in (breaker, other):
        wait_for(lambda item=item: is_unreachable_for(item), "both are alone")
    del other, item
    gc.collect()
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")
    wait_for(lambda: view_of(breaker).is_subscribed or breaker.call(up) is None, "it hears")


def test_refused_circuit_is_asked_for_when_the_server_is_back(site: Site):
    """A turn is spent on asking, not on hearing that the server is away."""
    breaker = settled(breaker_on(site.client()))
    (refused,) = (fault for fault in FAULTS if fault.name == "may do nothing")
    with refused.during(site):
        wait_for(lambda: calls(breaker, 0.01, failing=0.5) and health_of(breaker).condition == "refused", "refused")
        site.proxy.refuse()
        site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is served again", within=15)


def test_turn_is_left_to_a_circuit_that_may_ask(site: Site, monkeypatch):
    """Where callers take turns: one whose own trouble keeps it from asking does not take the server's."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    guard = storage._core.server.availability
    monkeypatch.setattr(storage._core.server, "_ensure_retry_thread", lambda: False)
    guard.set_retry_thread(False)
    storage._core.server.report_failure(redis.ConnectionError("gone"), storage._core, time.monotonic())
    storage._core._faults.note_failure(TypeError("no sense"))
    guard.outage = due = replace(guard.outage, next_attempt_at=0.0)
    breaker.call(up)
    assert guard.outage is due
    monkeypatch.undo()
    wait_for(lambda: is_back(breaker), "it is back")


class TimeIsUp(Exception):
    """As Celery's soft time limit."""


def test_exception_of_a_signal_handler_reaches_whoever_it_was_meant_for(site: Site):
    """Celery's soft time limit is one; that it struck in a wait for Redis makes no difference."""

    def handler(number: int, frame: object) -> NoReturn:
        raise TimeIsUp

    breaker = breaker_on(site.client(), max_staleness=0, timeout=5.0)
    breaker.call(up)
    usual = signal.signal(signal.SIGALRM, handler)
    site.server.pause()
    try:
        with pytest.raises(TimeIsUp):  # noqa: PT012 (it may come at once)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            breaker.call(up)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
        site.server.resume()
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == ""


def test_slow_answers_add_up_to_one_timeout(site: Site):
    """A call that trips asks several times; all of that together is one wait."""
    timeout = 1.0
    breaker = breaker_on(site.client(), fail_max=1, max_staleness=0, timeout=timeout)
    breaker.call(up)
    site.proxy.delay = (0.4, 0.4)
    site.proxy.manner = "slow"
    with Stopwatch() as watch, contextlib.suppress(pybreaker.CircuitBreakerError, Down):
        breaker.call(down)
    site.proxy.manner = "pass"
    # The last question has a fifth of the timeout in any case; if each had all of it, that would be two seconds.
    assert watch.seconds < 1.6 * timeout


def by_hand(breaker: pybreaker.CircuitBreaker) -> None:
    """What an operator may do again and again."""
    breaker.open()
    breaker.half_open()
    breaker.close()


@pytest.mark.parametrize(
    "ask",
    [lambda breaker: breaker.fail_counter, lambda breaker: breaker.success_counter, by_hand, retry_after],
    ids=["failures", "successes", "by hand", "retry_after"],
)
def test_what_belongs_to_no_call_has_each_time_a_timeout_of_its_own(site: Site, ask: Callable[[Any], object]):
    """A thread that reads a counter every second would take Redis for away some day, having waited long in all."""
    timeout = 1.0
    breaker = breaker_on(site.client(), max_staleness=0, timeout=timeout)
    breaker.call(up)
    ask(breaker)
    site.proxy.delay = (0.3, 0.3)
    site.proxy.manner = "slow"
    for _ in range(5):
        ask(breaker)
    site.proxy.manner = "pass"
    assert (health_of(breaker).condition, health_of(breaker).last_error) == ("connected", "")


def test_what_belongs_to_no_call_takes_no_time_from_the_next_one(site: Site):
    """That may be one that has not looked, because the process knows the circuit."""
    breaker = settled(breaker_on(site.client(), fail_max=100, timeout=1.0, max_staleness=60))
    fails(breaker)
    site.proxy.delay = (0.6, 0.6)
    site.proxy.manner = "slow"
    assert breaker.fail_counter == 1
    fails(breaker)
    site.proxy.manner = "pass"
    assert (health_of(breaker).condition, health_of(breaker).last_error) == ("connected", "")
    assert breaker.fail_counter == 2


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_storages_that_come_and_go_disturb_no_outage(site: Site, hasty_switches):
    """The circuits of a server are counted while others are added."""
    breaker = settled(breaker_on(site.client()))
    server = breaker._state_storage._core.server

    def come_and_go() -> None:
        for _ in range(100):
            storages = [CircuitRedisStorage("closed", client, f"brief {number}") for number in range(5)]
            for storage in storages:
                server.add_member(storage._core, circuit="brief", timeout_s=1.0, max_staleness_s=1.0)

    def fail() -> None:
        for _ in range(100):
            server.report_failure(redis.ConnectionError("gone"), breaker._state_storage._core, time.monotonic())
            server.availability.note_answer()

    client = site.client()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for work in (come_and_go, come_and_go, fail, fail)]:
            done.result(60)
    wait_for(lambda: is_back(breaker), "it is back")


def test_exit_in_an_outage_is_prompt(site: Site):
    """No thread is waited for."""
    program = f"""
import redis, pybreaker, threading, time
from pybreaker_redis import CircuitRedisStorage
client = redis.Redis(host="127.0.0.1", port={site.proxy.port}, username="app", password="any")
breaker = pybreaker.CircuitBreaker(state_storage=CircuitRedisStorage("closed", client, "exits", timeout=2))
breaker.call(int)
while not any(thread.name == {RETRY_THREAD_NAME!r} for thread in threading.enumerate()):
    breaker.call(int)
    time.sleep(0.01)
print(time.time())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: site.administrator.exists("exits:pybreaker:state"), "it has called")
    site.server.pause()
    try:
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert time.time() - float(said) < 5
    finally:
        site.server.resume()
