"""Waits for conditions, with deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Seconds after which a condition counts as failed.
DEADLINE = 10.0


def wait_for(condition: Callable[[], Any], what: str, within: float = DEADLINE) -> float:
    """Wait until a condition holds, and return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within, f"not within {within} s: {what}"
        time.sleep(0.0005)
    return time.monotonic() - began
