"""Expiry: with a TTL, unused circuits vanish from Redis, and circuits in use are not affected.

`test_differential.py` compares on all engines that all keys of a circuit expire together.
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
from tests.support.logs import messages_of
from tests.support.servers import counted
from tests.support.wait import wait_for

TTL = 60
TTL_MS = TTL * 1000

KEYS = circuit_keys(NAMESPACE, needs_one_slot=False)

MakeEngine = Callable[..., Engine]

both_engines = pytest.mark.parametrize(
    "make",
    [lambda client: LuaEngine(client, KEYS, ttl_ms=TTL_MS), lambda client: TransactionEngine(client, KEYS, TTL_MS)],
    ids=["lua", "optimistic"],
)


def remaining_ms(client: redis.Redis) -> list[int]:
    """Return the milliseconds until each existing key expires. A value of -1 stands for no expiry."""
    return [ms for ms in (client.pttl(key) for key in KEYS) if ms != -2]


def let_expire(client: redis.Redis) -> None:
    """Let all keys expire now."""
    with client.pipeline() as pipe:
        for key in KEYS:
            pipe.pexpire(key, 1)
        pipe.execute()
    wait_for(lambda: not client.exists(*KEYS), "expired keys")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings that were logged."""
    return messages_of(caplog, f"circuit {NAMESPACE!r}", level=logging.WARNING)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ttl_ms", [TTL_MS, LEASE_MAX_MS - 1, LEASE_MAX_MS, LEASE_MAX_MS + 1])
def test_circuit_that_is_not_closed_stays_for_at_least_a_day(state: str, ttl_ms: int) -> None:
    """However short the TTL, a day exceeds every probe lease and every sensible reset timeout."""
    assert lifetime_ms(state, ttl_ms) == (ttl_ms if state == CLOSED else max(ttl_ms, 24 * 3600 * 1000))


def test_lifetime_of_the_keys_follows_the_state(client: redis.Redis) -> None:
    """The TTL holds for a closed circuit. An open or half-open circuit stays for a day."""
    breaker = breaker_on(client, fail_max=2, reset_timeout=0.01, ttl=TTL, timeout=10)

    def has_lifetime(seconds: float) -> bool:
        return all(seconds * 500 < ms <= seconds * 1000 + TTL_RENEWAL_MARGIN_MS for ms in remaining_ms(client))

    fails(breaker)
    assert has_lifetime(TTL)
    fails(breaker)
    assert breaker.current_state == OPEN
    assert has_lifetime(24 * 3600)
    seen = []

    def probe() -> None:
        seen.append((client.get(KEYS[0]), has_lifetime(24 * 3600)))

    def is_closed_by_probe() -> bool:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            breaker.call(probe)
        return breaker.current_state == CLOSED

    wait_for(is_closed_by_probe, "the close by the probe")
    assert seen == [(HALF_OPEN.encode(), True)]
    assert has_lifetime(TTL)
    assert len(remaining_ms(client)) == 5


@pytest.mark.parametrize("words", [{}, {"ttl": None}])
def test_without_a_ttl_no_key_expires_and_no_ttl_is_read(client: redis.Redis, words: dict[str, Any]) -> None:
    """Without the option, a TTL that another program has given to a key stays."""
    breaker = breaker_on(client, fail_max=2, timeout=10, **words)
    with counted(client) as commands:
        fails(breaker, 2)
        breaker.close()
    assert set(remaining_ms(client)) == {-1}
    assert not {"pttl", "pexpireat", "persist"} & commands.keys()
    client.pexpire(KEYS[4], 10**7)
    breaker.open()
    assert 0 < client.pttl(KEYS[4]) <= 10**7


def test_counts_renew_the_ttl_once_a_second_only(client: redis.Redis) -> None:
    """A server notifies clients that track a key of each new TTL, so frequent failures must not renew the TTL often."""
    engine = LuaEngine(client, KEYS, ttl_ms=TTL_MS)

    def counted_within_a_second() -> bool:
        client.delete(*KEYS)
        created = engine.execute(Load(), None, CLOSED)
        with client.pipeline() as pipe:
            pipe.watch(KEYS[0])
            engine.execute(RecordFailure(0, ""), created.circuit, CLOSED)
            last = engine.execute(RecordSuccess(0, ""), created.circuit, CLOSED)
            if last.now_ms - created.now_ms >= TTL_RENEWAL_MARGIN_MS:
                return False
            pipe.multi()
            pipe.ping()
            pipe.execute()  # raises WatchError if the state's key was changed
        return True

    wait_for(counted_within_a_second, "counts within a second")
    assert all(TTL_MS / 2 < ms for ms in remaining_ms(client))


@both_engines
def test_repaired_counter_gets_the_ttl_of_the_other_keys(client: redis.Redis, make: MakeEngine) -> None:
    """Otherwise, the counter would be all that stays of the circuit."""
    engine = make(client)
    known = engine.execute(Load(), None, CLOSED).circuit
    client.delete(KEYS[1])
    assert engine.execute(Load(), known, CLOSED).repair_note == "repaired fail_counter"
    assert len(remaining_ms(client)) == 3
    assert min(remaining_ms(client)) > 0


@both_engines
def test_keys_of_stock_get_a_ttl_with_the_next_read(client: redis.Redis, make: MakeEngine) -> None:
    """Stock workers write without a TTL. After a deployment, no key of theirs stays for ever."""
    breaker = pybreaker.CircuitBreaker(
        fail_max=1, state_storage=pybreaker.CircuitRedisStorage(CLOSED, client, NAMESPACE)
    )
    assert set(remaining_ms(client)) == {-1}
    engine = make(client)
    known = engine.execute(Load(), None, CLOSED).circuit
    assert min(remaining_ms(client)) > 0
    fails(breaker)
    assert client.get(KEYS[0]) == b"open"
    assert -1 in remaining_ms(client)
    assert engine.execute(Load(), known, CLOSED).circuit.state == OPEN
    assert min(remaining_ms(client)) > TTL_MS + TTL_RENEWAL_MARGIN_MS
    assert len(remaining_ms(client)) == 5


@pytest.mark.usefixtures("no_listeners")
@pytest.mark.parametrize("closed_once", [False, True])
def test_expired_closed_circuit_is_created_again_without_a_log_line(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, protocol: int, closed_once: bool
) -> None:
    """A circuit without writes expires again and again. No loss is logged, and the fallback state does not matter."""
    breaker = breaker_on(client, fallback_circuit_state="open", ttl=TTL, timeout=10)
    if closed_once:
        breaker.open()
        breaker.close()
    settled(breaker)
    assert bool(view_of(breaker).cached.generation) is closed_once
    with counted(client) as commands:
        let_expire(client)
        wait_for(lambda: breaker.call(up) and client.exists(KEYS[0]), "a call after the expiry")
        settled(breaker)
    assert commands["pexpireat"] == 5, "the keys are created again once"
    # If the push of the new keys arrives before the reply, another success shows that there is no failure to reset. A
    # process that polls too late reads once more.
    assert commands.get("evalsha", 0) + commands.get("eval", 0) <= 3
    assert client.mget(KEYS[:3]) == [b"closed", b"0", b"0"]
    assert all(TTL_MS / 2 < ms for ms in remaining_ms(client))
    assert breaker.current_state == CLOSED
    assert warnings(caplog) == []


@both_engines
def test_expired_open_circuit_is_restored_by_a_process_that_knows_it(client: redis.Redis, make: MakeEngine) -> None:
    """A circuit that is known to be open does not admit a call because its keys expired."""
    engine = make(client)
    known = engine.execute(Trip(None, ""), None, CLOSED).circuit
    let_expire(client)
    assert engine.execute(Load(), known, CLOSED).circuit == known
    assert min(remaining_ms(client)) > TTL_MS + TTL_RENEWAL_MARGIN_MS


def test_expiry_of_an_open_circuit_is_logged(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The expiry of an open circuit is a loss, and is logged."""
    storage = CircuitRedisStorage(CLOSED, client, NAMESPACE, ttl=TTL, max_staleness=0, timeout=10)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.open()
    let_expire(client)
    assert breaker.current_state == OPEN
    assert warnings(caplog) == [f"circuit {NAMESPACE!r}: Redis has lost the circuit; restored as open"]


def test_vanished_circuit_without_a_ttl_is_logged_as_lost(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The check for silence can fail."""
    storage = CircuitRedisStorage(CLOSED, client, NAMESPACE, "open", max_staleness=0, timeout=10)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    breaker.call(up)
    let_expire(client)
    assert breaker.current_state == OPEN
    assert warnings(caplog) == [f"circuit {NAMESPACE!r}: Redis has lost the circuit; restored as open"]


def test_circuit_that_expired_during_an_outage_is_restored_without_a_log_line(
    killable_server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The lines about the return of the server contain no loss."""
    with contextlib.closing(killable_server.client()) as client:
        breaker = settled(breaker_on(client, ttl=TTL))
        killable_server.restart(keep_data=False)

        def is_back() -> bool:
            breaker.call(up)
            return bool(client.exists(KEYS[0]))

        wait_for(is_back, "the restored circuit")
        settled(breaker)
        assert all(ms > 0 for ms in remaining_ms(client))
    lines = messages_of(caplog, killable_server, f"circuit {NAMESPACE!r}")
    assert not [line for line in lines if "restored" in line or "lost" in line]


def test_ttl_holds_without_scripts() -> None:
    """Tests of applications run on fakeredis."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    breaker = breaker_on(client, fail_max=1, ttl=TTL)
    breaker.call(up)
    assert all(0 < ms <= TTL_MS + TTL_RENEWAL_MARGIN_MS for ms in remaining_ms(client))
    fails(breaker)
    assert all(ms > LEASE_MAX_MS / 2 for ms in remaining_ms(client))
    breaker.close()
    assert all(0 < ms <= TTL_MS + TTL_RENEWAL_MARGIN_MS for ms in remaining_ms(client))
    assert len(remaining_ms(client)) == 5


@pytest.mark.usefixtures("no_listeners")
def test_ttl_costs_transactions_no_further_round_trip(client: redis.Redis) -> None:
    """The TTL is read and set together with the other values."""
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
