"""Servers that leave commands out, as managed ones and proxies do: one step down, one line, and all of them agree."""

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
from tests.support.agreement import Two, health_of, said_of
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.clients import PROTOCOLS
from tests.support.proxy import Proxy
from tests.support.servers import ONCE, no_server
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens", "patient")

TRACKS = max(PROTOCOLS) == 3

#: What is said where the library speaks no RESP3, whatever the server can do.
UNTRACKED = () if TRACKS else ("does not tell of changes itself",)


@dataclass(frozen=True)
class Restriction:
    """What a server has not.

    Attributes:
        name: For test ids.
        renamed: Commands that it does not know.
        rights: What its users may, after all else; what it knows, but not for them.
        push: How changes are heard all the same.
        mode: How circuits are moved all the same.
        said: Once each, in this order or another.
    """

    name: str
    renamed: tuple[str, ...] = ()
    rights: tuple[str, ...] = ()
    push: str = "tracking" if TRACKS else "channel"
    mode: str = "lua"
    said: tuple[str, ...] = UNTRACKED

    def __str__(self) -> str:
        return self.name


RESTRICTIONS = [
    Restriction("nothing missing"),
    Restriction("no HELLO", ("HELLO",), push="channel", said=("does not tell of changes itself",)),
    Restriction("no CLIENT", ("CLIENT",), push="channel", said=("does not tell of changes itself",)),
    Restriction(
        "no CLIENT TRACKING",
        rights=("-client", "+client|setname"),
        push="channel",
        said=("does not tell of changes itself",),
    ),
    Restriction("no SUBSCRIBE", ("SUBSCRIBE",), push="none", said=(*UNTRACKED, "changes of circuits cannot be heard")),
    Restriction("no PUBLISH", ("PUBLISH",), said=(*UNTRACKED, "lets nobody publish changes")),
    Restriction(
        "no PUBLISH, no CLIENT",
        ("PUBLISH", "CLIENT"),
        push="channel",
        said=("lets nobody publish changes", "does not tell of changes itself"),
    ),
    Restriction("no EVALSHA", ("EVALSHA",), said=(*UNTRACKED, "runs scripts, but not by name")),
    Restriction("EVALSHA forbidden", rights=("-evalsha",), said=(*UNTRACKED, "runs scripts, but not by name")),
    Restriction("no scripts", ("EVAL", "EVALSHA"), push="none", mode="optimistic", said=("runs no scripts",)),
    Restriction(
        "scripts forbidden", rights=("-@scripting",), push="none", mode="optimistic", said=("runs no scripts",)
    ),
    Restriction(
        "next to nothing",
        ("EVAL", "EVALSHA", "SUBSCRIBE", "PUBLISH", "CLIENT", "HELLO", "INFO", "CONFIG", "SETNX", "SCRIPT"),
        push="none",
        mode="optimistic",
        said=("runs no scripts",),
    ),
]


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def binary(request: pytest.FixtureRequest) -> str:
    """Each server at hand in turn."""
    if request.param is None:
        no_server()
    path: str = request.param.binary
    return path


@pytest.fixture
def restricted(binary: str) -> Iterator[Callable[[Restriction], PrivateServer]]:
    """A server that leaves these commands out, for a user ``app`` who may do all else."""
    with contextlib.ExitStack() as stack:

        def start(restriction: Restriction) -> PrivateServer:
            away = [word for command in restriction.renamed for word in ("--rename-command", command, "")]
            server = stack.enter_context(PrivateServer(binary, port=free_port(), args=away))
            with contextlib.closing(operator_of(server)) as operator:
                rights = ("~*", "&*", "+@all", *restriction.rights)
                operator.execute_command("ACL", "SETUSER", "app", "on", ">secret", *rights)
            return server

        yield start


#: Of tests that speak of nothing else: redis-py 8 asks for more unless told not to.
RESP2: dict[str, Any] = {"protocol": 2} if TRACKS else {}


def operator_of(server: PrivateServer) -> redis.Redis:
    """Somebody who may do all that there is, by the socket."""
    return redis.Redis(unix_socket_path=server.unix_socket, **RESP2)


@pytest.mark.parametrize("restriction", RESTRICTIONS, ids=str)
def test_restricted_server_is_served_with_one_step_down_and_one_line(
    restricted: Callable[[Restriction], PrivateServer], restriction: Restriction, caplog: pytest.LogCaptureFixture
) -> None:
    """Trip, rejection, probe, recovery, foreign writers: as everywhere; and three circuits say no more than one."""
    server = restricted(restriction)
    words = {"username": "app", "password": "secret"}
    with (
        said_of(caplog, f"127.0.0.1:{server.port}/0") as said,
        # Whatever its user has made it for, and even where it cannot be used for anything else.
        contextlib.closing(redis.Redis(host="127.0.0.1", port=server.port, **words)) as here,
        contextlib.closing(redis.Redis(unix_socket_path=server.unix_socket, **words)) as there,
        contextlib.closing(operator_of(server)) as operator,
    ):
        twos = [Two(here, there, f"circuit{number}", operator) for number in range(3)]
        for two in twos:
            two.here.call(up)
        if restriction.push != "none":
            wait_for(lambda: health_of(twos[0].here).push == restriction.push, f"changes heard: {restriction.push}")
        twos[0].live()
        for two in twos[1:]:
            fails(two.here, 2)
            assert two.here.current_state == "open"
        for two in twos:
            wait_for(lambda two=two: health_of(two.here).push == restriction.push, f"changes heard: {restriction.push}")
            assert health_of(two.here).mode == restriction.mode
            assert health_of(two.here).condition == "connected"
        # The listener may have to find out yet.
        wait_for(lambda: len(heard(caplog, server)) >= len(restriction.said), "a line for each loss")
    assert len(said) == len(restriction.said), said
    for words_of_line in restriction.said:
        assert sum(words_of_line in line for line in said) == 1, said


def heard(caplog: pytest.LogCaptureFixture, server: PrivateServer) -> list[str]:
    """What was said of the server until now."""
    return [line for line in caplog.messages if f"127.0.0.1:{server.port}/0" in line]


def test_lines_carry_what_they_say_and_no_keys(
    restricted: Callable[[Restriction], PrivateServer], caplog: pytest.LogCaptureFixture
) -> None:
    """For handlers that count or page; what a command was given is nobody's business."""
    server = restricted(Restriction("", ("EVAL", "EVALSHA")))
    with said_of(caplog, str(server.port)) as said, contextlib.closing(server.client()) as client:
        breaker_on(client).call(up)
    (line,) = said
    assert "viewed" not in line
    assert "with args" not in line
    (record,) = [record for record in caplog.records if "runs no scripts" in record.getMessage()]
    data = record.pybreaker_redis  # type: ignore[attr-defined]
    assert data["event"] == "lack"
    assert data["lack"] == "scripts"
    assert data["server"] == f"127.0.0.1:{server.port}/0"
    assert "unknown command" in data["error"]


def test_server_without_a_clock_leaves_each_process_on_its_own(
    restricted: Callable[[Restriction], PrivateServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Whose clock it goes by is no detail: there is no doing without TIME.  Calls are guarded all the same."""
    server = restricted(Restriction("", ("TIME",)))
    with contextlib.closing(server.client()) as client:
        breaker = breaker_on(client, fail_max=2)
        assert breaker.call(up) == "answer"
        fails(breaker, 2)
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(up)
        assert health_of(breaker).condition == "refused"
    assert len([line for line in caplog.messages if "gave no usable answer" in line]) == 1


# -- what only a proxy does --------------------------------------------------------------------------------------------


def test_line_that_is_hung_up_on_again_and_again_is_said_once(
    server: PrivateServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some proxies do not refuse what they cannot pass on, they hang up: everything is asked, and one line says so."""
    monkeypatch.setattr(listener, "RECONNECT_DELAY_MAX_S", 0.02)
    with (
        contextlib.closing(Proxy(server.unix_socket)) as proxy,
        contextlib.closing(redis.Redis(host="127.0.0.1", port=proxy.port)) as client,
        contextlib.closing(server.client()) as elsewhere,
    ):
        proxy.forbidden = b"SUBSCRIBE"
        breaker, other = breaker_on(client), breaker_on(elsewhere, max_staleness=0)
        breaker.call(up)
        wait_for(lambda: caplog.messages, "a line")
        other.open()
        assert breaker.current_state == "open", "it asks"
        other.close()
        dead = proxy.hung_up_on
        wait_for(lambda: proxy.hung_up_on > dead + 2, "it goes on trying")
        (line,) = caplog.messages
        assert "changes of circuits cannot be heard (" in line
        proxy.forbidden = b""
        settled(breaker)
        assert health_of(breaker).push in ("tracking", "channel")


def test_server_that_is_away_is_not_said_to_hang_up(
    killable_server: PrivateServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often the listener tries meanwhile: one line about the outage is enough."""
    monkeypatch.setattr(listener, "RECONNECT_DELAY_MAX_S", 0.01)
    with contextlib.closing(killable_server.client(**ONCE)) as client:
        breaker = settled(breaker_on(client))
        killable_server.kill()
        wait_for(lambda: breaker.call(up) and health_of(breaker).condition == "unreachable", "the outage is noticed")
        attempts = health_of(breaker).attempts
        wait_for(lambda: health_of(breaker).attempts > attempts + 5, "it is asked for")
        killable_server.start()
        settled(breaker)
    assert [line for line in caplog.messages if "cannot be heard" in line] == []


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "is_lack"),
    [
        ("unknown command 'EVALSHA', with args beginning with: 'x'", True),
        ("ERR unsupported command 'EVALSHA'", True),
        ("command not supported", True),
        ("ERR Unknown Redis command called from script script: 3c10, on @user_script:1.", False),
        ("MISCONF Errors writing to the AOF file", False),
        ("wrong number of arguments", False),
    ],
)
def test_missing_command_is_told_from_trouble_with_it(said: str, is_lack: bool) -> None:
    """What a script misses is no reason to do without scripts."""
    assert is_unsupported_command(redis.ResponseError(said), "evalsha") is is_lack
    assert not is_unsupported_command(redis.ConnectionError(said), "evalsha")


def test_forbidden_command_is_told_from_a_forbidden_key() -> None:
    """Who may not touch a key is not helped by another command."""
    forbidden = redis.exceptions.NoPermissionError
    assert is_unsupported_command(forbidden("this user has no permissions to run the 'evalsha' command"), "evalsha")
    assert not is_unsupported_command(forbidden("this user has no permissions to run the 'eval' command"), "evalsha")
    assert not is_unsupported_command(forbidden("this user has no permissions to access one of the keys"), "evalsha")


def test_each_lack_is_said_once_for_each_server(caplog: pytest.LogCaptureFixture) -> None:
    """Two servers that lack the same are two things to know."""
    caplog.set_level("INFO", "pybreaker_redis")
    for path in ("/one", "/other"):
        server = server_for(redis.Redis(unix_socket_path=path))
        for _ in range(2):
            for lack in MissingFeature:
                server.note_missing_feature(lack, "no")
    assert len(caplog.messages) == 2 * len(MissingFeature)
    assert len(set(caplog.messages)) == 2 * len(MissingFeature)
