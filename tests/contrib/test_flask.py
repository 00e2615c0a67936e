"""Flask: circuits from the configuration, 503 for open circuits, commands for operators."""

from __future__ import annotations

import asyncio
from typing import Any

import flask
import pybreaker
import pytest
import redis
from werkzeug.exceptions import HTTPException, ServiceUnavailable

from pybreaker_redis import CircuitMemoryStorage
from pybreaker_redis.contrib.flask import Breakers
from pybreaker_redis.testing import in_memory
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.inspect import storage_of

pytestmark = pytest.mark.usefixtures("patient")

breakers = Breakers()


class ListenerWithMissingVariable(pybreaker.CircuitBreakerListener):
    """Listener that needs a missing environment variable."""

    def __init__(self) -> None:
        self.host = {}["STATSD_HOST"]


@breakers.guard("payments")
def charge() -> str:
    """Call the dependency through the circuit, which is defined before any application."""
    return up()


def create_app(**config: Any) -> Any:
    """Return an application, made by a factory after its extensions, as Flask recommends."""
    app = flask.Flask("shop")
    app.config.update({"PYBREAKER_BREAKERS": {"payments": {"fail_max": 2, "reset_timeout": 30}}, **config})
    breakers.init_app(app)
    app.get("/pay")(charge)
    app.get("/fail")(down)
    return app


def opened(app: Any) -> Any:
    """Return the application, with an open circuit."""
    with app.app_context():
        breakers["payments"].open()
    return app


# -- configuration -----------------------------------------------------------------------------------------------------


def test_circuit_lives_on_the_configured_server(client: redis.Redis, server: PrivateServer):
    """Keys in capitals, with the extension's name as prefix, configure the circuits."""
    app = create_app(PYBREAKER_URL=server.url, PYBREAKER_PREFIX="shop", PYBREAKER_DEFAULTS={"success_threshold": 3})
    assert opened(app).test_client().get("/pay").status_code == 503
    assert client.get("shop:payments:pybreaker:state") == b"open"
    with app.app_context():
        assert breakers["payments"].success_threshold == 3


def test_client_can_be_passed_to_the_extension(client: redis.Redis):
    """An application may pass its own client to the extension."""
    app = flask.Flask("shop")
    extension = Breakers(app, redis=client)
    with app.app_context():
        extension.get("payments").open()
    assert client.get("payments:pybreaker:state") == b"open"


@pytest.mark.parametrize("config", [{}, {"PYBREAKER_URL": None}])
def test_without_redis_the_circuit_is_in_memory(config: dict[str, Any]):
    """Without a URL the circuits are in memory, for development and tests."""
    with create_app(**config).app_context():
        assert isinstance(storage_of(breakers["payments"]), CircuitMemoryStorage)


def test_empty_url_is_refused_beside_a_client(client: redis.Redis):
    """An empty URL, as of a missing environment variable, is an error and not the default."""
    app = flask.Flask("shop")
    app.config["PYBREAKER_URL"] = ""
    with pytest.raises(ValueError, match="URL"):
        Breakers(app, redis=client)


def test_environment_variables_configure_the_circuits(monkeypatch: pytest.MonkeyPatch):
    """Values from `FLASK_` environment variables are understood as Flask parses them."""
    monkeypatch.setenv("FLASK_PYBREAKER_DEFAULTS__fail_max", "7")
    app = flask.Flask("shop")
    app.config.from_prefixed_env()
    breakers.init_app(app)
    with app.app_context():
        assert breakers.get("payments").fail_max == 7


def test_health_of_the_circuits_is_that_of_the_current_application(server: PrivateServer):
    """A view shows the condition of Redis without the storages behind the breakers."""
    with create_app(PYBREAKER_URL=server.url, PYBREAKER_PREFIX="shop").app_context():
        assert breakers.health()["payments"].condition == "unused"
        breakers["payments"].call(up)
        health = breakers.health()["payments"]
        assert (health.circuit, health.condition) == ("shop:payments", "connected")
    with create_app().app_context():
        assert breakers.health() == {}


def test_metrics_of_the_application_are_collected():
    """A listener is named by its dotted path, and a collector is created for the registry."""
    prometheus_client = pytest.importorskip("prometheus_client")
    from pybreaker_redis.prometheus import BreakerCollector

    app = create_app(PYBREAKER_LISTENERS=["pybreaker_redis.prometheus.PrometheusListener"])
    metrics = prometheus_client.CollectorRegistry()
    labels = {"breaker": "payments", "result": "success"}
    before = prometheus_client.REGISTRY.get_sample_value("pybreaker_calls_total", labels) or 0
    app.test_client().get("/pay")
    with app.app_context():
        metrics.register(BreakerCollector(breakers.registry))
    assert metrics.get_sample_value("pybreaker_circuit_state", {"breaker": "payments", "state": "closed"}) == 1
    assert prometheus_client.REGISTRY.get_sample_value("pybreaker_calls_total", labels) == before + 1


def test_each_application_has_its_own_circuits():
    """Applications in one process, as tests create them, have separate circuits."""
    first, second = opened(create_app()), create_app()
    assert first.test_client().get("/pay").status_code == 503
    assert second.test_client().get("/pay").text == "answer"


def test_breakers_outside_of_an_application_are_refused():
    """Breakers exist only in the context of an application that has initialised the extension."""
    with pytest.raises(RuntimeError, match="application context"):
        breakers["payments"]
    with flask.Flask("other").app_context(), pytest.raises(RuntimeError, match="init_app"):
        breakers["payments"]


@pytest.mark.parametrize(
    ("config", "message_part"),
    [
        ({"PYBREAKER_REDIS_URL": "redis://x"}, "PYBREAKER_REDIS_URL; there are PYBREAKER_URL, PYBREAKER_PREFIX"),
        ({"PYBREAKER_DEFAULTS": {"fail_maxx": 1}}, "fail_maxx"),
        ({"PYBREAKER_BREAKERS": {"payments": {"fail_max": 0}}}, r"BREAKERS\['payments'\]: fail_max"),
        ({"PYBREAKER_LISTENERS": "missing"}, "LISTENERS"),
        (
            {"PYBREAKER_LISTENERS": [f"{__name__}.ListenerWithMissingVariable"]},
            "LISTENERS: .*ListenerWithMissingVariable': KeyError: 'STATSD_HOST'",
        ),
        ({"PYBREAKER_URL": "memcached://x"}, "URL"),
        ({"PYBREAKER_URL": ""}, "URL, .*: url must begin with .*, not ''"),
    ],
)
def test_wrong_configuration_is_refused_at_the_start(config: dict[str, Any], message_part: str):
    """A wrong configuration is refused when the application is created."""
    with pytest.raises(ValueError, match=message_part):
        create_app(**config)


def test_guard_with_a_fallback():
    """A fallback replaces an error of the circuit, and no other error."""
    guarded = breakers.guard("payments", fallback=lambda: "later")(charge)
    with opened(create_app()).app_context():
        assert guarded() == "later"
    with create_app().app_context():
        assert guarded() == "answer"
        with pytest.raises(Down):
            breakers.guard("payments", fallback=0)(down)()


def test_coroutine_function_is_guarded():
    """A coroutine function counts when its work is done, and is rejected while the circuit is open."""

    @breakers.guard("payments", fallback=lambda: "later")
    async def charge_soon() -> str:
        return "charged"

    with create_app().app_context():
        assert asyncio.run(charge_soon()) == "charged"
        breakers["payments"].open()
        assert asyncio.run(charge_soon()) == "later"


def test_in_memory_replaces_the_circuits_for_a_test(client: redis.Redis, server: PrivateServer):
    """`in_memory` replaces the circuits of the application's registry for a test, and restores them."""
    app = create_app(PYBREAKER_URL=server.url)
    with app.app_context(), in_memory(breakers.registry):
        breakers["payments"].open()
        assert app.test_client().get("/pay").status_code == 503
    assert client.get("payments:pybreaker:state") != b"open"
    assert app.test_client().get("/pay").text == "answer"


# -- answers -----------------------------------------------------------------------------------------------------------


def test_request_behind_an_open_circuit_gets_503_and_retry_after():
    """An open circuit is answered with 503 and Retry-After, without the circuit's name."""
    app = create_app()
    assert app.test_client().get("/pay").text == "answer"
    answer = opened(app).test_client().get("/pay")
    assert answer.status_code == 503
    assert 28 <= int(answer.headers["Retry-After"]) <= 30
    assert answer.mimetype == "text/plain"
    assert "payments" not in answer.text


def test_client_that_accepts_json_gets_json():
    """A client that accepts JSON gets JSON."""
    answer = opened(create_app()).test_client().get("/pay", headers={"Accept": "application/json"})
    assert answer.json["retry_after"] == int(answer.headers["Retry-After"])


@pytest.mark.parametrize("before", [True, False])
def test_handler_of_the_application_wins(before: bool):
    """A handler of the application for `CircuitBreakerError` wins, whichever was registered first."""

    def teapot(error: pybreaker.CircuitBreakerError) -> tuple[str, int]:
        return "mine", 418

    app = flask.Flask("shop")
    app.get("/pay")(charge)
    if before:
        app.register_error_handler(pybreaker.CircuitBreakerError, teapot)
    breakers.init_app(app)
    if not before:
        app.register_error_handler(pybreaker.CircuitBreakerError, teapot)
    with app.app_context():
        breakers.get("payments").open()
    assert app.test_client().get("/pay").status_code == 418


def test_page_of_the_application_for_503_is_used():
    """The application's page for 503 is used, with the header Retry-After."""
    app = opened(create_app())
    app.register_error_handler(503, lambda error: ("<h1>Back soon</h1>", 503))
    answer = app.test_client().get("/pay")
    assert (answer.status_code, answer.text) == (503, "<h1>Back soon</h1>")
    assert 28 <= int(answer.headers["Retry-After"]) <= 30


@pytest.mark.parametrize("kind", [503, ServiceUnavailable, HTTPException])
def test_handler_for_http_errors_answers_for_open_circuits(kind: Any):
    """A handler for 503 or for all HTTP errors answers for open circuits, too."""
    app = opened(create_app())
    app.register_error_handler(kind, lambda error: ("Elsewhere", 307, {"Location": "/elsewhere"}))
    assert app.test_client().get("/pay").status_code == 307


def test_handler_for_exception_that_answers_500_is_not_used():
    """A handler for `Exception` that answers 500 is not used for an open circuit, which is no bug."""
    app = opened(create_app())
    app.register_error_handler(Exception, lambda error: ("Something went wrong", 500))
    answer = app.test_client().get("/pay", headers={"Accept": "application/json"})
    assert answer.status_code == 503
    assert answer.json["retry_after"] == int(answer.headers["Retry-After"])
    assert app.test_client().get("/fail").text == "Something went wrong"


def test_handler_for_exception_that_reads_the_error_is_used():
    """A handler for `Exception` that looks at the error makes the page, as Flask's documentation shows."""
    app = opened(create_app())
    app.register_error_handler(Exception, lambda error: (f"<h1>{error.name}</h1>", error.code))
    answer = app.test_client().get("/pay")
    assert (answer.status_code, answer.text) == (503, "<h1>Service Unavailable</h1>")


def test_handler_of_a_blueprint_precedes_that_of_the_application():
    """Flask's precedence of handlers applies: a blueprint's before the application's."""
    app = create_app()
    pages = flask.Blueprint("pages", "shop")
    pages.get("/pages/pay")(charge)
    pages.register_error_handler(HTTPException, lambda error: ("Elsewhere", 307, {"Location": "/elsewhere"}))
    app.register_blueprint(pages)
    app.register_error_handler(Exception, lambda error: ("Something went wrong", 500))
    browser = opened(app).test_client()
    assert browser.get("/pages/pay").status_code == 307
    assert browser.get("/pay").status_code == 503


def test_other_errors_are_not_handled():
    """The extension handles only errors of circuits."""
    app = create_app(TESTING=True)
    with pytest.raises(Down):
        app.test_client().get("/fail")


# -- commands ----------------------------------------------------------------------------------------------------------


def test_command_shows_and_changes_circuits(server: PrivateServer):
    """The command shows the shared state of circuits, and changes it for all processes."""
    app = create_app(PYBREAKER_URL=server.url)

    def state_after(*arguments: str) -> str:
        done = app.test_cli_runner().invoke(args=["breakers", *arguments])
        _, payments = done.output.splitlines()
        return payments.split()[1]

    assert state_after() == "closed"
    assert state_after("open", "payments") == "open"
    assert state_after("half-open", "payments") == "half-open"
    assert state_after("reset", "payments") == "half-open"
    assert state_after("close", "payments") == "closed"


def test_command_refuses_an_unknown_name():
    """A mistyped name creates no circuit."""
    done = create_app().test_cli_runner().invoke(args=["breakers", "open", "paymnets"])
    assert done.exit_code != 0
    assert "Error: no circuit is called 'paymnets'; configured: payments" in done.output


def test_command_fails_in_one_line_if_redis_is_unreachable(killable_server: PrivateServer):
    """A command that Redis did not execute fails in one line."""
    killable_server.kill()
    done = create_app(PYBREAKER_URL=killable_server.url).test_cli_runner().invoke(args=["breakers", "open", "payments"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: circuit 'payments': Redis at ")
    assert "did not execute the command" in done.output
    assert len(done.output.splitlines()) == 1
