"""Members of a server: what a server calls on the circuits that are stored there.

The server package stands below the package of circuits.  `Member` is the one way from a server up to a circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pybreaker_redis._servers.retry import ReturnAttempt


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

    def on_server_returned(self, members: Sequence[Member], attempt: ReturnAttempt) -> MemberFailure | None:
        """Have all members of a server use it again.  Called on one member, for all of them.

        An error of the client library before `ReturnAttempt.let_callers_in` passes unchanged: the outage goes on.

        Args:
            members: All members when the attempt began.
            attempt: The attempt that the server makes.

        Returns:
            The failure that ended the return after callers were let in, ``None`` if there was none.
        """


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
        timeout_s: Seconds that the member waits for an answer; ``None``: as long as the client does.
    """

    registered_at: float
    thread_id: int
    circuit: str
    timeout_s: float | None
