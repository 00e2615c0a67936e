"""Which registry's breaker is meant, where that is known only when it is used?

Knows: registries.  Does not know: who keeps them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from pybreaker import CircuitBreaker

from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.registry.decorator import NO_FALLBACK, guard_with

P = ParamSpec("P")
T = TypeVar("T")


class RegistryProxy(abc.ABC):
    """The breakers of the registry that is in charge at each moment; `registry` has the rest of what it can do."""

    @property
    @abc.abstractmethod
    def registry(self) -> BreakerRegistry:
        """The registry in charge."""

    def get(self, name: str, /, **settings: Any) -> CircuitBreaker:
        """The breaker of that name; see `BreakerRegistry.get`."""
        return self.registry.get(name, **settings)

    def __getitem__(self, name: str) -> CircuitBreaker:
        return self.registry[name]

    def __contains__(self, name: object) -> bool:
        return name in self.registry

    def __iter__(self) -> Iterator[str]:
        return iter(self.registry)

    def __len__(self) -> int:
        return len(self.registry)

    def guard(self, name: str, /, *, fallback: Any = NO_FALLBACK) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Have calls of a function guarded by the breaker of that name, of whichever registry is in charge then.

        Nothing is looked up before the first call, so modules may do this when they are imported.

        Args:
            name: Of the breaker.
            fallback: See `BreakerRegistry.guard`.

        Raises:
            TypeError: The function, or the fallback, is asynchronous.
        """
        return guard_with(lambda: self.registry.get(name), fallback)
