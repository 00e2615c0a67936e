"""Management command ``breakers``: shows the project's circuits, and opens, closes, half-opens or resets them."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from pybreaker_redis.contrib._commands import COMMAND_ACTIONS, CommandRefusedError, run_command
from pybreaker_redis.contrib.django import breakers


class Command(BaseCommand):
    """Command that shows or changes the circuits of ``PYBREAKER["BREAKERS"]``."""

    help = "Shows the circuits of PYBREAKER['BREAKERS'], or opens, closes, half-opens or resets some of them."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the action and the names of the circuits."""
        parser.add_argument("action", nargs="?", default=COMMAND_ACTIONS[0], choices=COMMAND_ACTIONS)
        parser.add_argument("names", nargs="*", metavar="circuit")

    def handle(self, *_: Any, action: str, names: list[str], **options: Any) -> str:
        """Carry out the action, and return the status table to print.

        Raises:
            CommandError: The action failed.
        """
        try:
            return run_command(breakers.registry, action, names)
        except CommandRefusedError as error:
            raise CommandError(str(error)) from error
