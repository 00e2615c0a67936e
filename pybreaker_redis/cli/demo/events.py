"""What the processes of the demo report, and how it travels: one JSON object per line.

Knows: the fields of a report, a pipe.  Does not know: who reads it, processes, circuits.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal[
    # a worker's call, as its caller saw it
    "success",
    "failure",
    "rejected",
    # neither: it ended with an error that no caller of the dependency should ever see
    "leaked",
    # a worker found the server that holds the circuit away, and back
    "away",
    "back",
    # a worker's breaker told its listeners of a new state
    "state",
    # the stage killed a worker
    "killed",
    # the stage killed the server, started it, read in it how the circuit is
    "server",
    # the dependency: it listens, its health was switched, a call reached it, and has been answered or given up
    "ready",
    "health",
    "reached",
    "left",
]


@dataclass(frozen=True)
class Event:
    """One thing that happened in one process."""

    #: Name of the process.
    source: str
    #: What happened.
    kind: Kind
    #: When: seconds of the monotonic clock, which all processes of a machine share.
    at: float
    #: How long a call took, in seconds.
    took: float = 0.0
    #: Of a worker: the state of its circuit afterwards.  Of the dependency: its health; of a call, as it began.  Of the
    #: server: ``killed``, ``started``, or the state of the circuit in it.
    state: str = ""
    #: The worker whose call it is, of ``reached`` and ``left``.
    caller: str = ""
    #: The port, of ``ready``.
    port: int = 0
    #: What has ended the call, of ``leaked``.
    error: str = ""


def emit(event: Event) -> None:
    """Report to the process that started this one, from any thread."""
    line = json.dumps(asdict(event)) + "\n"
    # A single write of less than PIPE_BUF bytes is not torn apart by those of other threads.  When the demo has been
    # killed nobody reads; the end of standard input is what ends this process then.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), line.encode())


def parse(line: str) -> Event:
    """Read what :func:`emit` wrote."""
    return Event(**json.loads(line))
