"""Composition of the Lua scripts.

Each script is the shared prelude, followed by the file of one operation, without comments and indentation.  Operations
that count calls begin with a fast lane.  Line numbers in error messages of the server refer to this composition.
``print(compose_script("trip").source.decode())`` shows one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

#: File that precedes every operation.
PRELUDE = "prelude"

#: File with the checks of the fast lane.
LANE = "lane"

#: Operations with a fast lane.  The file of the lane has the name of the operation and the ending ``_lane``.
LANE_OPERATIONS = frozenset(("record_failure", "record_success"))


#: Operations that the listener loads into the server, so that the first call of each kind costs what later ones cost.
PRELOADED_OPERATIONS = (
    *("load", "record_failure", "record_success", "trip", "claim_probe", "count_probe", "close", "release_probe"),
)


class Script(NamedTuple):
    """Lua script as the server receives the script.

    Attributes:
        source: Source for EVAL.  Bytes, because a client may have an encoding that does not have some characters.
        sha1: Digest for EVALSHA.
    """

    source: bytes
    sha1: str


@cache
def compose_script(operation: str) -> Script:
    """Return the script of an operation.

    Args:
        operation: Name of the operation's file, without its ending.
    """
    lane = (LANE, f"{operation}_lane") if operation in LANE_OPERATIONS else ()
    lines = "\n".join(strip_comments(_read(part)) for part in (*lane, PRELUDE, operation)).splitlines()
    source = "\n".join(line.lstrip() for line in lines).encode("ascii")
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


def preloaded_scripts() -> tuple[Script, ...]:
    """Return the scripts of `PRELOADED_OPERATIONS`."""
    return tuple(map(compose_script, PRELOADED_OPERATIONS))


def strip_comments(lua: str) -> str:
    """Return a Lua source without blank lines and without lines that are comments."""
    lines = (line for line in lua.splitlines() if line.strip() and not line.lstrip().startswith("--"))
    return "\n".join(lines)


def _read(part: str) -> str:
    return (resources.files("pybreaker_redis._engines") / "lua" / f"{part}.lua").read_text(encoding="utf-8")
