"""How do measurements become figures, and figures a table?

Knows: percentiles, RST.  Does not know: what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of `values` that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Spread:
    """A median, and between what bounds the middle half of the values lies.

    Attributes:
        median: Half of the values are below.
        low: A quarter is below.
        high: A quarter is above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values."""
        values = list(values)
        return cls(percentile(values, 50), percentile(values, 25), percentile(values, 75))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


def short(value: float) -> str:
    """With three digits, or all of those before the point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> str:
    """An RST table with a title above and notes below, ready for a page."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    parts = [f"{title}:", "\n".join([rule, text[0], rule, *text[1:], rule]), *notes]
    return "\n\n".join(parts) + "\n"
