"""A claim or a report of a probe that got no answer blocks the fleet for no lease."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import Circuit
from pybreaker_redis._model.intents import (
    ClaimProbe,
    Close,
    CountProbe,
    Intent,
    Load,
    RecordFailure,
    RecordSuccess,
    Reply,
    Trip,
)
from pybreaker_redis.operators import retry_after
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.wait import wait_for

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
        self._selector = storage._core.shared.selector
        self._execute = self._selector.run_intent
        self._selector.run_intent = self._carry  # type: ignore[method-assign]

    def lose(
        self, kind: type[Intent], *, executed: bool, error: type[Exception] = redis.exceptions.TimeoutError
    ) -> None:
        """Lose the next answer to such an intent, or the intent itself."""
        self._loses, self._error = (kind, executed), error

    def _carry(self, choice: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        loses = self._loses
        if loses is None or not isinstance(intent, loses[0]):
            return self._execute(choice, intent, known, state_if_missing)
        self._loses = None
        if loses[1]:
            self._execute(choice, intent, known, state_if_missing)
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
    wait_for(lambda: retry_after(breaker) == 0, "its gate is open")


def test_claim_of_another_process_is_left_alone(server: PrivateServer, engine: redis.Redis) -> None:
    """Only tokens of this process are used again: another's probe holds its lease."""
    breaker, storage = opened(engine)
    with contextlib.closing(server.client()) as client:
        other = CircuitRedisStorage("closed", client, namespace=storage.health().circuit)
        generation = other._core.carry_out(Load()).circuit.generation
        assert other._core.carry_out(ClaimProbe(generation, "abcdef", LEASE * 1000)).accepted
        request(breaker)
        assert storage._core.carry_out(Load()).circuit.probe_token == "abcdef"
        assert shared_state(storage, engine) == b"half-open"


def test_claim_that_is_lost_without_an_outage_admits_no_call(engine: redis.Redis) -> None:
    """The server was back before the error: another call may get the shared probe, so there is no local one."""
    breaker, storage = opened(engine)
    server = storage._core.server
    assert server is not None
    line = Line(storage)

    def returns(choice: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not line.lost:
            line.lost.append(intent)
            server.availability.last_recovery_at = time.monotonic()
            msg = "Connection closed by server."
            raise redis.exceptions.ConnectionError(msg)
        return line._execute(choice, intent, known, state_if_missing)

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
    with storage._core.local.recovery_turn() as is_first:
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

    def waits(choice: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not claims.is_set():
            claims.set()
            may_claim.wait(SOON)
        return line._execute(choice, intent, known, state_if_missing)

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
    probed = storage._core.carry_out(Load()).circuit
    late = storage._core.run_shared(report)
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
