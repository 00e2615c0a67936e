"""Registry of an application's breakers: names, settings, decorator."""

from pybreaker_redis.registry.registry import BreakerRegistry, CircuitStatus, retry_after

__all__ = ("BreakerRegistry", "CircuitStatus", "retry_after")
