"""Fixtures for all tests: private servers, fleets of processes, and a storage that must break what ours keeps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._replica import listener as listener_module
from pybreaker_redis._replica import session
from pybreaker_redis._replica.connection import PushConnection
from pybreaker_redis._runtime import redaction
from pybreaker_redis._servers import settings_check
from pybreaker_redis._servers import table as server_table
from pybreaker_redis.registry import settings
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import places, servers
from tests.support.clients import PROTOCOLS
from tests.support.faults import Site, site_of
from tests.support.fleet import Fleet, Make, Shared, Spec, Visits
from tests.support.inspect import keepers, listeners
from tests.support.servers import FoundServer, no_server
from tests.support.summary import CELL, FIGURE, HEARD, SERVER, Summary
from tests.support.tls import Certificates, certificates
from tests.support.wait import wait_for


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the summary; workers of pytest-xdist print none."""
    config.addinivalue_line("markers", "slow: takes several seconds because what it promises is about seconds")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(places.client_name()), "summary")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fleet is many processes, and what it shows takes its time."""
    for item in items:
        if "fleet_of" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def pytest_report_header() -> list[str]:
    """Say which servers there are before anything runs."""
    return servers.summary()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Show some text at the end of the test run."""
    return lambda text: request.node.user_properties.append((FIGURE, text))


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[FoundServer], PrivateServer]]:
    """The one running server of each binary: started when first asked for, restarted if a test has ended it."""
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
    """A running server of some binary, with nothing in it."""

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
    """The preferred server, empty. Tests that end or freeze it take `killable_server`."""
    return empty_server(preferred)


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def every_server(request: pytest.FixtureRequest, empty_server: Callable[[FoundServer], PrivateServer]) -> PrivateServer:
    """Each server at hand in turn, empty."""
    if request.param is None:
        no_server()
    return empty_server(request.param)


@pytest.fixture
def killable_server(preferred: FoundServer) -> Iterator[PrivateServer]:
    """A server of this test alone, to be killed, frozen and restarted."""
    with PrivateServer(preferred.binary) as server:
        yield server


@pytest.fixture
def client(server: PrivateServer) -> Iterator[redis.Redis]:
    """A plain client of the preferred server."""
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an outage is not the subject, a busy machine shall be none: calls wait for Redis much longer than usual."""
    for usual in (CircuitRedisStorage.__init__.__kwdefaults__, settings.STORAGE_DEFAULTS):
        monkeypatch.setitem(usual, "timeout", 10.0)


# -- the matrix --------------------------------------------------------------------------------------------------------


@pytest.fixture
def matrix_cell(request: pytest.FixtureRequest) -> Callable[[places.Place], None]:
    """Note what becomes of this test in the cell of a place."""

    def note(place: places.Place) -> None:
        version = ".".join(place.found.version.split(".")[:2])
        request.node.user_properties.append((CELL, (f"{place.found.product} {version}", place.kind)))

    return note


@pytest.fixture
def matrix_heard(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note how changes are heard there."""

    def note(heard: str) -> None:
        request.node.user_properties.append((HEARD, heard))

    return note


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of the local host, and of a client."""
    return certificates(tmp_path_factory.mktemp("tls"))


# -- fleets ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "stock"])
def make(request: pytest.FixtureRequest) -> Make:
    """Whose storage: ours, which must keep a promise, and the one that comes with pybreaker, which must break it."""
    made: Make = request.param
    return made


@pytest.fixture
def promised(make: Make) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Assertions that hold with our storage, and of which one fails with the stock one: so the test can fail."""

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
        pytest.fail("the stock storage keeps this promise: the test does not tell the two apart")

    return block


@pytest.fixture
def fleet_of(make: Make, server: PrivateServer, tmp_path: Path) -> Callable[..., Fleet]:
    """Build a fleet: ``fleet_of(8, reset_timeout=1.0)``; ``clock_skew`` may be a list, one for each worker."""

    def build(workers: int, **words: Any) -> Fleet:
        skew = words.pop("clock_skew", 0.0)
        skews = skew if isinstance(skew, list) else [skew] * workers
        spec = {"make": make, "place": server.unix_socket, "log": str(tmp_path / "calls"), **words}
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


@pytest.fixture(params=PROTOCOLS, ids=lambda protocol: f"resp{protocol}")
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the listener speaks; as much as it can, unless kept from it."""
    if request.param != max(PROTOCOLS):
        monkeypatch.setattr(PushConnection, "_connect_resp3", lambda self, origin: None)
    chosen: int = request.param
    return chosen


@pytest.fixture(autouse=True, scope="session")
def _listeners_look_round_often() -> Iterator[None]:
    """A thread that nobody needs any more ends sooner than usual: hundreds of tests wait until there is none."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (listener_module, session):
            patch.setattr(module, "LISTENER_WAIT_MAX_S", 0.1)
        yield


@pytest.fixture(autouse=True, scope="module")
def _nothing_lingers() -> Iterator[None]:
    """Storages go with the garbage collector, their threads and sockets, too: not in the middle of other tests."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def nobody_has_twins() -> None:
    """Storages of earlier tests may still be there, with other settings: what is said of that is for tests of that."""
    settings_check._twins._circuits.clear()


@pytest.fixture(autouse=True)
def _no_secret_is_known() -> None:
    """Passwords of earlier tests are short words, which would be masked in the lines of this one."""
    redaction._patterns_of_secrets.clear()


@pytest.fixture
def nobody_listens() -> None:
    """The test begins without a thread: those of earlier ones end when their storages have gone."""
    gc.collect()
    for listener in listener_module._listeners._by_server.values():
        # A test that failed is kept, with its storages, for its traceback.
        for item in listener.subscriber_table.snapshot():
            listener.subscriber_table.remove_subscriber(item.view)
    for server in [*server_table._servers._server_by_key.values()]:
        # Nor shall anybody bring back what an earlier test has learned in an outage of a busy machine.
        with server._lock:
            server._members.clear()
    wait_for(lambda: not listeners() and not keepers(), "the threads of earlier tests end")
    listener_module._listeners._by_server.clear()


@pytest.fixture
def site(preferred) -> Iterator[Site]:
    """A server of this test alone, behind a proxy."""
    with PrivateServer(preferred.binary) as server, site_of(server) as site:
        yield site
