"""Fixtures for all tests: private servers, fleets of processes, and the stock storage as a counter-proof."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis.registry import settings
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import places, selection, servers
from tests.support.clients import PROTOCOLS
from tests.support.faults import Site, site_of
from tests.support.fleet import Fleet, Make, Shared, Spec, Visits
from tests.support.inspect import (
    disable_resp3,
    forget_secrets,
    listeners,
    release_members,
    release_subscribers,
    reset_listeners,
    reset_settings_check,
    retry_threads,
    shorten_listener_waits,
)
from tests.support.servers import FoundServer, no_server
from tests.support.summary import CELL, FIGURE, PUSH, SERVER, Summary
from tests.support.tls import Certificates, certificates
from tests.support.wait import wait_for


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the summary.  Workers of pytest-xdist print none."""
    config.addinivalue_line("markers", "slow: takes several seconds because its promise is about seconds; see --full")
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "other_server: runs on another server than the preferred one, see --full")
    config.addinivalue_line("markers", "unmodified: is about the unmodified breaker, see tests/support/ways.py")
    config.addinivalue_line("markers", "sample: runs without --full although it is slow")
    selection.is_full = config.option.full
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(places.client_name()), "summary")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full``."""
    parser.addoption("--full", action="store_true", help="run also every other server, client, fleet and fault")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of fleets as slow, and leave to ``--full`` what the default does not run."""
    for item in items:
        if "fleet_of" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    selection.select(config, items)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return the servers that the tests run on, and what is left out."""
    extent = [] if config.option.full else ["tests: without --full a sample of servers, clients, fleets and faults"]
    return [*servers.summary(), *extent]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Function that shows some text at the end of the test run."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[FoundServer], PrivateServer]]:
    """The one running server of each binary, started on demand and restarted if a test has ended it."""
    with contextlib.ExitStack() as stack:
        started: dict[str, PrivateServer] = {}

        def run(found: FoundServer) -> PrivateServer:
            if found.binary not in started:
                started[found.binary] = stack.enter_context(PrivateServer(found.binary))
            return started[found.binary].start()

        yield run


@pytest.fixture
def empty_server(
    running: Callable[[FoundServer], PrivateServer], request: pytest.FixtureRequest
) -> Callable[[FoundServer], PrivateServer]:
    """Function that returns a running server of some binary, without data."""

    def take(found: FoundServer) -> PrivateServer:
        server = running(found)
        with contextlib.closing(server.client()) as client:
            client.flushall()
        request.node.user_properties.append((SERVER, str(found)))
        return server

    return take


@pytest.fixture(scope="session")
def preferred() -> FoundServer:
    """The binary for tests that need just one."""
    found = servers.at_hand()
    if not found:
        no_server()
    return found[0]


@pytest.fixture
def server(empty_server: Callable[[FoundServer], PrivateServer], preferred: FoundServer) -> PrivateServer:
    """The preferred server, without data.  Tests that end or freeze a server use `killable_server`."""
    return empty_server(preferred)


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def every_server(request: pytest.FixtureRequest, empty_server: Callable[[FoundServer], PrivateServer]) -> PrivateServer:
    """Each server at hand in turn, without data."""
    if request.param is None:
        no_server()
    return empty_server(request.param)


@pytest.fixture
def killable_server(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A server of this test alone, which may be killed, frozen and restarted."""
    with PrivateServer(preferred.binary) as server:
        yield server


@pytest.fixture
def client(server: PrivateServer) -> Iterator[redis.Redis]:
    """A plain client of the preferred server."""
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls wait much longer for Redis, so that a slow answer of a busy machine does not count as an outage."""
    for usual in (CircuitRedisStorage.__init__.__kwdefaults__, settings.STORAGE_DEFAULTS):
        monkeypatch.setitem(usual, "timeout", 10.0)


# -- the matrix --------------------------------------------------------------------------------------------------------


@pytest.fixture
def matrix_cell(request: pytest.FixtureRequest) -> Callable[[places.Place], None]:
    """Function that records the result of this test in the matrix cell of a place."""

    def note(place: places.Place) -> None:
        version = ".".join(place.found.version.split(".")[:2])
        request.node.user_properties.append((CELL, (f"{place.found.product} {version}", place.kind)))

    return note


@pytest.fixture
def matrix_push(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Function that records the kind of push for changes in the cell."""

    def note(push: str) -> None:
        request.node.user_properties.append((PUSH, push))

    return note


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of the local host and of a client."""
    return certificates(tmp_path_factory.mktemp("tls"))


# -- fleets ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "stock"])
def make(request: pytest.FixtureRequest) -> Make:
    """Origin of the storage: this package, which must keep a promise, or stock, which must break it."""
    made: Make = request.param
    return made


@pytest.fixture
def promised(make: Make) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Context for assertions that hold with our storage and of which one fails with stock, as a counter-proof."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        if make == "ours":
            yield
            return
        try:
            yield
        except AssertionError as exc:
            print("broken by the stock storage:", str(exc).partition("\n")[0])
            return
        pytest.fail("the stock storage keeps this promise, so the test cannot fail")

    return block


@pytest.fixture
def fleet_of(make: Make, server: PrivateServer, tmp_path: Path) -> Callable[..., Fleet]:
    """Function that builds a fleet: ``fleet_of(8, reset_timeout=1.0)``.

    ``clock_skew`` may be a list, one value for each worker.
    """

    def build(workers: int, **options: Any) -> Fleet:
        skew = options.pop("clock_skew", 0.0)
        skews = skew if isinstance(skew, list) else [skew] * workers
        spec = {"make": make, "place": server.unix_socket, "log": str(tmp_path / "calls"), **options}
        return Fleet(Spec(**spec, clock_skew=seconds) for seconds in skews)

    return build


@pytest.fixture
def shared(client: redis.Redis) -> Shared:
    """The shared record of the fleet's circuit."""
    return Shared(client)


@pytest.fixture
def visits(tmp_path: Path) -> Visits:
    """The calls that reached the fleet's dependency."""
    return Visits(tmp_path / "calls")


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=selection.but_for(PROTOCOLS[:1], PROTOCOLS), ids=lambda protocol: f"resp{protocol}")
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Protocol of the push connection: the highest one that the client supports, or a forced lower one."""
    if request.param != max(PROTOCOLS):
        disable_resp3(monkeypatch)
    chosen: int = request.param
    return chosen


@pytest.fixture(autouse=True, scope="session")
def _listeners_look_round_often() -> Iterator[None]:
    """Let threads without work end sooner than usual, because hundreds of tests wait for their end."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_listener_waits(patch, 0.1)
        yield


@pytest.fixture(autouse=True, scope="module")
def _nothing_lingers() -> Iterator[None]:
    """Collect storages after each module, so that their threads and sockets do not end in the middle of other tests."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _no_settings_of_earlier_tests() -> None:
    """Forget settings of earlier tests' storages, so that only tests of such conflicts log a line about them."""
    reset_settings_check()


@pytest.fixture(autouse=True)
def _no_secret_is_known() -> None:
    """Forget passwords of earlier tests, short words that would be masked in the log lines of this test."""
    forget_secrets()


@pytest.fixture
def no_listeners() -> None:
    """Start the test without listeners and retry threads, which end with the storages of earlier tests."""
    gc.collect()
    # pytest keeps a failed test for its traceback, and with it the storages.
    release_subscribers()
    release_members()

    def has_no_threads() -> bool:
        # A thread may hold the last reference to a storage in one of its frames, for a moment.
        gc.collect()
        return not listeners() and not retry_threads()

    wait_for(has_no_threads, "the threads of earlier tests have ended")
    reset_listeners()


@pytest.fixture
def site(preferred) -> Iterator[Site]:
    """A server of this test alone, behind a proxy."""
    with PrivateServer(preferred.binary) as server, site_of(server) as site:
        yield site
