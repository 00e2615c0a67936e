"""App configuration: registers the system checks and follows changes of settings."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed

from pybreaker_redis.contrib.django.registry import breakers, configuration_problems


class PybreakerConfig(AppConfig):
    """App ``pybreaker_redis``, with its checks and the command ``breakers``."""

    name = "pybreaker_redis.contrib.django"
    label = "pybreaker_redis"
    verbose_name = "Circuit breakers"

    def ready(self) -> None:
        """Register the checks, and reset the breakers when a test changes settings.  Nothing is sent to Redis."""
        checks.register(check_settings, "pybreaker_redis")
        setting_changed.connect(breakers.reset_on_setting_change, dispatch_uid="pybreaker_redis")


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Return the messages of ``manage.py check`` about ``PYBREAKER``."""
    return list(configuration_problems())
