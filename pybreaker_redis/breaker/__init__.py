"""Circuit breaker that admits calls and settles their outcomes."""

from pybreaker_redis.breaker.breaker import CircuitBreaker
from pybreaker_redis.breaker.permit import Permit
from pybreaker_redis.breaker.transitions import Transition, is_notified_by_author
from pybreaker_redis.breaker.wrappers import wrapper_of

__all__ = ("CircuitBreaker", "Permit", "Transition", "is_notified_by_author", "wrapper_of")
