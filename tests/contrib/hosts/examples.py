"""The examples under their servers, and the service that they depend on."""

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

#: Seconds that the service needs to fail: long compared with a rejection.
SLOW = 0.25

#: Outcomes by the status of a web example's answer.
OUTCOMES = {HTTPStatus.OK: "ok", HTTPStatus.BAD_GATEWAY: "failed", HTTPStatus.SERVICE_UNAVAILABLE: "rejected"}


class Payments(http.server.ThreadingHTTPServer):
    """Service that the examples call, with its condition: ``up``, ``down`` or ``held``, which keeps calls waiting."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.condition = "up"
        self.visited: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self) -> Payments:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.condition = "down"
        self.shutdown()
        self.server_close()

    def since(self, at: float) -> list[float]:
        """Return the monotonic times of the calls since such a time."""
        return [visited for visited in self.visited if visited >= at]

    def handle_error(self, *_: object) -> None:
        """Ignore errors of callers that give up or are killed."""


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Record the visit, then answer by the condition."""
        assert isinstance(self.server, Payments)
        self.server.visited.append(time.monotonic())
        while self.server.condition == "held":
            time.sleep(0.01)
        up = self.server.condition == "up"
        if not up:
            time.sleep(SLOW)
        body = b"receipt" if up else b""
        self.send_response(HTTPStatus.OK if up else HTTPStatus.INTERNAL_SERVER_ERROR)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


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


#: Examples that are called by HTTP.
WEB = (
    _gunicorn("django_shop", "wsgi", "sync"),
    _gunicorn("flask_api", "app:create_app()", "gthread", "--threads", "4"),
)

#: Command of the example that is called through a broker.
CELERY = (
    *(sys.executable, "-m", "celery", "--workdir", "examples/celery_tasks", "--app", "tasks", "worker"),
    *("--pool", "prefork", "--concurrency", "4", "--loglevel", "INFO"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)


class _ExampleDoor(HttpDoor):
    def request(self, what: str) -> dict[str, Any]:
        """Return the worker and the outcome of a request, and raise an error for an error page."""
        response, body = self.get("pay" if what == "call" else "ready")
        outcome = OUTCOMES.get(HTTPStatus(response.status))
        if outcome is None:
            raise NoAnswer(f"{response.status}: {body}")
        if outcome == "rejected" and (int(response.headers["Retry-After"]) < 1 or "payments" in body):
            raise NoAnswer(f"an incomplete rejection: {response.headers.items()}, {body}")
        return {"pid": int(response.headers["X-Worker"]), "outcome": outcome}


class Example(Shop):
    """Example under gunicorn.

    Args:
        kind: Kind of the host.
        server: Server that holds the circuit.
        directory: Directory for logs.
        payments: Service that the example depends on.
        reset_timeout: Reset timeout of the circuit, seconds.
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

    def set_dependency(self, condition: str) -> float:
        """Set the dependency to ``up``, ``down`` or ``held``, and return the monotonic time of the change."""
        self._payments.condition = condition
        return time.monotonic()

    def visits(self, since: float) -> list[Visit]:
        """Return the calls that reached the dependency since a monotonic time, without their processes."""
        return [Visit(0, began) for began in self._payments.since(since)]


def environment(server: PrivateServer, payments: Payments, reset_timeout: float) -> dict[str, str]:
    """Return the environment variables of the examples."""
    return {"REDIS_URL": server.url, "PAYMENTS_URL": payments.url, "RESET_TIMEOUT": str(reset_timeout)}
