"""Django: circuits from the settings, 503 instead of an error page, commands for operators."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pybreaker
import pytest
import redis
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.test import AsyncClient, Client, override_settings

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis.contrib.django import breakers
from pybreaker_redis.testing import in_memory
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import django_project
from tests.support.breakers import Down, down
from tests.support.inspect import reset_in_child

pytestmark = pytest.mark.usefixtures("patient")

ROOT = Path(__file__).parents[2]
LOCMEM = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
BREAKERS = {"payments": {"fail_max": 2, "reset_timeout": 30}}


class CardDeclined(Exception):
    """Nothing that is wrong with the dependency."""


class Silent(pybreaker.CircuitBreakerListener):
    """Hears, and says nothing."""


class Metric(pybreaker.CircuitBreakerListener):
    """There can be one in a process, as there can be of each metric in a registry of Prometheus."""

    made = 0

    def __init__(self) -> None:
        if type(self).made:
            msg = "Duplicated timeseries in CollectorRegistry"
            raise ValueError(msg)
        type(self).made += 1


class Homeless(pybreaker.CircuitBreakerListener):
    """Wants a variable of the environment that is not there."""

    def __init__(self) -> None:
        self.host = {}["STATSD_HOST"]


@pytest.fixture
def project() -> Iterator[Callable[..., None]]:
    """Change settings for the rest of the test, as a project's own tests do."""
    with ExitStack() as stack:

        def change(**settings: Any) -> None:
            stack.enter_context(override_settings(**settings))

        change(CACHES=LOCMEM, PYBREAKER={"BREAKERS": BREAKERS})
        yield change


def storage() -> Any:
    """Where the circuit of the payments lives."""
    return breakers["payments"]._state_storage


def trip() -> None:
    """Open the circuit of the payments."""
    for _ in range(2):
        with pytest.raises((Down, pybreaker.CircuitBreakerError)):
            breakers["payments"].call(down)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["django_redis.cache.RedisCache", "django.core.cache.backends.redis.RedisCache"])
def test_circuit_lives_where_the_cache_does(project, client: redis.Redis, server: PrivateServer, backend: str):
    """One alias is all that has to be said, for django-redis and for Django's own backend."""
    project(
        CACHES={"default": {"BACKEND": backend, "LOCATION": server.url}},
        PYBREAKER={"CACHE": "default", "PREFIX": "shop", "BREAKERS": BREAKERS},
    )
    trip()
    assert isinstance(storage(), CircuitRedisStorage)
    assert client.get("shop:payments:pybreaker:state") == b"open"


@pytest.mark.parametrize("name", ["DefaultClient", "HerdClient"])
def test_circuit_lives_where_a_client_of_django_redis_writes(
    project, client: redis.Redis, server: PrivateServer, name: str
):
    """How a client packs the values of the cache does not matter."""
    options = {"CLIENT_CLASS": f"django_redis.client.{name}"}
    project(
        CACHES={"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": server.url, "OPTIONS": options}},
        PYBREAKER={"CACHE": "default", "BREAKERS": BREAKERS},
    )
    assert run_checks() == []
    trip()
    assert client.get("payments:pybreaker:state") == b"open"
    assert storage().health().condition == "connected"


@pytest.mark.parametrize("locations", [1, 2])
def test_cache_that_is_spread_over_servers_is_refused(project, server: PrivateServer, locations: int):
    """A circuit is several keys that change together, so it lives on one server; the check names the remedy."""
    options = {"CLIENT_CLASS": "django_redis.client.ShardClient"}
    where = [f"{server.url}?db={number}" for number in range(locations)]
    project(
        CACHES={"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": where, "OPTIONS": options}},
        PYBREAKER={"CACHE": "default", "BREAKERS": BREAKERS},
    )
    (problem,) = run_checks()
    assert (problem.id, problem.is_serious()) == ("pybreaker_redis.E007", True)
    assert "one server" in problem.hint
    with pytest.raises(ImproperlyConfigured, match="ShardClient"):
        breakers["payments"].call(str)


def test_circuit_lives_at_a_url(project, client: redis.Redis, server: PrivateServer):
    """A project need not have a cache in Redis."""
    project(PYBREAKER={"URL": server.url, "DEFAULTS": {"fail_max": 2}, "BREAKERS": {"payments": {}}})
    trip()
    assert client.get("payments:pybreaker:state") == b"open"


@pytest.mark.parametrize("backend", ["locmem.LocMemCache", "dummy.DummyCache"])
def test_circuit_is_in_memory_with_a_cache_in_memory(project, backend: str):
    """The same settings do in development and in tests, where there is no Redis."""
    project(
        CACHES={"default": {"BACKEND": f"django.core.cache.backends.{backend}"}},
        PYBREAKER={"CACHE": "default", "DEFAULTS": {"timeout": 0.1}, "BREAKERS": BREAKERS},
    )
    trip()
    assert isinstance(storage(), CircuitMemoryStorage)
    assert breakers["payments"].current_state == "open"


def test_breakers_follow_the_settings(project):
    """Tests that override settings begin with closed circuits; what guards follows, too."""
    first = breakers["payments"]
    assert breakers["payments"] is first
    trip()
    with pytest.raises(pybreaker.CircuitBreakerError):
        django_project.charge()
    project(PYBREAKER={"BREAKERS": {"payments": {"fail_max": 7}}})
    assert breakers["payments"] is not first
    assert breakers["payments"].fail_max == 7
    assert django_project.charge() == "answer"
    kept = breakers["payments"]
    project(USE_TZ=True)
    assert breakers["payments"] is kept
    project(PYBREAKER={})
    assert len(breakers) == 0
    project(PYBREAKER={"BREAKERS": BREAKERS})
    assert breakers["payments"].fail_max == 2


def test_settings_that_change_let_go_of_what_was_there(project, server: PrivateServer):
    """A test run does not collect the connections of all its tests."""
    project(PYBREAKER={"URL": server.url, "BREAKERS": BREAKERS})
    registry = breakers.registry
    trip()
    project(PYBREAKER={"BREAKERS": BREAKERS})
    assert breakers.registry is not registry
    assert not registry._breaker_by_name


def test_child_does_not_wait_for_a_thread_of_its_parent(project):
    """Whoever made the breakers at the moment of the fork is not there to let go of the lock."""
    project(PYBREAKER={"BREAKERS": BREAKERS})
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with breakers._lock:
            held.set()
            over.wait()

    threads = [threading.Thread(target=hold), threading.Thread(target=lambda: breakers["payments"])]
    threads[0].start()
    held.wait()
    try:
        reset_in_child(breakers)
        threads[1].start()
        threads[1].join(5)
        assert not threads[1].is_alive()
    finally:
        over.set()
        threads[0].join()


def test_names_in_settings_stand_for_classes(project):
    """Settings cannot import what is loaded after them."""
    project(
        PYBREAKER={
            "LISTENERS": [f"{__name__}.Silent", Silent()],
            "DEFAULTS": {"exclude": [f"{__name__}.CardDeclined"]},
            "BREAKERS": {"payments": {"exclude": [KeyError]}, "stock": {}},
        }
    )
    assert [type(listener) for listener in breakers["payments"].listeners] == [Silent, Silent]
    assert breakers["payments"].excluded_exceptions == (KeyError,)
    assert breakers["stock"].excluded_exceptions == (CardDeclined,)
    assert sorted(breakers) == ["payments", "stock"]
    assert "stock" in breakers
    assert len(breakers) == 2
    assert breakers.get("search", fail_max=9).fail_max == 9


def test_project_without_the_setting_has_circuits_in_memory(project):
    """To add the app is enough to begin with."""
    with override_settings():
        from django.conf import settings

        del settings.PYBREAKER
        assert len(breakers) == 0
        assert isinstance(breakers.get("payments")._state_storage, CircuitMemoryStorage)
        assert checked() == ["W001"]


def test_tests_may_have_its_circuits_in_memory(project, client: redis.Redis, server: PrivateServer):
    """As the README says: those of its registry, whose breakers stay what they are."""
    project(PYBREAKER={"URL": server.url, "BREAKERS": BREAKERS})
    with in_memory(breakers.registry):
        breakers["payments"].open()
        assert Client().get("/pay").status_code == 503
    assert client.get("payments:pybreaker:state") != b"open"
    assert Client().get("/pay").content == b"answer"


# -- checks ------------------------------------------------------------------------------------------------------------


def checked() -> list[str]:
    """The ids of what ``manage.py check`` says about the circuits."""
    return [message.id.removeprefix("pybreaker_redis.") for message in run_checks(tags=["pybreaker_redis"])]


WRONG = {
    "E001": [("redis://localhost/0", "no dictionary")],
    "E002": [({"URL": "redis://x", "BRAKERS": {}, "TTL": 1}, "'BRAKERS'")],
    "E003": [({"URL": "redis://x", "CACHE": "default"}, "both")],
    "E004": [({"CACHE": "sessions"}, "'sessions'")],
    "E005": [({"CACHE": "files"}, "'files'")],
    "E006": [
        ({"URL": "redis://x", "PREFIX": 7}, "PREFIX"),
        ({"URL": "redis://x", "BREAKERS": ["payments"]}, "BREAKERS"),
        ({"URL": "redis://x", "DEFAULTS": {"fail_maxx": 1}}, "fail_maxx"),
        ({"URL": "redis://x", "DEFAULTS": {"exclude": "KeyError"}}, "exclude"),
        ({"URL": "redis://x", "DEFAULTS": {"exclude": ["nowhere.KeyError"]}}, "nowhere"),
        ({"URL": "redis://x", "LISTENERS": ["tests.contrib.test_django.Nobody"]}, "Nobody"),
        ({"URL": "redis://x", "BREAKERS": {"payments": {"reset_timeout": -1}}}, "BREAKERS['payments']: reset_timeout"),
        ({"URL": "redis://x", "BREAKERS": {"payments": 5}}, "BREAKERS['payments']"),
        ({"URL": "memcached://x"}, "URL"),
        ({"URL": ""}, "URL"),
    ],
}


@pytest.mark.parametrize(("id_", "given", "said"), [(id_, *case) for id_, cases in WRONG.items() for case in cases])
def test_wrong_setting_is_found_by_check_and_refused_in_use(project, id_: str, given: Any, said: str):
    """What is wrong is said before anything is served; under a server that does not check, at the first use."""
    caches = {**LOCMEM, "files": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": "x"}}
    project(CACHES=caches, PYBREAKER=given)
    errors = [message for message in run_checks(tags=["pybreaker_redis"]) if message.is_serious()]
    assert {message.id for message in errors} == {f"pybreaker_redis.{id_}"}
    assert said in errors[0].msg
    assert all(message.hint for message in errors)
    with pytest.raises(ImproperlyConfigured) as refused:
        breakers.get("payments")
    assert errors[0].msg in str(refused.value)


@pytest.mark.parametrize("given", [f"{__name__}.Metric", Metric])
def test_listener_is_made_once(project, monkeypatch: pytest.MonkeyPatch, given: Any):
    """By the first use, and by no check: it may register what can be registered once in a process."""
    monkeypatch.setattr(Metric, "made", 0)
    project(PYBREAKER={"URL": "redis://nobody.invalid:1", "LISTENERS": [given], "BREAKERS": {**BREAKERS, "stock": {}}})
    assert checked() == []
    assert Metric.made == 0
    assert breakers["payments"].listeners == breakers["stock"].listeners
    assert checked() == []
    assert Metric.made == 1


def test_no_listener_is_made_for_settings_that_are_refused(project, monkeypatch: pytest.MonkeyPatch):
    """It would be there already at the next attempt, whose error would be about that."""
    monkeypatch.setattr(Metric, "made", 0)
    project(PYBREAKER={"LISTENERS": [Metric], "BREAKERS": {"payments": {"reset_timeout": -1}}})
    for _ in range(2):
        with pytest.raises(ImproperlyConfigured, match="reset_timeout"):
            breakers.get("payments")


@pytest.mark.parametrize("given", [f"{__name__}.Homeless", Homeless])
def test_listener_that_cannot_be_made_is_named_in_use(project, given: Any):
    """Whatever its constructor raises, which no check calls; and where it was raised can be seen."""
    project(PYBREAKER={"CACHE": "default", "LISTENERS": [given], "BREAKERS": BREAKERS})
    assert checked() == ["W001"]
    with pytest.raises(
        ImproperlyConfigured, match=r"LISTENERS: .*test_django\.Homeless.*KeyError: 'STATSD_HOST'"
    ) as raised:
        breakers.get("payments")
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, KeyError):
        error = error.__cause__
    assert error is not None


@pytest.mark.parametrize("where", ["LISTENERS", "DEFAULTS"])
def test_module_that_cannot_be_imported_is_named(project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """Whatever it raises: neither a check nor the first use ends in somebody else's error."""
    (tmp_path / "homeless.py").write_text("{}['STATSD_HOST']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    value = {"LISTENERS": ["homeless.It"], "DEFAULTS": {"exclude": ["homeless.It"]}}[where]
    project(PYBREAKER={"CACHE": "default", where: value})
    (error,) = [message for message in run_checks(tags=["pybreaker_redis"]) if message.is_serious()]
    assert error.id == "pybreaker_redis.E006"
    assert where in error.msg
    assert "'homeless.It': KeyError: 'STATSD_HOST'" in error.msg
    with pytest.raises(ImproperlyConfigured, match="homeless"):
        breakers.get("payments")


def test_right_settings_pass_the_checks(project):
    """Silence means that all is well; to be alone is worth a warning."""
    project(PYBREAKER={"URL": "redis://nobody.invalid:1", "PREFIX": "shop", "BREAKERS": BREAKERS})
    assert checked() == []
    project(PYBREAKER={"CACHE": "default", "BREAKERS": BREAKERS})
    assert checked() == ["W001"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_request_behind_an_open_circuit_is_told_when_to_come_back(project, caplog: pytest.LogCaptureFixture):
    """A client gets 503 and Retry-After, no error page and no name; the administrators get no mail for each of them."""
    assert Client().get("/pay").content == b"answer"
    breakers["payments"].open()
    with caplog.at_level(logging.WARNING, logger="django.request"):
        answer = Client().get("/pay")
    assert answer.status_code == 503
    assert 28 <= int(answer["Retry-After"]) <= 30
    assert answer["Content-Type"].startswith("text/plain")
    assert b"payments" not in answer.content
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_client_that_asks_for_json_gets_json(project):
    """A program can read the answer."""
    breakers["payments"].open()
    answer = Client().get("/pay", headers={"Accept": "application/json, text/plain, */*"})
    assert answer["Content-Type"] == "application/json"
    assert answer.json()["retry_after"] == int(answer["Retry-After"])
    assert "payments" not in answer.content.decode()


def test_project_may_have_a_page_of_its_own(project):
    """As for other errors: a template that is called like the status."""
    loader = ("django.template.loaders.locmem.Loader", {"503.html": "<h1>Back in {{ retry_after }} s</h1>"})
    engine = {"BACKEND": "django.template.backends.django.DjangoTemplates", "OPTIONS": {"loaders": [loader]}}
    project(TEMPLATES=[engine])
    breakers["payments"].open()
    answer = Client().get("/pay", headers={"Accept": "text/html"})
    assert (answer.status_code, answer["Content-Type"]) == (503, "text/html; charset=utf-8")
    assert answer.content.decode() == f"<h1>Back in {answer['Retry-After']} s</h1>"


def test_asynchronous_server_answers_alike(project):
    """Views that are coroutines are behind the same middleware."""
    breakers["payments"].open()
    answer = asyncio.run(AsyncClient().get("/pay-soon"))
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) >= 28


def test_other_errors_are_none_of_its_business(project):
    """Everything but a circuit's error goes on as ever."""
    with pytest.raises(Down):
        Client().get("/fail")


def test_rest_framework_answers_in_its_own_manner(project):
    """With the handler in REST_FRAMEWORK an open circuit is one of the framework's own errors."""
    pytest.importorskip("rest_framework")
    assert Client().get("/rest/pay").json() == {"receipt": "answer"}
    breakers["payments"].open()
    answer = Client().get("/rest/pay")
    assert (answer.status_code, answer["Content-Type"]) == (503, "application/json")
    assert 28 <= int(answer["Retry-After"]) <= 30
    assert list(answer.json()) == ["detail"]
    assert Client().get("/rest/missing").status_code == 404
    with pytest.raises(Down):
        Client().get("/rest/fail")


# -- commands ----------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """What ``manage.py breakers`` prints, by lines and columns."""
    call_command("breakers", *words)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_command_shows_and_moves_circuits(project, server: PrivateServer, capsys: pytest.CaptureFixture[str]):
    """An operator sees what is true for everybody, and changes it for everybody."""
    project(PYBREAKER={"URL": server.url, "BREAKERS": {"payments": {"fail_max": 2}, "stock": {}}})
    with pytest.raises(Down):
        breakers["payments"].call(down)
    heading, payments, stock = command(capsys)
    assert heading[:3] == ["circuit", "state", "failures"]
    assert payments[:4] == ["payments", "closed", "1", "never"]
    assert stock[:4] == ["stock", "closed", "0", "never"]
    assert command(capsys, "reset", "payments")[1][:3] == ["payments", "closed", "0"]
    opened = command(capsys, "open", "payments")[1]
    assert opened[:2] == ["payments", "open"]
    assert 58 < float(opened[-2]) <= 60
    assert command(capsys, "half-open", "payments")[1][1] == "half-open"
    assert [row[1] for row in command(capsys, "close", "payments", "stock")[1:]] == ["closed", "closed"]


def test_command_refuses_what_nobody_can_mean(project):
    """A mistyped name creates no circuit, and nothing is closed for all by forgetting the name."""
    with pytest.raises(CommandError, match="'paymnets'; configured: payments"):
        call_command("breakers", "open", "paymnets")
    with pytest.raises(CommandError, match="name the circuits to close: payments"):
        call_command("breakers", "close")
    with pytest.raises(CommandError, match="invalid choice"):
        call_command("breakers", "explode")


@pytest.mark.parametrize("words", [(), ("open", "payments")])
def test_command_fails_in_one_line_while_redis_is_away(killable_server: PrivateServer, words: tuple[str, ...]):
    """An operator who sees no error relies on it that the circuit is open."""
    killable_server.kill()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "django_shop" / "manage.py"), "breakers", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "REDIS_URL": killable_server.url, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "CommandError: Redis has not done it: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
