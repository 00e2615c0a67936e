"""Bounds that the package promises, compared with measured figures."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.figures import short, table


class Bounds:
    """Promised bounds of one benchmark.

    Args:
        show: Function that adds a table to the summary of the run.
        are_enforced: Whether `check` fails if a figure exceeds its bound.
    """

    def __init__(self, show: Callable[[str], None], *, are_enforced: bool) -> None:
        self._show = show
        self._are_enforced = are_enforced
        self._compared: list[tuple[str, float, float]] = []
        self._floors: dict[str, float] = {}

    def at_most(self, what: str, measured: float, limit: float, *, floor: float = 0.0) -> None:
        """Add a figure that must not exceed a limit.

        Args:
            what: Name of the figure.
            measured: The figure.
            limit: Promised bound.
            floor: Least value that was measured on this machine for any code that does the work.  A bound below is
                shown, and not enforced.
        """
        self._compared.append((what, measured, limit))
        self._floors[what] = floor

    def check(self, title: str) -> None:
        """Show all figures with their bounds, and compare them.

        Raises:
            AssertionError: A figure exceeds its bound, and bounds are enforced.
        """
        rows = [
            [what, short(measured), short(limit), "yes" if measured <= limit else "NO"]
            for what, measured, limit in self._compared
        ]
        self._show(table(title, ["", "measured", "at most", "holds"], rows))
        exceeded = [what for what, measured, limit in self._compared if measured > limit >= self._floors[what]]
        assert not (exceeded and self._are_enforced), f"{title}: exceeded by {', '.join(exceeded)}"
