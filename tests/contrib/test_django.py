"""Django: circuits from the settings, 503 for open circuits, commands for operators."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

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
from tests.support.inspect import breakers_made_by, lock_of, reset_in_child, storage_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("patient")
LOCMEM = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
BREAKERS = {"payments": {"fail_max": 2, "reset_timeout": 30}}


class CardDeclined(Exception):
    """Error that is no sign of an unhealthy dependency."""


def is_refusal(error: BaseException) -> bool:
    """Return whether a service works, and refuses one request."""
    return getattr(error, "code", 0) == 404


class SilentListener(pybreaker.CircuitBreakerListener):
    """Listener without any effect."""


class SingletonListener(pybreaker.CircuitBreakerListener):
    """Listener that can exist once in a process, as each metric in a registry of Prometheus."""

    made = 0

    def __init__(self) -> None:
        if type(self).made:
            msg = "Duplicated timeseries in CollectorRegistry"
            raise ValueError(msg)
        type(self).made += 1


class ListenerWithMissingVariable(pybreaker.CircuitBreakerListener):
    """Listener that needs a missing environment variable."""

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
    """Return the storage of the circuit "payments"."""
    return storage_of(breakers["payments"])


def trip() -> None:
    """Open the circuit "payments"."""
    for _ in range(2):
        with pytest.raises((Down, pybreaker.CircuitBreakerError)):
            breakers["payments"].call(down)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["django_redis.cache.RedisCache", "django.core.cache.backends.redis.RedisCache"])
def test_circuit_lives_on_the_server_of_the_cache(project, client: redis.Redis, server: PrivateServer, backend: str):
    """The alias of a cache is enough to find the server, for django-redis and for Django's own backend."""
    project(
        CACHES={"default": {"BACKEND": backend, "LOCATION": server.url}},
        PYBREAKER={"CACHE": "default", "PREFIX": "shop", "BREAKERS": BREAKERS},
    )
    trip()
    assert isinstance(storage(), CircuitRedisStorage)
    assert client.get("shop:payments:pybreaker:state") == b"open"


@pytest.mark.parametrize("name", ["DefaultClient", "HerdClient"])
def test_circuit_lives_on_the_server_of_each_client_of_django_redis(
    project, client: redis.Redis, server: PrivateServer, name: str
):
    """The client class of the cache, which packs values, does not matter."""
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
    """A circuit needs keys on one server, so a sharded cache is refused with a remedy."""
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


def test_health_of_the_circuits_is_that_of_the_current_settings(project, server: PrivateServer):
    """A view shows the condition of Redis without the storages behind the breakers."""
    assert breakers.health() == {}
    project(PYBREAKER={"URL": server.url, "PREFIX": "shop", "BREAKERS": BREAKERS})
    assert breakers.health()["payments"].condition == "unused"
    breakers["payments"].call(str)
    assert (breakers.health()["payments"].circuit, breakers.health()["payments"].condition) == (
        "shop:payments",
        "connected",
    )


@pytest.mark.parametrize("backend", ["locmem.LocMemCache", "dummy.DummyCache"])
def test_circuit_is_in_memory_with_a_cache_in_memory(project, backend: str):
    """With a cache in memory, as in development and tests, the same settings lead to circuits in memory."""
    project(
        CACHES={"default": {"BACKEND": f"django.core.cache.backends.{backend}"}},
        PYBREAKER={"CACHE": "default", "DEFAULTS": {"timeout": 0.1}, "BREAKERS": BREAKERS},
    )
    trip()
    assert isinstance(storage(), CircuitMemoryStorage)
    assert breakers["payments"].current_state == "open"


def test_breakers_follow_the_settings(project):
    """Changed settings create new, closed breakers, which guarded functions use, too."""
    first = breakers["payments"]
    assert breakers["payments"] is first
    trip()
    with pytest.raises(pybreaker.CircuitBreakerError):
        django_project.charge()
    project(PYBREAKER={"BREAKERS": {"payments": {"fail_max": 7}}})
    assert breakers["payments"] is not first
    assert breakers["payments"].fail_max == 7
    assert django_project.charge() == "answer"
    before = breakers["payments"]
    project(USE_TZ=True)
    assert breakers["payments"] is before
    project(PYBREAKER={})
    assert len(breakers) == 0
    project(PYBREAKER={"BREAKERS": BREAKERS})
    assert breakers["payments"].fail_max == 2


def test_changed_settings_release_the_former_breakers(project, server: PrivateServer):
    """Changed settings release the breakers before them, so that a test run collects no connections."""
    project(PYBREAKER={"URL": server.url, "BREAKERS": BREAKERS})
    registry = breakers.registry
    trip()
    project(PYBREAKER={"BREAKERS": BREAKERS})
    assert breakers.registry is not registry
    assert not breakers_made_by(registry)


def test_forked_child_does_not_wait_for_a_lock_of_its_parent(project):
    """A lock that a thread of the parent had at the fork does not block the child."""
    project(PYBREAKER={"BREAKERS": BREAKERS})
    is_held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(breakers):
            is_held.set()
            over.wait()

    threads = [threading.Thread(target=hold), threading.Thread(target=lambda: breakers["payments"])]
    threads[0].start()
    is_held.wait()
    try:
        reset_in_child(breakers)
        threads[1].start()
        threads[1].join(5)
        assert not threads[1].is_alive()
    finally:
        over.set()
        threads[0].join()


def test_names_in_settings_stand_for_classes(project):
    """Settings may name classes by dotted paths, because they cannot import what is loaded after them."""
    project(
        PYBREAKER={
            "LISTENERS": [f"{__name__}.SilentListener", SilentListener()],
            "DEFAULTS": {"exclude": [f"{__name__}.CardDeclined"]},
            "BREAKERS": {"payments": {"exclude": [KeyError]}, "stock": {}},
        }
    )
    assert [type(listener) for listener in breakers["payments"].listeners] == [SilentListener, SilentListener]
    assert breakers["payments"].excluded_exceptions == (KeyError,)
    assert breakers["stock"].excluded_exceptions == (CardDeclined,)
    assert sorted(breakers) == ["payments", "stock"]
    assert "stock" in breakers
    assert len(breakers) == 2
    assert breakers.get("search", fail_max=9).fail_max == 9


@pytest.mark.parametrize("name", [f"{__name__}.is_refusal", f"{__name__}:is_refusal"])
def test_name_in_exclude_stands_for_a_function(project, name: str):
    """An item of ``exclude`` may be the dotted name of a function, which decides about each exception."""
    project(PYBREAKER={"BREAKERS": {"payments": {"fail_max": 1, "exclude": [name]}}})
    assert checked() == ["W001"]

    def answer(code: int) -> None:
        raise HTTPError("http://payments.invalid", code, "", Message(), None)

    for _ in range(3):
        with pytest.raises(HTTPError):
            breakers["payments"].call(answer, 404)
    assert breakers["payments"].current_state == "closed"
    with pytest.raises(HTTPError):
        breakers["payments"].call(answer, 500)
    assert breakers["payments"].current_state == "open"


def test_project_without_the_setting_has_circuits_in_memory(project):
    """The app without the setting uses circuits in memory."""
    with override_settings():
        from django.conf import settings

        del settings.PYBREAKER
        assert len(breakers) == 0
        assert isinstance(storage_of(breakers.get("payments")), CircuitMemoryStorage)
        assert checked() == ["W001"]


def test_in_memory_replaces_the_circuits_for_a_test(project, client: redis.Redis, server: PrivateServer):
    """`in_memory` replaces the circuits of the project's registry for a test, and restores them."""
    project(PYBREAKER={"URL": server.url, "BREAKERS": BREAKERS})
    with in_memory(breakers.registry):
        breakers["payments"].open()
        assert Client().get("/pay").status_code == 503
    assert client.get("payments:pybreaker:state") != b"open"
    assert Client().get("/pay").content == b"answer"


# -- checks ------------------------------------------------------------------------------------------------------------


def checked() -> list[str]:
    """Return the ids of the messages of ``manage.py check`` about circuits."""
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
        ({"URL": "redis://x", "LISTENERS": ["tests.contrib.test_django.Missing"]}, "Missing"),
        ({"URL": "redis://x", "BREAKERS": {"payments": {"reset_timeout": -1}}}, "BREAKERS['payments']: reset_timeout"),
        ({"URL": "redis://x", "BREAKERS": {"payments": 5}}, "BREAKERS['payments']"),
        ({"URL": "memcached://x"}, "URL"),
        ({"URL": ""}, "URL"),
    ],
}


@pytest.mark.parametrize(
    ("check_id", "setting", "message_part"), [(check_id, *case) for check_id, cases in WRONG.items() for case in cases]
)
def test_wrong_setting_is_reported_by_check_and_refused_in_use(project, check_id: str, setting: Any, message_part: str):
    """``manage.py check`` reports a wrong setting, and so does the first use on a server that does not check."""
    caches = {**LOCMEM, "files": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": "x"}}
    project(CACHES=caches, PYBREAKER=setting)
    errors = [message for message in run_checks(tags=["pybreaker_redis"]) if message.is_serious()]
    assert {message.id for message in errors} == {f"pybreaker_redis.{check_id}"}
    assert message_part in errors[0].msg
    assert all(message.hint for message in errors)
    with pytest.raises(ImproperlyConfigured) as refused:
        breakers.get("payments")
    assert errors[0].msg in str(refused.value)


def test_hints_name_no_file_of_the_checkout(project):
    """A user of the wheel has no files of the documentation, so hints name its pages."""
    project(PYBREAKER={"URL": "redis://x", "DEFAULTS": {"fail_max": 0}})
    (error,) = run_checks(tags=["pybreaker_redis"])
    assert ".rst" not in error.hint
    assert "page Settings" in error.hint


@pytest.mark.parametrize("setting", [f"{__name__}.SingletonListener", SingletonListener])
def test_listener_is_made_once(project, monkeypatch: pytest.MonkeyPatch, setting: Any):
    """A listener is created once, at the first use and not by a check."""
    monkeypatch.setattr(SingletonListener, "made", 0)
    project(
        PYBREAKER={"URL": "redis://missing.invalid:1", "LISTENERS": [setting], "BREAKERS": {**BREAKERS, "stock": {}}}
    )
    assert checked() == []
    assert SingletonListener.made == 0
    assert breakers["payments"].listeners == breakers["stock"].listeners
    assert checked() == []
    assert SingletonListener.made == 1


def test_no_listener_is_made_for_settings_that_are_refused(project, monkeypatch: pytest.MonkeyPatch):
    """Refused settings create no listener, which the next attempt would report as a duplicate."""
    monkeypatch.setattr(SingletonListener, "made", 0)
    project(PYBREAKER={"LISTENERS": [SingletonListener], "BREAKERS": {"payments": {"reset_timeout": -1}}})
    for _ in range(2):
        with pytest.raises(ImproperlyConfigured, match="reset_timeout"):
            breakers.get("payments")


@pytest.mark.parametrize("setting", [f"{__name__}.ListenerWithMissingVariable", ListenerWithMissingVariable])
def test_listener_whose_constructor_fails_is_named_in_use(project, setting: Any):
    """The error names a listener with a failing constructor, and keeps the failure as its cause."""
    project(PYBREAKER={"CACHE": "default", "LISTENERS": [setting], "BREAKERS": BREAKERS})
    assert checked() == ["W001"]
    with pytest.raises(
        ImproperlyConfigured, match=r"LISTENERS: .*test_django\.ListenerWithMissingVariable.*KeyError: 'STATSD_HOST'"
    ) as raised:
        breakers.get("payments")
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, KeyError):
        error = error.__cause__
    assert error is not None


@pytest.mark.parametrize("where", ["LISTENERS", "DEFAULTS"])
def test_module_that_cannot_be_imported_is_named(project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """A module that fails at import is named by the check and by the first use, whatever it raises."""
    (tmp_path / "broken_module.py").write_text("{}['STATSD_HOST']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    value = {"LISTENERS": ["broken_module.It"], "DEFAULTS": {"exclude": ["broken_module.It"]}}[where]
    project(PYBREAKER={"CACHE": "default", where: value})
    (error,) = [message for message in run_checks(tags=["pybreaker_redis"]) if message.is_serious()]
    assert error.id == "pybreaker_redis.E006"
    assert where in error.msg
    assert "'broken_module.It': KeyError: 'STATSD_HOST'" in error.msg
    with pytest.raises(ImproperlyConfigured, match="broken_module"):
        breakers.get("payments")


def test_right_settings_pass_the_checks(project):
    """Right settings give no message, except a warning about circuits in memory."""
    project(PYBREAKER={"URL": "redis://missing.invalid:1", "PREFIX": "shop", "BREAKERS": BREAKERS})
    assert checked() == []
    project(PYBREAKER={"CACHE": "default", "BREAKERS": BREAKERS})
    assert checked() == ["W001"]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_request_behind_an_open_circuit_gets_503_and_retry_after(project, caplog: pytest.LogCaptureFixture):
    """An open circuit is answered with 503 and Retry-After, without its name and without mail to administrators."""
    assert Client().get("/pay").content == b"answer"
    breakers["payments"].open()
    with caplog.at_level(logging.WARNING, logger="django.request"):
        answer = Client().get("/pay")
    assert answer.status_code == 503
    assert 28 <= int(answer["Retry-After"]) <= 30
    assert answer["Content-Type"].startswith("text/plain")
    assert b"payments" not in answer.content
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_client_that_accepts_json_gets_json(project):
    """A client that accepts JSON gets JSON."""
    breakers["payments"].open()
    answer = Client().get("/pay", headers={"Accept": "application/json, text/plain, */*"})
    assert answer["Content-Type"] == "application/json"
    assert answer.json()["retry_after"] == int(answer["Retry-After"])
    assert "payments" not in answer.content.decode()


def test_template_of_the_project_replaces_the_page(project):
    """A template named like the status replaces the page, as for other errors."""
    loader = ("django.template.loaders.locmem.Loader", {"503.html": "<h1>Back in {{ retry_after }} s</h1>"})
    engine = {"BACKEND": "django.template.backends.django.DjangoTemplates", "OPTIONS": {"loaders": [loader]}}
    project(TEMPLATES=[engine])
    breakers["payments"].open()
    answer = Client().get("/pay", headers={"Accept": "text/html"})
    assert (answer.status_code, answer["Content-Type"]) == (503, "text/html; charset=utf-8")
    assert answer.content.decode() == f"<h1>Back in {answer['Retry-After']} s</h1>"


def test_asynchronous_view_gets_the_same_answer(project):
    """Asynchronous views are behind the same middleware."""
    breakers["payments"].open()
    answer = asyncio.run(AsyncClient().get("/pay-soon"))
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) >= 28


def test_other_errors_are_not_handled(project):
    """The middleware handles only errors of circuits."""
    with pytest.raises(Down):
        Client().get("/fail")


def test_rest_framework_gives_its_own_answer(project):
    """The handler in REST_FRAMEWORK turns an open circuit into an error of the framework."""
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


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """Return the lines of ``manage.py breakers``, split into columns."""
    call_command("breakers", *arguments)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_command_shows_and_changes_circuits(project, server: PrivateServer, capsys: pytest.CaptureFixture[str]):
    """The command shows the shared state of circuits, and changes it for all processes."""
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


def test_command_refuses_unknown_and_missing_names(project):
    """A mistyped name creates no circuit, and a missing name does not mean all circuits."""
    with pytest.raises(CommandError, match="'paymnets'; configured: payments"):
        call_command("breakers", "open", "paymnets")
    with pytest.raises(CommandError, match="name the circuits to close: payments"):
        call_command("breakers", "close")
    with pytest.raises(CommandError, match="invalid choice"):
        call_command("breakers", "explode")


@pytest.mark.parametrize("arguments", [(), ("open", "payments")])
def test_command_fails_in_one_line_if_redis_is_unreachable(killable_server: PrivateServer, arguments: tuple[str, ...]):
    """A command that Redis did not execute fails in one line."""
    killable_server.kill()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "django_shop" / "manage.py"), "breakers", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "REDIS_URL": killable_server.url, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "CommandError: circuit 'shop:payments': Redis at " in done.stderr.splitlines()[-1]
    assert "did not execute the command" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
