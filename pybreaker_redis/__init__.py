"""Circuit breakers that many processes share through Redis, as storages for pybreaker."""

from pybreaker_redis.errors import PybreakerRedisError, StorageUnavailableError, UnusableReplyError
from pybreaker_redis.health import Health
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.operators import retry_after
from pybreaker_redis.registry import BreakerRegistry, CircuitStatus
from pybreaker_redis.storage import CircuitRedisStorage

__version__ = "0.1.0"

__all__ = (
    "BreakerRegistry",
    "CircuitMemoryStorage",
    "CircuitRedisStorage",
    "CircuitStatus",
    "Health",
    "PybreakerRedisError",
    "StorageUnavailableError",
    "UnusableReplyError",
    "retry_after",
)
