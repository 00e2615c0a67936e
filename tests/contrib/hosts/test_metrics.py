"""Metrics of four workers of gunicorn, set up as ``docs/howto/metrics.rst`` shows: the page of any worker is right."""

from __future__ import annotations

import collections
import contextlib
import operator
import os
import signal
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pybreaker_redis.testing.servers import PrivateServer
from tests.contrib.hosts.doors import Door, HttpDoor, NoAnswer
from tests.contrib.hosts.kinds import Kind
from tests.contrib.hosts.shop import Answer, Shop
from tests.support.logs import ALARMS
from tests.support.pages import blocks

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

#: Page with the set-up, and the names of the files that the page shows.
PAGE = "docs/howto/metrics.rst"
FILES = ("shop.py", "gunicorn.conf.py")

#: Prefix of the circuit's keys in Redis.
CIRCUIT = "shop:orders:pybreaker:"


def _gunicorn(name: str, *arguments: str) -> Kind:
    return Kind(
        name,
        (
            *(sys.executable, "-m", "gunicorn", "tests.contrib.hosts.metered", "--chdir", "{directory}"),
            *("--config", "{directory}/gunicorn.conf.py", "--bind", "unix:{socket}", "--no-control-socket"),
            *("--workers", "4", *arguments),
        ),
        needs=("gunicorn",),
        workers=4,
    )


#: Workers that create their own counters, and workers that inherit those of their master.
WAYS = (_gunicorn("sync"), _gunicorn("gthread-preload", "--worker-class", "gthread", "--threads", "4", "--preload"))


class MeteredDoor(HttpDoor):
    """Entrance of a web server with pages of metrics."""

    def request(self, what: str) -> dict[str, Any]:
        """Send a request and return the answer, for pages with the id of the worker."""
        if what != "metrics":
            return super().request(what)
        response, page = self.get(what)
        if response.status != HTTPStatus.OK:
            raise NoAnswer(f"{response.status}: {page}")
        return {"pid": int(response.headers["X-Worker"]), "page": page}


class Page:
    """Samples on a page of metrics.

    Args:
        text: Text of the page.
    """

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(self, name: str, label: str) -> dict[str, float]:
        """Return the values of one name by a label, and assert that there are none of other circuits."""
        found = {sample.labels[label]: sample.value for sample in self._samples if sample.name == name}
        assert {sample.labels["breaker"] for sample in self._samples if sample.name == name} <= {"orders"}
        return found

    def value(self, name: str) -> float:
        """Return the one value of a name."""
        (value,) = (sample.value for sample in self._samples if sample.name == name)
        return value

    @property
    def names(self) -> set[str]:
        """Names of all samples."""
        return {sample.name for sample in self._samples}


class Metered(Shop):
    """The page's shop, which records every answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._metrics = self._directory / "metrics"
        self._metrics.mkdir()
        self._answers: list[Answer] = []

    def _make_door(self, unix_socket: str) -> Door:
        return MeteredDoor(unix_socket)

    def _environment(self) -> dict[str, str]:
        where = {"REDIS_URL": self._server.url, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)}
        return {**super()._environment(), **where}

    def request(self, what: str) -> Answer:
        """Send one request, and record the answer."""
        answer = super().request(what)
        self._answers.append(answer)
        return answer

    def scrape(self) -> list[Page]:
        """Return pages of metrics without parallel calls, with at least one page of each worker.

        The calls on every page are as many as the clients made, and as reached the dependency.
        """
        pages = [Page(answer.page) for answer in self.answers_of_all("metrics", lambda _: True)]
        answered = collections.Counter(answer.outcome for answer in self._answers)
        assert answered["ok"] + answered["failed"] == len(self.visits(since=0.0))
        for page in pages:
            counted = collections.Counter(page.values("pybreaker_calls_total", "result"))
            assert (counted["success"], counted["failure"]) == (answered["ok"], answered["failed"])
        return pages


@pytest.fixture(params=WAYS, ids=operator.attrgetter("name"))
def metered(request: pytest.FixtureRequest, killable_server: PrivateServer, tmp_path: Path) -> Iterator[Metered]:
    """The shop of the page under gunicorn.  The workers must print no traceback."""
    kind: Kind = request.param
    if kind.missing():
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {kind.missing()}")
        pytest.skip(f"not installed: {kind.missing()}")
    for name in FILES:
        (source,) = (source for _, source in blocks("python", PAGE) if source.startswith(f"# {name}\n"))
        (tmp_path / name).write_text(source)
    with Metered(kind, killable_server, tmp_path, reset_timeout=1.0) as shop:
        yield shop
    print(shop.log)
    assert not [line for line in shop.log.splitlines() if any(alarm in line for alarm in ALARMS)]


def transitions(pages: list[Page]) -> dict[str, float]:
    """Return the number of transitions to each state, and assert that all pages agree."""
    first, *others = (page.values("pybreaker_transitions_total", "state") for page in pages)
    assert all(other == first for other in others)
    return first


def assert_pages_are_right(pages: list[Page], server: PrivateServer, state: str) -> None:
    """Assert that all pages show the circuit as it is in Redis, and each transition once."""
    with contextlib.closing(server.client(decode_responses=True)) as client:
        assert client.get(f"{CIRCUIT}state") == state
        failures = int(client.get(f"{CIRCUIT}fail_counter"))
        # Every transition raises the generation by one.
        generation = int(client.hget(f"{CIRCUIT}circuit", "generation") or 0)
    assert sum(transitions(pages).values()) == generation
    for page in pages:
        assert page.value("pybreaker_circuits_up") == 1
        shown = page.values("pybreaker_circuit_state", "state")
        assert shown == {each: each == state for each in ("closed", "open", "half-open")}
        assert page.values("pybreaker_circuit_failures", "breaker") == {"orders": failures}


def test_metrics_of_four_workers_are_right_on_every_page(metered: Metered, killable_server: PrivateServer):
    """Calls add up, each transition counts once, and no death of a worker or of Redis loses a sample."""
    metered.call_all("ok")
    assert_pages_are_right(metered.scrape(), killable_server, "closed")

    metered.set_dependency("down")
    metered.call_all("rejected")
    pages = metered.scrape()
    assert_pages_are_right(pages, killable_server, "open")
    counted = transitions(pages)
    # On a very busy machine a probe may have failed meanwhile.
    assert counted["open"] == counted.get("half-open", 0) + 1

    metered.set_dependency("up")
    metered.call_all("ok")
    pages = metered.scrape()
    assert_pages_are_right(pages, killable_server, "closed")
    counted = transitions(pages)
    assert counted == {"open": counted["open"], "half-open": counted["open"], "closed": 1}

    victim = min(metered.workers())
    os.kill(victim, signal.SIGKILL)
    metered.wait_for("a worker in its place", lambda: victim not in metered.workers() and len(metered.workers()) == 4)
    metered.call_all("ok")
    pages = metered.scrape()
    assert_pages_are_right(pages, killable_server, "closed")
    assert transitions(pages) == counted
    assert {page.value("shop_workers") for page in pages} == {4}

    killable_server.kill()
    metered.call_all("ok")
    pages = metered.scrape()
    assert {page.value("pybreaker_circuits_up") for page in pages} == {0}
    assert not [name for page in pages for name in page.names if name.startswith("pybreaker_circuit_")]
    assert transitions(pages) == counted
