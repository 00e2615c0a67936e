"""Admissions that calls carry: what the outcome of each call may settle.

Knows: pybreaker's state objects, the breakers of one storage.  Does not know: what is reported.

A guarded call runs as a method of the breaker's state object that admitted it, on whatever thread or context it ends.
The frame of `call()` holds that object, and so does the frame of a guarded generator, so the admission lies there.  One
state object serves many calls of one generation; each claim and each new generation gets an object of its own.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pybreaker import CircuitBreaker

from pybreaker_redis._model.circuit import Admission

_ATTRIBUTE = "_pybreaker_redis_ticket"


@dataclass(slots=True)
class AdmissionTag:
    """An admission on a state object.

    Attributes:
        owner: The `Admissions` that issued the ticket: a breaker may be given another storage.
        admission: What reports of calls on the state object speak for.
        unused: The process id and the claimer of a claim that has not admitted its call yet, or empty.
    """

    owner: object
    admission: Admission
    unused: list[tuple[int, Any]] = field(default_factory=list)

    def use(self) -> Any:
        """Take the claim for a call, and return its claimer; ``None`` to all but one caller of the claiming process."""
        try:
            pid, claimer = self.unused.pop()
        except IndexError:
            return None
        return claimer if pid == os.getpid() else None


class Admissions:
    """The admissions of all calls through one storage."""

    def __init__(self) -> None:
        self._breakers: weakref.WeakValueDictionary[int, CircuitBreaker] = weakref.WeakValueDictionary()

    def note(self, breaker: CircuitBreaker) -> bool:
        """Remember a breaker that uses the storage; return whether it is a new one."""
        is_new = id(breaker) not in self._breakers
        self._breakers[id(breaker)] = breaker
        return is_new

    @property
    def has_several_breakers(self) -> bool:
        """Whether more than one breaker uses the storage."""
        return len(self._breakers) > 1

    def ticket(self, state: Any) -> AdmissionTag | None:
        """Return the ticket on a state object, if this storage issued one."""
        ticket: AdmissionTag | None = getattr(state, _ATTRIBUTE, None)
        return ticket if ticket is not None and ticket.owner is self else None

    def issue(self, state: Any, admission: Admission, *, claimer: object = None) -> None:
        """Put a ticket on a state object that has not admitted a call yet.

        Args:
            state: The state object.
            admission: Of the calls that it will admit.
            claimer: The caller whose claim the next call uses; ``None`` if nothing was claimed.
        """
        setattr(state, _ATTRIBUTE, AdmissionTag(self, admission, [(os.getpid(), claimer)] if claimer else []))

    def renew(self, breaker: CircuitBreaker, admission: Admission) -> bool:
        """Replace the breaker's state object, without a word to listeners, unless it carries this admission already.

        The old object stays with the calls that it admitted.

        Returns:
            Whether it did not carry the admission.
        """
        state = breaker._state
        ticket = self.ticket(state)
        if ticket is not None and ticket.admission == admission:
            return False
        # As pybreaker's constructor does it, which notifies no listener.
        renewed = breaker._create_new_state(state.name)
        self.issue(renewed, admission)
        # Not if the breaker has moved meanwhile.  Threads are switched at calls, and there is none in between.
        if breaker._state is state:
            breaker._state = renewed
        return True


@contextlib.contextmanager
def breaker_lock_if_free(breaker: CircuitBreaker) -> Iterator[bool]:
    """Whether no other thread calls through the breaker, or brings it into another state, while the block runs.

    pybreaker holds the breaker's lock while it does so.  It is not waited for: a call may take long.
    """
    acquire = getattr(breaker._lock, "acquire", None)
    is_free = acquire is not None and acquire(blocking=False)
    try:
        yield is_free
    finally:
        if is_free:
            breaker._lock.release()
