"""Tools for tests of guarded code.  The names exported here need no Redis."""

from pybreaker_redis.testing.circuits import force_closed, force_open, in_memory, in_redis, unique_prefix
from pybreaker_redis.testing.clock import BreakerClock

__all__ = ("BreakerClock", "force_closed", "force_open", "in_memory", "in_redis", "unique_prefix")
