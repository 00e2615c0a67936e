"""Admissions of guarded calls: the generation, and the probe, that the outcome of each call is reported for.

A guarded call runs as a method of the state object that admitted the call, on whatever thread the call ends.  The frame
of `call()`, or of a guarded generator, holds that object.  So the state object carries the admission as a tag.

One state object serves many calls of one generation.  Each claim of a probe and each new generation gets a state object
of its own.
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

_ATTRIBUTE = "_pybreaker_redis_tag"


@dataclass(slots=True)
class AdmissionTag:
    """An admission on a state object.

    Attributes:
        owner: `Admissions` that made the tag: a breaker may be given another storage.
        admission: Admission of all calls on the state object.
        unused: Process id and claimer of a claim that has not admitted its call yet, or empty.
    """

    owner: object
    admission: Admission
    unused: list[tuple[int, Any]] = field(default_factory=list)

    def use_claim(self) -> Any:
        """Take the claim for a call, and return its claimer.  All but one caller of the claiming process get none."""
        try:
            pid, claimer = self.unused.pop()
        except IndexError:
            return None
        return claimer if pid == os.getpid() else None


class Admissions:
    """Admissions of all calls through one storage, and the breakers that use the storage."""

    def __init__(self) -> None:
        self._breakers: weakref.WeakValueDictionary[int, CircuitBreaker] = weakref.WeakValueDictionary()

    def add_breaker(self, breaker: CircuitBreaker) -> bool:
        """Register a breaker that uses the storage.  Return whether the breaker is a new one."""
        is_new = id(breaker) not in self._breakers
        self._breakers[id(breaker)] = breaker
        return is_new

    @property
    def has_several_breakers(self) -> bool:
        """Whether more than one breaker uses the storage."""
        return len(self._breakers) > 1

    def tag_of(self, state: Any) -> AdmissionTag | None:
        """Return the tag on a state object, if this storage made one."""
        tag: AdmissionTag | None = getattr(state, _ATTRIBUTE, None)
        return tag if tag is not None and tag.owner is self else None

    def tag(self, state: Any, admission: Admission, *, claimer: object = None) -> None:
        """Tag a state object that has not admitted a call yet.

        Args:
            state: The state object.
            admission: Admission of the calls that the object will admit.
            claimer: Owner of the claim that the next call uses.  ``None``: nothing was claimed.
        """
        setattr(state, _ATTRIBUTE, AdmissionTag(self, admission, [(os.getpid(), claimer)] if claimer else []))

    def retag(self, breaker: CircuitBreaker, admission: Admission) -> bool:
        """Replace the breaker's state object, without notice to listeners, unless it has a tag with this admission.

        The old object stays with the calls that it admitted.

        Returns:
            Whether the old object had no such tag.
        """
        state = breaker._state
        tag = self.tag_of(state)
        if tag is not None and tag.admission == admission:
            return False
        # pybreaker's constructor calls the same method, which notifies no listener here.
        retagged = breaker._create_new_state(state.name)
        self.tag(retagged, admission)
        # Not if the breaker has moved meanwhile.  Threads are switched at calls, and here is none in between.
        if breaker._state is state:
            breaker._state = retagged
        return True


@contextlib.contextmanager
def breaker_lock_if_free(breaker: CircuitBreaker) -> Iterator[bool]:
    """Hold the breaker's lock while the block runs, if the lock is free.  Yield whether it is.

    Then no other thread calls through the breaker, or brings the breaker into another state.  The lock is not waited
    for, because a call may take long.
    """
    acquire = getattr(breaker._lock, "acquire", None)
    is_free = acquire is not None and acquire(blocking=False)
    try:
        yield is_free
    finally:
        if is_free:
            breaker._lock.release()
