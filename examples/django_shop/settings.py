"""A shop whose payments are another service's business: its settings."""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "only an example's")
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = ["pybreaker_redis.contrib.django"]
MIDDLEWARE = ["pybreaker_redis.contrib.django.middleware.CircuitBreakerMiddleware"]
CACHES = {
    "default": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": os.environ.get("REDIS_URL", "redis://localhost:6379/0"),
    }
}
PYBREAKER = {
    "CACHE": "default",
    "PREFIX": "shop",
    # The one that opens the circuit gets the service's own error, like those before it.
    "DEFAULTS": {"throw_new_error_on_trip": False},
    "BREAKERS": {
        "payments": {"fail_max": 3, "reset_timeout": float(os.environ.get("RESET_TIMEOUT", "30"))},
    },
}
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://localhost:8001/")
