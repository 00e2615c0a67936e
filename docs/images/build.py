"""Diagrams of the documentation: ``python docs/images/build.py`` writes each as an SVG for light and for dark pages.

``--check`` writes nothing, and fails if a committed picture differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

HERE = Path(__file__).resolve().parent

#: Width of all pictures, pixels.
WIDTH = 720

#: Sizes of letters, pixels.
TITLE_SIZE, TEXT_SIZE = 15, 13

#: Average width of a letter as a share of its size.  Wide system fonts stay below this share.
LETTER_WIDTH = 0.56

#: Free space inside of a box, left and right of its text, pixels.
PADDING = 6

#: Distance of two lines of text, pixels.
LINE_HEIGHT = 18

Fill = Literal["good", "bad", "wait", "plain"]
Anchor = Literal["start", "middle", "end"]
Point = tuple[int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of one variant of the pictures.

    Attributes:
        name: Part of the file name.
        paper: Background.
        ink: Text.
        pale: Arrows and the text of captions.
        fills: Background and border of each kind of box.
    """

    name: str
    paper: str
    ink: str
    pale: str
    fills: dict[Fill, tuple[str, str]]


LIGHT = Theme(
    "light",
    paper="#ffffff",
    ink="#1f2328",
    pale="#59636e",
    fills={
        "good": ("#dff3e4", "#1a7f37"),
        "bad": ("#fbe4e4", "#b42318"),
        "wait": ("#fdf1d4", "#946200"),
        "plain": ("#eaf2fb", "#0b5fa5"),
    },
)
DARK = Theme(
    "dark",
    paper="#131416",
    ink="#e6e8ea",
    pale="#a3acb6",
    fills={
        "good": ("#12301d", "#4cc274"),
        "bad": ("#3a1616", "#ff8a80"),
        "wait": ("#352a0c", "#e2b340"),
        "plain": ("#11283f", "#7cb7ff"),
    },
)


class Picture:
    """Parts of one picture.

    Args:
        theme: Colours.
        height: Height of the picture, pixels.
        title: Short name for screen readers.
        description: Text that replaces the picture for screen readers.
    """

    def __init__(self, theme: Theme, height: int, title: str, description: str) -> None:
        self.theme = theme
        self._head = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
                f'viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc" '
                f"font-family={quoteattr('system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif')}>"
            ),
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            (
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{theme.pale}"/></marker></defs>'
            ),
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{theme.paper}"/>',
        ]
        self._parts: list[str] = []

    def text(
        self,
        at: Point,
        words: str,
        *,
        anchor: Anchor = "middle",
        room: int = WIDTH,
        bold: bool = False,
        pale: bool = False,
    ) -> None:
        """Draw one line of text.

        Args:
            at: Anchor on the base line.
            words: The text.
            anchor: Part of the text that lies at the anchor.
            room: Width that the text may take, pixels.
            bold: Whether the text is a title.
            pale: Whether the text is a caption.

        Raises:
            ValueError: The text needs more room.
        """
        size = TITLE_SIZE if bold else TEXT_SIZE
        if len(words) * size * LETTER_WIDTH > room:
            msg = f"{words!r} needs more than {room} pixels"
            raise ValueError(msg)
        weight = ' font-weight="600"' if bold else ""
        colour = self.theme.pale if pale else self.theme.ink
        self._parts.append(
            f'<text x="{at[0]}" y="{at[1]}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, at: Point, size: Point, title: str, lines: Sequence[str] = (), *, fill: Fill = "plain") -> None:
        """Draw a box with a title and lines of text in its middle.

        Args:
            at: Upper left corner.
            size: Width and height.
            title: First line.
            lines: Further lines.
            fill: Colours.
        """
        (left, top), (width, height) = at, size
        background, border = self.theme.fills[fill]
        self._parts.append(
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="8" fill="{background}" '
            f'stroke="{border}" stroke-width="1.5"/>'
        )
        middle, room = left + width // 2, width - 2 * PADDING
        base = top + (height - LINE_HEIGHT * len(lines)) // 2 + 5
        self.text((middle, base), title, room=room, bold=True)
        for number, line in enumerate(lines, 1):
            self.text((middle, base + LINE_HEIGHT * number), line, room=room)

    def arrow(self, *points: Point, dashed: bool = False) -> None:
        """Draw an arrow through some points.

        Args:
            points: Ends and corners, in order.
            dashed: Whether the line is dashed.
        """
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{self.theme.pale}" stroke-width="1.5"{dashes} '
            'marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        """Return the picture as an SVG document."""
        return "\n".join([*self._head, *self._parts, "</svg>", ""])


def states(theme: Theme) -> Picture:
    """Return the states of a circuit, with the probe and its lease."""
    picture = Picture(
        theme,
        420,
        "States of a circuit",
        "A closed circuit opens after fail_max consecutive failures. When reset_timeout is over, one call claims the "
        "probe and the circuit is half-open. The circuit closes after success_threshold successful probes. A failed "
        "probe opens the circuit. When the lease of a probe ends without a report, the next call claims the probe.",
    )
    picture.box((24, 40), (170, 80), "closed", ["calls are admitted"], fill="good")
    picture.box((526, 40), (170, 80), "open", ["calls are rejected"], fill="bad")
    picture.box(
        (255, 230), (210, 100), "half-open", ["one call holds the probe", "other calls are rejected"], fill="wait"
    )
    picture.arrow((194, 80), (526, 80))
    picture.text((360, 70), "fail_max consecutive failures", room=320)
    picture.arrow((611, 120), (611, 255), (465, 255))
    picture.text((601, 180), "reset_timeout is over:", anchor="end", room=180)
    picture.text((601, 198), "one call claims the probe", anchor="end", room=190)
    picture.arrow((465, 300), (660, 300), (660, 120))
    picture.text((562, 320), "the probe fails", room=180)
    picture.arrow((255, 280), (109, 280), (109, 120))
    picture.text((119, 180), "success_threshold probes", anchor="start", room=180)
    picture.text((119, 198), "succeed", anchor="start", room=180)
    picture.arrow((400, 330), (400, 362), (320, 362), (320, 330))
    picture.text((360, 384), "the lease ends without a report, or more successes are needed:", room=680)
    picture.text((360, 402), "the next call of any process claims the probe", room=680)
    return picture


def flow(theme: Theme) -> Picture:
    """Return the flow of data in a call, in a push and in an outage."""
    picture = Picture(
        theme,
        470,
        "Data flow of a call, a push and an outage",
        "A guarded call is decided by the fast path from the view in memory, or otherwise by one script in Redis. A "
        "script that changes a circuit publishes a message. The listener of each process receives the message, reads "
        "the circuit again and updates the view. In an outage the calls under way wait once, for timeout seconds at "
        "most. Then the local circuit decides. When Redis returns, local changes are shared.",
    )
    picture.text((24, 30), "A call", anchor="start", bold=True)
    picture.box((24, 44), (190, 64), "guarded call")
    picture.arrow((214, 76), (268, 76))
    picture.box((268, 44), (190, 64), "fast path", ["decides from the view"], fill="good")
    picture.arrow((458, 76), (540, 76), dashed=True)
    picture.text((499, 68), "otherwise", room=80, pale=True)
    picture.box((540, 44), (156, 64), "Redis", ["one script decides"])
    picture.text(
        (24, 132), "Without failures a success costs no round trip. A rejection costs none.", anchor="start", pale=True
    )

    picture.text((24, 182), "A push", anchor="start", bold=True)
    picture.box((24, 196), (190, 64), "transition", ["the script publishes it"])
    picture.arrow((214, 228), (280, 228))
    picture.text((247, 220), "message", room=66, pale=True)
    picture.box((280, 196), (190, 64), "listener", ["reads the circuit again"], fill="wait")
    picture.arrow((470, 228), (540, 228))
    picture.text((505, 220), "reply", room=66, pale=True)
    picture.box((540, 196), (156, 64), "view", ["serves all calls"], fill="good")
    picture.text((24, 284), "A message is a hint. Only a read changes the view.", anchor="start", pale=True)

    picture.text((24, 334), "An outage", anchor="start", bold=True)
    picture.box((24, 348), (190, 64), "Redis is unreachable", ["running calls wait once"], fill="bad")
    picture.arrow((214, 380), (254, 380))
    picture.box((254, 348), (190, 64), "local circuit", ["decides in each process"], fill="wait")
    picture.arrow((444, 380), (506, 380))
    picture.text((475, 372), "return", room=60, pale=True)
    picture.box((506, 348), (190, 64), "shared circuit", ["gets the local changes"], fill="good")
    picture.text((24, 436), "A thread checks for the return of Redis. Calls do not.", anchor="start", pale=True)
    return picture


#: Rows of the package map, from the top down: names, their purpose, and the colours.
PACKAGES: tuple[tuple[tuple[str, ...], str, Fill], ...] = (
    (("cli/", "contrib/", "instrument/", "testing/"), "tools and integrations", "plain"),
    (("registry/",), "an application's breakers", "plain"),
    (("operators.py",), "operators' commands", "plain"),
    (("storage.py", "memory.py"), "circuits under pybreaker", "plain"),
    (("_adapter/",), "intents of pybreaker", "plain"),
    (("_circuits/",), "shared, local, failover", "good"),
    (("_replica/",), "views and the listener", "good"),
    (("_servers/", "_engines/"), "availability, execution", "good"),
    (("_redis/", "_model/"), "connections, the model", "good"),
    (("_log.py", "health.py", "errors.py", "_runtime/"), "used by all others", "wait"),
)


def packages(theme: Theme) -> Picture:
    """Return the map of the packages, with the direction of imports."""
    left, gap, row_height, box_height, boxes_width = 52, 8, 48, 36, 460
    top = 20
    height = top + row_height * len(PACKAGES) + 36
    listed = " ".join(f"{', '.join(names)}: {purpose}." for names, purpose, _ in PACKAGES)
    picture = Picture(
        theme,
        height,
        "Packages of pybreaker_redis",
        f"Imports go from the top down. {listed}",
    )
    bottom = top + row_height * len(PACKAGES) - (row_height - box_height)
    picture.arrow((28, top), (28, bottom))
    for row, (names, purpose, fill) in enumerate(PACKAGES):
        y = top + row_height * row
        width = (boxes_width - gap * (len(names) - 1)) // len(names)
        for column, name in enumerate(names):
            picture.box((left + column * (width + gap), y), (width, box_height), name, fill=fill)
        picture.text((left + boxes_width + 14, y + 23), purpose, anchor="start", room=WIDTH - left - boxes_width - 14)
    picture.text((24, bottom + 28), "imports go down, or to the right in a row", anchor="start", pale=True)
    return picture


PICTURES: dict[str, Callable[[Theme], Picture]] = {"states": states, "flow": flow, "packages": packages}


def main(arguments: Sequence[str]) -> int:
    """Write or check all pictures, and return 1 if a checked one differs."""
    parser = argparse.ArgumentParser(description="Draw the diagrams of the documentation.")
    parser.add_argument("--check", action="store_true", help="only compare the committed pictures")
    is_check = parser.parse_args(arguments).check
    different = []
    for name, draw in PICTURES.items():
        for theme in (LIGHT, DARK):
            path = HERE / f"{name}-{theme.name}.svg"
            svg = draw(theme).svg()
            if not is_check:
                path.write_text(svg, encoding="utf-8")
            elif not path.exists() or path.read_text(encoding="utf-8") != svg:
                different.append(path.name)
    if different:
        print(f"not drawn by {Path(__file__).name}: {', '.join(different)}", file=sys.stderr)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
