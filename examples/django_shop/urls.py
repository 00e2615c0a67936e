"""What can be asked of the shop."""

from django.http import HttpRequest, JsonResponse
from django.urls import path
from payments import charge


def pay(request: HttpRequest) -> JsonResponse:
    """Pay; the middleware answers while the circuit is open."""
    try:
        return JsonResponse({"receipt": charge()})
    except OSError:
        return JsonResponse({"detail": "The payment has failed."}, status=502)


def ready(request: HttpRequest) -> JsonResponse:
    """Whether anybody is there."""
    return JsonResponse({})


urlpatterns = [path("pay", pay), path("ready", ready)]
