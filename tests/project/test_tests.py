"""Rules of the tests themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tests").rglob("*.py"))}

#: The only file that reaches into private objects of the package.
INSPECT = "tests/support/inspect.py"

#: Private names of other projects, and of what Python brings along, which tests need.
FOREIGN = {
    *("_exit", "_current_frames", "_register_atexit"),
    # redis-py
    *("_available_connections", "_connect", "_parser", "_retries", "_sock"),
    # pybreaker
    *("_create_new_state", "_fail_counter", "_handle_error", "_handle_success", "_inc_counter"),
    "_throw_new_error_on_trip",
    # Celery
    "_install_stack_protection",
}

#: Calls with the name of an attribute as their second argument.
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "patch", "object"}


def is_private(name: str) -> bool:
    """Return whether a name is private, and not one of Python's own protocols."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(node: ast.expr) -> bool:
    """Return whether an expression is `self` or `cls`, or the class above."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use of a private attribute of another object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[1]
            if called in BY_NAME and isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("pybreaker_redis._", "tests.")):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each imported module, and of each imported name as if it were a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("name", [name for name in FILES if name != INSPECT])
def test_only_inspect_reaches_into_private_objects(name: str) -> None:
    """The change of a private name leads to changes in one file of the tests."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert [(line, used) for line, used in private_uses(tree) if used not in FOREIGN] == []


@pytest.mark.parametrize("name", FILES)
def test_tests_import_no_tests(name: str) -> None:
    """What tests share lies in `tests/support`, so each file of tests can be run and moved alone."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    tests = [
        (line, module)
        for line, module in imported_modules(tree)
        if module.startswith("tests.") and module.split(".")[-1].startswith(("test_", "conftest"))
    ]
    assert tests == []


def test_uses_of_private_names_are_found() -> None:
    """Each form of access counts, and access to the own object does not."""
    source = """
from pybreaker_redis._redis.url import _parse, parse
class Made:
    def act(self):
        self._own = super()._own
        self.other._inner.outer = getattr(self, "_x")
        monkeypatch.setattr(made, "_patched", 1)
        made.__class__, made._ = 1, 2
"""
    assert sorted(used for _, used in private_uses(ast.parse(source))) == ["_inner", "_parse", "_patched", "_x"]
