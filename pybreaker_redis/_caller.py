"""What did this thread do last?

Knows: one thread's last operations on one storage.  Does not know: what they mean.
"""

from __future__ import annotations

import threading
from enum import Enum, auto


class Just(Enum):
    """What a thread did last, as far as it gives the next operation its meaning."""

    NOTHING = auto()
    READ_STATE = auto()
    READ_STATE_AGAIN = auto()
    READ_OPENED_AT = auto()
    SET_OPENED_AT = auto()
    RESET_SUCCESSES = auto()
    COUNTED_PROBE = auto()
    READ_COUNT = auto()
    HOLDS_RESET = auto()


class Caller(threading.local):
    """One thread's side of the conversation.

    Attributes:
        just: What it did last.
        read: The state that it read last.
        news: Whether that was news to the breaker.
        generation: The generation in which its call was admitted; ``None`` before the first.
        token: The probe that it holds, or empty.
        pid: The process in which it got `token`: a forked child inherits this object, but not the probe.
        probing: Whether its call was admitted half-open.
        fresh: Whether it has claimed a probe and not yet reported on it.
        half_opened: The generation that it made half-open by hand.
        opened_generation: The generation in which it read `opened_at`.
        failure: Identity of the exception that it reported last.
        refused: Whether that report came too late to count.
        tripping: The generation and token that the trip in progress is fenced with.
        count: The counter as its last report left it.
        echo: The state whose assignment only repeats what is already done.
    """

    just = Just.NOTHING
    read = ""
    news = False
    generation: int | None = None
    token = ""
    pid = 0
    probing = False
    fresh = False
    half_opened: int | None = None
    opened_generation = 0
    failure = 0
    refused = False
    tripping: tuple[int | None, str] = (None, "")
    count = 0
    echo = ""

    def admit(self, generation: int, token: str, *, probing: bool) -> None:
        """The thread's next call, if it makes one, speaks for this generation."""
        self.generation, self.token, self.probing = generation, token, probing
