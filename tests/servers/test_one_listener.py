"""One listener for each server, whatever timeouts and keys the circuits of a process have."""

from __future__ import annotations

from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._replica.listener import listener_for
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import breaker_on, settled, up
from tests.support.inspect import disable_resp3, listeners
from tests.support.logs import messages_of
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

#: Settings of storages that differ in all that decides about connections and commands.
STORAGES: dict[str, dict[str, Any]] = {
    "one-slot": {"timeout": 5.0, "cluster_mode": True},
    "no-timeout": {"timeout": None},
    "short-timeout": {"timeout": 5.0},
    "long-timeout": {"timeout": 10.0},
    "another-slot": {"timeout": 5.0, "cluster_mode": True},
}

#: Number of commands within which a poll must be seen.
COMMANDS_MAX = 500


@pytest.fixture
def unarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each beat read all circuits: over RESP2 the server does not report changes in order."""
    disable_resp3(monkeypatch)


@pytest.fixture
def breakers(client: redis.Redis) -> dict[str, pybreaker.CircuitBreaker]:
    """Return one breaker for each of `STORAGES`. A beat polls them every 0.25 s."""
    return {name: settled(breaker_on(client, name, max_staleness=0.5, **words)) for name, words in STORAGES.items()}


def test_storages_with_different_settings_share_one_listener(
    client: redis.Redis, breakers: dict[str, pybreaker.CircuitBreaker]
) -> None:
    """A process has one thread and one push connection for each server."""
    assert len(listeners()) == 1
    assert len(listener_for(server_for(client)).subscriber_table) == len(breakers)


@pytest.mark.parametrize("name", STORAGES)
def test_poll_finds_the_failures_of_each_circuit(
    client: redis.Redis, breakers: dict[str, pybreaker.CircuitBreaker], name: str
) -> None:
    """The answers of a batch with all kinds of circuits belong to the right ones."""
    (counter,) = client.keys(f"*{name}*fail_counter")
    # Stock counts without a publication, so only a poll can find the failure.
    client.incr(counter)

    def is_reset() -> bool:
        for breaker in breakers.values():
            breaker.call(up)
        return client.get(counter) == b"0"

    wait_for(is_reset, "a success is reported, and resets the failure")


def test_circuits_that_need_one_slot_share_no_command(
    client: redis.Redis, unarmed: None, breakers: dict[str, pybreaker.CircuitBreaker]
) -> None:
    """One command reads the counters of all other circuits."""
    seen: list[set[str]] = []
    with client.monitor() as monitor:
        while {"no-timeout", "short-timeout", "long-timeout"} not in seen or {"one-slot"} not in seen:
            for breaker in breakers.values():
                breaker.call(up)
            command = monitor.next_command()["command"]
            if command.startswith("MGET ") and "fail_counter" in command:
                seen.append({name for name in STORAGES if name in command})
            assert len(seen) < COMMANDS_MAX
    assert all(len(names) == 1 for names in seen if names & {"one-slot", "another-slot"})


def test_listener_that_cannot_connect_like_the_client_is_refused(
    server: PrivateServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an endpoint for push connections, calls read the circuit, and one line states the cost."""
    monkeypatch.setattr(Server, "push_endpoint", None)
    breaker = breaker_on(client, "without-endpoint")
    assert breaker.call(up) == "answer"
    wait_for(lambda: messages_of(caplog, server), "the refusal is logged")
    (line,) = messages_of(caplog, server)
    assert "no connection like those of the client can be made" in line
    assert breaker.call(up) == "answer"


def test_pools_of_one_server_share_credentials(client: redis.Redis) -> None:
    """A password that one circuit has taken reaches all pools and the push connection."""
    server = server_for(client)
    pools = [server.client_with_timeout(client, seconds).connection_pool for seconds in (1.0, 2.0)]
    credentials = {id(pool.connection_kwargs["credentials"]) for pool in pools}
    assert len(credentials) == 1
    endpoint = server.push_endpoint
    assert endpoint is not None
    assert {id(endpoint.connection_arguments["credentials"])} == credentials
