"""Clients of URLs."""

from __future__ import annotations

from typing import Any

import pytest

from pybreaker_redis._redis import url as url_module
from pybreaker_redis._redis.url import client_source_from_url

#: Mark of tests that need a client library with clusters.
has_cluster = pytest.mark.skipif(url_module.cluster_library() is None, reason="no library for clusters is installed")


def options_of(url: str) -> dict[str, Any]:
    """Return the connection arguments of a URL's client."""
    options: dict[str, Any] = client_source_from_url(url)().connection_pool.connection_kwargs
    return options
