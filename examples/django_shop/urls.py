"""URLs and views of the shop."""

from django.http import HttpRequest, JsonResponse
from django.urls import path
from payments import charge


def pay(request: HttpRequest) -> JsonResponse:
    """Pay.  While the circuit is open, the middleware answers 503."""
    try:
        return JsonResponse({"receipt": charge()})
    except OSError:
        return JsonResponse({"detail": "The payment has failed."}, status=502)


def ready(request: HttpRequest) -> JsonResponse:
    """Answer a health check."""
    return JsonResponse({})


urlpatterns = [path("pay", pay), path("ready", ready)]
