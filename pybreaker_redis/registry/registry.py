"""Registry of an application's breakers: one for each name, with common settings and one Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreakerListener,
    CircuitBreakerStorage,
)

from pybreaker_redis import operators
from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis._runtime.types import ClientSource, State
from pybreaker_redis._runtime.validation import check_choice, checked_namespace, plain_text
from pybreaker_redis.breaker import CircuitBreaker
from pybreaker_redis.health import Health
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.operators import CircuitSnapshot, retry_after
from pybreaker_redis.registry import settings as settings_module
from pybreaker_redis.registry.decorator import NO_FALLBACK, P, T, guard_with
from pybreaker_redis.registry.settings import BreakerSettings, SettingOptions, Settings
from pybreaker_redis.storage import CircuitRedisStorage, client_source_from_url

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ("BreakerRegistry", "CircuitStatus", "retry_after")


@dataclass(frozen=True, slots=True)
class CircuitStatus:
    """State of a shared circuit, and the settings of its breaker that matter for it.

    Attributes:
        name: Name of the breaker.
        state: ``closed``, ``open`` or ``half-open``.
        fail_counter: Consecutive failures.
        success_counter: Consecutive successes while half-open.
        opened_at: Time at which the circuit opened last, aware, by the local clock.  ``None``: never.
        retry_after: Seconds until a call may pass.  0: a call may pass now.
        fail_max: Number of consecutive failures that opens the circuit.
        reset_timeout: Seconds for which the circuit stays open.
    """

    name: str
    state: State
    fail_counter: int
    success_counter: int
    opened_at: datetime | None
    retry_after: float
    fail_max: int
    reset_timeout: float


class BreakerRegistry(ForkSafe):
    """Breakers of an application: one for each name, all with the same Redis.

    Each breaker is a `CircuitBreaker` of this package, created at its first use.  Nothing is sent before that.

    A registry is iterable, and has a length: the names of breakers that were requested, configured or guarded.  As a
    context manager, a registry calls `close` at the end of the block.

    Args:
        redis: Client, callable that returns one, or URL as for `CircuitRedisStorage.from_url`.  A callable is called
            by the first use of each breaker, so let it return the same client each time.  ``None``: each process has
            circuits of its own.
        prefix: Text before each name, with a colon in between, in the namespaces of the circuits.
        listeners: Listeners of every breaker.
        defaults: Default settings of the breakers.  See `BreakerSettings` for their names.  Without Redis the settings
            about Redis have no effect.

    Raises:
        TypeError: There is no such setting, or a value is of the wrong type.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        redis: ClientSource | str | None = None,
        *,
        prefix: str = "",
        listeners: Iterable[CircuitBreakerListener] = (),
        **defaults: Unpack[SettingOptions],
    ) -> None:
        self._redis = client_source_from_url(redis) if isinstance(redis, str) else redis
        self._prefix = settings_module.checked_prefix(prefix)
        self._listeners = settings_module.checked_listeners(listeners)
        self._defaults = settings_module.validated(defaults, stacklevel=2)
        self._settings_by_name: dict[str, dict[str, Any]] = {}
        self._breaker_by_name: dict[str, CircuitBreaker] = {}
        super().__init__()
        # An invalid client or prefix raises an error now, not at the first use of a breaker.
        self._storage("any")

    # Breakers -------------------------------------------------------------------------------------------------------

    def get(self, name: str, /, **settings: Unpack[SettingOptions]) -> CircuitBreaker:
        """Return the breaker of a name, always the same object.

        Args:
            name: Name of the breaker and of its circuit.
            settings: Settings that differ from the defaults.

        Raises:
            ValueError: The breaker has other settings already, or a number is out of range.
            TypeError: There is no such setting, or a value is of the wrong type.
        """
        if not settings and (breaker := self._breaker_by_name.get(name)):
            return breaker
        name = self._declare(name, settings)
        with self._lock:
            if name not in self._breaker_by_name:
                self._breaker_by_name[name] = self._create_breaker(name)
            return self._breaker_by_name[name]

    def configure(self, name: str, /, **settings: Unpack[SettingOptions]) -> None:
        """Give a breaker its settings, before its first use.  See `get` for the arguments.

        Raises:
            ValueError: The breaker has other settings already, or a number is out of range.
            TypeError: There is no such setting, or a value is of the wrong type.
        """
        self._declare(name, settings)

    def __getitem__(self, name: str) -> CircuitBreaker:
        """Return a breaker that was configured or used before.

        Raises:
            KeyError: There is no breaker of that name.
        """
        if name not in self._settings_by_name:
            known = ", ".join(map(repr, self)) or "none"
            msg = f"no breaker {name!r}; there are: {known}"
            raise KeyError(msg)
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._settings_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._settings_by_name))

    def __len__(self) -> int:
        return len(self._settings_by_name)

    def guard(
        self, name: str, /, *, fallback: Any = NO_FALLBACK, **settings: Unpack[SettingOptions]
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Return a decorator that guards every call of a function by a breaker.

        The breaker is created at the first call, so it may be configured after the function was defined.

        Args:
            name: Name of the breaker.
            fallback: Result of a call that was rejected or that opened the circuit, in place of a
                `pybreaker.CircuitBreakerError`.  A callable is called with the arguments of the call, and awaited if
                the function is asynchronous and the result is awaitable.
            settings: See `get`.

        Returns:
            A decorator for functions, generator functions, ``async def`` and asynchronous generators.

        Raises:
            TypeError: The function cannot be called.  Or the fallback is asynchronous and the function is not, or the
                function is an asynchronous generator and there is a fallback.
        """
        self._declare(name, settings)
        return guard_with(lambda: self.get(name), fallback)

    # For operators --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, CircuitStatus]:
        """Return the status of all circuits by name, in one round trip for each server or node of a cluster.

        Raises:
            StorageUnavailableError: Redis did not execute a command.
        """
        breakers = {name: self.get(name) for name in self}
        snapshots = operators.read(list(breakers.values()))
        return {
            name: _status(name, breaker, snapshot)
            for (name, breaker), snapshot in zip(breakers.items(), snapshots, strict=True)
        }

    def health(self) -> dict[str, Health]:
        """Return the condition of Redis for each circuit by name, as this process observed it last, without a request.

        The result has no circuit without Redis: a registry that has no Redis returns an empty dictionary.
        """
        reports = {name: operators.health(self.get(name)) for name in self}
        return {name: report for name, report in reports.items() if report is not None}

    def set_state(self, name: str, state: State, /) -> None:
        """Put a circuit into another state, for all processes that share the circuit.

        Args:
            name: Name of the breaker.
            state: ``open``, for the reset timeout from now on.  ``closed``, with all counts zero.  ``half-open``, so
                that the next call of any process is a probe.

        Raises:
            KeyError: There is no breaker of that name.
            ValueError: There is no such state.
            StorageUnavailableError: Redis did not execute the command.
        """
        check_choice("state", state, (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN))
        breaker = self[name]
        operators.set_state(breaker, state)
        self._notify_listeners(breaker)

    def reset(self, name: str, /) -> None:
        """Set all counts of a circuit to zero, and leave its state.

        Args:
            name: Name of the breaker.

        Raises:
            KeyError: There is no breaker of that name.
            StorageUnavailableError: Redis did not execute the command.
        """
        breaker = self[name]
        operators.reset(breaker)
        self._notify_listeners(breaker)

    def _notify_listeners(self, breaker: CircuitBreaker) -> None:
        """Notify the listeners of this process now.  Those of other processes follow when their breakers notice."""
        # A listener that raises is logged: the command was executed, so its caller gets no error.
        _ = breaker.state

    # End ------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release all breakers, and the connections that only they use.  No circuit changes.

        The configuration stays.  `get` returns a new breaker afterwards, and guarded functions use it.  A breaker that
        you hold from before is not the registry's any more.
        """
        with self._lock:
            made, self._breaker_by_name = self._breaker_by_name, {}
        for breaker in made.values():
            operators.release_connections(breaker)

    def __repr__(self) -> str:
        # Neither a URL nor a client is shown: both may have a password.
        kind = "memory" if self._redis is None else "redis"
        prefix = f", prefix={self._prefix[:-1]!r}" if self._prefix else ""
        return f"<{type(self).__name__} {kind}{prefix}, {len(self)} breakers>"

    def __enter__(self) -> BreakerRegistry:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Internals ------------------------------------------------------------------------------------------------------

    def _declare(self, name: str, settings: Settings) -> str:
        known = self._settings_by_name.get(name)
        if known is not None and all(item in known.items() for item in settings.items()):
            return plain_text(name)
        name = settings_module.breaker_name(name)
        checked_namespace(f"{self._prefix}{name}")
        settings = settings_module.validated(settings, stacklevel=3)
        with self._lock:
            declared = self._settings_by_name.get(name, {})
            present = self._settings_of(name).by_name() if name in self._breaker_by_name else declared
            settings_module.check_consistent(name, present, settings)
            self._settings_by_name[name] = {**declared, **settings}
        return name

    def _settings_of(self, name: str) -> BreakerSettings:
        return BreakerSettings.with_defaults({**self._defaults, **self._settings_by_name.get(name, {})})

    def _create_breaker(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(
            name=name,
            listeners=self._listeners,
            state_storage=self._storage(name),
            **self._settings_of(name).breaker_arguments(),
        )

    def _storage(self, name: str) -> CircuitBreakerStorage:
        settings = self._settings_of(name)
        if self._redis is None:
            return CircuitMemoryStorage(STATE_CLOSED, **settings.memory_arguments())
        return CircuitRedisStorage(
            STATE_CLOSED,
            self._redis,
            namespace=f"{self._prefix}{name}",
            **settings.storage_arguments(),
        )


def _status(name: str, breaker: CircuitBreaker, snapshot: CircuitSnapshot) -> CircuitStatus:
    return CircuitStatus(name=name, fail_max=breaker.fail_max, reset_timeout=breaker.reset_timeout, **asdict(snapshot))
