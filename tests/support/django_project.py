"""A Django project for tests: settings, and views behind a circuit.

Knows: Django.  Does not know: which promise is being tested.
"""

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
    """What the circuit guards."""
    return up()


def pay(request: HttpRequest) -> HttpResponse:
    """A view that needs the dependency."""
    return HttpResponse(charge())


async def pay_soon(request: HttpRequest) -> HttpResponse:
    """The same for an asynchronous server; the call itself is short."""
    return HttpResponse(charge())


def fail(request: HttpRequest) -> HttpResponse:
    """A view with an error that is none of a circuit's."""
    return HttpResponse(down())


def rest(request: HttpRequest, what: str) -> Any:
    """Views of REST framework, which is imported when it is needed."""
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
