"""Common parts of the integrations: extras, imports, answers to requests, commands of operators."""

from __future__ import annotations

import ast
import configparser
import importlib.abc
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pybreaker
import pytest

import pybreaker_redis
from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.contrib._commands import COMMAND_ACTIONS, CommandRefusedError, run_command
from pybreaker_redis.contrib._http import prefers_json, rejection_response
from pybreaker_redis.registry import BreakerRegistry, retry_after
from tests.support.breakers import down

PACKAGE = Path(pybreaker_redis.__file__).parent
CONTRIB = PACKAGE / "contrib"
EXTRAS = ("celery", "django", "flask")

#: Modules of each integration.
PARTS = {
    "celery": [CONTRIB / "celery.py"],
    "django": sorted((CONTRIB / "django").rglob("*.py")),
    "flask": [CONTRIB / "flask.py"],
}


def imports(path: Path) -> set[str]:
    """Return the full names of everything that a module imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# -- extras and imports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
def test_integration_without_its_framework_names_the_extra(extra: str, monkeypatch: pytest.MonkeyPatch):
    """Without its framework an integration names the extra to install."""

    class NotInstalled(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == extra:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [*sys.modules]:
        if name.partition(".")[0] == extra or name.startswith(f"pybreaker_redis.contrib.{extra}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"the extra '{extra}' of pybreaker_redis"):
        importlib.import_module(f"pybreaker_redis.contrib.{extra}")


def test_missing_module_of_a_framework_is_not_reported_as_a_missing_framework():
    """A missing module of an installed framework is reported as such, because the extra would not help."""
    with pytest.raises(ImportError) as raised, require_extra("flask"):
        import nowhere.at_all  # noqa: F401
    assert raised.value.name == "nowhere"


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_integration_has_its_extra(extra: str):
    """Each extra that an error names exists."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    assert extra in setup["options.extras_require"][extra].lower()


def test_core_imports_no_integration():
    """Neither the core nor another integration imports an integration."""
    core = {path for path in PACKAGE.rglob("*.py") if CONTRIB not in path.parents}
    assert not [path for path in core if any(name.startswith("pybreaker_redis.contrib") for name in imports(path))]
    for extra, parts in PARTS.items():
        others = tuple(f"pybreaker_redis.contrib.{other}" for other in EXTRAS if other != extra)
        assert not [path for path in parts if any(name.startswith(others) for name in imports(path))]


def test_importing_the_core_imports_no_framework():
    """Frameworks are large, so the core imports none."""
    code = "import sys, pybreaker_redis.registry; print(sorted({'celery', 'django', 'flask'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("extra", EXTRAS)
def test_integration_is_thin(extra: str):
    """An integration has less than 150 lines of code.  Anything of more general use belongs into the core."""
    assert sum(lines_of_code(path) for path in PARTS[extra]) < 150


def lines_of_code(path: Path) -> int:
    """Return the number of lines with code, without comments, docstrings and empty lines."""
    source = path.read_text(encoding="utf-8")
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    used = {line for token in tokens if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}
    return len(used - docstrings)


@pytest.mark.parametrize("path", sorted(CONTRIB.rglob("[!_]*.py")), ids=lambda path: path.stem)
def test_module_states_what_it_is(path: Path):
    """The first line of a module is a statement, as in the rest of the package."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    first_line, *_ = docstring.splitlines()
    assert first_line.endswith((".", ":"))
    assert "Knows:" not in docstring


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("application/json", True),
        ("application/json, text/plain, */*", True),
        ("application/problem+json", True),
        ("Application/JSON; charset=utf-8; Q=0.5", True),
        ("application/json;q=0", False),
        ("text/html, application/json", True),
        ("text/html, application/json;q=0.9", False),
        ("text/html;q=0.5, application/json;q=0.9", True),
        ("application/json;q=much", False),
    ],
)
def test_json_is_returned_if_the_request_prefers_it(accept: str, json: bool):
    """JSON is returned if the request names JSON and prefers no page."""
    assert prefers_json(accept) is json


def test_retry_after_is_at_least_one_second():
    """Retry-After is at least 1, because HTTP has no fractions and 0 would invite an immediate retry."""
    breaker = BreakerRegistry(reset_timeout=0, throw_new_error_on_trip=True).get("payments")
    breaker.open()
    breaker.half_open()
    with pytest.raises(pybreaker.CircuitBreakerError) as raised:
        breaker.call(down)
    assert retry_after(raised.value) == 0
    assert rejection_response(raised.value, "").retry_after == 1
    assert rejection_response(pybreaker.CircuitBreakerError("from elsewhere"), "").retry_after == 1


def test_retry_after_is_rounded_up():
    """Retry-After is rounded up."""
    breaker = BreakerRegistry(reset_timeout=100.5).get("payments")
    breaker.open()
    with pytest.raises(pybreaker.CircuitBreakerError) as raised:
        breaker.call(down)
    most = retry_after(raised.value)
    seconds = rejection_response(raised.value, "").retry_after
    assert retry_after(raised.value) <= seconds < most + 1


# -- operators ---------------------------------------------------------------------------------------------------------


def test_commands_without_circuits_are_refused():
    """Without circuits the table is empty and commands are refused."""
    registry = BreakerRegistry()
    assert len(run_command(registry, "status", []).splitlines()) == 1
    with pytest.raises(CommandRefusedError, match="'payments'; configured: none"):
        run_command(registry, "open", ["payments"])
    with pytest.raises(CommandRefusedError, match="none is configured"):
        run_command(registry, "close", [])


def test_status_can_be_limited_to_some_circuits():
    """The table can be limited to some circuits."""
    registry = BreakerRegistry()
    registry.configure("payments")
    registry.configure("stock")
    assert [line.split()[0] for line in run_command(registry, "status", ["stock"]).splitlines()] == ["circuit", "stock"]


@pytest.mark.parametrize("action", COMMAND_ACTIONS)
def test_error_of_the_function_that_returns_the_client_is_one_line(action: str):
    """A command fails in one line with the cause, also for an error that is none of Redis."""

    def no_client() -> None:
        raise KeyError("REDIS_URL")

    registry = BreakerRegistry(no_client)
    registry.configure("payments")
    with pytest.raises(CommandRefusedError, match=r"^circuit 'payments': Redis .*KeyError: 'REDIS_URL'.*$"):
        run_command(registry, action, ["payments"])


@pytest.mark.parametrize("action", [action for action in COMMAND_ACTIONS if action != "status"])
def test_command_on_circuits_in_memory_is_refused(action: str):
    """A command would change a local circuit of its own process only, so it is refused."""
    registry = BreakerRegistry()
    breaker = registry.get("payments")
    with pytest.raises(CommandRefusedError) as refused:
        run_command(registry, action, ["payments"])
    assert str(refused.value) == (
        f"each process has its own circuits (no Redis is configured): there is nothing to {action} from here"
    )
    assert breaker.current_state == "closed"
    assert run_command(registry, "status", ["payments"])
