"""Base class for ``breakers`` objects that look up the registry at each use.

Modules import such an object before the framework has read its settings, and several applications may share one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from pybreaker import CircuitBreaker

from pybreaker_redis.health import Health
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.registry.decorator import NO_FALLBACK, guard_with

P = ParamSpec("P")
T = TypeVar("T")


class RegistryProxy(abc.ABC):
    """Breakers of the current registry.  Its other methods are on `registry`."""

    @property
    @abc.abstractmethod
    def registry(self) -> BreakerRegistry:
        """The current registry."""

    def get(self, name: str, /, **settings: Any) -> CircuitBreaker:
        """Return the breaker with a name, as `BreakerRegistry.get` does."""
        return self.registry.get(name, **settings)

    def __getitem__(self, name: str) -> CircuitBreaker:
        return self.registry[name]

    def __contains__(self, name: object) -> bool:
        return name in self.registry

    def __iter__(self) -> Iterator[str]:
        return iter(self.registry)

    def __len__(self) -> int:
        return len(self.registry)

    def health(self) -> dict[str, Health]:
        """Return the condition of Redis for each circuit, without a request, as `BreakerRegistry.health` does."""
        return self.registry.health()

    def guard(self, name: str, /, *, fallback: Any = NO_FALLBACK) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Guard each call of a function with the breaker of a name, from the registry that is current at the call.

        The first call looks up the breaker, so modules may decorate functions when they are imported.

        Args:
            name: Name of the breaker.
            fallback: Result of a rejected call, as for `BreakerRegistry.guard`.

        Raises:
            TypeError: The function cannot be guarded, see `BreakerRegistry.guard`.
        """
        return guard_with(lambda: self.registry.get(name), fallback)
