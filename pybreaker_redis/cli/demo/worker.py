"""Worker of the demo: calls the dependency in a loop, guarded by a plain breaker on the shared storage.

Run as ``python -m pybreaker_redis.cli.demo.worker SETTINGS``, where the settings are one JSON object.  Workers share
nothing but the circuit's namespace.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import select
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pybreaker import STATE_CLOSED, CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.cli.demo.events import Event, emit

if TYPE_CHECKING:
    from pybreaker_redis.cli.demo.events import Kind

#: Seconds between two calls.
CALL_INTERVAL_S = 0.05

#: Seconds after which a call gives up.
CALL_TIMEOUT_S = 0.5

#: Seconds after which another worker may claim the probe of a killed one.  Longer than any call.
PROBE_LEASE_S = 2 * CALL_TIMEOUT_S

#: Seconds that a call waits for Redis.  Longer than the default, so that a busy machine causes no outage.
REDIS_TIMEOUT_S = 2.0

#: Longest text of an error, in characters.  An event must fit into one atomic write to a pipe.
ERROR_TEXT_MAX = 500

#: Event of the demo for each log event about the server.
EVENT_BY_LOG_EVENT: dict[str, Kind] = {"away": "unreachable", "back": "returned"}


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker, from its command line.

    Attributes:
        name: Name of the worker in its events.
        url: URL of the server that holds the circuit.
        namespace: Namespace of the circuit.
        port: Port of the dependency on the loopback interface.
        fail_max: Consecutive failures, of all workers together, that open the circuit.
        reset_timeout: Seconds that the circuit stays open.
    """

    name: str
    url: str
    namespace: str
    port: int
    fail_max: int
    reset_timeout: float


class StateReporter(CircuitBreakerListener):
    """Listener that reports each change of the circuit's state."""

    def __init__(self, name: str) -> None:
        self._name = name

    def state_change(self, cb: CircuitBreaker, old_state: Any, new_state: Any) -> None:
        """Report the new state."""
        emit(Event(self._name, "state", time.monotonic(), state=new_state.name))


class OutageReporter(logging.Handler):
    """Log handler that reports when the server becomes unreachable and when it returns.  Other lines are dropped."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._worker = name

    def emit(self, record: logging.LogRecord) -> None:
        """Report a record about an outage or its end."""
        fields: dict[str, Any] = getattr(record, "pybreaker_redis", {})
        if kind := EVENT_BY_LOG_EVENT.get(fields.get("event", "")):
            emit(Event(self._worker, kind, time.monotonic()))


class DependencyFailed(Exception):
    """Failure of the dependency: an error, or no answer in time."""


def call_dependency(port: int, name: str) -> None:
    """Call the dependency with the worker's name as the user agent.

    Raises:
        DependencyFailed: The dependency answered with an error, or not in time.
    """
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_TIMEOUT_S)) as connection:
            connection.request("GET", "/", headers={"User-Agent": name})
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise DependencyFailed from error
    if status != http.HTTPStatus.OK:
        raise DependencyFailed(f"the dependency answered {status}")


def main() -> None:
    """Call, report and pause in a loop, until standard input ends."""
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    logger = logging.getLogger("pybreaker_redis")
    logger.addHandler(OutageReporter(settings.name))
    logger.setLevel(logging.INFO)
    breaker = CircuitBreaker(
        fail_max=settings.fail_max,
        reset_timeout=settings.reset_timeout,
        state_storage=CircuitRedisStorage.from_url(
            settings.url,
            STATE_CLOSED,
            settings.namespace,
            probe_lease=PROBE_LEASE_S,
            timeout=REDIS_TIMEOUT_S,
        ),
        listeners=[StateReporter(settings.name)],
        # The call that opens the circuit raises the dependency's error, so "rejected" means that no call was made.
        throw_new_error_on_trip=False,
    )
    # The pause ends at once when the demo closes standard input, or dies.
    while not select.select([sys.stdin], [], [], CALL_INTERVAL_S)[0]:
        outcome: Kind = "success"
        leaked = ""
        started = time.monotonic()
        try:
            breaker.call(call_dependency, settings.port, settings.name)
        except CircuitBreakerError:
            outcome = "rejected"
        except DependencyFailed:
            outcome = "failure"
        except Exception as error:  # noqa: BLE001
            # A storage must raise no errors into guarded calls.
            outcome, leaked = "leaked", repr(error)[:ERROR_TEXT_MAX]
        now = time.monotonic()
        emit(Event(settings.name, outcome, now, took=now - started, state=breaker.current_state, error=leaked))


if __name__ == "__main__":
    main()
