"""Fixtures for tests of pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.pages import changing_settings


@pytest.fixture
def change_settings(server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Function that changes Django's settings, beside a server that ``REDIS_URL`` names."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("REDIS_URL", server.url)
    with changing_settings() as change:
        yield change
