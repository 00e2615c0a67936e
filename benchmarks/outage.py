"""Waits of guarded calls while Redis is down: ``python -m benchmarks.outage``.

The script measures pybreaker's storage and ours, each on a server of its own.  The server is killed, so that it refuses
connections, or it is frozen.  ``--write`` updates ``docs/images/outage.json``, from which ``docs/images/outage.py``
draws the picture of the README.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pybreaker
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.servers import at_hand

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "images" / "outage.json"

#: Settings of the clients that outlast a frozen server: without them redis-py waits for minutes.
SOCKET_TIMEOUT_S = 0.5

#: Duration of the calls through `pybreaker_redis`, and the pause between two of them, in seconds.
WATCHED_S, PAUSE_S = 4.0, 0.001

#: Number of calls through pybreaker's storage.
STOCK_CALLS = 3


def waits(storage: Any, server: PrivateServer, *, is_frozen: bool, is_stock: bool) -> list[float]:
    """Return the seconds that each call took, from the loss of the server on."""
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=30, state_storage=storage)
    for _ in range(20):
        breaker.call(str)
        time.sleep(0.02)
    server.pause() if is_frozen else server.kill()
    seconds: list[float] = []
    end = time.monotonic() + WATCHED_S
    while len(seconds) < STOCK_CALLS if is_stock else time.monotonic() < end:
        began = time.perf_counter()
        with contextlib.suppress(redis.RedisError):
            breaker.call(str)
        seconds.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)
    return seconds


def measure(binary: str, *, is_frozen: bool, is_stock: bool) -> list[float]:
    """Return the waits of calls on one storage, with the client's default settings if the server refuses."""
    port = free_port()
    settings: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "retry": Retry(NoBackoff(), 0)} if is_frozen else {}
    with PrivateServer(binary, port=port) as server, redis.Redis(port=port, **settings) as client:
        kind: Any = pybreaker.CircuitRedisStorage if is_stock else CircuitRedisStorage
        try:
            return waits(kind("closed", client, namespace="outage"), server, is_frozen=is_frozen, is_stock=is_stock)
        finally:
            if is_frozen:
                server.resume()


def bar(label: str, seconds: float) -> dict[str, Any]:
    """Return one bar of the chart."""
    shown = f"{seconds:.2f} s" if seconds >= 0.01 else f"{float(f'{seconds * 1e6:.2g}'):g} µs"
    return {"label": label, "seconds": round(seconds, 7), "text": shown}


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"update {FIGURES.name}")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    server = at_hand()[0]
    groups = []
    for name, colour, is_stock in (
        ("pybreaker, its Redis storage", "#d55e00", True),
        ("pybreaker_redis", "#0072b2", False),
    ):
        refused = measure(server.binary, is_frozen=False, is_stock=is_stock)
        frozen = measure(server.binary, is_frozen=True, is_stock=is_stock)
        bars = [
            bar("Redis refuses connections: slowest call", max(refused)),
            bar("Redis refuses connections: median", statistics.median(refused)),
            bar("Redis frozen: slowest call", max(frozen)),
            bar("Redis frozen: median", statistics.median(frozen)),
        ]
        groups.append({"name": name, "colour": colour, "bars": bars})
    figures = {
        "title": "Wait of a successful guarded call, while Redis is down",
        "source": (
            f"pybreaker {version('pybreaker')}, redis-py {redis.__version__}, {server.product} {server.version}."
            f" Frozen: socket_timeout={SOCKET_TIMEOUT_S}, no retry. Refused: defaults."
        ),
        "groups": groups,
    }
    text = json.dumps(figures, indent=4, ensure_ascii=False) + "\n"
    print(text)
    if arguments.write:
        FIGURES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
