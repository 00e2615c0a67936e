"""Percentiles of measurements, and tables of figures in reStructuredText."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest of `values` that is not exceeded by so many percent of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values.

    Attributes:
        median: Value that half of the values exceed.
        low: Value that three quarters of the values exceed.
        high: Value that a quarter of the values exceeds.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of some values."""
        values = list(values)
        return cls(percentile(values, 50), percentile(values, 25), percentile(values, 75))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


def ratio(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Return the spread of the ratios of two series that were measured in turn."""
    return Spread.of(own / other for own, other in zip(values, others, strict=True))


def short(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> str:
    """Return a table in reStructuredText with a title above and notes below."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    parts = [f"{title}:", "\n".join([rule, text[0], rule, *text[1:], rule]), *notes]
    return "\n\n".join(parts) + "\n"
