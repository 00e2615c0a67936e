"""Is an answer one that a server gives?

Knows: what scripts and single commands return, the ranges of every value.  Does not know: clients, who asked.

A client may swallow errors, and a proxy may change answers.  What no server returns is a fault of the server: the
process uses a circuit of its own, and no guarded call meets the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pybreaker_redis._model.codec import RawValue, to_text
from pybreaker_redis.errors import UnusableReplyError

#: How many digits of seconds a server's clock has at most, so that a record can hold its milliseconds.
TIME_DIGITS_MAX = 12


def checked_sequence(asked: str, answer: object, length: int) -> Sequence[Any]:
    """Return an answer that has so many items.

    Args:
        asked: What was sent, for the error.
        answer: What came back.
        length: How many items a server returns.

    Raises:
        UnusableReplyError: Anything else.
    """
    if not isinstance(answer, (list, tuple)) or len(answer) != length:
        raise _unusable(asked, answer)
    return answer


def checked_strings(asked: str, answer: object, length: int) -> Sequence[RawValue]:
    """Return an answer that has so many strings, any of which may be missing; see `sequence`."""
    values = checked_sequence(asked, answer, length)
    if not all(value is None or isinstance(value, (bytes, str)) for value in values):
        raise _unusable(asked, answer)
    return values


def server_time_ms(answer: object) -> int:
    """Return the answer to TIME in milliseconds since the epoch.

    Raises:
        UnusableReplyError: An answer that no server gives.
    """
    parts = [str(to_text(part)) for part in checked_sequence("TIME", answer, 2)]
    if not all(part.isascii() and part.isdigit() and len(part) <= TIME_DIGITS_MAX for part in parts):
        raise _unusable("TIME", answer)
    seconds, microseconds = map(int, parts)
    return seconds * 1000 + microseconds // 1000


def _unusable(asked: str, answer: object) -> UnusableReplyError:
    return UnusableReplyError(f"the answer to {asked} is {answer!r:.200}, which no server gives")
