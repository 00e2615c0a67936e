"""Configuration of gunicorn in which each answer has the id of its worker in a header."""

import os
from collections.abc import Callable, Iterable
from typing import Any


def post_worker_init(worker: Any) -> None:
    """Wrap the loaded application of a worker, as a hook that gunicorn calls."""
    application = worker.wsgi

    def named(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *error)

        body: Iterable[bytes] = application(environ, start)
        return body

    worker.wsgi = named
