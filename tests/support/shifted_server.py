"""A real server with a wall clock that a test can set."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pybreaker_redis.testing.servers import PrivateServer


@cache
def library(folder: Path) -> Path:
    """Return the compiled `shifted_server.c`, built once for all servers of a test run."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        reason = "to set the clock of a server needs Linux and a C compiler"
        if os.environ.get("CI") and sys.platform == "linux":
            pytest.fail(reason)
        pytest.skip(reason)
    made = folder / "shifted.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, source], check=True, timeout=60)
    return made


class ShiftedServer(PrivateServer):
    """Server with a shifted wall clock.

    Args:
        binary: See `PrivateServer`.
        folder: Folder for the compiled library.
        words: Further arguments of `PrivateServer`.
    """

    def __init__(self, binary: str, folder: Path, **words: Any) -> None:
        super().__init__(binary, **words)
        self._library = library(folder)
        self._shift = self.directory / "shift"
        self._shift.write_bytes(struct.pack("q", 0))

    def start(self) -> ShiftedServer:
        """See `PrivateServer.start`."""
        with mock.patch.dict(os.environ, LD_PRELOAD=str(self._library), SHIFT_FILE=str(self._shift)):
            super().start()
        return self

    def set_clock(self, ahead: float) -> None:
        """Set the clock.

        Args:
            ahead: Seconds by which the clock is ahead of this host's from now on.
        """
        with self._shift.open("r+b") as file:
            file.write(struct.pack("q", int(ahead * 1e6)))
