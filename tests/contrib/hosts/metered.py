"""The README's shop that is scraped, with something to do: calls through its breaker, to the dependency of all hosts.

Gunicorn is told to look for ``shop`` where the test has written it.

Knows: Flask, the README's names.  Does not know: which promise is being tested.
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
    timeout=10,  # a busy machine is no outage
)

#: A gauge of the application's own, which forgets workers that have ended.
WORKERS = Gauge("shop_workers", "Workers that have answered.", multiprocess_mode="livesum")


@application.get("/call")
def make_call() -> dict[str, Any]:
    """A guarded call."""
    return {**call(BREAKER), "pid": os.getpid()}


@application.get("/ready")
def ready() -> dict[str, Any]:
    """Nothing but that somebody is there."""
    return {"pid": os.getpid()}


@application.before_request
def note_worker() -> None:
    """This worker answers."""
    WORKERS.set(1)


@application.after_request
def name_worker(response: Response) -> Response:
    """A page of metrics does not tell whose it is."""
    response.headers["X-Worker"] = str(os.getpid())
    return response
