"""The corners of an outage: what takes a certain moment, a certain process or a certain server to happen."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import redis

from pybreaker_redis import CircuitRedisStorage, _said, _server, _threads
from pybreaker_redis._client import origin_of
from pybreaker_redis._guard import Meaning
from pybreaker_redis._hearings import Hearing
from pybreaker_redis._line import Line, Push
from pybreaker_redis._server import server_of
from pybreaker_redis._session import Session
from pybreaker_redis._shortcut import Shortcut
from pybreaker_redis._tenancy import Tenancy
from pybreaker_redis._view import View
from tests.faults import Site
from tests.test_outage import calls, health_of, is_back, site
from tests.test_outage_races import is_away
from tests.viewed import breaker_on, fails, keepers, settled, up, wait_for

__all__ = ["site"]


def test_client_as_it_is_goes_through_an_outage(site: Site):
    """`timeout=None`: its own connections, its own waits, and all the rest."""
    client = site.client()
    breaker = settled(breaker_on(client, timeout=None))
    assert breaker._state_storage._tenancy.shared._carriers.now.client is client
    site.proxy.refuse()
    wait_for(lambda: is_away(breaker), "it is away")
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


def test_callers_take_turns_where_no_thread_may_be_started(site: Site, monkeypatch, caplog):
    """As under uWSGI without --enable-threads: what was learned is brought back all the same, and said."""
    caplog.set_level("INFO", "pybreaker_redis")

    def refuse(*_: object) -> NoReturn:
        raise _threads.NoThreads

    breaker = settled(breaker_on(site.client(), fail_max=2, reset_timeout=60))
    monkeypatch.setattr(_threads, "start", refuse)
    site.proxy.refuse()
    wait_for(lambda: is_away(breaker), "it is away")
    calls(breaker, 0.05, failing=1.0)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")
    assert site.administrator.get("viewed:pybreaker:state") == b"open"
    assert any("is back after" in line for line in caplog.messages)


def test_process_that_was_forked_behind_pythons_back_has_a_thread_of_its_own(site: Site):
    """The process id tells."""
    breaker = settled(breaker_on(site.client()))
    server = breaker._state_storage._tenancy.server
    server._pid, lock = 0, server._lock
    assert server._is_kept()
    assert server._lock is not lock


def test_two_that_bring_back_the_same_circuit_are_one_too_many(site: Site):
    """The second one goes by what it has for the moment."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._tenancy.lose()
    with storage._tenancy.own.returning() as is_first:
        assert is_first
        assert storage._tenancy.rejoin() is None
        assert breaker.call(up) == "answer"
        assert storage._tenancy.is_alone
    wait_for(lambda: is_back(breaker), "it is back")


def test_circuit_that_is_told_in_vain_goes_on_alone(site: Site, monkeypatch):
    """Not for ever: the next call tries again."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._tenancy.lose()
    monkeypatch.setattr(storage._tenancy.own, "is_told_in_vain", lambda replies: True)
    assert storage._tenancy.rejoin() == ""
    assert not storage._tenancy._view.may_believe
    monkeypatch.undo()
    wait_for(lambda: is_back(breaker), "it is back")


def test_circuit_that_moves_while_it_is_brought_back_is_told_again(site: Site, monkeypatch):
    """Calls go on meanwhile."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._tenancy.lose()
    ended, end = iter([False, True]), storage._tenancy.own.end
    monkeypatch.setattr(storage._tenancy.own, "end", lambda generation: end(generation) and next(ended))
    assert storage._tenancy.rejoin() == ""
    assert storage._tenancy._view.may_believe


def test_circuit_that_fails_after_the_return_is_left_to_its_next_caller(site: Site, monkeypatch):
    """The thread that asks again has others to bring back."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    site.proxy.refuse()
    wait_for(lambda: is_away(breaker), "it is away")
    breaker.call(up)
    outage = storage._tenancy.server.guard.outage
    with monkeypatch.context() as patched:
        patched.setattr(_server, "rejoin", lambda tenants, patience, outcomes: None)
        patched.setattr(Tenancy, "rejoin", lambda self: 1 / 0)
        storage._tenancy.server._try_to_return(outage)
    site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


def test_trip_of_a_circuit_that_came_in_the_last_moment_is_shared(site: Site, monkeypatch):
    """It was first used when the others were just being brought back; what it has learned is not lost either."""
    breaker = settled(breaker_on(site.client(), timeout=10))
    site.proxy.refuse()
    wait_for(lambda: is_away(breaker), "it is away")
    server = breaker._state_storage._tenancy.server
    outage = server.guard.outage
    newcomer = breaker_on(site.client(), "newcomer", fail_max=1, timeout=10)
    fails(newcomer)
    with monkeypatch.context() as patched:
        patched.setattr(_server, "rejoin", lambda tenants, patience, outcomes: None)
        site.proxy.listen()
        server._try_to_return(outage)
    # The thread that asks again may be at it, too; then that one brings it back.
    wait_for(lambda: site.administrator.get("newcomer:pybreaker:state") == b"open", "its trip is shared")
    wait_for(lambda: not newcomer._state_storage._tenancy.is_alone, "it goes by the shared circuit")


def test_nobody_asks_again_for_circuits_that_are_gone(site: Site, nobody_listens):
    """Neither is the last of them kept by whoever asks."""

    def lose() -> None:
        breaker = settled(breaker_on(site.client()))
        site.proxy.refuse()
        wait_for(lambda: is_away(breaker), "it is away")
        wait_for(lambda: health_of(breaker).attempts > 3, "it is asked again")

    lose()
    wait_for(lambda: gc.collect() >= 0 and not keepers(), "nobody asks any more")


def test_trouble_of_one_circuit_keeps_no_other_away():
    """What is a circuit's own passes, what is the server's does not."""
    with _said.unless(Meaning.AWAY):
        raise TypeError("its own")
    with pytest.raises(redis.ConnectionError), _said.unless(Meaning.AWAY):
        raise redis.ConnectionError("gone")


def test_nothing_is_said_of_what_was_always_well(caplog):
    """Two first answers may come together."""
    caplog.set_level("INFO", "pybreaker_redis")
    server = server_of(redis.Redis(port=1))
    server.guard.kept = False
    server.answered("")
    assert caplog.messages == []


def test_circuit_that_may_only_be_read_is_followed(site: Site):
    """Rights to write withdrawn: that it can be read is found out at once; a second error changes nothing."""
    breaker = settled(breaker_on(site.client(), fail_max=1, reset_timeout=60, timeout=10))
    storage = breaker._state_storage
    site.permit("+@all", "-@write")
    calls(breaker, 0.02, failing=1.0)
    assert health_of(breaker).condition == "refused"
    assert storage._tenancy._may_read
    storage._tenancy._failed(TypeError("once more"), 0.0)
    assert health_of(breaker).condition == "refused"
    site.permit("+@all")
    wait_for(lambda: is_back(breaker), "it is served again")
    CircuitRedisStorage("closed", site.client())._tenancy.shared.is_permitted()


def test_shortcut_that_has_had_its_day_is_left(site: Site):
    """Whoever was late to say that the process goes by its own circuit is corrected by the next look."""
    breaker = settled(breaker_on(site.client()))
    storage = breaker._state_storage
    storage._shortcut = Shortcut(0)
    breaker.call(up)
    assert storage._shortcut is storage._tenancy._view.shortcut


def test_sentinels_that_know_another_master_end_the_line():
    """Whoever cannot be asked knows nothing else; without Sentinels there is nobody to ask."""
    connection = SimpleNamespace(host="10.0.0.1", port=6379)

    def origin(address: Any) -> Any:
        def get_master_address() -> Any:
            if address is None:
                raise redis.ConnectionError("no Sentinel answers")
            return address

        made = origin_of(redis.Redis())
        made.words["connection_pool"] = SimpleNamespace(is_master=True, get_master_address=get_master_address)
        return made

    assert not origin_of(redis.Redis()).has_moved(connection)
    assert not origin(("10.0.0.1", 6379)).has_moved(connection)
    assert not origin(None).has_moved(connection)
    assert origin(("10.0.0.2", 6379)).has_moved(connection)
    line = object.__new__(Line)
    line._origin, line._asking, line._timeout = origin(("10.0.0.2", 6379)), connection, 1.0
    with pytest.raises(ConnectionResetError, match="the master has moved"):
        line.beat()


def test_session_without_a_pong_is_over_and_what_is_not_known_is_not_confirmed():
    """A connection that is only listened to tells nobody that it is dead; nor does a poll know what to compare with."""
    session = object.__new__(Session)
    session._awaits_pong, session.polled = True, False
    # What nobody has asked for, and nobody knows, is no sign of life either.
    session._take(Push([b"greeting", b"channel"]))
    with pytest.raises(TimeoutError, match="PING"):
        session._beat()
    view = View(1.0)
    view.is_heard(True)
    answers = [(1, 0), [b"0"], [b"closed", None], [None] * 6]
    session.line = SimpleNamespace(tracks=False, one_by_one=False, ask=lambda commands: answers)
    session._agreed = weakref.WeakKeyDictionary()
    session._changed, session._touched = set(), set()
    session._poll([Hearing(view, ("s", "f", "p", "o", "c"), "channel")])
    assert not view.is_believed
