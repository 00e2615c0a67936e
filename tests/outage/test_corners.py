"""Rare cases of an outage, which need a certain moment, process or server."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._redis.classify import ErrorKind, suppress_except
from pybreaker_redis._redis.endpoint import endpoint_of
from pybreaker_redis._redis.sentinel import verify_master
from pybreaker_redis._replica.armed import ArmedViews
from pybreaker_redis._replica.connection import Push
from pybreaker_redis._replica.subscribers import Subscriber
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import threads
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.faults import Site
from tests.support.inspect import (
    attempt_return,
    bare_connection,
    bare_session,
    core_of,
    engine_of,
    fail_circuit,
    fast_path_of,
    local_of,
    lock_of,
    lose_server,
    may_read,
    poll_once,
    pretend_fork,
    receive_push,
    retry_threads,
    send_beat,
    server_of,
    shared_of,
    start_retry_thread,
    storage_of,
    uses_shared,
    view_of,
)
from tests.support.logs import messages_of
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


@pytest.mark.full
def test_client_without_a_timeout_goes_through_an_outage(site: Site):
    """With `timeout=None` the storage uses the client and its connections unchanged, and returns."""
    client = site.client()
    breaker = settled(breaker_on(client, timeout=None))
    assert engine_of(breaker).client is client
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_callers_make_the_attempts_where_threads_cannot_be_started(site: Site, monkeypatch, caplog):
    """Without a retry thread, as under uWSGI without --enable-threads, callers share a trip on return and log it."""
    caplog.set_level("INFO", "pybreaker_redis")

    def refuse(*_: object) -> NoReturn:
        raise threads.ThreadRefusedError

    breaker = settled(breaker_on(site.client(), fail_max=2, reset_timeout=60))
    monkeypatch.setattr(threads, "start_daemon", refuse)
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    calls(breaker, 0.05, failing=1.0)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")
    assert site.administrator.get("viewed:pybreaker:state") == b"open"
    assert any("is available again" in line for line in messages_of(caplog, site))


def test_process_forked_without_fork_hooks_starts_its_own_retry_thread(site: Site):
    """A changed process id starts another retry thread, although no fork hook has run."""
    breaker = settled(breaker_on(site.client()))
    server = server_of(breaker)
    lock = lock_of(server)
    pretend_fork()
    assert start_retry_thread(server)
    assert lock_of(server) is not lock


def test_call_during_the_return_by_another_thread_uses_the_local_circuit(site: Site):
    """While one thread restores a circuit, calls of other threads use the local circuit."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    core_of(storage).on_server_lost()
    with local_of(storage).recovery_turn() as is_first:
        assert is_first
        assert core_of(storage).bring_back() is None
        assert breaker.call(up) == "answer"
        assert core_of(storage).uses_local
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_circuit_whose_report_fails_stays_local_until_the_next_call(site: Site, monkeypatch):
    """After a failed report a circuit stays local until the next call reports it."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    core_of(storage).on_server_lost()
    monkeypatch.setattr(local_of(storage), "must_report_again", lambda replies: True)
    assert core_of(storage).bring_back() == ""
    assert not uses_shared(storage)
    monkeypatch.undo()
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_circuit_that_changes_during_the_return_is_reported_again(site: Site, monkeypatch):
    """Calls change the local circuit during the return, so the report is repeated."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    core_of(storage).on_server_lost()
    ended, end = iter([False, True]), local_of(storage).end_run
    monkeypatch.setattr(local_of(storage), "end_run", lambda generation: end(generation) and next(ended))
    assert core_of(storage).bring_back() == ""
    assert uses_shared(storage)


def test_circuit_that_fails_during_the_return_is_left_to_its_next_caller(site: Site, monkeypatch):
    """An error of one circuit during the return leaves this circuit to its next caller."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    breaker.call(up)
    outage = server_of(storage).availability.outage
    with monkeypatch.context() as patched:
        patched.setattr(bulk, "bring_back_first", lambda tenants, answer_wait_s, outcomes: None)
        patched.setattr(Failover, "bring_back", lambda self: 1 / 0)
        attempt_return(server_of(storage), outage)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")


def test_trip_of_a_circuit_first_used_during_the_return_is_shared(site: Site, monkeypatch):
    """A circuit first used while the others are restored shares its trip, too."""
    breaker = settled(breaker_on(site.client(), timeout=10))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
    server = server_of(breaker)
    outage = server.availability.outage
    newcomer = breaker_on(site.client(), "newcomer", fail_max=1, timeout=10)
    fails(newcomer)
    with monkeypatch.context() as patched:
        patched.setattr(bulk, "bring_back_first", lambda tenants, answer_wait_s, outcomes: None)
        site.proxy.listen()
        attempt_return(server, outage)
    # The retry thread may attempt the return at the same time, and then restores the circuit.
    wait_for(lambda: site.administrator.get("newcomer:pybreaker:state") == b"open", "the trip is shared")
    wait_for(lambda: not core_of(newcomer).uses_local, "the shared circuit is in use")


def test_retry_thread_ends_with_the_last_circuit(site: Site, no_listeners):
    """The retry thread ends with the last circuit of its server and keeps none alive."""

    def lose() -> None:
        breaker = settled(breaker_on(site.client()))
        site.proxy.refuse()
        wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
        wait_for(lambda: health_of(breaker).attempts > 3, "several attempts are made")

    lose()
    wait_for(lambda: gc.collect() >= 0 and not retry_threads(), "the retry thread has ended")


def test_error_of_one_circuit_is_suppressed_and_error_of_the_server_raised():
    """An error of one circuit is suppressed, an error of the server is raised."""
    with suppress_except(ErrorKind.UNREACHABLE):
        raise TypeError("of one circuit")
    with pytest.raises(redis.ConnectionError), suppress_except(ErrorKind.UNREACHABLE):
        raise redis.ConnectionError("gone")


def test_answer_without_an_outage_logs_nothing(caplog):
    """An answer of a server without an outage logs nothing: two first answers may come at the same time."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    server.availability.has_retry_thread = False
    server.report_answer("")
    assert messages_of(caplog, str(server)) == []


def test_circuit_without_the_right_to_write_is_followed(site: Site):
    """Without the right to write, a process reads the circuit at once, and a second error changes nothing."""
    breaker = settled(breaker_on(site.client(), fail_max=1, reset_timeout=60, timeout=10))
    storage = storage_of(breaker)
    site.permit("+@all", "-@write")
    calls(breaker, 0.02, failing=1.0)
    assert health_of(breaker).condition == "refused"
    assert may_read(storage)
    fail_circuit(storage, TypeError("once more"), 0.0)
    assert health_of(breaker).condition == "refused"
    site.permit("+@all")
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again")
    shared_of(CircuitRedisStorage("closed", site.client())).retry_subscription()


def test_late_change_to_the_local_circuit_ends_at_the_next_call(site: Site):
    """A thread that notices an outage late, after the return, switches one call to the local circuit at most."""
    breaker = settled(breaker_on(site.client()))
    storage = storage_of(breaker)
    lose_server(storage)
    assert fast_path_of(storage) is local_of(storage).fast_path
    breaker.call(up)
    assert uses_shared(storage)
    assert fast_path_of(storage) is view_of(storage).fast_path


def test_connection_ends_if_sentinels_name_another_master():
    """A connection ends if the Sentinels name another master.  Silent or absent Sentinels change nothing."""
    connection = SimpleNamespace(host="10.0.0.1", port=6379)

    def endpoint(address: Any) -> Any:
        def get_master_address() -> Any:
            if address is None:
                raise redis.ConnectionError("no Sentinel answers")
            return address

        made = endpoint_of(redis.Redis())
        made.connection_arguments["connection_pool"] = SimpleNamespace(
            is_master=True, get_master_address=get_master_address
        )
        return made

    verify_master(endpoint_of(redis.Redis()), connection)
    verify_master(endpoint(("10.0.0.1", 6379)), connection)
    verify_master(endpoint(None), connection)
    with pytest.raises(ConnectionResetError, match="the master has moved"):
        verify_master(endpoint(("10.0.0.2", 6379)), connection)
    push = bare_connection(endpoint=endpoint(("10.0.0.2", 6379)), query_connection=connection, timeout=1.0)
    with pytest.raises(ConnectionResetError, match="the master has moved"):
        push.send_beat()


def test_session_without_a_pong_ends_and_a_poll_confirms_no_unknown_state():
    """A session without a PONG is over, and a poll without a known state confirms no view."""
    session = bare_session(
        is_pong_due=True,
        matched_reads=weakref.WeakKeyDictionary(),
        reads_keys_singly=False,
        changed=set(),
        maybe_changed=set(),
        touched=set(),
        armed_views=ArmedViews(),
    )
    session.has_polled = False
    # A message on an unknown channel is no sign of life.
    receive_push(session, Push([b"greeting", b"channel"]))
    with pytest.raises(TimeoutError, match="PING"):
        send_beat(session)
    view = View(1.0)
    view.mark_subscribed()
    answers = [(1, 0), [b"0"], [b"closed", None], [None] * 6]
    session.connection = SimpleNamespace(is_tracking=False, query=lambda commands: answers)
    poll_once(session, [Subscriber(view, ("s", "f", "p", "o", "c"), "channel")])
    assert not view.is_trusted
