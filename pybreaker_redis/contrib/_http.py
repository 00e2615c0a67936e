"""HTTP response to a request that an open circuit rejects.

The response has status 503, a ``Retry-After`` header, and a body in JSON or plain text as the client prefers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from pybreaker import CircuitBreakerError

from pybreaker_redis.operators import retry_after

#: Status code of the response.
STATUS_UNAVAILABLE = 503

#: Text of the response.  The name of the circuit is for operators only.
DETAIL_TEXT = "Temporarily unavailable, please try again later."


@dataclass(frozen=True, slots=True)
class RejectionResponse:
    """Content of a response with status 503.

    Attributes:
        retry_after: Whole seconds until a client may try again, at least 1.
        content_type: Media type of the body.
        body: Text for the client, without the name of the circuit.
    """

    retry_after: int
    content_type: str
    body: str


def rejection_response(error: CircuitBreakerError, accept: str) -> RejectionResponse:
    """Build the response to a request that raised `error`.

    Args:
        error: Error of the breaker, raised by a rejected call or by the call that opened the circuit.
        accept: Value of the request's ``Accept`` header.
    """
    seconds = retry_after_header(error)
    if prefers_json(accept):
        return RejectionResponse(
            seconds, "application/json", json.dumps({"detail": DETAIL_TEXT, "retry_after": seconds})
        )
    return RejectionResponse(seconds, "text/plain; charset=utf-8", DETAIL_TEXT + "\n")


def retry_after_header(error: CircuitBreakerError) -> int:
    """Return the value of ``Retry-After``: whole seconds until a call may be admitted, rounded up, at least 1."""
    return max(1, math.ceil(retry_after(error)))


def prefers_json(accept: str) -> bool:
    """Whether an ``Accept`` header names JSON, and gives no HTML page a higher quality.

    Browsers and ``*/*`` do not name JSON.  Client libraries that expect JSON name it.
    """
    json_quality = page_quality = 0.0
    for part in accept.lower().split(","):
        media_type, *parameters = (word.strip() for word in part.split(";"))
        quality = min((_quality_value(word) for word in parameters if word.startswith("q=")), default=1.0)
        if media_type == "application/json" or media_type.endswith("+json"):
            json_quality = max(json_quality, quality)
        elif media_type in ("text/html", "application/xhtml+xml"):
            page_quality = max(page_quality, quality)
    return json_quality > 0 and json_quality >= page_quality


def _quality_value(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:
        return 0.0
