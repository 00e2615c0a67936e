"""What does a server ask of a circuit of this process that lives there?

Knows: names.  Does not know: circuits, servers.
"""

from __future__ import annotations

from typing import Protocol

from pybreaker_redis._circuits.shared import SharedCircuit


class Member(Protocol):
    """A circuit of this process that lives on the server."""

    #: What people call it.
    circuit_name: str

    #: For how many seconds it may be gone by though no change is heard.
    max_staleness: float

    #: Seconds that it waits for an answer; ``None``: as long as the client takes.
    timeout: float | None

    #: The circuit in Redis.
    shared: SharedCircuit

    @property
    def uses_local(self) -> bool:
        """Whether it goes on in this process alone at present, so that there may be something to bring back."""

    def release_connections(self) -> None:
        """Let go of the server, until the circuit is used again."""

    def on_server_lost(self) -> None:
        """The server is out of reach: what is known of the circuit is not to be believed any more."""

    def move_if_relocated(self) -> bool:
        """Whether it lives elsewhere by now; then it goes on there.

        Raises:
            Exception: Nobody could be asked.
        """

    def load(self) -> None:
        """Ask for the circuit.

        Raises:
            Exception: No usable answer.
        """

    def resume_if_unchanged(self) -> None:
        """Go by the shared circuit again if nothing was learned alone; nothing is sent."""

    def verify_writable(self) -> None:
        """Write something that changes nothing.

        Raises:
            Exception: It cannot be written.
        """

    def bring_back(self) -> str | None:
        """Bring back what was learned alone, and go by the shared circuit again.

        Returns:
            What that came to, in a word or two; empty if there was nothing, ``None`` if somebody is just at it.

        Raises:
            Exception: No usable answer; then it goes on alone.
        """
