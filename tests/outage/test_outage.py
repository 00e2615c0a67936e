"""The promise of an outage: guarded calls raise no error of Redis, stay guarded, and stay fast."""

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
from pybreaker_redis._circuits import probes
from pybreaker_redis._servers import availability
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.breakers import Down, breaker_on, down, settled, up
from tests.support.faults import FAULTS, Fault, Site
from tests.support.inspect import core_of, server_of, storage_of
from tests.support.logs import lines_of, records_of
from tests.support.outages import WAIT_MIN_S, calls, health_of, is_back
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: Seconds that a guarded call may wait for Redis.
TIMEOUT = 0.25

#: Seconds that a loaded machine adds to `TIMEOUT`.
SLACK = 0.05


def every_fault(*sample: str) -> pytest.MarkDecorator:
    """Return the parameters of a test with every fault, of which a run without ``--full`` has only some.

    Args:
        sample: Names of faults that run without ``--full``.
    """
    marks = dict.fromkeys(sample, pytest.mark.sample)
    return pytest.mark.parametrize(
        "fault", [pytest.param(each, marks=marks.get(each.name, ())) for each in FAULTS], ids=str
    )


#: One fault of each kind: gone, silent, refusing, forbidden, damaged, flickering, loading.
ONE_OF_EACH = (
    *("killed", "frozen", "out of memory", "may not write", "half-written", "connections killed", "loading"),
)


# -- every fault -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_fault(*ONE_OF_EACH)
def test_no_fault_reaches_a_call_and_one_call_waits_at_most(site: Site, fault: Fault, caplog):
    """A fault costs no error, one bounded wait and two log lines, and the shared circuit is used again afterwards.

    A busy machine can break these bounds by chance.  The test therefore makes up to three attempts.
    """
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=4, reset_timeout=0.1))
    for attempts_left in (2, 1, 0):
        healthy = calls(breaker, 0.5, failing=0.3)
        wait_for(lambda: is_back(breaker) and len(lines_of(caplog, site)) % 2 == 0, "a quiet moment")
        caplog.clear()
        with fault.during(site):
            during = calls(breaker, 1.5, failing=0.3)
            fresh = breaker_on(site.client(), f"made in the outage, {attempts_left}")
            assert [fresh.call(up) for _ in range(3)] == ["answer"] * 3
        wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)
        wait_for(lambda fresh=fresh: is_back(fresh), "the other shared circuit is in use again", within=60)
        settled(fresh)
        assert healthy.unexpected == during.unexpected == []
        try:
            assert max(during.took) < TIMEOUT + SLACK
            if not fault.flickers:
                assert during.waits <= 1
                assert during.usual < max(2 * healthy.usual, 0.002)
                lines = lines_of(caplog, site)
                assert len(lines) <= 2 + 2 * sum("made in the outage" in line for line in lines)
            return
        except AssertionError:
            if not attempts_left:
                raise
            del fresh
            wait_for(lambda: len(lines_of(caplog, site)) % 2 == 0, "a quiet moment")


#: One fault of each kind, for tests that do not need all.
SOME = [fault for fault in FAULTS if fault.name in ("killed, empty", "frozen", "read-only replica", "never answered")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fallback", "fault"),
    [pytest.param("closed", fault, marks=pytest.mark.sample if fault.name == "killed" else ()) for fault in FAULTS]
    + [(fallback, fault) for fallback in ("open", "half-open", "last") for fault in SOME],
    ids=str,
)
def test_dead_dependency_is_spared_through_every_fault(site: Site, fallback: str, fault: Fault):
    """At most `fail_max` calls per `reset_timeout` reach the dependency, and the circuit is open afterwards."""
    # Where Redis answers every command, a slow answer of a busy machine must not count as an outage.
    settings = {"fallback_circuit_state": fallback, "timeout": 10 if fault.answers else TIMEOUT}
    breaker = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, **settings))
    with fault.during(site):
        during = calls(breaker, 0.4, failing=1.0)
    assert during.unexpected == []
    # If the connection to Redis is flaky, several reports of a failure may be lost.
    assert during.reached <= (15 if fault.flickers else 5)
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)
    if (fallback, fault.answers) == ("open", False) or (fallback, fault.comes_back_empty) == ("half-open", True):
        # Either the circuit never tripped, or a lost record begins half-open.
        return
    assert breaker.current_state == "open"
    assert site.administrator.get("viewed:pybreaker:state") == b"open"


@pytest.mark.slow
@every_fault("killed", "out of memory")
def test_open_circuit_stays_open_through_every_fault(site: Site, fault: Fault):
    """An open circuit publishes no transition and admits no call, whatever the fault destroys."""
    transitions: list[str] = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            transitions.append(new_state.name)

    breaker = settled(breaker_on(site.client(), reset_timeout=60))

    def opened_at_ms() -> Any:
        # The time that each process derives from this field depends on its estimate of the server's clock.
        return site.administrator.hget("viewed:pybreaker:circuit", "opened_at_ms")

    breaker.open()
    wait_for(lambda: is_back(breaker) and opened_at_ms(), "the shared circuit is open")
    opened = opened_at_ms()
    breaker.add_listener(Listener())
    with fault.during(site):
        during = calls(breaker, 0.4, failing=0)
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)
    after = calls(breaker, 0.2, failing=0)
    assert during.unexpected == after.unexpected == []
    assert during.reached == after.reached == 0
    assert transitions == []
    assert opened_at_ms() == opened, "the reset timeout continues"


# -- brief losses of connections ---------------------------------------------------------------------------------------


def made(make: str, client: redis.Redis, **settings: Any) -> Any:
    """Return a storage of this package or of pybreaker."""
    return (CircuitRedisStorage if make == "ours" else pybreaker.CircuitRedisStorage)(
        "closed", client, "shop", **settings
    )


@pytest.mark.parametrize("failures", [1, pytest.param(10, marks=pytest.mark.full)])
def test_brief_loss_of_connections_keeps_an_open_circuit_open(site: Site, make, promised, failures: int):
    """A few lost commands neither admit a call to a dead dependency nor close the circuit."""
    storage = made(make, site.client(**ONCE))
    transitions: list[str] = []
    reached: list[int] = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            transitions.append(new_state.name)

    breaker = pybreaker.CircuitBreaker(reset_timeout=60, state_storage=storage)
    breaker.open()
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    breaker.add_listener(Listener())
    site.proxy.failing_requests = failures
    site.proxy.close_connections()
    for number in range(100):
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(lambda number=number: reached.append(number))
        time.sleep(0.002)
    with promised():
        assert (transitions, reached) == ([], [])
    if make == "ours":
        wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)
        assert (transitions, reached) == ([], [])
        assert breaker.current_state == "open"


# -- defects of the stock storage --------------------------------------------------------------------------------------


def test_calls_stay_guarded_if_redis_was_never_reachable(tmp_path, make, promised):
    """Without Redis, a dead dependency receives `fail_max` of 200 calls (defect e of stock)."""
    reached: list[int] = []
    client = redis.Redis(unix_socket_path=str(tmp_path / "missing.sock"), **ONCE)
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
    """A fallback state that the storage cannot change leads to no endless recursion (defect f of stock)."""
    settings = {"timeout": 10} if make == "ours" else {}
    storage = made(make, site.client(**ONCE), fallback_circuit_state="open", **settings)
    breaker = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0.05, state_storage=storage)
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(down)
    time.sleep(0.06)  # the reset timeout, so that a probe is due
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


# -- after the outage --------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(site: Site) -> Iterator[tuple[pybreaker.CircuitBreaker, pybreaker.CircuitBreaker]]:
    """Return a breaker that reaches Redis, and one of the same circuit with refused connections."""
    with contextlib.closing(site.server.client()) as direct:
        other = settled(breaker_on(direct, fail_max=5, reset_timeout=60, timeout=10))
        ours = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, timeout=10))
        site.proxy.refuse()
        wait_for(lambda: ours.call(up) and health_of(ours).condition == "unreachable", "the outage is noticed")
        yield other, ours


def test_trip_of_a_disconnected_process_is_shared_on_return(site: Site, cut_off):
    """A trip in a local circuit is shared on return, so that other processes need no failures of their own."""
    other, ours = cut_off
    assert calls(ours, 0.1, failing=1.0).reached == 5
    opened_at = storage_of(ours).opened_at
    assert other.current_state == "closed"
    time.sleep(1.5)  # long compared with the delay of a push on a busy machine
    site.proxy.listen()
    wait_for(lambda: other.current_state == "open", "the other process follows")
    assert abs((storage_of(other).opened_at - opened_at).total_seconds()) < 1.0, "the reset timeout continues"


def test_trip_by_another_process_is_adopted_on_return(site: Site, cut_off):
    """A process that returns to an open circuit makes no call to the dependency."""
    other, ours = cut_off
    other.open()
    assert ours.call(up) == "answer"
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "the return is noticed")
    with pytest.raises(pybreaker.CircuitBreakerError):
        ours.call(lambda: pytest.fail("reached"))


def test_trip_of_a_disconnected_process_gives_way_to_a_later_recovery(site: Site, cut_off):
    """A recovery that other processes made after the trip is newer than the trip, and wins."""
    other, ours = cut_off
    assert calls(ours, 0.1, failing=1.0).reached == 5
    other.open()
    other.close()
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "the return is noticed")
    assert ours.call(up) == "answer"
    assert other.current_state == "closed"


def test_recovery_of_a_disconnected_process_is_not_shared(site: Site, cut_off):
    """A recovery in a local circuit is not shared: one process alone must not close the circuit for all."""
    other, ours = cut_off
    other.open()
    assert calls(ours, 0.1, failing=1.0).reached == 5
    ours.close()
    site.proxy.listen()
    wait_for(lambda: health_of(ours).condition == "connected", "the return is noticed")
    assert ours.current_state == other.current_state == "open"


@pytest.mark.parametrize(("outcomes", "counter"), [("FF", 4), ("SF", 1), ("S", 0), ("", 2)])
def test_failure_counter_continues_across_an_outage(site: Site, outcomes: str, counter: int):
    """Failures are consecutive across the begin and the end of an outage."""
    breaker = settled(breaker_on(site.client(), fail_max=5, reset_timeout=60, timeout=10))
    for _ in range(2):
        with pytest.raises(Down):
            breaker.call(down)
    site.proxy.refuse()
    wait_for(lambda: health_of(breaker).condition == "unreachable", "the outage is noticed")
    assert storage_of(breaker).counter == 2
    for outcome in outcomes:
        with contextlib.suppress(Down):
            breaker.call(down if outcome == "F" else up)
    site.proxy.listen()
    wait_for(lambda: health_of(breaker).condition == "connected", "the return is noticed")
    assert int(site.administrator.get("viewed:pybreaker:fail_counter")) == counter


def test_probe_in_flight_when_an_outage_begins_closes_the_local_circuit(site: Site):
    """The result of a probe counts in the local circuit if Redis fails during the probe."""
    breaker = settled(breaker_on(site.client(), reset_timeout=0.05))
    breaker.open()
    time.sleep(0.06)  # the reset timeout

    def meanwhile_redis_goes() -> str:
        site.proxy.refuse()
        return up()

    assert breaker.call(meanwhile_redis_goes) == "answer"
    assert breaker.current_state == "closed"
    site.proxy.listen()
    wait_for(
        lambda: is_back(breaker) and site.administrator.get("viewed:pybreaker:state") == b"closed",
        "a probe closes the shared circuit",
    )


# -- threads, time, memory ---------------------------------------------------------------------------------------------


def test_concurrent_calls_in_an_outage_wait_no_longer_than_one(site: Site, caplog):
    """Eight circuits of one server in eight threads meet one outage: one log line and one period of waiting."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    # Long enough to tell one wait from two on a busy machine.
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
    waits = [(began, ended) for began, ended in took if ended - began > WAIT_MIN_S]
    assert len(took) == 8 * 20
    # Two waits in a row would take twice the timeout.
    assert max(ended for _, ended in waits) - min(began for began, _ in waits) < 1.8 * timeout
    for breaker in breakers:
        wait_for(lambda breaker=breaker: is_back(breaker), "the shared circuit is in use again")
    wait_for(lambda: len(lines_of(caplog, site)) == 2, "the return is logged")
    assert "and 7 others use local state" in lines_of(caplog, site)[0]


def test_timeout_of_a_request_from_before_the_return_starts_no_outage(site: Site, caplog):
    """A request that began before the return and times out after it does not start another outage."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), timeout=10))
    failover = core_of(breaker)
    began = time.monotonic()
    site.proxy.refuse()
    wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "the outage is noticed")
    site.proxy.listen()
    wait_for(lambda: len(lines_of(caplog, site)) == 2, "the return is logged")
    failover.server.report_failure(redis.TimeoutError("Timeout reading from socket"), failover, began)
    assert health_of(breaker).condition == "connected"
    assert len(lines_of(caplog, site)) == 2


def test_connections_end_with_the_last_storage(site: Site, no_listeners):
    """Neither the listener's thread nor a registry of the package keeps connections open."""
    connected = site.administrator.info("clients")["connected_clients"]
    breaker = settled(breaker_on(site.client()))
    assert site.administrator.info("clients")["connected_clients"] > connected
    del breaker

    def are_gone() -> bool:
        gc.collect()
        return bool(site.administrator.info("clients")["connected_clients"] == connected)

    wait_for(are_gone, "all connections are closed")


@pytest.mark.full
def test_100_outages_leave_no_connection_behind(site: Site):
    """A connection that failed is closed, and the pool drops it."""
    breaker = settled(breaker_on(site.client()))
    connected = site.administrator.info("clients")["connected_clients"]
    for _ in range(100):
        site.proxy.close_connections()
        site.proxy.refuse()
        wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "the outage is noticed")
        site.proxy.listen()
        wait_for(lambda: is_back(breaker), "the return is noticed")
    # A call and the retry thread may have had a connection each at the same time, and the pool keeps both.
    most = connected + 1
    wait_for(lambda: site.administrator.info("clients")["connected_clients"] <= most, "as many connections as before")


@pytest.mark.slow
def test_hour_without_redis_takes_no_memory(site: Site, monkeypatch):
    """The attempts, calls, trips and probes of an hour's outage allocate no lasting memory."""
    monkeypatch.setattr(availability, "RETRY_DELAY_MAX_S", 0.001)
    monkeypatch.setattr(availability, "RETRY_DELAY_MIN_S", 0.001)
    # The tables of probes have as many entries as they may have before the first measurement.
    monkeypatch.setattr(probes, "PROBE_TOKENS_MAX", 8)
    monkeypatch.setattr(probes, "CLAIMS_PER_CIRCUIT_MAX", 8)
    breaker = settled(breaker_on(site.client(), fail_max=3, reset_timeout=0.01))
    server_of(breaker).availability.retry_delay_max_s = 0.001
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
        before = spend(1500)
        after = spend(5100)
    finally:
        tracemalloc.stop()
    assert after - before < 50_000


# -- health and log ----------------------------------------------------------------------------------------------------


def test_health_reports_each_phase_of_an_outage_without_a_query(site: Site, caplog):
    """Health is correct before the first use, while connected, in an outage, and after the return."""
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
        wait_for(lambda: health_of(breaker).condition == "unreachable", "the listener or a call notices the outage")
        breaker.call(up)
        wait_for(lambda: health_of(breaker).attempts > 1, "attempts")
        outage = health_of(breaker)
        assert (outage.is_own, outage.push, outage.server_version) == (True, "none", "")
        assert "Error" in outage.last_error
        assert outage.next_attempt is not None
        assert outage.next_attempt < 40
        assert outage.since is not None
        assert well.since is not None
        assert outage.since > well.since
    finally:
        site.server.resume()
        site.proxy.listen()
    wait_for(lambda: health_of(breaker).condition == "connected", "the return is noticed", within=30)
    back = health_of(breaker)
    assert back.last_error == outage.last_error
    assert back.next_attempt is None
    assert back.since > outage.since


@pytest.mark.parametrize(
    ("fault", "condition"),
    [("read-only replica", "read-only"), ("may do nothing", "refused"), ("refused", "unreachable")],
)
def test_health_names_the_condition(site: Site, fault: str, condition: str):
    """The condition tells an operator which cause to remove."""
    breaker = settled(breaker_on(site.client()))
    (during,) = (item.during for item in FAULTS if item.name == fault)
    with during(site):
        wait_for(lambda: calls(breaker, 0.01, failing=0.5) and health_of(breaker).condition == condition, condition)
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again", within=30)


def test_log_records_carry_structured_data(site: Site, caplog):
    """A log handler can count outages from `extra` data, without parsing the text."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(site.client(), fail_max=1, timeout=10))
    server = f"127.0.0.1:{site.proxy.port}/0"

    def events() -> dict[str, dict[str, Any]]:
        extras = [getattr(record, "pybreaker_redis", {}) for record in records_of(caplog, site)]
        return {extra["event"]: extra for extra in extras if extra.get("server") == server}

    site.server.kill()
    with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
        breaker.call(down)
    wait_for(lambda: "away" in events(), "the outage is logged")
    site.restart(keep_data=False)
    wait_for(lambda: "back" in events(), "the return is logged")
    away, back = events()["away"], events()["back"]
    assert away["error"].startswith("ConnectionError: ")
    assert 0 <= away["pause"] < 1
    assert back["outcomes"] == {"opened for all": 1}
    assert back["seconds"] > 0


# -- a server that accepts reads only ----------------------------------------------------------------------------------


@pytest.mark.full
def test_process_on_a_read_only_replica_follows_the_other_processes(preferred):
    """Where the server accepts no writes, a process follows the other processes and trips its local circuit."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(PrivateServer(preferred.binary, port=free_port()))
        replica = stack.enter_context(PrivateServer(preferred.binary))
        writer, reader, administrator = master.client(), replica.client(), replica.client()
        for client in (writer, reader, administrator):
            stack.callback(client.close)
        other = settled(breaker_on(writer, reset_timeout=60, timeout=10))
        ours = settled(breaker_on(reader, fail_max=3, reset_timeout=60, timeout=10))
        administrator.execute_command("REPLICAOF", "127.0.0.1", master.port)
        wait_for(lambda: administrator.info("replication")["master_link_status"] == "up", "the replica is in sync")
        wait_for(
            lambda: calls(ours, 0.02, failing=0.5) and health_of(ours).condition == "read-only",
            "the server refuses writes",
        )
        other.close()
        other.open()
        wait_for(lambda: ours.current_state == "open", "the trip of the other process is followed")
        other.close()
        wait_for(lambda: ours.current_state == "closed", "the recovery of the other process is followed")
        assert calls(ours, 0.3, failing=1.0).reached <= 3
        assert ours.current_state == "open", "the local circuit has tripped"
        assert other.current_state == "closed"
