"""Do real servers answer as the table of errors says?"""

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


class Troubled:
    """A server of this test alone, and how it is brought into trouble; each returns the client that meets it.

    Args:
        server: The server.
        data: Where it saves.
        protocol: What clients speak, if they can be told.
    """

    def __init__(self, server: PrivateServer, data: Path, protocol: dict[str, Any]) -> None:
        self.server = server
        self.data = data
        self.words = {**ONCE, **protocol}
        self.operator = self.client()

    def client(self, **words: Any) -> redis.Redis:
        """A client that tries once."""
        return self.server.client(**self.words, **words)

    def user(self, *rules: str) -> redis.Redis:
        """A client of a user with these rules."""
        self.operator.execute_command("ACL", "SETUSER", "shop", "on", ">secret", *rules)
        return self.client(username="shop", password="secret")

    def replica(self) -> redis.Redis:
        """It has become a replica, as after a failover."""
        self.operator.execute_command("REPLICAOF", "127.0.0.1", "1")
        return self.operator

    def out_of_memory(self) -> redis.Redis:
        """It has no memory to spare."""
        self.operator.config_set("maxmemory", 1)
        return self.operator

    def without_replicas(self) -> redis.Redis:
        """It takes no writes because nobody copies them."""
        self.operator.config_set("min-replicas-to-write", 1)
        return self.operator

    def unable_to_save(self) -> redis.Redis:
        """Its disk has gone."""
        self.operator.config_set("save", "3600 1")
        self.operator.set("unsaved", 1)
        shutil.rmtree(self.data)
        self.operator.execute_command("BGSAVE")
        wait_for(lambda: self.operator.info("persistence")["rdb_last_bgsave_status"] == "err", "it fails to save")
        return self.operator

    def forbidden_to_write(self) -> redis.Redis:
        """The user may run scripts, and not write."""
        return self.user("~*", "&*", "+@all", "-@write", "+eval", "+evalsha")

    def forbidden_the_keys(self) -> redis.Redis:
        """The user has other keys."""
        return self.user("~other:*", "&*", "+@all")

    def wrong_password(self) -> redis.Redis:
        """The password was changed."""
        self.operator.config_set("requirepass", "secret")
        return self.client(password="wrong")

    def no_password(self) -> redis.Redis:
        """The server wants a password now."""
        self.operator.config_set("requirepass", "secret")
        return self.client()

    def cut_off_replica(self) -> redis.Redis:
        """A replica that lost its master, and does not answer with what is old."""
        self.operator.config_set("replica-serve-stale-data", "no")
        self.operator.execute_command("REPLICAOF", "127.0.0.1", "1")
        return self.operator

    def busy(self) -> redis.Redis:
        """Somebody's script does not end."""
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

        wait_for(is_busy, "the script runs for too long")
        return self.operator

    def cluster_down(self) -> redis.Redis:
        """A cluster in which nobody serves the slot."""
        return self.operator

    def end(self) -> None:
        """Nothing is left running."""
        self.server.kill()
        if hasattr(self, "looping"):
            self.looping.join()
        self.operator.close()


#: How servers get into trouble, what that means when something is written, and when it is only read.
TROUBLES = {
    Troubled.replica: (READ_ONLY, None),
    Troubled.out_of_memory: (READ_ONLY, None),
    Troubled.without_replicas: (READ_ONLY, None),
    Troubled.unable_to_save: (READ_ONLY, None),
    Troubled.forbidden_to_write: (FORBIDDEN, None),
    Troubled.forbidden_the_keys: (FORBIDDEN, FORBIDDEN),
    Troubled.wrong_password: (UNREACHABLE, UNREACHABLE),
    Troubled.no_password: (UNREACHABLE, UNREACHABLE),
    Troubled.busy: (UNREACHABLE, UNREACHABLE),
    Troubled.cluster_down: (UNREACHABLE, UNREACHABLE),
    # A command that writes is told that this is a replica; whoever reads, that it has no master.
    Troubled.cut_off_replica: (READ_ONLY, UNREACHABLE),
}


#: What clients may speak: older libraries cannot be told, and redis-py 7 does not speak 3 on unix sockets.
SPOKEN: list[dict[str, Any]] = [{"protocol": 3}, {"protocol": 2}] if redis.VERSION >= (5, 0) else [{}]


if (7, 0) <= redis.VERSION < (8, 0):
    del SPOKEN[0]


@pytest.fixture(params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none")
def troubled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Troubled]]:
    """Each server at hand in turn, anew, in trouble."""
    found: FoundServer | None = request.param
    if found is None:
        no_server()
    made: list[Troubled] = []

    def make(protocol: dict[str, Any], *args: str) -> Troubled:
        # Not in the server's own directory: that one cannot be taken away.
        data = tmp_path / str(len(made))
        data.mkdir()
        made.append(Troubled(PrivateServer(found.binary, args=["--dir", str(data), *args]).start(), data, protocol))
        return made[-1]

    yield make
    for item in made:
        item.end()
        item.server.close()


def outcome(ask: Callable[[], Any]) -> ErrorKind | None:
    """What the error means that comes of asking; ``None`` if there is none."""
    try:
        ask()
    except Exception as error:  # noqa: BLE001
        print(f"{type(error).__module__}.{type(error).__name__}: {error}")
        return error_kind(error)
    return None


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: f"resp{spoken['protocol']}" if spoken else "")
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_what_servers_say_means_what_the_table_says(
    troubled: Callable[..., Troubled], trouble: Callable[[Troubled], redis.Redis], spoken: dict[str, Any]
) -> None:
    """Asked by a command, by a script that it knows, by one that it does not, and by a transaction."""
    clustered = trouble is Troubled.cluster_down
    case = troubled(spoken, *(["--cluster-enabled", "yes"] if clustered else []))
    if not clustered:
        LuaEngine(case.operator, KEYS).execute(Load(), None, CLOSED)
    client = trouble(case)
    writing, reading = TROUBLES[trouble]
    trip = Trip(None, "")
    # A cut off replica refuses whatever is asked by scripts: they may write.
    by_script = UNREACHABLE if trouble is Troubled.cut_off_replica else writing
    assert outcome(lambda: client.setnx(KEYS[0], CLOSED)) is writing
    assert outcome(lambda: client.get(KEYS[0])) is reading
    assert outcome(lambda: TransactionEngine(client, KEYS).execute(trip, None, CLOSED)) in {writing, reading} - {None}
    assert outcome(lambda: LuaEngine(client, KEYS).execute(Load(), None, CLOSED)) is reading
    assert outcome(lambda: LuaEngine(client, KEYS).execute(trip, None, CLOSED)) is by_script
    source, _ = compose_script("trip")
    if reading is None:
        case.operator.script_load(source)
        assert outcome(lambda: LuaEngine(client, KEYS).execute(trip, None, CLOSED)) is by_script
    client.close()


def test_dead_and_frozen_servers_are_away(killable_server: PrivateServer) -> None:
    """Whether the kernel says so, or nobody says anything."""
    client = killable_server.client(socket_timeout=1.0, **ONCE)
    client.ping()
    killable_server.pause()
    assert outcome(client.ping) is UNREACHABLE
    killable_server.kill()
    assert outcome(client.ping) is UNREACHABLE
    client.close()


def test_pool_without_a_connection_to_spare_is_away(server: PrivateServer) -> None:
    """All of them wait for Redis, which therefore does not answer."""
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
