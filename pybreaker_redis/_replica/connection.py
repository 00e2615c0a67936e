"""Push connection of one process to one server: subscriptions, pushes and queries.

With RESP3 there is one connection for everything.  ``CLIENT TRACKING`` without prefixes has the server push every
change of the keys that were read on the connection, which costs other clients nothing.  With RESP2, a connection that
subscribes can do nothing more.  So there are two connections, and only published changes arrive.

The connections are used by one thread only, and never again after a failure.  redis-py would silently connect again,
without the subscriptions.  The code supports redis-py 3 to 8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pybreaker_redis._redis.classify import PushUnavailableError, is_instance_of_named, is_unsupported_command
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.endpoint import CONNECT_HOOK_ARGUMENTS, Endpoint
from pybreaker_redis._redis.sentinel import verify_master

#: Name of the connections in ``CLIENT LIST``.
CONNECTION_NAME = "pybreaker_redis"

#: Most pushes that are received before the session continues with its other work.
PUSHES_PER_TURN_MAX = 1000


@dataclass(frozen=True, slots=True)
class PushMode:
    """How changes arrive.

    Attributes:
        via: ``tracking``: all changes, by any client.  ``channel``: published changes only.
        protocol: Version of RESP, 2 or 3.
        server_version: Name and version of the server, as in ``valkey 8.1.0``, empty if unknown.
    """

    via: Literal["tracking", "channel"]
    protocol: int
    server_version: str


class Push(list[Any]):
    """Message that the server sent without a query: its kind, and the values."""


class PushConnection:
    """Connection to one server, for pushes and queries.

    The constructor connects.  Every method passes errors of the client library unchanged, for `error_kind`.

    Args:
        endpoint: Endpoint of the server.
        timeout: Seconds to wait for each answer.
        on_push: Receives every push, also those that arrive before the answer to a query.

    Attributes:
        is_tracking: Whether the server also pushes changes of the keys that `query` has read.
        tracking_refusal: Reason why the server does not.
        server_version: Name and version of the server, empty if unknown.

    Raises:
        PushUnavailableError: The class of the client's connections cannot be used here.
    """

    def __init__(self, endpoint: Endpoint, timeout: float, on_push: Callable[[Push], None]) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._on_push = on_push
        self._connections: list[Any] = []
        self._query_connection: Any = None
        self.is_tracking = False
        self.tracking_refusal = ""
        self.server_version = ""
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
        """How changes arrive on the connection."""
        return PushMode("tracking" if self.is_tracking else "channel", 3 if self._is_single else 2, self.server_version)

    @property
    def reports_changes_in_order(self) -> bool:
        """Whether each change of a tracked key is pushed before the answers to later queries."""
        return self.is_tracking and self._is_single

    def subscribe(self, channels: Sequence[str]) -> None:
        """Subscribe channels, and wait until the server has confirmed each.

        Raises:
            PushUnavailableError: The server refuses, or has no channels.
        """
        refused = self._confirm("SUBSCRIBE", channels)
        if refused is not None:
            raise refusal_of(refused)

    def unsubscribe(self, channels: Sequence[str]) -> None:
        """Unsubscribe channels.  If the server refuses, their pushes continue to arrive, and are ignored."""
        self._confirm("UNSUBSCRIBE", channels)

    def _confirm(self, command: str, channels: Sequence[str]) -> Exception | None:
        """Wait until the server has confirmed each channel, or return the error that it has answered."""
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
        """Send commands in one batch, and return their answers.  An error that the server answers is a value."""
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
        """Verify with the Sentinels that the server is the master, and send a PING where no query is sent.

        A demoted master keeps its connections for seconds.  During that time it forwards what is published on the new
        master, unless it is cut off from the new one.

        Returns:
            Whether a PING was sent.  Its answer arrives as a push of the kind ``pong``.

        Raises:
            ConnectionResetError: The Sentinels name another master.
        """
        with deadline(self._timeout):
            verify_master(self._endpoint, self._query_connection)
        if self._is_single:
            return False
        self._send(self._push_connection, [("PING",)])
        return True

    def receive(self, seconds: float) -> None:
        """Wait for a push, then receive all that have arrived: one change may cause several.

        Args:
            seconds: Longest wait for the first push, seconds.
        """
        for _ in range(PUSHES_PER_TURN_MAX):
            self._check()
            if not self._push_connection.can_read(timeout=seconds):
                break
            push = self._read(self._push_connection)
            if not isinstance(push, list):
                # No query was sent.  A server sends an error before it closes a connection.
                raise refusal_of(push)
            self._on_push(Push(push))
            seconds = 0

    def close(self) -> None:
        """Close the connection."""
        for connection in self._connections:
            with contextlib.suppress(Exception):
                connection.disconnect()

    def _connect(self, endpoint: Endpoint, **arguments: Any) -> Any:
        connection = endpoint.connect(timeout=self._timeout, **arguments)
        self._connections.append(connection)
        return connection

    def _connect_resp2(self, endpoint: Endpoint) -> Any:
        try:
            return self._connect(endpoint, protocol=2)
        except TypeError:
            pass  # redis-py before 5 speaks RESP2 only, and does not accept the argument.
        try:
            return self._connect(endpoint)
        except TypeError as error:
            msg = f"no connection like those of the client can be made: {error}"
            raise PushUnavailableError(msg) from error

    def _connect_resp3(self, endpoint: Endpoint) -> Any:
        """Connect with RESP3, whatever protocol the client uses.

        Returns:
            The connection, ``None`` if the library or the server does not support RESP3.
        """
        try:
            connection = self._connect(endpoint, protocol=3)
        except Exception as error:  # noqa: BLE001
            # redis-py before 5, a server without HELLO and a proxy without HELLO each raise another error.  A server
            # that is unreachable fails again when RESP2 is tried.
            self.tracking_refusal = f"no RESP3: {error}"
            return None
        if CONNECT_HOOK_ARGUMENTS & endpoint.connection_arguments.keys() and not self._speaks_resp3(connection):
            self.tracking_refusal = "no RESP3: the client's connect function has not requested it"
            self._connections.remove(connection)
            connection.disconnect()
            return None
        if _enable_push_marks(connection):
            return connection
        self.tracking_refusal = "no RESP3: the client library does not distinguish pushes from answers"
        # redis-py 5 with hiredis would return pushes as answers.
        self._connections.remove(connection)
        connection.disconnect()
        return None

    def _speaks_resp3(self, connection: Any) -> bool:
        """Return whether a connection made by a user's function uses RESP3: RESP2 has no dictionaries."""
        self._send(connection, [("HELLO",)])
        return isinstance(self._read(connection), dict)

    def _set_up(self) -> None:
        for connection in self._connections:
            # A user of the server may have no right to CLIENT.  The connection works without its name and tracking.
            self._send(connection, [("CLIENT", "SETNAME", CONNECTION_NAME)])
            self._read(connection)
        if self._is_single:
            (answer,) = self.query([("CLIENT", "TRACKING", "ON", "OPTOUT")])
            self.is_tracking = not is_instance_of_named(answer, "ResponseError")
            self.tracking_refusal = "" if self.is_tracking else str(answer)
        self._send(self._query_connection, [("HELLO",)])
        self.server_version = _parse_server_version(self._read(self._query_connection))

    def _current_sockets(self) -> list[Any]:
        return [getattr(connection, "_sock", None) for connection in self._connections]

    def _check(self) -> None:
        if self._current_sockets() != self._sockets:
            msg = "the client library has replaced a connection"
            raise ConnectionResetError(msg)

    def _send(self, connection: Any, commands: list[tuple[Any, ...]]) -> None:
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)

    def _read(self, connection: Any) -> Any:
        """Return the next answer or push.  An error that the server answers is a value."""
        try:
            if connection is self._query_connection and self._is_single:
                return connection.read_response(push_request=True)
            return connection.read_response()
        except Exception as error:
            if is_instance_of_named(error, "ResponseError"):
                return error
            raise


def _enable_push_marks(connection: Any) -> bool:
    """Have the parser return pushes as `Push`, and return whether it can.  Otherwise, it returns pushes as answers."""
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
    """Return the error to raise for an unexpected answer: `PushUnavailableError` for a lasting refusal."""
    if any(
        is_instance_of_named(answer, name) for name in ("NoPermissionError", "ClusterCrossSlotError")
    ) or is_unsupported_command(answer):
        return PushUnavailableError(str(answer))
    return answer if isinstance(answer, Exception) else ConnectionError(f"unexpected answer: {answer!r}")


def _parse_server_version(hello: Any) -> str:
    """Return name and version of a server from its answer to HELLO: a dictionary, with RESP2 a list, or an error."""
    if isinstance(hello, list):
        hello = dict(zip(hello[::2], hello[1::2], strict=False))
    items = hello.items() if isinstance(hello, dict) else ()
    values = {_text(name): _text(value) for name, value in items}
    return f"{values.get('server', '')} {values.get('version', '')}".strip()


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
