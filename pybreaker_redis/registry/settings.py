"""Settings of breakers: their names, defaults and checks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pybreaker
from pybreaker import STATE_CLOSED as CLOSED
from pybreaker import CircuitBreakerListener

from pybreaker_redis._runtime.validation import DURATION_MAX_S, check_bool, check_seconds, format_value, plain_text
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.storage import CircuitRedisStorage, StorageOptions

Settings = Mapping[str, Any]


def _defaults_of(constructor: Callable[..., Any], *left_out: str) -> dict[str, Any]:
    parameters = inspect.signature(constructor).parameters.values()
    return {item.name: item.default for item in parameters if item.name not in left_out}


#: Arguments of a breaker and of a storage, with their defaults, but for those that the registry gives itself.
#: The call that opens the circuit raises its own error: an application reports the cause, and not a rejection.
BREAKER_DEFAULTS = {
    **_defaults_of(pybreaker.CircuitBreaker, "listeners", "state_storage", "name"),
    "throw_new_error_on_trip": False,
}
STORAGE_DEFAULTS = _defaults_of(CircuitRedisStorage, "state", "redis_object", "namespace")
MEMORY_DEFAULTS = _defaults_of(CircuitMemoryStorage, "state")


class SettingOptions(StorageOptions, total=False):
    """Keyword arguments by which users give settings.  See `BreakerSettings`."""

    fail_max: int
    reset_timeout: float
    success_threshold: int
    exclude: Collection[type[BaseException] | Callable[[Any], bool]] | None
    throw_new_error_on_trip: bool


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Settings of one breaker and its circuit.

    The first five are those of `CircuitBreaker`, the others those of `CircuitRedisStorage`.

    Attributes:
        fail_max: Number of consecutive failures that opens the circuit.
        reset_timeout: Seconds for which the circuit stays open.
        success_threshold: Number of successful probes that closes the circuit.
        exclude: Exception classes and functions of an exception: such exceptions are no failures.
        throw_new_error_on_trip: Whether the call that opens the circuit raises `CircuitOpenError`, with the error of
            the dependency as its cause.  ``False``: the call raises the error of the dependency.
        fallback_circuit_state: State in which a local circuit begins.
        cluster_mode: Whether all keys of the circuit share one slot of a Redis Cluster.
        probe_lease: Seconds until a probe without a report is offered to another call.
        max_staleness: Seconds for which a process may use its copy of the circuit without notice of a change.
        timeout: Seconds a guarded call may wait for Redis.  ``None``: no limit.
        ttl: Seconds after the last write when the circuit expires.  ``None``: never.
    """

    fail_max: int
    reset_timeout: float
    success_threshold: int
    exclude: tuple[Any, ...]
    throw_new_error_on_trip: bool
    fallback_circuit_state: str
    cluster_mode: bool
    probe_lease: float
    max_staleness: float
    timeout: float | None
    ttl: float | None

    @classmethod
    def with_defaults(cls, given: Settings) -> BreakerSettings:
        """Return settings with the defaults for all that are not given."""
        return cls(**{**BREAKER_DEFAULTS, "exclude": (), **STORAGE_DEFAULTS, **given})

    def by_name(self) -> dict[str, Any]:
        """Return the values by the names of the settings."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def breaker_arguments(self) -> dict[str, Any]:
        """Return the arguments of `CircuitBreaker`."""
        return {**self._subset(BREAKER_DEFAULTS), "exclude": [_exclusion(item) for item in self.exclude]}

    def storage_arguments(self) -> dict[str, Any]:
        """Return the arguments of `CircuitRedisStorage`."""
        return self._subset(STORAGE_DEFAULTS)

    def memory_arguments(self) -> dict[str, Any]:
        """Return the arguments of `CircuitMemoryStorage`."""
        return self._subset(MEMORY_DEFAULTS)

    def _subset(self, names: Settings) -> dict[str, Any]:
        return {name: value for name, value in self.by_name().items() if name in names}


#: Errors of a dependency that is down.  A breaker that excludes one of these, or a base class, guards nothing.
_OUTAGES = (ConnectionError, TimeoutError)


def breaker_name(name: Any) -> str:
    """Return a breaker's name as plain text.

    Raises:
        TypeError: The name is no str, or empty.
    """
    if not isinstance(name, str) or not name:
        msg = f"a breaker's name must be a str that is not empty, not {format_value(name)}"
        raise TypeError(msg)
    return plain_text(name)


def checked_prefix(prefix: Any) -> str:
    """Return the text before each name in the namespaces of circuits.

    Raises:
        TypeError: The prefix is no str.
    """
    if not isinstance(prefix, str):
        msg = f"prefix must be a str, not {format_value(prefix)}"
        raise TypeError(msg)
    return f"{plain_text(prefix)}:" if prefix else ""


def checked_listeners(listeners: Iterable[CircuitBreakerListener]) -> tuple[CircuitBreakerListener, ...]:
    """Return listeners as a tuple.

    Raises:
        TypeError: An item is no listener.  Most often the item is a class.
    """
    result = tuple(listeners)
    for listener in result:
        if not isinstance(listener, CircuitBreakerListener):
            msg = f"listeners must be instances of pybreaker.CircuitBreakerListener, not {format_value(listener)}"
            raise TypeError(msg)
    return result


def validated(settings: Settings, stacklevel: int) -> dict[str, Any]:
    """Return settings in the form in which they are compared.

    Args:
        settings: Values by name, as a user gave them.
        stacklevel: Number of frames from here to the code of the user, for warnings.

    Raises:
        TypeError: There is no such setting, or a value is of the wrong type.
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
    # The storage sends nothing, and checks its own arguments.
    CircuitRedisStorage(
        CLOSED, _no_client, **{name: value for name, value in result.items() if name in STORAGE_DEFAULTS}
    )
    return result


def _no_client() -> Any:
    """Return no client, for a storage that is never used."""


def check_consistent(name: str, present: Settings, given: Settings) -> None:
    """Raise an error if new settings contradict the present ones.

    Args:
        name: Name of the breaker.
        present: Present settings.
        given: New settings.

    Raises:
        ValueError: A setting has two values.
    """
    for setting, value in given.items():
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
    """Return an item that pybreaker understands: it calls a class that has a metaclass, which never returns False."""
    if isinstance(item, type) and type(item) is not type:
        return lambda error: isinstance(error, item)
    return item
