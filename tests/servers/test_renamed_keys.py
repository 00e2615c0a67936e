"""Clients that rename keys: their circuits lie, publish and are listened to under the names on the server."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis.keys import circuit_keys, library_class_of, plain_copy, server_key_names, unwrap_client
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.registry.settings import STORAGE_DEFAULTS
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.clients import Prefixing
from tests.support.wait import wait_for

KEYS = circuit_keys("payments", needs_one_slot=False)

pytestmark = pytest.mark.usefixtures("patient", "nobody_listens")


class Scripts(redis.Redis):
    """Renames the keys of scripts only."""

    prefix = ""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """With the prefix before each key."""
        named = [*words]
        if named[0] in ("EVAL", "EVALSHA"):
            named[3 : 3 + int(named[2])] = [self.prefix + key for key in named[3 : 3 + int(named[2])]]
        return super().execute_command(*named, **options)


class FirstOfScripts(redis.Redis):
    """Renames the first key of EVALSHA, as kombu's client does, and returns it as bytes."""

    prefix = ""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """With the prefix before that key."""
        if words[0] == "EVALSHA":
            words = (*words[:3], (self.prefix + words[3]).encode(), *words[4:])
        return super().execute_command(*words, **options)


class ByMethod(redis.Redis):
    """Renames keys where it is asked for a script, not where that is sent."""

    prefix = ""

    def evalsha(self, sha: Any, numkeys: int, *words: Any) -> Any:
        """With the prefix before each key."""
        return super().evalsha(sha, numkeys, *(self.prefix + key for key in words[:numkeys]), *words[numkeys:])


class Mixed(FirstOfScripts, Scripts):
    """Has inherited from two."""

    prefix = ""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """As the second one has it."""
        return Scripts.execute_command(self, *words, **options)


KINDS = [Scripts, FirstOfScripts, ByMethod, Prefixing, Mixed]


@pytest.fixture
def of(server: PrivateServer) -> Iterator[Callable[..., Any]]:
    """A client of a kind, with a prefix."""
    with contextlib.ExitStack() as stack:

        def make(kind: type[Any], prefix: str) -> Any:
            client = stack.enter_context(contextlib.closing(kind(unix_socket_path=server.unix_socket)))
            client.prefix = prefix
            return client

        yield make


def application(client: Any, **words: Any) -> pybreaker.CircuitBreaker:
    """A breaker of an application that has a circuit called ``payments``."""
    return pybreaker.CircuitBreaker(
        fail_max=2, state_storage=CircuitRedisStorage("closed", client, namespace="payments", **words)
    )


def fails(breaker: pybreaker.CircuitBreaker) -> None:
    """A call that fails, or is rejected."""
    with contextlib.suppress(Down, pybreaker.CircuitBreakerError):
        breaker.call(down)


@pytest.mark.parametrize("kind", KINDS)
def test_applications_that_differ_by_prefix_have_circuits_of_their_own(
    kind: type[Any], of: Callable[..., Any], client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the record, nor what is published, nor what is polled of one reaches the other."""
    one, other = application(of(kind, "a:"), probe_lease=5), application(of(kind, "b:"))
    for breaker in (one, other):
        breaker.call(up)
    wait_for(lambda: {*map(bytes, client.pubsub_channels())} == {b"a:" + CHANNEL, b"b:" + CHANNEL}, "both listen")
    for _ in range(2):
        fails(one)
    assert one.current_state == "open"
    assert other.call(up) == "answer"
    assert other.current_state == "closed"
    with pytest.raises(Down):
        other.call(down)
    names = {bytes(name) for name in client.keys("*")}
    assert {name[:2] for name in names} == {b"a:", b"b:"}
    assert client.get("a:payments:pybreaker:state") == b"open"
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


CHANNEL = b"payments:pybreaker:circuit@0"


@pytest.mark.parametrize("kind", KINDS)
def test_processes_with_the_same_prefix_share_a_circuit(kind: type[Any], of: Callable[..., Any]) -> None:
    """What one does the other hears."""
    one, other = application(of(kind, "a:")), application(of(kind, "a:"))
    for breaker in (one, other):
        breaker.call(up)
    for _ in range(2):
        fails(one)
    wait_for(lambda: other.current_state == "open", "the other one hears of it")


@pytest.mark.parametrize("timeout", [10.0, None])
def test_bulk_look_agrees_with_the_circuits(of: Callable[..., Any], timeout: float | None) -> None:
    """An operator sees what calls see, with and without this package's own connections."""
    registry = BreakerRegistry(of(Scripts, "a:"), timeout=timeout, fail_max=1)
    other = BreakerRegistry(of(Scripts, "b:"), timeout=timeout)
    for breakers in (registry, other):
        breakers.get("payments").call(up)
    fails(registry["payments"])
    assert registry.status()["payments"].state == "open"
    assert other.status()["payments"].state == "closed"
    registry.set_state("payments", "closed")
    assert registry["payments"].call(up) == "answer"
    assert STORAGE_DEFAULTS["timeout"] == 10.0


def test_transactions_use_the_names_on_the_server(of: Callable[..., Any], server: PrivateServer) -> None:
    """A client renames commands of scripts, and pipelines are none of its own."""
    with contextlib.closing(server.client()) as operator:
        operator.execute_command(
            *("ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all", "-eval", "-evalsha"),
        )
        made = Scripts(unix_socket_path=server.unix_socket, username="shop", password="secret")
        made.prefix = "a:"
        storage = CircuitRedisStorage("closed", made, namespace="payments")
        breaker = pybreaker.CircuitBreaker(fail_max=1, state_storage=storage)
        fails(breaker)
        assert storage.health().mode == "optimistic"
        assert {bytes(name)[:2] for name in operator.keys("*payments*")} == {b"a:"}
        operator.execute_command("ACL", "DELUSER", "shop")
        made.close()


def test_writing_check_after_an_outage_writes_to_the_circuits_own_key(
    of: Callable[..., Any], client: redis.Redis
) -> None:
    """It is a plain SET, which this client does not rename."""
    breaker = application(of(Scripts, "a:"))
    breaker.call(up)
    client.flushall()
    breaker._state_storage._core.verify_writable()  # type: ignore[attr-defined]
    assert client.get("a:payments:pybreaker:state") == b"closed"
    assert {bytes(name)[:2] for name in client.keys("*")} == {b"a:"}


# -- without a server --------------------------------------------------------------------------------------------------


class Fake(fakeredis.FakeRedis):  # type: ignore[misc]
    """A fake one that renames."""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """All keys of scripts."""
        if words[0] in ("EVAL", "EVALSHA"):
            words = (*words[:3], *(f"f:{key}" for key in words[3:8]), *words[8:])
        return super().execute_command(*words, **options)


def test_fake_client_is_renamed_by_its_subclass() -> None:
    """Tests of applications use the same subclass."""
    assert server_key_names(Fake(), KEYS) == tuple(f"f:{key}" for key in KEYS)
    assert type(plain_copy(Fake())) is fakeredis.FakeRedis


class Broken(redis.Redis):
    """Fails in a way of its own."""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Only with a connection."""
        raise RuntimeError


class Single(redis.Redis):
    """May not be inherited from."""

    def __init_subclass__(cls) -> None:
        """It refuses."""
        raise TypeError


@pytest.mark.parametrize(
    "make", [redis.Redis, Broken, Single, object, lambda: None], ids=["library", "broken", "single", "object", "none"]
)
def test_names_stay_where_nothing_is_renamed_or_known(make: Callable[[], Any]) -> None:
    """And nothing is raised, whatever a class does."""
    assert server_key_names(make(), KEYS) == KEYS


def test_nothing_is_closed_or_sent_to_find_the_names(of: Callable[..., Any]) -> None:
    """The user's connections are the user's."""
    given = of(Scripts, "a:")
    assert given.ping()
    before = dict(vars(given)), given.client_id()
    assert server_key_names(given, KEYS) == tuple(f"a:{key}" for key in KEYS)
    assert (dict(vars(given)), given.client_id()) == before


class Alone(Scripts):
    """Cannot be copied."""

    def __copy__(self) -> Any:
        """There is only one."""
        raise RuntimeError


def test_client_that_cannot_be_left_goes_on_renaming(of: Callable[..., Any], client: redis.Redis) -> None:
    """There is no plain one for the names on the server, so it is given those that it renames."""
    one = application(of(Alone, "a:"))
    for _ in range(2):
        fails(one)
    assert one.current_state == "open"
    assert client.get("a:payments:pybreaker:state") == b"open"
    assert not client.pubsub_channels(), "the name is unknown"


@pytest.mark.parametrize("timeout", [10.0, None])
def test_users_single_connection_is_not_closed_with_the_circuit(server: PrivateServer, timeout: float | None) -> None:
    """Nor is the pool: both end with the user's client."""
    given = Scripts(unix_socket_path=server.unix_socket, single_connection_client=True)
    given.prefix = "a:"
    before = given.client_id()
    fails(application(given, timeout=timeout, max_staleness=0))
    gc.collect()
    assert given.connection is not None
    assert given.client_id() == before
    given.close()


class Wrapper:
    """As flask-redis: what it does not have the client has."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Counting(Wrapper):
    """Has a method of its own for scripts."""

    def evalsha(self, *words: Any) -> Any:
        """Once more."""
        return self._client.evalsha(*words)


def test_client_behind_a_wrapper_is_found_if_that_sends_scripts_by_it() -> None:
    """A wrapper that has nothing to say about scripts is looked through, also several."""
    client = redis.Redis()
    for seen in (client, Wrapper(client), Wrapper(Wrapper(client))):
        assert unwrap_client(seen) is client
    for opaque in (Counting(client), object(), None):
        assert unwrap_client(opaque) is opaque
        assert library_class_of(opaque) is None
    deep: Any = client
    for _ in range(20):
        deep = Wrapper(deep)
    assert unwrap_client(deep) is client


def test_plain_client_of_no_library_is_refused() -> None:
    """What its methods do is not known."""
    with pytest.raises(TypeError, match="Counting"):
        plain_copy(Counting(redis.Redis()))


def test_other_commands_of_a_client_are_not_taken_for_names() -> None:
    """It counts its own commands, and then renames the keys."""

    class Counting(redis.Redis):
        def execute_command(self, *words: Any, **options: Any) -> Any:
            if words[0] == "EVALSHA":
                super().execute_command("INCRBY", "commands", 1)
                super().execute_command("SET", "last", "evalsha", "EX", 60)
                words = (*words[:3], "a:" + words[3], *words[4:])
            return super().execute_command(*words, **options)

    assert server_key_names(Counting(), KEYS) == tuple(f"a:{key}" for key in KEYS)


class Shop(CircuitRedisStorage):
    """As pybreaker's class allows it."""

    BASE_NAMESPACE = "shop:cb"


def test_tenants_that_differ_by_base_namespace_have_circuits_of_their_own(server, client):
    """In the keys, in the channel, and by a URL."""
    storages = [Shop("closed", client, "pay"), Shop.from_url(f"unix://{server.unix_socket}", "closed", "buy")]
    storages.append(CircuitRedisStorage("closed", client, "pay"))
    for storage in storages:
        breaker = CircuitBreaker(fail_max=1, state_storage=storage)
        with contextlib.suppress(CircuitBreakerError):
            breaker.call({}.__getitem__, "missing")
    stored = {bytes(key).rpartition(b":")[0] for key in client.keys("*:state")}
    assert stored == {b"pay:shop:cb", b"buy:shop:cb", b"pay:pybreaker"}
    assert storages[0]._core.shared.selector.current.channel == "pay:shop:cb:circuit@0"
    assert Shop("closed", client).health().circuit == "shop:cb"
