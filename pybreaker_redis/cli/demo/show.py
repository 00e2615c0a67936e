"""Terminal output of the demo as plain lines.  The live table is in ``live``."""

from __future__ import annotations

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
    """Counts of one worker so far.

    Attributes:
        state: State of the worker's circuit, or ``killed``.
        uses_local_state: Whether the worker uses its local circuit, because the server is unreachable.
        success: Number of calls that succeeded.
        failure: Number of calls that failed.
        rejected: Number of calls that the circuit rejected.
        leaked: Number of calls that ended with an error of the storage.
        took: Duration of the last call, in seconds.
    """

    state: str = "closed"
    uses_local_state: bool = False
    success: int = 0
    failure: int = 0
    rejected: int = 0
    leaked: int = 0
    took: float = 0.0

    @property
    def circuit(self) -> str:
        """The state of the circuit, and whether the circuit is local."""
        return f"{self.state} (local)" if self.uses_local_state else self.state


class Display(ABC):
    """Output of the demo, as a context manager."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tallies: dict[str, Tally] = {}
        #: Number of calls that reached the dependency, by its health.
        self._reached = {"up": 0, "down": 0, "hanging": 0}
        #: Workers with a call at the dependency at this moment.
        self._at_dependency: set[str] = set()

    @abstractmethod
    def __enter__(self) -> Display: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def print_line(self, text: str) -> None:
        """Print a line that stays visible."""

    def _workers_at_dependency(self) -> str:
        # Copied, because the live table reads the set in another thread.
        return ", ".join(sorted(self._at_dependency.copy())) or "none"

    def add_event(self, event: Event) -> None:
        """Count an event, and print a line if it changes a state."""
        if event.kind == "reached":
            self._reached[event.state] += 1
            self._at_dependency.add(event.caller)
        elif event.kind == "left":
            self._at_dependency.discard(event.caller)
        elif event.kind == "server":
            self._print_change(event, event.state)
        elif event.kind in ("unreachable", "returned"):
            tally = self._tallies.setdefault(event.source, Tally())
            tally.uses_local_state = event.kind == "unreachable"
            self._print_change(
                event,
                "the server is unreachable, uses its local circuit"
                if tally.uses_local_state
                else "uses the shared circuit again",
            )
        elif event.kind not in ("ready", "health"):
            tally = self._tallies.setdefault(event.source, Tally())
            tally.state = event.state
            if event.kind in ("state", "killed"):
                self._print_change(event, tally.circuit)
            else:
                setattr(tally, event.kind, getattr(tally, event.kind) + 1)
                tally.took = event.took

    def _print_change(self, event: Event, change: str) -> None:
        self.print_line(f"{event.at - self._start:7.2f} s  {event.source}: {change}")


class PlainLines(Display):
    """Plain lines: each change of state, and the figures once a second and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._next_figures_at = self._start + FIGURES_INTERVAL_S

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._print_figures(time.monotonic())

    def print_line(self, text: str) -> None:
        """Print a line and flush it, for readers of a pipe."""
        print(text, flush=True)

    def add_event(self, event: Event) -> None:
        """Count an event, and print the figures if they are due."""
        super().add_event(event)
        if event.at >= self._next_figures_at:
            self._next_figures_at = event.at + FIGURES_INTERVAL_S
            self._print_figures(event.at)

    def _print_figures(self, at: float) -> None:
        figures = [
            f"{name} {tally.circuit}: {tally.success} ok, {tally.failure} failed, {tally.rejected} rejected"
            for name, tally in sorted(self._tallies.items())
        ]
        figures.append(f"at the dependency: {self._workers_at_dependency()}")
        self.print_line(f"{at - self._start:7.2f} s  {' | '.join(figures)}")
