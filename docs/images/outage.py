"""Chart of the README, from the figures in ``outage.json``: ``python docs/images/outage.py``.

``--check`` writes nothing, and fails if the committed picture differs.  The picture has a background of its own, so
pages with light and with dark colours may show the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "outage.json"
PICTURE = HERE / "outage-light.svg"

#: Width of the picture, left end of the bars, and length of the longest bar, in pixels.
WIDTH, LEFT, LONGEST = 800, 370, 330

#: Heights of a line of the chart and of a bar, in pixels.
LINE, BAR = 26, 16

#: Colours of the background, its border, and the text.
PAPER, BORDER, INK, PALE_INK = "#ffffff", "#d0d7de", "#1f2328", "#59636e"


def text(x: int, y: int, words: str, *, size: int = 13, colour: str = INK, style: str = "") -> str:
    """Return a line of text.

    Args:
        x: Distance from the left, in pixels.
        y: Distance of the base line from the top, in pixels.
        words: The text.
        size: Size of the letters, in pixels.
        colour: Colour of the letters.
        style: Further attributes.
    """
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{style}>{escape(words)}</text>'


def draw(figures: dict[str, Any]) -> str:
    """Return the picture of some figures."""
    longest = max(bar["seconds"] for group in figures["groups"] for bar in group["bars"])
    bold = ' font-weight="bold"'
    y = 34
    parts = [text(20, y, figures["title"], size=17, style=bold)]
    for group in figures["groups"]:
        y += LINE + 8
        parts.append(text(20, y, group["name"], size=14, colour=group["colour"], style=bold))
        for bar in group["bars"]:
            y += LINE
            # A wait of nothing is a thin line.
            width = max(2, round(bar["seconds"] / longest * LONGEST))
            parts += [
                text(20, y, bar["label"]),
                f'<rect x="{LEFT}" y="{y - 13}" width="{width}" height="{BAR}" fill="{group["colour"]}"/>',
                text(LEFT + width + 8, y, bar["text"], style=bold),
            ]
    y += LINE + 8
    parts.append(text(20, y, figures["source"], size=12, colour=PALE_INK))
    height = y + 18
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label={quoteattr(figures["title"])} font-family="sans-serif">'
    )
    paper = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="{PAPER}" stroke="{BORDER}"/>'
    return "\n".join([head, paper, *parts, "</svg>", ""])


def main() -> int:
    """Write the picture, or compare it, and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the chart of the README.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the picture differs")
    options = parser.parse_args()
    picture = draw(json.loads(FIGURES.read_text(encoding="utf-8")))
    if not options.check:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    print(f"{PICTURE.name} differs from {FIGURES.name}: run python docs/images/outage.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
