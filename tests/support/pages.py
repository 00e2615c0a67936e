"""Code blocks of documentation pages."""

from __future__ import annotations

from collections.abc import Iterator

import docutils.core
import docutils.nodes

from tests.support.paths import ROOT


def blocks(language: str) -> Iterator[tuple[int, str]]:
    """Yield each code block of the README in a language, with the number of its last line."""
    for node in parse("README.rst").findall(docutils.nodes.literal_block):
        if language in node["classes"]:
            yield node.line or 0, node.astext()


def parse(name: str) -> docutils.nodes.document:
    """Return the parsed page.  The slightest mistake in its markup raises an error."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return docutils.core.publish_doctree(text, settings_overrides={"halt_level": 2, "report_level": 2})
