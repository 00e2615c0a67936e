"""Choice of the tests that run without ``--full``.

Left to ``--full`` are:

- tests on any server but the preferred one
- tests marked ``slow`` or ``full``, but for the parameters marked ``sample``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.support import servers, ways

#: Markers of tests that run with ``--full`` only.
LEFT_OUT = ("slow", "full")

#: Marker that `select` gives to tests on another server than the preferred one.
OTHER_SERVER = "other_server"

#: Marker of tests that run without ``--full`` in spite of these markers.
SAMPLE = "sample"


#: Marker of tests that are about the unmodified breaker.
UNMODIFIED = "unmodified"

#: Whether this run has ``--full``.  Set before the modules of the tests are imported.
is_full = False


def but_for(sample: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return values as parameters of a test, of which those outside a sample run with ``--full`` only."""
    chosen = [*sample]
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.full) for value in values]


def examples(number: int) -> int:
    """Return how many random examples to try, a fifth without ``--full``."""
    return number if is_full else max(10, number // 5)


def needs_another_server(value: Any) -> bool:
    """Return whether the parameter of a test is, or contains, a server other than the preferred one."""
    if isinstance(value, tuple | list):
        return any(map(needs_another_server, value))
    others = {found.binary for found in servers.at_hand()[1:]}
    return getattr(getattr(value, "found", value), "binary", value if isinstance(value, str) else None) in others


def is_on_another_server(item: pytest.Item) -> bool:
    """Return whether a test runs on another server than the preferred one."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(map(needs_another_server, callspec.params.values()))


def is_left_out(item: pytest.Item) -> bool:
    """Return whether a test runs with ``--full`` only."""
    if is_on_another_server(item):
        return True
    return not item.get_closest_marker(SAMPLE) and any(map(item.get_closest_marker, LEFT_OUT))


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests on other servers, and deselect what is left to ``--full``, unless the command names tests by ids.

    Tests about the unmodified breaker are deselected if the tests use ours.
    """
    for item in items:
        if is_on_another_server(item):
            item.add_marker(OTHER_SERVER)
    if ways.is_breaker:
        deselect(config, items, lambda item: item.get_closest_marker(UNMODIFIED) is not None)
    if not config.option.full and not any("::" in argument for argument in config.args):
        deselect(config, items, is_left_out)


def deselect(config: pytest.Config, items: list[pytest.Item], is_unwanted: Callable[[pytest.Item], bool]) -> None:
    """Deselect some tests, and report how many."""
    unwanted = [item for item in items if is_unwanted(item)]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if not is_unwanted(item)]
