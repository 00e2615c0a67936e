"""Celery tasks that pay later while the payment service is down.

``celery --workdir examples/celery_tasks --app tasks worker --concurrency 4``
"""

import os
import urllib.request

from celery import Celery

from pybreaker_redis.contrib.celery import BreakerTask
from pybreaker_redis.registry import BreakerRegistry

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/1")
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://localhost:8001/")

app = Celery("payments", broker=BROKER_URL, backend=BROKER_URL)
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)

# The call that opens the circuit raises the service's error, like earlier failures.  CircuitOpenError means that no
# call was made.
breakers = BreakerRegistry(
    os.environ.get("REDIS_URL", "redis://localhost:6379/0"),
    prefix="tasks",
    fail_max=3,
    reset_timeout=float(os.environ.get("RESET_TIMEOUT", "30")),
    # Longer than the slowest call.  Tasks that are rejected during a probe retry when the lease ends.
    probe_lease=float(os.environ.get("PROBE_LEASE", "10")),
)


@breakers.guard("payments")
def charge() -> str:
    """Call the payment service, and return a receipt."""
    with urllib.request.urlopen(PAYMENTS_URL, timeout=5) as answer:
        receipt: str = answer.read().decode()
        return receipt


@app.task(base=BreakerTask, rejections_count=False)
def pay() -> str:
    """Pay as soon as the service is available.  The sender limits the wait by ``expires``."""
    return charge()
