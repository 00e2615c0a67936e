"""Restricted servers: without some commands, a server is used with fewer features, one log line, and equal results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis._redis.classify import MissingFeature, is_unsupported_command
from pybreaker_redis._replica import listener
from pybreaker_redis._servers.table import server_for
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support import servers
from tests.support.agreement import CircuitPair, log_lines_about
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.clients import PROTOCOLS
from tests.support.logs import lines_of, messages_of, records_of
from tests.support.outages import health_of
from tests.support.proxy import Proxy
from tests.support.selection import but_for
from tests.support.servers import ONCE, no_server
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

TRACKS = max(PROTOCOLS) == 3

#: Log text where the library lacks RESP3, whatever the server supports.
UNTRACKED = () if TRACKS else ("does not track keys",)


@dataclass(frozen=True)
class Restriction:
    """Commands that a server does not offer, with the expected effects.

    Attributes:
        name: Test id.
        renamed: Commands that do not exist on the server.
        rights: Rules that forbid commands to the user.
        push: Expected kind of push.
        mode: Expected engine.
        log_parts: Expected parts of log lines, one line each, in any order.
    """

    name: str
    renamed: tuple[str, ...] = ()
    rights: tuple[str, ...] = ()
    push: str = "tracking" if TRACKS else "channel"
    mode: str = "lua"
    log_parts: tuple[str, ...] = UNTRACKED

    def __str__(self) -> str:
        return self.name


RESTRICTIONS = [
    Restriction("nothing missing"),
    Restriction("no HELLO", ("HELLO",), push="channel", log_parts=("does not track keys",)),
    Restriction("no CLIENT", ("CLIENT",), push="channel", log_parts=("does not track keys",)),
    Restriction(
        "no CLIENT TRACKING",
        rights=("-client", "+client|setname"),
        push="channel",
        log_parts=("does not track keys",),
    ),
    Restriction("no SUBSCRIBE", ("SUBSCRIBE",), push="none", log_parts=(*UNTRACKED, "no push of changes")),
    Restriction("no PUBLISH", ("PUBLISH",), log_parts=(*UNTRACKED, "does not permit PUBLISH")),
    Restriction(
        "no PUBLISH, no CLIENT",
        ("PUBLISH", "CLIENT"),
        push="channel",
        log_parts=("does not permit PUBLISH", "does not track keys"),
    ),
    Restriction("no EVALSHA", ("EVALSHA",), log_parts=(*UNTRACKED, "does not accept EVALSHA")),
    Restriction("EVALSHA forbidden", rights=("-evalsha",), log_parts=(*UNTRACKED, "does not accept EVALSHA")),
    Restriction("no scripts", ("EVAL", "EVALSHA"), push="none", mode="optimistic", log_parts=("runs no scripts",)),
    Restriction(
        "scripts forbidden", rights=("-@scripting",), push="none", mode="optimistic", log_parts=("runs no scripts",)
    ),
    Restriction(
        "next to nothing",
        ("EVAL", "EVALSHA", "SUBSCRIBE", "PUBLISH", "CLIENT", "HELLO", "INFO", "CONFIG", "SETNX", "SCRIPT"),
        push="none",
        mode="optimistic",
        log_parts=("runs no scripts",),
    ),
]


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def binary(request: pytest.FixtureRequest) -> str:
    """Return each server found."""
    if request.param is None:
        no_server()
    path: str = request.param.binary
    return path


@pytest.fixture
def restricted(binary: str) -> Iterator[Callable[[Restriction], PrivateServer]]:
    """Yield a function that starts a server without these commands, for a user ``app`` with all other rights."""
    with contextlib.ExitStack() as stack:

        def start(restriction: Restriction) -> PrivateServer:
            arguments = [word for command in restriction.renamed for word in ("--rename-command", command, "")]
            server = stack.enter_context(PrivateServer(binary, port=free_port(), args=arguments))
            with contextlib.closing(operator_of(server)) as operator:
                rights = ("~*", "&*", "+@all", *restriction.rights)
                operator.execute_command("ACL", "SETUSER", "app", "on", ">secret", *rights)
            return server

        yield start


#: Protocol argument for tests of other subjects, because releases 8 of redis-py send more commands by default.
RESP2: dict[str, Any] = {"protocol": 2} if TRACKS else {}


def operator_of(server: PrivateServer) -> redis.Redis:
    """Return a client with all rights, through the socket."""
    return redis.Redis(unix_socket_path=server.unix_socket, **RESP2)


#: Restrictions that stand for the others in a run without ``--full``.
SAMPLE = [
    each for each in RESTRICTIONS if each.name in ("nothing missing", "no CLIENT TRACKING", "no PUBLISH", "no scripts")
]


@pytest.mark.parametrize("restriction", but_for(SAMPLE, RESTRICTIONS), ids=str)
def test_restricted_server_is_used_with_one_log_line_per_missing_feature(
    restricted: Callable[[Restriction], PrivateServer], restriction: Restriction, caplog: pytest.LogCaptureFixture
) -> None:
    """Trip, rejection, probe, recovery and foreign writes work as everywhere. Three circuits log no more than one."""
    server = restricted(restriction)
    options = {"username": "app", "password": "secret"}
    with (
        log_lines_about(caplog, f"127.0.0.1:{server.port}/0") as log_parts,
        # The client's own settings make no difference.
        contextlib.closing(redis.Redis(host="127.0.0.1", port=server.port, **options)) as here,
        contextlib.closing(redis.Redis(unix_socket_path=server.unix_socket, **options)) as there,
        contextlib.closing(operator_of(server)) as operator,
    ):
        twos = [CircuitPair(here, there, f"circuit{number}", operator) for number in range(3)]
        for two in twos:
            two.here.call(up)
        if restriction.push != "none":
            wait_for(lambda: health_of(twos[0].here).push == restriction.push, f"push by {restriction.push}")
        twos[0].run_lifecycle()
        for two in twos[1:]:
            fails(two.here, 2)
            assert two.here.current_state == "open"
        for two in twos:
            wait_for(lambda two=two: health_of(two.here).push == restriction.push, f"push by {restriction.push}")
            assert health_of(two.here).mode == restriction.mode
            assert health_of(two.here).condition == "connected"
        # The listener may still have to find the missing feature.
        wait_for(
            lambda: len(lines_about(caplog, server)) >= len(restriction.log_parts), "a line for each missing feature"
        )
    assert len(log_parts) == len(restriction.log_parts), log_parts
    for part in restriction.log_parts:
        assert sum(part in line for line in log_parts) == 1, log_parts


def lines_about(caplog: pytest.LogCaptureFixture, server: PrivateServer) -> list[str]:
    """Return the lines about the server so far."""
    return messages_of(caplog, f"127.0.0.1:{server.port}/0")


def test_log_records_carry_their_data_and_no_keys(
    restricted: Callable[[Restriction], PrivateServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Log handlers may count lines or alert. The arguments of commands are not logged."""
    server = restricted(Restriction("", ("EVAL", "EVALSHA")))
    with log_lines_about(caplog, str(server.port)) as log_parts, contextlib.closing(server.client()) as client:
        breaker_on(client).call(up)
    (line,) = log_parts
    assert "viewed" not in line
    assert "with args" not in line
    (record,) = [record for record in records_of(caplog, server) if "runs no scripts" in record.getMessage()]
    data = record.pybreaker_redis  # type: ignore[attr-defined]
    assert data["event"] == "lack"
    assert data["lack"] == "scripts"
    assert data["server"] == f"127.0.0.1:{server.port}/0"
    assert "unknown command" in data["error"]


def test_server_without_time_causes_failover_to_local_circuits(
    restricted: Callable[[Restriction], PrivateServer], caplog: pytest.LogCaptureFixture
) -> None:
    """The time of records comes from the server, so TIME is required. The local circuit guards calls."""
    server = restricted(Restriction("", ("TIME",)))
    with contextlib.closing(server.client()) as client:
        breaker = breaker_on(client, fail_max=2)
        assert breaker.call(up) == "answer"
        fails(breaker, 2)
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        assert health_of(breaker).condition == "refused"
    assert len(lines_of(caplog, server)) == 1


def test_connection_that_a_proxy_closes_repeatedly_is_logged_once(
    server: PrivateServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some proxies close the connection instead of refusing a command. The listener keeps trying, and logs one line."""
    monkeypatch.setattr(listener, "RECONNECT_DELAY_MAX_S", 0.02)
    with (
        contextlib.closing(Proxy(server.unix_socket)) as proxy,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=proxy.port)) as client,
        contextlib.closing(server.client()) as elsewhere,
    ):
        proxy.forbidden = b"SUBSCRIBE"
        breaker, other = breaker_on(client), breaker_on(elsewhere, max_staleness=0)
        breaker.call(up)
        wait_for(lambda: messages_of(caplog, proxy), "a log line")
        other.open()
        assert breaker.current_state == "open", "the breaker queries Redis"
        other.close()
        closed_before = proxy.closed_count
        wait_for(lambda: proxy.closed_count > closed_before + 2, "further attempts")
        (line,) = messages_of(caplog, proxy)
        assert "no push of changes (" in line
        proxy.forbidden = b""
        settled(breaker)
        assert health_of(breaker).push in ("tracking", "channel")


def test_outage_logs_no_lost_connection(
    killable_server: PrivateServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The listener tries again and again, but one line about the outage suffices."""
    monkeypatch.setattr(listener, "RECONNECT_DELAY_MAX_S", 0.01)
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client))
        killable_server.kill()
        wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "the outage")
        attempts = health_of(breaker).attempts
        wait_for(lambda: health_of(breaker).attempts > attempts + 5, "further attempts")
        killable_server.start()
        settled(breaker)
    assert [line for line in messages_of(caplog, killable_server) if "no push of changes" in line] == []


@pytest.mark.parametrize(
    ("log_parts", "is_unsupported"),
    [
        ("unknown command 'EVALSHA', with args beginning with: 'x'", True),
        ("ERR unsupported command 'EVALSHA'", True),
        ("command not supported", True),
        ("ERR Unknown Redis command called from script script: 3c10, on @user_script:1.", False),
        ("MISCONF Errors writing to the AOF file", False),
        ("wrong number of arguments", False),
    ],
)
def test_missing_command_differs_from_other_errors(log_parts: str, is_unsupported: bool) -> None:
    """A command that is missing inside a script is no reason to stop using scripts."""
    assert is_unsupported_command(redis.ResponseError(log_parts), "evalsha") is is_unsupported
    assert not is_unsupported_command(redis.ConnectionError(log_parts), "evalsha")


def test_forbidden_command_differs_from_a_forbidden_key() -> None:
    """A user without rights for a key is not helped by another command."""
    forbidden = redis.exceptions.NoPermissionError
    assert is_unsupported_command(forbidden("this user has no permissions to run the 'evalsha' command"), "evalsha")
    assert not is_unsupported_command(forbidden("this user has no permissions to run the 'eval' command"), "evalsha")
    assert not is_unsupported_command(forbidden("this user has no permissions to access one of the keys"), "evalsha")


def test_each_missing_feature_is_logged_once_per_server(caplog: pytest.LogCaptureFixture) -> None:
    """Two servers without one feature are two lines."""
    caplog.set_level("INFO", "pybreaker_redis")
    for path in ("/one", "/other"):
        server = server_for(redis.Redis(unix_socket_path=path))
        for _ in range(2):
            for lack in MissingFeature:
                server.note_missing_feature(lack, "no")
    lines = messages_of(caplog, "/one", "/other")
    assert len(lines) == 2 * len(MissingFeature)
    assert len(set(lines)) == 2 * len(MissingFeature)
