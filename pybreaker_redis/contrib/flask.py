"""Flask extension: breakers from the application's configuration, a 503 response, and ``flask breakers``."""

from __future__ import annotations

from typing import Any

from pybreaker import CircuitBreakerError

from pybreaker_redis._runtime.optional import require_extra
from pybreaker_redis.contrib import _proxy
from pybreaker_redis.contrib._commands import COMMAND_ACTIONS, CommandRefusedError, run_command
from pybreaker_redis.contrib._config import CONFIG_KEYS, build_registry
from pybreaker_redis.contrib._http import STATUS_UNAVAILABLE, rejection_response
from pybreaker_redis.registry import BreakerRegistry

with require_extra("flask"):
    import click
    from flask import Flask, Response, current_app, request
    from flask.cli import with_appcontext
    from werkzeug.exceptions import HTTPException, ServiceUnavailable

__all__ = ("Breakers",)

#: Prefix of the keys in an application's configuration.
PREFIX = "PYBREAKER_"

#: Valid keys, with their prefix.
ALL_CONFIG_KEYS = tuple(PREFIX + key for key in ("URL", *CONFIG_KEYS))

#: Key of ``app.extensions`` that holds an application's registry.
EXTENSION_NAME = "pybreaker_redis"


class Breakers(_proxy.RegistryProxy):
    """Breakers of the current application.  One object serves any number of applications.

    An application configures them by ``PYBREAKER_URL``, ``PYBREAKER_PREFIX``, ``PYBREAKER_DEFAULTS``,
    ``PYBREAKER_BREAKERS`` and ``PYBREAKER_LISTENERS``.

    Args:
        app: Application to initialise at once.  Without one, call `init_app` later.
        redis: Client, URL, or callable that returns a client, for applications without ``PYBREAKER_URL``.
    """

    def __init__(self, app: Flask | None = None, *, redis: Any = None) -> None:
        self._redis = redis
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Add a registry, a handler of `CircuitBreakerError`, and ``flask breakers`` to an application.

        A handler of `CircuitBreakerError` that the application already has is kept.  The application's handler of 503,
        or of ``HTTPException``, writes the page.  A handler of ``Exception`` writes it if its status is 503.

        Raises:
            ValueError: The application's configuration is invalid.  The message names the key.
        """
        configured = {key: app.config[key] for key in app.config if key.startswith(PREFIX)}
        if unknown := sorted(configured.keys() - set(ALL_CONFIG_KEYS)):
            raise ValueError(
                f"unknown in the configuration: {', '.join(unknown)}; there are {', '.join(ALL_CONFIG_KEYS)}"
            )
        settings = {key.removeprefix(PREFIX): value for key, value in configured.items()}
        url = settings.get("URL")
        # An empty URL is invalid: it comes from a missing environment variable and does not mean "no Redis".
        app.extensions[EXTENSION_NAME] = build_registry(settings, self._redis if url is None else url)
        if CircuitBreakerError not in app.error_handler_spec[None][None]:
            app.register_error_handler(CircuitBreakerError, _handle_open_circuit)
        app.cli.add_command(_breakers_command)

    @property
    def registry(self) -> BreakerRegistry:
        """The registry of the current application.

        Raises:
            RuntimeError: No application context is active, or `init_app` was not called for the application.
        """
        if EXTENSION_NAME not in current_app.extensions:
            raise RuntimeError(f"{current_app} has no breakers: call init_app(app)")
        registry: BreakerRegistry = current_app.extensions[EXTENSION_NAME]
        return registry


def _handle_open_circuit(error: CircuitBreakerError) -> Response:
    rejection = rejection_response(error, request.headers.get("Accept", ""))
    response = Response(rejection.body, STATUS_UNAVAILABLE, content_type=rejection.content_type)
    unavailable = ServiceUnavailable(retry_after=rejection.retry_after)
    # The result is the application's page for 503, or the exception itself where the application has no handler.
    handled = current_app.handle_http_exception(unavailable)
    if handled is not unavailable:
        page = current_app.make_response(handled)
        # A handler of any exception answers 500 to exceptions that it does not recognise.
        if page.status_code == STATUS_UNAVAILABLE or _has_http_error_page():
            response = page
    response.headers.setdefault("Retry-After", str(rejection.retry_after))
    return response


def _has_http_error_page() -> bool:
    """Whether the handler that Flask selects for 503 is one for HTTP errors, not one for any exception."""
    spec, places = current_app.error_handler_spec, (*request.blueprints, None)
    # Flask searches in this order.
    maps = [spec[place][code] for code in (STATUS_UNAVAILABLE, None) for place in places]
    kind = next((kind for known in maps for kind in ServiceUnavailable.__mro__ if kind in known), Exception)
    return issubclass(kind, HTTPException)


@click.command("breakers")
@click.argument("action", type=click.Choice(COMMAND_ACTIONS), default=COMMAND_ACTIONS[0])
@click.argument("names", metavar="[CIRCUIT]...", nargs=-1)
@with_appcontext
def _breakers_command(action: str, names: tuple[str, ...]) -> None:
    """Show the application's circuits, or open, close, half-open or reset some of them."""
    try:
        click.echo(run_command(current_app.extensions[EXTENSION_NAME], action, names))
    except CommandRefusedError as error:
        raise click.ClickException(str(error)) from error
