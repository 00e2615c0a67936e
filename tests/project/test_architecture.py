"""The map in the README stays true: who may import whom, who may know Redis, pybreaker and the time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pybreaker_redis

PACKAGE = Path(pybreaker_redis.__file__).parent

#: The order of the flow: a module imports only modules that stand in a later row.
ROWS = (
    ("fixtures",),
    ("prometheus", "testing"),
    ("registry", "listeners"),
    ("_settings",),
    ("__init__",),
    ("storage",),
    ("_tenancy",),
    ("_stand_in",),
    ("_own",),
    ("memory", "_breakers"),
    ("_operated",),
    ("_adapter",),
    ("_gate",),
    ("_caller", "_arguments", "_examination", "_urls", "_twins"),
    ("_admissions", "_frames", "_probes"),
    ("_survey",),
    ("_server",),
    ("_rejoin",),
    ("_tenant",),
    ("_shared", "_connections"),
    ("_ear",),
    ("_carriers",),
    ("_listener",),
    ("_session",),
    ("_said", "_hearings"),
    ("_scripts", "_optimistic", "_whereabouts"),
    ("_view", "_line", "_guard", "_cluster", "_answers"),
    ("_carrier", "_record", "_shortcut", "_client", "_spell"),
    ("_intents", "_lifetime", "_deadline", "_words", "_names"),
    ("_outside",),
    ("_signals",),
    ("_bulletin",),
    (
        "_circuit",
        "_keys",
        "_secrets",
        "_clock",
        "_forks",
        "_threads",
        "errors",
        "health",
        "_guarded",
        "_extras",
    ),
)
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__main__")


def imports(module: str) -> Iterator[str]:
    """Full names of everything that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    names = (name.split(".") for name in imports(module))
    return {parts[1] for parts in names if parts[0] == "pybreaker_redis" and parts[1] in MODULES}


def test_public_names_are_three() -> None:
    """The public surface is small, and grows only on purpose."""
    assert pybreaker_redis.__all__ == ("CircuitMemoryStorage", "CircuitRedisStorage", "Health")


def test_every_module_has_its_row() -> None:
    """A new module is a decision about the direction of the flow."""
    assert sorted(module for row in ROWS for module in row) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_flow(module: str) -> None:
    """Data flows one way; an import against it would be an arrow backwards."""
    later = {name for row in ROWS[next(i for i, row in enumerate(ROWS) if module in row) + 1 :] for name in row}
    assert ours(module) <= later


@pytest.mark.parametrize(
    "module",
    [
        *("_circuit", "_keys", "_secrets", "_clock", "_forks", "_signals", "_threads"),
        *("errors", "health", "_frames"),
    ],
)
def test_foundations_import_nothing_of_ours(module: str) -> None:
    """What everything stands on stands alone."""
    assert ours(module) == set()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("redis", {"_optimistic", "_urls"}),
        (
            "pybreaker",
            {
                *("_adapter", "_admissions", "_breakers", "_frames", "_gate", "_guarded", "_settings"),
                *("listeners", "prometheus", "registry", "testing"),
            },
        ),
        ("prometheus_client", {"prometheus"}),
        ("pytest", {"fixtures"}),
        # Optimistic carrier, listener and keeper wait between attempts; else it is what tests replace, or move.
        (
            "time",
            {"_bulletin", "_clock", "_guard", "_listener", "_optimistic", "_server", "_shortcut", "_view", "testing"},
        ),
        ("datetime", {"_clock", "_adapter", "_examination", "health", "registry", "testing"}),
        (
            "threading",
            {
                *("_bulletin", "_caller", "_carriers", "_connections", "_ear", "_guard", "_hearings", "_listener"),
                *("_own", "_server", "_threads", "_twins", "_view", "memory", "prometheus", "registry"),
            },
        ),
        ("socket", {"_deadline"}),
    ],
)
def test_only_these_modules_know(library: str, allowed: set[str]) -> None:
    """Redis, pybreaker, time and threads are each the business of few."""
    assert {module for module in MODULES if library in {name.split(".")[0] for name in imports(module)}} == allowed


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("_") and module != "__init__"])
def test_module_states_its_question(module: str) -> None:
    """A newcomer finds the module to change from the first line of each."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    assert docstring
    assert "Knows:" in docstring
    assert "Does not know:" in docstring


def test_modules_fit_on_a_few_screens() -> None:
    """A module that outgrows this may hold two questions."""
    assert {
        path.name: lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 320
    } == {}
