"""Django app: breakers of the setting ``PYBREAKER``, system checks, and ``manage.py breakers``.

Add ``"pybreaker_redis.contrib.django"`` to ``INSTALLED_APPS``.
"""

from __future__ import annotations

from pybreaker_redis._runtime.optional import require_extra

with require_extra("django"):
    from pybreaker_redis.contrib.django.registry import breakers

__all__ = ("breakers",)
