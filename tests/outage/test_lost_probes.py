"""A claim or a report of a probe that got no answer blocks the fleet for no lease."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._carrier import Reply
from pybreaker_redis._circuit import HALF_OPEN, OPEN, Circuit
from pybreaker_redis._demo.server import PrivateServer
from pybreaker_redis._intents import ClaimProbe, Close, CountProbe, Intent, Load, RecordFailure, RecordSuccess, Trip
from pybreaker_redis._probes import PROBE_TOKENS, PROBE_TOKENS_MAX, ProbeTokens
from tests.viewed import wait_for

#: Seconds: longer than any test here may take.
LEASE = 60

#: Seconds within which a circuit recovers, on a machine that is busy with other things.
SOON = 20


#: A circuit for each test: the thread that asks whether the server is back may outlast its test for a moment.
_circuits = itertools.count()


class Down(Exception):
    """The dependency is down."""


def up() -> str:
    """A call to the healthy dependency."""
    return "answer"


def down() -> None:
    """A call to the dead dependency."""
    raise Down


@pytest.fixture(params=["lua", "optimistic"])
def engine(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[redis.Redis]:
    """A client for each way to move a circuit."""
    user = {}
    if request.param == "optimistic":
        with contextlib.closing(server.client()) as administrator:
            administrator.execute_command(
                "ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting"
            )
        user = {"username": "noscript", "password": "any"}
    with contextlib.closing(server.client(**user)) as client:
        yield client


class Interrupted(Exception):
    """Raised from outside, as by a signal handler or a greenlet's timeout."""


class Line:
    """The connection of one storage, on which answers get lost.

    Args:
        storage: To disturb.
    """

    def __init__(self, storage: CircuitRedisStorage) -> None:
        self.lost: list[Intent] = []
        self._loses: tuple[type[Intent], bool] | None = None
        self._selector = storage._core.shared._selector
        self._execute = self._selector.run_intent
        self._selector.run_intent = self._carry  # type: ignore[method-assign]

    def lose(
        self, kind: type[Intent], *, executed: bool, error: type[Exception] = redis.exceptions.TimeoutError
    ) -> None:
        """Lose the next answer to such an intent, or the intent itself."""
        self._loses, self._error = (kind, executed), error

    def _carry(self, carrier: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        loses = self._loses
        if loses is None or not isinstance(intent, loses[0]):
            return self._execute(carrier, intent, known, state_if_missing)
        self._loses = None
        if loses[1]:
            self._execute(carrier, intent, known, state_if_missing)
        self.lost.append(intent)
        msg = "Timeout reading from socket"
        raise self._error(msg)


def opened(client: redis.Redis, **words: Any) -> tuple[CircuitBreaker, CircuitRedisStorage]:
    """A breaker whose circuit is open, and may be tried at once."""
    storage = CircuitRedisStorage("closed", client, namespace=f"lost{next(_circuits)}", probe_lease=LEASE)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, **words)
    breaker.call(up)
    # The server may still count as unreachable for what the test before has lost.
    wait_for(lambda: storage.health().condition == "connected", "it is back")
    breaker.open()
    return breaker, storage


def request(breaker: CircuitBreaker, function: Callable[[], Any] = up) -> None:
    """A call on a thread of its own, as web servers make them."""

    def run() -> None:
        with contextlib.suppress(CircuitBreakerError, Down):
            breaker.call(function)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive()


def shared_state(storage: CircuitRedisStorage, client: redis.Redis) -> Any:
    """The state in Redis."""
    return client.get(f"{storage.health().circuit}:pybreaker:state")


def recovers(breaker: CircuitBreaker, client: redis.Redis) -> None:
    """Call until the shared circuit is closed."""
    deadline = time.monotonic() + SOON
    while shared_state(breaker._state_storage, client) != b"closed":
        assert time.monotonic() < deadline, "it is not closed in time"
        request(breaker)
        time.sleep(0.01)


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", [ClaimProbe, RecordSuccess, CountProbe, Close])
@pytest.mark.parametrize("threshold", [1, 3])
def test_success_whose_answer_is_lost_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool, threshold: int
) -> None:
    """Whether the server has executed it or not: the next call of this process probes, on whichever thread."""
    breaker, storage = opened(engine, success_threshold=threshold)
    line = Line(storage)
    line.lose(kind, executed=executed)
    recovers(breaker, engine)
    assert len(line.lost) == 1


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", [ClaimProbe, RecordFailure, Trip])
def test_failure_whose_answer_is_lost_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool
) -> None:
    """The same if the dependency is still down when it happens."""
    breaker, storage = opened(engine)
    line = Line(storage)
    line.lose(kind, executed=executed)
    request(breaker, down)
    wait_for(lambda: storage.health().condition == "connected", "it is back")
    recovers(breaker, engine)
    assert len(line.lost) == 1


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", [ClaimProbe, RecordSuccess, CountProbe, Close])
def test_probe_interrupted_from_outside_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool
) -> None:
    """A deadline that ends the wait for an answer ends the call: the next call of this process probes."""
    breaker, storage = opened(engine)
    Line(storage).lose(kind, executed=executed, error=Interrupted)
    with pytest.raises(Interrupted):
        breaker.call(up)
    recovers(breaker, engine)


def test_orphaned_claim_admits_one_call_at_a_time(engine: redis.Redis) -> None:
    """Many threads see the probe that belongs to none of them; one takes it."""
    breaker, storage = opened(engine)
    line = Line(storage)
    line.lose(ClaimProbe, executed=True)
    request(breaker)
    wait_for(lambda: storage.health().condition == "connected", "it is back")
    assert shared_state(storage, engine) == b"half-open"
    others = [CircuitBreaker(reset_timeout=0, state_storage=storage) for _ in range(8)]
    inside, most, gate = [0], [0], threading.Barrier(len(others))

    def probe() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1

    def run(other: CircuitBreaker) -> None:
        gate.wait(SOON)
        request(other, probe)

    threads = [threading.Thread(target=run, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert most == [1]
    assert shared_state(storage, engine) == b"closed"


def test_retry_after_names_no_lease_of_an_orphaned_claim(engine: redis.Redis) -> None:
    """What clients are told to wait is what they have to wait: nothing."""
    breaker, storage = opened(engine)
    Line(storage).lose(ClaimProbe, executed=True)
    request(breaker)
    wait_for(lambda: storage.health().condition == "connected", "it is back")
    wait_for(lambda: storage.retry_after(0) == 0, "its gate is open")


def test_claim_of_another_process_is_left_alone(server: PrivateServer, engine: redis.Redis) -> None:
    """Only tokens of this process are used again: another's probe holds its lease."""
    breaker, storage = opened(engine)
    with contextlib.closing(server.client()) as client:
        other = CircuitRedisStorage("closed", client, namespace=storage.health().circuit)
        generation = other._execute(Load()).circuit.generation
        assert other._core.carry_out(ClaimProbe(generation, "abcdef", LEASE * 1000)).accepted
        request(breaker)
        assert storage._execute(Load()).circuit.probe_token == "abcdef"
        assert shared_state(storage, engine) == b"half-open"


def test_claim_that_is_lost_without_an_outage_admits_no_call(engine: redis.Redis) -> None:
    """The server was back before the error: another call may get the shared probe, so there is no local one."""
    breaker, storage = opened(engine)
    server = storage._core.server
    assert server is not None
    line = Line(storage)

    def returns(carrier: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not line.lost:
            line.lost.append(intent)
            server.availability.last_recovery_at = time.monotonic()
            msg = "Connection closed by server."
            raise redis.exceptions.ConnectionError(msg)
        return line._execute(carrier, intent, known, state_if_missing)

    line._selector.run_intent = returns  # type: ignore[method-assign]
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    assert line.lost
    assert storage.health().condition == "connected"
    assert breaker.call(up) == "answer"
    assert shared_state(storage, engine) == b"closed"


def test_claim_while_another_thread_brings_the_circuit_back_admits_no_call(engine: redis.Redis) -> None:
    """There is no outage any more, so the shared circuit has the only probe."""
    breaker, storage = opened(engine)
    storage._core.on_server_lost()
    with storage._core.own.recovery_turn() as is_first:
        assert is_first
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    assert breaker.call(up) == "answer"
    assert shared_state(storage, engine) == b"closed"


def after_lost_report(engine: redis.Redis) -> tuple[CircuitBreaker, CircuitRedisStorage, Line]:
    """A half-open circuit whose server is back after it lost the report of this thread's probe."""
    breaker, storage = opened(engine, success_threshold=3)
    line = Line(storage)
    line.lose(CountProbe, executed=False)
    breaker.call(up)
    wait_for(lambda: storage.health().condition == "connected", "it is back")
    return breaker, storage, line


@pytest.fixture
def taken_over(engine: redis.Redis) -> Iterator[tuple[CircuitBreaker, CircuitRedisStorage, Intent]]:
    """The report of this thread's probe got lost, and another thread is within the next probe; the report."""
    breaker, storage, line = after_lost_report(engine)
    is_inside, may_leave = threading.Event(), threading.Event()

    def probe() -> None:
        is_inside.set()
        may_leave.wait(SOON)

    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    thread = threading.Thread(target=request, args=(other, probe))
    thread.start()
    try:
        assert is_inside.wait(SOON)
        yield breaker, storage, line.lost[0]
    finally:
        may_leave.set()
        thread.join(SOON)


def test_thread_that_lost_its_report_does_not_join_the_next_probe(
    taken_over: tuple[CircuitBreaker, CircuitRedisStorage, Intent],
) -> None:
    """Its call has ended: only calls made within a probe are part of it."""
    with pytest.raises(CircuitBreakerError):
        taken_over[0].call(up)


def test_thread_that_lost_its_report_does_not_join_while_another_thread_claims(engine: redis.Redis) -> None:
    """The record still names the former probe, until the claim is answered."""
    breaker, storage, line = after_lost_report(engine)
    claims, may_claim = threading.Event(), threading.Event()

    def waits(carrier: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not claims.is_set():
            claims.set()
            may_claim.wait(SOON)
        return line._execute(carrier, intent, known, state_if_missing)

    line._selector.run_intent = waits  # type: ignore[method-assign]
    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    thread = threading.Thread(target=request, args=(other,))
    thread.start()
    try:
        assert claims.wait(SOON)
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    finally:
        may_claim.set()
        thread.join(SOON)


def test_report_that_the_server_executes_late_does_not_count_for_the_next_probe(
    taken_over: tuple[CircuitBreaker, CircuitRedisStorage, Intent],
) -> None:
    """Else the probe would be given back under the call that holds it, and a third call would be admitted."""
    _, storage, report = taken_over
    probed = storage._execute(Load()).circuit
    late = storage._core.shared.execute(report)
    assert not late.accepted
    assert (late.circuit.probe_token, late.circuit.generation) == (probed.probe_token, probed.generation)


def test_server_that_freezes_as_the_gate_opens_blocks_for_no_lease(killable_server: PrivateServer) -> None:
    """The claim is executed when the server wakes up, and its caller has gone: the next call probes."""
    with contextlib.closing(killable_server.client()) as client:
        breaker, storage = opened(client)
        recovers(breaker, client)
        breaker.open()
        request(breaker, down)
        killable_server.pause()
        request(breaker)
        killable_server.resume()
        wait_for(lambda: storage.health().condition == "connected", "it is back")
        recovers(breaker, client)


class TestLooseProbes:
    """The tokens that no call of this process holds."""

    def half_open(self, token: str) -> Reply:
        """The record says that this token has the probe, for a long time."""
        circuit = Circuit(HALF_OPEN, generation=2, probe_token=token, probe_until_ms=1e15)
        return Reply(True, circuit, 1e12)

    def test_released_token_is_shown_as_free_until_one_caller_takes_it(self) -> None:
        """Of many, exactly one."""
        probes = ProbeTokens()
        assert probes.shown(self.half_open("a")).circuit.is_probe_leased(1e12)
        probes.release("a")
        assert not probes.shown(self.half_open("a")).circuit.is_probe_leased(1e12)
        assert probes.shown(self.half_open("b")).circuit.is_probe_leased(1e12)
        assert not probes.has_ended("b")
        assert [probes.take("a") for _ in range(3)] == [True, False, False]
        assert probes.has_ended("a")
        assert probes.shown(self.half_open("a")).circuit.is_probe_leased(1e12)

    def test_no_token_is_never_taken(self) -> None:
        """Nor is one that was never released."""
        assert not ProbeTokens().take("")
        assert not ProbeTokens().take("a")

    def test_oldest_tokens_are_forgotten(self) -> None:
        """So the memory of a process that runs for a year is bounded."""
        probes = ProbeTokens()
        for number in range(PROBE_TOKENS_MAX + 1):
            probes.release(str(number))
        assert not probes.take("0")
        assert probes.take("1")
        assert probes.take(str(PROBE_TOKENS_MAX))

    def test_forked_child_owns_none(self) -> None:
        """The parent claims again, not each of its children."""
        PROBE_TOKENS.release("inherited")
        pid = os.fork()
        if not pid:
            os._exit(int(PROBE_TOKENS.take("inherited")))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert PROBE_TOKENS.take("inherited")

    @pytest.mark.parametrize(
        ("intent", "accepted", "token_after", "is_loose"),
        [
            (ClaimProbe(1, "a", 1), True, "a", False),
            (ClaimProbe(1, "a", 1), False, "b", True),
            (RecordFailure(2, "a"), True, "a", False),
            (RecordFailure(2, "a"), False, "a", True),
            (CountProbe(2, "a", 1), True, "a", False),
            (CountProbe(2, "a", 1, 3), True, "", True),
            (CountProbe(2, "a", 1), False, "a", True),
            (Close(2, "a"), True, "", True),
            (Trip(2, "a"), True, "", True),
            (RecordSuccess(2, "a"), True, "a", False),
        ],
    )
    def test_token_is_held_until_the_last_report_of_its_call(
        self, intent: Intent, accepted: bool, token_after: str, is_loose: bool
    ) -> None:
        """A call that has reported holds nothing, whatever became of the report."""
        probes = ProbeTokens()
        reply = Reply(accepted, Circuit(OPEN, probe_token=token_after), 0)
        assert probes.track(lambda _: reply, intent) is reply
        assert probes.take("a") == is_loose

    @pytest.mark.parametrize("accepted", [True, False])
    def test_token_that_was_replaced_stays_loose(self, accepted: bool) -> None:
        """Whether the record has the new token is not certain: another circuit may have given the answer."""
        probes = ProbeTokens()
        probes.release("a")
        assert probes.take("a")
        reply = Reply(accepted, Circuit(HALF_OPEN, probe_token="b"), 0)
        probes.track(lambda _: reply, ClaimProbe(1, "b", 1, "a"))
        assert probes.take("a")
        assert probes.take("b") is not accepted

    @pytest.mark.parametrize(
        "intent",
        [
            *(ClaimProbe(1, "a", 1), RecordFailure(2, "a"), Trip(2, "a")),
            *(RecordSuccess(2, "a"), CountProbe(2, "a", 1), Close(2, "a")),
        ],
    )
    def test_token_is_loose_after_an_exception_from_outside(self, intent: Intent) -> None:
        """As a greenlet's timeout, raised while the intent waited for its answer: the server may have executed it."""
        probes = ProbeTokens()

        def interrupted(_: Intent) -> Reply:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            probes.track(interrupted, intent)
        assert probes.take("a")

    def test_tokens_released_by_many_threads_at_once_raise_nothing(self) -> None:
        """Also once the oldest are forgotten, since `release` runs in guarded calls."""
        probes = ProbeTokens()
        errors: list[RuntimeError] = []
        ends = time.monotonic() + 1

        def release(name: int) -> None:
            try:
                for number in itertools.count():
                    probes.release(f"{name} {number}")
                    if errors or time.monotonic() > ends:
                        break
            except RuntimeError as error:
                errors.append(error)

        threads = [threading.Thread(target=release, args=(name,)) for name in range(8)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(SOON)
        finally:
            sys.setswitchinterval(interval)
        assert not errors
