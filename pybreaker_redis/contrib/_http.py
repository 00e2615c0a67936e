"""What is somebody told whose request needs a circuit that is open?

Knows: circuits that reject, what clients accept.  Does not know: frameworks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from pybreaker import CircuitBreakerError

from pybreaker_redis.registry import retry_after

#: The status of the answer.
STATUS_UNAVAILABLE = 503

#: What it says.  Which circuit it was is nobody's business but the operator's.
DETAIL_TEXT = "Temporarily unavailable, please try again later."


@dataclass(frozen=True, slots=True)
class RejectionResponse:
    """To a request that cannot be served now.

    Attributes:
        retry_after: Whole seconds after which to come back, at least 1.
        content_type: Of the body.
        body: Names no circuit.
    """

    retry_after: int
    content_type: str
    body: str


def rejection_response(error: CircuitBreakerError, accept: str) -> RejectionResponse:
    """What to answer.

    Args:
        error: What was raised instead of the call, or by the one that opened the circuit.
        accept: The request's header of that name.
    """
    seconds = retry_after_header(error)
    if prefers_json(accept):
        return RejectionResponse(
            seconds, "application/json", json.dumps({"detail": DETAIL_TEXT, "retry_after": seconds})
        )
    return RejectionResponse(seconds, "text/plain; charset=utf-8", DETAIL_TEXT + "\n")


def retry_after_header(error: CircuitBreakerError) -> int:
    """Whole seconds until the circuit may be tried again, for a header that knows no fractions; at least 1."""
    return max(1, math.ceil(retry_after(error)))


def prefers_json(accept: str) -> bool:
    """Whether JSON is asked for by name, and no page is liked better.

    Browsers and ``*/*`` do not ask for it; libraries that want it name it.
    """
    json_liked = page_liked = 0.0
    for part in accept.lower().split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        liked = min((_quality_value(word) for word in parameters if word.startswith("q=")), default=1.0)
        if kind == "application/json" or kind.endswith("+json"):
            json_liked = max(json_liked, liked)
        elif kind in ("text/html", "application/xhtml+xml"):
            page_liked = max(page_liked, liked)
    return json_liked > 0 and json_liked >= page_liked


def _quality_value(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:
        return 0.0
