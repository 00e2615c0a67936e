"""Table of ``docs/reference/compatibility.rst``: servers and clients that work together, as test runs have shown.

``python -m tests.support.matrix DIRECTORY`` prints the table of all runs that wrote their results there (`VARIABLE`).
With ``--check`` the command fails if the page differs in a cell that was run.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT

#: Environment variable that names the directory for a run's results.
VARIABLE = "PYBREAKER_REDIS_MATRIX"

#: Page with the table, and the line before the table.
PAGE = ROOT / "docs" / "reference" / "compatibility.rst"
MARKER = ".. matrix-table"

#: Columns and rows, in the order of the table.
CLIENTS = (
    "redis-py 8",
    "redis-py 7",
    "redis-py 6",
    "redis-py 5",
    "redis-py 4.6",
    "redis-py 3.5, redis-py-cluster",
    "valkey-py 6",
)
SERVERS = ("Valkey 9.1", "Redis 8.2", "Redis 7.0", "Redis 6.2")
KINDS = ("single server", "Sentinel", "Cluster")

#: Cells of a failed test and of a combination that was not run.
FAILED, NOT_RUN = "**fails**", "not run"


@dataclass
class Results:
    """Results of one run, with one client library.

    Attributes:
        client: Name of the client library.
        cells: By server and kind of place: the kind of push for changes there, or `FAILED`.
    """

    client: str
    cells: dict[str, dict[str, str]] = field(default_factory=dict)

    def passed(self, server: str, kind: str, push: str) -> None:
        """Record that a test has passed, with the kind of push for changes."""
        cells = self.cells.setdefault(server, {})
        if cells.get(kind) != FAILED:
            cells[kind] = push or cells.get(kind, "")

    def failed(self, server: str, kind: str) -> None:
        """Record that a test has failed."""
        self.cells.setdefault(server, {})[kind] = FAILED

    def write(self, directory: Path) -> None:
        """Write the results to a file for `table`."""
        directory.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.]+", "-", self.client)
        (directory / f"{name}-{os.getpid()}.json").write_text(json.dumps([self.client, self.cells]))


def read(directory: Path) -> dict[tuple[str, str, str], str]:
    """Return all cells that were run, by server, kind and client."""
    cells: dict[tuple[str, str, str], str] = {}
    for path in sorted(directory.glob("*.json")):
        client, found = json.loads(path.read_text())
        for server, kinds in found.items():
            for kind, cell in kinds.items():
                if cells.get((server, kind, client)) != FAILED:
                    cells[server, kind, client] = cell
    return cells


def table(cells: dict[tuple[str, str, str], str]) -> str:
    """Return the table of the page."""
    rows = [("server", "", *CLIENTS)]
    for server in SERVERS:
        for kind in KINDS:
            name = server if kind == KINDS[0] else "\\"
            rows.append((name, kind, *(cells.get((server, kind, client), NOT_RUN) for client in CLIENTS)))
    # A heading may take several lines, while a cell of these tables may not.
    heading = [text.replace(", ", "\n").replace(" ", "\n", 1).split("\n") for text in rows[0]]
    height = max(map(len, heading))
    lines = [tuple((text + [""] * height)[line] for text in heading) for line in range(height)]
    widths = [max(len(row[column]) for row in (*lines, *rows[1:])) for column in range(len(rows[0]))]
    rule = "  ".join("=" * width for width in widths)

    def line(row: tuple[str, ...]) -> str:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join([rule, *map(line, lines), rule, *map(line, rows[1:]), rule])


def written() -> str:
    """Return the table that stands in the page."""
    after = PAGE.read_text(encoding="utf-8").partition(f"{MARKER}\n\n")[2]
    return after.partition("\n\n")[0]


def differing(cells: dict[tuple[str, str, str], str]) -> list[str]:
    """Return each cell that was run and is another one in the page."""
    texts = [re.split(r"\s{2,}", line) for line in written().splitlines() if not line.startswith(("=", " "))]
    of_page: dict[tuple[str, str, str], str] = {}
    server = ""
    for name, kind, *row in texts:
        if kind in KINDS:
            server = server if name == "\\" else name
            of_page.update({(server, kind, client): cell for client, cell in zip(CLIENTS, row, strict=True)})
    return [
        f"{server}, {kind}, {client}: {cell}, and not {of_page.get((server, kind, client))}"
        for (server, kind, client), cell in sorted(cells.items())
        if cell == FAILED or of_page.get((server, kind, client), cell) != cell
    ]


def main(arguments: list[str]) -> int:
    """Print the table, compare it for ``--check``, and put it into the page for ``--write``."""
    directory, *options = arguments
    cells = read(Path(directory))
    made = table(cells)
    print(made)
    missing = [
        f"{server}, {kind}, {client}"
        for server in SERVERS
        for kind in KINDS
        for client in CLIENTS
        if (server, kind, client) not in cells
    ]
    for cell in missing:
        print("not run:", cell)
    for server, kind, client in sorted(cells):
        if server not in SERVERS or kind not in KINDS or client not in CLIENTS:
            print("run, but not in the table:", server, kind, client)
    if "--write" in options:
        before, marker, after = PAGE.read_text(encoding="utf-8").partition(f"{MARKER}\n\n")
        PAGE.write_text(before + marker + made + after.removeprefix(written()), encoding="utf-8")
    found = differing(cells) if "--check" in options else []
    for cell in found:
        print(f"another cell in {PAGE.name}:", cell)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
