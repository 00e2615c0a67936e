"""What time is it here?

Knows: the local wall clock.  Does not know: any other clock.

Looked up at every call, so that freezegun and time-machine are heard.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone


def now_ms() -> float:
    """Milliseconds since the epoch by the local clock."""
    return time.time() * 1000


def from_ms(at_ms: float) -> datetime:
    """An aware UTC datetime."""
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc)


def to_ms(at: datetime) -> float:
    """Milliseconds since the epoch; a naive datetime is taken as UTC."""
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() * 1000
