"""The Lua engine: headers of the scripts, their way to the server, and servers without scripts."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines.base import Engine
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from pybreaker_redis._model.intents import (
    INTENTS,
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    SetOpenedAt,
    ShareTrip,
    Trip,
)
from pybreaker_redis._redis.classify import ScriptingUnavailableError
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.logs import messages_of, records_of
from tests.support.round_trips import commands_sent

pytestmark = pytest.mark.usefixtures("patient")


LUA = Path(str(resources.files("pybreaker_redis._engines"))) / "lua"

KEYS = circuit_keys("scripts", needs_one_slot=False)

every_intent = pytest.mark.parametrize("intent", INTENTS, ids=lambda intent: intent.operation)


class Recording(redis.Redis):
    """Client that records the commands sent one by one, but not those in pipelines."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        self.sent: list[str] = []

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Record the command and send it."""
        self.sent.append(args[0])
        return super().execute_command(*args, **options)


@contextlib.contextmanager
def recording(server: PrivateServer, **words: Any) -> Iterator[Recording]:
    """Yield a recording client of this server."""
    with contextlib.closing(Recording(unix_socket_path=server.unix_socket, **words)) as client:
        yield client


def fail(breaker: CircuitBreaker) -> None:
    """Make a call that fails."""
    with contextlib.suppress(ZeroDivisionError, CircuitBreakerError):
        breaker.call(lambda: 1 / 0)


# -- EVALSHA and EVAL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", [False, True])
def test_unknown_script_is_sent_once_and_then_called_by_name(every_server: PrivateServer, decoded: bool) -> None:
    """The first use of a server costs one more round trip, and so does SCRIPT FLUSH."""
    with recording(every_server, decode_responses=decoded) as client:
        client.script_flush()
        engine = LuaEngine(client, KEYS)
        client.sent.clear()
        for _ in range(3):
            engine.execute(Load(), None, CLOSED)
        assert client.sent == ["EVALSHA", "EVAL", "EVALSHA", "EVALSHA"]
        client.script_flush()
        client.sent.clear()
        engine.execute(Load(), None, CLOSED)
        engine.execute(Load(), None, CLOSED)
        assert client.sent == ["EVALSHA", "EVAL", "EVALSHA"]


def test_server_without_evalsha_gets_each_script(preferred: servers.FoundServer) -> None:
    """Only EVALSHA is missing, and scripts are as atomic without EVALSHA."""
    with _renamed(preferred.binary, "EVALSHA") as make_client, contextlib.closing(make_client()) as client:
        engine = LuaEngine(client, KEYS)
        for failures in (1, 2, 3):
            assert engine.execute(RecordFailure(None, ""), None, CLOSED).circuit.fail_counter == failures
        assert client.sent == ["EVALSHA", "EVAL", "EVAL", "EVAL"]


def test_missing_rights_for_scripts_and_transactions_log_the_scripts(
    server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An administrator grants what the log line contains."""
    with contextlib.closing(server.client()) as administrator:
        rights = ("~*", "+@all", "-@scripting", "-watch")
        administrator.execute_command("ACL", "SETUSER", "neither", "on", "nopass", *rights)
    with contextlib.closing(server.client(username="neither", password="any")) as client:
        CircuitRedisStorage(CLOSED, client, "neither").increment_counter()
    (entries,) = messages_of(caplog, server, "circuit 'neither'")
    assert "'eval" in entries
    assert "watch" not in entries


def test_script_is_sent_whatever_the_encoding_of_the_client(server: PrivateServer) -> None:
    """Comments have characters that not every encoding has."""
    with contextlib.closing(server.client(encoding="ascii", decode_responses=True)) as client:
        client.script_flush()
        assert LuaEngine(client, KEYS).execute(RecordFailure(None, ""), None, CLOSED).circuit.fail_counter == 1


@every_intent
def test_digest_of_a_script_equals_that_of_the_server(server: PrivateServer, intent: type[Intent]) -> None:
    """An EVALSHA with the digest computed here finds the script that EVAL has loaded."""
    source, digest = compose_script(intent.operation)
    with contextlib.closing(server.client()) as client:
        client.script_flush()
        client.script_load(source)
        assert list(client.script_exists(digest)) == [True]


@every_intent
def test_script_without_comments_replies_and_writes_as_its_source_does(
    server: PrivateServer, intent: type[Intent]
) -> None:
    """The server receives the source without comments and blank lines, which must change nothing."""
    arguments = {"generation": -1, "token": "", "lost_token": "", "state": OPEN}
    values = [arguments.get(field.name, 1) for field in fields(intent)]
    source = "\n".join((LUA / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", intent.operation))
    results = []
    with contextlib.closing(server.client()) as client:
        for text in (source, compose_script(intent.operation).source):
            client.flushdb()
            reply = client.eval(text, len(KEYS), *KEYS, CLOSED, -1, "", -1, "", 0, 0, "", 0, *values)
            # Times differ, because the server's time passes between the two.
            timeless = [item for item in reply if not isinstance(item, int) or item < 10**12]
            results.append((timeless, client.mget(KEYS[:3]), client.hget(KEYS[4], "generation")))
    assert results[0] == results[1]


def test_scripts_flushed_all_the_time_lose_no_failure(server: PrivateServer) -> None:
    """A SCRIPT FLUSH by an operator, a restart or a failover is not noticed, whenever it comes."""
    over = threading.Event()

    def flush() -> None:
        with contextlib.closing(server.client()) as client:
            while not over.is_set():
                client.script_flush()

    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        with contextlib.closing(server.client()) as client:
            breaker = CircuitBreaker(fail_max=10**6, state_storage=CircuitRedisStorage(CLOSED, client, "flushed"))
            for _ in range(200):
                fail(breaker)
            assert breaker.fail_counter == 200
    finally:
        over.set()
        flusher.join()


@contextlib.contextmanager
def _forbidden(binary: str) -> Iterator[Any]:
    with PrivateServer(binary) as server, contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
        yield lambda **words: Recording(
            unix_socket_path=server.unix_socket, username="noscript", password="any", **words
        )


@contextlib.contextmanager
def _renamed(binary: str, *commands: str) -> Iterator[Any]:
    arguments = [word for command in commands for word in ("--rename-command", command, "")]
    with PrivateServer(binary, args=arguments) as server:
        yield lambda **words: Recording(unix_socket_path=server.unix_socket, **words)


@contextlib.contextmanager
def _fake(_: str) -> Iterator[Any]:
    class RecordingFake(Recording, fakeredis.FakeStrictRedis):
        pass

    fake_server = fakeredis.FakeServer()
    yield lambda **words: RecordingFake(server=fake_server, **words)


SCRIPTLESS: dict[str, Callable[[str], Any]] = {
    "forbidden to the user": _forbidden,
    "EVALSHA and EVAL renamed": lambda binary: _renamed(binary, "EVALSHA", "EVAL"),
    "EVAL renamed": lambda binary: _renamed(binary, "EVAL"),
}


def _scriptless() -> Iterator[Any]:
    for server in servers.at_hand():
        for case, opened in SCRIPTLESS.items():
            yield pytest.param(opened, server.binary, id=f"{servers.name_of(server)}, {case}")
    yield pytest.param(_fake, "", id="fakeredis")


@pytest.fixture(params=[False, True], ids=["bytes", "decoded"])
def decoded(request: pytest.FixtureRequest) -> bool:
    """Return whether the client decodes."""
    return bool(request.param)


@pytest.mark.parametrize(("opened", "binary"), list(_scriptless()))
def test_server_without_scripts_is_logged_once_and_served_by_transactions(
    opened: Callable[[str], Any], binary: str, decoded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything works without scripts, with more round trips."""
    with opened(binary) as make_client, contextlib.closing(make_client(decode_responses=decoded)) as client:
        storage = CircuitRedisStorage(CLOSED, client, "scriptless")
        breaker = CircuitBreaker(fail_max=3, reset_timeout=60, state_storage=storage)
        with commands_sent(client) as sent:
            for _ in range(3):
                fail(breaker)
            assert breaker.current_state == OPEN
            with pytest.raises(CircuitBreakerError):
                breaker.call(lambda: None)
            breaker.reset_timeout = 0.05
            time.sleep(0.1)
            breaker.call(lambda: None)
            assert breaker.current_state == CLOSED
        assert [command for command in sent if command.startswith("EVAL")] == ["EVALSHA", "EVAL"]
        assert client.get("scriptless:pybreaker:state") in (b"closed", "closed")
    entries = records_of(caplog, storage.health().server, "circuit 'scriptless'")
    assert [record.levelno for record in entries] == [logging.WARNING]
    assert "runs no scripts" in entries[0].getMessage()
    assert "scriptless" not in entries[0].getMessage(), "the line is about the server and not about the circuit"


def test_threads_that_find_no_scripts_log_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The switch to transactions is one event, however many threads notice the missing scripts."""
    client = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())
    # If threads are the first to use a database of fakeredis, some of their transactions are lost: 5 in 4,000 rounds.
    client.get("anything")
    barrier = threading.Barrier(8)
    storage = CircuitRedisStorage(CLOSED, client, "scriptless")
    original = client.evalsha

    def evalsha(*args: Any) -> Any:
        barrier.wait(5)  # all threads have sent a script before the first answer
        return original(*args)

    client.evalsha = evalsha  # type: ignore[method-assign]
    threads = [threading.Thread(target=storage.increment_counter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.counter == 8
    assert len([line for line in messages_of(caplog, storage.health().server) if "runs no scripts" in line]) == 1


def test_other_refusals_do_not_switch_to_transactions(server: PrivateServer) -> None:
    """Transactions would not help a user without rights for these keys, or a script that fails."""
    with contextlib.closing(server.client()) as administrator:
        administrator.execute_command("ACL", "SETUSER", "elsewhere", "on", "nopass", "~else:*", "+@all")
        administrator.execute_command("ACL", "SETUSER", "hashless", "on", "nopass", "~*", "+@all", "-hmget", "-hset")
    for user in ("elsewhere", "hashless"):
        with contextlib.closing(server.client(username=user, password="any")) as client:
            with pytest.raises(redis.ResponseError) as caught:
                LuaEngine(client, KEYS).execute(SetOpenedAt(1), None, OPEN)
            assert not isinstance(caught.value, ScriptingUnavailableError)


def test_constructor_sends_nothing_to_redis(caplog: pytest.LogCaptureFixture) -> None:
    """Settings modules create storages at import time, where no Redis is reachable."""

    class Unreachable(redis.Connection):
        def connect(self, *_: Any, **__: Any) -> None:
            raise AssertionError("the constructor has connected")

    client = redis.Redis(connection_pool=redis.ConnectionPool(connection_class=Unreachable))
    storage = CircuitRedisStorage(CLOSED, client, "unreachable")
    CircuitBreaker(state_storage=storage)
    assert messages_of(caplog, "circuit 'unreachable'") == []
    assert storage.state == CLOSED
    (line,) = messages_of(caplog, "circuit 'unreachable'")
    assert "has connected" in line, "any use connects, so the check above can fail"


def test_callable_is_called_when_the_circuit_is_first_used_and_never_again(client: redis.Redis) -> None:
    """A callable such as `django_redis.get_redis_connection` can be given before Django is ready."""
    calls = []

    def get_client() -> redis.Redis:
        calls.append(1)
        return client

    storage = CircuitRedisStorage(CLOSED, get_client, "lazy")
    assert calls == []
    breaker = CircuitBreaker(state_storage=storage)
    assert calls == []
    for _ in range(3):
        breaker.call(lambda: None)
    assert calls == [1]


def test_callable_is_called_once_by_many_threads(client: redis.Redis) -> None:
    """No connection pool is created in vain."""
    calls = []

    def get_client() -> redis.Redis:
        calls.append(1)
        time.sleep(0.05)
        return client

    storage = CircuitRedisStorage(CLOSED, get_client, "lazy")
    threads = [threading.Thread(target=storage.increment_counter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert storage.counter == 8


def test_class_of_client_is_a_callable_too(server: PrivateServer) -> None:
    """A class without arguments is a callable that returns a client."""

    class Client(redis.Redis):
        def __init__(self) -> None:
            super().__init__(unix_socket_path=server.unix_socket)

    assert CircuitRedisStorage(OPEN, Client, "class").state == OPEN


#: For each state of a circuit of generation 4, intents that it must refuse.
REFUSED: list[tuple[str, Intent]] = [
    *[
        (state, intent)
        for state in (CLOSED, OPEN, HALF_OPEN)
        for intent in (
            RecordFailure(3, "a0"),
            RecordSuccess(3, "a0"),
            CountProbe(3, "a0", 500),
            Trip(3, "a0"),
            Close(3, "a0"),
            ClaimProbe(3, "b1", 500),
            ShareTrip(3, 500),
        )
    ],
    (CLOSED, ClaimProbe(4, "b1", 500)),
    (OPEN, RecordFailure(4, "")),
    (OPEN, Trip(4, "")),
    (OPEN, SetOpenedAt(1)),
    (OPEN, ShareTrip(4, 60_000)),
    (HALF_OPEN, ClaimProbe(4, "b1", 500)),
    (HALF_OPEN, RecordFailure(4, "b1")),
    (HALF_OPEN, CountProbe(4, "", 500)),
    (HALF_OPEN, Close(4, "")),
]


def circuit_of_generation_4(engine: Engine, state: str) -> Circuit:
    """Return an intact circuit in that state, with some failures."""
    circuit = engine.execute(Load(), None, CLOSED).circuit
    steps: dict[str, list[Intent]] = {
        CLOSED: [Trip(None, ""), Close(None, ""), Trip(None, ""), Close(None, "")],
        OPEN: [Trip(None, "")] * 4,
        HALF_OPEN: [Trip(None, "")] * 3 + [ClaimProbe(3, "a0", 60_000)],
    }
    for intent in [*steps[state], RecordFailure(None, ""), CountProbe(None, "", 1)]:
        circuit = engine.execute(intent, circuit, CLOSED).circuit
    assert (circuit.state, circuit.generation) == (state, 4)
    return circuit


def expiry_ms(client: redis.Redis, key: str) -> int:
    """Return the expiry of a key, in milliseconds on the server's clock."""
    with client.pipeline() as pipe:
        pipe.time()
        pipe.pttl(key)
        (seconds, microseconds), left = pipe.execute()
    return int(seconds) * 1000 + int(microseconds) // 1000 + int(left)


@pytest.mark.parametrize("make", [LuaEngine, TransactionEngine])
@pytest.mark.parametrize(("state", "intent"), REFUSED, ids=lambda value: getattr(value, "operation", value))
def test_refused_intent_writes_nothing(
    server: PrivateServer, make: Callable[..., Engine], state: str, intent: Intent
) -> None:
    """A refusal writes no byte, no TTL and not even the same value again, so that no key lives longer."""
    with contextlib.closing(server.client()) as client, contextlib.closing(server.client()) as observer:
        engine = make(client, KEYS)
        known = circuit_of_generation_4(engine, state)
        for number, key in enumerate(KEYS):
            observer.pexpire(key, 10**7 + number)
        before = [observer.dump(key) for key in KEYS]
        expiries = [expiry_ms(observer, key) for key in KEYS]
        with observer.pipeline() as pipe:
            pipe.watch(*KEYS)
            reply = engine.execute(intent, known, CLOSED)
            assert not reply.accepted
            assert reply.circuit == known
            pipe.multi()
            pipe.ping()
            pipe.execute()  # raises WatchError if any key was written, even with the same value
        assert [observer.dump(key) for key in KEYS] == before
        for key, end in zip(KEYS, expiries, strict=True):
            assert abs(expiry_ms(observer, key) - end) < 100


def test_check_for_writes_can_fail(server: PrivateServer) -> None:
    """The same check notices an accepted intent."""
    with contextlib.closing(server.client()) as client, contextlib.closing(server.client()) as observer:
        engine = LuaEngine(client, KEYS)
        known = circuit_of_generation_4(engine, CLOSED)
        with observer.pipeline() as pipe:
            pipe.watch(*KEYS)
            engine.execute(RecordFailure(4, ""), known, CLOSED)
            pipe.multi()
            pipe.ping()
            with pytest.raises(redis.WatchError):
                pipe.execute()
