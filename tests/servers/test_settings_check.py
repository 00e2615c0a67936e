"""The settings check: two storages of one circuit in a process are logged once, if their settings differ."""

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
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import up
from tests.support.inspect import compared_circuits, lock_of, reset_in_child, settings_table
from tests.support.logs import records_of

SETTINGS = {
    "state": ("closed", "open"),
    "fallback_circuit_state": ("closed", "last"),
    "probe_lease": (30.0, 5),
    "max_staleness": (1.0, 0),
    "timeout": (0.25, None),
    "ttl": (None, 60),
}


def used_breaker(client: Any, namespace: str | None = "shop", **options: Any) -> pybreaker.CircuitBreaker:
    """Return a breaker that has made a call, if the circuit admitted the call."""
    storage = CircuitRedisStorage(options.pop("state", "closed"), client, namespace, **options)
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    with contextlib.suppress(pybreaker.CircuitBreakerError):
        breaker.call(up)
    return breaker


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about circuits, but for outages, which a busy machine may cause."""
    records = records_of(caplog, "circuit ", level=logging.WARNING)
    return [record.getMessage() for record in records if not hasattr(record, "pybreaker_redis")]


@pytest.mark.parametrize("name", SETTINGS)
def test_different_settings_are_logged_with_both_values_and_the_remedy(
    server: PrivateServer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The clients of one server make no difference.

    Calls through one storage follow other rules than through the other.
    """
    one, other = SETTINGS[name]
    with contextlib.closing(server.client()) as client, contextlib.closing(server.client()) as another:
        breakers = [used_breaker(client, **{name: one})]
        assert warnings(caplog) == []
        breakers.append(used_breaker(another, **{name: other}))
        expected = (
            f"circuit 'shop': two storages of this process have different settings ({name}={one!r} and "
            f"{name}={other!r}); give both the same, or share one storage"
        )
        assert warnings(caplog) == [expected]
        for breaker in breakers * 3:
            with contextlib.suppress(pybreaker.CircuitBreakerError):
                breaker.call(up)
        breakers.append(used_breaker(another, **{name: other}))
        assert warnings(caplog) == [expected], "a difference is logged once"


def test_all_differences_are_in_one_line(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A later difference is logged when it appears."""
    breakers = [used_breaker(client), used_breaker(client, ttl=60, probe_lease=5)]
    assert [line.partition("); ")[0].partition("settings (")[2] for line in warnings(caplog)] == [
        "probe_lease=30.0 and probe_lease=5, ttl=None and ttl=60"
    ]
    breakers.append(used_breaker(client, ttl=70, max_staleness=2))
    assert len(warnings(caplog)) == 2
    assert "(max_staleness=1.0 and max_staleness=2);" in warnings(caplog)[1]
    assert len(breakers) == 3


def test_equal_settings_and_other_circuits_are_not_logged(
    server: PrivateServer, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A storage for each module or thread is valid. Other circuits, databases and servers may have other settings."""
    breakers = [used_breaker(client), used_breaker(client), used_breaker(client, probe_lease=30, timeout=0.25)]
    breakers.append(used_breaker(client, "other", probe_lease=5))
    with contextlib.closing(server.client(db=1)) as elsewhere:
        breakers.append(used_breaker(elsewhere, probe_lease=5))
        breakers.append(used_breaker(fakeredis.FakeRedis(server=fakeredis.FakeServer()), probe_lease=5))
    assert [line for line in warnings(caplog) if "differ" in line or "namespace" in line] == []
    assert len(breakers) == 6


def test_dropped_storage_is_not_compared(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A process that replaces a storage by one with other settings has one storage."""
    breaker = used_breaker(client)
    del breaker
    gc.collect()
    breaker = used_breaker(client, probe_lease=5)
    assert warnings(caplog) == []
    assert breaker.current_state == "closed"
    del breaker
    gc.collect()
    assert not compared_circuits()


def test_settings_are_compared_at_the_first_use(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The constructor sends nothing and does not call the client factory."""
    storages = [CircuitRedisStorage("closed", lambda: client, "shop", probe_lease=lease) for lease in (5, 6)]
    breakers = [pybreaker.CircuitBreaker(state_storage=storage) for storage in storages]
    assert warnings(caplog) == []
    for breaker in breakers:
        breaker.call(up)
    assert len(warnings(caplog)) == 1


def test_circuit_on_fakeredis_is_identified_by_its_connections(caplog: pytest.LogCaptureFixture) -> None:
    """A circuit on fakeredis has no endpoint."""
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    breakers = [used_breaker(client, probe_lease=lease) for lease in (5, 6)]
    assert [line for line in warnings(caplog) if "probe_lease=5 and probe_lease=6" in line]
    assert len(breakers) == 2


WITHOUT_NAMESPACE = (
    "circuit 'pybreaker': several breakers of this process share the circuit, because their storages have no "
    "namespace; a trip opens all of them, so pass a namespace, as in CircuitRedisStorage(..., namespace='payments')"
)


def test_two_storages_without_a_namespace_are_logged_with_the_remedy(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Both storages are one circuit, which two breakers do not expect. Their settings do not matter then."""
    breakers = [used_breaker(client, None)]
    assert warnings(caplog) == []
    breakers.append(used_breaker(client, None, probe_lease=5))
    assert warnings(caplog) == [WITHOUT_NAMESPACE]
    breakers.append(used_breaker(client, None, ttl=60))
    assert warnings(caplog) == [WITHOUT_NAMESPACE]
    assert len(breakers) == 3


def test_two_breakers_on_one_storage_without_a_namespace_are_logged(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """One storage for all breakers is the same mistake."""
    storage = CircuitRedisStorage("closed", client)
    breakers = [pybreaker.CircuitBreaker(state_storage=storage)]
    breakers[0].call(up)
    assert warnings(caplog) == []
    breakers.append(pybreaker.CircuitBreaker(state_storage=storage))
    for breaker in breakers * 3:
        breaker.call(up)
    assert warnings(caplog) == [WITHOUT_NAMESPACE]


def test_two_breakers_on_one_storage_with_a_namespace_are_not_logged(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The namespace states that both breakers share one circuit."""
    storage = CircuitRedisStorage("closed", client, "shop")
    breakers = [pybreaker.CircuitBreaker(state_storage=storage) for _ in range(2)]
    for breaker in breakers * 3:
        breaker.call(up)
    assert warnings(caplog) == []


def test_child_of_a_fork_does_not_wait_for_the_lock_of_its_parent(client: redis.Redis) -> None:
    """The lock of the parent is never released in the child."""
    with lock_of(settings_table()):
        pid = os.fork()
        if not pid:
            os._exit(not lock_of(settings_table()).acquire(timeout=5))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # The reset of the child, made visible in this process.
    lock = lock_of(settings_table())
    reset_in_child(settings_table())
    assert lock_of(settings_table()) is not lock
