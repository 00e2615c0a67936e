"""Is this what a caller may give?

Knows: what is accepted.  Does not know: what it is for.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pybreaker_redis._model.circuit import LEASE_MAX_MS, STATES

#: Of anything, seconds; ten years.
DURATION_MAX_S = 10 * 365 * 24 * 3600

#: Whole and not nested: no brace, or text in braces between text without.
_TAGGED = re.compile(r"[^{}]*(?:\{[^{}]+\}[^{}]*)*")


#: Longest text of a value in an error, characters.
VALUE_TEXT_MAX_CHARS = 80


def format_value(value: Any) -> str:
    """Return a value for the text of an error: cut, and without the secrets of a client or a URL."""
    text = repr(value) if isinstance(value, (str, bytes, int, float, type, type(None))) else ""
    if not text or ("://" in text and ("@" in text or "?" in text)):
        return f"an object of class {type(value).__module__}.{type(value).__qualname__}"
    return text if len(text) <= VALUE_TEXT_MAX_CHARS else f"{text[: VALUE_TEXT_MAX_CHARS - 1]}…"


def check_state(argument: str, state: str) -> None:
    """Refuse a state that pybreaker does not know, naming the argument."""
    if state not in STATES:
        msg = f"{argument} must be one of {', '.join(map(repr, STATES))}, not {format_value(state)}"
        raise ValueError(msg)


def check_fallback(fallback_circuit_state: str) -> None:
    """Refuse what a circuit of one's own cannot begin in."""
    if fallback_circuit_state not in (*STATES, "last"):
        accepted = ", ".join(map(repr, (*STATES, "last")))
        msg = f"fallback_circuit_state must be one of {accepted}, not {format_value(fallback_circuit_state)}"
        raise ValueError(msg)


def check_bool(argument: str, flag: Any) -> None:
    """Refuse what is neither true nor false, such as the text of an environment variable."""
    if not isinstance(flag, bool):
        msg = f"{argument} must be True or False, not {format_value(flag)}"
        raise TypeError(msg)


def plain_text(text: str) -> str:
    """The text of an enumeration's member, which some Pythons format as its name, and some do not."""
    return str.__str__(text)


def checked_namespace(namespace: str | None) -> str | None:
    """Validate a namespace: it must make a prefix of keys, and no other one than it looks; plain text."""
    if namespace is None:
        return None
    if not isinstance(namespace, str):
        msg = f"namespace must be a str or None, not {format_value(namespace)}"
        raise TypeError(msg)
    namespace = plain_text(namespace)
    if not namespace:
        msg = "namespace must have at least one character, not '': name the circuit, or leave it out"
    elif bad := [char for char in namespace if unicodedata.category(char) in ("Cc", "Cs")]:
        # Nobody could read them in a log or type them into redis-cli, and lone surrogates are not text.
        shown = format_value(namespace)
        msg = f"namespace must not contain control characters or lone surrogates, as {bad[0]!r} in {shown}"
    elif not _TAGGED.fullmatch(namespace):
        # Of these a cluster takes another hash tag than people do, or none.
        given = format_value(namespace)
        msg = f"namespace must have braces in pairs, not nested, around some text, as 'shop:{{eu}}', not {given}"
    else:
        return namespace
    raise ValueError(msg)


def checked_base_namespace(storage: type, base: Any) -> str:
    """Validate what stands between the namespace and the names of a storage's keys; plain text."""
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
    """Refuse what is no number, naming the argument, and whether it might be ``None``."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        msg = f"{argument} must be a number of seconds{' or None' if or_none else ''}, not {format_value(seconds)}"
        raise TypeError(msg)


def checked_timeout(timeout: float | None) -> float | None:
    """Validate for how many seconds to wait for Redis."""
    if timeout is None:
        return None
    check_seconds("timeout", timeout, or_none=True)
    if not 0.01 <= timeout <= 60:  # noqa: PLR2004
        msg = f"timeout must be None or lie between 0.01 and 60 seconds, not {format_value(timeout)}"
        raise ValueError(msg)
    return float(timeout)


def checked_lease_ms(probe_lease: float) -> int:
    """Validate a lease in seconds; whole milliseconds."""
    check_seconds("probe_lease", probe_lease)
    if not 1 <= probe_lease * 1000 <= LEASE_MAX_MS:
        msg = f"probe_lease must lie between 0.001 and {LEASE_MAX_MS // 1000} seconds, not {format_value(probe_lease)}"
        raise ValueError(msg)
    return round(probe_lease * 1000)


def checked_max_staleness(max_staleness: float) -> float:
    """Validate for how many seconds a record may be believed."""
    check_seconds("max_staleness", max_staleness)
    if max_staleness != 0 and not 0.01 <= max_staleness <= 60:  # noqa: PLR2004
        msg = f"max_staleness must be 0 or lie between 0.01 and 60 seconds, not {format_value(max_staleness)}"
        raise ValueError(msg)
    return float(max_staleness)


def checked_ttl_ms(ttl: float | None) -> int:
    """Validate for how many seconds to keep a circuit that nobody writes to; whole milliseconds, 0: for ever."""
    if ttl is None:
        return 0
    check_seconds("ttl", ttl, or_none=True)
    # Shorter than nobody may go by what has expired, and than failures may lie apart that count together.
    if not 60 <= ttl <= DURATION_MAX_S:  # noqa: PLR2004
        msg = f"ttl must be None or lie between 60 and {DURATION_MAX_S} seconds, not {format_value(ttl)}"
        raise ValueError(msg)
    return round(ttl * 1000)
