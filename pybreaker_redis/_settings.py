"""What may be said about a breaker, and do two sayings agree?

Knows: what breakers and storages take.  Does not know: which breakers there are.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pybreaker import CircuitBreaker

from pybreaker_redis._arguments import check_seconds
from pybreaker_redis._circuit import CLOSED
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.storage import CircuitRedisStorage

Settings = Mapping[str, Any]


def _usual(made: Callable[..., Any], *left_out: str) -> dict[str, Any]:
    parameters = inspect.signature(made).parameters.values()
    return {item.name: item.default for item in parameters if item.name not in left_out}


#: What a breaker takes and a storage takes, and what is taken if nothing is said.  What tells one from another, and
#: where they live, is for the registry to say.
OF_BREAKER = _usual(CircuitBreaker, "listeners", "state_storage", "name")
OF_STORAGE = _usual(CircuitRedisStorage, "state", "redis_object", "namespace")
OF_MEMORY = _usual(CircuitMemoryStorage, "state")

#: What a dependency that is down raises; to exclude one of these, or what they descend from, is to guard nothing.
_OUTAGES = (ConnectionError, TimeoutError)


def check_name(name: Any) -> None:
    """Refuse what cannot be a breaker's name.

    Raises:
        TypeError: It is no str, or empty.
    """
    if not isinstance(name, str) or not name:
        msg = f"a breaker's name must be a str that is not empty, not {name!r}"
        raise TypeError(msg)


def checked(settings: Settings, stacklevel: int) -> dict[str, Any]:
    """Settings in the form in which they are compared.

    Args:
        settings: By name, in the form in which somebody has given them.
        stacklevel: Of whoever gave them, seen from here.

    Raises:
        TypeError: There is no such setting, or its value is not what it should be.
        ValueError: A number is out of range.
    """
    accepted = {**OF_BREAKER, **OF_STORAGE}
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
    if "exclude" in result:
        result["exclude"] = _excluded(result["exclude"], stacklevel + 1)
    # It sends nothing, and judges its own arguments.
    CircuitRedisStorage(CLOSED, lambda: None, **part(result, OF_STORAGE))
    return result


def part(settings: Settings, of: Settings) -> dict[str, Any]:
    """Those settings that have a name in common with `of`."""
    return {name: value for name, value in settings.items() if name in of}


def check_agreement(name: str, present: Settings, said: Settings) -> None:
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
        msg = f"{name} must be a whole number, not {value!r}"
        raise TypeError(msg)
    if value < 1:
        msg = f"{name} must be at least 1, not {value!r}"
        raise ValueError(msg)


def _check_seconds(name: str, value: Any) -> None:
    check_seconds(name, value)
    if not 0 <= value < math.inf:
        msg = f"{name} must be 0 or more seconds, and not without end, not {value!r}"
        raise ValueError(msg)


def _excluded(exclude: Any, stacklevel: int) -> tuple[Any, ...]:
    items = tuple(exclude) if isinstance(exclude, (list, tuple, set, frozenset)) else (None,)
    if exclude is None:
        return ()
    for item in items:
        if not (callable(item) and (not isinstance(item, type) or issubclass(item, BaseException))):
            msg = f"exclude must be a list of exception classes and functions that take an exception, not {exclude!r}"
            raise TypeError(msg)
        if isinstance(item, type) and any(issubclass(outage, item) for outage in _OUTAGES):
            warnings.warn(
                f"exclude contains {item.__name__}: that is what a dependency raises when it is down, "
                "so the circuit will not open then",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )
    return items
