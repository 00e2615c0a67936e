"""What is scraped from four workers of gunicorn, wired as the README shows: whichever is asked, it is the truth."""

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
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

#: What the README says belongs into files of these names.
FILES = ("shop.py", "gunicorn.conf.py")

#: The circuit, in Redis.
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


#: Workers that make their counters themselves, and such as inherit those of their master.
WAYS = (_gunicorn("sync"), _gunicorn("gthread-preload", "--worker-class", "gthread", "--threads", "4", "--preload"))


class MeteredDoor(HttpDoor):
    """One behind which there are pages of metrics, too."""

    def ask(self, what: str) -> dict[str, Any]:
        """The answer; a page comes with whose it is."""
        if what != "metrics":
            return super().ask(what)
        response, page = self.get(what)
        if response.status != HTTPStatus.OK:
            raise NoAnswer(f"{response.status}: {page}")
        return {"pid": int(response.headers["X-Worker"]), "page": page}


class Page:
    """What is on a page of metrics.

    Args:
        text: The page.
    """

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(self, name: str, label: str) -> dict[str, float]:
        """The values of one name, by what their label says; those of other circuits would be in the way."""
        found = {sample.labels[label]: sample.value for sample in self._samples if sample.name == name}
        assert {sample.labels["breaker"] for sample in self._samples if sample.name == name} <= {"orders"}
        return found

    def value(self, name: str) -> float:
        """The one value of that name."""
        (value,) = (sample.value for sample in self._samples if sample.name == name)
        return value

    @property
    def names(self) -> set[str]:
        """All there are."""
        return {sample.name for sample in self._samples}


class Metered(Shop):
    """The README's shop; it remembers every answer that anybody got."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self._metrics = self._directory / "metrics"
        self._metrics.mkdir()
        self._answers: list[Answer] = []

    def _make_door(self, unix_socket: str) -> Door:
        return MeteredDoor(unix_socket)

    def _environment(self) -> dict[str, str]:
        where = {"REDIS_URL": self._server.url, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)}
        return {**super()._environment(), **where}

    def ask(self, what: str) -> Answer:
        """Ask once."""
        answer = super().ask(what)
        self._answers.append(answer)
        return answer

    def scrape(self) -> list[Page]:
        """Pages of metrics, among them one of each worker at least, while nobody calls.

        Calls by result are on all of them what the clients were told, and what has reached the dependency.
        """
        pages = [Page(answer.page) for answer in self.hear_all("metrics", lambda _: True)]
        told = collections.Counter(answer.outcome for answer in self._answers)
        assert told["ok"] + told["failed"] == len(self.visits(since=0.0))
        for page in pages:
            counted = collections.Counter(page.values("pybreaker_calls_total", "result"))
            assert (counted["success"], counted["failure"]) == (told["ok"], told["failed"])
        return pages


@pytest.fixture(params=WAYS, ids=operator.attrgetter("name"))
def metered(request: pytest.FixtureRequest, killable_server: PrivateServer, tmp_path: Path) -> Iterator[Metered]:
    """The shop, as it stands in the README, under gunicorn; no worker may print a traceback."""
    kind: Kind = request.param
    if kind.missing():
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {kind.missing()}")
        pytest.skip(f"not installed: {kind.missing()}")
    for name in FILES:
        (source,) = (source for _, source in blocks("python") if source.startswith(f"# {name}\n"))
        (tmp_path / name).write_text(source)
    with Metered(kind, killable_server, tmp_path, reset_timeout=1.0) as shop:
        yield shop
    print(shop.log)
    assert not [line for line in shop.log.splitlines() if any(alarm in line for alarm in ALARMS)]


def transitions(pages: list[Page]) -> dict[str, float]:
    """How many there were to each state; on all pages the same."""
    first, *others = (page.values("pybreaker_transitions_total", "state") for page in pages)
    assert all(other == first for other in others)
    return first


def assert_told_as_it_is(pages: list[Page], server: PrivateServer, state: str) -> None:
    """All pages show the circuit as it lies in Redis, and each of its transitions once."""
    with contextlib.closing(server.client(decode_responses=True)) as client:
        assert client.get(f"{CIRCUIT}state") == state
        failures = int(client.get(f"{CIRCUIT}fail_counter"))
        # Every transition makes it one more.
        generation = int(client.hget(f"{CIRCUIT}circuit", "generation") or 0)
    assert sum(transitions(pages).values()) == generation
    for page in pages:
        assert page.value("pybreaker_circuits_up") == 1
        shown = page.values("pybreaker_circuit_state", "state")
        assert shown == {each: each == state for each in ("closed", "open", "half-open")}
        assert page.values("pybreaker_circuit_failures", "breaker") == {"orders": failures}


def test_scraped_metrics_of_four_workers_are_the_truth(metered: Metered, killable_server: PrivateServer):
    """Calls add up, transitions are counted once, the state is Redis's; no death of a worker or of Redis loses any."""
    metered.call_all("ok")
    assert_told_as_it_is(metered.scrape(), killable_server, "closed")

    metered.set_dependency("down")
    metered.call_all("rejected")
    pages = metered.scrape()
    assert_told_as_it_is(pages, killable_server, "open")
    counted = transitions(pages)
    # On a machine that is busy enough a probe may have failed meanwhile.
    assert counted["open"] == counted.get("half-open", 0) + 1

    metered.set_dependency("up")
    metered.call_all("ok")
    pages = metered.scrape()
    assert_told_as_it_is(pages, killable_server, "closed")
    counted = transitions(pages)
    assert counted == {"open": counted["open"], "half-open": counted["open"], "closed": 1}

    victim = min(metered.workers())
    os.kill(victim, signal.SIGKILL)
    metered.wait_for("a worker in its place", lambda: victim not in metered.workers() and len(metered.workers()) == 4)
    metered.call_all("ok")
    pages = metered.scrape()
    assert_told_as_it_is(pages, killable_server, "closed")
    assert transitions(pages) == counted
    assert {page.value("shop_workers") for page in pages} == {4}

    killable_server.kill()
    metered.call_all("ok")
    pages = metered.scrape()
    assert {page.value("pybreaker_circuits_up") for page in pages} == {0}
    assert not [name for page in pages for name in page.names if name.startswith("pybreaker_circuit_")]
    assert transitions(pages) == counted
