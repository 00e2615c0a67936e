"""What does Django do with the app when it starts?

Knows: apps, system checks, signals.  Does not know: what is right.
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed

from pybreaker_redis.contrib.django.registry import breakers, configuration_problems


class PybreakerConfig(AppConfig):
    """The app: its checks, and the command ``breakers``."""

    name = "pybreaker_redis.contrib.django"
    label = "pybreaker_redis"
    verbose_name = "Circuit breakers"

    def ready(self) -> None:
        """Check settings when asked, follow them when tests change them; nothing is sent."""
        checks.register(check_settings, "pybreaker_redis")
        setting_changed.connect(breakers.reset_on_setting_change, dispatch_uid="pybreaker_redis")


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """What ``manage.py check`` says about ``PYBREAKER``."""
    return list(configuration_problems())
