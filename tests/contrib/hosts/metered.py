"""The shop of ``docs/howto/metrics.rst``, with calls through its breaker to the dependency of all hosts.

Gunicorn finds the module ``shop`` in the directory of the test.
"""

from __future__ import annotations

import os
from typing import Any

import shop
from flask import Response
from prometheus_client import Gauge

from tests.contrib.hosts.app import call

application = shop.app

BREAKER = shop.breakers.get(
    "orders",
    fail_max=int(os.environ["SHOP_FAIL_MAX"]),
    reset_timeout=float(os.environ["SHOP_RESET_TIMEOUT"]),
    timeout=10,  # a slow answer of a busy machine is no outage
)

#: Gauge of the application, which drops workers that have ended.
WORKERS = Gauge("shop_workers", "Workers that have answered.", multiprocess_mode="livesum")


@application.get("/call")
def make_call() -> dict[str, Any]:
    """Make a guarded call."""
    return {**call(BREAKER), "pid": os.getpid()}


@application.get("/ready")
def ready() -> dict[str, Any]:
    """Answer without a use of the circuit."""
    return {"pid": os.getpid()}


@application.before_request
def note_worker() -> None:
    """Count this worker."""
    WORKERS.set(1)


@application.after_request
def name_worker(response: Response) -> Response:
    """Add the id of the worker to the answer, because a page of metrics has none."""
    response.headers["X-Worker"] = str(os.getpid())
    return response
