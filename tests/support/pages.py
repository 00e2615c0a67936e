"""Pages of the documentation: their code blocks, labels and tables.

This module needs only the standard library, so tests of the built distribution use it, too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

DOCS = ROOT / "docs"

#: Pages of the documentation, by their names relative to the root of the project.
PAGES = tuple(str(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.rst")))

#: Directives with code that is run but not shown.
HIDDEN = ("testsetup", "testcleanup")

_DIRECTIVE = re.compile(r"( *)\.\. (code-block|code|sourcecode|testsetup|testcleanup):: *(\S*) *")

#: First line of a block that is a file.
_FILE = re.compile(r"# ([\w./-]+\.py)\n")


def blocks(language: str, page: str = "README.rst") -> Iterator[tuple[int, str]]:
    """Yield each code block of a page in a language, with the number of its first line.

    Hidden set-up is Python.

    Args:
        language: Name of the language, as the page writes it.
        page: Path of the page, relative to the root of the project.
    """
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        directive = _DIRECTIVE.fullmatch(lines[number])
        number += 1
        if not directive:
            continue
        indent = len(directive[1])
        content: list[tuple[int, str]] = []
        while number < len(lines) and (not lines[number].strip() or indent_of(lines[number]) > indent):
            content.append((number + 1, lines[number]))
            number += 1
        if language == ("python" if directive[2] in HIDDEN else directive[3]):
            yield _source(content)


def indent_of(line: str) -> int:
    """Return the number of spaces before the text of a line."""
    return len(line) - len(line.lstrip())


def _source(content: list[tuple[int, str]]) -> tuple[int, str]:
    """Return the first line's number and the text of a directive's content, without options and empty lines around."""
    while content and (not content[0][1].strip() or re.match(r"\s+:[\w-]+:( |$)", content[0][1])):
        content.pop(0)
    while content and not content[-1][1].strip():
        content.pop()
    assert content, "a directive without content"
    indent = min(indent_of(line) for _, line in content if line.strip())
    return content[0][0], "\n".join(line[indent:] for _, line in content)


def file_of(source: str) -> str | None:
    """Return the name of the file that a block shows, or ``None``."""
    found = _FILE.match(source)
    return found[1] if found else None


def write_files(page: str, directory: Path) -> None:
    """Write the files that a page shows into a directory."""
    for _, source in blocks("python", page):
        if name := file_of(source):
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{source}\n", encoding="utf-8")


def run_python(page: str, change_settings: Callable[..., None]) -> int:
    """Run the Python blocks of a page from top to bottom in one namespace, and return their number.

    Args:
        page: Path of the page, relative to the root of the project.
        change_settings: Function that changes Django's settings to those of a block ``# settings.py``.
    """
    namespace: dict[str, object] = {"__name__": Path(page).stem.lower().replace("-", "_")}
    shown = list(blocks("python", page))
    for line, source in shown:
        # Tracebacks name the page and the line.
        exec(compile("\n" * (line - 1) + source, page, "exec"), namespace)
        if file_of(source) == "settings.py":
            change_settings(**settings_of(namespace))
    return len(shown)


def settings_of(namespace: dict[str, object]) -> dict[str, object]:
    """Return the settings of Django in the namespace of a module."""
    return {name: value for name, value in namespace.items() if name.isupper()}


@contextlib.contextmanager
def changing_settings() -> Iterator[Callable[..., None]]:
    """Yield a function that changes Django's settings until the end of the context."""
    from django.test import override_settings

    from tests.support import django_project  # noqa: F401 (it configures Django)

    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(override_settings(**settings))


def labels(page: str) -> set[str]:
    """Return the labels of a page."""
    return set(re.findall(r"^\.\. _([^:`]+):$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))


def list_tables(page: str) -> Iterator[list[list[str]]]:
    """Yield each ``list-table`` of a page as rows of cells.  A cell of several lines is one line."""
    rows: list[list[str]] = []
    is_inside = False
    for line in [*(ROOT / page).read_text(encoding="utf-8").splitlines(), "end"]:
        if re.match(r"\s*\.\. list-table::", line):
            is_inside = True
        elif is_inside and line.strip():
            if indent_of(line) == 0:
                yield rows
                rows, is_inside = [], False
            elif row := re.match(r"\s+\* -(?: (.*))?$", line):
                rows.append([row[1] or ""])
            elif rows and (cell := re.match(r"\s+-(?: (.*))?$", line)):
                rows[-1].append(cell[1] or "")
            elif rows:
                rows[-1][-1] = f"{rows[-1][-1]} {line.strip()}".strip()


def parse(name: str) -> Any:
    """Return the parsed page, which must not need Sphinx.  The slightest mistake in its markup raises an error."""
    import docutils.core

    text = (ROOT / name).read_text(encoding="utf-8")
    return docutils.core.publish_doctree(text, settings_overrides={"halt_level": 2, "report_level": 2})
