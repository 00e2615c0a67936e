"""The dependency: a small HTTP server that fails when it is told to, and reports every call that reaches it.

Run as ``python -m pybreaker_redis.cli.demo.dependency``.  Standard input says ``up``, ``down`` or ``hanging``; its end
ends the process.

Knows: HTTP, its own health, what its callers call themselves.  Does not know: breakers, circuits.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pybreaker_redis.cli.demo.events import Event, emit

#: What its reports are signed with.
NAME = "dependency"

#: Seconds that an answer takes.  A sick dependency is slow, which is half of the harm it does.
ANSWER_DELAY_S = {"up": 0.005, "down": 0.1, "hanging": 3600.0}


class Dependency(ThreadingHTTPServer):
    """Answers 200 while it is up and 503 while it is down; while it hangs, nobody waits for the answer."""

    daemon_threads = True
    health = "up"


class DependencyHandler(BaseHTTPRequestHandler):
    """One call."""

    def do_GET(self) -> None:
        """Report the call, take the time, answer unless the caller has given up or died."""
        assert isinstance(self.server, Dependency)
        health, caller = self.server.health, self.headers["User-Agent"]
        emit(Event(NAME, "reached", time.monotonic(), state=health, caller=caller))
        # A caller has nothing more to say; what can be read before it has its answer is the end of the connection.
        gone, _, _ = select.select([self.connection], [], [], ANSWER_DELAY_S[health])
        # Before the answer: the call that an answer makes possible must not seem to have come before this one's end.
        emit(Event(NAME, "left", time.monotonic(), state=health, caller=caller))
        if not gone:
            self.send_response(200 if health == "up" else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing: the reports say it."""


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
