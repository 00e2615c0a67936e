"""A TTL: circuits that nobody uses any more vanish from Redis, and nobody who uses one notices.

That all keys of a circuit end together, whatever is done to it, is compared on all carriers in `test_differential.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines.base import Engine
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, LEASE_MAX_MS, OPEN, STATES
from pybreaker_redis._model.codec import TTL_RENEWAL_MARGIN_MS, lifetime_ms
from pybreaker_redis._model.intents import Close, Load, RecordFailure, RecordSuccess, Trip
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import NAMESPACE, breaker_on, fails, settled, up
from tests.support.inspect import view_of
from tests.support.servers import counted
from tests.support.wait import wait_for

TTL = 60
TTL_MS = TTL * 1000

KEYS = circuit_keys(NAMESPACE, needs_one_slot=False)

MakeCarrier = Callable[..., Engine]

both_carriers = pytest.mark.parametrize(
    "make",
    [lambda client: LuaEngine(client, KEYS, ttl_ms=TTL_MS), lambda client: TransactionEngine(client, KEYS, TTL_MS)],
    ids=["lua", "optimistic"],
)


def left(client: redis.Redis) -> list[int]:
    """Milliseconds until each of the keys expires that are there; -1: never."""
    return [ms for ms in (client.pttl(key) for key in KEYS) if ms != -2]


def let_expire(client: redis.Redis) -> None:
    """As if the time were over."""
    with client.pipeline() as pipe:
        for key in KEYS:
            pipe.pexpire(key, 1)
        pipe.execute()
    wait_for(lambda: not client.exists(*KEYS), "the keys expire")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said that people are to look at."""
    said = [record for record in caplog.records if record.name == "pybreaker_redis"]
    return [record.getMessage() for record in said if record.levelno >= logging.WARNING]


# -- how long ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ttl_ms", [TTL_MS, LEASE_MAX_MS - 1, LEASE_MAX_MS, LEASE_MAX_MS + 1])
def test_circuit_that_is_not_closed_lives_for_a_day_at_least(state: str, ttl_ms: int) -> None:
    """However short the TTL: no probe's lease is longer, and no reset timeout that makes sense."""
    assert lifetime_ms(state, ttl_ms) == (ttl_ms if state == CLOSED else max(ttl_ms, 24 * 3600 * 1000))


def test_breaker_with_a_ttl_keeps_its_circuit_as_long_as_that_needs(client: redis.Redis) -> None:
    """Closed: for the TTL.  Open and half-open: for a day.  Closed again: for the TTL."""
    breaker = breaker_on(client, fail_max=2, reset_timeout=0.01, ttl=TTL, timeout=10)

    def lives(seconds: float) -> bool:
        return all(seconds * 500 < ms <= seconds * 1000 + TTL_RENEWAL_MARGIN_MS for ms in left(client))

    fails(breaker)
    assert lives(TTL)
    fails(breaker)
    assert breaker.current_state == OPEN
    assert lives(24 * 3600)
    seen = []

    def probe() -> None:
        seen.append((client.get(KEYS[0]), lives(24 * 3600)))

    def closes() -> bool:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(probe)
        return breaker.current_state == CLOSED

    wait_for(closes, "the probe closes it")
    assert seen == [(HALF_OPEN.encode(), True)]
    assert lives(TTL)
    assert len(left(client)) == 5


@pytest.mark.parametrize("words", [{}, {"ttl": None}])
def test_without_a_ttl_no_key_expires_and_none_is_asked_when(client: redis.Redis, words: dict[str, Any]) -> None:
    """As ever: a TTL that somebody else has given to a key is left alone, too."""
    breaker = breaker_on(client, fail_max=2, timeout=10, **words)
    with counted(client) as asked:
        fails(breaker, 2)
        breaker.close()
    assert set(left(client)) == {-1}
    assert not {"pttl", "pexpireat", "persist"} & asked.keys()
    client.pexpire(KEYS[4], 10**7)
    breaker.open()
    assert 0 < client.pttl(KEYS[4]) <= 10**7


def test_counts_renew_the_ttl_once_a_second_only(client: redis.Redis) -> None:
    """A server tells of a new TTL whoever tracks the key: however fast calls fail, that is not often."""
    engine = LuaEngine(client, KEYS, ttl_ms=TTL_MS)

    def counted_within_a_second() -> bool:
        client.delete(*KEYS)
        created = engine.execute(Load(), None, CLOSED)
        with client.pipeline() as watching:
            watching.watch(KEYS[0])
            engine.execute(RecordFailure(0, ""), created.circuit, CLOSED)
            last = engine.execute(RecordSuccess(0, ""), created.circuit, CLOSED)
            if last.now_ms - created.now_ms >= TTL_RENEWAL_MARGIN_MS:
                return False
            watching.multi()
            watching.ping()
            watching.execute()  # raises WatchError if anything was done to the state
        return True

    wait_for(counted_within_a_second, "the machine has a second for us")
    assert all(TTL_MS / 2 < ms for ms in left(client))


@both_carriers
def test_counter_that_was_lost_gets_the_ttl_of_the_others(client: redis.Redis, make: MakeCarrier) -> None:
    """It would be all that is left of the circuit."""
    engine = make(client)
    known = engine.execute(Load(), None, CLOSED).circuit
    client.delete(KEYS[1])
    assert engine.execute(Load(), known, CLOSED).repair_note == "repaired fail_counter"
    assert len(left(client)) == 3
    assert min(left(client)) > 0


@both_carriers
def test_keys_that_others_wrote_without_a_ttl_get_one_at_the_next_look(client: redis.Redis, make: MakeCarrier) -> None:
    """Workers with pybreaker's own storage write without: a deployment leaves nothing behind that lives for ever."""
    breaker = pybreaker.CircuitBreaker(
        fail_max=1, state_storage=pybreaker.CircuitRedisStorage(CLOSED, client, NAMESPACE)
    )
    assert set(left(client)) == {-1}
    engine = make(client)
    known = engine.execute(Load(), None, CLOSED).circuit
    assert min(left(client)) > 0
    fails(breaker)
    assert client.get(KEYS[0]) == b"open"
    assert -1 in left(client)
    assert engine.execute(Load(), known, CLOSED).circuit.state == OPEN
    assert min(left(client)) > TTL_MS + TTL_RENEWAL_MARGIN_MS
    assert len(left(client)) == 5


# -- when the time is over ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nobody_listens")
@pytest.mark.parametrize("closed_once", [False, True])
def test_healthy_circuit_that_expires_is_made_anew_once_and_in_silence(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, protocol: int, closed_once: bool
) -> None:
    """Nobody writes to it, so it expires again and again; that is no loss, and never the fallback's business."""
    breaker = breaker_on(client, fallback_circuit_state="open", ttl=TTL, timeout=10)
    if closed_once:
        breaker.open()
        breaker.close()
    settled(breaker)
    assert bool(view_of(breaker).cached.generation) is closed_once
    with counted(client) as asked:
        let_expire(client)
        wait_for(lambda: breaker.call(up) and client.exists(KEYS[0]), "somebody looks")
        settled(breaker)
    assert asked["pexpireat"] == 5, "it is made anew once"
    # Where the news of that are heard before the answer comes, it is another success that tells that nothing is to be
    # forgotten; and who was too slow to poll looks once more.
    assert asked.get("evalsha", 0) + asked.get("eval", 0) <= 3
    assert client.mget(KEYS[:3]) == [b"closed", b"0", b"0"]
    assert all(TTL_MS / 2 < ms for ms in left(client))
    assert breaker.current_state == CLOSED
    assert warnings(caplog) == []


@both_carriers
def test_circuit_that_expires_while_open_is_still_open_to_those_who_knew_it(
    client: redis.Redis, make: MakeCarrier
) -> None:
    """As after any loss: the gate of a circuit that is known to be open does not open by itself."""
    engine = make(client)
    known = engine.execute(Trip(None, ""), None, CLOSED).circuit
    let_expire(client)
    assert engine.execute(Load(), known, CLOSED).circuit == known
    assert min(left(client)) > TTL_MS + TTL_RENEWAL_MARGIN_MS


def test_circuit_that_expires_while_open_is_told_of(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """That is a loss."""
    storage = CircuitRedisStorage(CLOSED, client, NAMESPACE, ttl=TTL, max_staleness=0, timeout=10)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.open()
    let_expire(client)
    assert breaker.current_state == OPEN
    assert warnings(caplog) == [f"circuit {NAMESPACE!r}: Redis has lost the circuit; restored as open"]


def test_without_a_ttl_a_circuit_that_vanishes_was_lost(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The check above can fail."""
    storage = CircuitRedisStorage(CLOSED, client, NAMESPACE, "open", max_staleness=0, timeout=10)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.call(up)
    let_expire(client)
    assert breaker.current_state == OPEN
    assert warnings(caplog) == [f"circuit {NAMESPACE!r}: Redis has lost the circuit; restored as open"]


def test_circuit_that_expired_during_an_outage_comes_back_in_silence(
    killable_server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What is said of the return is nothing of a loss."""
    with contextlib.closing(killable_server.client()) as client:
        breaker = settled(breaker_on(client, ttl=TTL))
        killable_server.restart(keep_data=False)

        def is_back() -> bool:
            breaker.call(up)
            return bool(client.exists(KEYS[0]))

        wait_for(is_back, "the circuit is there again")
        settled(breaker)
        assert all(ms > 0 for ms in left(client))
    assert not [message for message in caplog.messages if "restored" in message or "lost" in message]


# -- without scripts ---------------------------------------------------------------------------------------------------


def test_ttl_holds_where_no_scripts_run() -> None:
    """On fakeredis, as users' own tests have it."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    breaker = breaker_on(client, fail_max=1, ttl=TTL)
    breaker.call(up)
    assert all(0 < ms <= TTL_MS + TTL_RENEWAL_MARGIN_MS for ms in left(client))
    fails(breaker)
    assert all(ms > LEASE_MAX_MS / 2 for ms in left(client))
    breaker.close()
    assert all(0 < ms <= TTL_MS + TTL_RENEWAL_MARGIN_MS for ms in left(client))
    assert len(left(client)) == 5


@pytest.mark.usefixtures("nobody_listens")
def test_ttl_costs_transactions_no_round_trip_more(client: redis.Redis) -> None:
    """It is read with the rest, and set with the rest."""
    trips = []
    for ttl_ms in (0, TTL_MS):
        client.delete(*KEYS)
        engine = TransactionEngine(client, KEYS, ttl_ms)
        known = engine.execute(Load(), None, CLOSED).circuit
        before = client.info("stats")["total_reads_processed"]
        for intent in (Load(), RecordFailure(0, ""), Trip(0, ""), Close(None, ""), Load()):
            known = engine.execute(intent, known, CLOSED).circuit
        trips.append(client.info("stats")["total_reads_processed"] - before)
    assert trips[0] == trips[1]
