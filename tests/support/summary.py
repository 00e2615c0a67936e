"""Report at the end of a test run: servers, measured figures, the matrix of servers and clients.

A test reports through properties, which pytest-xdist carries from its workers to the process that prints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import matrix, servers

#: Names of the properties.
FIGURE, SERVER, CELL, PUSH = "figure", "server", "cell", "push"


class Summary:
    """Plugin that collects the reports of tests and prints them.

    Args:
        client: Name of the client library under test.
    """

    def __init__(self, client: str) -> None:
        self._figures: list[str] = []
        self._used: dict[str, int] = {}
        self._matrix = matrix.Results(client)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the report of a test."""
        properties = [(name, value) for name, value in report.user_properties if name in (FIGURE, SERVER, CELL, PUSH)]
        of_test = dict(properties)
        if CELL in of_test:
            if report.failed:
                self._matrix.failed(*of_test[CELL])
            elif report.when == "call" and report.passed:
                self._matrix.passed(*of_test[CELL], of_test.get(PUSH, ""))
        # Each phase repeats the properties of the phases before it, so those of the last phase are complete.
        if report.when == "teardown":
            for name, value in properties:
                if name == FIGURE:
                    self._figures.append(value)
                elif name == SERVER:
                    self._used[value] = self._used.get(value, 0) + 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the servers in use and the measured figures, and write the matrix."""
        if self._used:
            terminalreporter.section("servers")
            for name, count in self._used.items():
                terminalreporter.line(f"{name}: used by {count} tests")
            for line in servers.summary()[1:]:
                terminalreporter.line(line)
        if self._matrix.cells:
            terminalreporter.section(f"matrix, {self._matrix.client}")
            for server, kinds in self._matrix.cells.items():
                terminalreporter.line(f"{server}: " + ", ".join(f"{kind}: {cell}" for kind, cell in kinds.items()))
            if os.environ.get(matrix.VARIABLE):
                self._matrix.write(Path(os.environ[matrix.VARIABLE]))
        if self._figures:
            terminalreporter.section("figures")
            for figure in self._figures:
                terminalreporter.line(figure)
