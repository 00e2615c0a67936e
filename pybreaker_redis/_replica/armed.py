"""Armed views of one session: circuits that no beat has to read."""

from __future__ import annotations

import contextlib
import weakref

from pybreaker_redis._replica.trust import ArmedTrust, ReadTicket
from pybreaker_redis._replica.view import View

#: Seconds after which an armed circuit is read again: a server reports neither SWAPDB nor, in time, an expiry.
ARMED_MAX_S = 30.0


class ArmedViews:
    """Views of one session, armed ones and others.  Keeps no view alive."""

    def __init__(self) -> None:
        #: Trusts of armed views by their `max_staleness`.
        self._trusts: dict[float, ArmedTrust] = {}
        #: When each view was armed, monotonic seconds, the earliest first.
        self._armed_at: dict[weakref.ref[View], float] = {}
        self._unarmed: set[weakref.ref[View]] = set()

    def add(self, view: View) -> None:
        """Add a view that is not armed."""
        self._unarmed.add(weakref.ref(view))

    def arm(self, view: View, ticket: ReadTicket, now: float) -> None:
        """Arm a view, if nothing was reported since a poll.

        Args:
            view: The view.
            ticket: Ticket of the poll.
            now: Monotonic seconds.
        """
        armed = self._trusts.setdefault(view.max_staleness, ArmedTrust(ticket.sent_at + view.max_staleness))
        if view.arm(ticket, armed):
            reference = weakref.ref(view)
            # The view may have been disarmed since the last beat.
            with contextlib.suppress(ValueError):
                armed.disarmed.remove(reference)
            self._unarmed.discard(reference)
            self._armed_at.pop(reference, None)
            self._armed_at[reference] = now

    def extend_trust(self, sent_at: float) -> None:
        """Extend the trust of all armed views after a sign of life.

        Args:
            sent_at: When the query was sent that the server has answered, monotonic seconds.
        """
        for max_staleness, armed in self._trusts.items():
            armed.trust.until = sent_at + max_staleness

    def take_used(self, now: float) -> list[View]:
        """Return the views that are not armed and were used since they were read.

        Views that were armed `ARMED_MAX_S` ago are armed no longer.

        Args:
            now: Monotonic seconds.
        """
        while self._armed_at:
            reference = next(iter(self._armed_at))
            if now < self._armed_at[reference] + ARMED_MAX_S:
                break
            del self._armed_at[reference]
            if (view := reference()) is not None:
                view.disarm()
        for armed in self._trusts.values():
            while armed.disarmed:
                reference = armed.disarmed.popleft()
                self._armed_at.pop(reference, None)
                self._unarmed.add(reference)
        used = []
        for reference in tuple(self._unarmed):
            view = reference()
            if view is None:
                self._unarmed.discard(reference)
            elif view.fast_path.was_used:
                used.append(view)
        return used
