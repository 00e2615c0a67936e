"""Public import path of `pybreaker_redis.instrument.logging`."""

from pybreaker_redis.instrument.logging import LogListener

__all__ = ("LogListener",)
