"""The push connection without a server: orders of answers, pushes and errors that are easy to confuse."""

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
    """Parser of redis-py before pushes, and of hiredis before redis-py 6."""


class ParserOf50(Parser):
    """Parser of redis-py 5.0."""

    def set_push_handler(self, handler: Any) -> None:
        """Set one handler for all pushes."""
        self.handler = handler


class ParserOf51(Parser):
    """Parser of redis-py from 5.1 on."""

    def set_pubsub_push_handler(self, handler: Any) -> None:
        """Set the handler for published messages."""
        self.handler = handler

    def set_invalidation_push_handler(self, handler: Any) -> None:
        """Set the handler for invalidations."""
        self.invalidation_handler = handler


class Connection:
    """Connection that returns one item of a test's script with each read."""

    made: list[Connection]
    parser: type[Parser] = ParserOf51
    says: dict[int, list[Any]]

    def __init__(self, *, protocol: int, **options: Any) -> None:
        self.protocol = protocol
        self.options = options
        self._parser = self.parser()
        self._sock: object | None = object()
        self.sent: list[tuple[Any, ...]] = []
        self.script = deque(self.says.get(protocol, []))
        self.made.append(self)

    def connect(self) -> None:
        """Do nothing."""

    def disconnect(self) -> None:
        """Close the connection."""
        self._sock = None

    def pack_commands(self, commands: Any) -> Any:
        """Return the commands unchanged."""
        return commands

    def send_packed_command(self, commands: Any, *, check_health: bool) -> None:
        """Record the commands."""
        assert not check_health
        self.sent += commands
        if commands == [("HELLO",)]:
            self.script.appendleft([b"server", b"redis", b"version", b"8.2.3"])

    def can_read(self, *, timeout: float) -> bool:
        """Return whether the script has another item."""
        del timeout
        return bool(self.script)

    def read_response(self, **options: Any) -> Any:
        """Return the next item of the script. Pushes have the type that the parser's handler gives them."""
        item = self.script.popleft()
        if isinstance(item, Exception):
            raise item
        return item


class Client:
    """Client with a pool of scripted connections."""

    def __init__(self, parser: type[Parser] = ParserOf51, **says: list[Any]) -> None:
        self.made: list[Connection] = []
        scripts = {int(name[-1]): script for name, script in says.items()}
        self.connection_pool: Any = SimpleNamespace(
            connection_class=type("Made", (Connection,), {"made": self.made, "says": scripts, "parser": parser}),
            connection_kwargs={"path": "/nowhere", "db": 0},
        )

    def connect(self, received: list[Push]) -> PushConnection:
        """Return a push connection of this client."""
        endpoint = endpoint_of(self)
        assert endpoint is not None
        return PushConnection(endpoint, 1.0, received.append)


OK = [b"OK", b"OK"]  # CLIENT SETNAME, CLIENT TRACKING


@pytest.mark.parametrize(("parser", "connections"), [(Parser, 2), (ParserOf50, 1), (ParserOf51, 1)])
def test_one_connection_suffices_if_the_parser_separates_pushes_from_answers(parser, connections):
    """Without separate handlers, a push could be mistaken for an answer."""
    client = Client(parser, resp3=OK, resp2=[b"OK"])
    push_connection = client.connect([])
    assert sum(connection._sock is not None for connection in client.made) == connections
    assert push_connection.is_tracking == (connections == 1)
    push_connection.close()
    assert all(connection._sock is None for connection in client.made)


def test_push_between_answers_is_received_at_once_and_is_no_answer():
    """A slow answer, or a missing one, must not delay pushes."""
    news = [Push([b"message", b"channel", b"%d" % number]) for number in range(3)]
    received: list[Push] = []
    answers = [news[0], Push([b"subscribe", b"a", 1]), news[1], [b"0", b"0"], ResponseError("no"), news[2]]
    push_connection = Client(resp3=[*OK, *answers]).connect(received)
    push_connection.subscribe(["a"])
    assert received == news[:1]
    first, second = push_connection.query([("TIME",), ("MGET", "a")])
    assert received == news[:2]
    assert first == [b"0", b"0"]
    assert isinstance(second, ResponseError)
    push_connection.receive(0)
    assert received == news


def test_refused_unsubscribe_is_no_answer():
    """A user without the right to unsubscribe keeps receiving messages, and gets no other effect."""
    forbidden = NoPermissionError("NOPERM no unsubscribe")
    push_connection = Client(resp3=[*OK, Push([b"subscribe", b"a", 1]), forbidden, [b"0", b"0"]]).connect([])
    push_connection.subscribe(["a"])
    push_connection.unsubscribe(["a"])
    assert push_connection.query([("TIME",)]) == [[b"0", b"0"]]


def test_error_without_a_command_ends_the_connection():
    """The error comes from a server that closes the connection, or from a proxy that is out of step."""
    push_connection = Client(resp3=[*OK, ResponseError("ERR max clients"), b"OK"]).connect([])
    with pytest.raises(ResponseError, match="max clients"):
        push_connection.receive(0)
    with pytest.raises(ConnectionError, match="unexpected answer"):
        push_connection.receive(0)


@pytest.mark.parametrize(
    ("item", "for_good"),
    [
        (NoPermissionError("NOPERM no channel"), True),
        (ResponseError("unknown command 'SUBSCRIBE'"), True),
        (ResponseError("ERR Unknown command `subscribe`"), True),
        (ResponseError("BUSY Redis is busy running a script"), False),
        (ResponseError("MASTERDOWN Link with MASTER is down"), False),
    ],
    ids=str,
)
def test_permanent_refusal_differs_from_a_temporary_one(item, for_good):
    """After a permanent refusal, the listener does not subscribe again for a minute."""
    push_connection = Client(resp3=[*OK, item]).connect([])
    with pytest.raises(PushUnavailableError if for_good else ResponseError):
        push_connection.subscribe(["a"])


def test_failed_connect_leaves_no_connection_open():
    """The listener connects again and again."""
    client = Client(resp3=[ConnectionError("gone")], resp2=[ConnectionError("gone")])
    with pytest.raises(ConnectionError):
        client.connect([])
    assert all(connection._sock is None for connection in client.made)


def test_flood_of_pushes_is_read_in_turns(monkeypatch):
    """A flood of pushes must not delay a poll or a new circuit for ever."""
    monkeypatch.setattr("pybreaker_redis._replica.connection.PUSHES_PER_TURN_MAX", 3)
    received: list[Push] = []
    push_connection = Client(resp3=[*OK, *[Push([b"message", b"a", b""])] * 5]).connect(received)
    push_connection.receive(0)
    assert len(received) == 3


def test_push_connection_uses_its_own_timeout_and_no_retries():
    """The retries of the user's client are for its own calls. The listener has its own retries."""
    client = Client(resp3=OK)
    client.connection_pool.connection_kwargs.update(
        host="there", socket_timeout=60, socket_connect_timeout=60, retry="ten times", maint_config=1, client_name="x"
    )
    del client.connection_pool.connection_kwargs["path"]
    client.connect([])
    (connection,) = client.made
    assert connection.options == {
        "host": "there",
        "db": 0,
        "decode_responses": False,
        "socket_timeout": 1.0,
        "socket_connect_timeout": 1.0,
    }


def test_endpoints_are_equal_if_database_and_user_are_the_same():
    """Clients of one process with the same database and user share one connection."""
    one, other = Client(), Client()
    other.connection_pool.connection_class = one.connection_pool.connection_class
    assert endpoint_of(one) == endpoint_of(other)
    other.connection_pool.connection_kwargs["socket_timeout"] = 3
    assert endpoint_of(one) == endpoint_of(other)
    assert hash(endpoint_of(one)) == hash(endpoint_of(other))
    for name, value in (("db", 1), ("path", "/elsewhere"), ("username", "other"), ("credential_provider", [])):
        before = dict(other.connection_pool.connection_kwargs)
        other.connection_pool.connection_kwargs[name] = value
        assert endpoint_of(one) != endpoint_of(other), name
        other.connection_pool.connection_kwargs = before
