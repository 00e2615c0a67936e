"""Members of a server: what a server calls on the circuits that are stored there.

The server package stands below the package of circuits.  `Member` is the one way from a server up to a circuit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from pybreaker_redis._servers.availability import Availability


class Member(Protocol):
    """One circuit of this process that is stored on a server.

    A server refers to its members weakly.  These four methods are all that it calls.
    """

    def on_server_lost(self) -> None:
        """Stop trusting the view and the server.  Must neither wait nor raise.

        `Server.availability` holds the outage already.
        """

    def verify_server(self) -> None:
        """Query the circuit within its timeout.

        An error of the client library passes unchanged, for `error_kind`.
        """

    def move_if_relocated(self) -> bool:
        """Look for the circuit on other nodes, and follow it.  Errors are logged, never raised.

        Returns:
            Whether the circuit is stored on another server now.
        """
        ...

    def on_server_returned(self, members: Sequence[Member], attempt: ReturnProgress) -> MemberFailure | None:
        """Have all members of a server use it again.  Called on one member, for all of them.

        An error of the client library before `ReturnProgress.let_callers_in` passes unchanged: the outage goes on.

        Args:
            members: All members when the attempt began.
            attempt: The attempt that the server makes.

        Returns:
            The failure that ended the return after callers were let in, ``None`` if there was none.
        """


class ReturnProgress:
    """Progress of one attempt to use a server again after an outage.

    Args:
        availability: Availability of the server.
        answer_wait_s: Shortest wait for the first answer, seconds.  A longer timeout of a member takes precedence.
        current_members: Returns the members as of now: some may have been added since the attempt began.

    Attributes:
        answer_wait_s: Shortest wait for the first answer, seconds.
        current_members: Function that returns the members as of now.
        outcomes: Number of members for each result of a return, such as ``opened for all``, for the log.
        outage_s: Length of the outage, seconds, ``None`` while it lasts, or if another thread has ended it.
        has_let_callers_in: Whether callers may query the server, though members may still be returning.
    """

    def __init__(
        self, availability: Availability, answer_wait_s: float, current_members: Callable[[], Sequence[object]]
    ) -> None:
        self._availability = availability
        self.answer_wait_s = answer_wait_s
        self.current_members = current_members
        self.outcomes: Counter[str] = Counter()
        self.outage_s: float | None = None
        self.has_let_callers_in = False

    def let_callers_in(self) -> None:
        """End the outage, once.  From here on callers' threads count their own returns in `outcomes`, too."""
        if not self.has_let_callers_in:
            # In this order: a caller that is let in finds this object as `Server.current_return`.
            self.has_let_callers_in = True
            self.outage_s = self._availability.note_answer()


class MemberFailure(NamedTuple):
    """Failure of a server that one member met.

    Attributes:
        error: What the client library raised.
        member: The circuit.
        began_at: When the member sent its query, monotonic seconds.
    """

    error: Exception
    member: Member
    began_at: float


class Registration(NamedTuple):
    """Entry of one member.

    Attributes:
        registered_at: Time of the registration, monotonic seconds.
        thread_id: Thread that registered the member.
        circuit: Name of the circuit, for log lines.
        timeout_s: Seconds that the member waits for an answer, ``None`` for as long as the client does.
    """

    registered_at: float
    thread_id: int
    circuit: str
    timeout_s: float | None
