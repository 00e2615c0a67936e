"""Exception handler for Django REST framework."""

from __future__ import annotations

from typing import Any

from pybreaker import CircuitBreakerError

from pybreaker_redis.contrib._http import DETAIL_TEXT, STATUS_UNAVAILABLE, retry_after_header


def exception_handler(error: Exception, context: dict[str, Any]) -> Any:
    """Answer 503 to `CircuitBreakerError`, and pass other errors to the framework's handler.

    Set ``REST_FRAMEWORK["EXCEPTION_HANDLER"]`` to the dotted name of this function.
    """
    # A project with Django alone does not have the framework, so the import waits for the first error.
    from rest_framework import exceptions, views

    if isinstance(error, CircuitBreakerError):
        unavailable = exceptions.APIException(DETAIL_TEXT, code="service_unavailable")
        unavailable.status_code = STATUS_UNAVAILABLE
        # The framework writes ``Retry-After`` from this attribute.
        unavailable.wait = retry_after_header(error)  # pyright: ignore[reportAttributeAccessIssue]
        error = unavailable
    return views.exception_handler(error, context)
