"""Outages of Redis that coincide with forks, threads, signals and slow answers."""

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
from tests.support.inspect import core_of, faults_of, replace_retry_thread, server_of, storage_of, view_of
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


def rejected(breaker: pybreaker.CircuitBreaker) -> bool:
    """Return whether the breaker rejects a call."""
    try:
        breaker.call(up)
    except pybreaker.CircuitBreakerError:
        return True
    return False


def test_late_answer_to_a_caller_does_not_end_the_outage(site: Site):
    """Only the retry thread ends an outage.  Otherwise the other circuits would stay with their local state."""
    first, second = (settled(breaker_on(site.client(), name, fail_max=2, reset_timeout=60)) for name in ("a", "b"))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(first) and is_unreachable_for(second), "both use local circuits")
    calls(second, 0.05, failing=1.0)
    server = server_of(first)
    server.report_answer("")
    assert health_of(first).condition == "unreachable"
    site.proxy.listen()
    wait_for(lambda: is_back(first) and is_back(second), "both have returned")
    assert site.administrator.get("b:pybreaker:state") == b"open"


def test_circuits_first_used_in_an_outage_do_not_wait(site: Site):
    """A process that has waited once in an outage does not wait again for each new circuit."""
    timeout = 1.0
    settled_one = settled(breaker_on(site.client(), timeout=timeout))
    site.server.pause()
    try:
        wait_for(lambda: is_unreachable_for(settled_one), "the outage is noticed")
        for number in range(10):
            storage = CircuitRedisStorage("closed", site.client(), f"new {number}", timeout=timeout)
            breaker = pybreaker.CircuitBreaker(state_storage=storage)
            with Stopwatch() as watch:
                assert breaker.call(up) == "answer"
            assert watch.seconds < 0.9 * timeout
    finally:
        site.server.resume()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_child_forked_in_an_outage_returns_by_itself(site: Site):
    """A forked child has no retry thread of its parent, so it starts its own and drops the inherited state."""
    breaker = settled(breaker_on(site.client(), reset_timeout=60))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    breaker.call(up)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            # Successes only, because they can be decided on the fast path.
            wait_for(
                lambda: rejected(breaker) and health_of(breaker).condition == "connected",
                "the listener follows changes",
                within=8,
            )
            code = 0
        os._exit(code)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the parent has returned")
    breaker.open()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_trip_by_another_process_is_followed_on_a_read_only_server(site: Site):
    """A server that returns read-only with an open circuit: each process follows it and makes no call."""
    with contextlib.closing(site.server.client()) as direct:
        ours = settled(breaker_on(site.client(), reset_timeout=60))
        late = breaker_on(site.client(), "viewed, seen late", reset_timeout=60)
        # What an operator writes must reach Redis.
        other = breaker_on(direct, reset_timeout=60, timeout=10)
        late_other = breaker_on(direct, "viewed, seen late", timeout=10)
        site.proxy.refuse()
        wait_for(lambda: is_unreachable_for(ours) and is_unreachable_for(late), "the outage is noticed")
        other.open()
        late_other.open()
        site.administrator.config_set("maxmemory", 1)
        site.proxy.listen()
        wait_for(lambda: health_of(ours).condition == "read-only", "the server refuses writes")
        wait_for(lambda: rejected(ours) and rejected(late), "the trips of the other process are followed")
        site.administrator.config_set("maxmemory", 0)
        wait_for(lambda: is_back(ours) and is_back(late), "the server accepts writes again")


def test_log_handler_that_raises_does_not_prevent_the_return(site: Site):
    """A log handler that raises does not keep a process from its return to Redis."""

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
            wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
            site.proxy.listen()
            wait_for(lambda: is_back(breaker), "the return is noticed")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_log_handler_that_makes_a_guarded_call_does_not_deadlock(site: Site):
    """A log handler may use a circuit of the server that a log line is about."""
    ships = breaker_on(site.client(), "logs")
    # The same circuit with another setting, which causes a log line at its first use.
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
def test_retry_thread_that_dies_is_replaced(site: Site, monkeypatch):
    """If the retry thread dies, another one is started, because no other thread queries the server."""
    breaker = settled(breaker_on(site.client()))
    server = server_of(breaker)
    died = threading.Event()

    def dies() -> NoReturn:
        monkeypatch.undo()
        died.set()
        raise SystemExit

    monkeypatch.setattr(server.availability, "claim_attempt", dies)
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    assert died.wait(5)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_listener_returns_after_another_circuit_of_the_server_is_released(site: Site):
    """The listener returns to a server although a circuit with another timeout was released in the outage."""
    breaker = settled(breaker_on(site.client()))
    other = settled(breaker_on(site.client(), "other", timeout=0.3))
    site.proxy.refuse()
    for item in (breaker, other):
        wait_for(lambda item=item: is_unreachable_for(item), "both use local circuits")
    del other, item
    gc.collect()
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")
    wait_for(lambda: view_of(breaker).is_subscribed or breaker.call(up) is None, "the listener follows changes")


def test_refused_circuit_is_retried_soon_after_the_return(site: Site):
    """A refused circuit spends no attempt of its own while the server is unreachable."""
    breaker = settled(breaker_on(site.client()))
    (refused,) = (fault for fault in FAULTS if fault.name == "may do nothing")
    with refused.during(site):
        wait_for(lambda: calls(breaker, 0.01, failing=0.5) and health_of(breaker).condition == "refused", "refused")
        site.proxy.refuse()
        site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=15)


def test_attempt_of_the_server_is_left_to_a_circuit_without_an_error(site: Site, monkeypatch):
    """Where callers make the attempts, a circuit with an error of its own does not use up the server's attempt."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    availability = server_of(storage).availability
    replace_retry_thread(monkeypatch, server_of(storage), runs=False)
    availability.set_retry_thread(False)
    server_of(storage).report_failure(redis.ConnectionError("gone"), core_of(storage), time.monotonic())
    faults_of(storage).note_failure(TypeError("no sense"))
    availability.outage = due = replace(availability.outage, next_attempt_at=0.0)
    breaker.call(up)
    assert availability.outage is due
    monkeypatch.undo()
    wait_for(lambda: is_back(breaker), "the return is noticed")


class TimeIsUp(Exception):
    """Stand-in for Celery's soft time limit."""


def test_exception_of_a_signal_handler_reaches_the_caller(site: Site):
    """An exception that a signal handler raises during a wait for Redis reaches the caller."""

    def handler(number: int, frame: object) -> NoReturn:
        raise TimeIsUp

    breaker = breaker_on(site.client(), max_staleness=0, timeout=5.0)
    breaker.call(up)
    usual = signal.signal(signal.SIGALRM, handler)
    site.server.pause()
    try:
        with pytest.raises(TimeIsUp):  # noqa: PT012 (the alarm may come at once)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            breaker.call(up)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
        site.server.resume()
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == ""


def test_slow_answers_add_up_to_one_timeout(site: Site):
    """A call that trips sends several commands, and all of them share one timeout."""
    timeout = 1.0
    breaker = breaker_on(site.client(), fail_max=1, max_staleness=0, timeout=timeout)
    breaker.call(up)
    site.proxy.delay = (0.4, 0.4)
    site.proxy.manner = "slow"
    with Stopwatch() as watch, contextlib.suppress(pybreaker.CircuitBreakerError, Down):
        breaker.call(down)
    site.proxy.manner = "pass"
    # The last command has a fifth of the timeout in any case.  A full timeout for each would take two seconds.
    assert watch.seconds < 1.6 * timeout


def by_hand(breaker: pybreaker.CircuitBreaker) -> None:
    """Open, half-open and close the circuit, as an operator may do at any time."""
    breaker.open()
    breaker.half_open()
    breaker.close()


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda breaker: breaker.fail_counter, id="failures"),
        pytest.param(lambda breaker: breaker.success_counter, id="successes", marks=pytest.mark.full),
        pytest.param(by_hand, id="by hand", marks=pytest.mark.full),
        pytest.param(retry_after, id="retry_after", marks=pytest.mark.full),
    ],
)
def test_each_command_outside_a_call_has_a_full_timeout(site: Site, read: Callable[[Any], object]):
    """A command outside a call has a full timeout, however long earlier commands of this thread waited."""
    timeout = 1.0
    breaker = breaker_on(site.client(), max_staleness=0, timeout=timeout)
    breaker.call(up)
    read(breaker)
    site.proxy.delay = (0.3, 0.3)
    site.proxy.manner = "slow"
    for _ in range(5):
        read(breaker)
    site.proxy.manner = "pass"
    assert (health_of(breaker).condition, health_of(breaker).last_error) == ("connected", "")


def test_command_outside_a_call_takes_no_time_from_the_next_call(site: Site):
    """A command outside a call takes no time from the budget of the next call, not even if that call sent no `Load`."""
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
def frequent_switches() -> Iterator[None]:
    """Make threads switch as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_storages_added_during_an_outage_do_not_disturb_it(site: Site, frequent_switches):
    """Members of a server are counted while other threads add some."""
    breaker = settled(breaker_on(site.client()))
    server = server_of(breaker)

    def come_and_go() -> None:
        for _ in range(100):
            storages = [CircuitRedisStorage("closed", client, f"brief {number}") for number in range(5)]
            for storage in storages:
                server.add_member(core_of(storage), circuit="brief", timeout_s=1.0, max_staleness_s=1.0)

    def fail() -> None:
        for _ in range(100):
            server.report_failure(redis.ConnectionError("gone"), core_of(breaker), time.monotonic())
            server.availability.note_answer()

    client = site.client()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for work in (come_and_go, come_and_go, fail, fail)]:
            done.result(60)
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_exit_in_an_outage_is_prompt(site: Site):
    """The exit of a process waits for none of its threads."""
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
    wait_for(lambda: site.administrator.exists("exits:pybreaker:state"), "the process has made a call")
    site.server.pause()
    try:
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert time.time() - float(output) < 5
    finally:
        site.server.resume()
