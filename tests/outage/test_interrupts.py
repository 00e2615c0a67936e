"""Exceptions raised into a wait for Redis from outside reach the caller and do not count against Redis."""

from __future__ import annotations

import ctypes
import functools
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import pybreaker
import pytest
import redis
from redis.sentinel import Sentinel

from pybreaker_redis._circuits.bulk import read_for_operator
from pybreaker_redis._circuits.failover import Failover
from pybreaker_redis._redis.cluster import ClusterTopology
from pybreaker_redis._redis.connections import pool as pool_module
from pybreaker_redis._redis.connections.deadline import deadline
from pybreaker_redis._redis.url import client_source_from_url
from pybreaker_redis._runtime.interruption import find_interruption, suppress_errors
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import Down, breaker_on, up
from tests.support.faults import Site
from tests.support.inspect import (
    core_of,
    note_interruption,
    replace_client_copy,
    replace_shared_execution,
    replace_slot_query,
    server_of,
    storage_of,
)
from tests.support.interrupts import JobTimeout, SoftTimeout, alarm, frozen, raising
from tests.support.logs import lines_of
from tests.support.outages import health_of, is_back
from tests.support.places import has_clusters
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: Seconds that a call waits for a frozen server: longer than any interruption takes to arrive.
LONG = 10.0


class CacheDown(Exception):
    """Exception into which a wrapper of a client translates the client's errors."""


def querying_breaker(site: Site, **settings: Any) -> pybreaker.CircuitBreaker:
    """Return a breaker that queries Redis at each call."""
    breaker = breaker_on(site.client(), max_staleness=0, timeout=LONG, **settings)
    breaker.call(up)
    return breaker


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("of the application"),
        SoftTimeout("of the application"),
        OSError("of the application"),
        pytest.param(ConnectionResetError("of the application"), marks=pytest.mark.full),
        BlockingIOError("of the application"),
        redis.ConnectionError("of the application"),
        ValueError("of the application"),
        JobTimeout("of the application"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_a_signal_handler_reaches_the_application_whatever_its_class(
    site: Site, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The application gets the error itself, even of a class that client libraries wrap as a network error."""
    breaker = querying_breaker(site)
    with frozen(site), alarm(raising(error)), pytest.raises(type(error)) as raised:
        breaker.call(up)
    assert raised.value is error
    assert breaker.call(up) == "answer"
    health = health_of(breaker)
    assert (health.condition, health.is_own, health.last_error) == ("connected", False, "")
    assert lines_of(caplog, site) == []


def test_error_of_a_signal_handler_reaches_the_application_from_a_report(site: Site) -> None:
    """The signal's error is distinguished from the dependency's, which is handled when the signal arrives."""
    breaker = querying_breaker(site, fail_max=100)

    def fails_late() -> NoReturn:
        site.server.pause()
        raise Down

    with alarm(raising(TimeoutError("limit")), 0.3), pytest.raises(TimeoutError, match="limit"):
        breaker.call(fails_late)
    site.server.resume()
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == ""


def test_outage_during_the_handling_of_an_earlier_interruption_counts(site: Site) -> None:
    """An outage during the handling of an earlier interruption counts as an outage."""
    breaker = querying_breaker(site)
    try:
        with alarm(raising(TimeoutError("earlier")), 0.01):
            time.sleep(5)
    except TimeoutError:
        site.proxy.refuse()
        site.proxy.close_connections()
        assert breaker.call(up) == "answer"
        assert health_of(breaker).condition == "unreachable"
        site.proxy.listen()
    wait_for(lambda: is_back(breaker), "the return is noticed")


@pytest.mark.parametrize("is_bounded", [True, False], ids=["bounded copy of the client", "the client unchanged"])
def test_reply_to_an_interrupted_command_reaches_no_later_command(site: Site, is_bounded: bool) -> None:
    """The connection that was interrupted is dropped, because its reply may arrive later."""
    # A client without a timeout of ours may retry by itself, whatever ended the first attempt.
    settings: dict[str, Any] = {"timeout": LONG if is_bounded else None, "max_staleness": 0}
    breaker = breaker_on(site.client(**ONCE), **settings)
    other = breaker_on(site.client(**ONCE), "other", **settings)
    other.open()
    breaker.call(up)
    for _ in range(3):
        with frozen(site), alarm(raising(TimeoutError("limit"))), pytest.raises(TimeoutError, match="limit"):
            breaker.call(up)
        assert (breaker.current_state, other.current_state) == ("closed", "open")


def test_connection_interrupted_in_its_handshake_is_not_reused(site: Site) -> None:
    """After an interrupted handshake, without AUTH, a connection is not reused."""
    silent = querying_breaker(site)
    storage: Any = storage_of(silent)
    server_of(storage).close_idle_pools()
    with frozen(site), alarm(raising(JobTimeout())), pytest.raises(JobTimeout):
        silent.call(up)
    assert silent.call(up) == "answer"
    assert health_of(silent).last_error == ""


@pytest.mark.full
def test_error_of_a_handler_during_a_query_to_sentinels_is_raised(site: Site) -> None:
    """An interruption of a query to a Sentinel is raised, although its client takes it for a dead Sentinel."""
    sentinel = Sentinel([("127.0.0.1", site.proxy.port)] * 2, socket_timeout=LONG)
    breaker = breaker_on(sentinel.master_for("mymaster"), timeout=LONG)
    with frozen(site), alarm(raising(TimeoutError("limit"))), pytest.raises(TimeoutError, match="limit"):
        breaker.call(up)
    assert health_of(breaker).last_error == ""


@pytest.mark.parametrize("kind", ["partial", "method", "object", "restores its predecessor"])
def test_every_kind_of_handler_is_recognised(kind: str) -> None:
    """A handler is recognised as a function, method or callable object, and if it has restored its predecessor."""

    class Limit:
        def __call__(self, *_: object) -> NoReturn:
            raise TimeoutError

        def expire(self, number: int, frame: object) -> NoReturn:
            raise TimeoutError

    def restores(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise TimeoutError

    handlers: dict[str, Any] = {
        "partial": functools.partial(Limit.expire, Limit()),
        "method": Limit().expire,
        "object": Limit(),
        "restores its predecessor": restores,
    }
    # A timer might expire before the block begins.
    with alarm(handlers[kind], after=60):
        error = caught(lambda: signal.raise_signal(signal.SIGALRM))
        assert find_interruption(error) is error


def test_wrapped_error_of_a_handler_is_found() -> None:
    """A signal handler's error is found behind the errors that codecs and libraries raise from it."""
    interruption = TimeoutError("limit")

    def wraps() -> NoReturn:
        try:
            with alarm(raising(interruption), 0.01):
                time.sleep(5)
        except TimeoutError as error:
            try:
                raise UnicodeError("encoding with 'idna' codec failed") from error
            except UnicodeError:
                raise redis.ConnectionError("wrapped twice")  # noqa: B904

    with pytest.raises(redis.ConnectionError) as raised:
        wraps()
    assert find_interruption(raised.value) is interruption


# -- through the interpreter -------------------------------------------------------------------------------------------


def interrupt(thread: threading.Thread, error: type[BaseException]) -> None:
    """Make the interpreter raise an error in a thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


@pytest.mark.parametrize("error", [JobTimeout, SoftTimeout])
def test_error_raised_by_another_thread_reaches_the_call(site: Site, error: type[Exception]) -> None:
    """An error that another thread raises here, as by RQ and stopit, reaches the call when its wait ends."""
    breaker = breaker_on(site.client(), max_staleness=0, timeout=2.0)
    breaker.call(up)
    ended: list[BaseException] = []
    waits = threading.Event()

    def call() -> None:
        waits.set()
        try:
            breaker.call(up)
        except BaseException as raised:  # noqa: BLE001
            ended.append(raised)

    thread = threading.Thread(target=call)
    with frozen(site):
        thread.start()
        waits.wait(10)
        time.sleep(0.2)  # long enough that the thread waits for the server
        interrupt(thread, error)
        # An answer before the timeout is no outage.
    thread.join(10)
    assert [type(item) for item in ended] == [error]
    assert breaker.call(up) == "answer"


PROGRAM = """
from gevent import monkey
monkey.patch_all()
import gevent, redis, pybreaker
from pybreaker_redis import CircuitRedisStorage

class TimeLimit(Exception):
    pass

class SoftLimit(TimeoutError):
    pass

client = redis.Redis(host="127.0.0.1", port={port}, username="app", password="any")
storage = CircuitRedisStorage("closed", client, "limit", timeout=20, max_staleness=0)
breaker = pybreaker.CircuitBreaker(state_storage=storage)
breaker.call(int)
{administrator}.execute_command("CLIENT", "PAUSE", 3000, "ALL")

def killed(error):
    caller = gevent.spawn(breaker.call, int)
    gevent.sleep(0.2)
    caller.kill(error, block=False)
    caller.get()

def throws(error):
    caller = gevent.getcurrent()
    gevent.spawn_later(0.2, lambda: caller.throw(error))
    breaker.call(int)

def limited(error):
    with gevent.Timeout(0.2, error):
        breaker.call(int)

def bare(_):
    with gevent.Timeout(0.2):
        breaker.call(int)

for interrupt, error in [
    (limited, TimeLimit("x")), (limited, SoftLimit("x")), (bare, gevent.Timeout()), (killed, TimeLimit("x")),
    (throws, TimeLimit("x")), (throws, TimeLimit),
]:
    try:
        interrupt(error)
    except BaseException as seen:
        kind = error if isinstance(error, type) else type(error)
        print("ok" if type(seen) is kind else repr(seen), storage.health().last_error, storage.health().condition)
    else:
        print("swallowed")
"""


def test_time_limits_of_greenlets_reach_the_call(site: Site) -> None:
    """A gevent timeout or kill reaches the call with its class, or with the application's class."""
    pytest.importorskip("gevent")
    administrator = f"redis.Redis(unix_socket_path={site.server.unix_socket!r})"
    program = PROGRAM.format(port=site.proxy.port, administrator=administrator)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["ok  connected"] * 6, done.stderr


# -- errors that stay inside -------------------------------------------------------------------------------------------


def caught(raises: Callable[[], object]) -> Exception:
    """Return the error that a function raises."""
    try:
        raises()
    except Exception as error:  # noqa: BLE001
        return error
    pytest.fail("nothing was raised")


def test_class_of_an_error_decides_without_other_evidence() -> None:
    """Without other evidence the class decides: errors of client libraries and of the standard library stay inside."""

    class Denied(redis.exceptions.NoPermissionError):
        """Application class derived from a class of the client library."""

    for error in (KeyError("key"), AttributeError("none"), OSError(), redis.RedisError(), Denied()):
        assert find_interruption(caught(functools.partial(raising(error), 1, None))) is None
    assert isinstance(find_interruption(caught(functools.partial(raising(JobTimeout()), 1, None))), JobTimeout)
    assert isinstance(find_interruption(JobTimeout()), JobTimeout)


def test_error_into_which_a_wrapper_translates_a_client_error_stays_inside(site: Site) -> None:
    """A wrapper's translation of a client error counts as an error of Redis."""

    def refused() -> NoReturn:
        raise redis.ConnectionError("refused")

    def translates() -> None:
        try:
            refused()
        except redis.RedisError:
            raise CacheDown  # noqa: B904

    def retries() -> None:
        try:
            refused()
        except redis.RedisError as error:
            cause = error
        raise CacheDown from cause

    assert find_interruption(caught(translates)) is None
    assert find_interruption(caught(retries)) is None
    handled = KeyError("of the caller")
    later = CacheDown()
    later.__context__ = handled
    assert find_interruption(caught(functools.partial(raising(later), 1, None)), handled) is later


def test_error_of_a_client_source_stays_inside() -> None:
    """An error of a client source concerns the configuration of Redis and may have any class."""

    def client_source() -> NoReturn:
        raise CacheDown("no setting")

    breaker = breaker_on(client_source)
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "CacheDown: no setting"


def test_interruption_of_a_client_source_reaches_the_call() -> None:
    """An interruption of a client source reaches the call, because such a source may wait for a connection."""

    def client_source() -> NoReturn:
        time.sleep(5)
        raise CacheDown

    breaker = breaker_on(client_source)
    with alarm(raising(OSError("limit"))), pytest.raises(OSError, match="limit"):
        breaker.call(up)
    assert health_of(breaker).last_error == ""


@pytest.mark.skipif(redis.VERSION < (4, 5), reason="this client has no sources of credentials")
def test_error_of_a_source_of_credentials_stays_inside(site: Site) -> None:
    """An error of a source of credentials concerns the configuration of Redis and may have any class."""

    class Source(redis.CredentialProvider):
        def get_credentials(self) -> NoReturn:
            raise CacheDown("no token")

    client = redis.Redis(host="127.0.0.1", port=site.proxy.port, credential_provider=Source())
    breaker = breaker_on(client)
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "CacheDown: no token"


def test_error_of_a_log_handler_stays_inside_and_a_signal_in_it_does_not(site: Site) -> None:
    """An error of a log handler stays inside.  An exception that interrupts the handler reaches the call."""

    class Broken(logging.Handler):
        pauses = 0.0

        def emit(self, record: logging.LogRecord) -> NoReturn:
            time.sleep(self.pauses)
            raise CacheDown

    logger, handler = logging.getLogger("pybreaker_redis"), Broken()
    logger.addHandler(handler)
    try:
        site.proxy.refuse()
        breaker = breaker_on(site.client())
        assert breaker.call(up) == "answer"
        handler.pauses = 5.0
        second = breaker_on(lambda: 1 / 0)
        with alarm(raising(OSError("limit"))), pytest.raises(OSError, match="limit"):
            second.call(up)
    finally:
        logger.removeHandler(handler)


def test_bug_of_a_client_library_stays_inside(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of a client library stays inside, because the caller cannot act on it."""
    breaker = querying_breaker(site)
    monkeypatch.setattr(redis.connection.Connection, "read_response", lambda self, **settings: {}["bug"])
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "KeyError: 'bug'"


def test_time_limit_that_a_library_suppressed_is_raised_at_the_end() -> None:
    """An interruption that a library suppressed is raised at the end of the operation, whatever its result."""

    def operate(error: Exception | None) -> None:
        with deadline(LONG):
            note_interruption(JobTimeout())
            if error:
                raise error

    for error in (None, KeyError()):
        with pytest.raises(JobTimeout):
            operate(error)


def test_interruptions_are_not_suppressed() -> None:
    """Errors of Redis are suppressed, interruptions are not."""
    with suppress_errors():
        raise KeyError
    with pytest.raises(JobTimeout), suppress_errors():
        raise JobTimeout


# -- surveys, bulk reads and pools -------------------------------------------------------------------------------------


def test_time_limit_ends_the_survey_of_cluster_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption ends the survey of cluster nodes, while a dead node only leads to the next one."""
    cluster = ClusterTopology(
        None, lambda address: None, [("a", 1), ("b", 2)], lambda slot: None, lambda address: address
    )
    replace_slot_query(monkeypatch, lambda *_: raising(JobTimeout())(1, None))
    with pytest.raises(JobTimeout):
        cluster.refresh()


@pytest.mark.skipif(not has_clusters(), reason="no installed library has a cluster client")
def test_time_limit_ends_the_search_for_a_host_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption ends the search for a cluster host of a URL."""
    make = client_source_from_url("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    monkeypatch.setattr(redis.connection.Connection, "connect", lambda self: raising(JobTimeout())(1, None))
    with deadline(LONG), pytest.raises(JobTimeout):
        make()


def test_time_limit_while_a_client_is_copied_leaves_its_kind_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption while a client is copied does not make the package treat the client as an unknown kind."""
    client = redis.Redis(port=1)
    with monkeypatch.context() as patched:
        replace_client_copy(patched, lambda *_, **__: raising(JobTimeout())(1, None))
        with pytest.raises(JobTimeout):
            server_for(client).client_with_timeout(client, 1.0)
    assert server_for(client).client_with_timeout(client, 1.0) is not client


def test_time_limit_ends_a_bulk_read(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """An interruption ends a bulk read.  The fallback to single reads is for other errors."""
    breaker = querying_breaker(site)
    storage: Any = storage_of(breaker)
    monkeypatch.setattr(
        "pybreaker_redis._circuits.bulk.read_all_circuits", lambda requests: raising(JobTimeout())(1, None)
    )
    with pytest.raises(JobTimeout):
        read_for_operator([core_of(storage)])


def test_time_limit_in_the_read_after_a_refused_write_reaches_the_call(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption of the read after a refused write reaches the call."""
    breaker = querying_breaker(site, fail_max=100)
    site.permit("+@all", "-@write")
    monkeypatch.setattr(Failover, "load", lambda self, **settings: raising(JobTimeout())(1, None))
    with pytest.raises(JobTimeout):
        breaker.call(lambda: 1 / 0)


def test_interruption_closes_idle_connections(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception from outside closes idle connections, because one of them may still receive a reply."""
    breaker = querying_breaker(site)
    storage: Any = storage_of(breaker)
    pool = SimpleNamespace(pool=None, disconnect=lambda **settings: dropped.append(settings["inuse_connections"]))
    dropped: list[bool] = []
    monkeypatch.setattr(server_of(storage), "close_idle_pools", lambda: pool_module.close_idle_connections(pool))
    replace_shared_execution(monkeypatch, storage, lambda intent: raising(KeyboardInterrupt())(1, None))
    with pytest.raises(KeyboardInterrupt):
        breaker.call(up)
    monkeypatch.setattr(core_of(storage), "server", None)
    with pytest.raises(KeyboardInterrupt):
        breaker.call(up)
    assert dropped == [False]


def test_time_limit_in_a_lazy_client_reaches_the_call(site: Site) -> None:
    """An interruption reaches the call through a lazy client that connects at the first look-up of a method."""

    class Lazy:
        waits = 0.0

        @property
        def evalsha(self) -> Any:
            seconds, self.waits = self.waits, 0.0
            time.sleep(seconds)
            return site.client().evalsha

        def __getattr__(self, name: str) -> Any:
            return getattr(site.client(), name)

    lazy = Lazy()
    breaker = breaker_on(lazy, max_staleness=0, timeout=LONG)
    lazy.waits = LONG
    with alarm(raising(JobTimeout())), pytest.raises(JobTimeout):
        breaker.call(up)
