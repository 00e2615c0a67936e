"""What does a request to REST framework get whose circuit is open?

Knows: REST framework's errors, which it imports when one is raised.  Does not know: circuits.
"""

from __future__ import annotations

from typing import Any

from pybreaker import CircuitBreakerError

from pybreaker_redis.contrib._http import DETAIL_TEXT, STATUS_UNAVAILABLE, retry_after_header


def exception_handler(error: Exception, context: dict[str, Any]) -> Any:
    """For ``REST_FRAMEWORK["EXCEPTION_HANDLER"]``: the framework's own, and 503 for an open circuit."""
    from rest_framework import exceptions, views

    if isinstance(error, CircuitBreakerError):
        unavailable = exceptions.APIException(DETAIL_TEXT, code="service_unavailable")
        unavailable.status_code = STATUS_UNAVAILABLE
        # The framework makes the header of it.
        unavailable.wait = retry_after_header(error)
        error = unavailable
    return views.exception_handler(error, context)
