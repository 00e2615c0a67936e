"""Live table of the demo, the only module that needs ``rich``."""

from __future__ import annotations

from rich import box, table, text
from rich.live import Live

from pybreaker_redis.cli.demo.show import Display

COLOURS = {"closed": "green", "open": "bold red", "half-open": "yellow", "killed": "dim"}


class LiveTable(Display):
    """Table with a row per worker, updated in place.  Lines are printed above the table."""

    def __init__(self) -> None:
        super().__init__()
        self._live = Live(get_renderable=self._render, refresh_per_second=10)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the table, or below it once the table is finished."""
        self._live.console.print(text, markup=False, highlight=False)

    def _render(self) -> table.Table:
        grid = table.Table(
            "worker",
            "circuit",
            *(table.Column(name, justify="right") for name in ("succeeded", "failed", "rejected", "last call")),
            box=box.ROUNDED,
            caption=(
                "calls that reached the dependency: "
                f"{self._reached['up']} healthy, {self._reached['down']} dead, {self._reached['hanging']} hanging\n"
                f"there now: {self._workers_at_dependency()}"
            ),
        )
        # Copied, because a thread of rich renders while the demo adds workers.
        for name, tally in sorted(self._tallies.copy().items()):
            grid.add_row(
                name,
                text.Text(tally.circuit, COLOURS[tally.state]),
                *(str(count) for count in (tally.success, tally.failure, tally.rejected)),
                f"{tally.took * 1000:.1f} ms",
            )
        return grid
