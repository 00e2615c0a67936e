"""The dependency: a small HTTP server that fails when it is told to, and reports every call that reaches it.

Run as ``python -m pybreaker_redis._demo.dependency``.  Standard input says ``up`` or ``down``; its end ends the
process.

Knows: HTTP, its own health.  Does not know: breakers, circuits, who calls.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pybreaker_redis._demo.events import Event, emit

#: What its reports are signed with.
NAME = "dependency"

#: Seconds that an answer takes.  A sick dependency is slow, which is half of the harm it does.
DELAY = {"up": 0.005, "down": 0.1}


class Dependency(ThreadingHTTPServer):
    """Answers 200 while it is up and 503 while it is down."""

    daemon_threads = True
    health = "up"


class Answer(BaseHTTPRequestHandler):
    """One call."""

    def do_GET(self) -> None:
        """Count the call, take the time, answer."""
        assert isinstance(self.server, Dependency)
        health = self.server.health
        emit(Event(NAME, "reached", time.monotonic(), state=health))
        time.sleep(DELAY[health])
        self.send_response(200 if health == "up" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing: the reports say it."""


def main() -> None:
    """Serve until standard input ends."""
    with Dependency(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        emit(Event(NAME, "ready", time.monotonic(), port=server.server_port))
        for line in sys.stdin:
            server.health = line.strip()
            emit(Event(NAME, "health", time.monotonic(), state=server.health))
        server.shutdown()


if __name__ == "__main__":
    main()
