"""Internals of pybreaker that this package uses, checked when the package is imported.

`_adapter/` is written for the call sequences of pybreaker 1.4.  Some of the methods and attributes behind these are
private, so a later version may change them without notice.  A change would lead to wrong counts in production.  The
check raises an error at the import instead, before the first guarded call.
"""

from __future__ import annotations

import inspect
from types import CodeType, ModuleType
from typing import Any

import pybreaker

#: Versions of pybreaker that the package accepts, as in its metadata.
SUPPORTED_VERSIONS = ">=1.4,<2"

#: Classes of pybreaker that the package subclasses, creates or compares.
_CLASSES = (
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerListener",
    "CircuitBreakerState",
    "CircuitBreakerStorage",
    "CircuitClosedState",
    "CircuitHalfOpenState",
    "CircuitMemoryStorage",
    "CircuitOpenState",
)

#: Values of pybreaker's names for states.
_CONSTANTS = {"STATE_CLOSED": "closed", "STATE_OPEN": "open", "STATE_HALF_OPEN": "half-open"}

#: Methods that the package calls or finds on the stack, with the local names that it reads there.
_METHODS: dict[str, tuple[str, ...]] = {
    "CircuitBreaker.__init__": ("self",),
    "CircuitBreaker._create_new_state": ("self",),
    "CircuitBreaker.call": ("self",),
    "CircuitBreaker.call_async": ("self",),
    "CircuitBreaker.calling": ("self",),
    "CircuitBreaker.close": ("self",),
    "CircuitBreaker.half_open": ("self",),
    "CircuitBreaker.open": ("self",),
    "CircuitBreaker.state": ("self",),
    "CircuitBreakerState._handle_error": ("self", "exc"),
    "CircuitBreakerState._handle_success": ("self",),
    "CircuitBreakerState.call": ("self",),
    "CircuitBreakerState.call_async": ("self",),
    "CircuitBreakerState.generator_call": ("self",),
    "CircuitClosedState.__init__": ("self",),
    "CircuitClosedState.on_failure": ("self", "exc"),
    "CircuitHalfOpenState.__init__": ("self",),
    "CircuitHalfOpenState.on_failure": ("self", "exc"),
    "CircuitHalfOpenState.on_success": ("self",),
    "CircuitOpenState.__init__": ("self",),
    "CircuitOpenState.before_call": ("self",),
}

#: Methods with a coroutine, a function within the method, that the package finds on the stack.
_WITH_COROUTINES = ("CircuitBreaker.call_async", "CircuitBreakerState.call_async")

#: Operations of a storage, by which a breaker reads and writes its circuit.
_STORAGE_OPERATIONS = (
    "counter",
    "increment_counter",
    "increment_success_counter",
    "name",
    "opened_at",
    "reset_counter",
    "reset_success_counter",
    "state",
    "success_counter",
)

#: Attributes of a breaker that the package reads or replaces.
_BREAKER_ATTRIBUTES = ("_lock", "_state", "_state_storage")


def check_pybreaker() -> None:
    """Refuse a pybreaker without the internals that this package uses.

    Raises:
        ImportError: Internals are missing or differ.  The message names them, and the installed version.
    """
    if differences := find_differences(pybreaker):
        raise ImportError(_message(differences), name="pybreaker")


def find_differences(module: ModuleType) -> list[str]:
    """Return a description of each internal of pybreaker that is missing or differs, or an empty list.

    Args:
        module: The module ``pybreaker``.
    """
    found = [f"{name} is missing" for name in _CLASSES if not inspect.isclass(getattr(module, name, None))]
    found += [f"{name} is not {value!r}" for name, value in _CONSTANTS.items() if getattr(module, name, None) != value]
    if found:
        # What follows needs the classes.
        return found
    for name, local_names in _METHODS.items():
        code = _code_of(module, name)
        if code is None:
            found.append(f"{name} is missing or no Python function")
            continue
        found += [f"{name} has no {local!r}" for local in local_names if local not in code.co_varnames]
        if name in _WITH_COROUTINES and not any(isinstance(constant, CodeType) for constant in code.co_consts):
            found.append(f"{name} has no inner function")
    operations = vars(module.CircuitBreakerStorage)
    found += [f"CircuitBreakerStorage.{name} is missing" for name in _STORAGE_OPERATIONS if name not in operations]
    return found or _differences_of_a_breaker(module)


def _differences_of_a_breaker(module: ModuleType) -> list[str]:
    """Return what differs in the attributes of a breaker, which exist only once there is one."""
    storage = module.CircuitMemoryStorage(module.STATE_CLOSED)
    breaker = module.CircuitBreaker(state_storage=storage)
    found = [f"CircuitBreaker.{name} is missing" for name in _BREAKER_ATTRIBUTES if not hasattr(breaker, name)]
    if not found:
        _, state, used_storage = (getattr(breaker, name) for name in _BREAKER_ATTRIBUTES)
        if used_storage is not storage:
            found.append("CircuitBreaker._state_storage is not the storage")
        if getattr(state, "_breaker", None) is not breaker:
            found.append("CircuitBreakerState._breaker is not the breaker")
    return found


def _code_of(module: ModuleType, name: str) -> CodeType | None:
    """Return the code of a method, or of the getter of a property, without wrappers.  ``None``: there is none."""
    class_name, _, method_name = name.partition(".")
    method: Any = getattr(getattr(module, class_name), method_name, None)
    code = getattr(inspect.unwrap(getattr(method, "fget", method)), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _message(differences: list[str]) -> str:
    from importlib import metadata

    try:
        version = metadata.version("pybreaker")
    except metadata.PackageNotFoundError:
        version = "of an unknown version"
    return (
        f"pybreaker {version} does not fit pybreaker_redis: {', '.join(differences)}; pybreaker_redis supports "
        f"pybreaker{SUPPORTED_VERSIONS} and is tested with 1.4: pip install 'pybreaker==1.4.*'"
    )
