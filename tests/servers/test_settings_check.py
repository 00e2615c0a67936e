"""Two storages of one process that are the same circuit: it is said, once, if nobody can have meant that."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._servers import settings_check
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import up
from tests.support.inspect import reset_in_child

SETTINGS = {
    "state": ("closed", "open"),
    "fallback_circuit_state": ("closed", "last"),
    "probe_lease": (30.0, 5),
    "max_staleness": (1.0, 0),
    "timeout": (0.25, None),
    "ttl": (None, 60),
}


def used(client: Any, namespace: str | None = "shop", **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that has made a call, if it was let."""
    storage = CircuitRedisStorage(words.pop("state", "closed"), client, namespace, **words)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    return breaker


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What there was to say."""
    records = [record for record in caplog.records if record.name == "pybreaker_redis"]
    # A busy machine may seem to be an outage.
    told = [record for record in records if getattr(record, "pybreaker_redis", {}).get("event") != "away"]
    return [record.getMessage() for record in told if record.levelno >= logging.WARNING]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_two_storages_that_differ_are_told_of_with_both_values_and_the_remedy(
    server: PrivateServer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """By whatever clients of one server they came: calls through one go by other rules than through the other."""
    one, other = SETTINGS[name]
    with contextlib.closing(server.client()) as client, contextlib.closing(server.client()) as another:
        breakers = [used(client, **{name: one})]
        assert said(caplog) == []
        breakers.append(used(another, **{name: other}))
        expected = (
            f"circuit 'shop': two storages of this process have different settings ({name}={one!r} and "
            f"{name}={other!r}); give both the same, or share one storage"
        )
        assert said(caplog) == [expected]
        for breaker in breakers * 3:
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                breaker.call(up)
        breakers.append(used(another, **{name: other}))
        assert said(caplog) == [expected], "once"


def test_all_differences_are_one_line(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """And what comes later is said when it comes."""
    breakers = [used(client), used(client, ttl=60, probe_lease=5)]
    assert [line.partition("); ")[0].partition("settings (")[2] for line in said(caplog)] == [
        "probe_lease=30.0 and probe_lease=5, ttl=None and ttl=60"
    ]
    breakers.append(used(client, ttl=70, max_staleness=2))
    assert len(said(caplog)) == 2
    assert "(max_staleness=1.0 and max_staleness=2);" in said(caplog)[1]
    assert len(breakers) == 3


def test_nothing_is_said_of_storages_that_agree_or_are_other_circuits(
    server: PrivateServer, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """One for each module or thread is legitimate; so is any setting for another circuit, database or server."""
    breakers = [used(client), used(client), used(client, probe_lease=30, timeout=0.25)]
    breakers.append(used(client, "other", probe_lease=5))
    with contextlib.closing(server.client(db=1)) as elsewhere:
        breakers.append(used(elsewhere, probe_lease=5))
        breakers.append(used(fakeredis.FakeRedis(server=fakeredis.FakeServer()), probe_lease=5))
    assert [line for line in said(caplog) if "differ" in line or "namespace" in line] == []
    assert len(breakers) == 6


def test_storage_that_has_gone_does_not_count(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A process that makes a storage anew, with another setting, has one."""
    breaker = used(client)
    del breaker
    gc.collect()
    kept = used(client, probe_lease=5)
    assert said(caplog) == []
    assert kept.current_state == "closed"
    del kept
    gc.collect()
    assert not settings_check._table._users_by_place


def test_storages_are_told_apart_when_they_are_used(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The constructor asks nobody, and calls nothing that was given."""
    storages = [CircuitRedisStorage("closed", lambda: client, "shop", probe_lease=lease) for lease in (5, 6)]
    breakers = [pybreaker.CircuitBreaker(state_storage=storage) for storage in storages]
    assert said(caplog) == []
    for breaker in breakers:
        breaker.call(up)
    assert len(said(caplog)) == 1


def test_circuit_on_fakeredis_is_told_apart_by_its_connections(caplog: pytest.LogCaptureFixture) -> None:
    """There is no place to know it by."""
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    breakers = [used(client, probe_lease=lease) for lease in (5, 6)]
    assert [line for line in said(caplog) if "probe_lease=5 and probe_lease=6" in line]
    assert len(breakers) == 2


# -- no namespace ------------------------------------------------------------------------------------------------------


NAMELESS = (
    "circuit 'pybreaker': several breakers of this process share the circuit, because their storages have no "
    "namespace; a trip opens all of them, so pass a namespace, as in CircuitRedisStorage(..., namespace='payments')"
)


def test_two_storages_without_a_namespace_are_told_of_with_the_remedy(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """They are one circuit, which nobody expects of two breakers; settings do not matter then."""
    breakers = [used(client, None)]
    assert said(caplog) == []
    breakers.append(used(client, None, probe_lease=5))
    assert said(caplog) == [NAMELESS]
    breakers.append(used(client, None, ttl=60))
    assert said(caplog) == [NAMELESS]
    assert len(breakers) == 3


def test_two_breakers_on_one_storage_without_a_namespace_are_told_of(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the same mistake: one storage was made for all breakers."""
    storage = CircuitRedisStorage("closed", client)
    breakers = [pybreaker.CircuitBreaker(state_storage=storage)]
    breakers[0].call(up)
    assert said(caplog) == []
    breakers.append(pybreaker.CircuitBreaker(state_storage=storage))
    for breaker in breakers * 3:
        breaker.call(up)
    assert said(caplog) == [NAMELESS]


def test_two_breakers_on_one_storage_with_a_namespace_are_meant(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has said that they are one circuit."""
    storage = CircuitRedisStorage("closed", client, "shop")
    breakers = [pybreaker.CircuitBreaker(state_storage=storage) for _ in range(2)]
    for breaker in breakers * 3:
        breaker.call(up)
    assert said(caplog) == []


# -- processes ---------------------------------------------------------------------------------------------------------


def test_child_that_was_forked_while_somebody_met_waits_for_nobody(client: redis.Redis) -> None:
    """The lock of the parent is held for ever there."""
    with settings_check._table._lock:
        pid = os.fork()
        if not pid:
            os._exit(not settings_check._table._lock.acquire(timeout=5))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # What the child did, where it can be seen.
    lock = settings_check._table._lock
    reset_in_child(settings_check._table)
    assert settings_check._table._lock is not lock
