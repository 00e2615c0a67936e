"""What may be said about a breaker, and do two sayings agree?

Knows: what breakers and storages take.  Does not know: which breakers there are.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pybreaker import STATE_CLOSED as CLOSED
from pybreaker import CircuitBreaker, CircuitBreakerListener

from pybreaker_redis._runtime.validation import DURATION_MAX_S, check_bool, check_seconds, format_value, plain_text
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.storage import CircuitRedisStorage

Settings = Mapping[str, Any]


def _usual(made: Callable[..., Any], *left_out: str) -> dict[str, Any]:
    parameters = inspect.signature(made).parameters.values()
    return {item.name: item.default for item in parameters if item.name not in left_out}


#: What a breaker takes and a storage takes, and what is taken if nothing is said.  What tells one from another, and
#: where they live, is for the registry to say.
BREAKER_DEFAULTS = _usual(CircuitBreaker, "listeners", "state_storage", "name")
STORAGE_DEFAULTS = _usual(CircuitRedisStorage, "state", "redis_object", "namespace")
MEMORY_DEFAULTS = _usual(CircuitMemoryStorage, "state")

#: What a dependency that is down raises; to exclude one of these, or what they descend from, is to guard nothing.
_OUTAGES = (ConnectionError, TimeoutError)


def breaker_name(name: Any) -> str:
    """Validate a breaker's name; plain text.

    Raises:
        TypeError: It is no str, or empty.
    """
    if not isinstance(name, str) or not name:
        msg = f"a breaker's name must be a str that is not empty, not {format_value(name)}"
        raise TypeError(msg)
    return plain_text(name)


def checked_prefix(prefix: Any) -> str:
    """Validate what goes before all names; what goes before them in namespaces.

    Raises:
        TypeError: It is no str.
    """
    if not isinstance(prefix, str):
        msg = f"prefix must be a str, not {format_value(prefix)}"
        raise TypeError(msg)
    return f"{plain_text(prefix)}:" if prefix else ""


def checked_listeners(listeners: Iterable[CircuitBreakerListener]) -> tuple[CircuitBreakerListener, ...]:
    """Validate listeners.

    Raises:
        TypeError: One of them is none; most often it is a class.
    """
    result = tuple(listeners)
    for listener in result:
        if not isinstance(listener, CircuitBreakerListener):
            msg = f"listeners must be instances of pybreaker.CircuitBreakerListener, not {format_value(listener)}"
            raise TypeError(msg)
    return result


def validated(settings: Settings, stacklevel: int) -> dict[str, Any]:
    """Settings in the form in which they are compared.

    Args:
        settings: By name, in the form in which somebody has given them.
        stacklevel: Of whoever gave them, seen from here.

    Raises:
        TypeError: There is no such setting, or its value is not what it should be.
        ValueError: A number is out of range.
    """
    accepted = {**BREAKER_DEFAULTS, **STORAGE_DEFAULTS}
    for name in settings:
        if name not in accepted:
            msg = f"there is no setting {name!r}; there are {', '.join(sorted(accepted))}"
            raise TypeError(msg)
    result = dict(settings)
    for name in ("fail_max", "success_threshold"):
        if name in result:
            _check_count(name, result[name])
    if "reset_timeout" in result:
        _check_seconds("reset_timeout", result["reset_timeout"])
    if "throw_new_error_on_trip" in result:
        check_bool("throw_new_error_on_trip", result["throw_new_error_on_trip"])
    if "exclude" in result:
        result["exclude"] = _excluded(result["exclude"], stacklevel + 1)
    # It sends nothing, and judges its own arguments.
    CircuitRedisStorage(CLOSED, lambda: None, **subset(result, STORAGE_DEFAULTS))
    return result


def breaker_arguments(settings: Settings) -> dict[str, Any]:
    """Settings in the form in which a breaker takes them."""
    return {**subset(settings, BREAKER_DEFAULTS), "exclude": [_exclusion(item) for item in settings["exclude"]]}


def subset(settings: Settings, of: Settings) -> dict[str, Any]:
    """Those settings that have a name in common with `of`."""
    return {name: value for name, value in settings.items() if name in of}


def check_consistent(name: str, present: Settings, said: Settings) -> None:
    """Refuse what contradicts what is known.

    Raises:
        ValueError: It does.
    """
    for setting, value in said.items():
        if setting in present and present[setting] != value:
            msg = f"breaker {name!r} has {setting}={present[setting]!r}, so it cannot have {setting}={value!r} as well"
            raise ValueError(msg)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name} must be a whole number, not {format_value(value)}"
        raise TypeError(msg)
    if value < 1:
        msg = f"{name} must be at least 1, not {format_value(value)}"
        raise ValueError(msg)


def _check_seconds(name: str, value: Any) -> None:
    check_seconds(name, value)
    if not 0 <= value <= DURATION_MAX_S:
        msg = f"{name} must lie between 0 and {DURATION_MAX_S} seconds, not {format_value(value)}"
        raise ValueError(msg)


def _excluded(exclude: Any, stacklevel: int) -> tuple[Any, ...]:
    items = tuple(exclude) if isinstance(exclude, (list, tuple, set, frozenset)) else (None,)
    if exclude is None:
        return ()
    for item in items:
        if not (callable(item) and (not isinstance(item, type) or issubclass(item, BaseException))):
            wrong = format_value(exclude if item is None else item)
            msg = f"exclude must be a list of exception classes and functions that take an exception, not {wrong}"
            raise TypeError(msg)
        if isinstance(item, type) and any(issubclass(outage, item) for outage in _OUTAGES):
            warnings.warn(
                f"exclude contains {item.__name__}: that is what a dependency raises when it is down, "
                "so the circuit will not open then",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )
    return items


def _exclusion(item: Any) -> Any:
    """As pybreaker understands it: a class that has a metaclass it takes for a function, which always says yes."""
    if isinstance(item, type) and type(item) is not type:
        return lambda error: isinstance(error, item)
    return item
