"""The application of the hosts as tasks of Celery."""

from __future__ import annotations

import json
import os

from celery import Celery

from tests.contrib.hosts import app

#: Seconds for which an answer is kept.
ANSWER_TTL_S = 60

celery = Celery("shop", broker=os.environ["SHOP_BROKER"])
# A child that is held up keeps only one other task waiting.
celery.conf.update(worker_prefetch_multiplier=1, task_ignore_result=True, broker_connection_retry_on_startup=True)


@celery.task
def answer(what: str, reply_to: str) -> None:
    """Push the answer to the list `reply_to` on the circuit's own server."""
    app.CLIENT.rpush(reply_to, json.dumps(app.answer(what)))
    app.CLIENT.expire(reply_to, ANSWER_TTL_S)
