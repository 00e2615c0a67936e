"""Dependency of the demo: an HTTP server that fails on command and reports every call.

Run as ``python -m pybreaker_redis.cli.demo.dependency``.  Lines on standard input set its health: ``up``, ``down`` or
``hanging``.  The process ends when standard input ends.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pybreaker_redis.cli.demo.events import Event, emit

#: Source of this process's events.
NAME = "dependency"

#: Seconds until the answer, by health.  A failing dependency is slow, which is half of the harm that it does.
ANSWER_DELAY_S = {"up": 0.005, "down": 0.1, "hanging": 3600.0}


class Dependency(ThreadingHTTPServer):
    """Server that answers 200 while it is up and 503 while it is down.

    Attributes:
        health: ``up``, ``down`` or ``hanging``.  A hanging server answers after all callers have given up.
    """

    daemon_threads = True
    health = "up"


class DependencyHandler(BaseHTTPRequestHandler):
    """Handler of one call."""

    def do_GET(self) -> None:
        """Report the call, wait, and answer unless the caller has closed the connection."""
        assert isinstance(self.server, Dependency)
        health, caller = self.server.health, self.headers["User-Agent"]
        emit(Event(NAME, "reached", time.monotonic(), state=health, caller=caller))
        # The caller sends nothing more, so a readable connection has been closed.
        closed, _, _ = select.select([self.connection], [], [], ANSWER_DELAY_S[health])
        # Reported before the answer, because the answer may admit the next call, which must not be reported first.
        emit(Event(NAME, "left", time.monotonic(), state=health, caller=caller))
        if not closed:
            self.send_response(200 if health == "up" else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing, because events report each call."""


def main() -> None:
    """Serve until standard input ends."""
    with Dependency(("127.0.0.1", 0), DependencyHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        emit(Event(NAME, "ready", time.monotonic(), port=server.server_port))
        for line in sys.stdin:
            server.health = line.strip()
            emit(Event(NAME, "health", time.monotonic(), state=server.health))
        server.shutdown()


if __name__ == "__main__":
    main()
