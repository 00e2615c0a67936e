"""For what does this thread speak?

Knows: one thread's side of the conversation with one storage.  Does not know: what is said.
"""

from __future__ import annotations

import os
import threading


class Caller(threading.local):
    """One thread's side of the conversation.

    Attributes:
        generation: The generation in which its call was admitted; ``None`` before the first.
        token: The probe that it holds, or empty.
        fresh: Whether it has claimed a probe and not yet reported on it.
        half_opened: The generation that it made half-open by hand.
        opened_generation: The generation in which it found that the timeout has passed.
        refused: Whether the failure that it reported last came too late to count.
        fence: The generation and token of the trip in progress.
        count: The counter as its last report left it.
        telling: Whether the breaker may still be telling its listeners of a new state.
    """

    generation: int | None = None
    token = ""
    fresh = False
    half_opened: int | None = None
    opened_generation = 0
    refused = False
    fence: tuple[int | None, str] = (None, "")
    count = 0
    telling = False
    _pid = 0

    def admit(self, generation: int, token: str) -> None:
        """The thread's next report speaks for this generation."""
        self.generation, self.token = generation, token

    def claim(self, generation: int, token: str) -> None:
        """The thread has got the probe."""
        self.admit(generation, token)
        self.fresh, self._pid = True, os.getpid()

    def holds(self, token: str) -> bool:
        """Whether it got this probe, in this process: a forked child inherits the memory, but not the probe."""
        return self.token == token and self._pid == os.getpid()
