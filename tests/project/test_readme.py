"""The README and the other pages at the top: their code runs, their commands are those of CI, their names exist."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.pages import blocks, parse, run_python
from tests.support.paths import ROOT

#: Most lines of the README: a reader decides here, and reads on in the documentation.
MAX_LINES = 200


def text_of(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def test_readme_is_short():
    """What does not fit has a page of the documentation."""
    assert len(text_of("README.rst").splitlines()) <= MAX_LINES


@pytest.mark.usefixtures("patient")
def test_python_blocks_run_in_order(change_settings: Callable[..., None]):
    """All Python blocks of the page, copied from top to bottom, are a working program."""
    assert run_python("README.rst", change_settings)


@pytest.mark.parametrize("which", ["demo", "test"])
def test_ci_runs_the_commands_that_the_readme_shows(which: str):
    """CI reads the two commands from the page, so that they exist once."""
    page = text_of("README.rst")
    marked = re.search(rf"^\.\. begin-{which}-command$(.*)^\.\. end-{which}-command$", page, re.MULTILINE | re.DOTALL)
    assert marked
    (command,) = re.findall(r"^    (.*)$", marked[1], re.MULTILINE)
    assert command in [source for _, source in blocks("sh")]
    assert f"readme_command {which}" in text_of(".ci/run")


def test_every_shell_block_is_one_of_the_two_commands():
    """A command that no CI job runs may be wrong for years."""
    assert len(list(blocks("sh"))) == 2
    assert not list(blocks("console"))
    assert not list(blocks("bash"))


@pytest.mark.parametrize("page", ["README.rst", "docs/index.rst"])
def test_migration_is_one_import(server: PrivateServer, page: str):
    """The lines to add and the lines to remove build the same breaker."""
    ((_, diff),) = blocks("diff", page)
    use = "CircuitBreaker(state_storage=CircuitRedisStorage('closed', client, 'migration')).current_state"
    with server.client() as client:
        for sign in "-+":
            lines = "\n".join(line[1:] for line in diff.splitlines() if line.startswith(sign))
            namespace: dict[str, object] = {"client": client}
            exec(lines, namespace)
            assert eval(use, namespace) == "closed"


@pytest.mark.parametrize("name", ["README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst", "SECURITY.rst"])
def test_page_is_valid(name: str):
    """A package index or code host shows a page with markup errors without a warning."""
    assert parse(name).astext()


def test_map_names_every_package():
    """A newcomer finds the package to change.  A package that is gone is not on the map."""
    shown = set(re.findall(r"^``(\w+(?:\.py|/))``  ", text_of("CONTRIBUTING.rst"), re.MULTILINE))
    package = ROOT / "pybreaker_redis"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert shown == modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


def test_contributing_names_files_that_exist():
    """Each file that "to change X, look there, run that" names is there."""
    named = set(re.findall(r"(?<![\w/])((?:pybreaker_redis|tests|docs|examples)/[\w./]*)", text_of("CONTRIBUTING.rst")))
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


def test_contributing_repeats_the_test_command_of_the_readme():
    """One command is the default for readers of both pages, and ``--full`` adds to it."""
    (in_readme,) = [source for _, source in blocks("sh") if "pytest" in source]
    command = in_readme.rpartition(" && ")[2].strip()
    page = text_of("CONTRIBUTING.rst")
    assert re.findall(r"^    (.*pytest.*)$", page, re.MULTILINE) == [command, f"{command} --full"]
