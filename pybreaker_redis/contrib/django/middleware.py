"""What does a request get whose circuit is open?

Knows: Django's requests and responses.  Does not know: settings.
"""

from __future__ import annotations

import contextlib

from django.http import HttpRequest, HttpResponse
from django.template import TemplateDoesNotExist, loader
from django.utils.deprecation import MiddlewareMixin
from django.utils.log import log_response
from pybreaker import CircuitBreakerError

from pybreaker_redis.contrib._http import STATUS_UNAVAILABLE, rejection_response


class CircuitBreakerMiddleware(MiddlewareMixin):
    """Answers 503 with ``Retry-After`` where a view raises `CircuitBreakerError`.

    JSON if that is asked for, else the project's template ``503.html`` if there is one, else a line of text.
    """

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """The answer, if the exception is a circuit's."""
        if not isinstance(exception, CircuitBreakerError):
            return None
        answer = rejection_response(exception, request.headers.get("Accept", ""))
        response = HttpResponse(answer.body, answer.content_type, STATUS_UNAVAILABLE)
        if answer.content_type.startswith("text/"):
            with contextlib.suppress(TemplateDoesNotExist):
                page = loader.render_to_string("503.html", {"retry_after": answer.retry_after}, request)
                response = HttpResponse(page, status=STATUS_UNAVAILABLE)
        response["Retry-After"] = str(answer.retry_after)
        # Else Django logs an error, and so writes a mail to each of ADMINS, for each request.
        said = (response.reason_phrase, request.path)
        log_response("%s: %s", *said, response=response, request=request, level="warning")
        return response
