"""Flask: circuits from the configuration, 503 in the application's own manner, commands for operators."""

from __future__ import annotations

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


class Homeless(pybreaker.CircuitBreakerListener):
    """Wants a variable of the environment that is not there."""

    def __init__(self) -> None:
        self.host = {}["STATSD_HOST"]


@breakers.guard("payments")
def charge() -> str:
    """What the circuit guards; defined before there is any application."""
    return up()


def create_app(**config: Any) -> Any:
    """The pattern that Flask recommends: extensions are there first, applications come and go."""
    app = flask.Flask("shop")
    app.config.update({"PYBREAKER_BREAKERS": {"payments": {"fail_max": 2, "reset_timeout": 30}}, **config})
    breakers.init_app(app)
    app.get("/pay")(charge)
    app.get("/fail")(down)
    return app


def opened(app: Any) -> Any:
    """The application, with an open circuit."""
    with app.app_context():
        breakers["payments"].open()
    return app


# -- configuration -----------------------------------------------------------------------------------------------------


def test_circuit_lives_where_the_configuration_says(client: redis.Redis, server: PrivateServer):
    """Keys in capitals, with the extension's name before them, as other extensions have them."""
    app = create_app(PYBREAKER_URL=server.url, PYBREAKER_PREFIX="shop", PYBREAKER_DEFAULTS={"success_threshold": 3})
    assert opened(app).test_client().get("/pay").status_code == 503
    assert client.get("shop:payments:pybreaker:state") == b"open"
    with app.app_context():
        assert breakers["payments"].success_threshold == 3


def test_client_may_be_given_to_the_extension(client: redis.Redis):
    """For applications that have a client already, and for one that is no factory's."""
    app = flask.Flask("shop")
    own = Breakers(app, redis=client)
    with app.app_context():
        own.get("payments").open()
    assert client.get("payments:pybreaker:state") == b"open"


@pytest.mark.parametrize("config", [{}, {"PYBREAKER_URL": None}])
def test_without_redis_the_circuit_is_in_memory(config: dict[str, Any]):
    """Enough for development, and for tests."""
    with create_app(**config).app_context():
        assert isinstance(storage_of(breakers["payments"]), CircuitMemoryStorage)


def test_empty_url_is_not_the_client_of_the_extension(client: redis.Redis):
    """A variable that the environment lacks is no wish for another Redis, or for none."""
    app = flask.Flask("shop")
    app.config["PYBREAKER_URL"] = ""
    with pytest.raises(ValueError, match="URL"):
        Breakers(app, redis=client)


def test_environment_may_configure_it(monkeypatch: pytest.MonkeyPatch):
    """Flask reads nested keys from the environment; they are understood as they come."""
    monkeypatch.setenv("FLASK_PYBREAKER_DEFAULTS__fail_max", "7")
    app = flask.Flask("shop")
    app.config.from_prefixed_env()
    breakers.init_app(app)
    with app.app_context():
        assert breakers.get("payments").fail_max == 7


def test_metrics_are_those_of_the_application():
    """A listener by its dotted name, and a collector that is made at the scrape."""
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


def test_each_application_has_circuits_of_its_own():
    """Several applications in one process, as tests make them, do not open each other's circuits."""
    first, second = opened(create_app()), create_app()
    assert first.test_client().get("/pay").status_code == 503
    assert second.test_client().get("/pay").text == "answer"


def test_there_are_no_breakers_outside_of_an_application():
    """Nobody is given a breaker that belongs to somebody else."""
    with pytest.raises(RuntimeError, match="application context"):
        breakers["payments"]
    with flask.Flask("other").app_context(), pytest.raises(RuntimeError, match="init_app"):
        breakers["payments"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"PYBREAKER_REDIS_URL": "redis://x"}, "PYBREAKER_REDIS_URL; there are PYBREAKER_URL, PYBREAKER_PREFIX"),
        ({"PYBREAKER_DEFAULTS": {"fail_maxx": 1}}, "fail_maxx"),
        ({"PYBREAKER_BREAKERS": {"payments": {"fail_max": 0}}}, r"BREAKERS\['payments'\]: fail_max"),
        ({"PYBREAKER_LISTENERS": "nobody"}, "LISTENERS"),
        ({"PYBREAKER_LISTENERS": [f"{__name__}.Homeless"]}, "LISTENERS: .*Homeless': KeyError: 'STATSD_HOST'"),
        ({"PYBREAKER_URL": "memcached://x"}, "URL"),
        ({"PYBREAKER_URL": ""}, "URL, .*: url must begin with .*, not ''"),
    ],
)
def test_wrong_configuration_is_refused_at_the_start(config: dict[str, Any], said: str):
    """What is wrong is said before anything is served."""
    with pytest.raises(ValueError, match=said):
        create_app(**config)


def test_guard_may_have_a_fallback():
    """As with the registry's own: in place of a circuit's error, and of no other."""
    guarded = breakers.guard("payments", fallback=lambda: "later")(charge)
    with opened(create_app()).app_context():
        assert guarded() == "later"
    with create_app().app_context():
        assert guarded() == "answer"
        with pytest.raises(Down):
            breakers.guard("payments", fallback=0)(down)()


def test_coroutine_function_cannot_be_guarded():
    """It would return before anything is done: whoever decorates one is told so, at import."""

    async def charge_soon() -> None:
        """Not what it seems."""

    with pytest.raises(TypeError, match="asynchronous"):
        breakers.guard("payments")(charge_soon)


def test_tests_may_have_its_circuits_in_memory(client: redis.Redis, server: PrivateServer):
    """As the README says: those of its registry, whose breakers stay what they are."""
    app = create_app(PYBREAKER_URL=server.url)
    with app.app_context(), in_memory(breakers.registry):
        breakers["payments"].open()
        assert app.test_client().get("/pay").status_code == 503
    assert client.get("payments:pybreaker:state") != b"open"
    assert app.test_client().get("/pay").text == "answer"


# -- answers -----------------------------------------------------------------------------------------------------------


def test_request_behind_an_open_circuit_is_told_when_to_come_back():
    """A client gets 503 and Retry-After, no error page and no name."""
    app = create_app()
    assert app.test_client().get("/pay").text == "answer"
    answer = opened(app).test_client().get("/pay")
    assert answer.status_code == 503
    assert 28 <= int(answer.headers["Retry-After"]) <= 30
    assert answer.mimetype == "text/plain"
    assert "payments" not in answer.text


def test_client_that_asks_for_json_gets_json():
    """A program can read the answer."""
    answer = opened(create_app()).test_client().get("/pay", headers={"Accept": "application/json"})
    assert answer.json["retry_after"] == int(answer.headers["Retry-After"])


@pytest.mark.parametrize("before", [True, False])
def test_handler_of_the_application_stays(before: bool):
    """Whoever answers for open circuits already goes on doing so, whichever is registered first."""

    def own(error: pybreaker.CircuitBreakerError) -> tuple[str, int]:
        return "mine", 418

    app = flask.Flask("shop")
    app.get("/pay")(charge)
    if before:
        app.register_error_handler(pybreaker.CircuitBreakerError, own)
    breakers.init_app(app)
    if not before:
        app.register_error_handler(pybreaker.CircuitBreakerError, own)
    with app.app_context():
        breakers.get("payments").open()
    assert app.test_client().get("/pay").status_code == 418


def test_page_of_the_application_for_503_is_shown():
    """An application that has a page for 503 need not say so again; the header is there all the same."""
    app = opened(create_app())
    app.register_error_handler(503, lambda error: ("<h1>Back soon</h1>", 503))
    answer = app.test_client().get("/pay")
    assert (answer.status_code, answer.text) == (503, "<h1>Back soon</h1>")
    assert 28 <= int(answer.headers["Retry-After"]) <= 30


@pytest.mark.parametrize("kind", [503, ServiceUnavailable, HTTPException])
def test_answer_of_a_handler_for_answers_is_its_own(kind: Any):
    """Whoever has said what a client gets in place of 503 has meant this one, too."""
    app = opened(create_app())
    app.register_error_handler(kind, lambda error: ("Elsewhere", 307, {"Location": "/elsewhere"}))
    assert app.test_client().get("/pay").status_code == 307


def test_handler_of_everything_does_not_make_an_error_of_it():
    """Who answers 500 to whatever else is raised has not meant a circuit, which is no fault of the application's."""
    app = opened(create_app())
    app.register_error_handler(Exception, lambda error: ("Something went wrong", 500))
    answer = app.test_client().get("/pay", headers={"Accept": "application/json"})
    assert answer.status_code == 503
    assert answer.json["retry_after"] == int(answer.headers["Retry-After"])
    assert app.test_client().get("/fail").text == "Something went wrong"


def test_handler_of_everything_that_knows_503_makes_the_page():
    """As Flask's documentation has it: one handler that looks at the error."""
    app = opened(create_app())
    app.register_error_handler(Exception, lambda error: (f"<h1>{error.name}</h1>", error.code))
    answer = app.test_client().get("/pay")
    assert (answer.status_code, answer.text) == (503, "<h1>Service Unavailable</h1>")


def test_handler_of_the_blueprint_goes_before_that_of_the_application():
    """Whose page it is, is told as Flask tells it."""
    app = create_app()
    pages = flask.Blueprint("pages", "shop")
    pages.get("/pages/pay")(charge)
    pages.register_error_handler(HTTPException, lambda error: ("Elsewhere", 307, {"Location": "/elsewhere"}))
    app.register_blueprint(pages)
    app.register_error_handler(Exception, lambda error: ("Something went wrong", 500))
    browser = opened(app).test_client()
    assert browser.get("/pages/pay").status_code == 307
    assert browser.get("/pay").status_code == 503


def test_other_errors_are_none_of_its_business():
    """Everything but a circuit's error goes on as ever."""
    app = create_app(TESTING=True)
    with pytest.raises(Down):
        app.test_client().get("/fail")


# -- commands ----------------------------------------------------------------------------------------------------------


def test_command_shows_and_moves_circuits(server: PrivateServer):
    """An operator sees what is true for everybody, and changes it for everybody."""
    app = create_app(PYBREAKER_URL=server.url)

    def state_after(*words: str) -> str:
        done = app.test_cli_runner().invoke(args=["breakers", *words])
        _, payments = done.output.splitlines()
        return payments.split()[1]

    assert state_after() == "closed"
    assert state_after("open", "payments") == "open"
    assert state_after("half-open", "payments") == "half-open"
    assert state_after("reset", "payments") == "half-open"
    assert state_after("close", "payments") == "closed"


def test_command_refuses_what_nobody_can_mean():
    """A mistyped name creates no circuit."""
    done = create_app().test_cli_runner().invoke(args=["breakers", "open", "paymnets"])
    assert done.exit_code != 0
    assert "Error: no circuit is called 'paymnets'; configured: payments" in done.output


def test_command_fails_in_one_line_while_redis_is_away(killable_server: PrivateServer):
    """An operator who sees no error relies on it that the circuit is open."""
    killable_server.kill()
    done = create_app(PYBREAKER_URL=killable_server.url).test_cli_runner().invoke(args=["breakers", "open", "payments"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: Redis did not carry out the command: ")
    assert len(done.output.splitlines()) == 1
