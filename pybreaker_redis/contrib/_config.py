"""Which circuits does a project's configuration ask for, and is it right?

Knows: the keys of the configuration.  Does not know: frameworks, where they keep it.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from pybreaker_redis._runtime.validation import format_value
from pybreaker_redis.registry import BreakerRegistry

#: What there is to configure, besides where Redis is, and of which type it has to be.
CONFIG_KEYS: dict[str, type | tuple[type, ...]] = {
    "PREFIX": str,
    "DEFAULTS": Mapping,
    "BREAKERS": Mapping,
    "LISTENERS": (list, tuple),
}


def build_registry(settings: Mapping[str, Any], redis: Any, *, create_listeners: bool = True) -> BreakerRegistry:
    """The circuits that are asked for; nothing is sent.

    Args:
        settings: What there is under `KEYS`, the rest is ignored.  Listeners, and what is in an ``exclude``, may be
            given by dotted names.
        redis: As `BreakerRegistry` takes it.
        create_listeners: Whether listeners are made.  A check of the settings makes none: one may register what can be
            registered once in a process, as a metric can.

    Raises:
        ValueError: Some value is not right, or a listener cannot be made; the message says which.
    """
    for key, kind in CONFIG_KEYS.items():
        if key in settings and not isinstance(settings[key], kind):
            raise ValueError(f"{key} must not be {format_value(settings[key])}: see the README for what it is")
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
    for name, own in settings.get("BREAKERS", {}).items():
        with _name_setting_in_error(f"BREAKERS[{name!r}]"):
            registry.configure(name, **_resolve_names(own))
    return registry


@contextlib.contextmanager
def _name_setting_in_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from error


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
        # It is the project's, as is what is imported: it may raise anything.
        raise ValueError(f"{format_value(listener)}: {type(error).__name__}: {error}") from error


def _import_object(thing: Any) -> Any:
    try:
        return pkgutil.resolve_name(thing) if isinstance(thing, str) else thing
    except Exception as error:
        raise ValueError(f"{thing!r}: {type(error).__name__}: {error}") from error
