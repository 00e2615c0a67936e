"""Client of the payment service, which may be down."""

import urllib.request

from django.conf import settings

from pybreaker_redis.contrib.django import breakers


@breakers.guard("payments")
def charge() -> str:
    """Call the payment service, and return a receipt.

    Raises:
        OSError: The service failed.
        pybreaker_redis.CircuitOpenError: The circuit is open, so no call was made.
    """
    with urllib.request.urlopen(settings.PAYMENTS_URL, timeout=5) as answer:
        receipt: str = answer.read().decode()
        return receipt
