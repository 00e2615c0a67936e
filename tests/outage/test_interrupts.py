"""Exceptions that are raised into a wait for Redis from outside reach their owner, and Redis is not blamed."""

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
from pybreaker_redis._redis import pool as pool_module
from pybreaker_redis._redis.cluster import ClusterTopology
from pybreaker_redis._redis.deadline import _note_interruption, deadline
from pybreaker_redis._redis.url import client_source_from_url
from pybreaker_redis._runtime.interruption import find_interruption, suppress_errors
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import Down, breaker_on, up
from tests.support.faults import Site
from tests.support.interrupts import JobTimeout, SoftTimeout, alarm, frozen, raising
from tests.support.logs import lines_of
from tests.support.outages import health_of, is_back
from tests.support.places import has_clusters
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: Seconds that a call waits for a frozen server, so that what strikes it is noticed before that.
LONG = 10.0


class CacheDown(Exception):
    """What a wrapper of a client makes of the client's errors."""


def asking(site: Site, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker that asks Redis at each call."""
    breaker = breaker_on(site.client(), max_staleness=0, timeout=LONG, **words)
    breaker.call(up)
    return breaker


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("of the application"),
        SoftTimeout("of the application"),
        OSError("of the application"),
        ConnectionResetError("of the application"),
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
    """The client library wraps classes that it takes for the network's; the application gets the error itself."""
    breaker = asking(site)
    with frozen(site), alarm(raising(error)), pytest.raises(type(error)) as raised:
        breaker.call(up)
    assert raised.value is error
    assert breaker.call(up) == "answer"
    health = health_of(breaker)
    assert (health.condition, health.is_own, health.last_error) == ("connected", False, "")
    assert lines_of(caplog, site) == []


def test_error_of_a_signal_handler_reaches_the_application_from_a_report(site: Site) -> None:
    """The call was handling the error of its dependency, which is not the one that was raised from outside."""
    breaker = asking(site, fail_max=100)

    def fails_late() -> NoReturn:
        site.server.pause()
        raise Down

    with alarm(raising(TimeoutError("limit")), 0.3), pytest.raises(TimeoutError, match="limit"):
        breaker.call(fails_late)
    site.server.resume()
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == ""


def test_error_of_an_earlier_handler_is_not_raised_again(site: Site) -> None:
    """A call that is made while such an error is handled meets an outage of its own."""
    breaker = asking(site)
    try:
        with alarm(raising(TimeoutError("earlier")), 0.01):
            time.sleep(5)
    except TimeoutError:
        site.proxy.refuse()
        site.proxy.hang_up()
        assert breaker.call(up) == "answer"
        assert health_of(breaker).condition == "unreachable"
        site.proxy.listen()
    wait_for(lambda: is_back(breaker), "it is back")


@pytest.mark.parametrize("library_client", [True, False], ids=["connections of its own", "the client as it is"])
def test_answer_that_was_owed_is_given_to_no_later_question(site: Site, library_client: bool) -> None:
    """The connection that was in use is dropped: its answer may come later."""
    # A client that is used as it is may try again by itself, whatever ended the first try.
    words: dict[str, Any] = {"timeout": LONG if library_client else None, "max_staleness": 0}
    breaker = breaker_on(site.client(**ONCE), **words)
    other = breaker_on(site.client(**ONCE), "other", **words)
    other.open()
    breaker.call(up)
    for _ in range(3):
        with frozen(site), alarm(raising(TimeoutError("limit"))), pytest.raises(TimeoutError, match="limit"):
            breaker.call(up)
        assert (breaker.current_state, other.current_state) == ("closed", "open")


def test_error_of_a_handler_in_a_handshake_leaves_no_connection_in_the_middle_of_it(site: Site) -> None:
    """A call that takes a connection later gets none that was never told the password."""
    silent = asking(site)
    storage: Any = silent._state_storage
    storage._core.server.close_idle_pools()
    with frozen(site), alarm(raising(JobTimeout())), pytest.raises(JobTimeout):
        silent.call(up)
    assert silent.call(up) == "answer"
    assert health_of(silent).last_error == ""


def test_error_of_a_handler_is_raised_though_sentinels_were_being_asked(site: Site) -> None:
    """Their client takes it for a Sentinel that does not answer, and goes on with the next one."""
    sentinel = Sentinel([("127.0.0.1", site.proxy.port)] * 2, socket_timeout=LONG)
    breaker = breaker_on(sentinel.master_for("mymaster"), timeout=LONG)
    with frozen(site), alarm(raising(TimeoutError("limit"))), pytest.raises(TimeoutError, match="limit"):
        breaker.call(up)
    assert health_of(breaker).last_error == ""


@pytest.mark.parametrize("kind", ["partial", "method", "object", "restores its predecessor"])
def test_every_kind_of_handler_is_recognised(kind: str) -> None:
    """Functions, methods, objects that can be called, and one that is no handler any more when it raises."""

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
    with alarm(handlers[kind], 0.01):
        error = caught(lambda: time.sleep(10))
        assert find_interruption(error) is error


def test_wrapped_error_of_a_handler_is_found() -> None:
    """Codecs and libraries raise another error from it, or while they handle it."""
    struck = TimeoutError("limit")

    def wraps() -> NoReturn:
        try:
            with alarm(raising(struck), 0.01):
                time.sleep(5)
        except TimeoutError as error:
            try:
                raise UnicodeError("encoding with 'idna' codec failed") from error
            except UnicodeError:
                raise redis.ConnectionError("wrapped twice")  # noqa: B904

    with pytest.raises(redis.ConnectionError) as raised:
        wraps()
    assert find_interruption(raised.value) is struck


# -- by way of the interpreter -----------------------------------------------------------------------------------------


def interrupt(thread: threading.Thread, error: type[BaseException]) -> None:
    """Have the interpreter raise an error in a thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


@pytest.mark.parametrize("error", [JobTimeout, SoftTimeout])
def test_error_that_another_thread_has_raised_here_reaches_the_call(site: Site, error: type[Exception]) -> None:
    """RQ and stopit end a job so; it surfaces when the wait ends, in the middle of the client library."""
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
        time.sleep(0.2)  # so that it waits for the server
        interrupt(thread, error)
        # What comes soon enough is no outage.
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
    """Gevent resumes the waiting greenlet with the exception: its own class, or one of the application's."""
    pytest.importorskip("gevent")
    administrator = f"redis.Redis(unix_socket_path={site.server.unix_socket!r})"
    program = PROGRAM.format(port=site.proxy.port, administrator=administrator)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["ok  connected"] * 6, done.stderr


# -- what stays inside -------------------------------------------------------------------------------------------------


def caught(raises: Callable[[], object]) -> Exception:
    """The error of a function."""
    try:
        raises()
    except Exception as error:  # noqa: BLE001
        return error
    pytest.fail("nothing was raised")


def test_class_decides_where_nothing_else_does() -> None:
    """Classes of client libraries and of the standard library stay inside, and so do classes made of the former."""

    class Denied(redis.exceptions.NoPermissionError):
        """A class of an application's, made of the library's."""

    for error in (KeyError("key"), AttributeError("none"), OSError(), redis.RedisError(), Denied()):
        assert find_interruption(caught(functools.partial(raising(error), 1, None))) is None
    assert isinstance(find_interruption(caught(functools.partial(raising(JobTimeout()), 1, None))), JobTimeout)
    assert isinstance(find_interruption(JobTimeout()), JobTimeout)


def test_error_that_a_wrapper_makes_of_a_clients_error_stays_inside(site: Site) -> None:
    """It is the client's way to say that Redis is not there."""

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


def test_error_of_a_callable_that_returns_a_client_stays_inside() -> None:
    """It concerns how Redis is configured, and may be of any class."""

    def given() -> NoReturn:
        raise CacheDown("no setting")

    breaker = breaker_on(given)
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "CacheDown: no setting"


def test_handler_that_interrupts_a_callable_that_returns_a_client_reaches_the_call() -> None:
    """A callable may connect, as those of clusters do."""

    def given() -> NoReturn:
        time.sleep(5)
        raise CacheDown

    breaker = breaker_on(given)
    with alarm(raising(OSError("limit")), 0.05), pytest.raises(OSError, match="limit"):
        breaker.call(up)
    assert health_of(breaker).last_error == ""


@pytest.mark.skipif(redis.VERSION < (4, 5), reason="this client has no sources of credentials")
def test_error_of_a_source_of_credentials_stays_inside(site: Site) -> None:
    """It concerns how Redis is configured, and may be of any class."""

    class Source(redis.CredentialProvider):
        def get_credentials(self) -> NoReturn:
            raise CacheDown("no token")

    client = redis.Redis(host="127.0.0.1", port=site.proxy.port, credential_provider=Source())
    breaker = breaker_on(client)
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "CacheDown: no token"


def test_error_of_a_log_handler_stays_inside_and_a_signal_in_it_does_not(site: Site) -> None:
    """Nothing that a log does reaches a call, but what interrupts it does."""

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
        with alarm(raising(OSError("limit")), 0.05), pytest.raises(OSError, match="limit"):
            second.call(up)
    finally:
        logger.removeHandler(handler)


def test_bug_of_a_client_library_stays_inside(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller cannot do anything about it."""
    breaker = asking(site)
    monkeypatch.setattr(redis.connection.Connection, "read_response", lambda self, **words: {}["bug"])
    assert breaker.call(up) == "answer"
    assert health_of(breaker).last_error == "KeyError: 'bug'"


def test_time_limit_that_a_library_has_swallowed_is_raised_in_the_end() -> None:
    """Whatever the operation came to then, and whatever else was raised."""

    def operate(error: Exception | None) -> None:
        with deadline(LONG):
            _note_interruption(JobTimeout())
            if error:
                raise error

    for error in (None, KeyError()):
        with pytest.raises(JobTimeout):
            operate(error)


def test_suppressed_errors_are_those_of_inside() -> None:
    """What was raised from outside comes out."""
    with suppress_errors():
        raise KeyError
    with pytest.raises(JobTimeout), suppress_errors():
        raise JobTimeout


# -- the neighbours ----------------------------------------------------------------------------------------------------


def test_time_limit_ends_the_look_for_nodes_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that does not answer leaves it to the next one; a time limit does not."""
    cluster = ClusterTopology(
        None, lambda address: None, [("a", 1), ("b", 2)], lambda slot: None, lambda address: address
    )
    monkeypatch.setattr(cluster, "_query_slots", raising(JobTimeout()).__get__(cluster))
    with pytest.raises(JobTimeout):
        cluster.refresh()


@pytest.mark.skipif(not has_clusters(), reason="no library here knows clusters")
def test_time_limit_ends_the_look_for_hosts_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the client of a cluster is made."""
    make = client_source_from_url("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    monkeypatch.setattr(redis.connection.Connection, "connect", lambda self: raising(JobTimeout())(1, None))
    with deadline(LONG), pytest.raises(JobTimeout):
        make()


def test_time_limit_is_no_reason_to_take_a_client_for_an_unknown_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections with deadlines can be made, the next time."""
    client = redis.Redis(port=1)
    with monkeypatch.context() as patched:
        patched.setattr(pool_module, "_copy_client", lambda *_: raising(JobTimeout())(1, None))
        with pytest.raises(JobTimeout):
            server_for(client).client_with_timeout(client, 1.0)
    assert server_for(client).client_with_timeout(client, 1.0) is not client


def test_time_limit_ends_a_look_at_all_circuits(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """Who asks for one circuit after the other does so for another reason."""
    breaker = asking(site)
    storage: Any = breaker._state_storage
    monkeypatch.setattr(
        "pybreaker_redis._circuits.bulk.read_all_circuits", lambda questions: raising(JobTimeout())(1, None)
    )
    with pytest.raises(JobTimeout):
        read_for_operator([storage._core])


def test_time_limit_in_the_second_look_at_what_is_refused_reaches_the_call(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A circuit that may not be written is read at once."""
    breaker = asking(site, fail_max=100)
    site.permit("+@all", "-@write")
    monkeypatch.setattr(Failover, "load", lambda self, **words: raising(JobTimeout())(1, None))
    with pytest.raises(JobTimeout):
        breaker.call(lambda: 1 / 0)


def test_interrupt_drops_the_connections_that_are_not_in_use(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind of exception it was: a connection may owe the answer to what it ended."""
    breaker = asking(site)
    storage: Any = breaker._state_storage
    pool = SimpleNamespace(pool=None, disconnect=lambda **words: dropped.append(words["inuse_connections"]))
    dropped: list[bool] = []
    monkeypatch.setattr(storage._core.server, "close_idle_pools", lambda: pool_module.close_idle_connections(pool))
    monkeypatch.setattr(storage._core, "_ask_shared", lambda intent: raising(KeyboardInterrupt())(1, None))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        breaker.call(up)
    monkeypatch.setattr(storage._core, "server", None)
    with pytest.raises(KeyboardInterrupt):
        breaker.call(up)
    assert dropped == [False]


def test_time_limit_in_a_lazy_client_reaches_the_call(site: Site) -> None:
    """An object makes its client when a method of it is first looked up, and that takes a while."""

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
