"""For what may a call speak when it ends?

Knows: the admission of each thread, greenlet and task, the breakers of one storage.  Does not know: what is reported.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextvars import ContextVar

from pybreaker import CircuitBreaker

from pybreaker_redis._circuit import Admission, Circuit
from pybreaker_redis._shortcut import Shortcut

#: Of whoever acts by hand: an operator, a test, somebody who uses the storage without a breaker.
BY_HAND = Admission(None)


class Admissions:
    """What the calls that go through one storage were admitted for.

    It is kept in a context variable: of the ways to keep something for a thread or a greenlet that is the one that
    costs least to look at, and in steady state a call costs little more than that.  In the context of each thread that
    has called it outlives the storage, with 200 bytes: storages are made once, not for each request.

    Attributes:
        current: Returns the admission of the running thread, greenlet or task; `BY_HAND` if it never made a call.
    """

    def __init__(self, shortcut: Shortcut) -> None:
        self._shortcut = shortcut
        self._variable = ContextVar("admission to a circuit", default=BY_HAND)
        self.current = self._variable.get
        self._breakers: weakref.WeakValueDictionary[int, CircuitBreaker] = weakref.WeakValueDictionary()

    def go_by(self, shortcut: Shortcut) -> None:
        """It is another circuit that the storage speaks for."""
        self._shortcut = shortcut

    def know(self, breakers: Iterable[CircuitBreaker]) -> None:
        """Take note of breakers that use the storage, before their state can differ from the circuit's."""
        for breaker in breakers:
            if id(breaker) not in self._breakers:
                self._breakers[id(breaker)] = breaker
                self._shortcut.shut()

    @property
    def are_several(self) -> bool:
        """Whether more than one breaker uses the storage."""
        return len(self._breakers) > 1

    def to(self, circuit: Circuit, *, noticed: bool) -> Admission:
        """What a call may speak for that is admitted, or rejected, now.

        It is everybody's, which opens the shortcut to this thread, if the breaker has nothing more to notice.  Of
        several breakers with one storage there is always one that may have: they take the long way.
        """
        everybodys = self._shortcut.admission or self._shortcut.rejection
        if noticed and len(self._breakers) == 1 and everybodys and everybodys.generation == circuit.generation:
            return everybodys
        return Admission(circuit.generation, circuit.probe_token)

    def admit(self, admission: Admission) -> None:
        """The next report of this thread, greenlet or task speaks for this."""
        self._variable.set(admission)
