"""Length of the journeys of guarded calls: package functions called, and modules touched.

The calls run against a private server.  The listener is connected, and the server has the scripts.  Only the calling
thread is counted: a profile function sees each call of a Python function of the package.

``python -m benchmarks.journeys`` prints one line per journey.  ``--paths`` also prints the functions.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pybreaker
import redis

import pybreaker_redis
from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.testing.binaries import find_servers
from pybreaker_redis.testing.servers import PrivateServer

PACKAGE = f"{Path(pybreaker_redis.__file__).parent}/"

#: Most package functions and modules of a journey.  One of the modules has the spare connections.
LIMITS = {"success": (2, 1), "failure": (84, 18), "trip": (190, 19), "recovery": (456, 20)}

RESET_TIMEOUT_S = 1.0

#: Seconds that the wait for a listener or a transition may take.
WAIT_MAX_S = 10.0

_OPEN = """
import sys, pybreaker, redis
from pybreaker_redis import CircuitRedisStorage
storage = CircuitRedisStorage("closed", redis.Redis.from_url(sys.argv[1]), sys.argv[2], timeout=2.0)
pybreaker.CircuitBreaker(state_storage=storage).open()
"""

#: Calls by module and function.
Calls = Counter[tuple[str, str]]


class DependencyError(Exception):
    """Failure of a guarded call."""


def succeed() -> None:
    """Succeed as a dependency does."""


def fail() -> None:
    """Fail as a dependency does."""
    raise DependencyError


def trace(run: Callable[[], object]) -> Calls:
    """Return the package functions that a call runs on this thread."""
    calls: Calls = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[code.co_filename.removeprefix(PACKAGE), getattr(code, "co_qualname", code.co_name)] += 1

    sys.setprofile(profile)
    try:
        with contextlib.suppress(DependencyError, pybreaker.CircuitBreakerError):
            run()
    finally:
        sys.setprofile(None)
    return calls


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: The condition was not met in time.
    """
    until = time.monotonic() + WAIT_MAX_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.005)


class Journeys:
    """One circuit of a private server, with a connected listener.

    Args:
        url: URL of the server.
        name: Namespace of the circuit.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.storage = CircuitRedisStorage("closed", redis.Redis.from_url(url), name, timeout=2.0, max_staleness=60.0)
        self.breaker = pybreaker.CircuitBreaker(
            fail_max=3, reset_timeout=RESET_TIMEOUT_S, state_storage=self.storage, throw_new_error_on_trip=False
        )
        self.breaker.call(succeed)
        wait_until(lambda: self.storage.health().push != "none")
        self.settle()

    def settle(self) -> None:
        """Make calls until a successful call needs no request."""
        wait_until(lambda: len(trace(lambda: self.breaker.call(succeed))) == len(FAST_PATH))

    def run(self) -> dict[str, Calls]:
        """Return the path of each journey."""
        breaker = self.breaker
        paths = {"success": trace(lambda: breaker.call(succeed))}
        trace(lambda: breaker.call(fail))
        paths["failure"] = trace(lambda: breaker.call(fail))
        paths["trip"] = trace(lambda: breaker.call(fail))
        time.sleep(RESET_TIMEOUT_S + 0.1)
        paths["recovery"] = trace(lambda: breaker.call(succeed))
        assert breaker.current_state == "closed", breaker.current_state
        self.settle()
        subprocess.run([sys.executable, "-c", _OPEN, self.url, self.name], check=True, timeout=30)
        wait_until(lambda: self.storage.health().state == "open")
        paths["notice"] = trace(lambda: breaker.call(succeed))
        assert breaker.current_state == "open", breaker.current_state
        return paths


#: Functions of the shortest path: reading the state, and reporting a success.
FAST_PATH = ("state", "reset_counter")


def measure() -> dict[str, Calls]:
    """Return the path of each journey on a server that has the scripts."""
    with PrivateServer(find_servers()[0].binary) as server:
        warm_up = Journeys(server.url, "warm-up")
        warm_up.run()
        # Callbacks of the garbage collector would be counted.
        gc.collect()
        gc.disable()
        try:
            return Journeys(server.url, "journeys").run()
        finally:
            gc.enable()
            del warm_up


def main() -> int:
    """Print the journeys, and return 1 if one is longer than its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journeys")
    parser.add_argument("--paths", action="store_true", help="print the functions of each journey")
    chosen = parser.parse_args()
    longer = False
    for journey, calls in measure().items():
        modules = {module for module, _ in calls}
        length, limit = (calls.total(), len(modules)), LIMITS.get(journey)
        longer = longer or (limit is not None and (length[0] > limit[0] or length[1] > limit[1]))
        print(
            f"{journey}: {length[0]} calls, {length[1]} modules", f"(at most {limit[0]}, {limit[1]})" if limit else ""
        )
        if chosen.paths:
            for module in sorted(modules):
                functions = {name: times for (where, name), times in calls.items() if where == module}
                print(
                    f"  {module} {sum(functions.values())}:",
                    *(f"{name}x{times}" if times > 1 else name for name, times in functions.items()),
                )
    return longer


if __name__ == "__main__":
    sys.exit(main())
