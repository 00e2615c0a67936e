"""Circuit breakers that many processes share through Redis: a breaker, and storages for pybreaker's own."""

from pybreaker_redis.breaker import CircuitBreaker, Permit, Transition
from pybreaker_redis.errors import CircuitOpenError, PybreakerRedisError, StorageUnavailableError, UnusableReplyError
from pybreaker_redis.health import Health
from pybreaker_redis.instrument.logging import LogListener
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.operators import retry_after
from pybreaker_redis.registry import BreakerRegistry, CircuitStatus
from pybreaker_redis.storage import CircuitRedisStorage

__version__ = "0.1.0"

__all__ = (
    "BreakerRegistry",
    "CircuitBreaker",
    "CircuitMemoryStorage",
    "CircuitOpenError",
    "CircuitRedisStorage",
    "CircuitStatus",
    "Health",
    "LogListener",
    "Permit",
    "PybreakerRedisError",
    "StorageUnavailableError",
    "Transition",
    "UnusableReplyError",
    "retry_after",
)
