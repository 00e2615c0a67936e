"""Breakers of a Django project, and checks of the settings that describe them.

The setting ``PYBREAKER`` names the circuits, and their Redis by a cache of ``CACHES`` or by a URL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.cache import caches
from django.core.cache.backends.dummy import DummyCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.cache.backends.redis import RedisCache
from django.core.exceptions import ImproperlyConfigured

from pybreaker_redis._runtime.fork import ForkSafe
from pybreaker_redis.contrib._config import CONFIG_KEYS, build_registry
from pybreaker_redis.contrib._proxy import RegistryProxy
from pybreaker_redis.registry import BreakerRegistry

#: Keys of ``PYBREAKER``.
ALL_CONFIG_KEYS = ("CACHE", "URL", *CONFIG_KEYS)

#: Caches that exist in one process.
PROCESS_LOCAL_CACHES = (LocMemCache, DummyCache)

#: Caches of Django that may hold circuits.  Caches of other packages need the attribute ``client``.
DJANGO_CACHES = (RedisCache, *PROCESS_LOCAL_CACHES)


class DjangoBreakers(ForkSafe, RegistryProxy):
    """Breakers of ``settings.PYBREAKER``, created at their first use, and again after a change of the settings."""

    def __init__(self) -> None:
        self._registry: BreakerRegistry | None = None
        # The lock is re-entrant: a registry imports modules by dotted names, and these may use a breaker.
        super().__init__()

    @property
    def registry(self) -> BreakerRegistry:
        """The registry of the current settings.

        Raises:
            ImproperlyConfigured: The settings are invalid, as ``manage.py check`` reports, or the constructor of a
                listener failed, which no check calls.
        """
        if (registry := self._registry) is None:
            # The lock is reentrant: a registry may import modules, by dotted names in the settings, that get a breaker.
            with self._lock:
                # Compared with None, because a registry without breakers is false.
                registry = self._registry = _create_registry() if self._registry is None else self._registry
        return registry

    def reset_on_setting_change(self, *, setting: str, **_: Any) -> None:
        """Close the registry when ``PYBREAKER`` or ``CACHES`` changes.  The next use creates another one."""
        if setting in ("PYBREAKER", "CACHES") and (registry := self._registry) is not None:
            self._registry = None
            registry.close()


breakers = DjangoBreakers()


def configuration_problems() -> Iterator[checks.CheckMessage]:
    """Yield a message for each problem of the settings, without creating listeners or sending to Redis."""
    configured = _read_settings()
    if not isinstance(configured, Mapping):
        yield _error(1, "PYBREAKER is no dictionary.", f"Its keys are {', '.join(ALL_CONFIG_KEYS)}.")
        return
    for key in sorted(configured.keys() - set(ALL_CONFIG_KEYS), key=str):
        yield _error(2, f"PYBREAKER has an unknown key {key!r}.", f"Its keys are {', '.join(ALL_CONFIG_KEYS)}.")
    alias = configured.get("CACHE")
    if alias and configured.get("URL"):
        yield _error(3, "PYBREAKER has both CACHE and URL.", "Remove one of them.")
    elif alias and alias not in settings.CACHES:
        yield _error(4, f"PYBREAKER['CACHE'] is {alias!r}.", f"CACHES has {', '.join(settings.CACHES)}.")
    elif alias and not (isinstance(caches[alias], DJANGO_CACHES) or hasattr(caches[alias], "client")):
        hint = "Name a cache of django-redis or of Django's RedisCache, or set a URL."
        yield _error(5, f"PYBREAKER['CACHE'] is {alias!r}, which is not in Redis.", hint)
    elif alias and any(kind.__name__ == "ShardClient" for kind in type(getattr(caches[alias], "client", 0)).__mro__):
        # A ShardClient of django-redis spreads keys over several servers, and has no client of a single server.
        yield _error(7, f"PYBREAKER['CACHE'] is {alias!r}, a ShardClient.", "A circuit has one server: set its URL.")
    else:
        if (redis := _redis_source(configured)) is None:
            hint = "To share circuits, name a Redis by PYBREAKER['CACHE'] or ['URL']."
            yield checks.Warning("Each process has its own circuits.", hint=hint, id="pybreaker_redis.W001")
        try:
            build_registry(configured, redis, create_listeners=False)
        except ValueError as error:
            yield _error(6, f"PYBREAKER: {error}.", "The page Settings of the documentation lists the valid values.")


def _error(number: int, message: str, hint: str) -> checks.CheckMessage:
    return checks.Error(message, hint=hint, id=f"pybreaker_redis.E{number:03}")


def _create_registry() -> BreakerRegistry:
    for problem in configuration_problems():
        if problem.is_serious():
            raise ImproperlyConfigured(f"{problem.msg} {problem.hint}")
    try:
        return build_registry(_read_settings(), _redis_source(_read_settings()))
    except ValueError as error:
        raise ImproperlyConfigured(f"PYBREAKER: {error}.") from error


def _read_settings() -> Any:
    return getattr(settings, "PYBREAKER", {})


def _redis_source(configured: Mapping[str, Any]) -> Any:
    if not (alias := configured.get("CACHE")):
        return configured.get("URL")
    return None if isinstance(caches[alias], PROCESS_LOCAL_CACHES) else lambda: _client(caches[alias])


def _client(cache: Any) -> Any:
    # Django's RedisCache has no public access to its client.  django-redis documents ``client`` for other caches.
    client = cache._cache if isinstance(cache, RedisCache) else cache.client  # noqa: SLF001
    return client.get_client(write=True)  # pyright: ignore[reportAttributeAccessIssue]
