"""Which breakers do the project's settings describe, where is their Redis, and is that right?

Knows: ``PYBREAKER``, ``CACHES``.  Does not know: requests, commands.
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

#: The keys of ``PYBREAKER``.
ALL_CONFIG_KEYS = ("CACHE", "URL", *CONFIG_KEYS)

#: Caches that live in one process.
PROCESS_LOCAL_CACHES = (LocMemCache, DummyCache)


class DjangoBreakers(ForkSafe, RegistryProxy):
    """The breakers of ``settings.PYBREAKER``, made when they are first asked for and anew when the settings change."""

    def __init__(self) -> None:
        self._registry: BreakerRegistry | None = None
        super().__init__()

    @property
    def registry(self) -> BreakerRegistry:
        """The registry of the present settings.

        Raises:
            ImproperlyConfigured: They are not right; ``manage.py check`` says the same.  Or a listener cannot be made,
                which no check tries.
        """
        if (registry := self._registry) is None:
            # The lock is reentrant: a registry may import modules, by dotted names in the settings, that get a breaker.
            with self._lock:
                # One without breakers counts as false.
                registry = self._registry = _create_registry() if self._registry is None else self._registry
        return registry

    def reset_on_setting_change(self, *, setting: str, **_: Any) -> None:
        """Settings have changed: begin anew."""
        if setting in ("PYBREAKER", "CACHES") and (registry := self._registry) is not None:
            self._registry = None
            registry.close()


breakers = DjangoBreakers()


def configuration_problems() -> Iterator[checks.CheckMessage]:
    """What is wrong with the settings, as far as it shows before listeners are made; nothing is sent."""
    given = _read_settings()
    if not isinstance(given, Mapping):
        yield _error(1, "PYBREAKER is no dictionary.", f"Its keys are {', '.join(ALL_CONFIG_KEYS)}.")
        return
    for key in sorted(given.keys() - set(ALL_CONFIG_KEYS), key=str):
        yield _error(2, f"PYBREAKER has an unknown key {key!r}.", f"Its keys are {', '.join(ALL_CONFIG_KEYS)}.")
    alias = given.get("CACHE")
    if alias and given.get("URL"):
        yield _error(3, "PYBREAKER has both CACHE and URL.", "Leave one of them out.")
    elif alias and alias not in settings.CACHES:
        yield _error(4, f"PYBREAKER['CACHE'] is {alias!r}.", f"CACHES has {', '.join(settings.CACHES)}.")
    elif alias and not (
        isinstance(caches[alias], (RedisCache, *PROCESS_LOCAL_CACHES)) or hasattr(caches[alias], "client")
    ):
        hint = "Name one of django-redis or of Django's own RedisCache, or give a URL."
        yield _error(5, f"PYBREAKER['CACHE'] is {alias!r}, which is not in Redis.", hint)
    elif alias and any(kind.__name__ == "ShardClient" for kind in type(getattr(caches[alias], "client", 0)).__mro__):
        # django-redis spreads keys over several servers by it, and has no client of a single one then.
        yield _error(7, f"PYBREAKER['CACHE'] is {alias!r}, a ShardClient.", "A circuit has one server: give its URL.")
    else:
        if (redis := _redis_source(given)) is None:
            hint = "That is for tests, and for a single process; else name a Redis by PYBREAKER['CACHE'] or ['URL']."
            yield checks.Warning("Every process has circuits of its own.", hint=hint, id="pybreaker_redis.W001")
        try:
            build_registry(given, redis, create_listeners=False)
        except ValueError as error:
            yield _error(6, f"PYBREAKER: {error}.", "The README says what there is, and in what range.")


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


def _redis_source(given: Mapping[str, Any]) -> Any:
    alias = given.get("CACHE")
    if not alias:
        return given.get("URL")
    return None if isinstance(caches[alias], PROCESS_LOCAL_CACHES) else lambda: _client(caches[alias])


def _client(cache: Any) -> Any:
    # Django's own cache has no public way to its client; the others have the same one, as django-redis documents it.
    client = cache._cache if isinstance(cache, RedisCache) else cache.client  # noqa: SLF001
    return client.get_client(write=True)
