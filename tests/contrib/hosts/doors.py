"""Entrances of hosts: HTTP on a unix socket, and tasks on a broker."""

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
    """A request failed: an error of the server, a broken connection, or a timeout."""


class Door(Protocol):
    """Entrance for requests, which many threads may use at once."""

    def request(self, what: str) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            NoAnswer: The request failed.
        """

    def idle(self) -> bool:
        """Return whether the host itself counts every request as answered."""

    def close(self) -> None:
        """Close all connections."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_WITHIN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class HttpDoor:
    """Entrance of a web server on a unix socket, with one connection for each request."""

    def __init__(self, unix_socket: str) -> None:
        self._unix_socket = unix_socket

    def request(self, what: str) -> dict[str, Any]:
        """Send a request and return the answer."""
        response, body = self.get(what)
        if response.status != http.HTTPStatus.OK:
            raise NoAnswer(f"{response.status} {response.reason}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def get(self, path: str) -> tuple[http.client.HTTPResponse, str]:
        """Return a response with any status, and its body.

        Raises:
            NoAnswer: There was no response.
        """
        try:
            with closing(_UnixConnection(self._unix_socket)) as connection:
                connection.request("GET", f"/{path}", headers={"Connection": "close"})
                response = connection.getresponse()
                return response, response.read().decode()
        except (OSError, http.client.HTTPException) as exc:
            raise NoAnswer(f"{type(exc).__name__}: {exc}") from exc

    def idle(self) -> bool:
        """Return True, because a web server's worker may end after its answer."""
        return True

    def close(self) -> None:
        """Do nothing, because no connection is kept open."""


#: Database of Celery's broker.  The circuit is in another one of the same server.
BROKER_DB = 1


def broker_of(server: PrivateServer) -> str:
    """Return the address of Celery's broker."""
    return f"redis+socket://{server.unix_socket}?virtual_host={BROKER_DB}"


class BrokerDoor:
    """Entrance of Celery, where a request is a task that pushes its answer to a list."""

    def __init__(self, server: PrivateServer) -> None:
        from celery import Celery

        self._celery = Celery(broker=broker_of(server))
        self._unacknowledged = server.client(db=BROKER_DB)
        self._client = server.client(socket_timeout=2 * ANSWER_WITHIN)

    def request(self, what: str) -> dict[str, Any]:
        """Send a request and return the answer."""
        reply_to = f"reply:{uuid.uuid4()}"
        self._celery.send_task("tests.contrib.hosts.tasks.answer", (what, reply_to), ignore_result=True)
        reply = self._client.blpop([reply_to], ANSWER_WITHIN)
        if reply is None:
            raise NoAnswer(f"{what}: no answer within {ANSWER_WITHIN:.0f} s")
        answer: dict[str, Any] = json.loads(reply[1])
        return answer

    def idle(self) -> bool:
        """Return whether the broker has an acknowledgement for each task, which may follow the answer."""
        return not self._unacknowledged.hlen("unacked")

    def close(self) -> None:
        """Close all connections."""
        from kombu import pools

        self._celery.close()
        pools.reset()  # global pools, which no other test uses here
        self._client.close()
        self._unacknowledged.close()
