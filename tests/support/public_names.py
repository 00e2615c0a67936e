"""Public names of the package."""

from __future__ import annotations

#: What users may import from each public module.
PUBLIC_NAMES: dict[str, tuple[str, ...]] = {
    "": (
        "BreakerRegistry",
        "CircuitBreaker",
        "CircuitMemoryStorage",
        "CircuitOpenError",
        "CircuitRedisStorage",
        "CircuitStatus",
        "Health",
        "LogListener",
        "Permit",
        "PybreakerRedisError",
        "StorageUnavailableError",
        "Transition",
        "UnusableReplyError",
        "retry_after",
    ),
    "contrib.celery": ("BreakerTask",),
    "contrib.django": ("breakers",),
    "contrib.flask": ("Breakers",),
    "fixtures": ("breaker_clock", "breaker_prefix", "memory_breakers"),
    "instrument.logging": ("LogListener",),
    "instrument.prometheus": ("BreakerCollector", "PrometheusListener"),
    "listeners": ("LogListener",),
    "prometheus": ("BreakerCollector", "PrometheusListener"),
    "registry": ("BreakerRegistry", "CircuitStatus", "retry_after"),
    "testing": ("BreakerClock", "force_closed", "force_open", "in_memory", "in_redis", "unique_prefix"),
    "testing.servers": ("CLIENT_ERRORS", "PrivateServer", "ServerNotStartedError", "client_at", "free_port"),
}
