"""State machine: workers, operators and foreign writers act in any order, and invariants hold after every step.

Several workers make calls with their own storages and breakers. They admit, report, crash, read and give operator
commands. If the tests use our breaker, one worker has an unmodified one, and calls of the others are interrupted. Stock
pybreaker writes too, keys get lost, scripts are flushed, and time passes. After every step, the record is compared with
the expected one.

There are two environments: fakeredis with a clock that tests move, and a real server with Lua and short, real times.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import fakeredis
import hypothesis.strategies as st
import pybreaker
import pytest
import time_machine
from hypothesis import HealthCheck, event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._model.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from pybreaker_redis._model.intents import Reply
from tests.support.breakers import Down
from tests.support.inspect import admission_of, answer_intents, load_shared, view_of
from tests.support.selection import examples
from tests.support.ways import UnmodifiedBreaker, is_breaker

# The model does not depend on the version of Python. The README's tests run it on every server.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patient")]

FAIL_MAX = 2
SUCCESS_THRESHOLD = 2
WORKERS = 3


class FakeEnvironment:
    """Environment on fakeredis, without scripts and with a stopped clock."""

    reset_timeout = 10.0
    lease = 30.0
    tolerance_ms = 1.0
    scripts = False

    def __init__(self) -> None:
        self._travel = time_machine.travel(datetime(2030, 1, 1, tzinfo=timezone.utc), tick=False)
        self._clock = self._travel.start()
        self.client: Any = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._clock.shift(seconds)

    def close(self) -> None:
        """Restore the clock."""
        self._travel.stop()
        self.client.close()


class RealEnvironment:
    """Environment on a real server with scripts and real time."""

    reset_timeout = 0.02
    lease = 0.04
    #: Milliseconds by which a worker may admit later than the server's clock allows: the duration of an answer.
    tolerance_ms = 20.0
    scripts = True

    def __init__(self, client: Any) -> None:
        self.client = client
        client.flushall()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def close(self) -> None:
        """Do nothing."""


class Worker:
    """A process with a storage, a breaker, and at most one call in flight.

    Args:
        environment: Environment of the process.
        index: Number of the worker.  The first one has an unmodified breaker.
    """

    def __init__(self, environment: Any, index: int = 0) -> None:
        self.storage = CircuitRedisStorage(
            "closed", environment.client, namespace="machine", probe_lease=environment.lease, max_staleness=0
        )
        make = pybreaker.CircuitBreaker if index else UnmodifiedBreaker
        self.breaker = make(
            fail_max=FAIL_MAX,
            reset_timeout=environment.reset_timeout,
            success_threshold=SUCCESS_THRESHOLD,
            state_storage=self.storage,
        )
        self.block: Any = None
        self.admitted: tuple[int | None, str] = None, ""

    def begin(self) -> bool:
        """Try to begin a call, and return whether the call was admitted."""
        block = self.breaker.calling()
        try:
            entered = block.__enter__()
        except pybreaker.CircuitBreakerError:
            return False
        self.block, self.admitted = block, admission_of(self.breaker, entered)
        return True

    def end(self, error: BaseException | None) -> BaseException | None:
        """Report the outcome, and return the exception that the caller gets."""
        block, self.block = self.block, None
        if error is None:
            block.__exit__(None, None, None)
            return None
        try:
            raise error
        except BaseException as raised:  # noqa: BLE001 - exactly what a `with` block does
            try:
                block.__exit__(type(raised), raised, raised.__traceback__)
            except BaseException as answer:  # noqa: BLE001
                return answer
        return error

    def drop(self) -> None:
        """Drop the call without a report."""
        reply = Reply(accepted=False, circuit=Circuit(), now_ms=0)
        answer_intents(self.storage, reply)
        if self.block:
            with contextlib.suppress(Down):
                self.end(Down())


class Machine(RuleBasedStateMachine):
    """Steps that may happen, and their expected results."""

    def __init__(self, environment: Any, reached: list[bool]) -> None:
        super().__init__()
        self.environment = environment
        self.reached = reached
        self.half_open = False
        self.dead: list[Worker] = []

    @initialize()
    def start(self) -> None:
        """Create the workers, an observer of every step, and a stock worker."""
        self.workers = [Worker(self.environment, index) for index in range(WORKERS)]
        self.observer = Worker(self.environment).storage
        self.failures = 0
        self.last = self.record()
        self.stock = pybreaker.CircuitRedisStorage("closed", self.environment.client, namespace="machine")

    def teardown(self) -> None:
        """Drop all calls."""
        for worker in [*getattr(self, "workers", []), *self.dead]:
            worker.drop()
        self.environment.close()
        self.reached.append(self.half_open)

    def record(self) -> Circuit:
        """Return the record, by the server's clock."""
        return load_shared(self.observer).circuit

    def now_ms(self) -> float:
        """Return the server's time, in milliseconds."""
        return load_shared(self.observer).now_ms

    @contextlib.contextmanager
    def step(self, *, may_close: bool = False, may_count: bool = False) -> Iterator[Circuit]:
        """Check the invariants of every step."""
        before = self.last
        yield before
        after = self.last = self.record()
        assert after.generation >= before.generation, "generation only grows"
        if (before.state, after.state) == (OPEN, CLOSED):
            assert may_close, "open never turns closed without a successful probe or an operator"
        if not may_count:
            assert after.fail_counter == self.failures, "a count equals the failures since the last reset"
        live = [w for w in self.workers if w.block and w.admitted[0] == after.generation]
        if after.state == HALF_OPEN:
            assert len(live) <= 1, "one live probe"
            if not self.half_open:
                event("half-open reached")
            self.half_open = True

    @rule(index=st.integers(0, WORKERS - 1))
    def begin(self, index: int) -> None:
        """Begin a call."""
        worker = self.workers[index]
        if worker.block:
            return
        with self.step() as before:
            open_until = (before.opened_at_ms or 0) + self.environment.reset_timeout * 1000
            asked_at = self.now_ms()
            entered = worker.begin()
            after = self.record()
            if not entered:
                assert before.state != CLOSED
                assert after == before, "a rejected call changes nothing"
            elif before.state == CLOSED:
                assert after == before, "an admitted call changes nothing"
                assert worker.admitted == (after.generation, "")
            elif after.generation == before.generation:
                assert before.state == HALF_OPEN, "only a probe continues without a claim"
                assert worker.admitted == (before.generation, before.probe_token)
            else:
                assert (after.state, after.generation) == (HALF_OPEN, before.generation + 1)
                assert worker.admitted == (after.generation, after.probe_token)
                if before.state == OPEN:
                    assert self.now_ms() >= open_until, "open until the timeout has passed"
                    assert after.success_counter == 0
                else:
                    assert not before.probe_token or before.probe_until_ms <= self.now_ms(), "a live lease is kept"
                    assert after.success_counter == before.success_counter
            # A worker that read the trip late admits as much later, because server and worker share one clock
            # here.
            late_ms = -view_of(worker.storage).clock_offset.ms
            if before.state == OPEN and asked_at >= open_until + late_ms + self.environment.tolerance_ms:
                assert entered, "after the timeout, the first call is admitted"

    @rule(index=st.integers(0, WORKERS - 1))
    def succeed(self, index: int) -> None:
        """Let a call in flight succeed."""
        worker = self.workers[index]
        if not worker.block:
            return
        with self.step(may_count=True) as before:
            counts = worker.admitted == (before.generation, before.probe_token)
            assert worker.end(None) is None
            after = self.record()
            if not counts:
                assert after == before, "a late success changes nothing"
                return
            self.failures = 0
            assert after.fail_counter == 0
            if before.state == HALF_OPEN and before.success_counter + 1 >= SUCCESS_THRESHOLD:
                assert (after.state, after.generation) == (CLOSED, before.generation + 1)
                event("closed by a probe")
            else:
                assert (after.state, after.generation) == (before.state, before.generation)
                assert after.success_counter == before.success_counter + (before.state == HALF_OPEN)

    @rule(index=st.integers(0, WORKERS - 1))
    def fail(self, index: int) -> None:
        """Let a call in flight fail."""
        worker = self.workers[index]
        if not worker.block:
            return
        with self.step() as before:
            counts = worker.admitted == (before.generation, before.probe_token)
            error = Down()
            answer = worker.end(error)
            after = self.record()
            if not counts:
                assert answer is error, "the caller gets its own exception"
                assert after == before, "a late failure changes nothing"
                return
            self.failures = before.fail_counter + 1
            if before.state == HALF_OPEN or self.failures >= FAIL_MAX:
                assert isinstance(answer, pybreaker.CircuitBreakerError)
                assert (after.state, after.generation) == (OPEN, before.generation + 1)
            else:
                assert answer is error
                assert (after.state, after.generation) == (CLOSED, before.generation)

    @precondition(lambda self: is_breaker)
    @rule(index=st.integers(1, WORKERS - 1))
    def interrupt(self, index: int) -> None:
        """Interrupt a call in flight of our breaker."""
        worker = self.workers[index]
        if not worker.block:
            return
        with self.step() as before:
            has_probe = worker.admitted == (before.generation, before.probe_token) and before.state == HALF_OPEN
            error = KeyboardInterrupt()
            assert worker.end(error) is error
            after = self.record()
            if not has_probe:
                assert after == before, "an interrupted call counts nothing"
                return
            event("probe given back")
            assert not after.is_probe_leased(self.now_ms()), "the probe is free"
            assert after == before.with_free_probe()

    @rule(index=st.integers(0, WORKERS - 1))
    def crash(self, index: int) -> None:
        """Replace a process, with or without a call in flight."""
        with self.step() as before:
            self.dead.append(self.workers[index])
            self.workers[index].drop()
            self.workers[index] = Worker(self.environment, index)
            assert self.record() == before

    @rule(index=st.integers(0, WORKERS - 1))
    def read_all(self, index: int) -> None:
        """Read everything, as a health check does."""
        with self.step() as before:
            breaker = self.workers[index].breaker
            _ = breaker.state.name, breaker.current_state, breaker.fail_counter, breaker.success_counter
            _ = self.workers[index].storage.opened_at
            assert self.record() == before, "reading changes nothing"

    @rule(part=st.sampled_from([0.3, 1.0]))
    def wait(self, part: float) -> None:
        """Let a part of the timeout pass."""
        with self.step():
            self.environment.advance(self.environment.reset_timeout * part)

    @rule(index=st.integers(0, WORKERS - 1))
    def advance_circuit(self, index: int) -> None:
        """Steer towards the next transition of the circuit.

        The choice is made here and not by preconditions, because real time also passes while Hypothesis works.
        """
        if self.last.state == CLOSED:
            for _ in range(FAIL_MAX):
                self.begin(index)
                self.fail(index)
            return
        ends_ms = self.last.probe_until_ms
        if self.last.state == OPEN:
            ends_ms = (self.last.opened_at_ms or 0) + self.environment.reset_timeout * 1000
        with self.step():
            self.environment.advance(max(0.0, (ends_ms - self.now_ms()) / 1000) + 0.002)
        self.begin(index)

    @rule(index=st.integers(0, WORKERS - 1), other=st.integers(0, WORKERS - 1))
    def trip_and_probe(self, index: int, other: int) -> None:
        """Steer towards a trip and a probe in flight."""
        self.advance_circuit(index)
        self.advance_circuit(other)

    @rule(index=st.integers(0, WORKERS - 1), order=st.sampled_from(["open", "half_open", "close"]))
    def operate(self, index: int, order: str) -> None:
        """Open, half-open or close the circuit as an operator."""
        with self.step(may_close=order == "close") as before:
            getattr(self.workers[index].breaker, order)()
            after = self.record()
            assert after.state == {"open": OPEN, "half_open": HALF_OPEN, "close": CLOSED}[order]
            assert after.success_counter == 0
            if order == "close":
                self.failures = 0
            else:
                assert after.fail_counter == before.fail_counter

    @rule(action=st.sampled_from(["count", "open", "close"]))
    def write_with_stock(self, action: str) -> None:
        """Count, trip or close as a stock worker."""
        with self.step(may_close=action == "close") as before:
            if action == "count":
                self.stock.increment_counter()
                self.failures += 1
            elif action == "open":
                self.stock.opened_at = datetime.fromtimestamp(self.now_ms() / 1000, timezone.utc)
                self.stock.reset_success_counter()
                self.stock.state = OPEN
            else:
                self.stock.reset_success_counter()
                self.stock.reset_counter()
                self.stock.state = CLOSED
                self.failures = 0
            after = self.record()
            if action != "count":
                assert after.state == {"open": OPEN, "close": CLOSED}[action]
                assert after.generation == before.generation + (before.state != after.state) or action == "open"

    @rule(
        names=st.sets(
            st.sampled_from(["state", "fail_counter", "success_counter", "opened_at", "circuit"]), min_size=1
        ),
        index=st.integers(0, WORKERS - 1),
    )
    def lose_keys(self, names: set[str], index: int) -> None:
        """Delete keys. A process with the circuit in its cache may act before or after the observer."""
        with self.step(may_close=True) as before:
            self.environment.client.delete(*(f"machine:pybreaker:{name}" for name in names))
            if "fail_counter" in names:
                self.failures = 0
            known = view_of(self.workers[index].storage).cached
            if known is not None and known.generation == before.generation:
                _ = self.workers[index].storage.state
            after = self.record()
            assert after.state == before.state, "a record that a process knows is not lost"
            assert after.generation >= before.generation

    @precondition(lambda self: self.environment.scripts)
    @rule()
    def flush_scripts(self) -> None:
        """Flush the scripts of the server."""
        with self.step() as before:
            self.environment.client.script_flush()
            assert self.record() == before


def run(environment: Any, histories: int) -> float:
    """Run the machine, and return the share of histories that reached half-open."""
    reached: list[bool] = []
    run_state_machine_as_test(
        lambda: Machine(environment(), reached),
        settings=settings(
            max_examples=examples(histories),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return sum(reached) / len(reached)


def test_invariants_hold_under_a_clock_that_tests_move(report):
    """The invariants hold for random histories, most of which reach half-open."""
    share = run(FakeEnvironment, 150)
    report(f"machine, fakeredis: {share:.0%} of the histories reached half-open")
    assert share > 0.4


@pytest.mark.slow
def test_invariants_hold_on_a_real_server(client, report):
    """The invariants hold with the scripts of a real server, in real time."""
    share = run(lambda: RealEnvironment(client), 40)
    report(f"machine, real server: {share:.0%} of the histories reached half-open")
    assert share > 0.4
