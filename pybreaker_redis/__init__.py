"""Circuit breaker storages for pybreaker: shared through Redis, or in this process."""

from pybreaker_redis.health import Health
from pybreaker_redis.memory import CircuitMemoryStorage
from pybreaker_redis.storage import CircuitRedisStorage

__version__ = "0.1.0"

__all__ = ("CircuitMemoryStorage", "CircuitRedisStorage", "Health")
