"""Configuration of gunicorn that has each answer say which worker it comes from."""

import os
from collections.abc import Callable, Iterable
from typing import Any


def post_worker_init(worker: Any) -> None:
    """Gunicorn calls this in each worker, when it has loaded the application."""
    application = worker.wsgi

    def named(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *error)

        body: Iterable[bytes] = application(environ, start)
        return body

    worker.wsgi = named
