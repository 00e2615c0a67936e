"""The line, without a server: what libraries and servers may say, in the order that hurts."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from pybreaker_redis._redis.classify import PushUnavailableError
from pybreaker_redis._redis.endpoint import endpoint_of
from pybreaker_redis._replica.connection import Push, PushConnection


class Parser:
    """As in redis-py before pushes, and with hiredis before redis-py 6."""


class ParserOf50(Parser):
    """As in redis-py 5.0."""

    def set_push_handler(self, handler: Any) -> None:
        """One for all pushes."""
        self.handler = handler


class ParserOf51(Parser):
    """As in redis-py from 5.1 on."""

    def set_pubsub_push_handler(self, handler: Any) -> None:
        """For what is published."""
        self.handler = handler

    def set_invalidation_push_handler(self, handler: Any) -> None:
        """For what has changed."""
        self.invalidation_handler = handler


class Connection:
    """Says what a test has written for it, one thing for each read."""

    made: list[Connection]
    parser: type[Parser] = ParserOf51
    says: dict[int, list[Any]]

    def __init__(self, *, protocol: int, **words: Any) -> None:
        self.protocol = protocol
        self.words = words
        self._parser = self.parser()
        self._sock: object | None = object()
        self.sent: list[tuple[Any, ...]] = []
        self.script = deque(self.says.get(protocol, []))
        self.made.append(self)

    def connect(self) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        """Hang up."""
        self._sock = None

    def pack_commands(self, commands: Any) -> Any:
        """As they are."""
        return commands

    def send_packed_command(self, commands: Any, *, check_health: bool) -> None:
        """Note them."""
        assert not check_health
        self.sent += commands
        if commands == [("HELLO",)]:
            self.script.appendleft([b"server", b"redis", b"version", b"8.2.3"])

    def can_read(self, *, timeout: float) -> bool:
        """Whether there is more in the script."""
        del timeout
        return bool(self.script)

    def read_response(self, **words: Any) -> Any:
        """The next of the script; pushes as the parser's handler makes them."""
        said = self.script.popleft()
        if isinstance(said, Exception):
            raise said
        return said


class Client:
    """With a pool of such connections."""

    def __init__(self, parser: type[Parser] = ParserOf51, **says: list[Any]) -> None:
        self.made: list[Connection] = []
        scripts = {int(name[-1]): script for name, script in says.items()}
        self.connection_pool: Any = SimpleNamespace(
            connection_class=type("Made", (Connection,), {"made": self.made, "says": scripts, "parser": parser}),
            connection_kwargs={"path": "/nowhere", "db": 0},
        )

    def line(self, heard: list[Push]) -> PushConnection:
        """Connected."""
        endpoint = endpoint_of(self)
        assert endpoint is not None
        return PushConnection(endpoint, 1.0, heard.append)


OK = [b"OK", b"OK"]  # CLIENT SETNAME, CLIENT TRACKING


@pytest.mark.parametrize(("parser", "connections"), [(Parser, 2), (ParserOf50, 1), (ParserOf51, 1)])
def test_one_connection_does_if_the_library_tells_pushes_from_answers(parser, connections):
    """Otherwise a push could be taken for the answer to something."""
    client = Client(parser, resp3=OK, resp2=[b"OK"])
    line = client.line([])
    assert sum(connection._sock is not None for connection in client.made) == connections
    assert line.is_tracking == (connections == 1)
    line.close()
    assert all(connection._sock is None for connection in client.made)


def test_push_in_the_middle_of_anything_is_heard_at_once_and_taken_for_no_answer():
    """An answer that takes its time, or never comes, must not hold up the news."""
    news = [Push([b"message", b"channel", b"%d" % number]) for number in range(3)]
    heard: list[Push] = []
    answers = [news[0], Push([b"subscribe", b"a", 1]), news[1], [b"0", b"0"], ResponseError("no"), news[2]]
    line = Client(resp3=[*OK, *answers]).line(heard)
    line.subscribe(["a"])
    assert heard == news[:1]
    first, second = line.query([("TIME",), ("MGET", "a")])
    assert heard == news[:2]
    assert first == [b"0", b"0"]
    assert isinstance(second, ResponseError)
    line.receive(0)
    assert heard == news


def test_refusal_to_hear_no_more_is_taken_for_no_answer():
    """Who may not unsubscribe goes on hearing, and nothing else."""
    forbidden = NoPermissionError("NOPERM no unsubscribe")
    line = Client(resp3=[*OK, Push([b"subscribe", b"a", 1]), forbidden, [b"0", b"0"]]).line([])
    line.subscribe(["a"])
    line.unsubscribe(["a"])
    assert line.query([("TIME",)]) == [[b"0", b"0"]]


def test_error_that_nobody_asked_for_ends_the_line():
    """What a server says before it hangs up, or a proxy that is out of step."""
    line = Client(resp3=[*OK, ResponseError("ERR max clients"), b"OK"]).line([])
    with pytest.raises(ResponseError, match="max clients"):
        line.receive(0)
    with pytest.raises(ConnectionError, match="unexpected answer"):
        line.receive(0)


@pytest.mark.parametrize(
    ("said", "for_good"),
    [
        (NoPermissionError("NOPERM no channel"), True),
        (ResponseError("unknown command 'SUBSCRIBE'"), True),
        (ResponseError("ERR Unknown command `subscribe`"), True),
        (ResponseError("BUSY Redis is busy running a script"), False),
        (ResponseError("MASTERDOWN Link with MASTER is down"), False),
    ],
    ids=str,
)
def test_refusal_for_good_is_told_from_one_for_now(said, for_good):
    """After the first nobody asks again for a minute."""
    line = Client(resp3=[*OK, said]).line([])
    with pytest.raises(PushUnavailableError if for_good else ResponseError):
        line.subscribe(["a"])


def test_line_that_cannot_be_made_leaves_nothing_open():
    """It is tried again and again."""
    client = Client(resp3=[ConnectionError("gone")], resp2=[ConnectionError("gone")])
    with pytest.raises(ConnectionError):
        client.line([])
    assert all(connection._sock is None for connection in client.made)


def test_flood_of_pushes_lets_other_things_have_their_turn(monkeypatch):
    """A poll, or a new circuit, must not wait for ever."""
    monkeypatch.setattr("pybreaker_redis._replica.connection.PUSHES_PER_TURN_MAX", 3)
    heard: list[Push] = []
    line = Client(resp3=[*OK, *[Push([b"message", b"a", b""])] * 5]).line(heard)
    line.receive(0)
    assert len(heard) == 3


def test_connections_of_the_line_wait_as_long_as_the_line_says_and_never_try_again():
    """What the user's client does about errors is the user's business; the listener has its own way."""
    client = Client(resp3=OK)
    client.connection_pool.connection_kwargs.update(
        host="there", socket_timeout=60, socket_connect_timeout=60, retry="ten times", maint_config=1, client_name="x"
    )
    del client.connection_pool.connection_kwargs["path"]
    client.line([])
    (connection,) = client.made
    assert connection.words == {
        "host": "there",
        "db": 0,
        "decode_responses": False,
        "socket_timeout": 1.0,
        "socket_connect_timeout": 1.0,
    }


def test_origins_are_equal_if_they_reach_the_same_database_as_the_same_user():
    """So that all clients of a process need one line."""
    one, other = Client(), Client()
    other.connection_pool.connection_class = one.connection_pool.connection_class
    assert endpoint_of(one) == endpoint_of(other)
    other.connection_pool.connection_kwargs["socket_timeout"] = 3
    assert endpoint_of(one) == endpoint_of(other)
    assert hash(endpoint_of(one)) == hash(endpoint_of(other))
    for name, value in (("db", 1), ("path", "/elsewhere"), ("username", "somebody"), ("credential_provider", [])):
        before = dict(other.connection_pool.connection_kwargs)
        other.connection_pool.connection_kwargs[name] = value
        assert endpoint_of(one) != endpoint_of(other), name
        other.connection_pool.connection_kwargs = before
