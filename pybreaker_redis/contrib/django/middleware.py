"""Middleware that answers 503 when a view raises `CircuitBreakerError`."""

from __future__ import annotations

import contextlib

from django.http import HttpRequest, HttpResponse
from django.template import TemplateDoesNotExist, loader
from django.utils.deprecation import MiddlewareMixin
from django.utils.log import log_response
from pybreaker import CircuitBreakerError

from pybreaker_redis.contrib._http import STATUS_UNAVAILABLE, rejection_response


class CircuitBreakerMiddleware(MiddlewareMixin):
    """Middleware that answers 503 with ``Retry-After`` when a view raises `CircuitBreakerError`.

    The body is JSON for clients that accept JSON.  For others it is the project's template ``503.html``, or a line of
    text where the project has no such template.
    """

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Return the response to a `CircuitBreakerError`, and ``None`` for other exceptions."""
        if not isinstance(exception, CircuitBreakerError):
            return None
        rejection = rejection_response(exception, request.headers.get("Accept", ""))  # pyright: ignore[reportAttributeAccessIssue]
        response = HttpResponse(rejection.body.encode(), rejection.content_type, STATUS_UNAVAILABLE)
        if rejection.content_type.startswith("text/"):
            with contextlib.suppress(TemplateDoesNotExist):
                page = loader.render_to_string("503.html", {"retry_after": rejection.retry_after}, request)
                response = HttpResponse(page, status=STATUS_UNAVAILABLE)
        response["Retry-After"] = str(rejection.retry_after)
        # A 5xx response that is not logged here is logged by Django as an error, with a mail to each of ADMINS.
        log_arguments = (response.reason_phrase, request.path)
        log_response("%s: %s", *log_arguments, response=response, request=request, level="warning")
        return response
