"""Spare connections of one pool: a stack from which the engine takes connections without the bookkeeping of the pool.

A failed call is one round trip.  In redis-py the hand-out of a connection and the packing of the command take longer in
the caller than the rest.  The stack belongs to no thread, so greenlets and threads that end leave no connection
behind.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

from pybreaker_redis._redis.classify import is_instance_of_named
from pybreaker_redis._runtime import fork
from pybreaker_redis._runtime.fork import ForkSafe

#: Connections on the stack, at most.  The pool has the others, which other commands use.
SPARE_CONNECTIONS_MAX = 8


class SpareConnections(ForkSafe):
    """Stack of connections that were taken from a pool.

    Args:
        pool: Pool of this package: its connections keep deadlines.

    Attributes:
        arguments: Arguments by which the pool hands out a connection.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._spare: list[Any] = []
        #: Connections of the pool that are not in use, and places for new ones.
        self._queue = getattr(pool, "pool", None)
        # redis-py before 5.3 needs the name of the command.
        name = inspect.signature(pool.get_connection).parameters.get("command_name")
        self.arguments = ("EVALSHA",) if name is not None and name.default is inspect.Parameter.empty else ()
        #: Last command, with its bytes: the reports of calls that fail in a row are often the same.
        self._packed: tuple[tuple[Any, ...], Sequence[bytes]] = ((), ())
        super().__init__()

    def _reset_in_child(self) -> None:
        # The sockets are the parent's.
        self._spare = []

    def execute(self, *command: Any) -> Any:
        """Send a command, and return the reply.

        Raises:
            redis.RedisError: An error reply, or no reply.
            OSError: No connection.
        """
        if os.getpid() != fork.process_id:
            fork.renew()
        try:
            # One step, so that no other thread gets the same connection.
            connection = self._spare.pop()
        except IndexError:
            connection = self._pool.get_connection(*self.arguments)
        is_clean = False
        try:
            if not connection.reuse() or connection.is_doubtful:
                connection.disconnect()
                connection.connect()
            connection.send_bytes(self._pack(connection, command))
            reply = connection.read_response()
        except Exception as error:
            is_clean = is_instance_of_named(error, "ResponseError")
            raise
        else:
            is_clean = True
            return reply
        finally:
            if not is_clean:
                # A reply may arrive later, and would be taken for the reply to the next command.
                connection.disconnect()
            self._give_back(connection)

    def _pack(self, connection: Any, command: tuple[Any, ...]) -> Sequence[bytes]:
        last, packed = self._packed
        if last != command:
            packed = connection.pack_command(*command)
            self._packed = command, packed
        return packed

    def _give_back(self, connection: Any) -> None:
        # While the pool has none left, threads may wait for one.
        is_pool_empty = self._queue is not None and self._queue.empty()
        if len(self._spare) < SPARE_CONNECTIONS_MAX and not is_pool_empty:
            self._spare.append(connection)
        else:
            self._pool.release(connection)

    def release_all(self) -> None:
        """Give the spare connections back to the pool."""
        # Other threads take connections meanwhile.
        with contextlib.suppress(IndexError):
            while True:
                self._pool.release(self._spare.pop())


def spare_connections_of(client: Any) -> SpareConnections | None:
    """Return the spare connections of a client (``None`` if its pool has none)."""
    spare = getattr(getattr(client, "connection_pool", None), "spare_connections", None)
    return spare if isinstance(spare, SpareConnections) else None
