"""The corners of an outage: what takes a certain moment, a certain process or a certain server to happen."""

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
from pybreaker_redis._circuits.mode import Mode
from pybreaker_redis._redis.classify import ErrorKind, suppress_except
from pybreaker_redis._redis.endpoint import endpoint_of
from pybreaker_redis._replica.connection import Push, PushConnection
from pybreaker_redis._replica.session import Session
from pybreaker_redis._replica.subscribers import Subscriber
from pybreaker_redis._replica.view import View
from pybreaker_redis._runtime import threads
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.faults import Site
from tests.support.inspect import keepers
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for


def test_client_as_it_is_goes_through_an_outage(site: Site):
    """`timeout=None`: its own connections, its own waits, and all the rest."""
    client = site.client()
    breaker = settled(breaker_on(client, timeout=None))
    assert breaker._state_storage._core.shared.selector.current.engine.client is client
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


def test_callers_take_turns_where_no_thread_may_be_started(site: Site, monkeypatch, caplog):
    """As under uWSGI without --enable-threads: what was learned is brought back all the same, and said."""
    caplog.set_level("INFO", "pybreaker_redis")

    def refuse(*_: object) -> NoReturn:
        raise threads.ThreadRefusedError

    breaker = settled(breaker_on(site.client(), fail_max=2, reset_timeout=60))
    monkeypatch.setattr(threads, "start_daemon", refuse)
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    calls(breaker, 0.05, failing=1.0)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")
    assert site.administrator.get("viewed:pybreaker:state") == b"open"
    assert any("is back after" in line for line in caplog.messages)


def test_process_that_was_forked_behind_pythons_back_has_a_thread_of_its_own(site: Site):
    """The process id tells."""
    breaker = settled(breaker_on(site.client()))
    server = breaker._state_storage._core.server
    server._pid, lock = 0, server._lock
    assert server._ensure_retry_thread()
    assert server._lock is not lock


def test_two_that_bring_back_the_same_circuit_are_one_too_many(site: Site):
    """The second one goes by what it has for the moment."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._core.on_server_lost()
    with storage._core.local.recovery_turn() as is_first:
        assert is_first
        assert storage._core.bring_back() is None
        assert breaker.call(up) == "answer"
        assert storage._core.uses_local
    wait_for(lambda: is_back(breaker), "it is back")


def test_circuit_that_is_told_in_vain_goes_on_alone(site: Site, monkeypatch):
    """Not for ever: the next call tries again."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._core.on_server_lost()
    monkeypatch.setattr(storage._core.local, "must_report_again", lambda replies: True)
    assert storage._core.bring_back() == ""
    assert storage._core.mode is not Mode.SHARED
    monkeypatch.undo()
    wait_for(lambda: is_back(breaker), "it is back")


def test_circuit_that_moves_while_it_is_brought_back_is_told_again(site: Site, monkeypatch):
    """Calls go on meanwhile."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._core.on_server_lost()
    ended, end = iter([False, True]), storage._core.local.end_run
    monkeypatch.setattr(storage._core.local, "end_run", lambda generation: end(generation) and next(ended))
    assert storage._core.bring_back() == ""
    assert storage._core.mode is Mode.SHARED


def test_circuit_that_fails_after_the_return_is_left_to_its_next_caller(site: Site, monkeypatch):
    """The thread that asks again has others to bring back."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    breaker.call(up)
    outage = storage._core.server.availability.outage
    with monkeypatch.context() as patched:
        patched.setattr(bulk, "bring_back_first", lambda tenants, answer_wait_s, outcomes: None)
        patched.setattr(Failover, "bring_back", lambda self: 1 / 0)
        storage._core.server._attempt_return(outage)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


def test_trip_of_a_circuit_that_came_in_the_last_moment_is_shared(site: Site, monkeypatch):
    """It was first used when the others were just being brought back; what it has learned is not lost either."""
    breaker = settled(breaker_on(site.client(), timeout=10))
    site.proxy.refuse()
    wait_for(lambda: is_unreachable_for(breaker), "it is away")
    server = breaker._state_storage._core.server
    outage = server.availability.outage
    newcomer = breaker_on(site.client(), "newcomer", fail_max=1, timeout=10)
    fails(newcomer)
    with monkeypatch.context() as patched:
        patched.setattr(bulk, "bring_back_first", lambda tenants, answer_wait_s, outcomes: None)
        site.proxy.listen()
        server._attempt_return(outage)
    # The thread that asks again may be at it, too; then that one brings it back.
    wait_for(lambda: site.administrator.get("newcomer:pybreaker:state") == b"open", "its trip is shared")
    wait_for(lambda: not newcomer._state_storage._core.uses_local, "it goes by the shared circuit")


def test_nobody_asks_again_for_circuits_that_are_gone(site: Site, nobody_listens):
    """Neither is the last of them kept by whoever asks."""

    def lose() -> None:
        breaker = settled(breaker_on(site.client()))
        site.proxy.refuse()
        wait_for(lambda: is_unreachable_for(breaker), "it is away")
        wait_for(lambda: health_of(breaker).attempts > 3, "it is asked again")

    lose()
    wait_for(lambda: gc.collect() >= 0 and not keepers(), "nobody asks any more")


def test_trouble_of_one_circuit_keeps_no_other_away():
    """What is a circuit's own passes, what is the server's does not."""
    with suppress_except(ErrorKind.UNREACHABLE):
        raise TypeError("its own")
    with pytest.raises(redis.ConnectionError), suppress_except(ErrorKind.UNREACHABLE):
        raise redis.ConnectionError("gone")


def test_nothing_is_said_of_what_was_always_well(caplog):
    """Two first answers may come together."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_for(redis.Redis(port=1))
    server.availability.has_retry_thread = False
    server.report_answer("")
    assert caplog.messages == []


def test_circuit_that_may_only_be_read_is_followed(site: Site):
    """Rights to write withdrawn: that it can be read is found out at once; a second error changes nothing."""
    breaker = settled(breaker_on(site.client(), fail_max=1, reset_timeout=60, timeout=10))
    storage = breaker._state_storage
    site.permit("+@all", "-@write")
    calls(breaker, 0.02, failing=1.0)
    assert health_of(breaker).condition == "refused"
    assert storage._core.mode is Mode.FOLLOWING
    storage._core._note_failure(TypeError("once more"), 0.0)
    assert health_of(breaker).condition == "refused"
    site.permit("+@all")
    wait_for(lambda: is_back(breaker), "it is served again")
    CircuitRedisStorage("closed", site.client())._core.shared.retry_subscription()


def test_shortcut_that_has_had_its_day_is_left(site: Site):
    """Whoever was late to say that the process goes by its own circuit is corrected by the next look."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._core._enter(Mode.LOCAL)
    assert storage._core.fast_path is storage._core.local.fast_path
    breaker.call(up)
    assert storage._core.mode is Mode.SHARED
    assert storage._core.fast_path is storage._core._view.fast_path


def test_sentinels_that_know_another_master_end_the_line():
    """Whoever cannot be asked knows nothing else; without Sentinels there is nobody to ask."""
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

    assert not endpoint_of(redis.Redis()).verify_master(connection)
    assert not endpoint(("10.0.0.1", 6379)).verify_master(connection)
    assert not endpoint(None).verify_master(connection)
    assert endpoint(("10.0.0.2", 6379)).verify_master(connection)
    line = object.__new__(PushConnection)
    line._endpoint, line._query_connection, line._timeout = endpoint(("10.0.0.2", 6379)), connection, 1.0
    with pytest.raises(ConnectionResetError, match="the master has moved"):
        line.send_beat()


def test_session_without_a_pong_is_over_and_what_is_not_known_is_not_confirmed():
    """A connection that is only listened to tells nobody that it is dead; nor does a poll know what to compare with."""
    session = object.__new__(Session)
    session._is_pong_due, session.has_polled = True, False
    # What nobody has asked for, and nobody knows, is no sign of life either.
    session._receive(Push([b"greeting", b"channel"]))
    with pytest.raises(TimeoutError, match="PING"):
        session._beat()
    view = View(1.0)
    view.mark_subscribed()
    answers = [(1, 0), [b"0"], [b"closed", None], [None] * 6]
    session.connection = SimpleNamespace(is_tracking=False, query=lambda commands: answers)
    session._matched_reads, session._reads_counters_singly = weakref.WeakKeyDictionary(), False
    session._changed, session._maybe_changed = set(), set()
    session._poll([Subscriber(view, ("s", "f", "p", "o", "c"), "channel")])
    assert not view.is_trusted
