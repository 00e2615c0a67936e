"""Validation of arguments that users pass.

Each error names the argument, the accepted values and the given value.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

#: Longest duration that any argument accepts, seconds: ten years.
DURATION_MAX_S = 10 * 365 * 24 * 3600

#: Shortest and longest timeout, seconds.
TIMEOUT_MIN_S = 0.01
TIMEOUT_MAX_S = 60

#: Shortest and longest staleness, seconds.  Zero is accepted, too.
STALENESS_MIN_S = 0.01
STALENESS_MAX_S = 60

#: Shortest time to live of a record, seconds.  A record must outlive every view of it, and the time between failures
#: that count together.
TTL_MIN_S = 60

#: Longest text of a value in an error, characters.
VALUE_TEXT_MAX_CHARS = 80

#: Namespace without braces, or with pairs of braces that are not nested and not empty.
_TAGGED = re.compile(r"[^{}]*(?:\{[^{}]+\}[^{}]*)*")


def format_value(value: Any) -> str:
    """Return a value for the text of an error, shortened, and without the secrets of a client or a URL."""
    text = repr(value) if isinstance(value, (str, bytes, int, float, type, type(None))) else ""
    if not text or ("://" in text and ("@" in text or "?" in text)):
        return f"an object of class {type(value).__module__}.{type(value).__qualname__}"
    return text if len(text) <= VALUE_TEXT_MAX_CHARS else f"{text[: VALUE_TEXT_MAX_CHARS - 1]}…"


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise an error unless a value is one of the choices.

    Args:
        argument: Name of the argument.
        value: Given value.
        choices: Accepted values.

    Raises:
        ValueError: The value is none of the choices.
    """
    if value not in choices:
        msg = f"{argument} must be one of {', '.join(map(repr, choices))}, not {format_value(value)}"
        raise ValueError(msg)


def check_bool(argument: str, flag: Any) -> None:
    """Raise an error unless a value is a bool, and not, for example, the text of an environment variable.

    Raises:
        TypeError: The value is no bool.
    """
    if not isinstance(flag, bool):
        msg = f"{argument} must be True or False, not {format_value(flag)}"
        raise TypeError(msg)


def plain_text(text: str) -> str:
    """Return the text of a string, also of an enumeration's member: some Pythons format a member as its name."""
    return str.__str__(text)


def checked_namespace(namespace: str | None) -> str | None:
    """Validate a namespace, the prefix of a circuit's keys.

    Args:
        namespace: Given value.

    Returns:
        The namespace as plain text.

    Raises:
        TypeError: The value is neither text nor ``None``.
        ValueError: The text is empty, has control characters or lone surrogates, or has unpaired braces.
    """
    if namespace is None:
        return None
    if not isinstance(namespace, str):
        msg = f"namespace must be a str or None, not {format_value(namespace)}"
        raise TypeError(msg)
    namespace = plain_text(namespace)
    if not namespace:
        msg = "namespace must have at least one character, not '': name the circuit, or leave it out"
    elif bad := [char for char in namespace if unicodedata.category(char) in ("Cc", "Cs")]:
        # A log does not show control characters, redis-cli does not accept them, and lone surrogates are not text.
        shown = format_value(namespace)
        msg = f"namespace must not contain control characters or lone surrogates, as {bad[0]!r} in {shown}"
    elif not _TAGGED.fullmatch(namespace):
        # For other braces, a cluster uses another hash tag than a reader expects, or none.
        given = format_value(namespace)
        msg = f"namespace must have braces in pairs, not nested, around some text, as 'shop:{{eu}}', not {given}"
    else:
        return namespace
    raise ValueError(msg)


def checked_base_namespace(storage: type, base: Any) -> str:
    """Validate the part of a storage's keys between the namespace and the names of the values.

    Args:
        storage: Class of the storage.
        base: Its attribute ``BASE_NAMESPACE``.

    Returns:
        The part as plain text.

    Raises:
        TypeError: The value is no text, or the class has an attribute ``_namespace``.
        ValueError: The text is no namespace, see `checked_namespace`.
    """
    if hasattr(storage, "_namespace"):
        msg = (
            f"{storage.__name__}._namespace is not used here: name the keys by the argument namespace and the class "
            "attribute BASE_NAMESPACE"
        )
        raise TypeError(msg)
    try:
        checked = checked_namespace(base)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("namespace", f"{storage.__name__}.BASE_NAMESPACE", 1)) from None
    if checked is None:
        msg = f"{storage.__name__}.BASE_NAMESPACE must be a str, not None"
        raise TypeError(msg)
    return checked


def check_seconds(argument: str, seconds: Any, *, or_none: bool = False) -> None:
    """Raise an error unless a value is a number.

    Args:
        argument: Name of the argument.
        seconds: Given value.
        or_none: Whether the argument accepts ``None``, too, so that the text of the error mentions ``None``.

    Raises:
        TypeError: The value is no number.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        msg = f"{argument} must be a number of seconds{' or None' if or_none else ''}, not {format_value(seconds)}"
        raise TypeError(msg)


def checked_timeout(timeout: float | None) -> float | None:
    """Validate the seconds that a guarded call may wait for Redis (``None``: as long as the client waits).

    Raises:
        TypeError: The value is neither a number nor ``None``.
        ValueError: The value is out of range.
    """
    if timeout is None:
        return None
    check_seconds("timeout", timeout, or_none=True)
    if not TIMEOUT_MIN_S <= timeout <= TIMEOUT_MAX_S:
        msg = (
            f"timeout must be None or lie between {TIMEOUT_MIN_S} and {TIMEOUT_MAX_S} seconds, "
            f"not {format_value(timeout)}"
        )
        raise ValueError(msg)
    return float(timeout)


def checked_lease_ms(probe_lease: float, lease_max_ms: int) -> int:
    """Validate the lease of a probe.

    Args:
        probe_lease: Given value, seconds.
        lease_max_ms: Longest lease, milliseconds.

    Returns:
        The lease in whole milliseconds.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is out of range.
    """
    check_seconds("probe_lease", probe_lease)
    if not 1 <= probe_lease * 1000 <= lease_max_ms:
        msg = f"probe_lease must lie between 0.001 and {lease_max_ms // 1000} seconds, not {format_value(probe_lease)}"
        raise ValueError(msg)
    return round(probe_lease * 1000)


def checked_max_staleness(max_staleness: float) -> float:
    """Validate the seconds for which a circuit's record may be used without a query.

    Raises:
        TypeError: The value is no number.
        ValueError: The value is out of range.
    """
    check_seconds("max_staleness", max_staleness)
    if max_staleness != 0 and not STALENESS_MIN_S <= max_staleness <= STALENESS_MAX_S:
        msg = (
            f"max_staleness must be 0 or lie between {STALENESS_MIN_S} and {STALENESS_MAX_S} seconds, "
            f"not {format_value(max_staleness)}"
        )
        raise ValueError(msg)
    return float(max_staleness)


def checked_ttl_ms(ttl: float | None) -> int:
    """Validate the time to live of an unused circuit.

    Args:
        ttl: Given value, seconds (``None``: the circuit never expires).

    Returns:
        The time in whole milliseconds (0: the circuit never expires).

    Raises:
        TypeError: The value is neither a number nor ``None``.
        ValueError: The value is out of range.
    """
    if ttl is None:
        return 0
    check_seconds("ttl", ttl, or_none=True)
    if not TTL_MIN_S <= ttl <= DURATION_MAX_S:
        msg = f"ttl must be None or lie between {TTL_MIN_S} and {DURATION_MAX_S} seconds, not {format_value(ttl)}"
        raise ValueError(msg)
    return round(ttl * 1000)
