"""For how long do the keys of a circuit live that nobody writes to?

Knows: states, the longest lease.  Does not know: keys, Redis.

The same rules stand in ``lua/circuit.lua``.
"""

from __future__ import annotations

from pybreaker_redis._circuit import CLOSED, LEASE_MAX_MS

#: How much longer than that they live at most, milliseconds: counts renew what is left only when this is used up.
TTL_RENEWAL_MARGIN_MS = 1000


def lifetime_ms(state: str, ttl_ms: int) -> int:
    """Milliseconds from the last write until the keys may expire.

    Of a closed circuit nothing is lost but failures that are not to count any more.  One that is not closed lives for a
    day at least: so long a probe's lease can be, and a reset timeout, which only the breaker knows, hardly is.

    Args:
        state: Of the circuit.
        ttl_ms: What its user wishes, milliseconds.
    """
    return ttl_ms if state == CLOSED else max(ttl_ms, LEASE_MAX_MS)
