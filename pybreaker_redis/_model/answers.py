"""Checks of raw replies.

A client may suppress errors, and a proxy may change replies.  A reply that no server returns is an error of the server:
the process uses its local circuit, and no guarded call meets the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pybreaker_redis._model.codec import RawValue, to_text
from pybreaker_redis.errors import UnusableReplyError

#: Number of digits of the seconds in a reply to TIME, at most.  A record holds 15 digits of milliseconds.
TIME_DIGITS_MAX = 12


def checked_sequence(asked: str, answer: object, length: int) -> Sequence[Any]:
    """Return a reply that is a sequence of the right length.

    Args:
        asked: Name of the command, for the error.
        answer: Reply of the client.
        length: Number of items that a server returns.

    Raises:
        UnusableReplyError: The reply has another type or length.
    """
    if not isinstance(answer, (list, tuple)) or len(answer) != length:
        raise unusable_reply(asked, answer)
    return answer


def checked_strings(asked: str, answer: object, length: int) -> Sequence[RawValue]:
    """Return a reply that is a sequence of strings or ``None``, see `checked_sequence`."""
    values = checked_sequence(asked, answer, length)
    if not all(value is None or isinstance(value, (bytes, str)) for value in values):
        raise unusable_reply(asked, answer)
    return values


def server_time_ms(answer: object) -> int:
    """Return the reply to TIME in milliseconds since the epoch.

    Args:
        answer: Reply of the client.

    Raises:
        UnusableReplyError: The reply is none that a server returns.
    """
    parts = [str(to_text(part)) for part in checked_sequence("TIME", answer, 2)]
    if not all(part.isascii() and part.isdigit() and len(part) <= TIME_DIGITS_MAX for part in parts):
        raise unusable_reply("TIME", answer)
    seconds, microseconds = map(int, parts)
    return seconds * 1000 + microseconds // 1000


def unusable_reply(asked: str, answer: object) -> UnusableReplyError:
    """Return the error for a reply that no server returns.

    Args:
        asked: Name of the command.
        answer: Reply of the client.
    """
    return UnusableReplyError(f"the reply to {asked} is {answer!r:.200}, which no server returns")
