"""Conditions under which answers and views are trusted: tickets of queries, and trust that views share."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple

from pybreaker_redis._model.fast_path import Trust


class ReadTicket(NamedTuple):
    """State of a view when a query was sent, to be compared when the answer arrives.

    Attributes:
        sent_at: When the query was sent, monotonic seconds.  The answer was true then or later.
        distrust_count: Number of times that the view had lost all trust.
        change_count: Number of changes of the record.
        push_count: Number of pushes that had arrived.
    """

    sent_at: float
    distrust_count: int
    change_count: int
    push_count: int


class ArmedTrust:
    """Trust that all armed views of one listener with the same `max_staleness` share.

    A view is armed while the server would report each change of its keys, and nothing has been reported since they were
    read.  Then a sign of life of the server extends the trust of all armed views at once.

    Args:
        until: End of the trust, monotonic seconds.

    Attributes:
        trust: The trust, as fast paths read it.
        disarmed: Views that are armed no longer, until the listener has noticed that.
    """

    def __init__(self, until: float) -> None:
        self.trust = Trust(until)
        self.disarmed: deque[weakref.ref[Any]] = deque()
