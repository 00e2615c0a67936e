"""Public import path of `pybreaker_redis.testing.fixtures`."""

from pybreaker_redis.testing.fixtures import breaker_clock, breaker_prefix, memory_breakers

__all__ = ("breaker_clock", "breaker_prefix", "memory_breakers")
