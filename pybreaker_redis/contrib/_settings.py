"""Which circuits does a project's configuration ask for, and is it right?

Knows: the keys of the configuration.  Does not know: frameworks, where they keep it.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from pybreaker_redis._arguments import shown
from pybreaker_redis.registry import BreakerRegistry

#: What there is to configure, besides where Redis is, and of which type it has to be.
KEYS: dict[str, type | tuple[type, ...]] = {
    "PREFIX": str,
    "DEFAULTS": Mapping,
    "BREAKERS": Mapping,
    "LISTENERS": (list, tuple),
}


def registry_from(settings: Mapping[str, Any], redis: Any, *, listening: bool = True) -> BreakerRegistry:
    """The circuits that are asked for; nothing is sent.

    Args:
        settings: What there is under `KEYS`, the rest is ignored.  Listeners, and what is in an ``exclude``, may be
            given by dotted names.
        redis: As `BreakerRegistry` takes it.
        listening: Whether listeners are made.  Who only wants to know what is wrong makes none: one may register what
            can be registered once in a process, as a metric can.

    Raises:
        ValueError: Some value is not right, or a listener cannot be made; the message says which.
    """
    for key, kind in KEYS.items():
        if key in settings and not isinstance(settings[key], kind):
            raise ValueError(f"{key} must not be {shown(settings[key])}: see the README for what it is")
    with _naming("LISTENERS"):
        listeners = [(_made if listening else _found)(listener) for listener in settings.get("LISTENERS", ())]
    with _naming("URL, PREFIX or DEFAULTS"):
        registry = BreakerRegistry(
            redis,
            prefix=settings.get("PREFIX", ""),
            listeners=listeners if listening else (),
            **_resolved(settings.get("DEFAULTS", {})),
        )
    for name, own in settings.get("BREAKERS", {}).items():
        with _naming(f"BREAKERS[{name!r}]"):
            registry.configure(name, **_resolved(own))
    return registry


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from error


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    exclude = settings.get("exclude")
    if not isinstance(exclude, (list, tuple)):
        return dict(settings)
    return {**settings, "exclude": [_found(item) for item in exclude]}


def _made(listener: Any) -> Any:
    found = _found(listener)
    try:
        return found() if isinstance(found, type) else found
    except Exception as error:
        # It is the project's, as is what is imported: it may raise anything.
        raise ValueError(f"{shown(listener)}: {type(error).__name__}: {error}") from error


def _found(thing: Any) -> Any:
    try:
        return pkgutil.resolve_name(thing) if isinstance(thing, str) else thing
    except Exception as error:
        raise ValueError(f"{thing!r}: {type(error).__name__}: {error}") from error
