"""Chart of the cost of a guarded call: ``python -m benchmarks.chart``.

The chart is drawn from the figures in ``docs/images/calls.json``.  ``--measure`` measures these figures first.
``--check`` writes nothing, and fails if a committed picture differs.  There is one picture for light pages, and one for
dark pages.  Each has a background of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from benchmarks.calls import ACTIONS, race_of
from benchmarks.contenders import HEARD, REFERENCE_HEARD, at_hand
from benchmarks.figures import percentile
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.servers import at_hand as servers_at_hand

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
FIGURES = IMAGES / "calls.json"

#: Rounds, and the duration of a leg in seconds, of a measurement.
ROUNDS, LEG_S = 40, 0.02

#: Width of the picture, left and right end of the scale, in pixels.
WIDTH, LEFT, RIGHT = 800, 230, 700

#: Heights of a line, of a bar, of the space above a group, and of its title, in pixels.
LINE, BAR, GAP, HEADING = 21, 13, 16, 24

#: Ends of the scale, as powers of ten of a microsecond.
FIRST_POWER, LAST_POWER = -1, 3

#: Begins of the names of contenders, by the attribute of `Palette` that colours their bars.  Others are peers.
GROUPS = {"our": "ours", "pybreaker": "stock"}


@dataclass(frozen=True)
class Palette:
    """Colours of a picture.

    Attributes:
        paper: Background.
        border: Line around the background.
        scale: Lines of the scale.
        ink: Text.
        pale_ink: Text of less importance.
        ours: Bars of this package.
        stock: Bars of pybreaker.
        peer: Bars of other packages.
    """

    paper: str
    border: str
    scale: str
    ink: str
    pale_ink: str
    ours: str
    stock: str
    peer: str


#: Palettes by the name of the file.
PALETTES = {
    "calls-light.svg": Palette(
        "#ffffff", "#d0d7de", "#e7ebef", "#1f2328", "#59636e", ours="#0072b2", stock="#d55e00", peer="#8c959f"
    ),
    "calls-dark.svg": Palette(
        "#131416", "#3d444d", "#2a2f36", "#e6edf3", "#9198a1", ours="#56b4e9", stock="#e69f00", peer="#6e7681"
    ),
}


def measure() -> dict[str, Any]:
    """Return the figures of all contenders on this machine, in one thread."""
    found = servers_at_hand()[0]
    contenders = [item for item in at_hand() if item not in (HEARD, REFERENCE_HEARD)]
    runners = [(item, action) for action in ACTIONS for item in contenders]
    with PrivateServer(found.binary) as server, race_of(runners, server, leg=LEG_S) as race:
        for _ in range(ROUNDS):
            race.round()
        groups = [
            {
                "action": action,
                "bars": [
                    {"name": item.name, "microseconds": round(percentile(item.seconds, 50) * 1e6, 3)}
                    for item in race.entrants
                    if item.action == action
                ],
            }
            for action in ACTIONS
        ]
    return {
        "title": "Time of a guarded call in one thread, microseconds (logarithmic)",
        "source": (
            f"Medians of {ROUNDS} rounds. Python {platform.python_version()}, pybreaker {version('pybreaker')}, "
            f"redis-py {version('redis')}, {found.product} {found.version}, {os.cpu_count()} CPUs."
        ),
        "groups": groups,
    }


def text(x: float, y: float, words: str, *, colour: str, size: int = 13, style: str = "") -> str:
    """Return a line of text.

    Args:
        x: Distance from the left, in pixels.
        y: Distance of the base line from the top, in pixels.
        words: The text.
        colour: Colour of the letters.
        size: Size of the letters, in pixels.
        style: Further attributes.
    """
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{style}>{escape(words)}</text>'


def at(microseconds: float) -> float:
    """Return the place of a time on the scale, in pixels from the left."""
    part = (math.log10(microseconds) - FIRST_POWER) / (LAST_POWER - FIRST_POWER)
    return round(LEFT + (RIGHT - LEFT) * min(1.0, max(0.005, part)), 1)


def shown(microseconds: float) -> str:
    """Return a time with two significant digits."""
    return f"{float(f'{microseconds:.2g}'):g} µs"


def draw(figures: dict[str, Any], palette: Palette) -> str:
    """Return the picture of some figures."""
    ink, pale_ink = palette.ink, palette.pale_ink
    bold, middle = ' font-weight="bold"', ' text-anchor="middle"'
    parts = [text(20, 34, figures["title"], colour=ink, size=17, style=bold)]
    y = 40
    for group in figures["groups"]:
        top = y + GAP + HEADING
        bottom = top + LINE * len(group["bars"])
        parts.append(text(20, top - 8, group["action"], colour=ink, size=14, style=bold))
        for power in range(FIRST_POWER, LAST_POWER + 1):
            x = at(10.0**power) if power > FIRST_POWER else LEFT
            parts.append(f'<line x1="{x:g}" y1="{top}" x2="{x:g}" y2="{bottom}" stroke="{palette.scale}"/>')
            parts.append(text(x, top - 6, f"{10.0**power:g}", colour=pale_ink, size=11, style=middle))
        for number, bar in enumerate(group["bars"]):
            base = top + LINE * number + 15
            end = at(bar["microseconds"])
            y_bar = base - 11
            kind = next((of for begin, of in GROUPS.items() if bar["name"].startswith(begin)), "peer")
            fill = getattr(palette, kind)
            parts += [
                text(20, base, bar["name"], colour=ink, style=bold if kind == "ours" else ""),
                f'<rect x="{LEFT}" y="{y_bar}" width="{end - LEFT:g}" height="{BAR}" fill="{fill}"/>',
                text(end + 6, base, shown(bar["microseconds"]), colour=ink, size=12),
            ]
        y = bottom
    y += LINE + 6
    parts.append(text(20, y, figures["source"], colour=pale_ink, size=12))
    height = y + 18
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label={quoteattr(figures["title"])} font-family="sans-serif">'
    )
    colours = f'fill="{palette.paper}" stroke="{palette.border}"'
    paper = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" {colours}/>'
    return "\n".join([head, paper, *parts, "</svg>", ""])


def main() -> int:
    """Measure if asked to, then write or compare the pictures, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("--measure", action="store_true", help=f"measure, and write {FIGURES.name} first")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the picture differs")
    options = parser.parse_args()
    if options.measure:
        FIGURES.write_text(json.dumps(measure(), indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    pictures = {IMAGES / name: draw(figures, palette) for name, palette in PALETTES.items()}
    if not options.check:
        for path, picture in pictures.items():
            path.write_text(picture, encoding="utf-8")
        return 0
    if all(path.exists() and path.read_text(encoding="utf-8") == picture for path, picture in pictures.items()):
        return 0
    print(f"a picture differs from {FIGURES.name}: run python -m benchmarks.chart", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
