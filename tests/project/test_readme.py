"""The README: its code runs, its commands are those of CI, its names exist."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.pages import blocks, parse
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def change_settings(server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Function that changes Django's settings, beside a server that ``REDIS_URL`` names."""
    from django.test import override_settings

    from tests.support import django_project  # noqa: F401 (it configures Django)

    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("REDIS_URL", server.url)
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(override_settings(**settings))


def test_python_blocks_run_in_order(change_settings: Callable[..., None]):
    """All Python blocks of the page, copied from top to bottom, are a working program."""
    namespace: dict[str, object] = {"__name__": "readme"}
    shown = list(blocks("python"))
    assert shown
    for line, source in shown:
        # Tracebacks name the README and a line near the block.
        exec(compile("\n" * max(0, line - 1) + source, "README.rst", "exec"), namespace)
        if source.startswith("# settings.py"):
            change_settings(**{name: value for name, value in namespace.items() if name.isupper()})


def test_settings_of_the_page_pass_the_checks(change_settings: Callable[..., None]):
    """The settings of the page pass Django's checks."""
    from django.core.checks import run_checks

    (source,) = (source for _, source in blocks("python") if source.startswith("# settings.py"))
    namespace: dict[str, object] = {"os": os}
    exec(source, namespace)
    change_settings(**{name: value for name, value in namespace.items() if name.isupper()})
    assert run_checks(tags=["pybreaker_redis"]) == []


@pytest.mark.parametrize("which", ["demo", "test"])
def test_ci_runs_the_commands_that_the_readme_shows(which: str):
    """CI reads the two commands from the page, so that they exist once."""
    page = (ROOT / "README.rst").read_text(encoding="utf-8")
    marked = re.search(rf"^\.\. begin-{which}-command$(.*)^\.\. end-{which}-command$", page, re.MULTILINE | re.DOTALL)
    assert marked
    (command,) = re.findall(r"^    (.*)$", marked[1], re.MULTILINE)
    assert command in [source for _, source in blocks("sh")]
    assert f"readme_command {which}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_shell_block_is_one_of_the_two_commands():
    """A command that no CI job runs may be wrong for years."""
    assert len(list(blocks("sh"))) == 2
    assert not list(blocks("console"))
    assert not list(blocks("bash"))


def test_migration_is_one_import(server: PrivateServer):
    """The lines to add and the lines to remove build the same breaker."""
    ((_, diff),) = blocks("diff")
    use = "CircuitBreaker(state_storage=CircuitRedisStorage('closed', client, 'migration')).current_state"
    with server.client() as client:
        for sign in "-+":
            lines = "\n".join(line[1:] for line in diff.splitlines() if line.startswith(sign))
            namespace: dict[str, object] = {"client": client}
            exec(lines, namespace)
            assert eval(use, namespace) == "closed"


@pytest.mark.parametrize("name", ["README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst", "docs/glossary.rst"])
def test_page_is_valid(name: str):
    """A package index or code host shows a page with markup errors without a warning."""
    assert parse(name).astext()


def test_map_names_every_package():
    """A newcomer finds the package to change.  A package that is gone is not on the map."""
    page = (ROOT / "README.rst").read_text(encoding="utf-8")
    shown = set(re.findall(r"^``(\w+(?:\.py|/))``  ", page, re.MULTILINE))
    package = ROOT / "pybreaker_redis"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert shown == modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


def test_contributing_names_files_that_exist():
    """Each file that "to change X, look there, run that" names is there."""
    page = (ROOT / "CONTRIBUTING.rst").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])((?:pybreaker_redis|tests|docs|examples)/[\w./]*)", page))
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


def test_contributing_repeats_the_test_command_of_the_readme():
    """One command is the default for readers of both pages, and ``--full`` adds to it."""
    (in_readme,) = [source for _, source in blocks("sh") if "pytest" in source]
    command = in_readme.rpartition(" && ")[2].strip()
    page = (ROOT / "CONTRIBUTING.rst").read_text(encoding="utf-8")
    assert re.findall(r"^    (.*pytest.*)$", page, re.MULTILINE) == [command, f"{command} --full"]
