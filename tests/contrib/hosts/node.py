"""A server with its child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pybreaker_redis.testing import servers
from tests.support.paths import ROOT

#: Root of the project, from which servers load the application.


class Node:
    """One server and its children, a process group that ends with the test.

    Args:
        command: Program and arguments.
        log: File for the output.
        environment: Environment variables in addition to those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                # The kernel kills the node if the test process dies.
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
        """Output of the node and its children."""
        return self._log.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether the node has not ended."""
        return self._process.poll() is None

    def children(self) -> set[int]:
        """Return the running child processes of the node."""
        return {pid for pid, parent, _ in _processes() if parent == self.pid}

    def group(self) -> set[int]:
        """Return the running processes of the group, with the node itself."""
        return {pid for pid, _, group in _processes() if group == self.pid}

    def threads(self) -> int:
        """Return the number of the node's own threads, as the kernel counts them."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the node, and not to its children."""
        self._process.send_signal(number)

    def wait(self, within: float) -> int:
        """Wait for the end of the node, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: The node has not ended.
        """
        return self._process.wait(within)

    def close(self) -> None:
        """Kill the node and its children at once.  An orderly end is a test of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _processes() -> list[tuple[int, int, int]]:
    """Return process, parent and group of each running process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes start and end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                found.append((int(entry.name), int(parent), int(group)))
    return found
