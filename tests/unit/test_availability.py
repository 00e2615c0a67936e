"""What errors mean, and when Redis may be asked again: the guard alone, under a clock that tests move."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import valkey
from redis.exceptions import ResponseError

from pybreaker_redis import _guard
from pybreaker_redis._circuit import CLOSED
from pybreaker_redis._demo.server import PrivateServer
from pybreaker_redis._guard import (
    ANSWER_WAIT_GROWTH_FACTOR,
    ANSWER_WAIT_MAX_S,
    RETRY_DELAY_MAX_FLOOR_S,
    RETRY_DELAY_MAX_S,
    RETRY_DELAY_MIN_S,
    TURN_DELAY_MAX_S,
    TURN_DELAY_MIN_S,
    Availability,
    ErrorKind,
    error_kind,
)
from pybreaker_redis._intents import Load, Trip
from pybreaker_redis._keys import circuit_keys
from pybreaker_redis._optimistic import TransactionEngine
from pybreaker_redis._scripts import LuaEngine, compose_script
from tests import servers
from tests.conftest import no_server
from tests.servers import ONCE, FoundServer
from tests.viewed import Clock, wait_for

TIMEOUT = 0.25

UNREACHABLE, READ_ONLY, FORBIDDEN, UNUSABLE = (
    ErrorKind.UNREACHABLE,
    ErrorKind.READ_ONLY,
    ErrorKind.FORBIDDEN,
    ErrorKind.UNUSABLE,
)
MIGRATING, CONTENDED = ErrorKind.MIGRATING, ErrorKind.CONTENDED

KEYS = circuit_keys("guarded", needs_one_slot=True)

# -- what errors mean --------------------------------------------------------------------------------------------------

#: Classes that redis-py and valkey's client have, as far as they have them, and what the client leaves of the text.
CLASSES = {
    "ConnectionError": ("Connection refused.", UNREACHABLE),
    "TimeoutError": ("Timeout reading from socket", UNREACHABLE),
    "BusyLoadingError": ("Redis is loading the dataset in memory", UNREACHABLE),
    "MaxConnectionsError": ("max number of clients reached", UNREACHABLE),
    "AuthenticationError": ("Authentication required.", UNREACHABLE),
    "AuthorizationError": ("", UNREACHABLE),
    "ClusterError": ("TTL exhausted.", UNREACHABLE),
    "ClusterDownError": ("Hash slot not served", UNREACHABLE),
    "MasterDownError": ("Link with MASTER is down and replica-serve-stale-data is set to 'no'.", UNREACHABLE),
    "RedisClusterException": ("Redis Cluster cannot be connected.", UNREACHABLE),
    "ValkeyClusterException": ("Valkey Cluster cannot be connected.", UNREACHABLE),
    "SlotNotCoveredError": ('Slot "1" is not covered by the cluster.', UNREACHABLE),
    "TryAgainError": ("Multiple keys request during rehashing of slot", MIGRATING),
    "WatchError": ("Watched variable changed.", CONTENDED),
    "ReadOnlyError": ("You can't write against a read only replica.", READ_ONLY),
    "OutOfMemoryError": ("command not allowed when used memory > 'maxmemory'.", READ_ONLY),
    "NoPermissionError": ("User shop has no permissions to run the 'evalsha' command", FORBIDDEN),
    "ResponseError": ("WRONGTYPE Operation against a key holding the wrong kind of value", UNUSABLE),
    "NoScriptError": ("No matching script. Please use EVAL.", UNUSABLE),
    "ClusterCrossSlotError": ("Keys in request don't hash to the same slot", UNUSABLE),
    "InvalidResponse": ("Protocol Error: b'HTTP/1.1 400 Bad Request'", UNUSABLE),
    "DataError": ("Invalid input of type: 'NoneType'.", UNUSABLE),
}

LIBRARIES = {"redis-py": redis.exceptions, "valkey-py": valkey.exceptions}


#: Those classes that the installed releases have.
HAD = [(library, name) for library, module in LIBRARIES.items() for name in CLASSES if hasattr(module, name)]


@pytest.mark.parametrize(("library", "name"), HAD)
def test_class_of_any_client_means_the_same(library: str, name: str) -> None:
    """Whichever client raises it: what an error means follows from the name of its class."""
    text, meaning = CLASSES[name]
    assert error_kind(getattr(LIBRARIES[library], name)(text)) is meaning


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (OSError("raw"), UNREACHABLE),
        (ConnectionResetError("by peer"), UNREACHABLE),
        (socket.timeout("timed out"), UNREACHABLE),  # noqa: UP041 (as libraries still call it)
        (TimeoutError("timed out"), UNREACHABLE),
        (socket.gaierror(-2, "Name or service not known"), UNREACHABLE),
        (ssl.SSLError("handshake failed"), UNREACHABLE),
        (type("RedisClusterException", (Exception,), {})("redis-py-cluster's own"), UNREACHABLE),
        (type("ClusterError", (Exception,), {})("redis-py-cluster's own"), UNREACHABLE),
        (TypeError("'NoneType' object is not callable"), UNUSABLE),
        (ModuleNotFoundError("No module named 'settings'"), UNUSABLE),
        (KeyError("REDIS_URL"), UNUSABLE),
        (Exception("of somebody's own"), UNUSABLE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_no_client_is_away_if_it_is_of_a_socket_and_else_a_fault(error: Exception, meaning: ErrorKind) -> None:
    """A network that fails is nobody's fault; a callable that returns no client is that circuit's own."""
    assert error_kind(error) is meaning


def test_own_subclass_of_a_known_class_means_what_that_means() -> None:
    """Clients are subclassed, and so are their errors."""

    class Away(redis.ConnectionError):
        """Somebody's own."""

    class Denied(redis.exceptions.NoPermissionError):
        """Somebody's own."""

    assert error_kind(Away()) is UNREACHABLE
    assert error_kind(Denied()) is FORBIDDEN


#: What servers say, with its code.
SAID = [
    ("READONLY You can't write against a read only replica.", READ_ONLY),
    ("OOM command not allowed when used memory > 'maxmemory'.", READ_ONLY),
    ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", READ_ONLY),
    ("NOREPLICAS Not enough good replicas to write.", READ_ONLY),
    ("NOPERM this user has no permissions to run the 'set' command or its subcommand", FORBIDDEN),
    ("LOADING Redis is loading the dataset in memory", UNREACHABLE),
    ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", UNREACHABLE),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", UNREACHABLE),
    ("CLUSTERDOWN The cluster is down", UNREACHABLE),
    ("CLUSTERDOWN Hash slot not served", UNREACHABLE),
    ("TRYAGAIN Multiple keys request during rehashing of slot", MIGRATING),
    ("ASK 3999 127.0.0.1:6381", MIGRATING),
    ("MOVED 3999 127.0.0.1:6381", MIGRATING),
    ("NOAUTH Authentication required.", UNREACHABLE),
    ("WRONGPASS invalid username-password pair or user is disabled.", UNREACHABLE),
]

#: Where they say it: at the beginning, or in a sentence that says where in a script it was.
SENTENCES = {
    "plain": "{}",
    "annotated": "{} script: 60be534429818f2a26358999ba8610407da0b931, on @user_script:192.",
    "before 7": "Error running script (call to f_60be53): @user_script:192: @user_script: 192: -{}",
    "ERR": "ERR Error running script (call to f_ab): @user_script:1: -{}",
    "at": "ERR Error running script (call to f_ab): @user_script:1: @{}",
    "pipeline": "Command # 2 (SET shop:pybreaker:state open) of pipeline caused error: {}",
}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(("said", "meaning"), SAID, ids=[said.partition(" ")[0] for said, _ in SAID])
@pytest.mark.parametrize("library", LIBRARIES)
def test_code_of_the_server_counts_wherever_it_stands(
    said: str, meaning: ErrorKind, sentence: str, library: str
) -> None:
    """Inside scripts, older servers put the code of a command's error into a sentence; older clients know no code."""
    error = LIBRARIES[library].ResponseError(SENTENCES[sentence].format(said))
    assert error_kind(error) is meaning


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ACL failure in script: User ro has no permissions to run the 'set' command", FORBIDDEN),
        ("The user executing the script can't access at least one of the keys mentioned", FORBIDDEN),
        ("Error running script (call to f_60): The user executing the script can't run this command", FORBIDDEN),
        ("ERR unknown command 'EVALSHA'", UNUSABLE),
        ("Script killed by user with SCRIPT KILL.", UNUSABLE),
        ("a key named busy, or oom, or loading", UNUSABLE),
    ],
)
def test_sentence_without_a_code_counts_by_what_it_says(said: str, meaning: ErrorKind) -> None:
    """What an ACL forbids inside a script has no code of its own."""
    assert error_kind(ResponseError(said)) is meaning


@pytest.mark.parametrize("user", ["READONLY", "LOADING"])
def test_name_of_a_user_is_not_taken_for_a_code(user: str) -> None:
    """The class has said what it means; the rest of the text is the user's own words."""
    said = f"User {user} has no permissions to run the 'set' command"
    assert error_kind(redis.exceptions.NoPermissionError(said)) is FORBIDDEN
    assert error_kind(ResponseError(f"ACL failure in script: {said}")) is FORBIDDEN


# -- what servers really say -------------------------------------------------------------------------------------------


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


# -- when it may be asked again ----------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    """The guard's clock."""
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> Availability:
    """A guard of a server that a thread asks again."""
    return Availability(TIMEOUT, has_retry_thread=True, clock=clock)


@pytest.fixture
def turns(clock: Clock) -> Availability:
    """A guard where callers ask again, that has been well for long."""
    guard = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
    clock.now += 2 * TURN_DELAY_MAX_S
    return guard


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[tuple[float, float]]]:
    """Decide what random pauses come to, as a share of the longest; returns the bounds that were asked for."""

    def load(share: float) -> list[tuple[float, float]]:
        bounds: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            bounds.append((low, high))
            return low + share * (high - low)

        monkeypatch.setattr(_guard.random, "uniform", uniform)
        return bounds

    return load


def gone() -> redis.ConnectionError:
    """Nobody is there."""
    return redis.ConnectionError("Connection refused.")


def silent() -> redis.TimeoutError:
    """Nobody answers."""
    return redis.TimeoutError("Timeout reading from socket")


def pause(guard: Availability) -> float:
    """Seconds until Redis may be asked again."""
    assert guard.outage is not None
    return guard.outage.next_attempt_at - guard.clock()


def tried_in_vain(guard: Availability, clock: Clock, error: Exception | None = None) -> None:
    """When it is time to, somebody asks again, and fails."""
    assert guard.outage is not None
    clock.now = max(clock.now, guard.outage.next_attempt_at)
    assert guard.claim_attempt()
    guard.note_failure(error or gone())


class TestWell:
    """As long as nothing has failed."""

    @pytest.mark.parametrize("is_kept", [True, False])
    def test_everybody_may_ask(self, is_kept: bool, clock: Clock) -> None:
        """And there is nothing to ask again."""
        guard = Availability(TIMEOUT, has_retry_thread=is_kept, clock=clock)
        assert guard.claim_turn()
        assert guard.claim_turn()
        assert not guard.claim_attempt()
        assert guard.outage is None
        assert guard.last_error == ""
        assert guard.since == clock.now
        assert guard.set_retry_thread(not is_kept) is None

    def test_answer_ends_no_outage(self, has_retry_thread: Availability, clock: Clock) -> None:
        """So nothing is said of it."""
        clock.now += 1
        assert kept.note_answer() is None
        assert kept.since == 100.0


class TestKept:
    """Where a thread asks again."""

    def test_callers_never_ask_however_long_it_takes(self, has_retry_thread: Availability, clock: Clock) -> None:
        """They would have to wait for the answer."""
        kept.note_failure(gone())
        assert not kept.claim_turn()
        clock.now += 1e6
        assert not kept.claim_turn()
        assert kept.claim_attempt(), "nor have they taken the thread's turn"

    def test_first_failure_alone_is_news(self, has_retry_thread: Availability, clock: Clock) -> None:
        """One line in the log when it goes, however many meet it."""
        news = kept.note_failure(gone())
        assert news is not None
        assert (news.since, news.kind, news.attempts, news.patience) == (100.0, UNREACHABLE, 0, TIMEOUT)
        assert news.error == "ConnectionError: Connection refused."
        assert kept.note_failure(gone()) is None
        clock.now += 5
        tried_in_vain(kept, clock, redis.exceptions.ReadOnlyError("You can't write against a read only replica."))
        assert kept.outage is not None
        assert kept.outage.since == kept.since == 100.0
        assert kept.outage.kind is READ_ONLY
        assert kept.outage.error == kept.last_error == "ReadOnlyError: You can't write against a read only replica."

    def test_pauses_are_random_and_grow_to_the_longest(
        self, has_retry_thread: Availability, clock: Clock, dice: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """A fleet that lost Redis at once does not come back at once; and once it is back, it is soon noticed."""
        bounds = dice(1)
        kept.note_failure(gone())
        for _ in range(40):
            tried_in_vain(kept, clock)
        assert {low for low, _ in bounds} == {0}
        longest = [high for _, high in bounds]
        assert longest[:6] == [RETRY_DELAY_MIN_S * 2**attempt for attempt in range(5)] + [RETRY_DELAY_MAX_S]
        assert set(longest[5:]) == {RETRY_DELAY_MAX_S}
        assert pause(kept) == RETRY_DELAY_MAX_S

    def test_pauses_lie_between_none_and_the_longest(self, has_retry_thread: Availability, clock: Clock) -> None:
        """As the dice fall."""
        kept.note_failure(gone())
        seen = []
        for _ in range(50):
            tried_in_vain(kept, clock)
            seen.append(pause(kept))
        assert 0 <= min(seen) < max(seen) <= RETRY_DELAY_MAX_S
        assert len(set(seen)) > 40

    @pytest.mark.parametrize(
        ("staleness", "longest"),
        [([2.0], RETRY_DELAY_MAX_S), ([0.3, 0.5], 0.3), ([0.01], RETRY_DELAY_MAX_FLOOR_S), ([0], 1)],
    )
    def test_pauses_are_shorter_where_something_has_to_be_fresher(
        self,
        has_retry_thread: Availability,
        clock: Clock,
        dice: Callable[[float], list[tuple[float, float]]],
        staleness: list[float],
        longest: float,
    ) -> None:
        """As fresh as the most demanding circuit has to be, within reason; one that always asks demands nothing."""
        dice(1)
        for seconds in staleness:
            kept.limit_retry_delay(seconds)
        kept.note_failure(gone())
        for _ in range(10):
            tried_in_vain(kept, clock)
        assert pause(kept) == pytest.approx(longest)

    def test_one_attempt_at_a_time(self, has_retry_thread: Availability, clock: Clock) -> None:
        """As long as it has not ended; one that never ends is not waited for without end."""
        kept.note_failure(gone())
        clock.now += RETRY_DELAY_MAX_S
        assert kept.claim_attempt()
        assert not kept.claim_attempt()
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT - 0.001
        assert not kept.claim_attempt()
        clock.now += 0.001
        assert kept.claim_attempt()

    def test_answer_ends_the_outage_and_says_how_long_it_was(
        self, has_retry_thread: Availability, clock: Clock
    ) -> None:
        """For the line in the log; what was last wrong can still be read."""
        kept.note_failure(gone())
        clock.now += 7.5
        assert kept.note_answer() == 7.5
        assert kept.outage is None
        assert kept.since == clock.now
        assert kept.last_error == "ConnectionError: Connection refused."
        assert kept.claim_turn()
        assert kept.note_answer() is None

    def test_next_outage_begins_anew(self, has_retry_thread: Availability, clock: Clock) -> None:
        """It has its own attempts, and its own patience."""
        kept.note_failure(silent())
        for _ in range(5):
            tried_in_vain(kept, clock, silent())
        kept.note_answer()
        news = kept.note_failure(silent())
        assert news is not None
        assert (news.since, news.attempts, news.patience) == (clock.now, 0, TIMEOUT)
        assert pause(kept) <= RETRY_DELAY_MIN_S

    def test_guard_that_nobody_keeps_any_more_lets_callers_take_turns(
        self, has_retry_thread: Availability, clock: Clock
    ) -> None:
        """In a process that may start no threads."""
        kept.note_failure(gone())
        outage = kept.set_retry_thread(False)
        assert outage is kept.outage
        assert pause(kept) >= TURN_DELAY_MIN_S
        assert not kept.claim_turn()
        clock.now += pause(kept)
        assert kept.claim_turn()
        assert not kept.claim_turn()

    def test_guard_that_somebody_keeps_now_is_asked_soon(self, turns: Availability) -> None:
        """And no more by callers."""
        turns.note_failure(gone())
        turns.set_retry_thread(True)
        assert pause(turns) <= RETRY_DELAY_MIN_S
        assert not turns.claim_turn()


class TestPatience:
    """How long an attempt waits for its answer."""

    def test_patience_grows_by_half_with_each_attempt_that_got_no_answer(
        self, has_retry_thread: Availability, clock: Clock
    ) -> None:
        """A server that has become slow for all is reached in the end."""
        kept.note_failure(silent())
        seen = []
        for _ in range(15):
            assert kept.outage is not None
            seen.append(kept.outage.answer_wait_s)
            tried_in_vain(kept, clock, silent())
        assert seen == pytest.approx(
            [min(TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR**n, ANSWER_WAIT_MAX_S) for n in range(15)]
        )
        assert seen[-1] == ANSWER_WAIT_MAX_S == 30.0
        assert ANSWER_WAIT_GROWTH_FACTOR == 1.5

    @pytest.mark.parametrize(
        "error", [gone(), redis.ResponseError("BUSY"), OSError(), redis.exceptions.ReadOnlyError()], ids=repr
    )
    def test_patience_does_not_grow_when_there_was_an_answer(
        self, has_retry_thread: Availability, clock: Clock, error: Exception
    ) -> None:
        """Who is refused at once need not wait longer."""
        kept.note_failure(silent())
        for _ in range(5):
            tried_in_vain(kept, clock, error)
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT

    @pytest.mark.parametrize("error", [silent(), valkey.TimeoutError(), TimeoutError()], ids=repr)
    def test_any_kind_of_timeout_makes_patient(
        self, has_retry_thread: Availability, clock: Clock, error: Exception
    ) -> None:
        """Libraries have classes of their own."""
        kept.note_failure(gone())
        tried_in_vain(kept, clock, error)
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT * ANSWER_WAIT_GROWTH_FACTOR

    def test_calls_that_wait_together_are_one_attempt(
        self, has_retry_thread: Availability, dice: Callable[[float], list[tuple[float, float]]]
    ) -> None:
        """Forty threads that were under way when Redis froze have waited once each, not forty times."""
        dice(1)
        for _ in range(40):
            kept.note_failure(silent())
        assert kept.outage is not None
        assert kept.outage.answer_wait_s == TIMEOUT
        assert kept.outage.attempts == 0
        assert pause(kept) <= RETRY_DELAY_MIN_S


class TestTurns:
    """Where callers have to ask again."""

    def test_one_caller_at_a_time_asks_when_the_pause_is_over(self, turns: Availability, clock: Clock) -> None:
        """All others go by their own circuit meanwhile."""
        turns.note_failure(gone())
        assert not turns.claim_turn()
        clock.now += TURN_DELAY_MIN_S - 0.001
        assert not turns.claim_turn()
        clock.now += 0.001
        assert [turns.claim_turn() for _ in range(5)] == [True, False, False, False, False]
        clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
        assert turns.claim_turn(), "a caller that has died with its turn is not waited for without end"

    def test_pauses_double_up_to_the_longest(self, turns: Availability, clock: Clock) -> None:
        """Each costs a caller its wait."""
        turns.note_failure(gone())
        seen = []
        for _ in range(40):
            seen.append(pause(turns))
            tried_in_vain(turns, clock)
        assert seen[:6] == [TURN_DELAY_MIN_S * 2**turn for turn in range(5)] + [TURN_DELAY_MAX_S]
        assert set(seen[5:]) == {TURN_DELAY_MAX_S}

    def test_pauses_of_a_forbidden_circuit_do_not_grow(self, turns: Availability, clock: Clock) -> None:
        """The server answers at once, so a call hardly waits; other processes may wait for what this one holds."""
        forbidden = redis.exceptions.NoPermissionError("no permissions")
        turns.note_failure(forbidden)
        for _ in range(4):
            assert pause(turns) == TURN_DELAY_MIN_S
            tried_in_vain(turns, clock, forbidden)

    def test_what_fails_again_soon_goes_on_where_it_was(self, turns: Availability, clock: Clock) -> None:
        """A server that answers every other time would else cost a caller its wait each second."""
        turns.note_failure(gone())
        for _ in range(3):
            tried_in_vain(turns, clock)
        clock.now += pause(turns)
        assert turns.claim_turn()
        assert turns.note_answer()
        clock.now += TURN_DELAY_MAX_S
        turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S * 2**4
        assert turns.outage is not None
        assert turns.outage.attempts == 0

    def test_what_was_well_for_long_begins_anew(self, turns: Availability, clock: Clock) -> None:
        """It is another outage."""
        turns.note_failure(gone())
        for _ in range(3):
            tried_in_vain(turns, clock)
        turns.note_answer()
        clock.now += TURN_DELAY_MAX_S + 0.001
        turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S

    def test_first_failure_of_all_waits_for_the_first_turn(self, clock: Clock) -> None:
        """A process that has just started has not failed before."""
        guard = Availability(TIMEOUT, has_retry_thread=False, clock=clock)
        clock.now += 0.1
        guard.note_failure(gone())
        assert pause(guard) == TURN_DELAY_MIN_S

    def test_calls_that_fail_together_are_one_turn(self, turns: Availability) -> None:
        """Ten threads that met the same outage do not keep the process alone for half a minute."""
        for _ in range(10):
            turns.note_failure(gone())
        assert pause(turns) == TURN_DELAY_MIN_S

    def test_answer_lets_all_callers_in(self, turns: Availability, clock: Clock) -> None:
        """From the moment on that one of them had it."""
        turns.note_failure(gone())
        clock.now += TURN_DELAY_MIN_S
        assert turns.claim_turn()
        clock.now += 0.25
        assert turns.note_answer() == TURN_DELAY_MIN_S + 0.25
        assert all(turns.claim_turn() for _ in range(5))


class TestThreads:
    """What comes together."""

    def test_answers_that_come_together_end_one_outage_once(self, has_retry_thread: Availability) -> None:
        """One line in the log, and no thread collides with another."""
        rounds, threads = 200, 6
        barrier = threading.Barrier(threads)

        def answer() -> Iterator[tuple[int, float | None]]:
            for number in range(rounds):
                if barrier.wait() == 0:
                    kept.note_failure(gone())
                barrier.wait()
                yield number, kept.note_answer()

        with ThreadPoolExecutor(threads) as pool:
            answers = [pair for pairs in pool.map(lambda _: list(answer()), range(threads)) for pair in pairs]
        assert Counter(number for number, seconds in answers if seconds is not None) == Counter(range(rounds))

    def test_one_of_many_threads_has_the_turn(self, turns: Availability, clock: Clock) -> None:
        """However close together they look."""
        rounds, threads = 200, 6
        turns.note_failure(gone())
        barrier = threading.Barrier(threads)

        def look() -> Iterator[bool]:
            for _ in range(rounds):
                if barrier.wait() == 0:
                    clock.now += ANSWER_WAIT_MAX_S + TIMEOUT
                barrier.wait()
                yield turns.claim_turn()

        with ThreadPoolExecutor(threads) as pool:
            taken = list(pool.map(lambda _: list(look()), range(threads)))
        assert [sum(of_round) for of_round in zip(*taken, strict=True)] == [1] * rounds

    def test_failures_that_come_together_are_news_once(self, has_retry_thread: Availability) -> None:
        """One line in the log when it goes, too."""
        threads = 6
        barrier = threading.Barrier(threads)

        def fail(_: int) -> bool:
            barrier.wait()
            return kept.note_failure(gone()) is not None

        with ThreadPoolExecutor(threads) as pool:
            assert sum(pool.map(fail, range(threads))) == 1


class TestForks:
    """In a child."""

    def test_child_of_a_process_whose_lock_was_held_can_go_on(
        self, has_retry_thread: Availability, clock: Clock
    ) -> None:
        """Whoever held it has not come along; nor has the thread that asks again."""
        kept.note_failure(gone())
        held = kept._lock
        held.acquire()
        try:
            kept.after_fork()
            assert not kept.has_retry_thread
            assert kept.outage is not None, "the server has not come back by forking"
            clock.now += RETRY_DELAY_MAX_S
            assert kept.claim_turn()
            assert kept.note_answer() == RETRY_DELAY_MAX_S
        finally:
            held.release()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="nobody forks here")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_every_child_is_told(self, has_retry_thread: Availability) -> None:
        """Nobody has to think of it."""
        with kept._lock:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if kept._lock.acquire(timeout=1) and not kept.has_retry_thread else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert kept.has_retry_thread
