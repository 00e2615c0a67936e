"""The application that every host runs: one breaker, made at import, and one dependency behind it.

Everything is told by environment variables, so that any server can load it.  The dependency is a file that says how it
does: ``up``, ``down``, or ``held``, which is to wait until it says something else.

Knows: pybreaker, WSGI.  Does not know: which server it runs in.
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

#: Seconds between two looks at a dependency that is held.
GLANCE = 0.01

#: Seconds after which a held call fails, whatever became of the test.
HELD_AT_MOST = 60.0


class DependencyDown(Exception):
    """What the dependency raises when it is down."""


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
    """What the circuit guards: note the visit, then do as the file says."""
    began = time.monotonic()
    with VISITS.open("a") as log:
        log.write(json.dumps([os.getpid(), began]) + "\n")
    while (mood := DEPENDENCY.read_text()) == "held" and time.monotonic() < began + HELD_AT_MOST:
        time.sleep(GLANCE)
    if mood != "up":
        raise DependencyDown(mood)


def call(breaker: pybreaker.CircuitBreaker = BREAKER) -> dict[str, Any]:
    """A guarded call."""
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
    """The process as it sees itself."""
    monkey = sys.modules.get("gevent.monkey")
    return {
        "state": BREAKER.current_state,
        "threads": [thread.name for thread in threading.enumerate()],
        "gevent": bool(monkey and monkey.is_module_patched("threading")),
    }


def ready() -> dict[str, Any]:
    """Nothing but that somebody is there; the circuit is left alone."""
    return {}


#: What may be asked for.
ANSWERS: dict[str, Callable[[], dict[str, Any]]] = {"call": call, "look": look, "ready": ready}


def answer(what: str) -> dict[str, Any]:
    """The answer, and who gives it."""
    return {**ANSWERS[what](), "pid": os.getpid()}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: the path is what is asked for; anything that goes wrong is the server's to report."""
    body = json.dumps(answer(environ["PATH_INFO"].strip("/"))).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


if os.environ["SHOP_CALL_AT_IMPORT"] == "yes":
    call()
