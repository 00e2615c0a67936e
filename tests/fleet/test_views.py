"""Views of a fleet: no trip is early or late, every process notices a transition in time, forked children included."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import settled
from tests.support.fleet import Fleet, Spec, Worker, call, operator
from tests.support.inspect import view_of
from tests.support.paths import ROOT
from tests.support.wait import wait_for


def settle(worker: Worker) -> None:
    """Make calls until they send nothing to Redis."""
    settled(worker.breaker)


def wait_for_noise(worker: Worker) -> None:
    """Wait until this process has noticed a failure that its successes have to reset."""
    wait_for(lambda: view_of(worker.breaker).fast_path.quiet_admission is None, "the failure is noticed")


def calls_until_trip(fleet: Fleet, seed: int, *, uses_views: bool) -> tuple[int, int]:
    """Make calls of which 30 % fail, and return the number of the call that tripped and of the one that should."""
    chance = random.Random(seed)
    consecutive = 0
    quiet_at = 0.0
    for number in count():
        fail = chance.random() < 0.3
        worker = fleet[chance.randrange(len(fleet.workers))]
        outcome = worker.run(call, fail=fail)
        tripped = outcome.tripped
        if fail and uses_views and not tripped:
            if outcome.began > quiet_at:
                # After a time without failures a push takes about a round trip, and calls must follow one another here.
                fleet.run(wait_for_noise)
            # Noise is renewed when half of its second is over.
            quiet_at = outcome.began + 0.4
        consecutive = consecutive + 1 if fail else 0
        if tripped or consecutive == fleet[0].spec.fail_max:
            return (number if tripped else -1), (number if consecutive == fleet[0].spec.fail_max else -1)
    raise AssertionError


@pytest.mark.parametrize("make", ["ours"])
@pytest.mark.parametrize("uses_views", [True, False], ids=["views", "no views"])
def test_fleet_with_30_percent_failures_trips_on_the_fourth_in_a_row(fleet_of, uses_views):
    """Of 8 workers that report few successes, the fourth failure in a row trips, and no other."""
    with fleet_of(8, fail_max=4, max_staleness=1.0 if uses_views else 0) as fleet:
        for seed in range(12):
            if uses_views:
                fleet.run(settle)
            tripped, expected = calls_until_trip(fleet, seed, uses_views=uses_views)
            assert tripped == expected != -1, f"seed {seed}"
            fleet[0].run(operator, "close")
            fleet.run(wait_until_closed)


def wait_until_closed(worker: Worker) -> None:
    """Wait until this process has noticed the close."""
    wait_for(lambda: worker.breaker.current_state == "closed", "the close is noticed")


def watch(worker: Worker, times: int) -> list[float]:
    """Read the state in a loop, and return the monotonic times at which it changed."""
    seen = []
    state = worker.breaker.current_state
    until = time.monotonic() + 100
    worker.report("watching")
    while len(seen) < times:
        assert time.monotonic() < until, f"{len(seen)} of {times}"
        if (now := worker.breaker.current_state) != state:
            seen.append(time.monotonic())
            state = now
            worker.report("seen")
        time.sleep(0.0002)
    return seen


@pytest.mark.parametrize("make", ["ours"])
def test_transition_is_noticed_by_idle_processes_in_milliseconds(fleet_of, report):
    """Push works under load.  The figure of the README is measured by a benchmark."""
    times = 200
    with fleet_of(3, max_staleness=1.0) as fleet:
        mover, watchers = fleet[0], fleet.workers[1:]
        fleet.run(settle)
        for watcher in watchers:
            watcher.begin(watch, times)
        for watcher in watchers:
            watcher.wait_for("watching")
        done_at = []
        for number in range(times):
            done_at.append(mover.run(operator, "close" if number % 2 else "open"))
            for watcher in watchers:
                watcher.wait_for("seen")
        seen = [watcher.result() for watcher in watchers]
    # The operator's time of the transition is taken after the others may have noticed it.
    late = sorted(max(0.0, at - done) for each in seen for at, done in zip(each, done_at, strict=True))
    p50, p99 = late[len(late) // 2], late[int(len(late) * 0.99)]
    report(f"transition seen by others after: p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms")
    # A process that only polls notices it after a quarter of a second on average.
    assert p50 < 0.05
    assert p99 < 0.5


FORKS = """
import os, select, signal, sys, threading, time
import redis, pybreaker
from tests.support.breakers import breaker_on, settled, up
from tests.support import inspect
from tests.support.inspect import listener_connections, listeners, view_of
from tests.support.wait import wait_for

socket, forks = sys.argv[1], int(sys.argv[2])
client = redis.Redis(unix_socket_path=socket)
# On a busy machine an answer may be late.
breaker = settled(breaker_on(client, reset_timeout=60, timeout=10))
other = breaker_on(redis.Redis(unix_socket_path=socket), max_staleness=0, timeout=10)
stop = threading.Event()

def traffic():
    while not stop.is_set():
        try:
            breaker.call(up)
        except pybreaker.CircuitBreakerError:
            time.sleep(0.001)

threads = [threading.Thread(target=traffic, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()

def child(number, go, inherited):
    signal.alarm(20)
    for fd, what in inherited.items():
        assert not os.path.exists(f"/proc/self/fd/{fd}") or os.readlink(f"/proc/self/fd/{fd}") != what, "held open"
    os.read(go, 1)
    expected = "open" if number % 2 == 0 else "closed"
    # A thread of the parent may hold the breaker's lock, so the child makes a breaker of its own.
    mine = pybreaker.CircuitBreaker(state_storage=inspect.storage_of(breaker), reset_timeout=60)
    assert mine.current_state == expected, (mine.current_state, expected)
    if expected == "open":
        try:
            mine.call(up)
        except pybreaker.CircuitBreakerError:
            pass
        else:
            raise AssertionError("not rejected")
        wait_for(lambda: mine.current_state and view_of(mine).is_trusted, "the child has a listener")
    else:
        assert mine.call(up) == "answer"
        wait_for(lambda: mine.call(up) and view_of(mine).fast_path.quiet_admission, "the child has a listener")
    assert len(listeners()) == 1

for number in range(forks):
    (session,) = [listener.session for listener in inspect.all_listeners()]
    fds = inspect.file_descriptors_of(session.connection)
    inherited = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
    go, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(number, go, inherited)
            status = 0
        except BaseException as error:
            print("child", number, repr(error), flush=True)
        finally:
            os._exit(status)
    # Changed after the fork, so that the child must not use the view of its parent.
    (other.open if number % 2 == 0 else other.close)()
    os.write(start, b"x")
    os.close(go)
    os.close(start)
    assert os.waitpid(pid, 0)[1] == 0, number
    wait_for(lambda: breaker.current_state == ("open" if number % 2 == 0 else "closed"), "the parent notices", within=2)

stop.set()
for thread in threads:
    thread.join()
assert len(listeners()) == 1

def has_one_line():
    found = listener_connections(client)
    return len(found) == len({line["addr"] + line["id"] for line in found}) <= 2

wait_for(has_one_line, "one line")
print("well", flush=True)
"""


@pytest.mark.usefixtures("no_listeners")
@pytest.mark.parametrize("forks", [pytest.param(100, marks=pytest.mark.slow), 4])
def test_forks_under_traffic_leave_current_views_in_child_and_parent(server: PrivateServer, forks: int) -> None:
    """A child uses neither the views, nor the locks, nor the listener that it inherits from its parent."""
    # Python 3.12 warns of any fork of a process with threads.
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, server.unix_socket, str(forks)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stdout + done.stderr


def test_process_that_was_stopped_uses_no_old_view(server: PrivateServer, tmp_path: Path) -> None:
    """A process that was stopped queries Redis, because its clock went on while pushed messages waited in a buffer."""
    spec = Spec("ours", server.unix_socket, str(tmp_path / "calls"))
    with Fleet([spec, spec]) as fleet:
        sleeper, mover = fleet
        sleeper.run(settle)
        pid: Any = sleeper.process.pid
        os.kill(pid, signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            stack.callback(os.kill, pid, signal.SIGCONT)
            mover.run(operator, "open")
            time.sleep(1.1)
        assert sleeper.run(call).rejected
