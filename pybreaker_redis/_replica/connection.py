"""One process's line to one server: what is heard on it, and what is asked in between.

Knows: connections of redis-py from 3 to 8, RESP2 and RESP3, SUBSCRIBE, CLIENT TRACKING.  Does not know: circuits.

With RESP3 it is one connection for everything, and the server tells of every change to the keys that were read on it,
whoever makes it: ``CLIENT TRACKING`` without prefixes, which costs other clients of the server nothing.  With RESP2 a
connection that subscribes can do nothing else, so there are two, and only published changes are heard.

The connections are made here and used by one thread only.  One that failed is never used again: redis-py would quietly
connect anew, and nobody would be subscribed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pybreaker_redis._redis.classify import PushUnavailableError, is_instance_of_named, is_unsupported_command
from pybreaker_redis._redis.deadline import deadline
from pybreaker_redis._redis.endpoint import CONNECT_HOOK_ARGUMENTS, Endpoint

#: How the connections are called in ``CLIENT LIST``.
CONNECTION_NAME = "pybreaker_redis"

#: Most pushes that are taken before other things have their turn.
PUSHES_PER_TURN_MAX = 1000


@dataclass(frozen=True, slots=True)
class PushMode:
    """How changes are heard, and of what server.

    Attributes:
        how: ``tracking`` (whoever makes them) or ``channel`` (what is published).
        protocol: 2 or 3.
        server: What the server calls itself, and its version, as in ``valkey 8.1.0``; empty if it did not say.
    """

    how: Literal["tracking", "channel"]
    protocol: int
    server: str


class Push(list[Any]):
    """What the server said without being asked: its kind, and what belongs to it."""


class PushConnection:
    """Connected, subscribed to nothing yet.

    Args:
        endpoint: Where to.
        timeout: Seconds to wait for each answer.
        hear: Told of every push, in the middle of anything.

    Attributes:
        is_tracking: Whether changes of keys that `ask` has read are heard, besides what is published.
        tracking_refusal: Why they are not.
        server: What the server calls itself, and its version; empty if it does not say.

    Raises:
        Exception: Whatever the library raises when nobody answers.
    """

    def __init__(self, endpoint: Endpoint, timeout: float, hear: Callable[[Push], None]) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._on_push = hear
        self._connections: list[Any] = []
        self._query_connection: Any = None
        self.is_tracking = False
        self.tracking_refusal = ""
        self.server = ""
        try:
            one = self._connect_resp3(endpoint)
            self._is_single = one is not None
            self._query_connection = one or self._connect_resp2(endpoint)
            self._push_connection = one or self._connect_resp2(endpoint)
            self._sockets = self._current_sockets()
            self._set_up()
        except BaseException:
            self.close()
            raise

    @property
    def push_mode(self) -> PushMode:
        """How changes are heard here."""
        return PushMode("tracking" if self.is_tracking else "channel", 3 if self._is_single else 2, self.server)

    def subscribe(self, channels: Sequence[str]) -> None:
        """Hear what is published on these channels; returns when the server has said that it will be heard.

        Raises:
            PushUnavailableError: The server refuses, or knows no channels.
            Exception: It does not answer.
        """
        refused = self._confirm("SUBSCRIBE", channels)
        if refused is not None:
            raise refusal_of(refused)

    def unsubscribe(self, channels: Sequence[str]) -> None:
        """Hear no more of these channels; who may not even say so goes on hearing of what nobody needs.

        Raises:
            Exception: The server does not answer.
        """
        self._confirm("UNSUBSCRIBE", channels)

    def _confirm(self, command: str, channels: Sequence[str]) -> Exception | None:
        """The error, if that was the answer; else each channel is confirmed by one."""
        self._send(self._push_connection, [(command, *channels)])
        missing = len(channels)
        while missing:
            answer = self._read(self._push_connection)
            if isinstance(answer, Exception):
                return answer
            if answer and _text(answer[0]) == command.lower():
                missing -= 1
            else:
                self._on_push(Push(answer))
        return None

    def query(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Send commands in one batch; their answers, errors among them as values.

        Raises:
            Exception: The server does not answer.
        """
        commands = list(commands)
        self._send(self._query_connection, commands)
        answers: list[Any] = []
        while len(answers) < len(commands):
            answer = self._read(self._query_connection)
            if isinstance(answer, Push):
                self._on_push(answer)
            else:
                answers.append(answer)
        return answers

    def send_beat(self) -> bool:
        """Ask for a sign of life where nothing else is asked, and Sentinels whether this is still the place.

        A master that was demoted keeps its connections for seconds, and hears what is published on the new one, but
        not when it is cut off from it.

        Returns:
            Whether there is such a place; then the answer is heard as a push of the kind ``pong``.

        Raises:
            ConnectionResetError: Sentinels know another master.
        """
        with deadline(self._timeout):
            if self._endpoint.verify_master(self._query_connection):
                msg = "the master has moved"
                raise ConnectionResetError(msg)
        if self._is_single:
            return False
        self._send(self._push_connection, [("PING",)])
        return True

    def receive(self, seconds: float) -> None:
        """Wait so long for something to be heard, and then for nothing more: one change is told in several ways.

        Raises:
            Exception: The line is dead.
        """
        for _ in range(PUSHES_PER_TURN_MAX):
            self._check()
            if not self._push_connection.can_read(timeout=seconds):
                break
            push = self._read(self._push_connection)
            if not isinstance(push, list):
                # Nothing was asked.  An error is what the server says before it hangs up.
                raise refusal_of(push)
            self._on_push(Push(push))
            seconds = 0

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections:
            with contextlib.suppress(Exception):
                connection.disconnect()

    def _connect(self, endpoint: Endpoint, **words: Any) -> Any:
        connection = endpoint.connect(timeout=self._timeout, **words)
        self._connections.append(connection)
        return connection

    def _connect_resp2(self, endpoint: Endpoint) -> Any:
        try:
            return self._connect(endpoint, protocol=2)
        except TypeError:
            pass  # redis-py before 5 knows nothing else.
        try:
            return self._connect(endpoint)
        except TypeError as error:
            msg = f"no connection like those of the client can be made: {error}"
            raise PushUnavailableError(msg) from error

    def _connect_resp3(self, endpoint: Endpoint) -> Any:
        """A connection that can do everything; ``None`` if the library or the server has none.

        Whatever the client speaks: up to redis-py 7 that is RESP2, unless somebody asked for more.
        """
        try:
            connection = self._connect(endpoint, protocol=3)
        except Exception as error:  # noqa: BLE001
            # redis-py before 5, or a server or a proxy without HELLO, each with an error of its own.  Or nobody is
            # there: then the next attempt says so.
            self.tracking_refusal = f"no RESP3: {error}"
            return None
        if CONNECT_HOOK_ARGUMENTS & endpoint.connection_arguments.keys() and not self._speaks_resp3(connection):
            self.tracking_refusal = "no RESP3: the function that connects has not asked for it"
            self._connections.remove(connection)
            connection.disconnect()
            return None
        if _enable_push_marks(connection):
            return connection
        self.tracking_refusal = "no RESP3: this client library takes pushes for answers"
        # redis-py 5 with hiredis: pushes would be taken for answers.
        self._connections.remove(connection)
        connection.disconnect()
        return None

    def _speaks_resp3(self, connection: Any) -> bool:
        """Whether a connection does that was made by a function of the user's: a dictionary is no type of RESP2."""
        self._send(connection, [("HELLO",)])
        return isinstance(self._read(connection), dict)

    def _set_up(self) -> None:
        for connection in self._connections:
            # Whoever may not say who he is, or be told of keys, can do without.
            self._send(connection, [("CLIENT", "SETNAME", CONNECTION_NAME)])
            self._read(connection)
        if self._is_single:
            (answer,) = self.query([("CLIENT", "TRACKING", "ON", "OPTOUT")])
            self.is_tracking = not is_instance_of_named(answer, "ResponseError")
            self.tracking_refusal = "" if self.is_tracking else str(answer)
        self._send(self._query_connection, [("HELLO",)])
        self.server = _server_version(self._read(self._query_connection))

    def _current_sockets(self) -> list[Any]:
        return [getattr(connection, "_sock", None) for connection in self._connections]

    def _check(self) -> None:
        if self._current_sockets() != self._sockets:
            msg = "the client library has replaced a connection"
            raise ConnectionResetError(msg)

    def _send(self, connection: Any, commands: list[tuple[Any, ...]]) -> None:
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)

    def _read(self, connection: Any) -> Any:
        """The next answer or push; an error that the server has answered is a value."""
        try:
            if connection is self._query_connection and self._is_single:
                return connection.read_response(push_request=True)
            return connection.read_response()
        except Exception as error:
            if is_instance_of_named(error, "ResponseError"):
                return error
            raise


def _enable_push_marks(connection: Any) -> bool:
    """Have the parser return pushes as `Push`, so that no answer is mistaken for one; whether it can."""
    parser: Any = getattr(connection, "_parser", None)
    if hasattr(parser, "set_invalidation_push_handler"):
        parser.set_pubsub_push_handler(Push)
        parser.set_invalidation_push_handler(Push)
        return True
    if hasattr(parser, "set_push_handler"):
        parser.set_push_handler(Push)
        return True
    return False


def refusal_of(answer: Any) -> Exception:
    """What to raise for an answer that is not what it should be: who is refused for good need not ask again soon."""
    if any(
        is_instance_of_named(answer, name) for name in ("NoPermissionError", "ClusterCrossSlotError")
    ) or is_unsupported_command(answer):
        return PushUnavailableError(str(answer))
    return answer if isinstance(answer, Exception) else ConnectionError(f"unasked: {answer!r}")


def _server_version(hello: Any) -> str:
    """What a server says of itself: a dictionary, with RESP2 a list; an error where it does not say."""
    if isinstance(hello, list):
        hello = dict(zip(hello[::2], hello[1::2], strict=False))
    items = hello.items() if isinstance(hello, dict) else ()
    said = {_text(name): _text(value) for name, value in items}
    return f"{said.get('server', '')} {said.get('version', '')}".strip()


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
