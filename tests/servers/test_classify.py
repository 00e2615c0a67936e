"""Error classification: errors of real servers have the kinds of the table."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import CLOSED
from pybreaker_redis._model.intents import Load, Trip
from pybreaker_redis._redis.classify import ErrorKind, error_kind
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.servers import ONCE, FoundServer, no_server
from tests.support.wait import wait_for

TIMEOUT = 0.25


UNREACHABLE, READ_ONLY, FORBIDDEN, UNUSABLE = (
    ErrorKind.UNREACHABLE,
    ErrorKind.READ_ONLY,
    ErrorKind.FORBIDDEN,
    ErrorKind.UNUSABLE,
)


MIGRATING, CONTENDED = ErrorKind.MIGRATING, ErrorKind.CONTENDED


KEYS = circuit_keys("guarded", needs_one_slot=True)


class FaultyServer:
    """A server that a test brings into a fault. Each method returns a client that meets the fault.

    Args:
        server: Server of one test.
        data: Folder in which the server saves.
        protocol: Protocol argument of clients, or an empty mapping.
    """

    def __init__(self, server: PrivateServer, data: Path, protocol: dict[str, Any]) -> None:
        self.server = server
        self.data = data
        self.words = {**ONCE, **protocol}
        self.operator = self.client()

    def client(self, **words: Any) -> redis.Redis:
        """Return a client without retries."""
        return self.server.client(**self.words, **words)

    def user(self, *rules: str) -> redis.Redis:
        """Return a client of a user with these rules."""
        self.operator.execute_command("ACL", "SETUSER", "shop", "on", ">secret", *rules)
        return self.client(username="shop", password="secret")

    def replica(self) -> redis.Redis:
        """Make the server a replica, as after a failover."""
        self.operator.execute_command("REPLICAOF", "127.0.0.1", "1")
        return self.operator

    def out_of_memory(self) -> redis.Redis:
        """Limit the memory of the server."""
        self.operator.config_set("maxmemory", 1)
        return self.operator

    def without_replicas(self) -> redis.Redis:
        """Make the server refuse writes that no replica copies."""
        self.operator.config_set("min-replicas-to-write", 1)
        return self.operator

    def unable_to_save(self) -> redis.Redis:
        """Remove the folder of the server."""
        self.operator.config_set("save", "3600 1")
        self.operator.set("unsaved", 1)
        shutil.rmtree(self.data)
        self.operator.execute_command("BGSAVE")
        wait_for(lambda: self.operator.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed save")
        return self.operator

    def forbidden_to_write(self) -> redis.Redis:
        """Return a user that may run scripts, but not write."""
        return self.user("~*", "&*", "+@all", "-@write", "+eval", "+evalsha")

    def forbidden_the_keys(self) -> redis.Redis:
        """Return a user with rights for other keys."""
        return self.user("~other:*", "&*", "+@all")

    def wrong_password(self) -> redis.Redis:
        """Set a password, and return a client with another password."""
        self.operator.config_set("requirepass", "secret")
        return self.client(password="wrong")

    def no_password(self) -> redis.Redis:
        """Set a password, and return a client without one."""
        self.operator.config_set("requirepass", "secret")
        return self.client()

    def cut_off_replica(self) -> redis.Redis:
        """Make the server a replica without a master that refuses outdated answers."""
        self.operator.config_set("replica-serve-stale-data", "no")
        self.operator.execute_command("REPLICAOF", "127.0.0.1", "1")
        return self.operator

    def busy(self) -> redis.Redis:
        """Run a script that does not end."""
        self.operator.config_set("lua-time-limit", 1)

        def loop() -> None:
            with pytest.raises((redis.ConnectionError, redis.ResponseError)):
                self.client().eval("while true do end", 0)

        self.looping = threading.Thread(target=loop)
        self.looping.start()

        def is_busy() -> bool:
            try:
                self.operator.ping()
            except redis.ResponseError:
                return True
            return False

        wait_for(is_busy, "an error because of the running script")
        return self.operator

    def cluster_down(self) -> redis.Redis:
        """Return a client of a cluster in which no node serves the slot."""
        return self.operator

    def end(self) -> None:
        """Kill the server, and close the client."""
        self.server.kill()
        if hasattr(self, "looping"):
            self.looping.join()
        self.operator.close()


#: Kinds of errors by fault, for a write and for a read.
FAULTS = {
    FaultyServer.replica: (READ_ONLY, None),
    FaultyServer.out_of_memory: (READ_ONLY, None),
    FaultyServer.without_replicas: (READ_ONLY, None),
    FaultyServer.unable_to_save: (READ_ONLY, None),
    FaultyServer.forbidden_to_write: (FORBIDDEN, None),
    FaultyServer.forbidden_the_keys: (FORBIDDEN, FORBIDDEN),
    FaultyServer.wrong_password: (UNREACHABLE, UNREACHABLE),
    FaultyServer.no_password: (UNREACHABLE, UNREACHABLE),
    FaultyServer.busy: (UNREACHABLE, UNREACHABLE),
    FaultyServer.cluster_down: (UNREACHABLE, UNREACHABLE),
    # A write gets the error of a replica, and a read the error of a missing master.
    FaultyServer.cut_off_replica: (READ_ONLY, UNREACHABLE),
}


#: Protocols of clients. Older libraries have no choice, and releases 7 of redis-py lack RESP3 on unix sockets.
PROTOCOL_ARGUMENTS: list[dict[str, Any]] = [{"protocol": 3}, {"protocol": 2}] if redis.VERSION >= (5, 0) else [{}]


if (7, 0) <= redis.VERSION < (8, 0):
    del PROTOCOL_ARGUMENTS[0]


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def faulty_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., FaultyServer]]:
    """Yield a factory of servers for faults, once for each server found."""
    found: FoundServer | None = request.param
    if found is None:
        no_server()
    made: list[FaultyServer] = []

    def make(protocol: dict[str, Any], *args: str) -> FaultyServer:
        # The server's own folder cannot be removed.
        data = tmp_path / str(len(made))
        data.mkdir()
        made.append(FaultyServer(PrivateServer(found.binary, args=["--dir", str(data), *args]).start(), data, protocol))
        return made[-1]

    yield make
    for item in made:
        item.end()
        item.server.close()


def outcome(send: Callable[[], Any]) -> ErrorKind | None:
    """Send a command, and return the kind of its error, or ``None`` without an error."""
    try:
        send()
    except Exception as error:  # noqa: BLE001
        print(f"{type(error).__module__}.{type(error).__name__}: {error}")
        return error_kind(error)
    return None


@pytest.mark.parametrize(
    "protocol", PROTOCOL_ARGUMENTS, ids=lambda protocol: f"resp{protocol['protocol']}" if protocol else ""
)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_errors_of_servers_have_the_kinds_of_the_table(
    faulty_server: Callable[..., FaultyServer], fault: Callable[[FaultyServer], redis.Redis], protocol: dict[str, Any]
) -> None:
    """The error comes from a command, a loaded script, an unknown script, and a transaction."""
    is_cluster = fault is FaultyServer.cluster_down
    case = faulty_server(protocol, *(["--cluster-enabled", "yes"] if is_cluster else []))
    if not is_cluster:
        LuaEngine(case.operator, KEYS).execute(Load(), None, CLOSED)
    client = fault(case)
    write_kind, read_kind = FAULTS[fault]
    trip = Trip(None, "")
    # A replica without its master refuses every script, because a script may write.
    script_kind = UNREACHABLE if fault is FaultyServer.cut_off_replica else write_kind
    assert outcome(lambda: client.setnx(KEYS[0], CLOSED)) is write_kind
    assert outcome(lambda: client.get(KEYS[0])) is read_kind
    assert outcome(lambda: TransactionEngine(client, KEYS).execute(trip, None, CLOSED)) in {write_kind, read_kind} - {
        None
    }
    assert outcome(lambda: LuaEngine(client, KEYS).execute(Load(), None, CLOSED)) is read_kind
    assert outcome(lambda: LuaEngine(client, KEYS).execute(trip, None, CLOSED)) is script_kind
    source, _ = compose_script("trip")
    if read_kind is None:
        case.operator.script_load(source)
        assert outcome(lambda: LuaEngine(client, KEYS).execute(trip, None, CLOSED)) is script_kind
    client.close()


def test_dead_and_frozen_servers_are_unreachable(killable_server: PrivateServer) -> None:
    """Either the kernel reports the error, or nothing answers."""
    client = killable_server.client(socket_timeout=1.0, **ONCE)
    client.ping()
    killable_server.pause()
    assert outcome(client.ping) is UNREACHABLE
    killable_server.kill()
    assert outcome(client.ping) is UNREACHABLE
    client.close()


def test_exhausted_pool_is_unreachable(server: PrivateServer) -> None:
    """While all connections wait for Redis, Redis does not answer."""
    for kind in (redis.ConnectionPool, redis.BlockingConnectionPool):
        words = {"timeout": 0.01} if kind is redis.BlockingConnectionPool else {}
        pool = kind(
            connection_class=redis.UnixDomainSocketConnection, path=server.unix_socket, max_connections=1, **words
        )
        client = redis.Redis(connection_pool=pool, **ONCE)
        with client.pipeline() as pipe:
            pipe.watch("key")
            assert outcome(client.ping) is UNREACHABLE
        pool.disconnect()
        client.close()
