"""The application that every host runs: one breaker, created at import, and one dependency behind it.

Environment variables carry all settings, so that any server can load the application.  The dependency is a file with
its condition: ``up``, ``down``, or ``held``, which keeps calls waiting for another condition.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pybreaker
import redis

from pybreaker_redis import CircuitRedisStorage

#: Seconds between two looks at a held dependency.
LOOK_PAUSE_S = 0.01

#: Seconds after which a held call fails, even if the test process is gone.
HELD_MAX_S = 60.0


class DependencyDown(Exception):
    """Error of the dependency while it is down."""


DEPENDENCY = Path(os.environ["SHOP_DEPENDENCY"])
VISITS = Path(os.environ["SHOP_VISITS"])
CLIENT = redis.Redis(unix_socket_path=os.environ["SHOP_UNIX_SOCKET"])
PARAMETERS: dict[str, float] = json.loads(os.environ["SHOP_STORAGE"])
BREAKER = pybreaker.CircuitBreaker(
    fail_max=int(os.environ["SHOP_FAIL_MAX"]),
    reset_timeout=float(os.environ["SHOP_RESET_TIMEOUT"]),
    state_storage=CircuitRedisStorage("closed", CLIENT, namespace="shop", **PARAMETERS),
)


def dependency() -> None:
    """Record the visit, then succeed, fail or wait as the file says."""
    began = time.monotonic()
    with VISITS.open("a") as log:
        log.write(json.dumps([os.getpid(), began]) + "\n")
    while (condition := DEPENDENCY.read_text()) == "held" and time.monotonic() < began + HELD_MAX_S:
        time.sleep(LOOK_PAUSE_S)
    if condition != "up":
        raise DependencyDown(condition)


def call(breaker: pybreaker.CircuitBreaker = BREAKER) -> dict[str, Any]:
    """Make a guarded call, and return its outcome."""
    reached = False

    def guarded() -> None:
        nonlocal reached
        reached = True
        dependency()

    try:
        breaker.call(guarded)
    except (DependencyDown, pybreaker.CircuitBreakerError):
        return {"outcome": "failed" if reached else "rejected"}
    return {"outcome": "ok"}


def look() -> dict[str, Any]:
    """Return the circuit's state and the threads of this process."""
    monkey = sys.modules.get("gevent.monkey")
    return {
        "state": BREAKER.current_state,
        "threads": [thread.name for thread in threading.enumerate()],
        "gevent": bool(monkey and monkey.is_module_patched("threading")),
    }


def ready() -> dict[str, Any]:
    """Return nothing, without a use of the circuit."""
    return {}


#: Functions that a request can name.
ANSWERS: dict[str, Callable[[], dict[str, Any]]] = {"call": call, "look": look, "ready": ready}


def answer(what: str) -> dict[str, Any]:
    """Return the answer to a request, with the id of this process."""
    return {**ANSWERS[what](), "pid": os.getpid()}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a WSGI request by the function that its path names.  The server reports errors."""
    body = json.dumps(answer(environ["PATH_INFO"].strip("/"))).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


if os.environ["SHOP_CALL_AT_IMPORT"] == "yes":
    call()
