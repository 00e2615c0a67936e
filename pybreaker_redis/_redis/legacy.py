"""What old clients need: redis-py 3 and redis-py-cluster.

Knows: differences between versions of clients.  Does not know: circuits.
"""

from __future__ import annotations

from typing import Any

import redis

#: Whether redis-py can be asked not to decode the answer to a single command.
HAS_NEVER_DECODE = hasattr(redis.client, "NEVER_DECODE")


def client_without_decoding(client: Any) -> Any:
    """The client, or one of the same server: redis-py 3, if it decodes, cannot be asked not to for a single command."""
    pool = getattr(client, "connection_pool", None)
    if HAS_NEVER_DECODE or not pool or not pool.connection_kwargs.get("decode_responses"):
        return client
    words = {**pool.connection_kwargs, "decode_responses": False}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **words))
