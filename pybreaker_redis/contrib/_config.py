"""A `BreakerRegistry` from the configuration of a project.

The keys are the same for all frameworks.  Each integration reads them from where its framework keeps settings.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from pybreaker_redis._runtime.validation import format_value
from pybreaker_redis.registry import BreakerRegistry

#: Keys of a configuration and the types of their values.  Where Redis runs is configured by each integration.
CONFIG_KEYS: dict[str, type | tuple[type, ...]] = {
    "PREFIX": str,
    "DEFAULTS": Mapping,
    "BREAKERS": Mapping,
    "LISTENERS": (list, tuple),
}


def build_registry(settings: Mapping[str, Any], redis: Any, *, create_listeners: bool = True) -> BreakerRegistry:
    """Build the registry that a configuration describes, without a request to Redis.

    Args:
        settings: Values by the keys of `CONFIG_KEYS`.  Other keys are ignored.  Listeners, and the items of an
            ``exclude``, may be dotted names.
        redis: Client, callable or URL, as for `BreakerRegistry`.
        create_listeners: Whether to create the listeners.  A check of the settings creates none, because some can be
            created only once in a process: a metric registers its name.

    Raises:
        ValueError: A value is invalid, or the constructor of a listener failed.  The message names the key.
    """
    for key, kind in CONFIG_KEYS.items():
        if key in settings and not isinstance(settings[key], kind):
            shown = format_value(settings[key])
            raise ValueError(f"{key} must not be {shown}: see the page Settings of the documentation")
    with _name_setting_in_error("LISTENERS"):
        listeners = [
            (_create_listener if create_listeners else _import_object)(listener)
            for listener in settings.get("LISTENERS", ())
        ]
    with _name_setting_in_error("URL, PREFIX or DEFAULTS"):
        registry = BreakerRegistry(
            redis,
            prefix=settings.get("PREFIX", ""),
            listeners=listeners if create_listeners else (),
            **_resolve_names(settings.get("DEFAULTS", {})),
        )
    for name, of_breaker in settings.get("BREAKERS", {}).items():
        with _name_setting_in_error(f"BREAKERS[{name!r}]"):
            registry.configure(name, **_resolve_names(of_breaker))
    return registry


@contextlib.contextmanager
def _name_setting_in_error(key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {error}") from error


def _resolve_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    exclude = settings.get("exclude")
    if not isinstance(exclude, (list, tuple)):
        return dict(settings)
    return {**settings, "exclude": [_import_object(item) for item in exclude]}


def _create_listener(listener: Any) -> Any:
    found = _import_object(listener)
    try:
        return found() if isinstance(found, type) else found
    except Exception as error:
        # The constructor belongs to the project, and may raise any exception.
        raise ValueError(f"{format_value(listener)}: {type(error).__name__}: {error}") from error


def _import_object(name_or_object: Any) -> Any:
    try:
        return pkgutil.resolve_name(name_or_object) if isinstance(name_or_object, str) else name_or_object
    except Exception as error:
        # The imported module belongs to the project, and may raise any exception.
        raise ValueError(f"{name_or_object!r}: {type(error).__name__}: {error}") from error
