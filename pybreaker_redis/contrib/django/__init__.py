"""Breakers for a Django project, from one dictionary in its settings; add this package to ``INSTALLED_APPS``."""

from __future__ import annotations

from pybreaker_redis._runtime.optional import require_extra

with require_extra("django"):
    from pybreaker_redis.contrib.django.registry import breakers

__all__ = ("breakers",)
