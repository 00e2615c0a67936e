"""Is an answer one that a server gives?

Knows: what scripts and single commands return, the ranges of every value.  Does not know: clients, who asked.

A client may swallow errors, and a proxy may change answers.  What no server returns is a fault of the server: the
process uses a circuit of its own, and no guarded call meets the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import COUNT_LIMIT, LEASE_MAX_MS, NOISE_MAX_MS, OPEN, STATES, TIME_MAX_MS, Circuit
from pybreaker_redis._record import PROBE_TOKEN_PATTERN, RawValue, to_text
from pybreaker_redis.errors import UnusableReplyError

#: How scripts and their arguments spell "by hand" and "never".
NO_VALUE = -1

#: How many values a script returns.
_VALUES = 13

#: How many digits of seconds a server's clock has at most, so that a record can hold its milliseconds.
TIME_DIGITS_MAX = 12


def parse_script_reply(answer: object) -> tuple[Reply, str]:
    """Return the answer of a script, and why PUBLISH was refused or an empty text.

    Raises:
        UnusableReplyError: An answer that no script returns.
    """
    accepted, now_ms, state, fails, successes, opened_at_ms, generation, token, *rest = checked_sequence(
        "a script", answer, _VALUES
    )
    until_ms, noisy_ms, lease_ms, event, unheard = rest
    texts = state, token, event, unheard
    if bytes in set(map(type, texts)):
        state, token, event, unheard = map(to_text, texts)
    numbers = accepted, now_ms, fails, successes, opened_at_ms, generation, until_ms, noisy_ms, lease_ms
    # One look at all types costs a third of one at each value.
    is_sound = (
        set(map(type, numbers)) == {int}
        and set(map(type, (state, token, event, unheard))) == {str}
        and 0 <= accepted <= 1
        and 0 <= now_ms <= TIME_MAX_MS
        and state in STATES
        and 0 <= fails < COUNT_LIMIT
        and 0 <= successes < COUNT_LIMIT
        and 0 <= generation < COUNT_LIMIT
        # An open circuit has a time: without it a probe would pass at once.
        and (0 if state == OPEN else NO_VALUE) <= opened_at_ms <= now_ms
        and PROBE_TOKEN_PATTERN.fullmatch(token)
        and 0 <= until_ms <= now_ms + LEASE_MAX_MS
        and 0 <= noisy_ms <= now_ms + NOISE_MAX_MS
        and 0 <= lease_ms <= LEASE_MAX_MS
    )
    if not is_sound:
        raise _unusable("a script", answer)
    circuit = Circuit(
        state=state,
        fail_counter=fails,
        success_counter=successes,
        opened_at_ms=None if opened_at_ms == NO_VALUE else opened_at_ms,
        generation=generation,
        probe_token=token,
        probe_until_ms=until_ms,
        noisy_until_ms=noisy_ms,
        probe_lease_ms=lease_ms,
    )
    return Reply(bool(accepted), circuit, now_ms, event), unheard


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
