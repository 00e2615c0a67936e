"""How the demo looks: plain lines here, a live table in ``live``.

Knows: events, a terminal.  Does not know: processes, acts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pybreaker_redis.cli.demo.events import Event

#: Seconds between two lines with figures in plain output.
FIGURES_INTERVAL_S = 1.0


@dataclass
class Tally:
    """What one worker has seen so far."""

    #: Of its circuit; or ``killed``.
    state: str = "closed"
    #: Whether it goes by a circuit of its own, because it found the server away.
    uses_local_state: bool = False
    success: int = 0
    failure: int = 0
    rejected: int = 0
    leaked: int = 0
    #: Seconds that the last call took.
    took: float = 0.0

    @property
    def circuit(self) -> str:
        """Its state, and whose it is if that is not everybody's."""
        return f"{self.state} (its own)" if self.uses_local_state else self.state


class Display(ABC):
    """A way to show the demo; a context manager."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tallies: dict[str, Tally] = {}
        #: Calls that reached the dependency, by its health.
        self._reached = {"up": 0, "down": 0, "hanging": 0}
        #: Workers whose calls are at the dependency at this moment.
        self._there: set[str] = set()

    @abstractmethod
    def __enter__(self) -> Display: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def print_line(self, text: str) -> None:
        """Show a line that stays."""

    def _workers_at_dependency(self) -> str:
        # A copy, because somebody may come or go meanwhile.
        return ", ".join(sorted(self._there.copy())) or "nobody"

    def event(self, event: Event) -> None:
        """Count what happened; a change of state is a line of its own."""
        if event.kind == "reached":
            self._reached[event.state] += 1
            self._there.add(event.caller)
        elif event.kind == "left":
            self._there.discard(event.caller)
        elif event.kind == "server":
            self._happened(event, event.state)
        elif event.kind in ("away", "back"):
            tally = self._tallies.setdefault(event.source, Tally())
            tally.uses_local_state = event.kind == "away"
            self._happened(
                event,
                "the server is away, goes by its own circuit"
                if tally.uses_local_state
                else "goes by the shared circuit again",
            )
        elif event.kind not in ("ready", "health"):
            tally = self._tallies.setdefault(event.source, Tally())
            tally.state = event.state
            if event.kind in ("state", "killed"):
                self._happened(event, tally.circuit)
            else:
                setattr(tally, event.kind, getattr(tally, event.kind) + 1)
                tally.took = event.took

    def _happened(self, event: Event, what: str) -> None:
        self.print_line(f"{event.at - self._start:7.2f} s  {event.source}: {what}")


class PlainLines(Display):
    """Plain lines: what is said, and the figures once a second and in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._next = self._start + FIGURES_INTERVAL_S

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._say_figures(time.monotonic())

    def print_line(self, text: str) -> None:
        """Print it now: somebody may be watching a pipe."""
        print(text, flush=True)

    def event(self, event: Event) -> None:
        """Count it; print the figures if they are due."""
        super().event(event)
        if event.at >= self._next:
            self._next = event.at + FIGURES_INTERVAL_S
            self._say_figures(event.at)

    def _say_figures(self, at: float) -> None:
        figures = [
            f"{name} {tally.circuit}: {tally.success} ok, {tally.failure} failed, {tally.rejected} rejected"
            for name, tally in sorted(self._tallies.items())
        ]
        figures.append(f"at the dependency: {self._workers_at_dependency()}")
        self.print_line(f"{at - self._start:7.2f} s  {' | '.join(figures)}")


def choose_display(*, plain: bool) -> Display:
    """A live table for a person at a terminal, if rich is installed; else plain lines.

    Args:
        plain: Plain lines in any case.
    """
    quiet = plain or os.environ.get("NO_COLOR") or os.environ.get("CI")
    if not quiet and sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from pybreaker_redis.cli.demo.live import LiveTable

        return LiveTable()
    return PlainLines()
