"""Parser of the command line ``python -m pybreaker_redis``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pybreaker_redis import __version__
from pybreaker_redis.cli.demo.play import play

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("main",)

#: Range of the demo's duration.  A shorter demo is too fast to follow.
DEMO_SECONDS_MIN, DEMO_SECONDS_MAX = 2.0, 600.0

SECONDS_HELP = "approximate duration; the acts need at least about 9 seconds (default: %(default)g)"


def _seconds(text: str) -> float:
    seconds = float(text)
    if not DEMO_SECONDS_MIN <= seconds <= DEMO_SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"must be between {DEMO_SECONDS_MIN:g} and {DEMO_SECONDS_MAX:g}, not {text}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, or print the help if they name none.

    Args:
        arguments: Command line.  The default is the command line of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pybreaker_redis", description="One circuit breaker for many processes, on Redis or Valkey."
    )
    parser.add_argument("--version", action="version", version=f"pybreaker_redis {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    demo = commands.add_parser(
        "demo",
        help="three worker processes share a circuit while their dependency dies, hangs and recovers",
        epilog="The demo starts a private server and stops it at the end.  PYBREAKER_REDIS_URL names another server.",
    )
    demo.add_argument("--seconds", type=_seconds, default=22.0, help=SECONDS_HELP)
    demo.add_argument("--plain", action="store_true", help="plain lines instead of a live table")
    options = parser.parse_args(arguments)
    if options.command == "demo":
        return play(seconds=options.seconds, plain=options.plain)
    parser.print_help()
    return 0
