"""Workers, operators and foreign writers in any order: what holds whatever happens.

Several workers, each with a storage and an unmodified breaker of its own, admit calls, have them in flight and report
on them, crash, look, order; others write with stock pybreaker, keys get lost, scripts are flushed, time passes.  After
every step the record is compared with what must have become of it.

Two homes: fakeredis with a clock that only moves when told to, and a real server with Lua, where time is real and
short.
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
from pybreaker_redis._model.intents import Load, Reply

# Pure model: one Python is as good as another, and the README's tests run it on every server.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patient")]

FAIL_MAX = 2
SUCCESS_THRESHOLD = 2
WORKERS = 3


class Down(Exception):
    """The dependency is down."""


class FakeHome:
    """fakeredis without scripts, and a clock that stands still."""

    reset_timeout = 10.0
    lease = 30.0
    blur_ms = 1.0
    scripts = False

    def __init__(self) -> None:
        self._travel = time_machine.travel(datetime(2030, 1, 1, tzinfo=timezone.utc), tick=False)
        self._clock = self._travel.start()
        self.client: Any = fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._clock.shift(seconds)

    def close(self) -> None:
        """Let the clock go."""
        self._travel.stop()
        self.client.close()


class RealHome:
    """A real server that runs the scripts, and real time."""

    reset_timeout = 0.02
    lease = 0.04
    #: How much later than by the server's clock a gate may open by a worker's: as long as an answer takes.
    blur_ms = 20.0
    scripts = True

    def __init__(self, client: Any) -> None:
        self.client = client
        client.flushall()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def close(self) -> None:
        """Nothing to let go."""


class Worker:
    """A process: a storage, a breaker, at most one call in flight."""

    def __init__(self, home: Any) -> None:
        self.storage = CircuitRedisStorage(
            "closed", home.client, namespace="machine", probe_lease=home.lease, max_staleness=0
        )
        self.breaker = pybreaker.CircuitBreaker(
            fail_max=FAIL_MAX,
            reset_timeout=home.reset_timeout,
            success_threshold=SUCCESS_THRESHOLD,
            state_storage=self.storage,
        )
        self.block: Any = None
        self.admitted: tuple[int | None, str] = None, ""

    def begin(self) -> bool:
        """Try to be admitted."""
        block = self.breaker.calling()
        try:
            block.__enter__()
        except pybreaker.CircuitBreakerError:
            return False
        admission = self.storage._admissions.tag_of(self.breaker._state).admission
        self.block, self.admitted = block, admission
        return True

    def end(self, error: BaseException | None) -> BaseException | None:
        """Report; the exception that the user gets."""
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

    def die(self) -> None:
        """Never report: what remains of the block goes nowhere."""
        reply = Reply(accepted=False, circuit=Circuit(), now_ms=0)
        self.storage._core.carry_out = lambda intent, budget=None: reply  # type: ignore[method-assign]
        if self.block:
            with contextlib.suppress(Down):
                self.end(Down())


class Machine(RuleBasedStateMachine):
    """What may happen, and what must come of it."""

    def __init__(self, home: Any, reached: list[bool]) -> None:
        super().__init__()
        self.home = home
        self.reached = reached
        self.half_open = False
        self.dead: list[Worker] = []

    @initialize()
    def start(self) -> None:
        """A fleet, an observer who sees every step, and a stock worker."""
        self.workers = [Worker(self.home) for _ in range(WORKERS)]
        self.observer = Worker(self.home).storage
        self.failures = 0
        self.last = self.truth()
        self.stock = pybreaker.CircuitRedisStorage("closed", self.home.client, namespace="machine")

    def teardown(self) -> None:
        """Nobody reports any more."""
        for worker in [*getattr(self, "workers", []), *self.dead]:
            worker.die()
        self.home.close()
        self.reached.append(self.half_open)

    # What is true -------------------------------------------------------------------------------------------------

    def truth(self) -> Circuit:
        """The record, by the server's clock."""
        return self.observer._core.shared._send(self.observer._core.shared.selector.current, Load()).circuit

    def now_ms(self) -> float:
        """The server's clock."""
        return self.observer._core.shared._send(self.observer._core.shared.selector.current, Load()).now_ms

    @contextlib.contextmanager
    def step(self, *, may_close: bool = False, may_count: bool = False) -> Iterator[Circuit]:
        """One step, and what holds of every step."""
        before = self.last
        yield before
        after = self.last = self.truth()
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

    # Calls --------------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, WORKERS - 1))
    def begin(self, index: int) -> None:
        """A call asks to be let through."""
        worker = self.workers[index]
        if worker.block:
            return
        with self.step() as before:
            open_until = (before.opened_at_ms or 0) + self.home.reset_timeout * 1000
            asked_at = self.now_ms()
            entered = worker.begin()
            after = self.truth()
            if not entered:
                assert before.state != CLOSED
                assert after == before, "a rejected call changes nothing"
            elif before.state == CLOSED:
                assert after == before, "an admitted call changes nothing"
                assert worker.admitted == (after.generation, "")
            elif after.generation == before.generation:
                assert before.state == HALF_OPEN, "only a probe goes on without a claim"
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
            # Who heard late that it has opened opens the gate as much later: server and worker have one clock here.
            late_ms = -worker.storage._core.shared._view.clock_offset.ms
            if before.state == OPEN and asked_at >= open_until + late_ms + self.home.blur_ms:
                assert entered, "once the timeout has passed, the first who asks is let through"

    @rule(index=st.integers(0, WORKERS - 1))
    def succeed(self, index: int) -> None:
        """A call in flight succeeds."""
        worker = self.workers[index]
        if not worker.block:
            return
        with self.step(may_count=True) as before:
            counts = worker.admitted == (before.generation, before.probe_token)
            assert worker.end(None) is None
            after = self.truth()
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
        """A call in flight fails."""
        worker = self.workers[index]
        if not worker.block:
            return
        with self.step() as before:
            counts = worker.admitted == (before.generation, before.probe_token)
            error = Down()
            answer = worker.end(error)
            after = self.truth()
            if not counts:
                assert answer is error, "the user's own exception surfaces"
                assert after == before, "a late failure changes nothing"
                return
            self.failures = before.fail_counter + 1
            if before.state == HALF_OPEN or self.failures >= FAIL_MAX:
                assert isinstance(answer, pybreaker.CircuitBreakerError)
                assert (after.state, after.generation) == (OPEN, before.generation + 1)
            else:
                assert answer is error
                assert (after.state, after.generation) == (CLOSED, before.generation)

    @rule(index=st.integers(0, WORKERS - 1))
    def crash(self, index: int) -> None:
        """A process dies, with or without a call in flight, and is replaced."""
        with self.step() as before:
            self.dead.append(self.workers[index])
            self.workers[index].die()
            self.workers[index] = Worker(self.home)
            assert self.truth() == before

    @rule(index=st.integers(0, WORKERS - 1))
    def look(self, index: int) -> None:
        """A health check reads everything."""
        with self.step() as before:
            breaker = self.workers[index].breaker
            _ = breaker.state.name, breaker.current_state, breaker.fail_counter, breaker.success_counter
            _ = self.workers[index].storage.opened_at
            assert self.truth() == before, "noticing changes nothing"

    # Time ---------------------------------------------------------------------------------------------------------

    @rule(part=st.sampled_from([0.3, 1.0]))
    def wait(self, part: float) -> None:
        """Some of the timeout passes."""
        with self.step():
            self.home.advance(self.home.reset_timeout * part)

    @rule(index=st.integers(0, WORKERS - 1))
    def go_on(self, index: int) -> None:
        """Steering: the next thing that makes the circuit move.

        Chosen here and not by preconditions: on a real server, time passes also while Hypothesis thinks.
        """
        if self.last.state == CLOSED:
            for _ in range(FAIL_MAX):
                self.begin(index)
                self.fail(index)
            return
        ends_ms = self.last.probe_until_ms
        if self.last.state == OPEN:
            ends_ms = (self.last.opened_at_ms or 0) + self.home.reset_timeout * 1000
        with self.step():
            self.home.advance(max(0.0, (ends_ms - self.now_ms()) / 1000) + 0.002)
        self.begin(index)

    @rule(index=st.integers(0, WORKERS - 1), other=st.integers(0, WORKERS - 1))
    def go_through_an_outage(self, index: int, other: int) -> None:
        """Steering: a trip and a probe, of which nobody knows yet how they end."""
        self.go_on(index)
        self.go_on(other)

    # Others -------------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, WORKERS - 1), order=st.sampled_from(["open", "half_open", "close"]))
    def operate(self, index: int, order: str) -> None:
        """An operator opens, half-opens or closes."""
        with self.step(may_close=order == "close") as before:
            getattr(self.workers[index].breaker, order)()
            after = self.truth()
            assert after.state == {"open": OPEN, "half_open": HALF_OPEN, "close": CLOSED}[order]
            assert after.success_counter == 0
            if order == "close":
                self.failures = 0
            else:
                assert after.fail_counter == before.fail_counter

    @rule(what=st.sampled_from(["count", "open", "close"]))
    def write_with_stock(self, what: str) -> None:
        """A stock worker counts, trips or closes, as it would."""
        with self.step(may_close=what == "close") as before:
            if what == "count":
                self.stock.increment_counter()
                self.failures += 1
            elif what == "open":
                self.stock.opened_at = datetime.fromtimestamp(self.now_ms() / 1000, timezone.utc)
                self.stock.reset_success_counter()
                self.stock.state = OPEN
            else:
                self.stock.reset_success_counter()
                self.stock.reset_counter()
                self.stock.state = CLOSED
                self.failures = 0
            after = self.truth()
            if what != "count":
                assert after.state == {"open": OPEN, "close": CLOSED}[what]
                assert after.generation == before.generation + (before.state != after.state) or what == "open"

    @rule(
        names=st.sets(
            st.sampled_from(["state", "fail_counter", "success_counter", "opened_at", "circuit"]), min_size=1
        ),
        index=st.integers(0, WORKERS - 1),
    )
    def lose_keys(self, names: set[str], index: int) -> None:
        """Keys vanish; some process that knew the circuit comes by before or after the observer."""
        with self.step(may_close=True) as before:
            self.home.client.delete(*(f"machine:pybreaker:{name}" for name in names))
            if "fail_counter" in names:
                self.failures = 0
            known = self.workers[index].storage._core.shared._view.cached
            if known is not None and known.generation == before.generation:
                _ = self.workers[index].storage.state
            after = self.truth()
            assert after.state == before.state, "what a process knows does not get lost"
            assert after.generation >= before.generation

    @precondition(lambda self: self.home.scripts)
    @rule()
    def flush_scripts(self) -> None:
        """The server forgets the scripts."""
        with self.step() as before:
            self.home.client.script_flush()
            assert self.truth() == before


def run(home: Any, examples: int) -> float:
    """Run the machine; the share of histories that reached half-open."""
    reached: list[bool] = []
    run_state_machine_as_test(
        lambda: Machine(home(), reached),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return sum(reached) / len(reached)


def test_invariants_hold_on_a_clock_that_moves_when_told(report):
    """The invariants hold over random histories, of which most reach half-open."""
    share = run(FakeHome, 150)
    report(f"machine, fakeredis: {share:.0%} of the histories reached half-open")
    assert share > 0.4


@pytest.mark.slow
def test_invariants_hold_on_a_real_server(client, report):
    """The same against the scripts of a real server, in real time."""
    share = run(lambda: RealHome(client), 40)
    report(f"machine, real server: {share:.0%} of the histories reached half-open")
    assert share > 0.4
