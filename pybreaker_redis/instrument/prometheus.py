"""What does Prometheus see of the breakers?

Knows: prometheus-client, what listeners are told, the registry's status.  Does not know: how circuits are shared.

Calls are each process's own, so they are counted there, and where several processes are scraped as one,
prometheus-client adds them up.  How a circuit is, is the same for all: it is asked for once, at the scrape, and never
kept in a process, where it would be added up, or go on after its process.
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
from pybreaker_redis.registry import BreakerRegistry, CircuitStatus
from pybreaker_redis.storage import made_transition

with require_extra("prometheus_client", extra="prometheus"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

__all__ = ("BreakerCollector", "PrometheusListener")


class _CallCounters:
    """The counters in one of prometheus-client's registries, which takes each name once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "pybreaker_calls",
            "Guarded calls that were made, by how they ended.",
            ["breaker", "result"],
            registry=registry,
        )
        self.transitions = Counter(
            "pybreaker_transitions",
            "Changes of state that were brought about.",
            ["breaker", "state"],
            registry=registry,
        )


# A child that is forked while another thread makes counters would wait for it for ever; with a lock of its own it would
# find a name taken by a counter that it does not have.  So whoever forks waits: making counters waits for nobody else.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

_counters_of_registry: WeakKeyDictionary[CollectorRegistry, _CallCounters] = WeakKeyDictionary()


class PrometheusListener(CircuitBreakerListener):
    """Counts calls and transitions: ``pybreaker_calls_total`` and ``pybreaker_transitions_total``.

    The labels are ``breaker`` and ``result`` (``success``, ``failure``), and ``breaker`` and ``state``.  pybreaker
    tells no listener of a call that is rejected.  A transition is counted in the process that has brought it about, so
    once.

    Args:
        registry: Of prometheus-client; several listeners in one count together.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        with _lock:
            counters = _counters_of_registry.get(registry) or _counters_of_registry.setdefault(
                registry, _CallCounters(registry)
            )
        self._calls, self._transitions = counters.calls, counters.transitions

    def success(self, cb: CircuitBreaker) -> None:
        """See `pybreaker.CircuitBreakerListener`."""
        self._calls.labels(cb.name, "success").inc()

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        """See `pybreaker.CircuitBreakerListener`."""
        self._calls.labels(cb.name, "failure").inc()

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState | None,
        new_state: CircuitBreakerState,
    ) -> None:
        """See `pybreaker.CircuitBreakerListener`."""
        # Who opens an open circuit by hand begins its timeout anew.
        if made_transition(cb) and (old_state is None or old_state.name != new_state.name):
            self._transitions.labels(cb.name, new_state.name).inc()


class BreakerCollector(Collector):
    """How the circuits are, asked for at each scrape, in one round trip.

    ``pybreaker_circuit_state`` (labels ``breaker`` and ``state``) is 1 for the state that the circuit is in and 0 for
    the others; ``pybreaker_circuit_failures`` and ``pybreaker_circuit_retry_after_seconds`` (label ``breaker``) are its
    consecutive failures and the time until it may be tried.  ``pybreaker_circuits_up`` is 1, or 0 if they cannot be had
    because Redis does not answer; then there are none of the others.

    Args:
        breakers: Whose circuits.
    """

    def __init__(self, breakers: BreakerRegistry) -> None:
        self._breakers = breakers

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client calls at a scrape."""
        try:
            status = self._breakers.status()
        except Exception:  # noqa: BLE001
            # A scrape that fails would take all other metrics of the process along.
            yield _up_metric("up", 0)
        else:
            yield _up_metric("up", 1)
            yield from _status_metrics(status)

    def describe(self) -> list[Metric]:
        """What there will be, without asking anybody: it is registered when modules are imported."""
        return [_up_metric("up", 1), *_status_metrics({})]


def _up_metric(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"pybreaker_circuits_{name}", "Whether the circuits could be asked for.", value=value)


def _status_metrics(status: dict[str, CircuitStatus]) -> list[GaugeMetricFamily]:
    state = GaugeMetricFamily("pybreaker_circuit_state", "1 for the circuit's state.", labels=["breaker", "state"])
    failures = GaugeMetricFamily("pybreaker_circuit_failures", "Consecutive failures.", labels=["breaker"])
    retry_after = GaugeMetricFamily(
        "pybreaker_circuit_retry_after_seconds", "Until the circuit may be tried; 0: now.", labels=["breaker"]
    )
    for name, circuit in status.items():
        for each in (STATE_CLOSED, STATE_OPEN, STATE_HALF_OPEN):
            state.add_metric([name, each], circuit.state == each)
        failures.add_metric([name], circuit.fail_counter)
        retry_after.add_metric([name], circuit.retry_after)
    return [state, failures, retry_after]
