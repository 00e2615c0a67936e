"""How are the examples run, and what do they depend on?

Knows: the examples' addresses, environment and answers.  Does not know: pytest, which promise is being tested.
"""

from __future__ import annotations

import http.server
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pybreaker_redis.testing.servers import PrivateServer
from tests.contrib.hosts.doors import Door, HttpDoor, NoAnswer
from tests.contrib.hosts.kinds import Kind
from tests.contrib.hosts.shop import Shop, Visit

#: Seconds that the service needs to fail: long enough to be told from a rejection.
SLOW = 0.25

#: What an answer of a web example means.
OUTCOMES = {HTTPStatus.OK: "ok", HTTPStatus.BAD_GATEWAY: "failed", HTTPStatus.SERVICE_UNAVAILABLE: "rejected"}


class Payments(http.server.ThreadingHTTPServer):
    """The service that the examples call: ``up``, ``down``, or ``held``, which is to wait for another mood."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.mood = "up"
        self.visited: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self) -> Payments:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mood = "down"
        self.shutdown()
        self.server_close()

    def since(self, at: float) -> list[float]:
        """When it was called since a monotonic time."""
        return [visited for visited in self.visited if visited >= at]

    def handle_error(self, *_: object) -> None:
        """A caller that gives up, or is killed, is not this service's business."""


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Note the visit, then do as one is told."""
        assert isinstance(self.server, Payments)
        self.server.visited.append(time.monotonic())
        while self.server.mood == "held":
            time.sleep(0.01)
        up = self.server.mood == "up"
        if not up:
            time.sleep(SLOW)
        body = b"receipt" if up else b""
        self.send_response(HTTPStatus.OK if up else HTTPStatus.INTERNAL_SERVER_ERROR)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _gunicorn(example: str, application: str, worker_class: str, *arguments: str) -> Kind:
    return Kind(
        example,
        (
            *(sys.executable, "-m", "gunicorn", "--chdir", f"examples/{example}", application),
            *(
                "--bind",
                "unix:{socket}",
                "--no-control-socket",
                "--config",
                "python:tests.contrib.hosts.gunicorn_names",
            ),
            *("--workers", "4", "--worker-class", worker_class, *arguments),
        ),
        needs=("gunicorn",),
        workers=4,
    )


#: The examples that are asked by HTTP.
WEB = (
    _gunicorn("django_shop", "wsgi", "sync"),
    _gunicorn("flask_api", "app:create_app()", "gthread", "--threads", "4"),
)

#: The one that is asked by a broker.
CELERY = (
    *(sys.executable, "-m", "celery", "--workdir", "examples/celery_tasks", "--app", "tasks", "worker"),
    *("--pool", "prefork", "--concurrency", "4", "--loglevel", "INFO"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)


class _ExampleDoor(HttpDoor):
    def ask(self, what: str) -> dict[str, Any]:
        """Who has answered what; an error page is no answer."""
        response, body = self.get("pay" if what == "call" else "ready")
        outcome = OUTCOMES.get(HTTPStatus(response.status))
        if outcome is None:
            raise NoAnswer(f"{response.status}: {body}")
        if outcome == "rejected" and (int(response.headers["Retry-After"]) < 1 or "payments" in body):
            raise NoAnswer(f"a rejection that is none: {response.headers.items()}, {body}")
        return {"pid": int(response.headers["X-Worker"]), "outcome": outcome}


class Example(Shop):
    """An example under gunicorn.

    Args:
        kind: Which.
        server: Where the circuit lies.
        directory: For logs.
        payments: What it depends on.
        reset_timeout: Of the circuit, seconds.
    """

    def __init__(
        self, kind: Kind, server: PrivateServer, directory: Path, payments: Payments, *, reset_timeout: float
    ) -> None:
        super().__init__(kind, server, directory, reset_timeout=reset_timeout)
        self._payments = payments

    def _make_door(self, unix_socket: str) -> Door:
        return _ExampleDoor(unix_socket)

    def _environment(self) -> dict[str, str]:
        return environment(self._server, self._payments, self._reset_timeout)

    def set_dependency(self, mood: str) -> float:
        """From now on, which is returned in monotonic seconds, it is ``up``, ``down`` or ``held``."""
        self._payments.mood = mood
        return time.monotonic()

    def visits(self, since: float) -> list[Visit]:
        """The calls that have reached it since a monotonic time; whose they are is not known."""
        return [Visit(0, began) for began in self._payments.since(since)]


def environment(server: PrivateServer, payments: Payments, reset_timeout: float) -> dict[str, str]:
    """What tells the examples where everything is."""
    return {"REDIS_URL": server.url, "PAYMENTS_URL": payments.url, "RESET_TIMEOUT": str(reset_timeout)}
