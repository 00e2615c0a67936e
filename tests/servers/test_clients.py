"""Client kinds: every kind of client gets pushes, failover, return and bounded waits on real servers."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis
import valkey

from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests import EXTENSIONS, VARIABLE
from tests.support import servers
from tests.support.agreement import CircuitPair, log_lines_about
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.clients import KINDS, SAMPLE
from tests.support.inspect import server_of
from tests.support.outages import health_of
from tests.support.selection import but_for
from tests.support.servers import ONCE, no_server
from tests.support.tls import HOST, Secured, secured
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners")

#: Timeout of a guarded call and what a busy machine adds to the timeout, seconds.
TIMEOUT_S = 0.25
TOLERANCE_S = 2.0

#: Whether this process uses the optional extensions.
HAS_EXTENSIONS = os.environ.get(VARIABLE) == "1"

#: A user with all rights, defined at the start of the server, so that the user exists after a restart.
SHOP_USER = ("--user", "shop", "on", ">secret", "~*", "&*", "+@all")


@pytest.fixture(scope="module")
def reached() -> Iterator[PrivateServer]:
    """Yield a server with a port, a socket and a user ``shop``, which tests may kill."""
    if not servers.at_hand():
        no_server()
    with PrivateServer(servers.at_hand()[0].binary, port=free_port(), args=SHOP_USER) as server:
        yield server


def database_of(client: Any) -> int:
    """Return the database that a client uses."""
    return int(client.connection_pool.connection_kwargs.get("db") or 0)


def assert_full_service(server: PrivateServer, client: Any, namespace: str, **other_arguments: Any) -> None:
    """Run a circuit through this client and through a plain one.

    Args:
        server: Server of both clients.
        client: Client under test.
        namespace: Namespace of the circuit.
        **other_arguments: Arguments that give the plain client another user.
    """
    arguments = {"unix_socket_path": server.unix_socket, "db": database_of(client)}
    with (
        contextlib.closing(redis.Redis(**arguments, **ONCE)) as operator,
        contextlib.closing(redis.Redis(**arguments, **other_arguments)) as there,
    ):
        two = CircuitPair(client, there, namespace, operator)
        two.here.call(up)
        wait_for(lambda: health_of(two.here).push != "none", "a subscription")
        two.run_lifecycle()
        settled(two.here)
        two.there.open()
        wait_for(lambda: two.here.current_state == "open", "the push of the trip", within=TOLERANCE_S)
        two.there.close()
        wait_for(lambda: two.here.current_state == "closed", "the push of the recovery", within=TOLERANCE_S)
        settled(two.here)

        own = server_of(two.here)
        assert own.client_with_timeout(client, TIMEOUT_S) is not client, (
            "the client is used unchanged, so its waits are unbounded"
        )
        two.here.reset_timeout = 60
        server.kill()
        fails(two.here, 2)
        wait_for(lambda: health_of(two.here).condition == "unreachable", "the outage")
        began = time.monotonic()
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            two.here.call(up)
        assert time.monotonic() - began < TIMEOUT_S + TOLERANCE_S
        server.start()
        wait_for(lambda: health_of(two.here).condition == "connected", "the return")
        wait_for(lambda: operator.get(f"{namespace}:pybreaker:state") == b"open", "the report of the local trip")


#: Kinds with different connections. The other kinds differ in the names of keys, or in their waits.
CONNECTION_KINDS = [kind for kind in KINDS if kind not in ("tcp", "url", "patient", "named", "strict")]


@pytest.mark.parametrize("kind", but_for(SAMPLE, CONNECTION_KINDS))
def test_every_kind_of_client_gives_full_service(reached: PrivateServer, kind: str) -> None:
    """Trip, probe, recovery, foreign writes, push, outage and return work."""
    reached.start()
    client = KINDS[kind](reached)
    assert_full_service(reached, client, f"kind {kind}", username="shop", password="secret")
    client.close()
    client.connection_pool.disconnect()


def test_fakeredis_runs_circuits_without_push() -> None:
    """With lupa, fakeredis runs scripts, and without it transactions. Every read is exact, and there is no push."""
    fake_server = fakeredis.FakeServer()
    here, there, operator = (fakeredis.FakeStrictRedis(server=fake_server, decode_responses=flag) for flag in (0, 1, 0))
    two = CircuitPair(here, there, "fake", operator)
    two.run_lifecycle()
    health = health_of(two.here)
    assert (health.mode, health.push) == ("lua" if HAS_EXTENSIONS else "optimistic", "none")


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secured]:
    """Yield each server found behind TLS, by its own TLS or by a proxy."""
    if request.param is None:
        no_server()
    with secured(request.param.binary, tmp_path) as made:
        yield made


def arguments_for(tls: Secured, authority: Path) -> dict[str, Any]:
    """Return the arguments of a client that trusts an authority."""
    return {
        "ssl_ca_certs": str(authority),
        "ssl_cert_reqs": "required",
        "ssl_certfile": str(tls.certificates.client),
        "ssl_keyfile": str(tls.certificates.client),
    }


def by_url(tls: Secured) -> redis.Redis:
    """Return a client with all arguments in the URL."""
    arguments = arguments_for(tls, tls.certificates.authority)
    return redis.Redis.from_url(f"rediss://{HOST}:{tls.port}/0?" + "&".join(f"{k}={v}" for k, v in arguments.items()))


#: Factories of clients with TLS.
TLS_CLIENTS: dict[str, Callable[[Secured], Any]] = {
    "url": by_url,
    "arguments": lambda tls: redis.Redis(
        host=HOST, port=tls.port, ssl=True, db=1, **arguments_for(tls, tls.certificates.authority)
    ),
    "valkey": lambda tls: valkey.Valkey(
        host=HOST, port=tls.port, ssl=True, db=2, **arguments_for(tls, tls.certificates.authority)
    ),
}


@pytest.mark.parametrize("kind", but_for(("url",), TLS_CLIENTS))
@pytest.mark.parametrize("tls", servers.at_hand()[:1] or [None], ids=str, indirect=True)
def test_tls_gives_full_service(tls: Secured, kind: str) -> None:
    """Both sides have certificates, and everything works."""
    client = TLS_CLIENTS[kind](tls)
    assert_full_service(tls.server, client, f"tls {kind}")
    client.close()
    client.connection_pool.disconnect()


def test_circuit_behind_tls_of_every_server_trips_and_recovers(tls: Secured) -> None:
    """Servers built with TLS use their own."""
    with contextlib.closing(by_url(tls)) as client, contextlib.closing(tls.server.client()) as there:
        CircuitPair(client, there, "tls", there).run_lifecycle()


def test_unknown_certificate_leaves_calls_guarded_locally(tls: Secured, caplog: pytest.LogCaptureFixture) -> None:
    """A server with an unknown certificate is not used.

    One line states the cause, and the local circuit guards calls.
    """
    arguments = arguments_for(tls, tls.certificates.stranger)
    with (
        log_lines_about(caplog, f"{HOST}:{tls.port}") as lines,
        contextlib.closing(redis.Redis(host=HOST, port=tls.port, ssl=True, **arguments, **ONCE)) as client,
    ):
        breaker = breaker_on(client, fail_max=2, timeout=10)
        for _ in range(5):
            assert breaker.call(up) == "answer"
        attempts = health_of(breaker).attempts
        wait_for(lambda: health_of(breaker).attempts > attempts + 2, "further attempts")
        fails(breaker, 2)
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        assert health_of(breaker).condition == "unreachable"
    (line,) = lines
    assert "certificate verify failed" in line.lower()


@pytest.mark.parametrize("tls", servers.at_hand()[:1] or [None], ids=str, indirect=True)
def test_verifying_client_shares_no_connection_with_a_lenient_one(tls: Secured) -> None:
    """Clients of one server share connections only if their TLS arguments are equal."""
    strict = arguments_for(tls, tls.certificates.stranger)
    lenient = {**strict, "ssl_cert_reqs": "none"}
    if "ssl_check_hostname" in inspect.signature(redis.SSLConnection.__init__).parameters:
        lenient["ssl_check_hostname"] = False
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                contextlib.closing(redis.Redis(host=HOST, port=tls.port, ssl=True, **arguments, **ONCE))
            )
            for arguments in (lenient, strict, lenient)
        ]
        breakers = [breaker_on(client, timeout=10) for client in clients]
        for breaker in breakers:
            assert breaker.call(up) == "answer"
        assert [health_of(breaker).condition for breaker in breakers] == ["connected", "unreachable", "connected"]
        assert [health_of(breaker).circuits for breaker in breakers] == [2, 1, 2]


def test_tls_handshake_without_an_answer_ends_with_the_timeout(tmp_path: Path) -> None:
    """The peer accepts the connection, but has no TLS."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=silent.getsockname()[1], ssl=True, **ONCE)) as client,
    ):
        breaker = breaker_on(client)
        began = time.monotonic()
        assert breaker.call(up) == "answer"
        # The authorities of the system are read first, which takes a busy machine a while.
        assert TIMEOUT_S * 0.9 < time.monotonic() - began < TIMEOUT_S + 3
        assert health_of(breaker).condition == "unreachable"


@pytest.mark.skipif(HAS_EXTENSIONS, reason="this is the process with them")
@pytest.mark.full
def test_clients_with_extensions_give_full_service() -> None:
    """These tests run again in a process that uses hiredis, libvalkey and lupa."""
    missing = [name for name in EXTENSIONS if not _is_installed(name)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    selected = "fakeredis or resp3 or unix or decoding or tls_gives"
    # Releases 3 of redis-py import distutils to compare versions of hiredis.
    quiet = ("-W", "ignore:distutils Version:DeprecationWarning")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, __file__, "-k", selected]
    first = servers.at_hand()[0].binary
    environment = {**os.environ, VARIABLE: "1", servers.VARIABLE: first}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def _is_installed(name: str) -> bool:
    hidden = sys.modules.pop(name, None)
    try:
        return importlib.util.find_spec(name) is not None
    finally:
        sys.modules[name] = hidden  # type: ignore[assignment]


def test_extensions_are_used_only_where_intended() -> None:
    """Otherwise, both processes would test the same."""
    parser = redis.connection.DefaultParser.__name__.lower()
    assert ("hiredis" in parser) == (HAS_EXTENSIONS and _is_installed("hiredis"))
