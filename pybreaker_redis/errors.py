"""Exceptions of this package.

Guarded calls raise `CircuitOpenError`, and no error of Redis.  `StorageUnavailableError` is raised by the commands of
operators, such as `BreakerRegistry.status` and `BreakerRegistry.set_state`.
"""

from __future__ import annotations

import pickle
from datetime import datetime
from typing import Any

from pybreaker import CircuitBreakerError

from pybreaker_redis._runtime.redaction import describe_error


class PybreakerRedisError(Exception):
    """Base class of this package's exceptions."""


class CircuitOpenError(CircuitBreakerError, PybreakerRedisError):
    """Rejection of a call by an open circuit, or the end of the call that opened the circuit.

    The message is the only argument, so pickle and Celery can carry the error.  The attributes survive a pickle.  Where
    only the message survives, they have their defaults.

    Args:
        message: Text for people.

    Attributes:
        circuit: Name of the circuit.
        retry_after: Seconds from the time of the error until a call may be admitted.
        opened_at: Time at which the circuit opened, aware.  ``None``: unknown.
        state: ``open``, or ``half-open`` while another call probes.
        cause: Class and message of the error that opened the circuit.  Empty: unknown in this process.
    """

    circuit: str = ""
    retry_after: float = 0.0
    opened_at: datetime | None = None
    state: str = "open"
    cause: str = ""


class UnusableReplyError(PybreakerRedisError):
    """Reply that no Redis command of this package returns.

    The client suppresses errors, or a proxy between the client and the server changes replies.
    """


class StorageUnavailableError(PybreakerRedisError):
    """Failure of an operator's command: Redis did not execute the command.

    Args:
        circuits: Names of the circuits that the command concerns, at least one.
        server: Host and port or path of the server, and its database (empty if the server is not known yet).
        timeout: Seconds that the command waited for Redis at most (``None``: as long as the client waits).
        cause: Error of the client, or of the function that returns the client.

    Attributes:
        circuit: Name of the first circuit.
        circuits: Names of the circuits that the command concerns.
        server: Address of the server, empty if unknown.
        timeout: Seconds that the command waited at most.
        cause: Error of the client, or of the function that returns the client.
    """

    def __init__(self, circuits: tuple[str, ...], server: str, timeout: float | None, cause: BaseException) -> None:
        super().__init__(circuits, server, timeout, cause)
        self.circuit = circuits[0]
        self.circuits = circuits
        self.server = server
        self.timeout = timeout
        self.cause = cause

    def __str__(self) -> str:
        others = len(self.circuits) - 1
        more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
        where = f" at {self.server}" if self.server else ""
        limit = "" if self.timeout is None else f"limit {self.timeout:g} s, "
        return (
            f"circuit {self.circuit!r}{more}: Redis{where} did not execute the command "
            f"({limit}{describe_error(self.cause)}); check health()"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        cause = self.cause
        try:
            pickle.dumps(cause)
        except Exception:  # noqa: BLE001
            # The error may hold a connection, which cannot be pickled.
            cause = Exception(describe_error(cause))
        return type(self), (self.circuits, self.server, self.timeout, cause)
