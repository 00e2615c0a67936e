"""How is a server with children of its own run, and what is left of it?

Knows: processes, signals, /proc.  Does not know: which server it is, what it serves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pybreaker_redis.testing import servers

#: The root of the project: where servers find the application.
ROOT = Path(__file__).parents[3]


class Node:
    """One server and its children; they are its process group, and none of them outlives the test.

    Args:
        command: Program and arguments.
        log: Where its output goes.
        environment: On top of this process's.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                # The kernel kills it if the test process dies.
                [sys.executable, "-I", "-S", "-c", servers.PARENT_DEATH_LAUNCHER, str(os.getpid()), *command],
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def log(self) -> str:
        """What it and its children have printed."""
        return self._log.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def children(self) -> set[int]:
        """Processes that it has started and that are alive."""
        return {pid for pid, parent, _ in _processes() if parent == self.pid}

    def group(self) -> set[int]:
        """Every process of it that is alive, itself included."""
        return {pid for pid, _, group in _processes() if group == self.pid}

    def threads(self) -> int:
        """Threads of its own process, as the kernel counts them."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def signal(self, number: signal.Signals) -> None:
        """Send it, not its children, a signal."""
        self._process.send_signal(number)

    def wait(self, within: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended.
        """
        return self._process.wait(within)

    def close(self) -> None:
        """End it and whatever is left of it, at once; whether it can end in good order is a test of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _processes() -> list[tuple[int, int, int]]:
    """Process, parent and group of all that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes come and go while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                found.append((int(entry.name), int(parent), int(group)))
    return found
