"""The registry: one breaker per name, operator commands that raise, and `retry_after`."""

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

import pybreaker_redis
from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage
from pybreaker_redis._circuits import bulk
from pybreaker_redis._circuits.bulk import read_all_circuits
from pybreaker_redis.errors import StorageUnavailableError
from pybreaker_redis.listeners import LogListener
from pybreaker_redis.registry import BreakerRegistry, retry_after
from pybreaker_redis.testing import force_open
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, TransitionRecorder, breaker_on, down, fails, settled, up
from tests.support.cluster import Nodes
from tests.support.inspect import (
    listeners,
    lock_of,
    reset_in_child,
    retry_threads,
    storage_of,
    timeout_of,
    view_of,
)
from tests.support.logs import messages_of, records_of
from tests.support.places import cluster_client, has_clusters
from tests.support.round_trips import Meter
from tests.support.servers import ONCE, FoundServer
from tests.support.wait import wait_for

#: Values of a registry's `redis` argument, by kind.
REDIS_ARGUMENTS = {
    "memory": lambda server: None,
    "client": lambda server: server.client(),
    "decoding client": lambda server: server.client(decode_responses=True),
    "callable": lambda server: server.client,
    "URL": lambda server: server.url,
}

Make = Callable[..., BreakerRegistry]


@pytest.fixture
def shared(server: PrivateServer) -> Iterator[Make]:
    """Yield a factory of registries that share a server, as those of several processes do."""
    with contextlib.ExitStack() as stack:
        yield lambda **words: stack.enter_context(BreakerRegistry(server.url, **{"timeout": 10, **words}))


@pytest.fixture(params=REDIS_ARGUMENTS)
def made(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[Make]:
    """Yield a factory of registries for each kind of `redis` argument."""
    with contextlib.ExitStack() as stack:
        redis_argument = REDIS_ARGUMENTS[request.param]
        yield lambda **words: stack.enter_context(BreakerRegistry(redis_argument(server), **{"timeout": 10, **words}))


@pytest.fixture(scope="module")
def cluster(preferred: FoundServer) -> Iterator[Nodes]:
    """Yield three primaries of the preferred server."""
    with Nodes(preferred.binary, replicas=0) as nodes:
        yield nodes


def error_of(call: Callable[..., Any], *arguments: Any) -> CircuitBreakerError:
    """Return the error with which a call is rejected."""
    with pytest.raises(CircuitBreakerError) as raised:
        call(*arguments)
    return raised.value


class TestBreakers:
    """Breakers by name."""

    def test_same_name_is_the_same_breaker(self, made: Make) -> None:
        """Every module gets the same breaker, with one list of listeners.  pybreaker's class is its base."""
        recorder = TransitionRecorder()
        breakers = made(listeners=[recorder], fail_max=3, probe_lease=5.0)
        payments = breakers.get("payments", reset_timeout=9)
        assert type(payments) is pybreaker_redis.CircuitBreaker
        assert isinstance(payments, CircuitBreaker)
        assert breakers.get("payments") is breakers["payments"] is payments
        assert (payments.name, payments.fail_max, payments.reset_timeout) == ("payments", 3, 9)
        assert payments.listeners == (recorder,)
        assert payments.call(up) == "answer"

    def test_circuit_lies_under_prefix_and_name(self, server: PrivateServer, client: redis.Redis) -> None:
        """Two applications on one server do not share circuits by accident."""
        for prefix in ("", "shop"):
            with BreakerRegistry(server.client(), prefix=prefix) as breakers:
                breakers.get("payments").call(up)
        states = sorted(key.decode() for key in client.keys("*") if key.endswith(b":state"))
        assert states == ["payments:pybreaker:state", "shop:payments:pybreaker:state"]

    def test_without_redis_the_circuit_is_in_memory(self) -> None:
        """The same code runs without Redis: options for Redis are accepted and have no effect."""
        breakers = BreakerRegistry(timeout=0.5, max_staleness=0, probe_lease=7)
        assert type(storage_of(breakers.get("payments"))) is CircuitMemoryStorage

    def test_nothing_is_sent_before_a_call(self) -> None:
        """Modules create breakers at import time, when Redis may not be running."""

        def never() -> None:
            pytest.fail("the registry requested a client")

        breakers = BreakerRegistry(never)
        breakers.configure("payments", fail_max=2)
        breakers.guard("search")(up)
        assert breakers["payments"].fail_max == 2

    def test_many_threads_get_one_breaker(self) -> None:
        """Two breakers of one circuit in one process would have two locks and notify listeners twice."""
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
    def test_child_of_a_fork_creates_breakers_though_the_lock_was_held(self) -> None:
        """The thread that held the lock does not exist in the child."""
        breakers = BreakerRegistry()
        with lock_of(breakers):
            pid = os.fork()
            if pid == 0:
                threading.Timer(10, os._exit, [1]).start()
                os._exit(0 if breakers.get("payments").call(up) == "answer" else 2)
            reset_in_child(breakers)
            assert breakers.get("payments").call(up) == "answer"
        assert os.waitpid(pid, 0)[1] == 0

    def test_registry_is_a_collection_of_names(self) -> None:
        """Names that were requested, configured or guarded are members. An unknown name is a mistake."""
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

    def test_close_drops_breakers_and_keeps_settings(self, shared: Make) -> None:
        """After a change of settings, configured names stay, and no caller gets an old breaker."""
        breakers = shared()
        first = breakers.get("payments", fail_max=2)
        assert first.call(up) == "answer"
        breakers.close()
        second = breakers["payments"]
        assert second is not first
        assert second.fail_max == 2
        assert second.call(up) == "answer"

    def test_close_leaves_a_given_client_alone(self, client: redis.Redis) -> None:
        """The caller that created the client closes the client."""
        client.ping()
        with BreakerRegistry(client) as breakers:
            breakers.get("payments").call(up)
        (connection,) = client.connection_pool._available_connections
        assert connection._sock is not None

    @pytest.mark.usefixtures("no_listeners")
    def test_close_leaves_no_connection_and_no_thread(self, server: PrivateServer, client: redis.Redis) -> None:
        """Connections and threads end at once, independent of the garbage collector and of references to breakers."""
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
        # A breaker that is still referenced stays usable.
        fails(payments)
        assert breakers.status()["payments"].fail_counter == 1

    @pytest.mark.parametrize("when", ["between two attempts", "before one", "in the middle of one"])
    @pytest.mark.usefixtures("no_listeners")
    def test_close_during_an_outage_logs_nothing(
        self,
        killable_server: PrivateServer,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        when: str,
    ) -> None:
        """A closed registry leaves the outage unfinished. Neither a return nor a move is logged."""
        caplog.set_level("INFO", "pybreaker_redis")
        breakers = BreakerRegistry(killable_server.client())
        settled(breakers.get("payments"))
        killable_server.kill()
        fails(breakers["payments"])
        wait_for(lambda: fails(breakers["payments"]) or messages_of(caplog, killable_server), "the outage in the log")
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
        wait_for(lambda: not retry_threads(), "the end of the retry thread")
        assert messages_of(caplog, killable_server, "payments'") == []

    def test_member_of_a_string_enumeration_equals_its_text(self, shared: Make) -> None:
        """A name may be a member of a string enumeration, as with pybreaker's own storage."""

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
    """Settings of breakers, and contradictions between them."""

    def test_configured_settings_override_defaults(self) -> None:
        """Settings of one breaker override the defaults of all."""
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
        """One dictionary of settings holds every option of a circuit."""
        breakers = BreakerRegistry(client, timeout=5)
        storage: Any = storage_of(breakers.get("payments", max_staleness=3, cluster_mode=True))
        assert isinstance(storage, CircuitRedisStorage)
        assert (timeout_of(storage), view_of(storage).max_staleness) == (5, 3)
        breakers["payments"].call(up)
        assert client.exists("{payments}:pybreaker:state")

    @pytest.mark.parametrize(
        ("settings", "again"),
        [
            ({"fail_max": 2}, {"fail_max": 2}),
            ({}, {"fail_max": 9, "reset_timeout": 60, "exclude": None}),
            ({"exclude": [KeyError, up]}, {"exclude": (KeyError, up)}),
            ({"timeout": 1}, {"timeout": 1.0}),
        ],
    )
    def test_same_settings_again_are_no_conflict(self, settings: Any, again: Any) -> None:
        """Two modules may both state the settings that they need."""
        breakers = BreakerRegistry(fail_max=9)
        assert breakers.get("payments", **settings) is breakers.get("payments", **again)

    @pytest.mark.parametrize("action", ["get", "configure"])
    @pytest.mark.parametrize(
        ("settings", "again"),
        [
            ({"fail_max": 2}, {"fail_max": 3}),
            ({}, {"fail_max": 3}),
            ({"exclude": [KeyError]}, {"exclude": [ValueError]}),
            ({"max_staleness": 1}, {"max_staleness": 0}),
        ],
    )
    def test_contradicting_settings_are_refused(self, settings: Any, again: Any, action: str) -> None:
        """An exception shows the second caller that its settings have no effect."""
        breakers = BreakerRegistry(fail_max=9)
        payments = breakers.get("payments", **settings)
        (setting,) = again
        with pytest.raises(ValueError, match=f"breaker 'payments' has {setting}=.*cannot have {setting}="):
            getattr(breakers, action)("payments", **again)
        assert breakers.get("payments", **settings) is payments

    def test_contradicting_settings_before_first_use_are_refused(self) -> None:
        """Two places that configure one breaker differently are a mistake."""
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
    def test_invalid_setting_is_refused_at_once(
        self, setting: str, value: Any, error: type[Exception], redis_object: Any
    ) -> None:
        """An invalid setting raises at once and not in the first outage. The message contains its name."""
        breakers = BreakerRegistry(redis_object)
        with pytest.raises(error, match=setting):
            breakers.configure("payments", **{setting: value})
        if setting not in ("listeners", "name"):
            with pytest.raises(error, match=setting):
                BreakerRegistry(redis_object, **{setting: value})
        assert "payments" not in breakers

    @pytest.mark.parametrize("listener", [LogListener, print, "LogListener"])
    def test_invalid_listener_is_refused_at_once(self, listener: Any) -> None:
        """The registry does not instantiate classes, so every call would fail."""
        with pytest.raises(TypeError, match="listeners must be instances of"):
            BreakerRegistry(listeners=[listener])

    @pytest.mark.parametrize("prefix", [None, 7, b"shop"])
    def test_invalid_prefix_is_refused_at_once(self, prefix: Any) -> None:
        """The repr of another type would become the prefix."""
        with pytest.raises(TypeError, match="prefix must be a str"):
            BreakerRegistry(prefix=prefix)

    @pytest.mark.parametrize("name", ["", None, 7, b"payments"])
    def test_invalid_name_is_refused(self, name: Any) -> None:
        """Another type or an empty name would become the namespace of another circuit, or none."""
        with pytest.raises(TypeError, match="name"):
            BreakerRegistry().get(name)

    @pytest.mark.parametrize("name", ["pay\nments", "pay{ments", "{}payments"])
    def test_name_that_is_no_namespace_is_refused(self, name: str) -> None:
        """With and without Redis, a name is checked when it is configured.

        Development must not accept what production refuses.
        """
        for breakers in (BreakerRegistry(), BreakerRegistry("redis://localhost", prefix="shop")):
            with pytest.raises(ValueError, match="namespace"):
                breakers.configure(name)
            assert name not in breakers

    @pytest.mark.parametrize("url", ["localhost", "http://localhost", "redis://localhost:port"])
    def test_invalid_url_is_refused_at_once(self, url: str) -> None:
        """The rules are those of `CircuitRedisStorage.from_url`. Only an unreachable server is no error."""
        with pytest.raises(ValueError, match="url"):
            BreakerRegistry(url)

    @pytest.mark.parametrize("value", [7, redis.Redis, object()])
    def test_object_that_is_no_client_is_refused_at_once(self, value: Any) -> None:
        """The error is not delayed until the first call."""
        if value is redis.Redis:
            # The class can be called, and returns a client.
            BreakerRegistry(value)
            return
        with pytest.raises(TypeError, match="redis"):
            BreakerRegistry(value)

    @pytest.mark.parametrize("error", [Exception, BaseException, OSError, ConnectionError, TimeoutError])
    def test_excluding_errors_of_outages_warns(self, error: type[BaseException]) -> None:
        """Such a breaker never opens. The warning points to the line of the caller."""
        breakers = BreakerRegistry()
        match = f"exclude contains {error.__name__}"
        for action in (
            lambda: breakers.get("one", exclude=[KeyError, error]),
            lambda: breakers.configure("two", exclude=[error]),
            lambda: breakers.guard("three", exclude=[error]),
            lambda: BreakerRegistry(exclude=[error]),
        ):
            with pytest.warns(RuntimeWarning, match=match) as caught:
                action()
            assert caught[0].filename == __file__

    @pytest.mark.parametrize("excluded", [KeyError, ConnectionRefusedError, lambda error: True])
    def test_excluding_other_errors_does_not_warn(self, excluded: Any) -> None:
        """Business errors are meant to be excluded. Here, every warning is an error."""
        assert BreakerRegistry().get("payments", exclude=[excluded]).excluded_exceptions == (excluded,)

    def test_class_with_a_metaclass_excludes_no_other_errors(self) -> None:
        """The class would pass as a predicate with a true instance, so no error would count."""

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
    """Functions with the decorator `guard`."""

    def test_guarded_function_keeps_its_metadata_and_result(self, made: Make) -> None:
        """A guarded function is called, introspected and documented like the bare one."""
        breakers = made()

        @breakers.guard("payments")
        def charge(cents: int, *, currency: str = "EUR") -> str:
            """Take the money."""
            return f"{cents} {currency}"

        assert charge(995, currency="CHF") == "995 CHF"
        assert (charge.__name__, charge.__doc__) == ("charge", "Take the money.")

    def test_breaker_can_be_configured_after_its_function_is_defined(self) -> None:
        """Decorators run at import time, and settings follow later."""
        breakers = BreakerRegistry()
        guarded = breakers.guard("payments", fallback="none")(down)
        breakers.configure("payments", fail_max=1, throw_new_error_on_trip=True)
        assert guarded() == "none"

    def test_without_a_fallback_the_rejection_is_raised(self, made: Make) -> None:
        """Without a fallback, the caller gets the breaker's error."""
        breakers = made(fail_max=1)
        guarded = breakers.guard("payments")(down)
        for error in (Down, CircuitBreakerError):
            with pytest.raises(error):
                guarded()

    @pytest.mark.parametrize("value", [None, 0, "later", []])
    def test_fallback_value_replaces_rejections_only(self, made: Make, value: Any) -> None:
        """Errors of the dependency reach the caller while the circuit is closed.

        The value ``None`` is a fallback, too.
        """
        breakers = made()
        guarded = breakers.guard("payments", fallback=value, fail_max=2)(down)
        for _ in range(2):
            with pytest.raises(Down):
                guarded()
        assert guarded() == value
        # A breaker that raises a new error when it trips has the fallback for that call, too.
        assert breakers.guard("stock", fallback=value, fail_max=1, throw_new_error_on_trip=True)(down)() == value

    def test_callable_fallback_gets_the_arguments(self) -> None:
        """A fallback often needs the arguments. The error is in `sys.exc_info()`, and chained."""
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
        """A stream that breaks off is a failure, as with a plain breaker."""
        breakers = BreakerRegistry(fail_max=1)

        @breakers.guard("stream", fallback=())
        def numbers() -> Iterator[int]:
            yield 1
            raise Down

        with pytest.raises(Down):
            list(numbers())
        assert list(numbers()) == []

    async def _coroutine(self) -> None:
        """Do nothing before the coroutine is awaited."""

    async def _asynchronous_generator(self) -> Any:
        """Do nothing before the generator is iterated."""
        yield 1

    class _Called:
        async def __call__(self) -> None:
            """Do nothing before the coroutine is awaited."""

    @pytest.mark.parametrize(
        "function",
        [_coroutine, functools.partial(_coroutine, None), _Called(), functools.partial(_Called())],
        ids=["async def", "partial", "object", "partial of an object"],
    )
    def test_asynchronous_fallback_of_a_function_is_refused(self, function: Any) -> None:
        """The function would return a coroutine in place of a result."""
        with pytest.raises(TypeError, match=r"fallback .* is asynchronous"):
            BreakerRegistry().guard("payments", fallback=function)(up)

    @pytest.mark.parametrize("fallback", ["value", "function", "async def"])
    def test_asynchronous_function_is_guarded(self, made: Make, fallback: str) -> None:
        """Failures are counted when the coroutine ends, and a rejection has the fallback."""

        async def later(cents: int) -> str:
            return "later"

        breakers = made(fail_max=1)
        fallbacks = {"value": "later", "function": lambda cents: "later", "async def": later}

        @breakers.guard("payments", fallback=fallbacks[fallback])
        async def charge(cents: int) -> str:
            """Take the money."""
            if cents < 0:
                raise Down
            return f"{cents}"

        async def calls() -> None:
            assert await charge(995) == "995"
            with pytest.raises(Down):
                await charge(-1)
            assert await charge(995) == "later"

        assert (charge.__name__, charge.__doc__) == ("charge", "Take the money.")
        assert inspect.iscoroutinefunction(charge)
        asyncio.run(calls())

    def test_asynchronous_function_without_a_fallback_raises_the_rejection(self) -> None:
        """Without a fallback, the task gets the breaker's error."""
        breakers = BreakerRegistry()
        guarded = breakers.guard("payments")(self._coroutine)
        breakers.set_state("payments", "open")
        with pytest.raises(CircuitBreakerError):
            asyncio.run(guarded())

    def test_asynchronous_generator_is_guarded_until_its_end(self) -> None:
        """A stream that breaks off is a failure.  It cannot have a fallback, because items may have been sent."""
        breakers = BreakerRegistry(fail_max=1)

        @breakers.guard("stream")
        async def numbers() -> Any:
            yield 1
            raise Down

        async def read() -> list[int]:
            return [number async for number in numbers()]

        for error in (Down, CircuitBreakerError):
            with pytest.raises(error):
                asyncio.run(read())
        with pytest.raises(TypeError, match="an asynchronous generator has no fallback"):
            breakers.guard("other", fallback=())(self._asynchronous_generator)

    def test_function_that_returns_a_coroutine_is_refused_when_called(self) -> None:
        """A decorator in between may hide that a function is asynchronous."""
        breakers = BreakerRegistry(fail_max=1)

        @functools.wraps(self._coroutine)
        def undone() -> Any:
            return self._coroutine()

        with pytest.raises(TypeError, match=r"cannot guard the asynchronous function .*_coroutine"):
            breakers.guard("payments")(undone)()
        assert breakers["payments"].fail_counter == 0
        breakers.set_state("payments", "open")
        with pytest.raises(TypeError, match=r"fallback .* is asynchronous"):
            breakers.guard("payments", fallback=undone)(up)()

    @pytest.mark.parametrize("kind", ["coroutine", "awaitable", "future", "future of a loop", "asynchronous generator"])
    def test_asynchronous_result_is_refused(self, kind: str) -> None:
        """The call returned before its work was done, so the breaker guarded nothing."""
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
            with pytest.raises(TypeError, match=r"the (guarded|asynchronous) function"):
                breakers.guard("payments")(call)()
            breakers.set_state("payments", "open")
            with pytest.raises(TypeError, match=r"the fallback .* is asynchronous"):
                breakers.guard("payments", fallback=call)(up)()
            for result in made:
                # Otherwise, Python would report that the coroutine was never awaited.
                assert kind != "coroutine" or inspect.getcoroutinestate(result) == inspect.CORO_CLOSED
                assert "future" not in kind or not result.cancelled(), "other callers may wait for it"

    def test_refused_result_is_not_shown(self) -> None:
        """The result of a call may be a secret."""
        future: Future[str] = Future()
        future.set_result("swordfish")
        with pytest.raises(TypeError) as raised:
            BreakerRegistry().guard("payments")(lambda: future)()
        assert "swordfish" not in str(raised.value)
        with pytest.raises(TypeError) as refused:
            BreakerRegistry().guard("payments", fallback=functools.partial(self._coroutine, "swordfish"))(up)
        assert "swordfish" not in str(refused.value)

    @pytest.mark.parametrize("result", [None, "text", MagicMock(), Down(), iter([1])], ids=lambda it: type(it).__name__)
    def test_result_of_any_other_kind_is_returned(self, result: Any) -> None:
        """Mocks, too, which have nearly every method."""
        assert BreakerRegistry().guard("payments")(lambda: result)() is result

    def test_function_that_runs_a_coroutine_to_its_end_is_guarded(self) -> None:
        """The name that `functools.wraps` copies does not matter."""
        breakers = BreakerRegistry(fail_max=1)

        async def charged() -> None:
            raise Down

        @breakers.guard("payments")
        @functools.wraps(charged)
        def charge() -> None:
            asyncio.run(charged())

        for error in (Down, CircuitBreakerError):
            with pytest.raises(error):
                charge()

    @pytest.mark.parametrize("kind", [classmethod, staticmethod])
    def test_decorators_in_the_wrong_order_are_refused(self, kind: Any) -> None:
        """Objects in this order raise when they are called, which would open the circuit of every process."""
        with pytest.raises(TypeError, match=f"write @{kind.__name__} above"):
            BreakerRegistry().guard("payments")(kind(up))


class _Awaitable:
    """Awaitable that is no coroutine."""

    def __await__(self) -> Iterator[None]:
        yield


class TestStatus:
    """The status of circuits, as operators see them."""

    def test_status_shows_every_circuit(self, made: Make) -> None:
        """Circuits that this process has not used are included."""
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

    def test_status_of_an_empty_registry_is_empty(self, made: Make) -> None:
        """A registry without names sends no command."""
        assert made().status() == {}

    def test_status_of_a_half_open_circuit_shows_its_lease(self, made: Make) -> None:
        """The status shows the probe and the rest of its lease, which no other caller can see."""
        breakers = made(reset_timeout=0, success_threshold=3, probe_lease=20)
        payments = breakers.get("payments")
        payments.open()
        payments.call(up)
        with payments.calling():
            status = breakers.status()["payments"]
        assert (status.state, status.success_counter) == ("half-open", 1)
        assert 19 < status.retry_after <= 20.1

    @pytest.mark.usefixtures("no_listeners")
    def test_status_costs_one_round_trip_for_any_number_of_circuits(self, server: PrivateServer) -> None:
        """The operator's page does not become slower with each dependency."""
        with BreakerRegistry(server.client()) as breakers:
            for number in range(12):
                breakers.configure(f"circuit {number}")
            assert len(breakers.status()) == 12
            meter = Meter(server)
            with contextlib.closing(meter):
                assert meter.cost(breakers.status) == 1

    def test_status_changes_nothing(self, every_server: PrivateServer) -> None:
        """Reading the status creates, repairs and renews no key."""
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

    @pytest.mark.full
    @pytest.mark.usefixtures("no_listeners")
    @pytest.mark.skipif(not has_clusters(), reason="this redis-py has no clusters")
    def test_status_costs_one_round_trip_for_each_node_of_a_cluster(self, cluster: Nodes, monkeypatch: Any) -> None:
        """Circuits lie on different nodes, and one status reads them all."""
        with BreakerRegistry(cluster_client(cluster.all[0].port), fail_max=2) as breakers:
            for number in range(12):
                fails(breakers.get(f"circuit {number}"), number % 3)
            reads: list[int] = []
            monkeypatch.setattr(
                bulk,
                "read_all_circuits",
                lambda requests: reads.append(len(requests)) or read_all_circuits(requests),
            )
            states = [status.state for status in breakers.status().values()]
        assert states == ["closed", "closed", "open"] * 4
        assert len(reads) == 3
        assert sum(reads) == 12

    @pytest.mark.parametrize("cluster_mode", [False, True])
    def test_plain_client_of_one_node_finds_the_others(self, cluster: Nodes, cluster_mode: bool) -> None:
        """Circuits on other nodes, or with keys that cannot be read together, are read one by one."""
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

    def test_status_raises_errors_of_the_client(self, killable_server: PrivateServer) -> None:
        """An operator must not mistake local circuits for the shared ones."""
        with BreakerRegistry(killable_server.client(), fail_max=1) as breakers:
            fails(breakers.get("payments"))
            killable_server.kill()
            with pytest.raises(
                StorageUnavailableError, match=r"circuit 'payments': Redis at .* \(limit 2 s, ConnectionError"
            ) as raised:
                breakers.status()
            assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)


#: States that an operator can set. ``None`` stands for a reset, which keeps the state and drops the counts.
STATES = ("open", "closed", "half-open", None)


def command(name: str, state: str | None) -> Callable[[BreakerRegistry], None]:
    """Return the operator's command."""
    return lambda breakers: breakers.set_state(name, state) if state else breakers.reset(name)


class TestCommands:
    """Commands of operators."""

    @pytest.mark.parametrize("state", STATES)
    def test_command_acts_for_every_process(self, shared: Make, state: str | None) -> None:
        """The operator's process is rarely one that makes calls."""
        operator, worker = shared(fail_max=9), shared(fail_max=9)
        fails(worker.get("payments"), 3)
        operator.configure("payments")
        command("payments", state)(operator)
        (status,) = worker.status().values()
        assert (status.state, status.fail_counter) == (state or "closed", 3 if state in ("open", "half-open") else 0)

    def test_failing_listener_does_not_fail_the_command(self, made: Make, caplog: pytest.LogCaptureFixture) -> None:
        """An operator that sees an error would repeat the command."""

        class Failing(pybreaker.CircuitBreakerListener):
            def state_change(self, *_: Any) -> None:
                raise RuntimeError("of the listener")

        breakers = made(listeners=[Failing()])
        breakers.configure("payments")
        breakers.set_state("payments", "open")
        assert breakers.status()["payments"].state == "open"
        (record,) = records_of(caplog, "'payments'")
        assert "failed in state_change (RuntimeError: of the listener); the call continues" in record.message
        assert record.exc_info

    def test_unknown_state_is_refused(self, made: Make) -> None:
        """Nothing is sent, and the message contains all three states."""
        breakers = made()
        breakers.configure("payments")
        with pytest.raises(ValueError, match="state must be one of 'closed', 'open', 'half-open', not 'shut'"):
            breakers.set_state("payments", "shut")

    def test_commands_change_the_circuit(self, made: Make) -> None:
        """The commands have the same effect for every kind of storage."""
        recorder = TransitionRecorder()
        breakers = made(fail_max=2, reset_timeout=60, success_threshold=2, listeners=[recorder])
        payments = breakers.get("payments")
        breakers.set_state("payments", "open")
        # Listeners of this process are notified without a call.
        assert recorder.states == [("payments", "closed", "open")]
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
        assert recorder.states == [
            ("payments", "closed", "open"),
            ("payments", "open", "half-open"),
            ("payments", "half-open", "closed"),
        ]

    def test_half_open_by_command_admits_one_call(self, shared: Make) -> None:
        """The number of processes does not matter, nor which of them changed the state."""
        operator, *workers = (shared(probe_lease=20) for _ in range(3))
        operator.configure("payments")
        operator.set_state("payments", "half-open")
        first, second = (worker.get("payments") for worker in workers)
        with first.calling():
            assert error_of(second.call, up)
        assert second.call(up) == "answer"

    def test_unknown_name_is_refused(self) -> None:
        """A typo does not open an unused circuit."""
        for state in STATES:
            with pytest.raises(KeyError, match="stokc"):
                command("stokc", state)(BreakerRegistry())

    @pytest.mark.parametrize("state", STATES)
    def test_command_raises_errors_of_the_client_and_changes_nothing(
        self, killable_server: PrivateServer, state: str | None
    ) -> None:
        """`breaker.open()` changes the local circuit in an outage. An operator needs an error instead."""
        with BreakerRegistry(killable_server.client(), fail_max=5) as breakers:
            payments = breakers.get("payments")
            assert payments.call(up) == "answer"
            killable_server.kill()
            with pytest.raises(StorageUnavailableError) as raised:
                command("payments", state)(breakers)
            assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)
            assert raised.value.circuits == ("payments",)
            assert payments.call(up) == "answer"

    def test_command_waits_for_a_frozen_server_for_the_operator_timeout(
        self, killable_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command waits longer than a guarded call, and not for ever."""
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

    def test_command_without_a_timeout_uses_the_connections_of_the_client(self, server: PrivateServer) -> None:
        """With ``timeout=None``, commands use the client's connections and their timeouts."""
        with BreakerRegistry(server.client(), timeout=None) as breakers:
            breakers.configure("payments")
            breakers.set_state("payments", "open")
            assert breakers.status()["payments"].state == "open"


class TestHealth:
    """The method `BreakerRegistry.health`."""

    @pytest.mark.usefixtures("no_listeners")
    def test_each_circuit_has_its_condition_without_a_request(self, server: PrivateServer) -> None:
        """A page of the application shows all circuits, also those that no call has used yet."""
        with BreakerRegistry(server.url, prefix="shop", timeout=10) as breakers:
            breakers.configure("stock")
            settled(breakers.get("payments"))
            with contextlib.closing(Meter(server, scripts=True)) as meter:
                assert meter.cost(breakers.health) == 0
            seen = {name: (item.circuit, item.condition, item.is_own) for name, item in breakers.health().items()}
        assert seen == {
            "stock": ("shop:stock", "unused", False),
            "payments": ("shop:payments", "connected", False),
        }

    def test_outage_is_shown_without_a_request(self, killable_server: PrivateServer) -> None:
        """An error of an operator's command names this method, so the method works while commands fail."""
        with BreakerRegistry(killable_server.client()) as breakers:
            assert breakers.get("payments").call(up) == "answer"
            killable_server.kill()
            with pytest.raises(StorageUnavailableError, match=r"check health\(\)"):
                breakers.status()
            # A call that still trusts the view of the process needs no local circuit.
            wait_for(
                lambda: breakers["payments"].call(up) and breakers.health()["payments"].is_own, "the outage is noticed"
            )
            health = breakers.health()["payments"]
            assert (health.state, health.condition) == ("closed", "unreachable")
            assert "ConnectionError" in health.last_error

    def test_circuits_without_redis_are_left_out(self, server: PrivateServer) -> None:
        """A circuit of one process, or one that a test has forced, has no server that could be lost."""
        in_process, shared = BreakerRegistry(), BreakerRegistry(server.url)
        for breakers in (in_process, shared):
            breakers.configure("payments")
            breakers.configure("stock")
        assert in_process.health() == {}
        with force_open(shared["stock"]):
            assert list(shared.health()) == ["payments"]
        assert list(shared.health()) == ["payments", "stock"]


class TestRetryAfter:
    """The function `retry_after`."""

    def test_open_circuit_may_be_retried_after_its_reset_timeout(self, made: Make) -> None:
        """The result suits the header of a 503 response, and the delay of a repeated task."""
        breakers = made(fail_max=1, reset_timeout=20, throw_new_error_on_trip=True)
        payments = breakers.get("payments")
        assert retry_after(payments) == 0.0
        tripping = error_of(payments.call, down)
        rejecting = error_of(payments.call, up)
        for subject in (tripping, rejecting, payments):
            assert 19 < retry_after(subject) <= 20.1
        with time_machine.travel(time.time() + 15, tick=False):
            assert 4 < retry_after(payments) <= 5.1
        with time_machine.travel(time.time() + 21, tick=False):
            # After the timeout, the result is zero and not negative.
            assert retry_after(payments) == 0.0

    @pytest.mark.usefixtures("no_listeners")
    def test_retry_after_in_steady_state_sends_no_command(self, server: PrivateServer) -> None:
        """`retry_after` is called for each rejected request."""
        meter = Meter(server, scripts=True)
        with contextlib.closing(meter), contextlib.closing(server.client()) as client:
            payments = settled(breaker_on(client, reset_timeout=60))
            assert meter.cost(lambda: retry_after(payments)) == 0
            payments.open()
            error = error_of(payments.call, up)
            assert meter.cost(lambda: retry_after(error)) == 0

    def test_retry_after_during_a_probe_is_the_rest_of_its_lease(self, made: Make) -> None:
        """Until the prober reports or its lease ends, no other call is admitted."""
        breakers = made(reset_timeout=60, probe_lease=20)
        payments = breakers.get("payments")
        breakers.set_state("payments", "half-open")
        seen: list[float] = []
        with payments.calling():
            other = threading.Thread(target=lambda: seen.append(retry_after(payments)))
            other.start()
            other.join()
            # The prober itself need not wait.
            assert retry_after(payments) == 0.0
        assert 19 < seen[0] <= 20.1

    def test_retry_after_during_a_probe_of_another_process_is_the_rest_of_its_lease(self, shared: Make) -> None:
        """The process that does not probe reads the lease from the record, for a breaker and for an error."""
        prober, other = shared(probe_lease=20), shared(probe_lease=20)
        breaker = other.get("payments")
        prober.configure("payments")
        prober.set_state("payments", "half-open")
        with prober["payments"].calling():
            error = error_of(breaker.call, up)
            assert 19 < retry_after(error) <= 20.1
            assert 19 < retry_after(breaker) <= 20.1

    def test_retry_after_with_a_free_probe_is_zero(self, made: Make) -> None:
        """The circuit is half-open and its probe is free, so the next call may claim the probe."""
        breakers = made()
        breakers.configure("payments")
        breakers.set_state("payments", "half-open")
        assert retry_after(breakers["payments"]) == 0.0
        assert breakers.status()["payments"].retry_after == 0.0

    @pytest.mark.parametrize("stock", ["memory", "redis"])
    def test_retry_after_works_with_storages_of_stock(self, stock: str, client: redis.Redis) -> None:
        """An application with stock storages can use the same function for all breakers."""
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

    def test_retry_after_of_an_open_storage_without_a_time_is_zero(self) -> None:
        """The result agrees with pybreaker, which admits the call."""
        assert retry_after(CircuitBreaker(state_storage=pybreaker.CircuitMemoryStorage("open"))) == 0.0

    def test_retry_after_of_an_error_without_its_breaker(self) -> None:
        """A pickle has no traceback, so the breaker is unknown.  This package's error has the time that it had."""
        breakers = BreakerRegistry(reset_timeout=20)
        payments = breakers.get("payments")
        payments.open()
        error = error_of(payments.call, up)
        assert 19 < retry_after(pickle.loads(pickle.dumps(error))) <= 20
        assert retry_after(CircuitBreakerError("mine")) == 0.0


class TestNestedBreakers:
    """The breaker that raised an error decides about the wait when breakers are nested."""

    @pytest.fixture
    def breakers(self) -> BreakerRegistry:
        """Return a registry with an outer breaker of 500 s and an inner breaker of 50 s."""
        breakers = BreakerRegistry(fail_max=1, throw_new_error_on_trip=True)
        breakers.configure("outer", reset_timeout=500)
        breakers.configure("inner", reset_timeout=50)
        return breakers

    def nested(self, breakers: BreakerRegistry) -> Any:
        """Call the inner breaker through the outer one."""
        return breakers["outer"].call(breakers["inner"].call, down)

    def test_inner_breaker_that_rejects_decides(self, breakers: BreakerRegistry) -> None:
        """The error of the inner breaker passes through the outer one, which stays closed."""
        breakers["outer"].fail_max = 5
        for _ in range(2):
            assert 49 < retry_after(error_of(self.nested, breakers)) <= 50

    def test_outer_breaker_that_trips_decides(self, breakers: BreakerRegistry) -> None:
        """The outer breaker raises the error, though its traceback continues into the inner one."""
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_inner_breaker_decides_if_the_outer_one_trips_silently(self) -> None:
        """The outer breaker passes on the error of the inner one."""
        breakers = BreakerRegistry(fail_max=1, throw_new_error_on_trip=True)
        breakers.configure("outer", reset_timeout=500, throw_new_error_on_trip=False)
        breakers.configure("inner", reset_timeout=50)
        error = error_of(self.nested, breakers)
        assert breakers["outer"].current_state == "open"
        assert 49 < retry_after(error) <= 50

    def test_outer_breaker_whose_probe_fails_decides(self, breakers: BreakerRegistry) -> None:
        """The outer breaker is open again."""
        breakers.set_state("outer", "half-open")
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_inner_breaker_that_rejects_a_probe_of_the_outer_one_decides(self) -> None:
        """The inner error's traceback contains methods of the outer breaker, because its timeout is over."""
        breakers = BreakerRegistry(fail_max=1, throw_new_error_on_trip=False)
        breakers.configure("outer", reset_timeout=0)
        breakers.configure("inner", reset_timeout=50)
        breakers.set_state("outer", "open")
        breakers.set_state("inner", "open")
        assert 49 < retry_after(error_of(self.nested, breakers)) <= 50

    def test_outer_breaker_that_rejects_decides(self, breakers: BreakerRegistry) -> None:
        """The inner breaker was not called."""
        breakers.set_state("outer", "open")
        assert 499 < retry_after(error_of(self.nested, breakers)) <= 500

    def test_breaker_of_a_decorated_function_decides(self, breakers: BreakerRegistry) -> None:
        """A decorated function is the usual way to use a breaker."""
        guarded = breakers.guard("inner")(down)
        assert 49 < retry_after(error_of(guarded)) <= 50
