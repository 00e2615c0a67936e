"""Which breakers does a Flask application have, and what do its clients get while one of them is open?

Knows: Flask's configuration, errors and commands.  Does not know: Redis.
"""

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

#: What the keys of an application's configuration begin with, and what they may be.
PREFIX = "PYBREAKER_"
ALL_CONFIG_KEYS = tuple(PREFIX + key for key in ("URL", *CONFIG_KEYS))

#: Under which name an application has its registry.
EXTENSION_NAME = "pybreaker_redis"


class Breakers(_proxy.RegistryProxy):
    """The breakers of the application that is being served: one of these for any number of applications.

    An application configures them by ``PYBREAKER_URL``, ``PYBREAKER_PREFIX``, ``PYBREAKER_DEFAULTS``,
    ``PYBREAKER_BREAKERS`` and ``PYBREAKER_LISTENERS``.

    Args:
        app: The application, if it is there already; else see `init_app`.
        redis: A client, a URL, or a callable that returns a client: for applications without ``PYBREAKER_URL``.
    """

    def __init__(self, app: Flask | None = None, *, redis: Any = None) -> None:
        self._redis = redis
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give an application its breakers, an answer for while one of them is open, and ``flask breakers``.

        An application's own handler of `CircuitBreakerError` stays, and its own handler of 503, or of every
        ``HTTPException``, writes the answer; one of every ``Exception`` does if what it writes is a 503.

        Raises:
            ValueError: The application's configuration is not right; the message says what.
        """
        given = {key: app.config[key] for key in app.config if key.startswith(PREFIX)}
        if unknown := sorted(given.keys() - set(ALL_CONFIG_KEYS)):
            raise ValueError(
                f"unknown in the configuration: {', '.join(unknown)}; there are {', '.join(ALL_CONFIG_KEYS)}"
            )
        settings = {key.removeprefix(PREFIX): value for key, value in given.items()}
        url = settings.get("URL")
        # An empty one is refused: it is that of a variable that the environment lacks, not a wish for no Redis.
        app.extensions[EXTENSION_NAME] = build_registry(settings, self._redis if url is None else url)
        if CircuitBreakerError not in app.error_handler_spec[None][None]:
            app.register_error_handler(CircuitBreakerError, _handle_open_circuit)
        app.cli.add_command(_breakers_command)

    @property
    def registry(self) -> BreakerRegistry:
        """The registry of the application that is being served.

        Raises:
            RuntimeError: There is none, as outside of requests and ``app.app_context()``, or it has not been to
                `init_app`.
        """
        if EXTENSION_NAME not in current_app.extensions:
            raise RuntimeError(f"{current_app} has no breakers: call init_app(app)")
        registry: BreakerRegistry = current_app.extensions[EXTENSION_NAME]
        return registry


def _handle_open_circuit(error: CircuitBreakerError) -> Response:
    answer = rejection_response(error, request.headers.get("Accept", ""))
    response = Response(answer.body, STATUS_UNAVAILABLE, content_type=answer.content_type)
    unavailable = ServiceUnavailable(retry_after=answer.retry_after)
    # The application's own page, if it has one; else it gives back what it was given.
    shown = current_app.handle_http_exception(unavailable)
    if shown is not unavailable:
        page = current_app.make_response(shown)
        # What is for whatever may be raised answers 500 to all that it does not know.
        if page.status_code == STATUS_UNAVAILABLE or _has_http_error_page():
            response = page
    response.headers.setdefault("Retry-After", str(answer.retry_after))
    return response


def _has_http_error_page() -> bool:
    """Whether the handler that Flask finds for 503 is one for answers, not one for all errors."""
    spec, places = current_app.error_handler_spec, (*request.blueprints, None)
    # In the order in which Flask looks for it.
    maps = [spec[place][code] for code in (STATUS_UNAVAILABLE, None) for place in places]
    kind = next((kind for known in maps for kind in ServiceUnavailable.__mro__ if kind in known), Exception)
    return issubclass(kind, HTTPException)


@click.command("breakers")
@click.argument("action", type=click.Choice(COMMAND_ACTIONS), default=COMMAND_ACTIONS[0])
@click.argument("names", metavar="[CIRCUIT]...", nargs=-1)
@with_appcontext
def _breakers_command(action: str, names: tuple[str, ...]) -> None:
    """Shows the application's circuits, or opens, closes, half-opens or resets some of them."""
    try:
        click.echo(run_command(current_app.extensions[EXTENSION_NAME], action, names))
    except CommandRefusedError as error:
        raise click.ClickException(str(error)) from error
