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
        fresh: Whether it has claimed a probe and not yet been admitted with it.
        in_flight: Whether the breaker has admitted its call and not yet reported on it.
        opened_generation: The generation in which it found that the timeout has passed.
        reported: The generation and token that its last report spoke for.
        refused: Whether the failure that it reported last came too late to count.
        count: The counter as its last report left it, until it is read.
        fence: The generation and token of the trip in progress.
        telling: Whether a breaker may still be telling its listeners of a new state.
    """

    generation: int | None = None
    token = ""
    fresh = False
    in_flight = False
    opened_generation = 0
    reported: tuple[int | None, str] = (None, "")
    refused = False
    count: int | None = None
    fence: tuple[int | None, str] = (None, "")
    telling = False
    _half_opened: int | None = None
    #: What a thread holds, it holds in this process: a forked child inherits the memory, but not the probe.
    _pid = 0

    def admit(self, generation: int, token: str) -> None:
        """The thread's next report speaks for this generation."""
        self.generation, self.token, self.fresh = generation, token, False

    def claim(self, generation: int, token: str) -> None:
        """The thread has got the probe."""
        self.admit(generation, token)
        self.fresh, self._pid = True, os.getpid()

    def holds(self, token: str) -> bool:
        """Whether it has got this probe."""
        return self.token == token and self._pid == os.getpid()

    def half_open(self, generation: int) -> None:
        """The thread has half-opened the circuit by hand."""
        self._half_opened, self._pid = generation, os.getpid()

    def may_try(self, generation: int) -> bool:
        """Whether the trial of a circuit that was half-opened by hand is this thread's."""
        return self._half_opened == generation and self._pid == os.getpid()
