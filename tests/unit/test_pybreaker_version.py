"""Versions of pybreaker: the installed one, and versions without the internals that this package uses."""

from __future__ import annotations

import configparser
import inspect
import subprocess
import sys
import textwrap
import types
from importlib import metadata

import pybreaker
import pytest
from packaging.requirements import Requirement

from pybreaker_redis._adapter import compatibility
from tests.support.paths import ROOT


def supported_pybreaker() -> Requirement:
    """Return the requirement of the package's metadata."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    requirements = map(Requirement, settings["options"]["install_requires"].split())
    return next(each for each in requirements if each.name == "pybreaker")


def test_installed_pybreaker_is_a_supported_one():
    """The adapter is written for the call sequences of known versions.  Read those of a new one before its support."""
    installed, supported = metadata.version("pybreaker"), supported_pybreaker().specifier
    assert supported.contains(installed, prereleases=True), (
        f"pybreaker {installed} is unknown, supported is {supported}: compare its call sequences with the table in "
        "pybreaker_redis/_adapter/inference.py, then change setup.cfg and SUPPORTED_VERSIONS"
    )


def test_message_names_the_range_of_the_metadata():
    """A user who follows the message installs what the package accepts."""
    named = Requirement(f"pybreaker{compatibility.SUPPORTED_VERSIONS}")
    assert named.specifier == supported_pybreaker().specifier


def test_installed_pybreaker_has_all_internals():
    """The check accepts the version under which all other tests pass."""
    assert compatibility.find_differences(pybreaker) == []
    compatibility.check_pybreaker()


#: Source that removes or changes an internal of pybreaker, and what the message names.
CHANGES = {
    "a class": ("del pybreaker.CircuitHalfOpenState", "CircuitHalfOpenState is missing"),
    "a public method": ("del pybreaker.CircuitBreaker.calling", "CircuitBreaker.calling is missing"),
    "a private method": (
        "del pybreaker.CircuitBreakerState._handle_error",
        "CircuitBreakerState._handle_error is missing",
    ),
    "an operation": ("del pybreaker.CircuitBreakerStorage.opened_at", "CircuitBreakerStorage.opened_at is missing"),
    "a parameter": (
        "pybreaker.CircuitClosedState.on_failure = lambda self, error: None",
        "CircuitClosedState.on_failure has no 'exc'",
    ),
    "a coroutine": (
        "pybreaker.CircuitBreaker.call_async = lambda self, func: None",
        "CircuitBreaker.call_async has no inner function",
    ),
    "a constant": ("pybreaker.STATE_HALF_OPEN = 'half_open'", "STATE_HALF_OPEN is not 'half-open'"),
}

#: Program that imports the package beside a changed pybreaker, and prints the error.
IMPORT = """
import pybreaker
{change}
try:
    import pybreaker_redis
except ImportError as error:
    print(error.name, error, sep="|")
"""


@pytest.mark.parametrize("name", CHANGES)
def test_import_beside_a_changed_pybreaker_names_version_difference_and_remedy(name):
    """The error comes with the import, not with the first failure in production."""
    change, difference = CHANGES[name]
    program = textwrap.dedent(IMPORT).format(change=change)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    library, _, message = done.stdout.strip().partition("|")
    assert library == "pybreaker"
    assert message.startswith(f"pybreaker {metadata.version('pybreaker')} does not fit pybreaker_redis: ")
    assert difference in message
    assert message.endswith("supports pybreaker>=1.4,<2 and is tested with 1.4: pip install 'pybreaker==1.4.*'")


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_found_in_a_copy_of_the_module(name):
    """A description names the internal that differs, and no other."""
    change, difference = CHANGES[name]
    copy = changed_pybreaker(change)
    (found,) = compatibility.find_differences(copy)
    assert found.startswith(difference)


def changed_pybreaker(change: str) -> types.ModuleType:
    """Return a second module made of pybreaker's source, after a change."""
    copy = types.ModuleType("pybreaker")
    exec(compile(inspect.getsource(pybreaker), "pybreaker", "exec"), vars(copy))
    exec(change, {"pybreaker": copy})
    return copy


#: Line at the end of a breaker's constructor, and its description.
BREAKER_CHANGES = {
    "no lock": ("        del self._lock", "CircuitBreaker._lock is missing"),
    "another storage": ("        self._state_storage = object()", "CircuitBreaker._state_storage is not the storage"),
    "another breaker": ("        self._state._breaker = object()", "CircuitBreakerState._breaker is not the breaker"),
}


@pytest.mark.parametrize("name", BREAKER_CHANGES)
def test_change_of_a_breakers_attributes_is_found(name):
    """Attributes exist once a breaker does, so the check creates one."""
    line, difference = BREAKER_CHANGES[name]
    program = [
        "original = pybreaker.CircuitBreaker.__init__",
        "def __init__(self, *args, **options):",
        "        original(self, *args, **options)",
        line,
        "__init__.__wrapped__ = original",
        "pybreaker.CircuitBreaker.__init__ = __init__",
    ]
    assert compatibility.find_differences(changed_pybreaker("\n".join(program))) == [difference]


def test_wrapped_methods_are_accepted():
    """Monitoring agents wrap methods, and the wrapped function is the one that runs."""
    program = """
import functools

def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **options):
        return function(*args, **options)
    return wrapper

pybreaker.CircuitBreaker.call = wrapped(pybreaker.CircuitBreaker.call)
pybreaker.CircuitClosedState.on_failure = wrapped(pybreaker.CircuitClosedState.on_failure)
"""
    assert compatibility.find_differences(changed_pybreaker(program)) == []


def test_unknown_version_is_named_as_such(monkeypatch):
    """A vendored pybreaker has no metadata."""

    def raise_not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", raise_not_found)
    monkeypatch.setattr(compatibility, "find_differences", lambda module: ["CircuitBreaker.calling is missing"])
    with pytest.raises(ImportError, match=r"^pybreaker of an unknown version does not fit .*CircuitBreaker\.calling"):
        compatibility.check_pybreaker()
