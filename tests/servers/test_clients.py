"""Every kind of client gives full service, on real servers: push, outage and return, waits that are bounded."""

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
from tests.support.agreement import Two, health_of, said_of
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.clients import KINDS
from tests.support.servers import ONCE, no_server
from tests.support.tls import HOST, Secured, secured
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens")

#: Seconds that a guarded call may wait for Redis, and what a loaded machine adds to that.
TIMEOUT = 0.25
SLACK = 2.0

#: Whether this process has the optional parts.
EXTENDED = os.environ.get(VARIABLE) == "1"

#: A user with all rights, as the server is told when it starts: so that it knows him again.
SHOP = ("--user", "shop", "on", ">secret", "~*", "&*", "+@all")


@pytest.fixture(scope="module")
def reached() -> Iterator[PrivateServer]:
    """A server with a port, a socket, and a user ``shop``, which may be killed."""
    if not servers.at_hand():
        no_server()
    with PrivateServer(servers.at_hand()[0].binary, port=free_port(), args=SHOP) as server:
        yield server


def database_of(client: Any) -> int:
    """The database that a client uses."""
    return int(client.connection_pool.connection_kwargs.get("db") or 0)


def full_service(server: PrivateServer, client: Any, namespace: str, **another_way: Any) -> None:
    """A circuit by way of this client, and of another one that is known to work.

    Args:
        server: Behind both.
        client: That is tested.
        namespace: Of the circuit.
        another_way: Words that make the other client one of another user, or of none.
    """
    words = {"unix_socket_path": server.unix_socket, "db": database_of(client)}
    with (
        contextlib.closing(redis.Redis(**words, **ONCE)) as operator,
        contextlib.closing(redis.Redis(**words, **another_way)) as there,
    ):
        two = Two(client, there, namespace, operator)
        two.here.call(up)
        wait_for(lambda: health_of(two.here).push != "none", "changes are heard")
        two.live()
        settled(two.here)
        two.there.open()
        wait_for(lambda: two.here.current_state == "open", "it hears", within=SLACK)
        two.there.close()
        wait_for(lambda: two.here.current_state == "closed", "it hears", within=SLACK)
        settled(two.here)

        own = two.here._state_storage._core.server
        assert own.client_with_timeout(client, TIMEOUT) is not client, "waits are bounded by this package's connections"
        two.here.reset_timeout = 60
        server.kill()
        fails(two.here, 2)
        wait_for(lambda: health_of(two.here).condition == "unreachable", "the outage is noticed")
        began = time.monotonic()
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            two.here.call(up)
        assert time.monotonic() - began < TIMEOUT + SLACK
        server.start()
        wait_for(lambda: health_of(two.here).condition == "connected", "the return is noticed")
        wait_for(lambda: operator.get(f"{namespace}:pybreaker:state") == b"open", "what was learned alone is shared")


#: Kinds that differ in what they do with connections; the others differ in what they are called, or how they wait.
DIFFERENT = [kind for kind in KINDS if kind not in ("tcp", "url", "patient", "named", "strict")]


@pytest.mark.parametrize("kind", DIFFERENT)
def test_every_kind_of_client_gives_full_service(reached: PrivateServer, kind: str) -> None:
    """Trip, probe, recovery, foreign writers, push, outage and return."""
    reached.start()
    client = KINDS[kind](reached)
    full_service(reached, client, f"kind {kind}", username="shop", password="secret")
    client.close()
    client.connection_pool.disconnect()


def test_fakeredis_gives_what_it_can() -> None:
    """With lupa it runs scripts, without it transactions; every look is exact, and nothing is heard."""
    home = fakeredis.FakeServer()
    here, there, operator = (fakeredis.FakeStrictRedis(server=home, decode_responses=flag) for flag in (0, 1, 0))
    two = Two(here, there, "fake", operator)
    two.live()
    health = health_of(two.here)
    assert (health.mode, health.push) == ("lua" if EXTENDED else "optimistic", "none")


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secured]:
    """Each server at hand in turn, behind TLS: its own, or that of something in front of it."""
    if request.param is None:
        no_server()
    with secured(request.param.binary, tmp_path) as made:
        yield made


def words_for(tls: Secured, authority: Path) -> dict[str, Any]:
    """For a client that trusts an authority."""
    return {
        "ssl_ca_certs": str(authority),
        "ssl_cert_reqs": "required",
        "ssl_certfile": str(tls.certificates.client),
        "ssl_keyfile": str(tls.certificates.client),
    }


def by_url(tls: Secured) -> redis.Redis:
    """Everything in the URL."""
    words = words_for(tls, tls.certificates.authority)
    return redis.Redis.from_url(f"rediss://{HOST}:{tls.port}/0?" + "&".join(f"{k}={v}" for k, v in words.items()))


#: Clients that speak TLS.
SECURE: dict[str, Callable[[Secured], Any]] = {
    "url": by_url,
    "words": lambda tls: redis.Redis(
        host=HOST, port=tls.port, ssl=True, db=1, **words_for(tls, tls.certificates.authority)
    ),
    "valkey": lambda tls: valkey.Valkey(
        host=HOST, port=tls.port, ssl=True, db=2, **words_for(tls, tls.certificates.authority)
    ),
}


@pytest.mark.parametrize("kind", SECURE)
@pytest.mark.parametrize("tls", servers.at_hand()[:1] or [None], ids=str, indirect=True)
def test_tls_gives_full_service(tls: Secured, kind: str) -> None:
    """Certificates of both sides, and all the rest."""
    client = SECURE[kind](tls)
    full_service(tls.server, client, f"tls {kind}")
    client.close()
    client.connection_pool.disconnect()


def test_tls_of_every_server_trips_and_recovers(tls: Secured) -> None:
    """Its own, where it was built with it."""
    with contextlib.closing(by_url(tls)) as client, contextlib.closing(tls.server.client()) as there:
        Two(client, there, "tls", there).live()


def test_certificate_of_a_stranger_leaves_calls_guarded(tls: Secured, caplog: pytest.LogCaptureFixture) -> None:
    """Whom nobody vouches for is not asked: one line says why, and the process goes on by itself."""
    words = words_for(tls, tls.certificates.stranger)
    with (
        said_of(caplog, f"{HOST}:{tls.port}") as said,
        contextlib.closing(redis.Redis(host=HOST, port=tls.port, ssl=True, **words, **ONCE)) as client,
    ):
        breaker = breaker_on(client, fail_max=2, timeout=10)
        for _ in range(5):
            assert breaker.call(up) == "answer"
        attempts = health_of(breaker).attempts
        wait_for(lambda: health_of(breaker).attempts > attempts + 2, "it is asked again and again")
        fails(breaker, 2)
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        assert health_of(breaker).condition == "unreachable"
    (line,) = said
    assert "certificate verify failed" in line.lower()


@pytest.mark.parametrize("tls", servers.at_hand()[:1] or [None], ids=str, indirect=True)
def test_client_that_verifies_trusts_no_stranger_because_another_client_does(tls: Secured) -> None:
    """Clients to one server share connections only if these are made alike."""
    strict = words_for(tls, tls.certificates.stranger)
    lax = {**strict, "ssl_cert_reqs": "none"}
    if "ssl_check_hostname" in inspect.signature(redis.SSLConnection.__init__).parameters:
        lax["ssl_check_hostname"] = False
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(redis.Redis(host=HOST, port=tls.port, ssl=True, **words, **ONCE)))
            for words in (lax, strict, lax)
        ]
        breakers = [breaker_on(client, timeout=10) for client in clients]
        for breaker in breakers:
            assert breaker.call(up) == "answer"
        assert [health_of(breaker).condition for breaker in breakers] == ["connected", "unreachable", "connected"]
        assert [health_of(breaker).circuits for breaker in breakers] == [2, 1, 2]


def test_handshake_that_nobody_answers_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    """Something listens there, and does not speak TLS."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=silent.getsockname()[1], ssl=True, **ONCE)) as client,
    ):
        breaker = breaker_on(client)
        began = time.monotonic()
        assert breaker.call(up) == "answer"
        # Besides, the system's authorities are read first, which takes a busy machine a while.
        assert TIMEOUT * 0.9 < time.monotonic() - began < TIMEOUT + 3
        assert health_of(breaker).condition == "unreachable"


# -- with what makes libraries faster ----------------------------------------------------------------------------------


@pytest.mark.skipif(EXTENDED, reason="this is the process with them")
def test_clients_with_their_optional_parts_give_full_service() -> None:
    """The same tests in a process that sees hiredis, libvalkey and lupa."""
    missing = [name for name in EXTENSIONS if not _is_installed(name)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    chosen = "fakeredis or resp3 or unix or decoding or tls_gives"
    # redis-py 3 compares versions of hiredis by means of the past.
    quiet = ("-W", "ignore:distutils Version:DeprecationWarning")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, __file__, "-k", chosen]
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


def test_optional_parts_are_seen_by_whom_they_are_meant_for() -> None:
    """Else the same would be tested twice."""
    parser = redis.connection.DefaultParser.__name__.lower()
    assert ("hiredis" in parser) == (EXTENDED and _is_installed("hiredis"))
