"""Clients with a chosen transport and a chosen parser of replies, within one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import redis
from redis import connection
from redis._parsers import Encoder, _RESP2Parser

from pybreaker_redis.testing.servers import PrivateServer

Transport = Literal["TCP", "unix socket"]
Parser = Literal["hiredis", "Python"]

#: Size from which redis-py sends an argument of a command in a piece of its own, in bytes.
_BUFFER_CUTOFF = 6000


@dataclass(frozen=True)
class Line:
    """Way to a server.

    Attributes:
        transport: Kind of the sockets.
        parser: Parser of the replies.  Commands are packed by the same library.
    """

    transport: Transport
    parser: Parser

    def __str__(self) -> str:
        return f"{self.transport}, {'hiredis' if self.parser == 'hiredis' else 'Python parser'}"

    def missing(self) -> str:
        """Return the reason why the line cannot be used here, or an empty text."""
        return "hiredis is not installed" if self.parser == "hiredis" and not connection.HIREDIS_AVAILABLE else ""

    def connect_to(self, server: PrivateServer) -> Callable[[], redis.Redis]:
        """Return a function that creates a client of a server, which has a port and a unix socket."""
        arguments: dict[str, Any] = {}
        if self.transport == "TCP":
            arguments.update(host="127.0.0.1", port=server.port)
        else:
            arguments.update(path=server.unix_socket, connection_class=connection.UnixDomainSocketConnection)
        if self.parser == "Python":
            # redis-py uses hiredis everywhere if it is installed.  Both arguments together are redis-py without it.
            # With the protocol 3, redis-py replaces this parser by the one for that protocol.
            encode = Encoder("utf-8", "strict", decode_responses=False).encode
            arguments.update(
                parser_class=_RESP2Parser, command_packer=connection.PythonRespSerializer(_BUFFER_CUTOFF, encode)
            )
        return lambda: redis.Redis(connection_pool=redis.ConnectionPool(**arguments))


#: Every line.
LINES = tuple(Line(transport, parser) for transport in ("TCP", "unix socket") for parser in ("hiredis", "Python"))
