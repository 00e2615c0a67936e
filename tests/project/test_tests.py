"""Rules of the tests themselves."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import selection, servers
from tests.support.engines import EngineCase
from tests.support.paths import ROOT
from tests.support.servers import FoundServer

FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tests").rglob("*.py"))}

#: The only file that reaches into private objects of the package.
INSPECT = "tests/support/inspect.py"

#: Private names of other projects, and of what Python brings along, which tests need.
FOREIGN = {
    *("_exit", "_current_frames", "_getframe", "_register_atexit"),
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


@functools.cache
def parsed(name: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


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
    tree = parsed(name)
    assert [(line, used) for line, used in private_uses(tree) if used not in FOREIGN] == []


@pytest.mark.parametrize("name", FILES)
def test_tests_import_no_tests(name: str) -> None:
    """What tests share lies in `tests/support`, so each file of tests can be run and moved alone."""
    tree = parsed(name)
    tests = [
        (line, module)
        for line, module in imported_modules(tree)
        if module.startswith("tests.") and module.split(".")[-1].startswith(("test_", "conftest"))
    ]
    assert tests == []


#: Attributes of pytest's fixture `caplog` that hold what was logged.
WHOLE_LOG = {"messages", "record_tuples", "records", "text"}

#: Files that read the whole log: tests that a secret stands nowhere, and tests of other loggers.
READERS = (
    "tests/support/",
    "tests/unit/test_secrets.py",
    "tests/contrib/test_django.py",
    "tests/contrib/test_instrument.py",
)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(READERS)])
def test_log_lines_are_those_of_the_tests_own_subjects(name: str) -> None:
    """Threads of earlier tests may still log: `tests/support/logs.py` finds the lines about a server or a circuit."""
    tree = parsed(name)
    reads = [
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in WHOLE_LOG and "caplog" in ast.unparse(node.value)
    ]
    assert reads == []


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


def item(*markers: str, **parameters: Any) -> Any:
    """Return a test with these markers and parameters."""
    callspec = {"callspec": SimpleNamespace(params=parameters)} if parameters else {}
    return SimpleNamespace(get_closest_marker=lambda name: name in markers or None, **callspec)


@pytest.mark.parametrize("markers", [("slow",), ("full",), ("slow", "full")])
def test_slow_tests_run_with_full_only_but_for_samples(markers: tuple[str, ...]) -> None:
    """The README's command gives an answer within minutes, with an example of each kind of fault."""
    assert not selection.is_left_out(item())
    assert selection.is_left_out(item(*markers))
    assert not selection.is_left_out(item(*markers, "sample"))


def test_tests_run_on_one_server_without_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preferred one, in whatever form a test has it as a parameter."""
    first, other = (FoundServer(f"/nowhere/{name}", "made up", "Redis", "9.9.9") for name in ("first", "other"))
    monkeypatch.setattr(servers, "at_hand", lambda: (first, other))
    for found, is_left_out in ((first, False), (other, True)):
        engine = EngineCase("engine", lambda take: None, found=found)  # type: ignore[arg-type,return-value]
        for value in (found, found.binary, ("Cluster", found), (found, {"decoded": True}), engine):
            assert selection.is_left_out(item("sample", value=value)) is is_left_out
