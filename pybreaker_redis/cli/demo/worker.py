"""A worker: calls the dependency again and again, guarded by a plain circuit breaker on the shared storage.

Run as ``python -m pybreaker_redis.cli.demo.worker SETTINGS``, where the settings are one JSON object.

Knows: its breaker, its dependency.  Does not know: other workers; what it has in common with them is the namespace.
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

import redis
from pybreaker import CircuitBreaker, CircuitBreakerError, CircuitBreakerListener

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.cli.demo.events import Event, emit

if TYPE_CHECKING:
    from pybreaker_redis.cli.demo.events import Kind

#: Seconds between two calls.
CALL_INTERVAL_S = 0.05

#: Seconds after which a call gives up.
CALL_TIMEOUT_S = 0.5

#: Seconds after which the probe of a worker that was killed is offered again.  Longer than any call.
PROBE_LEASE_S = 2 * CALL_TIMEOUT_S

#: Seconds to wait for the server.  More than usual: that this machine is busy is not the outage that is to be shown.
REDIS_TIMEOUT_S = 2.0

#: Characters of an error that are reported: a report is a single write.
ERROR_TEXT_MAX = 500


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told when it is started."""

    #: Its reports are signed with it.
    name: str
    #: The server that holds the circuit.
    url: str
    #: The circuit.
    namespace: str
    #: Where the dependency listens on the loopback interface.
    port: int
    #: Consecutive failures, of all workers together, that open the circuit.
    fail_max: int
    #: Seconds that it then stays open.
    reset_timeout: float


class StateReporter(CircuitBreakerListener):
    """Reports each change of state that this worker's breaker announces."""

    def __init__(self, name: str) -> None:
        self._name = name

    def state_change(self, cb: CircuitBreaker, old_state: Any, new_state: Any) -> None:
        """Report the new state."""
        emit(Event(self._name, "state", time.monotonic(), state=new_state.name))


class OutageReporter(logging.Handler):
    """Reports when this worker finds the server away, and when it is back; whatever else is logged is not printed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._worker = name

    def emit(self, record: logging.LogRecord) -> None:
        """Report what the record says, if it is about that."""
        said: dict[str, Any] | None = getattr(record, "pybreaker_redis", None)
        if said and said["event"] in ("away", "back"):
            emit(Event(self._worker, said["event"], time.monotonic()))


class DependencyFailed(Exception):
    """The dependency is down, or hangs."""


def ask(port: int, name: str) -> None:
    """Call the dependency, and say who calls.

    Raises:
        DependencyFailed: There was no good answer, or not in time.
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
    """Call, report, wait a little, until standard input ends."""
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    logger = logging.getLogger("pybreaker_redis")
    logger.addHandler(OutageReporter(settings.name))
    logger.setLevel(logging.INFO)
    client = redis.Redis.from_url(settings.url)
    breaker = CircuitBreaker(
        fail_max=settings.fail_max,
        reset_timeout=settings.reset_timeout,
        state_storage=CircuitRedisStorage(
            "closed", client, namespace=settings.namespace, probe_lease=PROBE_LEASE_S, timeout=REDIS_TIMEOUT_S
        ),
        listeners=[StateReporter(settings.name)],
        # The caller whose failure opens the circuit sees that failure, so "rejected" means: it was not even tried.
        throw_new_error_on_trip=False,
    )
    # The wait between calls ends at once when the demo closes our standard input, or dies.
    while not select.select([sys.stdin], [], [], CALL_INTERVAL_S)[0]:
        outcome: Kind = "success"
        leaked = ""
        started = time.monotonic()
        try:
            breaker.call(ask, settings.port, settings.name)
        except CircuitBreakerError:
            outcome = "rejected"
        except DependencyFailed:
            outcome = "failure"
        except Exception as error:  # noqa: BLE001
            # No caller should have to be ready for it.
            outcome, leaked = "leaked", repr(error)[:ERROR_TEXT_MAX]
        now = time.monotonic()
        emit(Event(settings.name, outcome, now, took=now - started, state=breaker.current_state, error=leaked))


if __name__ == "__main__":
    main()
