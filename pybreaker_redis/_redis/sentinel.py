"""Masters that Sentinels watch.

Knows: pools of redis-py that ask Sentinels.  Does not know: circuits.
"""

from __future__ import annotations

from typing import Any

from pybreaker_redis._redis.classify import is_instance_of_named


def sentinel_pool_of(client: Any) -> Any:
    """The pool of a client whose master Sentinels watch; ``None`` of any other client."""
    pool = getattr(client, "connection_pool", None)
    return pool if hasattr(pool, "sentinel_manager") and getattr(pool, "is_master", False) else None


def is_demoted_master(error: Exception) -> bool:
    """Whether a master says that it no longer is one; redis-py's Sentinel connections say it in their own words."""
    text = str(error)
    return (
        is_instance_of_named(error, "ReadOnlyError") or "READONLY" in text or "previous master is now a slave" in text
    )
