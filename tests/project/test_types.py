"""Types for users: both checkers find each mistake in `mistakes.py`, and reports no other line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

MISTAKES = Path(__file__).with_name("mistakes.py")
ROOT = MISTAKES.parents[2]

# Run by ``tox -e types``, which has both checkers.
pytestmark = pytest.mark.types


def expected_lines() -> set[int]:
    """Return the numbers of the lines with a mistake."""
    lines = MISTAKES.read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# mistake")}


def test_mypy_finds_each_mistake() -> None:
    """A misspelled setting, a wrong state or a wrong argument is found before the code runs."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(MISTAKES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {int(line) for line in re.findall(r"mistakes\.py:(\d+): error", done.stdout)}
    assert found == expected_lines(), done.stdout + done.stderr


def test_pyright_finds_each_mistake() -> None:
    """Editors of users show the same."""
    command = [sys.executable, "-m", "pyright", "--outputjson", str(MISTAKES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)["generalDiagnostics"]
    found = {item["range"]["start"]["line"] + 1 for item in report if item["severity"] == "error"}
    assert found == expected_lines(), report
