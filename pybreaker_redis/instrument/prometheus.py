"""Prometheus metrics of breakers: a listener that counts calls, and a collector of circuit states.

Each process counts its calls, and prometheus-client sums the counts where several processes are scraped as one.  The
state of a circuit is the same for all processes.  The collector reads it from Redis at each scrape and stores no value:
stored values would be summed, and would outlive their process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerListener,
    CircuitBreakerState,
)

from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.instrument.authors import is_author
from pybreaker_redis.registry import BreakerRegistry, CircuitStatus

with require_extra("prometheus_client", extra="prometheus"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

__all__ = ("BreakerCollector", "PrometheusListener")

#: States of a circuit, in the order in which the metrics list them.
CIRCUIT_STATES = (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN)


class _CallCounters:
    """Counters in one registry of prometheus-client, which accepts each name once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "pybreaker_calls",
            "Guarded calls that were admitted, by result.",
            ["breaker", "result"],
            registry=registry,
        )
        self.transitions = Counter(
            "pybreaker_transitions",
            "Changes of state that this process made.",
            ["breaker", "state"],
            registry=registry,
        )
        self.rejected = Counter("pybreaker_rejected_calls", "Calls that were rejected.", ["breaker"], registry=registry)


# A fork waits until no thread creates counters.  A child with a copy of the held lock would wait for ever.  With a new
# lock the child would find names in use by counters that it does not have.  The creation of counters waits for no other
# thread.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

_counters_of_registry: WeakKeyDictionary[CollectorRegistry, _CallCounters] = WeakKeyDictionary()


class PrometheusListener(CircuitBreakerListener):
    """Listener that counts calls and transitions.

    - ``pybreaker_calls_total`` (labels ``breaker`` and ``result``): Admitted calls: ``success`` or ``failure``.
    - ``pybreaker_rejected_calls_total`` (label ``breaker``): Rejected calls of a `pybreaker_redis.CircuitBreaker`.  An
      unmodified breaker of pybreaker notifies no listener of a rejection.
    - ``pybreaker_transitions_total`` (labels ``breaker`` and ``state``): Transitions.  Only the process that made a
      transition counts it.

    Args:
        registry: Registry of prometheus-client.  Several listeners in one registry share their counters.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        with _lock:
            counters = _counters_of_registry.get(registry) or _counters_of_registry.setdefault(
                registry, _CallCounters(registry)
            )
        self._calls, self._rejected, self._transitions = counters.calls, counters.rejected, counters.transitions

    def success(self, cb: CircuitBreaker) -> None:
        """Count a success, as `pybreaker.CircuitBreakerListener` defines it."""
        self._calls.labels(cb.name, "success").inc()

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        """Count a failure, as `pybreaker.CircuitBreakerListener` defines it."""
        self._calls.labels(cb.name, "failure").inc()

    def rejected(self, cb: CircuitBreaker, error: BaseException) -> None:
        """Count a rejected call of a `pybreaker_redis.CircuitBreaker`."""
        self._rejected.labels(cb.name).inc()

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState | None,
        new_state: CircuitBreakerState,
    ) -> None:
        """Count a transition, as `pybreaker.CircuitBreakerListener` defines it."""
        # Opening an open circuit by hand restarts its timeout, and is no transition.
        if is_author(cb) and (old_state is None or old_state.name != new_state.name):
            self._transitions.labels(cb.name, new_state.name).inc()


class BreakerCollector(Collector):
    """Collector that reads the circuits of a registry at each scrape, in one round trip.

    - ``pybreaker_circuit_state`` (labels ``breaker`` and ``state``): 1 for the circuit's state, 0 for other states.
    - ``pybreaker_circuit_failures`` (label ``breaker``): Consecutive failures.
    - ``pybreaker_circuit_retry_after_seconds`` (label ``breaker``): Seconds until a call may be admitted.
    - ``pybreaker_circuits_up``: 1, or 0 if Redis is unavailable.  With 0 the other metrics are missing.

    Args:
        breakers: Registry that has the circuits.
    """

    def __init__(self, breakers: BreakerRegistry) -> None:
        self._breakers = breakers

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one scrape."""
        try:
            status = self._breakers.status()
        except Exception:  # noqa: BLE001
            # An exception would end the scrape, and lose all other metrics of the process.
            yield _up_metric("up", 0)
        else:
            yield _up_metric("up", 1)
            yield from _status_metrics(status)

    def describe(self) -> list[Metric]:
        """Return the metrics without values and without a request, because modules register collectors at import."""
        return [_up_metric("up", 1), *_status_metrics({})]


def _up_metric(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"pybreaker_circuits_{name}", "Whether the circuits could be read.", value=value)


def _status_metrics(status: dict[str, CircuitStatus]) -> list[GaugeMetricFamily]:
    state = GaugeMetricFamily("pybreaker_circuit_state", "1 for the circuit's state.", labels=["breaker", "state"])
    failures = GaugeMetricFamily("pybreaker_circuit_failures", "Consecutive failures.", labels=["breaker"])
    retry_after = GaugeMetricFamily(
        "pybreaker_circuit_retry_after_seconds", "Seconds until a call may be admitted.", labels=["breaker"]
    )
    for name, circuit in status.items():
        for each in CIRCUIT_STATES:
            state.add_metric([name, each], circuit.state == each)
        failures.add_metric([name], circuit.fail_counter)
        retry_after.add_metric([name], circuit.retry_after)
    return [state, failures, retry_after]
