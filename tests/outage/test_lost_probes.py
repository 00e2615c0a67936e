"""A claim or report of a probe that got no answer blocks other processes for no lease."""

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
from tests.support.breakers import Down, down, up
from tests.support.inspect import core_of, execute_intent, local_of, selector_of, server_of, storage_of
from tests.support.selection import but_for
from tests.support.wait import wait_for
from tests.support.ways import is_breaker

#: Seconds of a lease: longer than any of these tests may take.
LEASE_S = 60

#: Seconds within which a circuit recovers on a busy machine.
RECOVERY_S = 20

#: Intents of a successful and of a failing probe, in their order.  Our breaker settles a probe in one step.
SUCCESS_INTENTS: tuple[type[Intent], ...] = (
    (ClaimProbe, CountProbe, Close) if is_breaker else (ClaimProbe, RecordSuccess, CountProbe, Close)
)
FAILURE_INTENTS: tuple[type[Intent], ...] = (
    (ClaimProbe, RecordFailure) if is_breaker else (ClaimProbe, RecordFailure, Trip)
)

#: Numbers for names of circuits: the retry thread of one test may run into the next one.
_circuits = itertools.count()


@pytest.fixture(params=but_for(("lua",), ("lua", "optimistic")))
def engine(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[redis.Redis]:
    """A client for each engine."""
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
    """Stand-in for an exception from outside, as of a signal handler or a greenlet's timeout."""


class LossyEngine:
    """Engine of one storage that can lose a command or its reply.

    Args:
        storage: Storage to disturb.
    """

    def __init__(self, storage: CircuitRedisStorage) -> None:
        self.lost: list[Intent] = []
        self.sent: list[type[Intent]] = []
        self._loses: tuple[type[Intent], bool] | None = None
        self.selector = selector_of(storage)
        self.execute = self.selector.run_intent
        self.selector.run_intent = self._run  # type: ignore[method-assign]

    def lose(
        self, kind: type[Intent], *, executed: bool, error: type[Exception] = redis.exceptions.TimeoutError
    ) -> None:
        """Lose the next intent of this kind, or, if `executed`, only the reply to it."""
        self._loses, self._error = (kind, executed), error

    def _run(self, used_engine: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        self.sent.append(type(intent))
        loses = self._loses
        if loses is None or not isinstance(intent, loses[0]):
            return self.execute(used_engine, intent, known, state_if_missing)
        self._loses = None
        if loses[1]:
            self.execute(used_engine, intent, known, state_if_missing)
        self.lost.append(intent)
        msg = "Timeout reading from socket"
        raise self._error(msg)


def open_circuit(client: redis.Redis, **settings: Any) -> tuple[CircuitBreaker, CircuitRedisStorage]:
    """Return a breaker with an open circuit that permits a probe at once."""
    storage = CircuitRedisStorage("closed", client, namespace=f"lost{next(_circuits)}", probe_lease=LEASE_S)
    breaker = CircuitBreaker(reset_timeout=0, state_storage=storage, **settings)
    breaker.call(up)
    # The server may still count as unreachable after the losses of the test before.
    wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
    breaker.open()
    return breaker, storage


def request(breaker: CircuitBreaker, function: Callable[[], Any] = up) -> None:
    """Make a call on a new thread, as web servers do."""

    def run() -> None:
        with contextlib.suppress(CircuitBreakerError, Down):
            breaker.call(function)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(RECOVERY_S)
    assert not thread.is_alive()


def shared_state(storage: CircuitRedisStorage, client: redis.Redis) -> Any:
    """Return the state in Redis."""
    return client.get(f"{storage.health().circuit}:pybreaker:state")


def recover(breaker: CircuitBreaker, client: redis.Redis) -> None:
    """Make calls until the shared circuit is closed."""
    deadline = time.monotonic() + RECOVERY_S
    while shared_state(storage_of(breaker), client) != b"closed":
        assert time.monotonic() < deadline, "the circuit closes"
        request(breaker)
        time.sleep(0.01)


@pytest.mark.parametrize(("function", "intents"), [(up, SUCCESS_INTENTS), (down, FAILURE_INTENTS)])
def test_each_intent_of_a_probe_is_lost_in_a_test(
    engine: redis.Redis, function: Callable[[], Any], intents: tuple[type[Intent], ...]
) -> None:
    """The tests below lose each intent that changes the circuit during a probe."""
    breaker, storage = open_circuit(engine)
    lossy = LossyEngine(storage)
    request(breaker, function)
    assert [kind for kind in lossy.sent if kind is not Load] == [*intents]


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", SUCCESS_INTENTS)
@pytest.mark.parametrize("threshold", [1, 3])
def test_success_whose_answer_is_lost_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool, threshold: int
) -> None:
    """After a lost reply the next call of the process probes on any thread, whether or not the command was executed."""
    breaker, storage = open_circuit(engine, success_threshold=threshold)
    lossy = LossyEngine(storage)
    lossy.lose(kind, executed=executed)
    recover(breaker, engine)
    assert len(lossy.lost) == 1


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", FAILURE_INTENTS)
def test_failure_whose_answer_is_lost_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool
) -> None:
    """The same holds if the dependency is still down."""
    breaker, storage = open_circuit(engine)
    lossy = LossyEngine(storage)
    lossy.lose(kind, executed=executed)
    request(breaker, down)
    wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
    recover(breaker, engine)
    assert len(lossy.lost) == 1


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "not executed"])
@pytest.mark.parametrize("kind", SUCCESS_INTENTS)
def test_probe_interrupted_from_outside_blocks_for_no_lease(
    engine: redis.Redis, kind: type[Intent], executed: bool
) -> None:
    """An interruption ends the call and its probe, so the next call of this process probes."""
    breaker, storage = open_circuit(engine)
    LossyEngine(storage).lose(kind, executed=executed, error=Interrupted)
    with pytest.raises(Interrupted):
        breaker.call(up)
    recover(breaker, engine)


def test_orphaned_claim_admits_one_call_at_a_time(engine: redis.Redis) -> None:
    """Of many threads that find a probe without a holder, one adopts it."""
    breaker, storage = open_circuit(engine)
    lossy = LossyEngine(storage)
    lossy.lose(ClaimProbe, executed=True)
    request(breaker)
    wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
    assert shared_state(storage, engine) == b"half-open"
    others = [CircuitBreaker(reset_timeout=0, state_storage=storage) for _ in range(8)]
    inside, most, gate = [0], [0], threading.Barrier(len(others))

    def probe() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1

    def run(other: CircuitBreaker) -> None:
        gate.wait(RECOVERY_S)
        request(other, probe)

    threads = [threading.Thread(target=run, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(RECOVERY_S)
    assert most == [1]
    assert shared_state(storage, engine) == b"closed"


def test_retry_after_names_no_lease_of_an_orphaned_claim(engine: redis.Redis) -> None:
    """The advertised wait is zero, because the next call of this process may probe at once."""
    breaker, storage = open_circuit(engine)
    LossyEngine(storage).lose(ClaimProbe, executed=True)
    request(breaker)
    wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
    wait_for(lambda: retry_after(breaker) == 0, "a probe is permitted")


def test_claim_of_another_process_keeps_its_lease(server: PrivateServer, engine: redis.Redis) -> None:
    """A process adopts only tokens of its own: the probe of another process keeps its lease."""
    breaker, storage = open_circuit(engine)
    with contextlib.closing(server.client()) as client:
        other = CircuitRedisStorage("closed", client, namespace=storage.health().circuit)
        generation = execute_intent(other, Load()).circuit.generation
        assert core_of(other).carry_out(ClaimProbe(generation, "abcdef", LEASE_S * 1000)).accepted
        request(breaker)
        assert execute_intent(storage, Load()).circuit.probe_token == "abcdef"
        assert shared_state(storage, engine) == b"half-open"


def test_claim_that_is_lost_without_an_outage_admits_no_call(engine: redis.Redis) -> None:
    """Without an outage the shared circuit has the only probe, so the failed claim admits no local probe."""
    breaker, storage = open_circuit(engine)
    server = server_of(storage)
    assert server is not None
    lossy = LossyEngine(storage)

    def returns(used_engine: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not lossy.lost:
            lossy.lost.append(intent)
            server.availability.last_recovery_at = time.monotonic()
            msg = "Connection closed by server."
            raise redis.exceptions.ConnectionError(msg)
        return lossy.execute(used_engine, intent, known, state_if_missing)

    lossy.selector.run_intent = returns  # type: ignore[method-assign]
    with pytest.raises(CircuitBreakerError):
        breaker.call(up)
    assert lossy.lost
    assert storage.health().condition == "connected"
    assert breaker.call(up) == "answer"
    assert shared_state(storage, engine) == b"closed"


def test_claim_during_the_return_by_another_thread_admits_no_call(engine: redis.Redis) -> None:
    """Without an outage the shared circuit has the only probe, so a call during the return is rejected."""
    breaker, storage = open_circuit(engine)
    core_of(storage).on_server_lost()
    with local_of(storage).recovery_turn() as is_first:
        assert is_first
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    assert breaker.call(up) == "answer"
    assert shared_state(storage, engine) == b"closed"


def after_lost_report(engine: redis.Redis) -> tuple[CircuitBreaker, CircuitRedisStorage, LossyEngine]:
    """Return a half-open circuit after the report of this thread's probe was lost and the server has returned."""
    breaker, storage = open_circuit(engine, success_threshold=3)
    lossy = LossyEngine(storage)
    lossy.lose(CountProbe, executed=False)
    breaker.call(up)
    wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
    return breaker, storage, lossy


@pytest.fixture
def taken_over(engine: redis.Redis) -> Iterator[tuple[CircuitBreaker, CircuitRedisStorage, Intent]]:
    """Lose the report of this thread's probe while another thread is in the next probe, and yield the report."""
    breaker, storage, lossy = after_lost_report(engine)
    is_inside, may_leave = threading.Event(), threading.Event()

    def probe() -> None:
        is_inside.set()
        may_leave.wait(RECOVERY_S)

    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    thread = threading.Thread(target=request, args=(other, probe))
    thread.start()
    try:
        assert is_inside.wait(RECOVERY_S)
        yield breaker, storage, lossy.lost[0]
    finally:
        may_leave.set()
        thread.join(RECOVERY_S)


def test_thread_that_lost_its_report_does_not_join_the_next_probe(
    taken_over: tuple[CircuitBreaker, CircuitRedisStorage, Intent],
) -> None:
    """Only calls within a probe are part of it, and the call of this thread has ended."""
    with pytest.raises(CircuitBreakerError):
        taken_over[0].call(up)


def test_thread_that_lost_its_report_does_not_join_while_another_thread_claims(engine: redis.Redis) -> None:
    """The record names the former probe until the claim is answered, and still admits no call."""
    breaker, storage, lossy = after_lost_report(engine)
    claims, may_claim = threading.Event(), threading.Event()

    def waits(used_engine: Any, intent: Intent, known: Circuit | None, state_if_missing: str) -> Reply:
        if isinstance(intent, ClaimProbe) and not claims.is_set():
            claims.set()
            may_claim.wait(RECOVERY_S)
        return lossy.execute(used_engine, intent, known, state_if_missing)

    lossy.selector.run_intent = waits  # type: ignore[method-assign]
    other = CircuitBreaker(reset_timeout=0, success_threshold=3, state_storage=storage)
    thread = threading.Thread(target=request, args=(other,))
    thread.start()
    try:
        assert claims.wait(RECOVERY_S)
        with pytest.raises(CircuitBreakerError):
            breaker.call(up)
    finally:
        may_claim.set()
        thread.join(RECOVERY_S)


def test_report_that_the_server_executes_late_does_not_count_for_the_next_probe(
    taken_over: tuple[CircuitBreaker, CircuitRedisStorage, Intent],
) -> None:
    """A late report must not end the probe of another call, which would admit a third call."""
    _, storage, report = taken_over
    probed = execute_intent(storage, Load()).circuit
    late = core_of(storage).run_shared(report)
    assert not late.accepted
    assert (late.circuit.probe_token, late.circuit.generation) == (probed.probe_token, probed.generation)


def test_server_that_freezes_during_a_claim_blocks_for_no_lease(killable_server: PrivateServer) -> None:
    """A frozen server executes the claim when it resumes, after its caller has gone: the next call probes."""
    with contextlib.closing(killable_server.client()) as client:
        breaker, storage = open_circuit(client)
        recover(breaker, client)
        breaker.open()
        request(breaker, down)
        killable_server.pause()
        request(breaker)
        killable_server.resume()
        wait_for(lambda: storage.health().condition == "connected", "the return is noticed")
        recover(breaker, client)
