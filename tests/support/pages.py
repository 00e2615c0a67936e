"""Code blocks of documentation pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import docutils.core
import docutils.nodes

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> Iterator[tuple[int, str]]:
    """Each code block of the README in that language, with the line it ends on; fails if the README is not valid."""
    for node in parse("README.rst").findall(docutils.nodes.literal_block):
        if language in node["classes"]:
            yield node.line or 0, node.astext()


def parse(name: str) -> docutils.nodes.document:
    """A page of the project; the slightest mistake in its markup is an error."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return docutils.core.publish_doctree(text, settings_overrides={"halt_level": 2, "report_level": 2})
