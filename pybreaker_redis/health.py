"""Report on the Redis server of one circuit, as one process sees that server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

#: Condition of a circuit's Redis.
#:
#: * ``unused``: this process has made no guarded call yet.
#: * ``connected``: Redis serves the circuit.
#: * ``read-only``: Redis answers, and takes no writes.
#: * ``unreachable``: Redis does not answer.
#: * ``refused``: Redis refuses what this circuit needs, or gives no usable reply.
Condition = Literal["unused", "connected", "read-only", "unreachable", "refused"]

#: Way by which this process receives changes of the circuit.
#:
#: * ``tracking``: Redis pushes every change, whatever client made the change.
#: * ``channel``: processes with this package publish their changes.
#: * ``none``: no push, so the process queries Redis.
PushKind = Literal["tracking", "channel", "none"]


@dataclass(frozen=True, slots=True)
class Health:
    """Condition of a circuit's Redis, known without a query.  Every value may be printed and logged.

    Attributes:
        circuit: Namespace of the circuit.
        server: Host and port or path of the server, and its database (empty while the circuit is unused).
        server_version: Name and version of the server, as in ``valkey 8.1.0`` (empty without a push connection).
        condition: Condition of the server for this circuit, see `Condition`.
        since: Time at which the condition began (``None`` while the circuit is unused).
        state: State of the circuit that this process uses: ``closed``, ``open``, ``half-open``.
        is_own: Whether that circuit is local to this process, and not the shared one.
        last_error: Class and text of the last error of this or the last outage (empty if there was none).
        next_attempt: Seconds until the next attempt to reach Redis (``None`` without an outage).
        attempts: Number of failed attempts in this outage.
        view_age: Seconds since this process last read the shared circuit (``None``: never).
        push: Way by which this process receives changes, see `PushKind`.
        mode: Engine of the circuit: ``lua``, ``optimistic`` (transactions), or empty while the circuit is unused.
        circuits: Number of circuits of this process on the server.
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
