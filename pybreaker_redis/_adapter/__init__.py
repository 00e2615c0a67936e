"""Inference of what an unmodified pybreaker breaker asks for."""

from pybreaker_redis._adapter.compatibility import check_pybreaker

# Before any other module of this package reads an internal of pybreaker.
check_pybreaker()
