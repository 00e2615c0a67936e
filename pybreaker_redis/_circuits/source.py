"""Sources of clients: a client, or a callable that returns one.

Knows: what a storage accepts.  Does not know: what is asked of a client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pybreaker_redis._runtime.validation import format_value


def client_source(redis_object: Any) -> Callable[[], Any]:
    """Validate a client or a callable that returns one; something to be called in either case."""
    is_client = hasattr(redis_object, "evalsha") and not isinstance(redis_object, type)
    asynchronous = is_client and "asyncio" in type(redis_object).__module__
    if asynchronous or not (is_client or callable(redis_object)):
        shown = format_value(redis_object)
        msg = f"redis_object must be a synchronous client or a callable that returns one, not {shown}"
        raise TypeError(msg)
    source: Callable[[], Any] = (lambda: redis_object) if is_client else redis_object
    return source
