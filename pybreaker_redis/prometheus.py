"""Public import path of `pybreaker_redis.instrument.prometheus`."""

from pybreaker_redis.instrument.prometheus import BreakerCollector, PrometheusListener

__all__ = ("BreakerCollector", "PrometheusListener")
