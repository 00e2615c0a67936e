"""Composition of the Lua scripts.

Knows: the files in lua/.  Does not know: clients.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources


@cache
def compose_script(name: str) -> tuple[bytes, str]:
    """Source and SHA-1 of a script: `circuit.lua`, which they all share, and the intent's own file behind it.

    Bytes: a client may have an encoding that does not have all of its characters.
    """
    folder = resources.files(__package__) / "lua"
    source = b"\n".join((folder / f"{part}.lua").read_bytes() for part in ("circuit", name))
    return source, hashlib.sha1(source, usedforsecurity=False).hexdigest()
