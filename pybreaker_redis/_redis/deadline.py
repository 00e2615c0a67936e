"""How long may this still take?

Knows: the running operation's deadline, sockets, connection classes of redis-py and its kin.  Does not know: what the
operation is.

A socket's timeout begins anew with every piece that arrives, and with every answer of a handshake: a server that sends
a byte now and then, or answers each of five questions slowly, is waited for many times as long as was meant.  So the
sockets made here look at one deadline for all of an operation: connecting, authenticating, sending, receiving.

Looking up the host's name is the one thing that has no deadline: the system's resolver takes none.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import ssl
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import is_interruption

_Result = TypeVar("_Result")

_DEADLINE_PASSED = "the deadline has passed"

#: Seconds that an operation gets once more, if its time is over when something is to be sent: whoever has answered all
#: that was asked was not slow, this process was, as with many busy threads; no reason to take the server for away.
SEND_GRACE_S = 0.05


class LostConnection(enum.Enum):
    """How a connection that had been used before turned out to be gone, without a byte of an answer."""

    UNSENT = "unsent"
    """The command could not be sent: nothing was done."""
    UNANSWERED = "unanswered"
    """It was sent, and the connection reset: most likely nothing was done."""


@dataclass(slots=True)
class _Deadline:
    until: float
    has_used_grace: bool = False
    lost: LostConnection | None = None
    #: What was raised into a wait of this operation from outside; a client library may have swallowed it.
    interruption: Exception | None = None


_current: ContextVar[_Deadline | None] = ContextVar("deadline of an operation", default=None)


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Whatever is done on deadlined connections meanwhile ends within so many seconds.

    Args:
        seconds: From now on; ``None``: no deadline but the connection's own timeouts.

    Raises:
        Exception: What was raised into a wait from outside meanwhile, whatever the client library has made of it.
    """
    current = None if seconds is None else _Deadline(monotonic() + seconds)
    token = _current.set(current)
    try:
        yield
    except Exception as error:
        if current is not None and current.interruption not in (None, error):
            raise current.interruption  # noqa: B904 (its own cause stays)
        raise
    else:
        if current is not None and current.interruption is not None:
            raise current.interruption
    finally:
        _current.reset(token)


def seconds_left() -> float | None:
    """Until the deadline, zero if it has passed; ``None`` if there is none."""
    current = _current.get()
    return None if current is None else max(0.0, current.until - monotonic())


def take_lost_connection() -> LostConnection | None:
    """Return how a reused connection was lost in the operation that runs, once; ``None``: none was."""
    current = _current.get()
    if current is None:
        return None
    drop, current.lost = current.lost, None
    return drop


class DeadlineSocket:
    """A connected socket that keeps the deadline of whatever is done with it; all else is the socket's own.

    Args:
        wrapped: The socket, plain or TLS.
        given: Seconds to wait where there is no deadline; ``None``: without end.
        longest: Seconds to wait for a single piece, deadline or not.

    Attributes:
        used_at: When something was sent last, or when it was connected, monotonic seconds.
        is_reused: Whether it was used before, and nothing has been received since it was taken again.
    """

    def __init__(self, wrapped: socket.socket, given: float | None, longest: float | None) -> None:
        self._wrapped = wrapped
        self._longest = longest
        self._given = given
        self.used_at = monotonic()
        self.is_reused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def settimeout(self, seconds: float | None) -> None:
        self._given = seconds
        self._wrapped.settimeout(seconds)

    def recv(self, *arguments: Any) -> bytes:
        received = self._run_in_time(LostConnection.UNANSWERED, self._wrapped.recv, *arguments)
        self._note_received(bool(received))
        return received

    def recv_into(self, *arguments: Any) -> int:
        received = self._run_in_time(LostConnection.UNANSWERED, self._wrapped.recv_into, *arguments)
        self._note_received(bool(received))
        return received

    def _note_received(self, anything: bool) -> None:
        if self.is_reused:
            if not anything:
                self._note_lost(LostConnection.UNANSWERED)
            self.is_reused = False

    def _note_lost(self, drop: LostConnection) -> None:
        if self.is_reused and (current := _current.get()) is not None:
            current.lost = drop

    def sendall(self, *arguments: Any) -> None:
        current = _current.get()
        if current is not None and not seconds_left():
            if current.has_used_grace:
                # Whoever asked has given up: what is not sent is not done either.
                raise TimeoutError(_DEADLINE_PASSED)
            current.until, current.has_used_grace = monotonic() + SEND_GRACE_S, True
        self.used_at = monotonic()
        self._run_in_time(LostConnection.UNSENT, self._wrapped.sendall, *arguments)

    def _run_in_time(self, drop: LostConnection, operation: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do something with the socket by the deadline, without a context manager: each call does it three times.

        What is there already is taken even when the time is over: then it was not the peer who was slow.
        """
        left = seconds_left()
        if left is None or self._given == 0:
            self._wrapped.settimeout(self._given)
            return operation(*arguments)
        self._wrapped.settimeout(_wait_limit(left, self._longest))
        try:
            return operation(*arguments)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            _note_interruption(error)
            raise TimeoutError(_DEADLINE_PASSED) from error
        except Exception as error:
            _note_interruption(error)
            if isinstance(error, ConnectionError | ssl.SSLError):
                self._note_lost(drop)
            raise


class _ReusableConnection:
    """What a connection does before it is connected, and when its pool hands it out again.

    Args:
        credentials: Its method ``now`` returns those to connect with, by their words; ``None``: those that were given.
        idle_limit: Seconds of silence after which a connection is replaced by a new one; ``None``: never.
    """

    def __init__(self, *arguments: Any, credentials: Any = None, idle_limit: float | None = None, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self._credentials = credentials
        self._longest_idle = idle_limit

    def connect(self, *arguments: Any, **words: Any) -> None:
        """Connect if need be; pools call this whenever they hand out a connection."""
        made = getattr(self, "_sock", None)
        if isinstance(made, DeadlineSocket):
            if self._longest_idle is not None and monotonic() - made.used_at > self._longest_idle:
                cast("Any", self).disconnect()
            else:
                made.is_reused = True
        cast("Any", super()).connect(*arguments, **words)

    def _connect(self) -> Any:
        for name, value in (self._credentials.read_credentials() if self._credentials else {}).items():
            # redis-py before 4.3 has no providers.
            if hasattr(self, name):
                setattr(self, name, value)
        take_lost_connection()
        return cast("Any", super())._connect()  # noqa: SLF001


def _note_interruption(error: Exception) -> None:
    """Note what is raised into a wait from outside: Sentinels' clients go on with the next one after an `OSError`."""
    current = _current.get()
    if current is not None and is_interruption(error):
        current.interruption = error


@cache
def keep_deadlines(connection_class: type[Any], longest: float | None = None) -> type[Any]:
    """The same kind of connection, keeping deadlines.

    Args:
        connection_class: Of redis-py or its kin.
        longest: Seconds to wait for a single piece, deadline or not: where others are asked if one does not answer.

    Returns:
        A class that takes two words more: ``credentials``, which has the method ``now`` that returns those to connect
        with by their words, and ``idle_limit``, seconds after which a connection is not used again.
    """

    def left_or(given: float | None) -> float | None:
        left = seconds_left()
        # A timeout of zero would mean not to wait at all.
        return given if left is None else max(0.001, _wait_limit(left, longest))

    class Deadlined(_ReusableConnection, connection_class):  # type: ignore[misc]
        # One name has many addresses, and TLS begins when TCP is done: what is left is looked up each time.  The names
        # that the values are kept under are redis-py's own, from 8 on.
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

        def connect(self, *arguments: Any, **words: Any) -> None:
            try:
                super().connect(*arguments, **words)
            except BaseException:
                # A handshake that was not finished, by whatever ended it: the next one begins on a new connection.
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
