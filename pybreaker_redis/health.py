"""How is a circuit's Redis?

Knows: what there is to tell.  Does not know: how it is found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

#: ``unused``: no guarded call in this process yet.  ``connected``: all is well.  ``read-only``: Redis answers, and
#: takes no writes.  ``away``: it does not answer.  ``refused``: it refuses what this circuit needs, or makes no sense.
Condition = Literal["unused", "connected", "read-only", "away", "refused"]

PushKind = Literal["tracking", "channel", "none"]


@dataclass(frozen=True, slots=True)
class Health:
    """What a process knows about a circuit's Redis, without asking.  Everything here may be printed and logged.

    Attributes:
        circuit: The namespace.
        server: Host and port or path, and database; empty while the circuit is unused.
        server_version: As in ``valkey 8.1.0``; empty if nobody listens to it.
        condition: See `Condition`.
        since: When that began; ``None`` while the circuit is unused.
        state: Of the circuit that this process goes by: ``closed``, ``open``, ``half-open``.
        is_own: Whether that is its own circuit, not the shared one.
        last_error: The last error of this or the last outage: class and message; empty if there was none.
        next_attempt: Seconds until Redis is asked again; ``None`` unless something is the matter.
        attempts: How often it was asked in vain since.
        view_age: Seconds since the shared circuit was seen last; ``None`` if it never was.
        push: How changes are heard: ``tracking`` (whoever makes them), ``channel`` (what is published), or ``none``.
        mode: How the circuit is moved: ``lua``, ``optimistic`` (without scripts), or empty: it was not yet.
        circuits: How many circuits of this process live on the server.
    """

    circuit: str
    server: str
    server_version: str
    condition: Condition
    since: datetime | None
    state: str
    is_own: bool
    last_error: str
    next_attempt: float | None
    attempts: int
    view_age: float | None
    push: PushKind
    mode: str
    circuits: int
