"""Events that the demo's processes report to their parent, one JSON object per line of standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal[
    # Result of a worker's call, as its caller saw it.
    "success",
    "failure",
    "rejected",
    # A worker's call ended with an error that no caller of the dependency may see.
    "leaked",
    # A worker lost the server that holds the circuit, or reached it again.
    "unreachable",
    "returned",
    # A worker's breaker called its listeners with a new state.
    "state",
    # The stage killed a worker.
    "killed",
    # The stage killed or started the server, or read the circuit's state in it.
    "server",
    # The dependency listens, changed its health, received a call, or ended one.
    "ready",
    "health",
    "reached",
    "left",
]


@dataclass(frozen=True)
class Event:
    """One event in one process.

    Attributes:
        source: Name of the process.
        kind: Kind of the event.
        at: Seconds of the monotonic clock, which all processes of a machine share.
        took: Duration of a call, in seconds.
        state: For a worker, its circuit's state afterwards.  For the dependency, its health when the call began.  For
            the server, ``killed``, ``started``, or the state of the circuit in it.
        caller: Worker that made the call, for ``reached`` and ``left``.
        port: Port of the dependency, for ``ready``.
        error: Error that ended the call, for ``leaked``.
    """

    source: str
    kind: Kind
    at: float
    took: float = 0.0
    state: str = ""
    caller: str = ""
    port: int = 0
    error: str = ""


def emit(event: Event) -> None:
    """Write an event to standard output, from any thread."""
    line = json.dumps(asdict(event)) + "\n"
    # Writes of less than PIPE_BUF bytes are atomic, so lines of several threads do not mix.  After the demo was killed
    # no process reads the pipe, and the end of standard input ends this process.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), line.encode())


def parse(line: str) -> Event:
    """Read an event from a line that `emit` wrote."""
    return Event(**json.loads(line))
