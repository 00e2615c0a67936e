"""Deadlines of whole operations on connections of redis-py and similar libraries.

A socket's timeout begins again with every piece that arrives, and with every reply of a handshake.  A server that sends
a byte now and then can therefore exceed the timeout many times.  The sockets of this module keep one deadline for a
whole operation: connecting, authenticating, sending and receiving.

The lookup of the host's name has no deadline, because the system's resolver accepts none.
"""

from __future__ import annotations

import enum
import socket
import ssl
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, TypeVar, cast

from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import is_interruption

_Result = TypeVar("_Result")

_DEADLINE_PASSED = "the deadline has passed"

#: Extra seconds of an operation, once, if the deadline has passed before a command is sent.  The server has answered
#: all commands so far, so this process is slow, as with many busy threads, and the server is not unreachable.
SEND_GRACE_S = 0.05


#: Seconds of silence after which a connection is checked before its next use, as pools of redis-py always do.
DOUBT_AFTER_S = 0.05

#: Difference from which on a socket gets another timeout, seconds.
TIMEOUT_RESOLUTION_S = 0.001


class LostConnection(enum.Enum):
    """Way in which a reused connection turned out to be lost, before a byte of a reply."""

    UNSENT = "unsent"
    """The command could not be sent: the server has executed nothing."""
    UNANSWERED = "unanswered"
    """The command was sent, and the connection was reset: most likely the server has executed nothing."""


@dataclass(slots=True)
class _Deadline:
    until: float
    has_used_grace: bool = False
    lost: LostConnection | None = None
    #: Interruption of a wait of this operation, which a client library may have suppressed.
    interruption: Exception | None = None


_current: ContextVar[_Deadline | None] = ContextVar("deadline of an operation", default=None)


class deadline:  # noqa: N801 (used like a function)
    """Limit the time of all operations in the block on connections that keep deadlines.

    An interruption of a wait in the block is raised in place of the error that the client library made of it.  A class,
    because a generator would take three times as long, and each failed call has a deadline.

    Args:
        seconds: Seconds from now on (``None``: no deadline, only the timeouts of the connections).
    """

    __slots__ = ("_deadline", "_token")

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else _Deadline(monotonic() + seconds)

    def __enter__(self) -> None:
        self._token = _current.set(self._deadline)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        interruption = None if self._deadline is None else self._deadline.interruption
        if interruption is None or interruption is error or not (error is None or isinstance(error, Exception)):
            return
        raise interruption


def seconds_left() -> float | None:
    """Return the seconds until the deadline, 0 if the deadline has passed (``None``: no deadline)."""
    current = _current.get()
    return None if current is None else max(0.0, current.until - monotonic())


def take_lost_connection() -> LostConnection | None:
    """Return how a reused connection was lost in the present operation, and forget that (``None``: none was lost)."""
    current = _current.get()
    if current is None:
        return None
    lost, current.lost = current.lost, None
    return lost


class DeadlineSocket:
    """Connected socket that keeps the deadline of the present operation, and delegates all other methods.

    Args:
        wrapped: The socket, plain or TLS.
        given: Seconds to wait without a deadline (``None``: without end).
        longest: Seconds to wait for a single piece, with or without a deadline (``None``: no such limit).

    Attributes:
        used_at: Time of the last sending, or of the connection, monotonic seconds.
        is_reused: Whether the pool has handed out the connection again, and nothing was received since.
    """

    def __init__(self, wrapped: socket.socket, given: float | None, longest: float | None) -> None:
        self._wrapped = wrapped
        self._longest = longest
        self._given = given
        #: Timeout of the socket (-1: unknown).
        self._limit: float | None = -1
        self.used_at = monotonic()
        self.is_reused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def settimeout(self, seconds: float | None) -> None:
        self._given = seconds
        self._wrapped.settimeout(seconds)
        self._limit = seconds

    def _limit_wait(self, seconds: float | None) -> None:
        # Each change is a system call.
        before = self._limit
        if not seconds or not before or abs(seconds - before) > TIMEOUT_RESOLUTION_S:
            self._wrapped.settimeout(seconds)
            self._limit = seconds

    def recv(self, *arguments: Any) -> bytes:
        received = self._run_in_time(LostConnection.UNANSWERED, self._wrapped.recv, *arguments)
        self._note_received(bool(received))
        return received

    def recv_into(self, *arguments: Any) -> int:
        received = self._run_in_time(LostConnection.UNANSWERED, self._wrapped.recv_into, *arguments)
        self._note_received(bool(received))
        return received

    def _note_received(self, is_data: bool) -> None:
        if self.is_reused:
            if not is_data:
                self._note_lost(LostConnection.UNANSWERED)
            self.is_reused = False

    def _note_lost(self, lost: LostConnection) -> None:
        if self.is_reused and (current := _current.get()) is not None:
            current.lost = lost

    def sendall(self, *arguments: Any) -> None:
        current, now = _current.get(), monotonic()
        if current is not None and current.until <= now:
            if current.has_used_grace:
                # The caller has given up, and an unsent command is not executed.
                raise TimeoutError(_DEADLINE_PASSED)
            current.until, current.has_used_grace = now + SEND_GRACE_S, True
        self.used_at = now
        self._run_in_time(LostConnection.UNSENT, self._wrapped.sendall, *arguments)

    def _run_in_time(self, lost: LostConnection, operation: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run an operation of the socket by the deadline.

        Data that have arrived are received even after the deadline, because then this process was slow.  A context
        manager would cost too much, because each guarded call runs three operations.
        """
        current = _current.get()
        if current is None or self._given == 0:
            self._limit_wait(self._given)
            return operation(*arguments)
        self._limit_wait(_wait_limit(max(0.0, current.until - monotonic()), self._longest))
        try:
            return operation(*arguments)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            _note_interruption(error)
            raise TimeoutError(_DEADLINE_PASSED) from error
        except Exception as error:
            _note_interruption(error)
            if isinstance(error, ConnectionError | ssl.SSLError):
                self._note_lost(lost)
            raise


class _ReusableConnection:
    """Part of a connection class that reads the present credentials, and replaces connections that were idle.

    Args:
        credentials: Source of the credentials, see `pool.Credentials` (``None``: use the given arguments).
        idle_limit: Seconds of silence after which the connection is replaced (``None``: never).
    """

    def __init__(
        self, *arguments: Any, credentials: Any = None, idle_limit: float | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._credentials = credentials
        self._longest_idle = idle_limit

    def connect(self, *arguments: Any, **options: Any) -> None:
        """Connect, unless the connection is usable.

        Pools call this method whenever they hand out a connection.
        """
        self.reuse()
        cast("Any", super()).connect(*arguments, **options)

    def reuse(self) -> bool:
        """Return whether the connection can be used again.  A connection that was idle for too long is closed."""
        made = getattr(self, "_sock", None)
        if not isinstance(made, DeadlineSocket):
            return False
        if self._longest_idle is not None and monotonic() - made.used_at > self._longest_idle:
            cast("Any", self).disconnect()
            return False
        made.is_reused = True
        return True

    @property
    def is_doubtful(self) -> bool:
        """Whether the connection was silent for a moment, and the server has closed it or has sent something unread."""
        made: Any = getattr(self, "_sock", None)
        if monotonic() - made.used_at < DOUBT_AFTER_S:
            return False
        try:
            return bool(cast("Any", self).can_read())
        except Exception:  # noqa: BLE001
            # Libraries report the end of a connection by different classes.
            return True

    def send_bytes(self, packed: Sequence[bytes]) -> None:
        """Send a packed command, on a connection that `reuse` has found usable.

        Raises:
            OSError: The command could not be sent.
        """
        for part in packed:
            self._sock.sendall(part)  # type: ignore[attr-defined]

    def _connect(self) -> Any:
        for name, value in (self._credentials.read_credentials() if self._credentials else {}).items():
            # redis-py before 4.4 has no credential providers.
            if hasattr(self, name):
                setattr(self, name, value)
        take_lost_connection()
        return cast("Any", super())._connect()  # noqa: SLF001


def _note_interruption(error: Exception) -> None:
    """Note an interruption, because a client of Sentinels suppresses every `OSError` and queries the next one."""
    current = _current.get()
    if current is not None and is_interruption(error):
        current.interruption = error


@cache
def keep_deadlines(connection_class: type[Any], longest: float | None = None) -> type[Any]:
    """Return a subclass of a connection class that keeps deadlines.

    Args:
        connection_class: Class of redis-py or a similar library.
        longest: Seconds to wait for a single piece, with or without a deadline, where another server is queried next
            (``None``: no such limit).

    Returns:
        The class, see `_ReusableConnection` for its additional arguments.
    """

    def left_or(given: float | None) -> float | None:
        left = seconds_left()
        # A timeout of zero would make the socket non-blocking.
        return given if left is None else max(0.001, _wait_limit(left, longest))

    class Deadlined(_ReusableConnection, connection_class):  # type: ignore[misc]
        # A connection may try several addresses and then start TLS, so each step reads the remaining time.  The
        # names of the attributes are those of redis-py 8.
        _socket_timeout: float | None = None
        _socket_connect_timeout: float | None = None

        @property
        def socket_timeout(self) -> float | None:
            return left_or(self._socket_timeout)

        @socket_timeout.setter
        def socket_timeout(self, seconds: float | None) -> None:
            self._socket_timeout = seconds

        @property
        def socket_connect_timeout(self) -> float | None:
            return left_or(self._socket_connect_timeout)

        @socket_connect_timeout.setter
        def socket_connect_timeout(self, seconds: float | None) -> None:
            self._socket_connect_timeout = seconds

        def connect(self, *arguments: Any, **options: Any) -> None:
            try:
                super().connect(*arguments, **options)
            except BaseException:
                # The handshake is incomplete, so the next operation needs a new connection.
                self.disconnect()
                raise

        def _connect(self) -> Any:
            try:
                connected = super()._connect()
            except Exception as error:
                _note_interruption(error)
                raise
            return DeadlineSocket(connected, self._socket_timeout, longest)

    Deadlined.__name__ = Deadlined.__qualname__ = connection_class.__name__
    return Deadlined


def _wait_limit(left: float, longest: float | None) -> float:
    return left if longest is None else min(left, longest)
