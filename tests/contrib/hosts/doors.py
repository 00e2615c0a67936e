"""How does a request get into a host, and the answer out?

Knows: HTTP on a unix socket, tasks on a broker.  Does not know: what is asked, processes.
"""

from __future__ import annotations

import http.client
import json
import socket
import uuid
from contextlib import closing
from typing import Any, Protocol

from pybreaker_redis.testing.servers import PrivateServer

#: Seconds that an answer may take.
ANSWER_WITHIN = 30.0


class NoAnswer(Exception):
    """A request failed: an error of the server, a broken connection, or silence."""


class Door(Protocol):
    """Where requests go in; may be used by many threads at once."""

    def ask(self, what: str) -> dict[str, Any]:
        """The answer.

        Raises:
            NoAnswer: There is none.
        """

    def idle(self) -> bool:
        """Whether the host, too, knows that all is answered."""

    def close(self) -> None:
        """No more requests."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_WITHIN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class HttpDoor:
    """A web server's, on a unix socket; each request is a connection of its own."""

    def __init__(self, unix_socket: str) -> None:
        self._unix_socket = unix_socket

    def ask(self, what: str) -> dict[str, Any]:
        """The answer."""
        response, body = self.get(what)
        if response.status != http.HTTPStatus.OK:
            raise NoAnswer(f"{response.status} {response.reason}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def get(self, path: str) -> tuple[http.client.HTTPResponse, str]:
        """A response, whatever its status, and its body.

        Raises:
            NoAnswer: There is none.
        """
        try:
            with closing(_UnixConnection(self._unix_socket)) as connection:
                connection.request("GET", f"/{path}", headers={"Connection": "close"})
                response = connection.getresponse()
                return response, response.read().decode()
        except (OSError, http.client.HTTPException) as exc:
            raise NoAnswer(f"{type(exc).__name__}: {exc}") from exc

    def idle(self) -> bool:
        """When an answer has come, its worker may go."""
        return True

    def close(self) -> None:
        """Nothing is kept open."""


#: The database of Celery's broker; the circuit is in another one of the same server.
BROKER_DB = 1


def broker_of(server: PrivateServer) -> str:
    """The address of Celery's broker."""
    return f"redis+socket://{server.unix_socket}?virtual_host={BROKER_DB}"


class BrokerDoor:
    """Celery's: a request is a task, which leaves its answer in a list."""

    def __init__(self, server: PrivateServer) -> None:
        from celery import Celery

        self._celery = Celery(broker=broker_of(server))
        self._unacknowledged = server.client(db=BROKER_DB)
        self._client = server.client(socket_timeout=2 * ANSWER_WITHIN)

    def ask(self, what: str) -> dict[str, Any]:
        """The answer."""
        reply_to = f"reply:{uuid.uuid4()}"
        self._celery.send_task("tests.contrib.hosts.tasks.answer", (what, reply_to), ignore_result=True)
        reply = self._client.blpop([reply_to], ANSWER_WITHIN)
        if reply is None:
            raise NoAnswer(f"{what}: nobody answered within {ANSWER_WITHIN:.0f} s")
        answer: dict[str, Any] = json.loads(reply[1])
        return answer

    def idle(self) -> bool:
        """A child may have answered before its master has heard that it took the task, and acknowledged that."""
        return not self._unacknowledged.hlen("unacked")

    def close(self) -> None:
        """Give all connections back."""
        from kombu import pools

        self._celery.close()
        pools.reset()  # they are everybody's, and nobody else's here
        self._client.close()
        self._unacknowledged.close()
