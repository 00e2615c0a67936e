"""The registry: one breaker for each name, commands that raise, and how long to wait."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import functools
import gc
import inspect
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest.mock import MagicMock

import pybreaker
import pytest
import redis
import time_machine
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.bulk import read_all_circuits
from pybreaker_redis.errors import StorageUnavailableError
from pybreaker_redis.listeners import LogListener
from pybreaker_redis.registry import BreakerRegistry, retry_after
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, Heard, breaker_on, down, fails, settled, up
from tests.support.cluster import Nodes
from tests.support.inspect import keepers, listeners, reset_in_child
from tests.support.places import cluster_client, has_clusters
from tests.support.round_trips import Meter
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

#: How a registry may be told where the circuits are.
HOMES = {
    "memory": lambda server: None,
    "client": lambda server: server.client(),
    "decoding client": lambda server: server.client(decode_responses=True),
    "callable": lambda server: server.client,
    "URL": lambda server: server.url,
}

Make = Callable[..., BreakerRegistry]


@pytest.fixture
def shared(server: PrivateServer) -> Iterator[Make]:
    """Registries of processes that share a server."""
    with contextlib.ExitStack() as stack:
        yield lambda **words: stack.enter_context(BreakerRegistry(server.url, **{"timeout": 10, **words}))


@pytest.fixture(params=HOMES)
def made(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[Make]:
    """Registries with their circuits in each of the places."""
    with contextlib.ExitStack() as stack:
        home = HOMES[request.param]
        yield lambda **words: stack.enter_context(BreakerRegistry(home(server), **{"timeout": 10, **words}))


@pytest.fixture(scope="module")
def cluster(preferred: FoundServer) -> Iterator[Nodes]:
    """Three primaries of the preferred server."""
    with Nodes(preferred.binary, replicas=0) as nodes:
        yield nodes


def error_of(call: Callable[..., Any], *arguments: Any) -> CircuitBreakerError:
    """The error with which a call is rejected."""
    with pytest.raises(CircuitBreakerError) as raised:
        call(*arguments)
    return raised.value


class TestBreakers:
    """Which breaker one gets."""

    def test_same_name_is_the_same_standard_breaker(self, made: Make) -> None:
        """It is asked for wherever it is needed, and its listeners and its lock are one."""
        heard = Heard()
        breakers = made(listeners=[heard], fail_max=3, probe_lease=5.0)
        payments = breakers.get("payments", reset_timeout=9)
        assert type(payments) is CircuitBreaker
        assert breakers.get("payments") is breakers["payments"] is payments
        assert (payments.name, payments.fail_max, payments.reset_timeout) == ("payments", 3, 9)
        assert payments.listeners == (heard,)
        assert payments.call(up) == "answer"

    def test_circuit_lies_under_prefix_and_name(self, server: PrivateServer, client: redis.Redis) -> None:
        """Two applications on one server do not share circuits by accident."""
        for prefix in ("", "shop"):
            with BreakerRegistry(server.client(), prefix=prefix) as breakers:
                breakers.get("payments").call(up)
        states = sorted(key.decode() for key in client.keys("*") if key.endswith(b":state"))
        assert states == ["payments:pybreaker:state", "shop:payments:pybreaker:state"]

    def test_without_redis_the_circuit_is_this_process_s_own(self) -> None:
        """The same code runs on a laptop; what is about Redis is accepted, and changes nothing."""
        breakers = BreakerRegistry(timeout=0.5, max_staleness=0, probe_lease=7)
        assert type(breakers.get("payments")._state_storage) is CircuitMemoryStorage

    def test_nothing_is_sent_before_a_call(self) -> None:
        """Modules make breakers when they are imported, when Redis may not be there."""

        def never() -> None:
            pytest.fail("asked for a client")

        breakers = BreakerRegistry(never)
        breakers.configure("payments", fail_max=2)
        breakers.guard("search")(up)
        assert breakers["payments"].fail_max == 2

    def test_many_threads_get_one_breaker(self) -> None:
        """Two breakers of one circuit in one process would have two locks, and listeners told twice."""
        breakers = BreakerRegistry()
        start, got = threading.Barrier(8), []

        def ask() -> None:
            start.wait()
            got.append(breakers.get("payments", fail_max=2))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 8
        assert len(set(map(id, got))) == 1

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_child_makes_breakers_though_the_lock_was_held(self) -> None:
        """The thread that held it has stayed behind."""
        breakers = BreakerRegistry()
        with breakers._lock:
            pid = os.fork()
            if pid == 0:
                threading.Timer(10, os._exit, [1]).start()
                os._exit(0 if breakers.get("payments").call(up) == "answer" else 2)
            reset_in_child(breakers)
            assert breakers.get("payments").call(up) == "answer"
        assert os.waitpid(pid, 0)[1] == 0

    def test_is_a_collection_of_names(self) -> None:
        """What was asked for, configured, or guards something; a name that nobody has said is a mistake."""
        breakers = BreakerRegistry()
        breakers.get("payments")
        breakers.configure("stock")
        breakers.guard("search")(up)
        assert list(breakers) == ["payments", "stock", "search"]
        assert len(breakers) == 3
        assert "stock" in breakers
        assert "stokc" not in breakers
        with pytest.raises(KeyError, match="no breaker 'stokc'; there are: 'payments', 'stock', 'search'"):
            breakers["stokc"]
        with pytest.raises(KeyError, match="there are: none"):
            BreakerRegistry()["payments"]

    def test_close_lets_go_and_begins_anew(self, shared: Make) -> None:
        """When settings change, what was said stays, and nobody gets a breaker of before."""
        breakers = shared()
        first = breakers.get("payments", fail_max=2)
        assert first.call(up) == "answer"
        breakers.close()
        second = breakers["payments"]
        assert second is not first
        assert second.fail_max == 2
        assert second.call(up) == "answer"

    def test_close_leaves_a_given_client_alone(self, client: redis.Redis) -> None:
        """Whoever has made it closes it."""
        client.ping()
        with BreakerRegistry(client) as breakers:
            breakers.get("payments").call(up)
        (connection,) = client.connection_pool._available_connections
        assert connection._sock is not None

    @pytest.mark.usefixtures("nobody_listens")
    def test_close_leaves_no_connection_and_no_thread(self, server: PrivateServer, client: redis.Redis) -> None:
        """At once: not when the garbage collector finds the breakers, nor when nobody holds them any more."""
        connected = client.info("clients")["connected_clients"]
        breakers = BreakerRegistry(server.url)
        payments = settled(breakers.get("payments"))
        assert client.info("clients")["connected_clients"] > connected
        gc.disable()
        try:
            breakers.close()
            wait_for(lambda: client.info("clients")["connected_clients"] <= connected, "its connections are closed")
            wait_for(lambda: not listeners(), "its thread has ended")
        finally:
            gc.enable()
        # Whoever has kept one may go on with it.
        fails(payments)
        assert breakers.status()["payments"].fail_counter == 1

    @pytest.mark.parametrize("when", ["between two attempts", "before one", "in the middle of one"])
    @pytest.mark.usefixtures("nobody_listens")
    def test_close_in_an_outage_is_no_news_of_the_server(
        self,
        killable_server: PrivateServer,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        when: str,
    ) -> None:
        """It is neither back, nor do its circuits live elsewhere."""
        caplog.set_level("INFO", "pybreaker_redis")
        breakers = BreakerRegistry(killable_server.client())
        settled(breakers.get("payments"))
        killable_server.kill()
        fails(breakers["payments"])
        wait_for(lambda: fails(breakers["payments"]) or "is away" in caplog.text, "it is away")
        caplog.clear()
        if when == "between two attempts":
            breakers.close()
        else:
            owner, name = (bulk, "return_members") if when == "before one" else (bulk, "read_circuits")
            asks, closed = getattr(owner, name), threading.Event()

            def closes(*arguments: Any) -> object:
                breakers.close()
                closed.set()
                return asks(*arguments)

            monkeypatch.setattr(owner, name, closes)
            assert closed.wait(10)
        wait_for(lambda: not keepers(), "nobody asks again")
        assert caplog.messages == []

    def test_names_that_are_members_of_an_enumeration_are_their_text(self, shared: Make) -> None:
        """As for pybreaker's own storage, and for whoever says the text."""

        class Name(str, enum.Enum):
            PAYMENTS = "payments"
            PREFIX = "shop"

        breakers = shared(prefix=Name.PREFIX)
        payments = breakers.get(Name.PAYMENTS)
        assert breakers["payments"] is payments
        assert (type(payments.name), payments.name, list(breakers)) == (str, "payments", ["payments"])
        operator = shared(prefix="shop")
        operator.configure("payments")
        operator.set_state(Name.PAYMENTS, "open")
        assert payments.current_state == "open"


class TestSettings:
    """What may be said of a breaker, and what contradicts it."""

    def test_defaults_then_what_was_configured(self) -> None:
        """What is said of one breaker goes before what is said of all."""
        breakers = BreakerRegistry(fail_max=7, reset_timeout=3, success_threshold=2, throw_new_error_on_trip=False)
        breakers.configure("payments", fail_max=2)
        breakers.configure("payments", exclude=[KeyError])
        payments = breakers["payments"]
        assert (payments.fail_max, payments.reset_timeout, payments.success_threshold) == (2, 3, 2)
        assert payments.excluded_exceptions == (KeyError,)
        fails(payments)
        with pytest.raises(Down):
            payments.call(down)
        assert payments.current_state == "open"

    def test_settings_of_the_storage_reach_it(self, client: redis.Redis) -> None:
        """One dictionary of settings holds all there is to say about a circuit."""
        breakers = BreakerRegistry(client, timeout=5)
        storage: Any = breakers.get("payments", max_staleness=3, cluster_mode=True)._state_storage
        assert isinstance(storage, CircuitRedisStorage)
        assert (storage._core.timeout, storage._core._view.max_staleness) == (5, 3)
        breakers["payments"].call(up)
        assert client.exists("{payments}:pybreaker:state")

    @pytest.mark.parametrize(
        ("said", "again"),
        [
            ({"fail_max": 2}, {"fail_max": 2}),
            ({}, {"fail_max": 9, "reset_timeout": 60, "exclude": None}),
            ({"exclude": [KeyError, up]}, {"exclude": (KeyError, up)}),
            ({"timeout": 1}, {"timeout": 1.0}),
        ],
    )
    def test_saying_the_same_again_is_no_conflict(self, said: Any, again: Any) -> None:
        """Two modules may both say what they need."""
        breakers = BreakerRegistry(fail_max=9)
        assert breakers.get("payments", **said) is breakers.get("payments", **again)

    @pytest.mark.parametrize("say", ["get", "configure"])
    @pytest.mark.parametrize(
        ("said", "again"),
        [
            ({"fail_max": 2}, {"fail_max": 3}),
            ({}, {"fail_max": 3}),
            ({"exclude": [KeyError]}, {"exclude": [ValueError]}),
            ({"max_staleness": 1}, {"max_staleness": 0}),
        ],
    )
    def test_contradiction_is_refused(self, said: Any, again: Any, say: str) -> None:
        """Who comes second learns at once that it will not be as they think."""
        breakers = BreakerRegistry(fail_max=9)
        payments = breakers.get("payments", **said)
        (setting,) = again
        with pytest.raises(ValueError, match=f"breaker 'payments' has {setting}=.*cannot have {setting}="):
            getattr(breakers, say)("payments", **again)
        assert breakers.get("payments", **said) is payments

    def test_contradiction_before_first_use_is_refused(self) -> None:
        """Two places that configure one breaker are one too many."""
        breakers = BreakerRegistry()
        breakers.configure("payments", fail_max=2)
        with pytest.raises(ValueError, match="fail_max"):
            breakers.configure("payments", fail_max=3)
        with pytest.raises(ValueError, match="fail_max"):
            breakers.guard("payments", fail_max=3)
        assert breakers["payments"].fail_max == 2

    @pytest.mark.parametrize(
        ("setting", "value", "error"),
        [
            ("fail_mx", 3, TypeError),
            ("listeners", [], TypeError),
            ("name", "x", TypeError),
            ("fail_max", "3", TypeError),
            ("fail_max", True, TypeError),
            ("fail_max", 0, ValueError),
            ("success_threshold", 1.5, TypeError),
            ("reset_timeout", "60", TypeError),
            ("reset_timeout", True, TypeError),
            ("reset_timeout", -1, ValueError),
            ("reset_timeout", float("inf"), ValueError),
            ("exclude", KeyError, TypeError),
            ("exclude", "KeyError", TypeError),
            ("exclude", [dict], TypeError),
            ("exclude", ["KeyError"], TypeError),
            ("reset_timeout", 1e12, ValueError),
            ("throw_new_error_on_trip", "no", TypeError),
            ("cluster_mode", "no", TypeError),
            ("timeout", "1", TypeError),
            ("probe_lease", 0, ValueError),
            ("fallback_circuit_state", "ajar", ValueError),
        ],
    )
    @pytest.mark.parametrize("redis_object", [None, "redis://localhost"], ids=["memory", "Redis"])
    def test_setting_that_cannot_be_is_refused_at_once(
        self, setting: str, value: Any, error: type[Exception], redis_object: Any
    ) -> None:
        """Not in the middle of the first outage; and the message names it."""
        breakers = BreakerRegistry(redis_object)
        with pytest.raises(error, match=setting):
            breakers.configure("payments", **{setting: value})
        if setting not in ("listeners", "name"):
            with pytest.raises(error, match=setting):
                BreakerRegistry(redis_object, **{setting: value})
        assert "payments" not in breakers

    @pytest.mark.parametrize("listener", [LogListener, print, "LogListener"])
    def test_listener_that_is_none_is_refused_at_once(self, listener: Any) -> None:
        """A class is not made for its user: every call would fail by it."""
        with pytest.raises(TypeError, match="listeners must be instances of"):
            BreakerRegistry(listeners=[listener])

    @pytest.mark.parametrize("prefix", [None, 7, b"shop"])
    def test_prefix_that_is_none_is_refused_at_once(self, prefix: Any) -> None:
        """Printed, it would be another one."""
        with pytest.raises(TypeError, match="prefix must be a str"):
            BreakerRegistry(prefix=prefix)

    @pytest.mark.parametrize("name", ["", None, 7, b"payments"])
    def test_name_that_is_none_is_refused(self, name: Any) -> None:
        """It would be a namespace that somebody else uses, or none."""
        with pytest.raises(TypeError, match="name"):
            BreakerRegistry().get(name)

    @pytest.mark.parametrize("name", ["pay\nments", "pay{ments", "{}payments"])
    def test_name_that_is_no_namespace_is_refused(self, name: str) -> None:
        """As soon as it is said, and with Redis or without: a laptop shall not accept what production refuses."""
        for breakers in (BreakerRegistry(), BreakerRegistry("redis://localhost", prefix="shop")):
            with pytest.raises(ValueError, match="namespace"):
                breakers.configure(name)
            assert name not in breakers

    @pytest.mark.parametrize("url", ["localhost", "http://localhost", "redis://localhost:port"])
    def test_url_that_names_nothing_is_refused_at_once(self, url: str) -> None:
        """As by `CircuitRedisStorage.from_url`; the one that is left to connect to may be away."""
        with pytest.raises(ValueError, match="url"):
            BreakerRegistry(url)

    @pytest.mark.parametrize("nothing", [7, redis.Redis, object()])
    def test_what_cannot_be_a_client_is_refused_at_once(self, nothing: Any) -> None:
        """Not at the first call."""
        if nothing is redis.Redis:
            # It can be called, and returns one.
            BreakerRegistry(nothing)
            return
        with pytest.raises(TypeError, match="redis"):
            BreakerRegistry(nothing)

    @pytest.mark.parametrize("error", [Exception, BaseException, OSError, ConnectionError, TimeoutError])
    def test_excluding_what_outages_raise_gets_a_warning(self, error: type[BaseException]) -> None:
        """Such a breaker never opens, and the warning names the line that says so."""
        breakers = BreakerRegistry()
        match = f"exclude contains {error.__name__}"
        for say in (
            lambda: breakers.get("one", exclude=[KeyError, error]),
            lambda: breakers.configure("two", exclude=[error]),
            lambda: breakers.guard("three", exclude=[error]),
            lambda: BreakerRegistry(exclude=[error]),
        ):
            with pytest.warns(RuntimeWarning, match=match) as caught:
                say()
            assert caught[0].filename == __file__

    @pytest.mark.parametrize("excluded", [KeyError, ConnectionRefusedError, lambda error: True])
    def test_excluding_anything_else_gets_none(self, excluded: Any) -> None:
        """Business errors are what it is for; warnings are errors here."""
        assert BreakerRegistry().get("payments", exclude=[excluded]).excluded_exceptions == (excluded,)

    def test_class_with_a_metaclass_excludes_no_other_errors(self) -> None:
        """Pybreaker takes it for a function, and its instance for yes: nothing would count."""

        class Business(Exception, metaclass=abc.ABCMeta):
            pass

        def refused() -> None:
            raise Business

        payments = BreakerRegistry().get("payments", exclude=[Business])
        with pytest.raises(Business):
            payments.call(refused)
        assert payments.fail_counter == 0
        fails(payments)
        assert payments.fail_counter == 1


class TestGuard:
    """What a guarded function returns."""

    def test_function_keeps_its_face_and_its_result(self, made: Make) -> None:
        """A guarded function is called, introspected and documented like the bare one."""
        breakers = made()

        @breakers.guard("payments")
        def charge(cents: int, *, currency: str = "EUR") -> str:
            """Take the money."""
            return f"{cents} {currency}"

        assert charge(995, currency="CHF") == "995 CHF"
        assert (charge.__name__, charge.__doc__) == ("charge", "Take the money.")

    def test_breaker_is_configured_after_the_function_was_defined(self) -> None:
        """Decorators run when modules are imported, settings are there later."""
        breakers = BreakerRegistry()
        guarded = breakers.guard("payments", fallback="none")(down)
        breakers.configure("payments", fail_max=1)
        assert guarded() == "none"

    def test_without_a_fallback_the_rejection_is_raised(self, made: Make) -> None:
        """As by any breaker."""
        breakers = made(fail_max=1)
        guarded = breakers.guard("payments")(down)
        for _ in range(2):
            with pytest.raises(CircuitBreakerError):
                guarded()

    @pytest.mark.parametrize("value", [None, 0, "later", []])
    def test_value_takes_the_place_of_the_rejection_only(self, made: Make, value: Any) -> None:
        """What the dependency raises while the circuit is closed is the caller's business; ``None`` is a value."""
        guarded = made(fail_max=2).guard("payments", fallback=value)(down)
        with pytest.raises(Down):
            guarded()
        # Of the call that trips, and of those that are rejected.
        assert [guarded(), guarded()] == [value, value]

    def test_fallback_that_can_be_called_gets_the_arguments(self) -> None:
        """It often needs to know what was asked for; the error is at hand in `sys.exc_info()`, and chained."""
        breakers = BreakerRegistry()
        breakers.configure("payments")
        breakers.set_state("payments", "open")
        guarded = breakers.guard("payments", fallback=lambda *args, **kwargs: (args, kwargs))(up)
        assert guarded(1, two=2) == ((1,), {"two": 2})  # type: ignore[call-arg]

        def fallback() -> None:
            raise KeyError("cache")

        with pytest.raises(KeyError) as raised:
            breakers.guard("payments", fallback=fallback)(up)()
        assert isinstance(raised.value.__context__, CircuitBreakerError)

    def test_generator_is_guarded_until_its_end(self) -> None:
        """A stream that breaks off is a failure, as with a breaker alone."""
        breakers = BreakerRegistry(fail_max=1)

        @breakers.guard("stream", fallback=())
        def numbers() -> Iterator[int]:
            yield 1
            raise Down

        with pytest.raises((Down, CircuitBreakerError)):
            list(numbers())
        assert list(numbers()) == []

    async def _coroutine(self) -> None:
        """Nothing is done before it is awaited."""

    async def _asynchronous_generator(self) -> Any:
        """The same."""
        yield 1

    class _Called:
        async def __call__(self) -> None:
            """The same."""

    @pytest.mark.parametrize(
        "function",
        [
            _coroutine,
            _asynchronous_generator,
            functools.partial(_coroutine, None),
            _Called(),
            functools.partial(_Called()),
        ],
        ids=["async def", "asynchronous generator", "partial", "object", "partial of an object"],
    )
    def test_asynchronous_function_is_refused(self, function: Any) -> None:
        """It would return before anything is done, so that nothing would be guarded, silently."""
        breakers = BreakerRegistry()
        with pytest.raises(TypeError, match=r"guarded function .* is asynchronous"):
            breakers.guard("payments")(function)
        with pytest.raises(TypeError, match=r"fallback .* is asynchronous"):
            breakers.guard("payments", fallback=function)(up)

    def test_what_returns_a_coroutine_all_the_same_is_refused_when_it_does(self) -> None:
        """Decorators in between do not always tell."""
        breakers = BreakerRegistry(fail_max=1)

        @functools.wraps(self._coroutine)
        def undone() -> Any:
            return self._coroutine()

        with pytest.raises(TypeError, match=r"guarded function .* is asynchronous"):
            breakers.guard("payments")(undone)()
        breakers.set_state("payments", "open")
        with pytest.raises(TypeError, match=r"fallback .* is asynchronous"):
            breakers.guard("payments", fallback=undone)(up)()

    @pytest.mark.parametrize("kind", ["coroutine", "awaitable", "future", "future of a loop", "asynchronous generator"])
    def test_result_that_is_still_to_be_worked_out_is_refused(self, kind: str) -> None:
        """The call returned before anything was done, so nothing was guarded."""
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            make = {
                "coroutine": self._coroutine,
                "awaitable": _Awaitable,
                "future": Future,
                "future of a loop": loop.create_future,
                "asynchronous generator": self._asynchronous_generator,
            }[kind]
            made: list[Any] = []

            def call() -> Any:
                made.append(make())
                return made[-1]

            breakers = BreakerRegistry(fail_max=1)
            with pytest.raises(TypeError, match=r"the guarded function .* is asynchronous"):
                breakers.guard("payments")(call)()
            breakers.set_state("payments", "open")
            with pytest.raises(TypeError, match=r"the fallback .* is asynchronous"):
                breakers.guard("payments", fallback=call)(up)()
            for result in made:
                # Else Python would report that it was never awaited.
                assert kind != "coroutine" or inspect.getcoroutinestate(result) == inspect.CORO_CLOSED
                assert "future" not in kind or not result.cancelled(), "other callers may wait for it"

    def test_refused_result_is_not_shown(self) -> None:
        """What a call has returned may be a secret."""
        future: Future[str] = Future()
        future.set_result("swordfish")
        with pytest.raises(TypeError) as raised:
            BreakerRegistry().guard("payments")(lambda: future)()
        assert "swordfish" not in str(raised.value)
        with pytest.raises(TypeError) as refused:
            BreakerRegistry().guard("payments")(functools.partial(self._coroutine, "swordfish"))
        assert "swordfish" not in str(refused.value)

    @pytest.mark.parametrize("result", [None, "text", MagicMock(), Down(), iter([1])], ids=lambda it: type(it).__name__)
    def test_result_of_any_other_kind_is_returned(self, result: Any) -> None:
        """Mocks, too, which have nearly every method."""
        assert BreakerRegistry().guard("payments")(lambda: result)() is result

    def test_what_runs_a_coroutine_to_its_end_is_guarded(self) -> None:
        """Whatever it says that it wraps."""
        breakers = BreakerRegistry(fail_max=1)

        async def charged() -> None:
            raise Down

        @breakers.guard("payments")
        @functools.wraps(charged)
        def charge() -> None:
            asyncio.run(charged())

        with pytest.raises(CircuitBreakerError):
            charge()

    @pytest.mark.parametrize("kind", [classmethod, staticmethod])
    def test_decorators_in_the_wrong_order_are_refused(self, kind: Any) -> None:
        """Called like that they raise, which would open the circuit for everybody."""
        with pytest.raises(TypeError, match=f"write @{kind.__name__} above"):
            BreakerRegistry().guard("payments")(kind(up))


class _Awaitable:
    """Something to await that is no coroutine."""

    def __await__(self) -> Iterator[None]:
        yield


class TestStatus:
    """What operators see."""

    def test_tells_all_there_is_to_know(self, made: Make) -> None:
        """Also of circuits that this process has not used."""
        breakers = made(fail_max=2, reset_timeout=30)
        breakers.configure("stock", fail_max=4, reset_timeout=7)
        before = time.time()
        fails(breakers.get("payments"), 2)
        fails(breakers.get("search"))
        status = breakers.status()
        assert list(status) == ["stock", "payments", "search"]
        payments, search, stock = status["payments"], status["search"], status["stock"]
        assert (payments.name, payments.state, payments.fail_counter) == ("payments", "open", 2)
        assert payments.opened_at is not None
        assert before - 1 < payments.opened_at.timestamp() < time.time() + 1
        assert 29 < payments.retry_after <= 30.1
        assert (search.state, search.fail_counter, search.opened_at, search.retry_after) == ("closed", 1, None, 0.0)
        assert (stock.state, stock.fail_counter, stock.fail_max, stock.reset_timeout) == ("closed", 0, 4, 7)

    def test_of_nothing_is_nothing(self, made: Make) -> None:
        """And asks nobody."""
        assert made().status() == {}

    def test_half_open_circuit_is_told_as_such(self, made: Make) -> None:
        """Its probe, and the rest of the lease: what no caller but the prober can see."""
        breakers = made(reset_timeout=0, success_threshold=3, probe_lease=20)
        payments = breakers.get("payments")
        payments.open()
        payments.call(up)
        with payments.calling():
            status = breakers.status()["payments"]
        assert (status.state, status.success_counter) == ("half-open", 1)
        assert 19 < status.retry_after <= 20.1

    @pytest.mark.usefixtures("nobody_listens")
    def test_costs_one_round_trip_for_any_number(self, server: PrivateServer) -> None:
        """An operator's page does not become slower with each dependency."""
        with BreakerRegistry(server.client()) as breakers:
            for number in range(12):
                breakers.configure(f"circuit {number}")
            assert len(breakers.status()) == 12
            meter = Meter(server)
            with contextlib.closing(meter):
                assert meter.cost(breakers.status) == 1

    def test_changes_nothing(self, every_server: PrivateServer) -> None:
        """To look is not to use: no key is made, repaired or kept from expiring."""
        with contextlib.closing(every_server.client()) as client, BreakerRegistry(every_server.client()) as breakers:
            breakers.configure("never used")
            breakers.configure("damaged")
            damage = {"damaged:pybreaker:state": b"ajar", "damaged:pybreaker:fail_counter": b"\xff"}
            client.mset(damage)
            client.rpush("damaged:pybreaker:circuit", "no", "hash")
            client.rpush("damaged:pybreaker:opened_at", "no", "number")
            status = breakers.status()
            assert (status["damaged"].state, status["damaged"].fail_counter) == ("closed", 0)
            assert len(client.keys()) == 4
            assert client.mget(damage) == list(damage.values())

    @pytest.mark.usefixtures("nobody_listens")
    @pytest.mark.skipif(not has_clusters(), reason="this redis-py has no clusters")
    def test_costs_one_round_trip_for_each_node_of_a_cluster(self, cluster: Nodes, monkeypatch: Any) -> None:
        """Circuits lie wherever their names put them; a status is none the less one page."""
        with BreakerRegistry(cluster_client(cluster.all[0].port), fail_max=2) as breakers:
            for number in range(12):
                fails(breakers.get(f"circuit {number}"), number % 3)
            looks: list[int] = []
            monkeypatch.setattr(
                bulk,
                "read_all_circuits",
                lambda questions: looks.append(len(questions)) or read_all_circuits(questions),
            )
            states = [status.state for status in breakers.status().values()]
        assert states == ["closed", "closed", "open"] * 4
        assert len(looks) == 3
        assert sum(looks) == 12

    @pytest.mark.parametrize("cluster_mode", [False, True])
    def test_plain_client_of_one_node_finds_the_others(self, cluster: Nodes, cluster_mode: bool) -> None:
        """Where they are not, or where keys may not be asked for together, each is asked for by itself."""
        client = redis.Redis(port=cluster.all[0].port, **ONCE)
        with (
            contextlib.closing(client),
            BreakerRegistry(client, prefix=f"{cluster_mode}", cluster_mode=cluster_mode) as breakers,
        ):
            for number in range(6):
                breakers.configure(f"plain {number}")
            assert {status.state for status in breakers.status().values()} == {"closed"}
            for name in breakers:
                breakers.set_state(name, "open")
            assert {status.state for status in breakers.status().values()} == {"open"}

    def test_raises_what_the_client_raises(self, killable_server: PrivateServer) -> None:
        """An operator must not take this process's own circuits for everybody's."""
        with BreakerRegistry(killable_server.client(), fail_max=1) as breakers:
            fails(breakers.get("payments"))
            killable_server.kill()
            with pytest.raises(
                StorageUnavailableError, match=r"circuit 'payments': Redis at .* \(ConnectionError"
            ) as raised:
                breakers.status()
            assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)


#: That an operator can ask for; ``None``: the one that it is in, without its counts.
STATES = ("open", "closed", "half-open", None)


def command(name: str, state: str | None) -> Callable[[BreakerRegistry], None]:
    """What an operator asks for."""
    return lambda breakers: breakers.set_state(name, state) if state else breakers.reset(name)


class TestCommands:
    """What operators do."""

    @pytest.mark.parametrize("state", STATES)
    def test_acts_for_everybody(self, shared: Make, state: str | None) -> None:
        """The operator's process is rarely the one that calls."""
        operator, worker = shared(fail_max=9), shared(fail_max=9)
        fails(worker.get("payments"), 3)
        operator.configure("payments")
        command("payments", state)(operator)
        (status,) = worker.status().values()
        assert (status.state, status.fail_counter) == (state or "closed", 3 if state in ("open", "half-open") else 0)

    def test_listener_that_fails_does_not_make_it_look_undone(
        self, made: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An operator who sees an error tries again, or worse."""

        class Failing(pybreaker.CircuitBreakerListener):
            def state_change(self, *_: Any) -> None:
                raise RuntimeError("of the listener")

        breakers = made(listeners=[Failing()])
        breakers.configure("payments")
        breakers.set_state("payments", "open")
        assert breakers.status()["payments"].state == "open"
        (record,) = caplog.records
        assert record.message == "a listener of breaker 'payments' has failed"
        assert record.exc_info

    def test_unknown_state_is_refused(self, made: Make) -> None:
        """Nothing is sent, and all three are named."""
        breakers = made()
        breakers.configure("payments")
        with pytest.raises(ValueError, match="state must be one of 'closed', 'open', 'half-open', not 'shut'"):
            breakers.set_state("payments", "shut")

    def test_each_does_what_it_says(self, made: Make) -> None:
        """In whatever place the circuit is."""
        heard = Heard()
        breakers = made(fail_max=2, reset_timeout=60, success_threshold=2, listeners=[heard])
        payments = breakers.get("payments")
        breakers.set_state("payments", "open")
        # Nobody has to call for the listeners of this process to hear of it.
        assert heard.states == [("payments", "closed", "open")]
        assert error_of(payments.call, up)
        breakers.set_state("payments", "half-open")
        assert payments.call(up) == "answer"
        assert breakers.status()["payments"].success_counter == 1
        breakers.reset("payments")
        assert breakers.status()["payments"].success_counter == 0
        breakers.set_state("payments", "closed")
        fails(payments)
        assert breakers.status()["payments"].fail_counter == 1
        breakers.reset("payments")
        assert breakers.status()["payments"].fail_counter == 0
        assert heard.states == [
            ("payments", "closed", "open"),
            ("payments", "open", "half-open"),
            ("payments", "half-open", "closed"),
        ]

    def test_half_open_admits_one(self, shared: Make) -> None:
        """However many processes see the gate open, and whoever has opened it."""
        operator, *workers = (shared(probe_lease=20) for _ in range(3))
        operator.configure("payments")
        operator.set_state("payments", "half-open")
        first, second = (worker.get("payments") for worker in workers)
        with first.calling():
            assert error_of(second.call, up)
        assert second.call(up) == "answer"

    def test_name_that_nobody_has_said_is_refused(self) -> None:
        """A typing mistake does not open a circuit that nobody uses."""
        for state in STATES:
            with pytest.raises(KeyError, match="stokc"):
                command("stokc", state)(BreakerRegistry())

    @pytest.mark.parametrize("state", STATES)
    def test_raises_what_the_client_raises_and_moves_nothing(
        self, killable_server: PrivateServer, state: str | None
    ) -> None:
        """`breaker.open()` acts in this process alone then: for a call that is right, an operator has to know."""
        with BreakerRegistry(killable_server.client(), fail_max=5) as breakers:
            payments = breakers.get("payments")
            assert payments.call(up) == "answer"
            killable_server.kill()
            with pytest.raises(StorageUnavailableError) as raised:
                command("payments", state)(breakers)
            assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)
            assert raised.value.circuits == ("payments",)
            assert payments.call(up) == "answer"

    def test_frozen_server_is_waited_for_as_long_as_an_operator_may(
        self, killable_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Longer than a guarded call, and not for ever."""
        with BreakerRegistry(killable_server.client(), timeout=0.1) as breakers:
            breakers.configure("payments")
            breakers.set_state("payments", "open")
            monkeypatch.setattr("pybreaker_redis._circuits.budget.OPERATOR_TIMEOUT_MIN_S", 0.4)
            killable_server.pause()
            began = time.monotonic()
            with pytest.raises(StorageUnavailableError) as raised:
                breakers.set_state("payments", "closed")
            assert isinstance(raised.value.__cause__, redis.exceptions.TimeoutError)
            assert raised.value.timeout == 0.4
            assert 0.3 < time.monotonic() - began < 2
            killable_server.resume()

    def test_client_s_own_patience_is_kept_where_it_was_asked_for(self, server: PrivateServer) -> None:
        """``timeout=None`` is on the client's connections, as long as those take."""
        with BreakerRegistry(server.client(), timeout=None) as breakers:
            breakers.configure("payments")
            breakers.set_state("payments", "open")
            assert breakers.status()["payments"].state == "open"


class TestRetryAfter:
    """How long to wait."""

    def test_open_circuit_may_be_tried_after_its_timeout(self, made: Make) -> None:
        """What a 503 says, and a task that comes back."""
        breakers = made(fail_max=1, reset_timeout=20)
        payments = breakers.get("payments")
        assert retry_after(payments) == 0.0
        tripping = error_of(payments.call, down)
        rejecting = error_of(payments.call, up)
        for asked in (tripping, rejecting, payments):
            assert 19 < retry_after(asked) <= 20.1
        with time_machine.travel(time.time() + 15, tick=False):
            assert 4 < retry_after(payments) <= 5.1
        with time_machine.travel(time.time() + 21, tick=False):
            # Never negative, though it is past.
            assert retry_after(payments) == 0.0

    @pytest.mark.usefixtures("nobody_listens")
    def test_steady_state_asks_nobody(self, server: PrivateServer) -> None:
        """It is asked once for each rejected request."""
        meter = Meter(server, scripts=True)
        with contextlib.closing(meter), contextlib.closing(server.client()) as client:
            payments = settled(breaker_on(client, reset_timeout=60))
            assert meter.cost(lambda: retry_after(payments)) == 0
            payments.open()
            error = error_of(payments.call, up)
            assert meter.cost(lambda: retry_after(error)) == 0

    def test_while_others_probe_it_is_the_rest_of_their_lease(self, made: Make) -> None:
        """Nobody knows sooner whether the dependency is back, and nobody else is let through before."""
        breakers = made(reset_timeout=60, probe_lease=20)
        payments = breakers.get("payments")
        breakers.set_state("payments", "half-open")
        seen: list[float] = []
        with payments.calling():
            other = threading.Thread(target=lambda: seen.append(retry_after(payments)))
            other.start()
            other.join()
            # Whoever probes need not wait.
            assert retry_after(payments) == 0.0
        assert 19 < seen[0] <= 20.1

    def test_another_process_probing(self, shared: Make) -> None:
        """The same, seen from where nothing is known but the record; also by the error."""
        prober, other = shared(probe_lease=20), shared(probe_lease=20)
        breaker = other.get("payments")
        prober.configure("payments")
        prober.set_state("payments", "half-open")
        with prober["payments"].calling():
            error = error_of(breaker.call, up)
            assert 19 < retry_after(error) <= 20.1
            assert 19 < retry_after(breaker) <= 20.1

    def test_open_gate_need_not_be_waited_for(self, made: Make) -> None:
        """Half-open, and nobody has claimed the probe yet: whoever comes may."""
        breakers = made()
        breakers.configure("payments")
        breakers.set_state("payments", "half-open")
        assert retry_after(breakers["payments"]) == 0.0
        assert breakers.status()["payments"].retry_after == 0.0

    @pytest.mark.parametrize("stock", ["memory", "redis"])
    def test_breaker_with_a_storage_of_pybreaker_s_own(self, stock: str, client: redis.Redis) -> None:
        """Whoever has not migrated all of them asks the same question of all."""
        storage = (
            pybreaker.CircuitMemoryStorage("closed")
            if stock == "memory"
            else pybreaker.CircuitRedisStorage("closed", client, "stock")
        )
        breaker = CircuitBreaker(fail_max=1, reset_timeout=20, state_storage=storage)
        assert retry_after(breaker) == 0.0
        tripping = error_of(breaker.call, down)
        assert 18 < retry_after(tripping) <= 20
        with time_machine.travel(time.time() + 21, tick=False):
            assert retry_after(breaker) == 0.0

    def test_open_storage_without_a_time_lets_the_next_call_through(self) -> None:
        """As pybreaker does."""
        assert retry_after(CircuitBreaker(state_storage=pybreaker.CircuitMemoryStorage("open"))) == 0.0

    def test_error_that_has_lost_its_breaker_is_no_reason_to_wait(self) -> None:
        """A pickle takes no traceback along, so that nobody knows; and nobody fails because of it."""
        breakers = BreakerRegistry(fail_max=1)
        error = error_of(breakers.get("payments").call, down)
        assert retry_after(error) > 0
        assert retry_after(pickle.loads(pickle.dumps(error))) == 0.0
        assert retry_after(CircuitBreakerError("mine")) == 0.0


class TestWhoRaised:
    """Of breakers around breakers, the one that has raised the error is the one to wait for."""

    @pytest.fixture
    def breakers(self) -> BreakerRegistry:
        """An outer breaker that waits for 500 s, and an inner one that waits for 50 s."""
        breakers = BreakerRegistry(fail_max=1)
        breakers.configure("outer", reset_timeout=500)
        breakers.configure("inner", reset_timeout=50)
        return breakers

    def nested(self, breakers: BreakerRegistry) -> Any:
        """The outer one calls the inner one."""
        return breakers["outer"].call(breakers["inner"].call, down)

    def test_inner_one_rejects(self, breakers: BreakerRegistry) -> None:
        """Its error passes through the outer one, which goes on."""
        breakers["outer"].fail_max = 5
        for _ in range(2):
            assert 49 < retry_after(error_of(self.nested, breakers)) <= 50

    def test_inner_one_makes_the_outer_one_trip(self, breakers: BreakerRegistry) -> None:
        """That error is the outer one's, though its traceback goes on into the inner one."""
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_outer_one_trips_and_says_nothing_of_its_own(self) -> None:
        """Then the error is the inner one's, passed on."""
        breakers = BreakerRegistry(fail_max=1)
        breakers.configure("outer", reset_timeout=500, throw_new_error_on_trip=False)
        breakers.configure("inner", reset_timeout=50)
        error = error_of(self.nested, breakers)
        assert breakers["outer"].current_state == "open"
        assert 49 < retry_after(error) <= 50

    def test_trial_of_the_outer_one_fails_in_the_inner_one(self, breakers: BreakerRegistry) -> None:
        """The outer one is open again."""
        breakers.set_state("outer", "half-open")
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_trial_meets_an_inner_one_that_rejects(self) -> None:
        """The outer one's timeout is over, so its own methods are in the traceback of the inner one's error."""
        breakers = BreakerRegistry(fail_max=1, throw_new_error_on_trip=False)
        breakers.configure("outer", reset_timeout=0)
        breakers.configure("inner", reset_timeout=50)
        breakers.set_state("outer", "open")
        breakers.set_state("inner", "open")
        assert 49 < retry_after(error_of(self.nested, breakers)) <= 50

    def test_outer_one_rejects(self, breakers: BreakerRegistry) -> None:
        """The inner one was not even asked."""
        breakers.set_state("outer", "open")
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_error_through_a_decorated_function(self, breakers: BreakerRegistry) -> None:
        """The usual way to use a breaker."""
        guarded = breakers.guard("inner")(down)
        assert 49 < retry_after(error_of(guarded)) <= 50
