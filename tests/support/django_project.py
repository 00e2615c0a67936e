"""A Django project for tests: settings, and views behind a circuit."""

from __future__ import annotations

from typing import Any

import django
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import path

from pybreaker_redis.contrib.django import breakers
from tests.support.breakers import down, up

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="of tests",
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=["pybreaker_redis.contrib.django"],
        MIDDLEWARE=["pybreaker_redis.contrib.django.middleware.CircuitBreakerMiddleware"],
        REST_FRAMEWORK={
            "DEFAULT_AUTHENTICATION_CLASSES": [],
            "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
            "EXCEPTION_HANDLER": "pybreaker_redis.contrib.django.rest.exception_handler",
            "UNAUTHENTICATED_USER": None,
        },
    )
    django.setup()


@breakers.guard("payments")
def charge() -> str:
    """Call the dependency through the circuit."""
    return up()


def pay(request: HttpRequest) -> HttpResponse:
    """View that needs the dependency."""
    return HttpResponse(charge())


async def pay_soon(request: HttpRequest) -> HttpResponse:
    """Asynchronous view that needs the dependency for a short call."""
    return HttpResponse(charge())


def fail(request: HttpRequest) -> HttpResponse:
    """View that raises an error of another kind."""
    return HttpResponse(down())


def rest(request: HttpRequest, what: str) -> Any:
    """Views of REST framework, which is an optional import."""
    from rest_framework.decorators import api_view
    from rest_framework.response import Response

    @api_view(["GET"])
    def view(request: Any) -> Any:
        if what == "missing":
            raise Http404
        if what == "fail":
            down()
        return Response({"receipt": charge()})

    return view(request)


urlpatterns = [path("pay", pay), path("pay-soon", pay_soon), path("fail", fail), path("rest/<what>", rest)]
