"""Redis is allowed to fail: whatever is wrong with it, calls are made, guarded and fast."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._servers import availability
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import Down, breaker_on, down, settled, up
from tests.support.faults import FAULTS, Fault, Site
from tests.support.logs import lines_of
from tests.support.outages import WAITED, calls, health_of, is_back
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: Seconds that a guarded call may wait for Redis.
TIMEOUT = 0.25

#: What a loaded machine adds to that.
SLACK = 0.05


every_fault = pytest.mark.parametrize("fault", FAULTS, ids=str)


# -- every fault -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_fault
def test_no_fault_reaches_a_call_and_one_call_waits_at_most(site: Site, fault: Fault, caplog):
    """P6: no error, one bounded wait, then as fast as ever; two lines in the log; and it is well again afterwards.

    What a busy machine adds to that it does not add three times in a row.
    """
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=4, reset_timeout=0.1))
    for attempts_left in (2, 1, 0):
        healthy = calls(breaker, 0.5, failing=0.3)
        wait_for(lambda: is_back(breaker) and len(lines_of(caplog, site)) % 2 == 0, "a quiet moment")
        caplog.clear()
        with fault.during(site):
            spell = calls(breaker, 1.5, failing=0.3)
            fresh = breaker_on(site.client(), f"made in the outage, {attempts_left}")
            assert [fresh.call(up) for _ in range(3)] == ["answer"] * 3
        wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
        wait_for(lambda fresh=fresh: is_back(fresh), "the other shared circuit", within=60)
        settled(fresh)
        assert healthy.unexpected == spell.unexpected == []
        try:
            assert max(spell.took) < TIMEOUT + SLACK
            if not fault.flickers:
                assert spell.waits <= 1
                assert spell.usual < max(2 * healthy.usual, 0.002)
                lines = lines_of(caplog, site)
                assert len(lines) <= 2 + 2 * sum("made in the outage" in line for line in lines)
            return
        except AssertionError:
            if not attempts_left:
                raise
            del fresh
            wait_for(lambda: len(lines_of(caplog, site)) % 2 == 0, "a quiet moment")


#: Of each kind one, for tests that do not need all.
SOME = [fault for fault in FAULTS if fault.name in ("killed, empty", "frozen", "read-only replica", "never answered")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fallback", "fault"),
    [("closed", fault) for fault in FAULTS]
    + [(fallback, fault) for fallback in ("open", "half-open", "last") for fault in SOME],
    ids=str,
)
def test_dead_dependency_is_spared_through_every_fault(site: Site, fallback: str, fault: Fault):
    """At most `fail_max` calls of a process reach it per `reset_timeout`; afterwards the circuit is open for all."""
    # Where there is an answer to every question, a busy machine shall not seem to be a server that is silent.
    words = {"fallback_circuit_state": fallback, "timeout": 10 if fault.answers else TIMEOUT}
    breaker = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, **words))
    with fault.during(site):
        spell = calls(breaker, 0.4, failing=1.0)
    assert spell.unexpected == []
    # With a Redis that comes and goes, a failure may be reported in vain several times.
    assert spell.reached <= (15 if fault.flickers else 5)
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
    if (fallback, fault.answers) == ("open", False) or (fallback, fault.comes_back_empty) == ("half-open", True):
        # It never tripped, or what has vanished is to begin half-open.
        return
    assert breaker.current_state == "open"
    assert site.administrator.get("viewed:pybreaker:state") == b"open"


@pytest.mark.slow
@every_fault
def test_open_circuit_stays_open_through_every_fault(site: Site, fault: Fault):
    """Nothing is announced and nothing let through, however long it lasts, whatever is lost."""
    heard: list[str] = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            heard.append(new_state.name)

    breaker = settled(breaker_on(site.client(), reset_timeout=60))

    def opened_at_ms() -> Any:
        # What each process makes of that depends on how well it knows the server's clock.
        return site.administrator.hget("viewed:pybreaker:circuit", "opened_at_ms")

    breaker.open()
    wait_for(lambda: is_back(breaker) and opened_at_ms(), "it is open for all")
    opened = opened_at_ms()
    breaker.add_listener(Listener())
    with fault.during(site):
        spell = calls(breaker, 0.4, failing=0)
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
    after = calls(breaker, 0.2, failing=0)
    assert spell.unexpected == after.unexpected == []
    assert spell.reached == after.reached == 0
    assert heard == []
    assert opened_at_ms() == opened, "for the rest of its time"


# -- blips -------------------------------------------------------------------------------------------------------------


def made(make: str, client: redis.Redis, **words: Any) -> Any:
    """A storage of ours or of pybreaker."""
    return (CircuitRedisStorage if make == "ours" else pybreaker.CircuitRedisStorage)("closed", client, "shop", **words)


@pytest.mark.parametrize("failures", [1, 10])
def test_blip_while_open_announces_nothing_and_lets_nothing_through(site: Site, make, promised, failures: int):
    """A few lost commands are no reason to try a dead dependency, nor to forget that it is dead."""
    storage = made(make, site.client(**ONCE))
    heard: list[str] = []
    reached: list[int] = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            heard.append(new_state.name)

    breaker = pybreaker.CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.open()
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    breaker.add_listener(Listener())
    site.proxy.doomed = failures
    site.proxy.hang_up()
    for number in range(100):
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(lambda number=number: reached.append(number))
        time.sleep(0.002)
    with promised():
        assert (heard, reached) == ([], [])
    if make == "ours":
        wait_for(lambda: is_back(breaker), "the shared circuit", within=30)
        assert (heard, reached) == ([], [])
        assert breaker.current_state == "open"


# -- what the stock storage does then ----------------------------------------------------------------------------------


def test_refused_redis_leaves_calls_guarded(tmp_path, make, promised):
    """Defect e: no Redis, dead dependency, and 200 calls."""
    reached: list[int] = []
    client = redis.Redis(unix_socket_path=str(tmp_path / "nobody.sock"), **ONCE)
    with promised():
        try:
            breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60, state_storage=made(make, client))
        except redis.RedisError as error:
            raise AssertionError("constructing raises") from error
        for number in range(200):

            def dead(number: int = number) -> None:
                reached.append(number)
                raise Down

            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                breaker.call(dead)
        assert len(reached) == 5


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in ("killed", "read-only replica")], ids=str)
def test_fallback_open_does_not_recurse(site: Site, make, promised, fault: Fault):
    """Defect f: the storage says open, and cannot be told anything else."""
    words = {"timeout": 10} if make == "ours" else {}
    storage = made(make, site.client(**ONCE), fallback_circuit_state="open", **words)
    breaker = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0.05, state_storage=storage)
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(down)
    time.sleep(0.06)  # the timeout, so that it is time to try
    unexpected: list[str] = []
    with fault.during(site):
        logging.disable(logging.CRITICAL)
        try:
            for call in (up, down, up, down):
                try:
                    breaker.call(call)
                except (Down, pybreaker.CircuitBreakerError):
                    pass
                except Exception as error:  # noqa: BLE001
                    unexpected.append(type(error).__name__)
        finally:
            logging.disable(logging.NOTSET)
    with promised():
        assert unexpected == []


# -- what comes of it afterwards ---------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(site: Site) -> Iterator[tuple[pybreaker.CircuitBreaker, pybreaker.CircuitBreaker]]:
    """A breaker of somebody who reaches Redis, and one of somebody who does not any more."""
    with contextlib.closing(site.server.client()) as direct:
        theirs = settled(breaker_on(direct, fail_max=5, reset_timeout=60, timeout=10))
        ours = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, timeout=10))
        site.proxy.refuse()
        wait_for(lambda: ours.call(up) and health_of(ours).condition == "unreachable", "it is cut off")
        yield theirs, ours


def test_trip_of_one_who_was_cut_off_is_everybodys(site: Site, cut_off):
    """What a process has learned alone at some expense, the others need not learn."""
    theirs, ours = cut_off
    assert calls(ours, 0.1, failing=1.0).reached == 5
    opened_at = ours._state_storage.opened_at
    assert theirs.current_state == "closed"
    time.sleep(1.5)  # long beside what a busy machine adds to the news
    site.proxy.listen()
    wait_for(lambda: theirs.current_state == "open", "they hear of it")
    assert abs((theirs._state_storage.opened_at - opened_at).total_seconds()) < 1.0, "for the rest of its time"


def test_trip_of_others_is_adopted(site: Site, cut_off):
    """Who comes back to an open circuit does not try."""
    theirs, ours = cut_off
    theirs.open()
    assert ours.call(up) == "answer"
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "back")
    with pytest.raises(pybreaker.CircuitBreakerError):
        ours.call(lambda: pytest.fail("reached"))


def test_trip_of_one_who_was_cut_off_gives_way_to_a_later_recovery(site: Site, cut_off):
    """The others have been through it meanwhile: they know more."""
    theirs, ours = cut_off
    assert calls(ours, 0.1, failing=1.0).reached == 5
    theirs.open()
    theirs.close()
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "back")
    assert ours.call(up) == "answer"
    assert theirs.current_state == "closed"


def test_recovery_of_one_who_was_cut_off_is_not_everybodys(site: Site, cut_off):
    """One probe finds it out; a circuit closed for all by somebody who may be the only one to reach it is worse."""
    theirs, ours = cut_off
    theirs.open()
    assert calls(ours, 0.1, failing=1.0).reached == 5
    ours.close()
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "back")
    assert ours.current_state == theirs.current_state == "open"


@pytest.mark.parametrize(("outcomes", "counter"), [("FF", 4), ("SF", 1), ("S", 0), ("", 2)])
def test_counter_goes_on_where_it_was(site: Site, outcomes: str, counter: int):
    """Failures are consecutive across the moments at which Redis goes and comes back."""
    breaker = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, timeout=10))
    for _ in range(2):
        with pytest.raises(Down):
            breaker.call(down)
    site.proxy.refuse()
    wait_for(lambda: health_of(breaker).condition == "unreachable", "it is cut off")
    assert breaker._state_storage.counter == 2
    for outcome in outcomes:
        with contextlib.suppress(Down):
            breaker.call(down if outcome == "F" else up)
    site.proxy.listen()
    wait_for(lambda: health_of(breaker).condition == "connected", "back")
    assert int(site.administrator.get("viewed:pybreaker:fail_counter")) == counter


def test_probe_in_flight_closes_the_own_circuit(site: Site):
    """Redis goes while the dependency is tried: the result counts, here and now."""
    breaker = settled(breaker_on(site.client(), reset_timeout=0.05))
    breaker.open()
    time.sleep(0.06)  # the timeout

    def meanwhile_redis_goes() -> str:
        site.proxy.refuse()
        return up()

    assert breaker.call(meanwhile_redis_goes) == "answer"
    assert breaker.current_state == "closed"
    site.proxy.listen()
    wait_for(lambda: is_back(breaker) and site.administrator.get("viewed:pybreaker:state") == b"closed", "one probe")


# -- threads, time, memory ---------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_wait_no_longer_than_one(site: Site, caplog):
    """Eight circuits of one server in eight threads: one outage, one line in the log, one spell of waiting."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    # Long enough that one of them is told from two on a busy machine.
    timeout = 2.0
    breakers = [breaker_on(site.client(), f"circuit {number}", max_staleness=0, timeout=timeout) for number in range(8)]
    assert [breaker.call(up) for breaker in breakers] == ["answer"] * 8
    took: list[tuple[float, float]] = []
    ready = threading.Barrier(len(breakers))

    def call(breaker: pybreaker.CircuitBreaker) -> None:
        ready.wait()
        for _ in range(20):
            began = time.monotonic()
            breaker.call(up)
            took.append((began, time.monotonic()))

    caplog.clear()
    site.server.pause()
    try:
        threads = [threading.Thread(target=call, args=(breaker,)) for breaker in breakers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    finally:
        site.server.resume()
    waits = [(began, ended) for began, ended in took if ended - began > WAITED]
    assert len(took) == 8 * 20
    # Two waits, one after the other, would take twice the timeout.
    assert max(ended for _, ended in waits) - min(began for began, _ in waits) < 1.8 * timeout
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "the shared circuit")
    wait_for(lambda: len(lines_of(caplog, site)) == 2, "that it is back is said")
    assert "and 7 more: Redis at" in lines_of(caplog, site)[0]


def test_question_from_before_the_return_says_nothing_when_it_is_given_up(site: Site, caplog):
    """A server that has thawed is not away because somebody has waited for it while it was frozen."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=10))
    tenancy = breaker._state_storage._core
    began = time.monotonic()
    site.proxy.refuse()
    wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "it is away")
    site.proxy.listen()
    wait_for(lambda: len(lines_of(caplog, site)) == 2, "it is back, and that is said")
    tenancy.server.report_failure(redis.TimeoutError("Timeout reading from socket"), tenancy, began)
    assert health_of(breaker).condition == "connected"
    assert len(lines_of(caplog, site)) == 2


def test_connections_end_with_the_last_storage(site: Site, nobody_listens):
    """Neither the thread nor a registry keeps them open."""
    connected = site.administrator.info("clients")["connected_clients"]
    breaker = settled(breaker_on(site.client()))
    assert site.administrator.info("clients")["connected_clients"] > connected
    del breaker

    def are_gone() -> bool:
        gc.collect()
        return bool(site.administrator.info("clients")["connected_clients"] == connected)

    wait_for(are_gone, "nobody is connected any more")


def test_100_outages_leave_no_connection_behind(site: Site):
    """What failed is closed, not kept."""
    breaker = settled(breaker_on(site.client()))
    connected = site.administrator.info("clients")["connected_clients"]
    for _ in range(100):
        site.proxy.hang_up()
        site.proxy.refuse()
        wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "it is away")
        site.proxy.listen()
        wait_for(lambda: is_back(breaker), "it is back")
    # A call and the thread that retries may have had a connection each at the same time; the pool keeps both.
    most = connected + 1
    wait_for(lambda: site.administrator.info("clients")["connected_clients"] <= most, "as many as before")


@pytest.mark.slow
def test_hour_without_redis_takes_no_memory(site: Site, monkeypatch):
    """As many attempts to return, calls, trips and probes as in an hour, in less time."""
    monkeypatch.setattr(availability, "RETRY_DELAY_MAX_S", 0.001)
    monkeypatch.setattr(availability, "RETRY_DELAY_MIN_S", 0.001)
    breaker = settled(breaker_on(site.client(), fail_max=3, reset_timeout=0.01))
    breaker._state_storage._core.server.availability.retry_delay_max_s = 0.001
    site.proxy.refuse()
    site.server.kill()

    def attempts() -> int:
        return health_of(breaker).attempts

    def spend(until: int) -> int:
        while attempts() < until:
            with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
                breaker.call(random.choice([up, down, down, down]))
            time.sleep(0.001)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = spend(400)
        after = spend(4000)
    finally:
        tracemalloc.stop()
    assert after - before < 50_000


# -- what is told ------------------------------------------------------------------------------------------------------


def test_health_tells_the_whole_story_without_asking(site: Site, caplog):
    """What a health endpoint prints: before, while it is well, while it is away, and when it is back."""
    client = site.client()
    breaker = pybreaker.CircuitBreaker(state_storage=CircuitRedisStorage("closed", client, "shop", timeout=5))
    unused = health_of(breaker)
    assert (unused.condition, unused.circuit, unused.server, unused.state) == ("unused", "shop", "", "closed")
    assert (unused.since, unused.view_age, unused.push, unused.mode) == (None, None, "none", "")
    settled(breaker)
    well = health_of(breaker)
    assert (well.condition, well.mode, well.circuits, well.is_own) == ("connected", "lua", 1, False)
    assert well.server == f"127.0.0.1:{site.proxy.port}/0"
    assert well.push in ("tracking", "channel")
    assert well.server_version.split()[-1] == site.server.version
    assert well.view_age is not None
    assert well.view_age < 2
    assert (well.last_error, well.next_attempt, well.attempts) == ("", None, 0)
    site.proxy.refuse()
    site.server.pause()
    try:
        wait_for(lambda: health_of(breaker).condition == "unreachable", "the listener or a call finds out")
        breaker.call(up)
        wait_for(lambda: health_of(breaker).attempts > 1, "attempts")
        gone = health_of(breaker)
        assert (gone.is_own, gone.push, gone.server_version) == (True, "none", "")
        assert "Error" in gone.last_error
        assert gone.next_attempt is not None
        assert gone.next_attempt < 40
        assert gone.since is not None
        assert well.since is not None
        assert gone.since > well.since
    finally:
        site.server.resume()
        site.proxy.listen()
    wait_for(lambda: health_of(breaker).condition == "connected", "back", within=30)
    back = health_of(breaker)
    assert back.last_error == gone.last_error
    assert back.next_attempt is None
    assert back.since > gone.since


@pytest.mark.parametrize(
    ("fault", "condition"),
    [("read-only replica", "read-only"), ("may do nothing", "refused"), ("refused", "unreachable")],
)
def test_health_names_the_condition(site: Site, fault: str, condition: str):
    """An operator sees at once whose turn it is to do something."""
    breaker = settled(breaker_on(site.client()))
    (during,) = (item.during for item in FAULTS if item.name == fault)
    with during(site):
        wait_for(lambda: calls(breaker, 0.01, failing=0.5) and health_of(breaker).condition == condition, condition)
    wait_for(lambda: is_back(breaker), "the shared circuit", within=30)


def test_log_records_carry_what_they_say(site: Site, caplog):
    """Whoever wants to count outages attaches a handler, and need not parse a sentence."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=1, timeout=10))
    server = f"127.0.0.1:{site.proxy.port}/0"

    def events() -> dict[str, dict[str, Any]]:
        words = [record.pybreaker_redis for record in caplog.records if hasattr(record, "pybreaker_redis")]
        return {said["event"]: said for said in words if said["server"] == server}

    site.server.kill()
    with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
        breaker.call(down)
    wait_for(lambda: "away" in events(), "a warning")
    site.restart(keep_data=False)
    wait_for(lambda: "back" in events(), "an all-clear")
    away, back = events()["away"], events()["back"]
    assert away["error"].startswith("ConnectionError: ")
    assert 0 <= away["pause"] < 1
    assert back["outcomes"] == {"opened for all": 1}
    assert back["seconds"] > 0


# -- a server that can be read -----------------------------------------------------------------------------------------


def test_fleets_view_is_kept_where_nothing_can_be_written(preferred):
    """Whose Redis is a replica goes by what the others do, protects itself besides, and never asks again and again."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(PrivateServer(preferred.binary, port=free_port()))
        replica = stack.enter_context(PrivateServer(preferred.binary))
        writer, reader, administrator = master.client(), replica.client(), replica.client()
        for client in (writer, reader, administrator):
            stack.callback(client.close)
        theirs = settled(breaker_on(writer, reset_timeout=60, timeout=10))
        ours = settled(breaker_on(reader, fail_max=3, reset_timeout=60, timeout=10))
        administrator.execute_command("REPLICAOF", "127.0.0.1", master.port)
        wait_for(lambda: administrator.info("replication")["master_link_status"] == "up", "a replica")
        wait_for(lambda: calls(ours, 0.02, failing=0.5) and health_of(ours).condition == "read-only", "no writes")
        theirs.close()
        theirs.open()
        wait_for(lambda: ours.current_state == "open", "the fleet's trip is seen")
        theirs.close()
        wait_for(lambda: ours.current_state == "closed", "the fleet's recovery is seen")
        assert calls(ours, 0.3, failing=1.0).reached <= 3
        assert ours.current_state == "open", "its own protection"
        assert theirs.current_state == "closed"
