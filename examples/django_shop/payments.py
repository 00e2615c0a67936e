"""The service that takes the money; everything that is known of it is that it may be down."""

import urllib.request

from django.conf import settings

from pybreaker_redis.contrib.django import breakers


@breakers.guard("payments")
def charge() -> str:
    """Ask it for a receipt.

    Raises:
        OSError: It has failed.
        pybreaker.CircuitBreakerError: It is left alone because it has failed too often.
    """
    with urllib.request.urlopen(settings.PAYMENTS_URL, timeout=5) as answer:
        receipt: str = answer.read().decode()
        return receipt
