"""The transaction engine: exact counts under contention, and an error when contention does not end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines import transaction
from pybreaker_redis._engines.lua import LuaEngine
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN
from pybreaker_redis._model.intents import ClaimProbe, Load, RecordFailure, SetState, Trip
from pybreaker_redis._redis import classify, legacy
from pybreaker_redis._redis.classify import ErrorKind, ScriptingUnavailableError, error_kind
from pybreaker_redis._redis.connections.deadline import SEND_GRACE_S, deadline
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.fleet import start_fork_server
from tests.support.inspect import core_of, engine_of, members_of, server_of
from tests.support.logs import messages_of
from tests.support.servers import without_scripts
from tests.support.wait import wait_for
from tests.support.ways import settles_calls

pytestmark = pytest.mark.usefixtures("patient")

KEYS = circuit_keys("optimistic", needs_one_slot=False)

PROCESSES = 8
FAILURES = 100

_context = multiprocessing.get_context("forkserver")


@pytest.fixture
def scriptless(server: PrivateServer) -> Iterator[redis.Redis]:
    """Yield a client of a user without the right to run scripts."""
    with without_scripts(server) as client:
        yield client


def _send_intent(unix_socket: str, what: str, line: Any) -> None:
    """Send one intent in a separate process, when the start signal arrives."""
    with contextlib.closing(redis.Redis(unix_socket_path=unix_socket)) as client:
        engine = TransactionEngine(client, KEYS)
        known = engine.execute(Load(), None, CLOSED).circuit
        line.send("ready")
        line.recv()
        if what == "count":
            line.send([engine.execute(RecordFailure(None, ""), known, CLOSED).circuit for _ in range(FAILURES)])
        elif what == "trip":
            line.send(engine.execute(Trip(known.generation, ""), known, CLOSED).accepted)
        else:
            line.send(engine.execute(ClaimProbe(known.generation, what, 60_000), known, CLOSED).accepted)


def run_intents(server: PrivateServer, *what: str) -> list[Any]:
    """Run one process for each of these actions at the same time, and return their results."""
    return run(_send_intent, [(server.unix_socket, thing) for thing in what])


def run(work: Callable[..., None], of_each: list[tuple[Any, ...]]) -> list[Any]:
    """Run one process for each of these argument tuples at the same time, and return their results."""
    start_fork_server()
    lines, processes = [], []
    try:
        for arguments in of_each:
            line, far = _context.Pipe()
            process = _context.Process(target=work, args=(*arguments, far), daemon=True)
            process.start()
            far.close()
            lines.append(line)
            processes.append(process)
        answers = []
        for word in ("ready", "answer"):
            for line in lines:
                assert line.poll(30), f"no {word} in time"
                answers.append(line.recv())
            if word == "ready":
                answers.clear()
                for line in lines:
                    line.send("go")
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()
        for line in lines:
            line.close()


@pytest.mark.full
def test_many_processes_count_every_failure_once(server: PrivateServer, client: redis.Redis) -> None:
    """An overtaken process reads again: no failure is lost, and none counts twice."""
    answers = run_intents(server, *["count"] * PROCESSES)
    assert client.get(KEYS[1]) == b"%d" % (PROCESSES * FAILURES)
    # Each process got the counts that its own failures made.
    counts = sorted(circuit.fail_counter for answer in answers for circuit in answer)
    assert counts == list(range(1, PROCESSES * FAILURES + 1))


@pytest.mark.full
def test_many_processes_trip_once(server: PrivateServer, client: redis.Redis) -> None:
    """Of simultaneous trips, one is accepted."""
    answers = run_intents(server, *["trip"] * 16)
    assert sum(answers) == 1
    assert client.hget(KEYS[4], "generation") == b"1"


def test_many_processes_get_one_probe(server: PrivateServer, client: redis.Redis) -> None:
    """The probe is granted to one process."""
    TransactionEngine(client, KEYS).execute(SetState(OPEN), None, CLOSED)
    tokens = [f"{number:x}" for number in range(16)]
    answers = run_intents(server, *tokens)
    assert sum(answers) == 1
    assert client.hget(KEYS[4], "probe_token").decode() == tokens[answers.index(True)]


def test_threads_on_fakeredis_count_every_failure_once() -> None:
    """A threaded test of an application on fakeredis sees exact counts."""
    fake_server = fakeredis.FakeServer()
    storage = CircuitRedisStorage(CLOSED, fakeredis.FakeStrictRedis(server=fake_server), "threads")
    _ = storage.state

    def count() -> None:
        for _ in range(25):
            storage.increment_counter()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.counter == 100


class Overtaker:
    """Client for the engine, with a foreign write before each of its first transactions."""

    def __init__(
        self, client: redis.Redis, times: int, write: Callable[[redis.Redis], Any], at: str = "execute"
    ) -> None:
        self._client = client
        self._at = {"ask": "execute_command"}.get(at, at)
        self._left = times
        self._write = write
        self.transactions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def pipeline(self, **words: Any) -> Any:
        """Return a pipeline of the client that is overtaken."""
        pipe = self._client.pipeline(**words)
        if words.get("transaction", True):
            self.transactions += 1
            proceed = getattr(pipe, self._at)

            def proceed_late(*args: Any, **options: Any) -> Any:
                if self._left and args[:1] != ("WATCH",):
                    self._left -= 1
                    self._write(self._client)
                return proceed(*args, **options)

            setattr(pipe, self._at, proceed_late)
        return pipe


def another_failure(client: redis.Redis) -> None:
    """Count a failure as a stock worker does."""
    client.incr(KEYS[1])


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses between attempts, which are recorded and skipped."""
    pauses: list[float] = []
    monkeypatch.setattr(transaction.time, "sleep", pauses.append)
    return pauses


def test_overtaken_transaction_is_retried_on_the_current_record(client: redis.Redis, no_pauses: list[float]) -> None:
    """Each attempt decides again: after three foreign failures, the own failure is the fourth."""
    overtaker = Overtaker(client, 3, another_failure)
    reply = TransactionEngine(overtaker, KEYS).execute(RecordFailure(None, ""), None, CLOSED)
    assert reply.circuit.fail_counter == 4
    assert client.get(KEYS[1]) == b"4"
    assert overtaker.transactions == 4
    assert len(no_pauses) == 3


def test_overtaken_intent_is_refused_if_the_current_record_refuses_it(
    client: redis.Redis, no_pauses: list[float]
) -> None:
    """A trip by another process in between fences this failure off."""
    engine = TransactionEngine(client, KEYS)
    known = engine.execute(Load(), None, CLOSED).circuit
    overtaker = Overtaker(client, 1, lambda client: TransactionEngine(client, KEYS).execute(Trip(0, ""), known, CLOSED))
    reply = TransactionEngine(overtaker, KEYS).execute(RecordFailure(0, ""), known, CLOSED)
    assert not reply.accepted
    assert reply.circuit.state == OPEN
    assert client.get(KEYS[1]) == b"0"
    assert len(no_pauses) == 1


def test_engine_that_is_always_overtaken_retries_until_the_deadline(
    client: redis.Redis, no_pauses: list[float]
) -> None:
    """No call is blocked for ever: when the time is over, the error contains the circuit and the cause."""
    overtaker = Overtaker(client, 10**9, another_failure)
    began = time.monotonic()
    with deadline(0.5), pytest.raises(redis.WatchError, match=r"'optimistic:.*state': .* overtaken") as raised:
        TransactionEngine(overtaker, KEYS).execute(RecordFailure(None, ""), None, CLOSED)
    assert time.monotonic() - began < 0.5 + SEND_GRACE_S
    assert raised.value.__cause__ is None, "no write is in doubt"
    assert overtaker.transactions > 1
    assert all(0 <= pause <= transaction.CONTENTION_PAUSE_MAX_S for pause in no_pauses)
    # No own write was made. All stored failures are foreign ones.
    assert client.get(KEYS[1]) == b"%d" % overtaker.transactions


def test_engine_without_a_deadline_retries_for_a_limited_time(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``timeout=None`` does not mean for ever."""
    monkeypatch.setattr(transaction, "CONTENTION_TIMEOUT_S", 0.1)
    overtaker = Overtaker(client, 10**9, another_failure)
    with pytest.raises(redis.WatchError):
        TransactionEngine(overtaker, KEYS).execute(RecordFailure(None, ""), None, CLOSED)


def test_claim_that_is_always_overtaken_is_refused(client: redis.Redis, no_pauses: list[float]) -> None:
    """Without a granted probe, no call is made, and the circuit is as the other processes left it."""
    known = TransactionEngine(client, KEYS).execute(Trip(None, ""), None, CLOSED).circuit
    overtaker = Overtaker(client, 10**9, another_failure)
    with deadline(0.2):
        reply = TransactionEngine(overtaker, KEYS).execute(ClaimProbe(known.generation, "mine", 60_000), known, CLOSED)
    assert not reply.accepted
    assert (reply.circuit.state, reply.circuit.probe_token) == (OPEN, "")
    assert client.hget(KEYS[4], "probe_token") != b"mine"


def no_answer(_: redis.Redis) -> None:
    """Raise the timeout of a client that waits."""
    msg = "Timeout reading from socket"
    raise redis.TimeoutError(msg)


@pytest.mark.parametrize("lost_at", ["watch", "execute"])
def test_time_that_ends_in_a_transaction_after_an_overtaken_one_is_contention(
    client: redis.Redis, no_pauses: list[float], lost_at: str
) -> None:
    """The server answered within the same deadline. Only a transaction that may have been executed is in doubt."""
    overtaker = Overtaker(client, 1, another_failure)
    slow = Overtaker(overtaker, 10**9, lambda client: overtaker.transactions > 1 and no_answer(client), at=lost_at)
    with pytest.raises(redis.WatchError) as raised:
        TransactionEngine(slow, KEYS).execute(RecordFailure(None, ""), None, CLOSED)
    assert overtaker.transactions == 2
    assert classify.may_have_executed(raised.value) is (lost_at == "execute")


@pytest.mark.parametrize("lost_at", ["watch", "execute"])
def test_time_that_ends_in_the_first_transaction_is_no_contention(client: redis.Redis, lost_at: str) -> None:
    """No answer has shown that the server is reachable."""
    overtaker = Overtaker(client, 10**9, no_answer, at=lost_at)
    with pytest.raises(redis.TimeoutError):
        TransactionEngine(overtaker, KEYS).execute(RecordFailure(None, ""), None, CLOSED)
    assert overtaker.transactions == 1


def test_connection_that_is_lost_under_watch_is_no_contention(client: redis.Redis, server: PrivateServer) -> None:
    """Releases of redis-py report a lost connection as `WatchError`, in this message alone. Its cause has the kind."""
    with contextlib.closing(server.client()) as administrator:

        def close_idle_connections(_: redis.Redis) -> None:
            administrator.client_kill_filter(_type="normal", skipme=True)

        overtaker = Overtaker(client, 10**9, close_idle_connections, at="ask")
        with pytest.raises(redis.ConnectionError) as raised:
            TransactionEngine(overtaker, KEYS).execute(RecordFailure(None, ""), None, CLOSED)
    assert error_kind(raised.value) is ErrorKind.UNREACHABLE
    assert overtaker.transactions == 1


def test_load_of_an_intact_record_starts_no_transaction(client: redis.Redis) -> None:
    """A read causes no contention."""
    TransactionEngine(client, KEYS).execute(Trip(None, ""), None, CLOSED)
    overtaker = Overtaker(client, 1, another_failure)
    assert TransactionEngine(overtaker, KEYS).execute(Load(), None, CLOSED).circuit.state == OPEN
    assert overtaker.transactions == 0


def test_load_that_must_repair_decides_again_under_watch(client: redis.Redis, no_pauses: list[float]) -> None:
    """Another process may repair the record between the first read and the transaction."""
    client.set(KEYS[0], "ajar")
    overtaker = Overtaker(client, 1, lambda client: client.set(KEYS[0], "open"))
    reply = TransactionEngine(overtaker, KEYS).execute(Load(), None, CLOSED)
    assert (reply.circuit.state, reply.repair_note) == (OPEN, "repaired fail_counter success_counter opened_at")
    assert client.get(KEYS[0]) == b"open"
    assert len(no_pauses) == 1


@pytest.mark.parametrize("timeout", [0.25, None])
def test_contention_without_end_is_no_outage(
    scriptless: redis.Redis,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    timeout: float | None,
) -> None:
    """The caller gets its own exception, no outage is logged, and all failures count in the end."""
    monkeypatch.setattr(transaction, "CONTENTION_TIMEOUT_S", 0.2)
    storage = CircuitRedisStorage(CLOSED, scriptless, "optimistic", timeout=timeout)
    breaker = CircuitBreaker(fail_max=30, state_storage=storage)
    breaker.call(lambda: None)
    caplog.clear()
    engine = engine_of(storage)
    original, overtaker = engine.client, Overtaker(engine.client, 10**9, lambda _: client.set(KEYS[2], 0))
    engine.client = overtaker
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            breaker.call(lambda: 1 / 0)
        assert time.monotonic() - began < 10, "a call waits for contention once"
    assert storage.health().is_own
    assert (storage.health().condition, storage.health().last_error) == ("connected", "")
    engine.client = original
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 / 0)
    assert not storage.health().is_own
    assert client.get(KEYS[1]) == b"4"
    assert messages_of(caplog, storage.health().server, "circuit 'optimistic'") == []


def test_call_delayed_by_contention_reports_to_the_local_circuit(scriptless: redis.Redis, client: redis.Redis) -> None:
    """A call waits for contention once. Its other steps use the local circuit."""
    storage = CircuitRedisStorage(CLOSED, scriptless, "optimistic", timeout=0.5)
    breaker = CircuitBreaker(fail_max=30, state_storage=storage)
    breaker.call(lambda: None)
    engine = engine_of(storage)
    original, overtaker = engine.client, Overtaker(engine.client, 10**9, lambda _: client.set(KEYS[2], 0))
    engine.client = overtaker
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 / 0)

    def fail() -> None:
        engine.client = original
        raise ZeroDivisionError

    # The report of the first call's failure comes before this call. The report is overtaken and uses this call's time.
    with pytest.raises(ZeroDivisionError):
        breaker.call(fail)
    assert storage.health().is_own
    assert breaker.fail_counter == 2
    assert not storage.health().is_own
    assert client.get(KEYS[1]) == b"2"


def test_call_admitted_locally_counts_in_the_shared_circuit_after_contention(
    scriptless: redis.Redis, client: redis.Redis
) -> None:
    """Neither circuit has changed its state since, so the call can report."""
    storage = CircuitRedisStorage(CLOSED, scriptless, "optimistic", timeout=0.3)
    breaker = CircuitBreaker(fail_max=30, state_storage=storage)
    breaker.call(lambda: None)
    engine = engine_of(storage)
    original, overtaker = engine.client, Overtaker(engine.client, 10**9, lambda _: client.set(KEYS[2], 0))
    engine.client = overtaker
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 / 0)

    def fail() -> None:
        engine.client = original
        thread = threading.Thread(target=lambda: breaker.fail_counter)
        thread.start()
        thread.join()
        assert not storage.health().is_own
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaker.call(fail)
    assert client.get(KEYS[1]) == b"2"


class LogCollector(logging.Handler):
    """Handler that collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message."""
        self.lines.append(record.getMessage())


#: Timeout of an operation, seconds. With the default, a busy machine with two cores blocks processes for longer.
FULL_SPEED_TIMEOUT = 1.0


def _fail_at_full_speed(unix_socket: str, user: str, namespace: str, seconds: float, line: Any) -> None:
    """Make failing calls without a pause. Send their number, the slowest duration and the log lines."""
    logged = LogCollector()
    logging.getLogger("pybreaker_redis").addHandler(logged)
    with contextlib.closing(redis.Redis(unix_socket_path=unix_socket, username=user, password="any")) as client:
        storage = CircuitRedisStorage(CLOSED, client, namespace, timeout=FULL_SPEED_TIMEOUT)
        breaker = CircuitBreaker(fail_max=10**9, state_storage=storage)
        breaker.call(lambda: None)
        logged.lines.clear()
        line.send("ready")
        line.recv()
        calls, slowest, until = 0, 0.0, time.monotonic() + seconds
        while (began := time.monotonic()) < until:
            with pytest.raises(ZeroDivisionError):
                breaker.call(lambda: 1 / 0)
            calls += 1
            slowest = max(slowest, time.monotonic() - began)
        wait_for(lambda: breaker.fail_counter and not storage.health().is_own, "the report of all failures", 30)
        line.send((calls, slowest, logged.lines))
        line.recv()


@pytest.mark.full
def test_sixteen_processes_at_full_speed_without_scripts_are_no_outage(
    scriptless: redis.Redis, client: redis.Redis, server: PrivateServer, report: Callable[[str], None]
) -> None:
    """All failures count once, no line is logged, and no call takes much longer than its timeout.

    A busy machine may block a process for longer than the timeout, so one good round of five suffices.
    """
    user = scriptless.connection_pool.connection_kwargs["username"]
    for attempt in range(5):
        namespace = f"full-speed-{attempt}"
        answers = run(_fail_at_full_speed, [(server.unix_socket, user, namespace, 1.5)] * 16)
        counted = int(client.get(f"{namespace}:pybreaker:fail_counter"))
        calls, slowest = sum(answer[0] for answer in answers), max(answer[1] for answer in answers)
        lines = [line for answer in answers for line in answer[2]]
        report(f"16 processes without scripts: {counted} of {calls} failures counted, slowest call {slowest:.3f} s")
        if (counted, lines) == (calls, []) and slowest < FULL_SPEED_TIMEOUT + 0.05:
            return
    assert (counted, lines) == (calls, [])
    assert slowest < FULL_SPEED_TIMEOUT + 0.05


@pytest.mark.parametrize("command", ["mget", "exists", "hmget", "time"])
@pytest.mark.parametrize("intent", [Load(), RecordFailure(None, "")], ids=lambda intent: intent.operation)
def test_command_that_the_server_refuses_is_an_error_and_not_a_missing_key(
    server: PrivateServer, command: str, intent: Any
) -> None:
    """A user without read access is no reason to create the circuit again."""
    with contextlib.closing(server.client()) as administrator:
        rights = ("~*", "&*", "+@all", "-@scripting", f"-{command}")
        administrator.execute_command("ACL", "SETUSER", f"no{command}", "reset", "on", "nopass", *rights)
        TransactionEngine(administrator, KEYS).execute(Trip(None, ""), None, CLOSED)
        before = [administrator.dump(key) for key in KEYS]
        with (
            contextlib.closing(server.client(username=f"no{command}", password="any")) as client,
            pytest.raises(redis.ResponseError),
        ):
            TransactionEngine(client, KEYS).execute(intent, None, CLOSED)
        assert [administrator.dump(key) for key in KEYS] == before


def test_full_cycle_of_a_circuit_needs_no_script(scriptless: redis.Redis, client: redis.Redis) -> None:
    """Failures, trip, rejection, one probe among many and recovery work with transactions alone."""
    make = lambda: CircuitBreaker(  # noqa: E731
        fail_max=2, reset_timeout=60, state_storage=CircuitRedisStorage(CLOSED, scriptless, "optimistic")
    )
    first, second = make(), make()
    for breaker in (first, second):
        with contextlib.suppress(ZeroDivisionError, CircuitBreakerError):
            breaker.call(lambda: 1 / 0)
    assert first.current_state == second.current_state == OPEN
    with pytest.raises(CircuitBreakerError):
        second.call(lambda: None)
    first.reset_timeout = second.reset_timeout = 0.05
    threading.Event().wait(0.1)

    def probe() -> None:
        assert client.get(KEYS[0]) == b"half-open"
        # pybreaker's breaker is half-open on the thread that probes only.
        elsewhere = HALF_OPEN if settles_calls(second) else OPEN
        assert (first.current_state, second.current_state) == (HALF_OPEN, elsewhere)
        with pytest.raises(CircuitBreakerError):
            second.call(lambda: None)

    first.call(probe)
    assert first.current_state == second.current_state == CLOSED
    assert client.hget(KEYS[4], "generation") == b"3"


def test_circuit_released_during_the_switch_to_transactions_is_registered_again(
    scriptless: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread releases the circuit right after the first transaction that replaced a script."""
    storage = CircuitRedisStorage(CLOSED, scriptless, "optimistic")
    execute = TransactionEngine.execute
    left: list[int] = []

    def release_after(engine: TransactionEngine, *arguments: Any) -> Any:
        reply = execute(engine, *arguments)
        if not left:
            left.append(1)
            core_of(storage).release_connections()
        return reply

    monkeypatch.setattr(TransactionEngine, "execute", release_after)
    breaker = CircuitBreaker(state_storage=storage)
    for _ in range(2):
        breaker.call(lambda: None)
    assert storage.health().mode == "optimistic"
    assert core_of(storage) in members_of(server_of(storage))


@pytest.mark.parametrize("step", ["execute_command", "execute"])
def test_connection_lost_in_a_transaction_is_raised(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Only contention is retried here, and only a wrong type is read again."""
    original = getattr(redis.client.Pipeline, step)

    def lost(self: Any, *args: Any, **options: Any) -> Any:
        if step == "execute" or args[0] == "HMGET":
            raise redis.ConnectionError("lost")
        return original(self, *args, **options)

    monkeypatch.setattr(redis.client.Pipeline, step, lost)
    engine = TransactionEngine(fakeredis.FakeStrictRedis(), circuit_keys("lost", needs_one_slot=False))
    with pytest.raises(redis.ConnectionError, match="lost"):
        engine.execute(RecordFailure(None, ""), None, CLOSED)


def test_client_that_always_decodes_reads_damage_undecoded(
    monkeypatch: pytest.MonkeyPatch, server: PrivateServer
) -> None:
    """Releases 3 of redis-py cannot leave a single answer undecoded.

    Bytes that are no text must not raise there either.
    """
    monkeypatch.setattr(legacy, "HAS_NEVER_DECODE", False)
    keys = circuit_keys("damaged", needs_one_slot=False)
    with contextlib.closing(server.client(decode_responses=True)) as client:
        client.set(keys[0], b"\xff")
        engine = TransactionEngine(client, keys)
        assert engine.client is not client
        assert engine.execute(Load(), None, OPEN).circuit.state == OPEN
        engine.client.connection_pool.disconnect()


def test_fakeredis_without_lupa_runs_no_scripts() -> None:
    """Older versions of fakeredis raise an error of Python's import system."""

    class Old:
        def evalsha(self, *_: Any) -> None:
            raise ModuleNotFoundError("No module named 'lupa'")

    with pytest.raises(ScriptingUnavailableError, match="lupa"):
        LuaEngine(Old(), circuit_keys("old", needs_one_slot=False)).execute(Load(), None, CLOSED)
