"""Settings of a shop with an external payment service."""

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
    "BREAKERS": {
        "payments": {"fail_max": 3, "reset_timeout": float(os.environ.get("RESET_TIMEOUT", "30"))},
    },
}
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://localhost:8001/")
