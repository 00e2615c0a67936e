"""Rights of a user that the page ``docs/reference/rights.rst`` lists."""

from __future__ import annotations

import re

from tests.support.pages import DOCS

#: Page with the rights.
PAGE = DOCS / "reference" / "rights.rst"


def rights_of_page(block_name: str = "rights") -> list[str]:
    """Return the rules that follow name and password in an ``ACL SETUSER`` of the page."""
    page = PAGE.read_text(encoding="utf-8")
    between = rf"^\.\. begin-{block_name}$.*?^    (ACL .*?)\n\n\.\. end-{block_name}$"
    (block,) = re.findall(between, page, re.MULTILINE | re.DOTALL)
    first, second, name, on, password, *words = block.split()
    assert (first, second, name, on, password) == ("ACL", "SETUSER", "shop", "on", ">secret")
    assert "\n" not in block, "the command must be one line to be copied"
    return words
