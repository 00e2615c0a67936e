"""The documentation: its code runs, its tables equal the code, its names and links exist.

`test_wheel.py` runs the shell commands of the pages.  ``tox -e docs`` builds the pages without a warning.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_args

import pytest
import redis

from pybreaker_redis import BreakerRegistry, CircuitBreaker, CircuitMemoryStorage, CircuitRedisStorage, _log, health
from pybreaker_redis.contrib.celery import BreakerTask
from pybreaker_redis.registry.settings import BreakerSettings
from tests.support.pages import DOCS, HIDDEN, PAGES, blocks, file_of, labels, list_tables, run_python, settings_of
from tests.support.paths import ROOT
from tests.support.public_names import PUBLIC_NAMES

#: Languages of code blocks.  What the last three show is not run.
LANGUAGES = {"python", "sh", "diff", "ini", "text"}

#: Functions of `_log.py` that return no line of their own.
NO_MESSAGES = {"detail"}

SETTINGS_HEAD = ["Name", "Type", "Unit", "Default", "Range", "Where"]


#: Names of the client library that a page needs, and the oldest supported version does not have.  The page states so.
NEEDED_NAMES = {"docs/howto/managed-redis.rst": "CredentialProvider"}


def page_with_needs(page: str) -> Any:
    """Return the parameter for a page, which is left out where the client library is too old for the page."""
    needed = NEEDED_NAMES.get(page)
    is_too_old = needed is not None and not hasattr(redis, needed)
    return pytest.param(page, marks=pytest.mark.skipif(is_too_old, reason=f"this redis-py has no {needed}"))


@functools.cache
def text_of(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("page", [page_with_needs(page) for page in PAGES if any(blocks("python", page))])
def test_python_blocks_run_in_order(page: str, change_settings: Callable[..., None]) -> None:
    """All Python blocks of a page, copied from top to bottom, are a working program."""
    assert run_python(page, change_settings)


def test_settings_of_the_django_page_pass_the_checks(change_settings: Callable[..., None]) -> None:
    """The settings of the page pass Django's checks."""
    from django.core.checks import run_checks

    sources = [source for _, source in blocks("python", "docs/howto/django.rst") if file_of(source) == "settings.py"]
    assert sources
    for source in sources:
        namespace: dict[str, object] = {"os": os}
        exec(source, namespace)
        change_settings(**settings_of(namespace))
        assert run_checks(tags=["pybreaker_redis"]) == []


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_are_run_or_are_no_code(page: str) -> None:
    """A block in another language, or without one, would be code that no test runs."""
    text = text_of(page)
    assert set(re.findall(r"^ *\.\. (?:code-block|code|sourcecode):: *(\S*)", text, re.MULTILINE)) <= LANGUAGES
    assert not re.findall(r"^ *>>>|^(?! *\.\. ).*\S::$", text, re.MULTILINE), "blocks name their language"
    assert not re.findall(r"^ *\.\. (?:raw|testcode|doctest)::", text, re.MULTILINE)


# -- names -------------------------------------------------------------------------------------------------------------


def documented_names() -> set[str]:
    """Return the last parts of the names that the API page documents."""
    text = text_of("docs/reference/api.rst")
    found = re.findall(r"^ *\.\. (?:auto|py:)\w+:: (?:[\w.]+\.)?(\w+)", text, re.MULTILINE)
    for names in re.findall(r"^ +:members: (\S.*)$", text, re.MULTILINE):
        found += names.split(", ")
    return set(found)


def test_api_page_documents_every_public_name() -> None:
    """A name that users may import has its entry."""
    public = {name for names in PUBLIC_NAMES.values() for name in names}
    assert public - documented_names() == set()


def test_api_page_names_every_public_module() -> None:
    """A reader finds the module to import from."""
    text = text_of("docs/reference/api.rst")
    assert [module for module in PUBLIC_NAMES if f"pybreaker_redis.{module}".rstrip(".") not in text] == []


@pytest.mark.parametrize("name", ["Condition", "PushKind"])
def test_api_page_lists_the_values_of_a_literal(name: str) -> None:
    """A program that compares a value of `Health` finds all values."""
    text = text_of("docs/reference/api.rst")
    entry = re.search(rf"^\.\. py:data:: pybreaker_redis\.health\.{name}\n((?: .*\n|\n)*)", text, re.MULTILINE)
    assert entry
    assert re.findall(r'^    \* ``"(.+)"``', entry[1], re.MULTILINE) == list(get_args(getattr(health, name)))


def test_api_page_names_every_setting_of_a_breaker() -> None:
    """The settings are keyword arguments, and no signature on the page shows their names."""
    _, _, entry = text_of("docs/reference/api.rst").partition("settings.BreakerSettings")
    assert [item.name for item in fields(BreakerSettings) if f"``{item.name}``" not in entry] == []


def test_each_log_line_has_its_entry() -> None:
    """A reader in an outage finds the cause and the remedy of each line, and no line that is gone."""
    messages = {
        f"log-{name.replace('_', '-')}"
        for name, function in inspect.getmembers(_log, inspect.isfunction)
        if function.__module__ == _log.__name__ and not name.startswith("_") and name not in NO_MESSAGES
    }
    assert len(messages) > 10
    assert {label for label in labels("docs/reference/log.rst") if label.startswith("log-")} == messages


# -- settings ----------------------------------------------------------------------------------------------------------


def parameters_of(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and default of each parameter, `inspect.Parameter.empty` for parameters without a default."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "self":
            yield name, parameter.default


def expected_settings() -> Iterator[tuple[str, str, Any]]:
    """Yield class, name and default of each setting."""
    for cls in (CircuitBreaker, CircuitRedisStorage, CircuitMemoryStorage, BreakerRegistry):
        yield from ((cls.__name__, *item) for item in parameters_of(cls))
    for name, default in BreakerSettings.with_defaults({}).by_name().items():
        yield "BreakerRegistry", name, default
    for name in ("rejections_count", "rejection_jitter", "dont_autoretry_for"):
        yield "BreakerTask", name, getattr(BreakerTask, name)


def settings_rows() -> list[dict[str, str]]:
    """Return the rows of the settings table."""
    rows = []
    for head, *body in list_tables("docs/reference/settings.rst"):
        if head == SETTINGS_HEAD:
            assert all(len(row) == len(head) for row in body)
            rows += [dict(zip(head, row, strict=True)) for row in body]
    return rows


def default_in(cell: str) -> Any:
    """Return the default that a cell states.  A cell without a literal states that there is none."""
    literal = re.match(r"``(.+?)``", cell)
    if not literal:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(literal[1])
    except (SyntaxError, ValueError):
        return literal[1]


def states(cell: str, default: Any) -> bool:
    """Return whether a cell states a default.  An empty list and an empty tuple are the same default."""
    if isinstance(default, tuple) and default:
        return cell == f"``({', '.join(item.__name__ for item in default)},)``"
    stated = default_in(cell)
    if callable(default) and not isinstance(default, type):
        return stated == default.__name__
    if isinstance(stated, bool) is not isinstance(default, bool):
        return False
    return stated == default or (stated, default) == ([], ())


@pytest.mark.parametrize(("where", "name", "default"), list(expected_settings()))
def test_settings_table_has_each_setting_with_its_default(where: str, name: str, default: Any) -> None:
    """A default that changes in the code changes in the table."""
    cells = [row["Default"] for row in settings_rows() if f"``{name}``" in row["Name"] and where in row["Where"]]
    assert len(cells) == 1, f"rows of {name} for {where}"
    assert states(cells[0], default), cells


def test_settings_table_has_no_setting_that_is_gone() -> None:
    """A setting that the code has no more would raise an error."""
    known = {(where, name) for where, name, _ in expected_settings()}
    classes = {where for where, _ in known}
    shown_settings = {
        (where, name)
        for row in settings_rows()
        for name in re.findall(r"``(\w+)``", row["Name"])
        for where in re.findall(r"\w+", row["Where"])
        if where in classes
    }
    assert shown_settings - known == set()


# -- links -------------------------------------------------------------------------------------------------------------

#: A path of the project, with names of tests, or names of tests of the path before it.
NAMED = re.compile(r"((?:tests|benchmarks|examples|pybreaker_redis)/[\w./-]*\w)?((?:::(?:test_|Test)\w+)*)")


@functools.cache
def definitions(path: str) -> set[str]:
    """Return the names of all functions and classes in a file."""
    nodes = ast.walk(ast.parse(text_of(path)))
    return {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", [*PAGES, "README.rst", "SECURITY.rst", "CHANGELOG.rst"])
def test_named_files_and_tests_exist(page: str) -> None:
    """A claim leads to the test that keeps it."""
    missing, path = [], ""
    for found in NAMED.finditer(text_of(page)):
        path = found[1] or path
        if found[1] and not (ROOT / path).exists():
            missing.append(path)
            continue
        known = definitions(path) if path.endswith(".py") else set()
        missing += [f"{path}::{name}" for name in found[2].split("::")[1:] if name not in known]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_linked_pages_exist(page: str) -> None:
    """Links name pages from the root of the documentation."""
    targets = re.findall(r":doc:`(?:[^`<]*<)?([^`>]+)>?`", text_of(page))
    assert [target for target in targets if not target.startswith("/")] == []
    assert [target for target in targets if not (DOCS / f"{target[1:]}.rst").exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_roles_name_this_package(page: str) -> None:
    """``docs/conf.py`` ignores missing names of other packages, so a name of a role begins with this one."""
    role = r":(?:py:)?(?:class|meth|func|attr|exc|data|mod|obj):`(?:[^`<]*<)?[~!]?([^`>]+)>?`"
    roles = re.findall(role, text_of(page))
    assert [name for name in roles if not name.startswith("pybreaker_redis")] == []


def test_each_page_is_in_a_table_of_contents() -> None:
    """The first page leads to all others."""
    listed = set(re.findall(r"^    ([\w/-]+)$", text_of("docs/index.rst"), re.MULTILINE))
    assert {f"docs/{page}.rst" for page in listed} == set(PAGES) - {"docs/index.rst"}


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_equal_their_source() -> None:
    """The committed pictures are those that their source draws."""
    command = [sys.executable, str(DOCS / "images" / "build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [*PAGES, "README.rst"])
def test_pictures_exist_for_light_and_dark_pages(page: str) -> None:
    """Each picture of a page is a file, has a text, and has its twin."""
    text = text_of(page)
    pictures = re.findall(r"^ *\.\. (?:image|figure):: (\S+)\n((?: +:.*\n?)*)", text, re.MULTILINE)
    for name, options in pictures:
        path = DOCS / name[1:] if name.startswith("/") else (ROOT / page).parent / name
        assert path.exists(), name
        assert ":alt:" in options, name
        if page != "README.rst":
            assert f":class: only-{'light' if 'light' in name else 'dark'}" in options, name
        for twin in ("-light.", "-dark."):
            assert page == "README.rst" or re.sub(r"-(light|dark)\.", twin, name) in dict(pictures), name


# -- these tests -------------------------------------------------------------------------------------------------------


def test_blocks_of_a_page_are_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in lists, blocks with options and hidden set-up count.  Text after a block does not."""
    page = """
.. testsetup::

    a = 1

* An item.

  .. code-block:: python
      :caption: A file

      # shop.py
      if a:
          b = 2

  After it.

.. code-block:: sh

    true
"""
    (tmp_path / "page.rst").write_text(page)
    monkeypatch.setattr("tests.support.pages.ROOT", tmp_path)
    assert list(blocks("python", "page.rst")) == [(4, "a = 1"), (11, "# shop.py\nif a:\n    b = 2")]
    assert list(blocks("sh", "page.rst")) == [(19, "true")]
    assert [file_of(source) for _, source in blocks("python", "page.rst")] == [None, "shop.py"]
    assert run_python("page.rst", lambda **_: None) == 2
    assert set(HIDDEN) == {"testsetup", "testcleanup"}


def test_rows_of_a_list_table_are_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells may be empty, and may have several lines."""
    page = """
.. list-table::
    :header-rows: 1

    * - Name
      - Default
    * - ``timeout``
      - ``0.25`` seconds,
        or so
    * - ``state``
      -

After it.
"""
    (tmp_path / "page.rst").write_text(page)
    monkeypatch.setattr("tests.support.pages.ROOT", tmp_path)
    (rows,) = list_tables("page.rst")
    assert rows == [["Name", "Default"], ["``timeout``", "``0.25`` seconds, or so"], ["``state``", ""]]
    assert [default_in(cell) for _, cell in rows[1:]] == [0.25, inspect.Parameter.empty]
