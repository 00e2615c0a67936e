"""`pybreaker_redis.CircuitBreaker`: admission and settlement of calls, in memory and on a server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect as python_inspect
import itertools
import logging
import pickle
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import greenlet
import pybreaker
import pytest
import redis
from pybreaker import CircuitBreakerError, CircuitBreakerListener
from tornado import gen

from pybreaker_redis import CircuitMemoryStorage, CircuitRedisStorage, retry_after
from pybreaker_redis._model.intents import ClaimProbe, Load
from pybreaker_redis._redis.connections.deadline import DeadlineSocket
from pybreaker_redis._runtime import fork
from pybreaker_redis.breaker import CircuitBreaker, Permit
from pybreaker_redis.breaker.offload import REQUESTS, run_request
from pybreaker_redis.errors import CircuitOpenError
from tests.support.breakers import Down, down, settled, up
from tests.support.inspect import core_of, reset_in_child, storage_of
from tests.support.logs import messages_of
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("patient")

Make = Callable[..., CircuitBreaker]


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Make:
    """Return a factory of breakers, which share one circuit."""
    if request.param == "redis":
        client = request.getfixturevalue("client")
        return lambda **settings: CircuitBreaker(
            state_storage=CircuitRedisStorage("closed", client, "guarded"), **{"name": "guarded", **settings}
        )
    storage = CircuitMemoryStorage("closed")
    return lambda **settings: CircuitBreaker(state_storage=storage, **{"name": "guarded", **settings})


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    """Make calls that fail."""
    for _ in range(times):
        with pytest.raises((Down, CircuitOpenError)):
            breaker.call(down)


def make_due(breaker: CircuitBreaker) -> None:
    """Make the next call of an open circuit a probe."""
    breaker.reset_timeout = 0


class Recorder(CircuitBreakerListener):
    """Listener that records what it is notified of."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        """Record a call."""
        self.events.append("before_call")

    def success(self, cb: Any) -> None:
        """Record a success."""
        self.events.append("success")

    def failure(self, cb: Any, exc: BaseException) -> None:
        """Record a failure."""
        self.events.append("failure")

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Record a change of state."""
        self.events.append((old_state.name, new_state.name))

    def rejected(self, cb: Any, error: CircuitOpenError) -> None:
        """Record a rejection."""
        self.events.append("rejected")

    def transition(self, cb: Any, event: Any) -> None:
        """Record a transition."""
        self.events.append(event)

    def transitions(self) -> list[tuple[str, str, bool]]:
        """Return states before and after each transition, and whether it was noticed only."""
        return [(event.old, event.new, event.noticed) for event in self.events if hasattr(event, "noticed")]


class TestCalls:
    """Calls, trips, rejections and recoveries."""

    def test_circuit_opens_rejects_probes_and_closes(self, make: Make) -> None:
        """The whole life of a circuit."""
        breaker = make(fail_max=3)
        assert breaker.call(up) == "answer"
        fail(breaker, 2)
        assert (breaker.current_state, breaker.fail_counter) == ("closed", 2)
        fail(breaker)
        assert breaker.current_state == "open"
        with pytest.raises(CircuitOpenError):
            breaker.call(up)
        make_due(breaker)
        assert breaker.call(up) == "answer"
        assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
        assert isinstance(breaker, pybreaker.CircuitBreaker)

    def test_failed_probe_opens_the_circuit(self, make: Make) -> None:
        """One failure is enough, whatever the threshold."""
        breaker = make(fail_max=3)
        breaker.open()
        make_due(breaker)
        fail(breaker)
        assert breaker.current_state == "open"

    def test_success_resets_the_failures(self, make: Make) -> None:
        """Only consecutive failures count."""
        breaker = make(fail_max=3)
        for _ in range(4):
            fail(breaker, 2)
            breaker.call(up)
        assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)

    def test_excluded_and_not_included_errors_are_successes(self, make: Make) -> None:
        """`include` narrows what counts, and `exclude` narrows it further."""
        breaker = make(fail_max=1, include=[OSError, lambda error: "count" in str(error)], exclude=[TimeoutError])
        for error in (ValueError("no"), TimeoutError()):
            with pytest.raises(type(error)):
                breaker.call(raising(error))
        assert breaker.current_state == "closed"
        with pytest.raises(CircuitOpenError):
            breaker.call(raising(ValueError("count")))
        assert breaker.current_state == "open"

    def test_method_of_a_state_object_does_not_bypass_the_admission(self, make: Make) -> None:
        """Pybreaker's documentation calls `breaker.state.call`, too."""
        breaker = make(fail_max=1)
        with pytest.raises(CircuitOpenError):
            breaker.state.call(down)
        with pytest.raises(CircuitOpenError):
            breaker.state.call(up)

    def test_commands_by_hand(self, make: Make) -> None:
        """`open`, `half_open` and `close` act for all breakers of the circuit."""
        breaker, other = make(), make()
        assert breaker.open() is True
        wait_for(lambda: other.current_state == "open", "the notice")
        breaker.half_open()
        wait_for(lambda: other.current_state == "half-open", "the notice")
        breaker.close()
        wait_for(lambda: other.current_state == "closed", "the notice")
        assert make(throw_new_error_on_trip=False).open() is False

    def test_call_within_a_probe_is_part_of_the_probe(self, make: Make) -> None:
        """A guarded function may call another function that the same breaker guards."""
        breaker = make(success_threshold=2)
        breaker.open()
        make_due(breaker)
        assert breaker.call(lambda: breaker.call(up)) == "answer"
        assert breaker.success_counter == 1

    def test_no_frame_is_inspected(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """The breaker says what it means, so nothing has to be inferred."""
        breaker = make(fail_max=1, success_threshold=1)
        breaker.call(up)

        def refuse(depth: int = 0) -> Any:
            raise AssertionError(depth)

        with monkeypatch.context() as patched:
            patched.setattr(sys, "_getframe", refuse)
            breaker.call(up)
            with contextlib.suppress(CircuitOpenError):
                breaker.call(down)
            with contextlib.suppress(CircuitOpenError):
                breaker.call(up)
            make_due(breaker)
            breaker.call(up)
            assert breaker.current_state == "closed"

    def test_fallback_takes_the_place_of_a_rejection(self, make: Make) -> None:
        """The fallback gets the arguments of the call."""
        breaker = make(fail_max=1, fallback=lambda *args, **kwargs: (args, kwargs))
        with pytest.raises(CircuitOpenError):
            breaker.call(raising(Down()))
        assert breaker.call(str, 1, base=2) == ((1,), {"base": 2})
        assert asyncio.run(breaker.acall(str, 1)) == ((1,), {})

    def test_clock_moves_a_circuit_in_memory(self) -> None:
        """Tests need not wait for the reset timeout."""
        now = [1_000_000.0]
        breaker = CircuitBreaker(fail_max=1, reset_timeout=60, clock=lambda: now[0])
        fail(breaker)
        now[0] += 59.9
        with pytest.raises(CircuitOpenError):
            breaker.call(up)
        now[0] += 0.2
        assert breaker.call(up) == "answer"

    def test_redis_is_enough_to_share_a_circuit(self, client: redis.Redis) -> None:
        """The name of the breaker is the namespace."""
        breaker = CircuitBreaker(fail_max=1, name="payments", redis=lambda: client)
        fail(breaker)
        assert client.get("payments:pybreaker:state") == b"open"

    @pytest.mark.parametrize("name", ["fail_max", "reset_timeout", "success_threshold"])
    def test_rule_of_a_living_breaker_is_checked(self, make: Make, name: str) -> None:
        """As the argument of the constructor is."""
        breaker = make()
        before = getattr(breaker, name)
        for value, error in (("5", TypeError), (-1, ValueError)):
            with pytest.raises(error, match=name):
                setattr(breaker, name, value)
        assert getattr(breaker, name) == before
        setattr(breaker, name, 7)
        assert getattr(breaker, name) == 7

    def test_new_timeout_holds_at_once(self, make: Make) -> None:
        """The timeout may be changed while the circuit is open and rejects calls without a request."""
        breaker = make(fail_max=1, reset_timeout=60)
        fail(breaker)
        for _ in range(3):
            with pytest.raises(CircuitOpenError) as caught:
                breaker.call(up)
        assert 59 < caught.value.retry_after <= 60
        breaker.reset_timeout = 3600
        with pytest.raises(CircuitOpenError) as caught:
            breaker.call(up)
        assert caught.value.retry_after > 3590


def raising(error: BaseException) -> Callable[[], None]:
    """Return a function that raises an error."""

    def function() -> None:
        raise error

    return function


class TestErrors:
    """`CircuitOpenError`."""

    def test_rejection_describes_the_circuit(self, make: Make) -> None:
        """An operator sees the circuit, the time and the cause in the log of the application."""
        breaker = make(fail_max=1, reset_timeout=30)
        with pytest.raises(CircuitOpenError) as tripped:
            breaker.call(raising(OSError("no route")))
        assert isinstance(tripped.value.__cause__, OSError)
        for _ in range(3):
            with pytest.raises(CircuitOpenError, match=r"'guarded', next attempt in (29|30)\.") as caught:
                breaker.call(up)
            error = caught.value
            assert isinstance(error, CircuitBreakerError)
            assert (error.circuit, error.state, error.cause) == ("guarded", "open", "OSError: no route")
            assert 29 < error.retry_after <= 30
            assert error.opened_at is not None
            assert error.opened_at.tzinfo is not None
        assert 29 < retry_after(error) <= 30

    def test_error_survives_a_pickle(self, make: Make) -> None:
        """Celery and multiprocessing carry errors to other processes."""
        breaker = make(fail_max=1, reset_timeout=30)
        fail(breaker)
        with pytest.raises(CircuitOpenError) as caught:
            breaker.call(up)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), vars(copy)) == (str(caught.value), vars(caught.value))
        assert 29 < retry_after(copy) <= 30
        plain = CircuitOpenError(*caught.value.args)
        assert (plain.circuit, plain.retry_after, plain.cause) == ("", 0.0, "")

    def test_call_that_trips_may_keep_its_own_error(self, make: Make) -> None:
        """As pybreaker's setting says."""
        breaker = make(fail_max=1, throw_new_error_on_trip=False)
        with pytest.raises(Down):
            breaker.call(down)
        assert breaker.current_state == "open"

    @pytest.mark.parametrize(
        ("words", "error", "text"),
        [
            ({"fail_max": 0}, ValueError, "fail_max must be at least 1, not 0"),
            ({"fail_max": "5"}, TypeError, "fail_max must be a whole number, not '5'"),
            ({"reset_timeout": -1}, ValueError, "reset_timeout must lie between 0 and"),
            ({"reset_timeout": None}, TypeError, "reset_timeout must be a number of seconds"),
            ({"success_threshold": True}, TypeError, "success_threshold must be a whole number"),
            ({"fallback": 3}, TypeError, "fallback must be callable or None, not 3"),
            ({"clock": 3}, TypeError, "clock must be callable or None, not 3"),
            ({"redis": redis.Redis()}, TypeError, "a breaker with redis must have a name"),
            (
                {"redis": redis.Redis(), "state_storage": CircuitMemoryStorage("closed")},
                TypeError,
                "exclude each",
            ),
            ({"clock": float, "redis": redis.Redis(), "name": "x"}, TypeError, "clock is for a circuit"),
        ],
    )
    def test_bad_argument_is_named_at_once(self, words: dict[str, Any], error: type[Exception], text: str) -> None:
        """The error names the argument, the value and what is accepted."""
        with pytest.raises(error, match=text):
            CircuitBreaker(**words)


class TestPermits:
    """Admission and settlement by hand."""

    def test_permit_is_settled_once(self, make: Make) -> None:
        """A second report would count twice."""
        permit = make().admit()
        permit.succeed()
        assert permit.is_settled
        for settle in (permit.succeed, permit.release, lambda: permit.fail(Down())):
            with pytest.raises(RuntimeError, match="settled before"):
                settle()

    def test_block_settles_the_permit_and_may_fail_it_by_hand(self, make: Make) -> None:
        """An answer may be a failure without an exception."""
        breaker = make(fail_max=2)
        with breaker.admit() as permit:
            permit.fail(OSError("503"))
        assert breaker.fail_counter == 1
        with pytest.raises(Down), breaker.admit():
            raise Down
        assert breaker.current_state == "open"

    def test_late_outcome_changes_nothing(self, make: Make) -> None:
        """The circuit has closed again since the call was admitted."""
        breaker = make(fail_max=1)
        permit = breaker.admit()
        breaker.open()
        breaker.close()
        permit.fail(Down())
        assert breaker.current_state == "closed"
        assert permit.generation == 0

    def test_probe_may_end_on_another_thread(self, make: Make) -> None:
        """The admission belongs to the call."""
        breaker = make()
        breaker.open()
        make_due(breaker)
        permit = breaker.admit()
        assert permit.is_probe
        with ThreadPoolExecutor(1) as other:
            other.submit(permit.succeed).result()
        assert breaker.current_state == "closed"

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
    def test_interruption_counts_nothing_and_returns_the_probe(
        self, make: Make, interruption: type[BaseException]
    ) -> None:
        """The dependency had no chance to show whether it works."""
        breaker, other = make(fail_max=1), make(reset_timeout=0)
        with pytest.raises(interruption):
            breaker.call(raising(interruption()))
        assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
        breaker.open()
        make_due(breaker)
        with pytest.raises(interruption):
            breaker.call(raising(interruption()))
        assert breaker.current_state == "half-open"
        wait_for(lambda: other.current_state == "half-open", "the notice")
        assert other.call(up) == "answer"
        assert breaker.current_state == "closed"

    def test_garbage_of_a_probe_is_offered_again(self, make: Make) -> None:
        """A generator that was never started holds a permit for ever, but for this."""
        breaker = make()
        breaker.open()
        make_due(breaker)
        permit: Permit | None = breaker.admit()
        with ThreadPoolExecutor(1) as other, pytest.raises(CircuitOpenError, match="Another caller is testing"):
            other.submit(make(reset_timeout=0).call, up).result()
        del permit
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"

    def test_call_within_a_probe_ends_no_probe(self, make: Make) -> None:
        """The outer call settles the probe.  Until then no other call may probe."""
        breaker = make(success_threshold=2)
        breaker.open()
        make_due(breaker)

        def outer() -> str:
            assert breaker.call(up) == "answer"
            with ThreadPoolExecutor(1) as other, pytest.raises(CircuitOpenError):
                other.submit(breaker.call, up).result()
            breaker.admit().release()
            return up()

        assert breaker.call(outer) == "answer"
        assert (breaker.current_state, breaker.success_counter) == ("half-open", 1)
        assert breaker.call(outer) == "answer"
        assert breaker.current_state == "closed"

    def test_failure_within_a_probe_ends_the_probe(self, make: Make) -> None:
        """The dependency has failed, whatever the outer call makes of that."""
        breaker = make()
        breaker.open()
        make_due(breaker)

        def outer() -> None:
            with contextlib.suppress(Down, CircuitOpenError):
                breaker.call(down)

        breaker.call(outer)
        breaker.reset_timeout = 60
        assert breaker.current_state == "open"

    @pytest.mark.parametrize("kind", ["exclude", "include"])
    def test_function_of_exclude_that_fails_returns_the_probe(self, make: Make, kind: str) -> None:
        """The outcome is unknown, so nothing is counted."""

        def broken(error: BaseException) -> bool:
            raise ZeroDivisionError

        breaker = make(**{kind: [broken]})
        breaker.open()
        make_due(breaker)
        with pytest.raises(ZeroDivisionError):
            breaker.call(down)
        assert breaker.current_state == "half-open"
        with ThreadPoolExecutor(1) as other:
            assert other.submit(breaker.call, up).result() == "answer"
        assert breaker.current_state == "closed"

    def test_listener_that_is_interrupted_by_a_claim_returns_the_probe(self, make: Make) -> None:
        """An interruption may arrive in any line, also in a listener."""

        class Interrupted(CircuitBreakerListener):
            def state_change(self, cb: Any, old: Any, new: Any) -> None:
                if new.name == "half-open":
                    raise KeyboardInterrupt

        breaker = make(listeners=[Interrupted()])
        breaker.open()
        make_due(breaker)
        with pytest.raises(KeyboardInterrupt):
            breaker.call(up)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(breaker.call, up).result() == "answer"

    def test_listener_that_is_interrupted_before_a_probe_returns_the_probe(self, make: Make) -> None:
        """The call was admitted, and its function did not run."""

        class Interrupted(CircuitBreakerListener):
            def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

        breaker = make(listeners=[Interrupted()])

        async def items() -> AsyncIterator[int]:
            yield 1

        async def collect() -> list[int]:
            return [item async for item in breaker(items)()]

        def block() -> None:
            with breaker.calling():
                pass

        async def async_block() -> None:
            async with breaker.calling():
                pass

        calls: list[Callable[[], Any]] = [
            lambda: breaker.call(up),
            lambda: asyncio.run(breaker.acall(answer_later)),
            lambda: asyncio.run(collect()),
            block,
            lambda: asyncio.run(async_block()),
        ]
        for call in calls:
            breaker.open()
            make_due(breaker)
            with pytest.raises(KeyboardInterrupt) as kept:
                call()
            # The error keeps the permit alive, so the garbage collector does not release the probe.
            wait_for(lambda: not probe_token(breaker), "the return of the probe")
            del kept

    def test_interruption_of_a_claim_is_raised(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """A signal may arrive while the call waits for Redis."""
        breaker = make()
        breaker.open()
        make_due(breaker)
        core: Any = core_of(breaker)
        carry_out = core.carry_out

        def interrupted(intent: Any, budget: Any = None) -> Any:
            if isinstance(intent, ClaimProbe):
                raise KeyboardInterrupt
            return carry_out(intent, budget)

        monkeypatch.setattr(core, "carry_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            breaker.call(up)
        monkeypatch.undo()
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"

    def test_interruption_of_a_listener_ends_a_rejected_call(self, make: Make) -> None:
        """There is no probe to give back."""

        class Interrupted(CircuitBreakerListener):
            def state_change(self, cb: Any, old: Any, new: Any) -> None:
                raise KeyboardInterrupt

        breaker = make(listeners=[Interrupted()])
        make(reset_timeout=60).open()
        wait_for(lambda: breaker.current_state == "open", "the notice")
        with pytest.raises(KeyboardInterrupt):
            breaker.call(up)
        with pytest.raises(CircuitOpenError):
            breaker.call(up)

    def test_greenlet_that_is_killed_counts_nothing(self, make: Make) -> None:
        """Gevent raises `GreenletExit` in greenlets that it kills."""
        breaker = make(fail_max=1)

        def killed() -> None:
            raise greenlet.GreenletExit

        with pytest.raises(greenlet.GreenletExit):
            breaker.call(killed)
        assert breaker.fail_counter == 0

    def test_other_exceptions_that_are_no_errors_count(self, make: Make) -> None:
        """`gevent.Timeout` derives from `BaseException`, and is a time limit."""

        class Timeout(BaseException):
            """Time limit of a greenlet."""

        def late() -> None:
            raise Timeout

        breaker = make(fail_max=2)
        with pytest.raises(Timeout):
            breaker.call(late)
        assert breaker.fail_counter == 1

    def test_copy_of_a_permit_in_a_child_releases_no_probe(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """The parent goes on with the probe."""
        breaker = make()
        breaker.open()
        make_due(breaker)
        permit = breaker.admit()
        monkeypatch.setattr(fork, "process_id", -1)
        permit.__del__()
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as other, pytest.raises(CircuitOpenError):
            other.submit(breaker.call, up).result()
        permit.succeed()
        assert breaker.current_state == "closed"

    def test_permit_shows_what_it_is(self, make: Make) -> None:
        """For a debugger, and for logs."""
        breaker = make(fail_max=1)
        permit = breaker.admit()
        assert repr(permit) == "<Permit of 'guarded', generation 0, unsettled>"
        with pytest.raises(Down), permit:
            down()
        assert repr(permit) == "<Permit of 'guarded', generation 0, settled>"
        assert breaker.current_state == "open"
        make_due(breaker)
        assert repr(breaker.admit()).endswith("generation 2, a probe>")

    def test_claim_of_a_slower_caller_is_refused(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the look at the circuit and the claim another caller may have claimed the probe."""
        first, second = make(reset_timeout=0), make(reset_timeout=0)
        first.open()
        core: Any = core_of(second)
        before = core.carry_out(Load())
        with first.admit():
            monkeypatch.setattr(core, "read_without_request", lambda: before)
            with ThreadPoolExecutor(1) as other, pytest.raises(CircuitOpenError, match="Another caller is testing"):
                other.submit(second.admit).result()
        monkeypatch.undo()
        assert second.current_state == "closed"


class TestThreads:
    """Threads that share a breaker."""

    def test_threads_run_in_parallel(self, make: Make) -> None:
        """All calls are under way at the same time, or the barrier breaks."""
        breaker, barrier = make(), threading.Barrier(16)
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(breaker.call, barrier.wait, 20) for _ in range(16)]
            assert sorted(call.result() for call in calls) == list(range(16))

    def test_one_probe_of_many_threads_and_breakers(self, make: Make) -> None:
        """The other calls are rejected while one probes."""
        breakers = [make(reset_timeout=0) for _ in range(4)]
        breakers[0].open()
        for breaker in breakers:
            wait_for(lambda: breaker.current_state == "open", "the notice")  # noqa: B023
        begun, ends = [], threading.Event()

        def probe() -> None:
            begun.append(1)
            assert ends.wait(20)

        def attempt(number: int) -> bool:
            try:
                breakers[number % 4].call(probe)
            except CircuitOpenError:
                return False
            return True

        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(attempt, number) for number in range(16)]
            wait_for(lambda: sum(call.done() for call in calls) == 15, "15 rejections")
            ends.set()
            assert sum(call.result() for call in calls) == len(begun) == 1
        assert breakers[0].current_state == "closed"

    def test_counted_probes_of_different_threads_close_the_circuit(self, make: Make) -> None:
        """A probe below the threshold is returned to the fleet."""
        breakers = [make(success_threshold=3, reset_timeout=0) for _ in range(3)]
        breakers[0].open()
        for breaker in breakers:
            wait_for(lambda: breaker.current_state != "closed", "the notice")  # noqa: B023
            with ThreadPoolExecutor(1) as other:
                assert other.submit(breaker.call, up).result() == "answer"
        assert breakers[2].current_state == "closed"

    def test_unmodified_breaker_and_ours_share_one_probe(self, make: Make) -> None:
        """Both ways in have the same circuit."""
        ours = make(reset_timeout=0, success_threshold=2)
        theirs = pybreaker.CircuitBreaker(
            reset_timeout=0, success_threshold=2, state_storage=storage_of(make()), name="theirs"
        )
        ours.open()
        wait_for(lambda: theirs.current_state == "open", "the notice")
        permit = ours.admit()
        with pytest.raises(CircuitBreakerError), ThreadPoolExecutor(1) as other:
            other.submit(theirs.call, up).result()
        permit.succeed()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(theirs.call, up).result() == "answer"
        wait_for(lambda: ours.current_state == "closed", "the notice")


class TestListeners:
    """pybreaker's listener methods, rejections and transitions."""

    def test_listener_is_notified_of_everything(self, make: Make) -> None:
        """In pybreaker's order."""
        listener = Recorder()
        breaker = make(fail_max=2, listeners=[listener])
        breaker.call(up)
        breaker.call(up)
        assert listener.events == ["before_call", "success"] * 2
        listener.events.clear()
        fail(breaker, 2)
        with pytest.raises(CircuitOpenError):
            breaker.call(up)
        *before, event, rejected = listener.events
        assert before == ["before_call", "failure", "before_call", "failure", ("closed", "open")]
        assert (event.old, event.new, event.noticed, event.cause) == ("closed", "open", False, "Down")
        assert rejected == "rejected"

    def test_one_author_and_others_notice(self, make: Make) -> None:
        """Exactly one breaker is the author, and the others are notified in their next call."""
        author, others = Recorder(), [Recorder() for _ in range(3)]
        breakers = [make(fail_max=1, listeners=[other]) for other in others]
        for breaker in breakers:
            breaker.call(up)
        fail(make(fail_max=1, listeners=[author]))
        assert author.transitions() == [("closed", "open", False)]
        for breaker, other in zip(breakers, others, strict=True):
            wait_for(lambda: breaker.current_state == "open", "the notice")  # noqa: B023
            assert other.transitions() == []
            with pytest.raises(CircuitOpenError):
                breaker.call(up)
            assert other.transitions() == [("closed", "open", True)]

    def test_listener_of_a_failure_does_not_notice_the_trip_that_follows(self, make: Make) -> None:
        """The breaker that tripped is the author, also if a listener or another thread looks at the circuit first."""

        class Looking(Recorder):
            def failure(self, cb: Any, exc: BaseException) -> None:
                assert cb.state.name == "closed"
                with ThreadPoolExecutor(1) as other:
                    other.submit(lambda: cb.state).result()

        recorder = Looking()
        breaker = make(fail_max=1, listeners=[recorder])
        fail(breaker)
        assert recorder.transitions() == [("closed", "open", False)]

    def test_trip_of_many_threads_has_one_author(self, make: Make) -> None:
        """Threads that fail and look at the same time agree on the author."""
        recorder = Recorder()
        breaker = make(fail_max=4, reset_timeout=60, listeners=[recorder])
        rounds = 30
        together = threading.Barrier(4)

        def work() -> None:
            for _ in range(rounds):
                if together.wait(20) == 0:
                    breaker.close()
                together.wait(20)
                for _ in range(3):
                    with contextlib.suppress(Down, CircuitOpenError):
                        breaker.call(down)
                    _ = breaker.state

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(work) for _ in range(4)]:
                done.result(60)
        trips = [event for event in recorder.transitions() if event[1] == "open"]
        assert trips == [("closed", "open", False)] * rounds

    def test_error_that_cannot_be_shown_has_a_class(self, make: Make) -> None:
        """An application's error may fail in its own `__str__`."""

        class Mute(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        def mute() -> None:
            raise Mute

        breaker = make(fail_max=1)
        with pytest.raises(CircuitOpenError):
            breaker.call(mute)
        with pytest.raises(CircuitOpenError) as rejected:
            breaker.call(up)
        assert rejected.value.cause == "Mute"

    def test_listener_that_raises_is_logged_and_changes_nothing(
        self, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A broken metric must not become an error of the application."""

        class Broken(CircuitBreakerListener):
            def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
                raise ValueError

            failure = success = state_change = rejected = transition = before_call  # type: ignore[assignment]

        breaker = make(fail_max=1, name="broken", listeners=[Broken()])
        with caplog.at_level(logging.ERROR):
            assert breaker.call(up) == "answer"
            assert breaker.call(up) == "answer"
            fail(breaker, 4)
        assert breaker.current_state == "open"
        lines = messages_of(caplog, "circuit 'broken'", level=logging.ERROR)
        failed_in = [line.partition("failed in ")[2].partition(" ")[0] for line in lines]
        # The second call has added no line.
        assert sorted(failed_in) == ["before_call", "failure", "rejected", "state_change", "success", "transition"]


class TestDecorators:
    """Functions of all kinds, and blocks."""

    def test_guarded_function_stays_of_its_kind(self, make: Make) -> None:
        """Frameworks look at the kind of a function."""
        breaker = make()

        @breaker
        def plain() -> int:
            return 1

        @breaker()
        async def coroutine() -> int:
            return 2

        @breaker
        async def items() -> AsyncIterator[int]:
            for number in range(3):
                yield number

        async def collect() -> list[int]:
            return [item async for item in items()]

        assert plain() == 1
        assert python_inspect.iscoroutinefunction(coroutine)
        assert python_inspect.isasyncgenfunction(items)
        assert asyncio.run(coroutine()) == 2
        assert asyncio.run(collect()) == [0, 1, 2]

    def test_generator_is_settled_when_it_ends(self, make: Make) -> None:
        """Also on another thread."""
        breaker = make(fail_max=1)

        @breaker
        def numbers(stop: int) -> Iterator[int]:
            yield from range(stop)
            raise Down

        running = numbers(2)
        assert next(running) == 0
        assert breaker.fail_counter == 0
        with ThreadPoolExecutor(1) as other, pytest.raises(CircuitOpenError):
            other.submit(list, running).result()
        assert breaker.current_state == "open"

    def test_async_generator_that_fails_is_a_failure(self, make: Make) -> None:
        """And one that is closed early counts nothing."""
        breaker = make(fail_max=1)

        @breaker
        async def items(stop: int) -> AsyncIterator[int]:
            for number in range(stop):
                yield number
            raise Down

        async def first() -> int:
            guarded = items(2)
            async for item in guarded:
                await guarded.aclose()
                return item
            return -1

        async def collect() -> list[int]:
            return [item async for item in items(2)]

        assert asyncio.run(first()) == 0
        assert breaker.current_state == "closed"
        with pytest.raises(CircuitOpenError):
            asyncio.run(collect())
        assert breaker.current_state == "open"

    def test_asynchronous_generator_gets_what_is_sent_and_thrown(self, make: Make) -> None:
        """The guard hands everything on, as `yield from` does for a generator."""
        breaker = make(fail_max=9)

        @functools.partial(breaker)
        async def echo() -> Any:
            received: Any = "begin"
            while received != "end":
                try:
                    received = yield received
                except KeyError:
                    received = "caught"

        async def talk() -> list[Any]:
            running = echo()
            heard = [await running.asend(None), await running.asend(1), await running.athrow(KeyError())]
            with pytest.raises(Down):
                await running.athrow(Down())
            return heard

        assert asyncio.run(talk()) == ["begin", 1, "caught"]
        assert breaker.fail_counter == 1

    def test_generator_that_is_called_counts_when_it_ends(self, make: Make) -> None:
        """Also if the breaker needs no request for the call."""
        breaker = make(fail_max=9)
        fast_path = core_of(breaker).fast_path
        wait_for(lambda: breaker.call(up) and fast_path.quiet_admission, "the fast path")

        def numbers() -> Iterator[int]:
            yield 1
            down()

        running = breaker.call(numbers)
        assert next(running) == 1
        assert breaker.fail_counter == 0
        with pytest.raises(Down):
            next(running)
        assert breaker.fail_counter == 1
        assert list(breaker.call(lambda: iter([1, 2]))) == [1, 2]
        assert list(breaker.call(lambda: (number for number in range(2)))) == [0, 1]
        assert breaker.fail_counter == 0

    def test_partial_of_a_coroutine_function_is_asynchronous(self, make: Make) -> None:
        """`functools.partial` hides the kind of the function."""
        breaker = make(fail_max=9)
        guarded = breaker(functools.partial(asyncio.sleep, 0, "answer"))
        assert asyncio.run(guarded()) == "answer"

    def test_calling_is_a_decorator(self, make: Make) -> None:
        """As pybreaker's `calling` is, because it is a context manager of `contextlib`."""
        breaker = make(fail_max=2)
        guarded = breaker.calling()(down)
        with pytest.raises(Down):
            guarded()
        with pytest.raises(CircuitOpenError) as raised:
            guarded()
        assert isinstance(raised.value.__cause__, Down)

    def test_one_object_guards_one_block_at_a_time(self, make: Make) -> None:
        """The object knows one permit.  Later it may guard another block."""
        breaker = make(fail_max=9)
        calling = breaker.calling()
        with calling, pytest.raises(RuntimeError, match="for each block"), calling:
            pass
        with pytest.raises(Down), calling:
            down()
        assert breaker.fail_counter == 1
        assert calling.__name__ == "calling"

    def test_block_that_settles_its_permit_may_raise(self, make: Make) -> None:
        """The permit is settled once, and the error stays the block's."""
        breaker = make(fail_max=9)

        def settle_and_raise() -> None:
            with breaker.calling() as permit:
                permit.release()
                raise KeyError

        with pytest.raises(KeyError):
            settle_and_raise()

        async def block() -> None:
            async with breaker.calling() as permit:
                permit.succeed()
                raise KeyError

        with pytest.raises(KeyError):
            asyncio.run(block())
        assert breaker.fail_counter == 0

    def test_blocks(self, make: Make) -> None:
        """`with` and `async with`: the block may report a failure by hand."""
        breaker = make(fail_max=3)
        with breaker.calling():
            pass
        with pytest.raises(Down), breaker.calling():
            raise Down

        async def block() -> None:
            async with breaker.calling():
                pass
            with contextlib.suppress(Down):
                async with breaker.calling():
                    raise Down
            async with breaker.calling() as permit:
                permit.fail(Down())
            async with breaker.calling():
                raise Down

        with pytest.raises(CircuitOpenError):
            asyncio.run(block())
        assert breaker.current_state == "open"

    def test_asynchronous_function_is_refused_where_nothing_would_be_guarded(self, make: Make) -> None:
        """`call` returns before the work is done."""
        breaker = make(fail_max=1)

        async def answer() -> None:
            """Answer."""

        with pytest.raises(TypeError, match=r"call\(\) cannot guard the asynchronous function .*answer: use acall"):
            breaker.call(answer)
        assert breaker.current_state == "closed"
        with pytest.raises(TypeError, match="write @staticmethod above"):
            breaker(staticmethod(up))
        with pytest.raises(TypeError, match="must be callable"):
            breaker(3)


class TestTasks:
    """asyncio."""

    def test_tasks_count_and_are_rejected(self, make: Make) -> None:
        """As calls of threads do."""
        breaker = make(fail_max=3, reset_timeout=60)

        async def run() -> list[type[BaseException]]:
            kinds = []
            for _ in range(4):
                try:
                    await breaker.acall(fail_later)
                except Exception as error:  # noqa: BLE001
                    kinds.append(type(error))
            return kinds

        assert asyncio.run(run()) == [Down, Down, CircuitOpenError, CircuitOpenError]
        make_due(breaker)
        assert asyncio.run(breaker.acall(answer_later)) == "answer"
        assert breaker.current_state == "closed"

    def test_one_probe_of_many_tasks(self, make: Make) -> None:
        """Tasks of one thread are calls of their own."""
        breaker = make(reset_timeout=0)
        breaker.open()

        async def run() -> list[Any]:
            ends = asyncio.Event()
            tasks = [asyncio.create_task(breaker.acall(ends.wait)) for _ in range(20)]
            while sum(task.done() for task in tasks) < 19:
                await asyncio.sleep(0.001)
            ends.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        results = asyncio.run(asyncio.wait_for(run(), 20))
        assert results.count(True) == 1
        assert {type(result) for result in results} == {bool, CircuitOpenError}

    def test_cancelled_task_counts_nothing_and_returns_the_probe(self, make: Make) -> None:
        """A time limit around the call says nothing about the dependency."""
        breaker = make(fail_max=1)
        breaker.open()
        make_due(breaker)

        async def run() -> None:
            task = asyncio.create_task(breaker.acall(asyncio.Event().wait))
            while breaker.current_state != "half-open":
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(asyncio.wait_for(run(), 20))
        wait_for(lambda: not probe_token(breaker), "the return of the probe")
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"

    def test_probe_that_is_claimed_for_a_cancelled_task_is_returned(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The task was cancelled while its claim was under way."""
        breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitRedisStorage("closed", client, "guarded"))
        breaker.open()
        core: Any = core_of(breaker)
        begun, goes_on = hold_requests(core, monkeypatch)

        async def run() -> None:
            task = asyncio.create_task(breaker.acall(answer_later))
            await asyncio.get_running_loop().run_in_executor(None, begun.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        goes_on.set()
        wait_for(lambda: client.hget("guarded:pybreaker:circuit", "generation") == b"2", "the claim")
        wait_for(lambda: client.hget("guarded:pybreaker:circuit", "probe_token") == b"", "the return of the probe")

    def test_failure_counts_after_the_end_of_the_loop(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The report is under way when the task is cancelled and the loop ends."""
        breaker = CircuitBreaker(state_storage=CircuitRedisStorage("closed", client, "guarded"))
        settled(breaker)
        core: Any = core_of(breaker)
        begun, goes_on = hold_requests(core, monkeypatch)

        async def run() -> None:
            task = asyncio.create_task(breaker.acall(fail_later))
            await asyncio.get_running_loop().run_in_executor(None, begun.wait, 20)
            task.cancel()

        asyncio.run(run())
        goes_on.set()
        wait_for(lambda: client.get("guarded:pybreaker:fail_counter") == b"1", "the counted failure")

    def test_no_request_is_sent_by_the_thread_of_the_loop(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A socket would stop all tasks."""
        users = set()

        def noted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                users.add(threading.get_ident())
                return operation(*args)

            return run

        for name in ("sendall", "recv", "recv_into"):
            monkeypatch.setattr(DeadlineSocket, name, noted(getattr(DeadlineSocket, name)))
        breaker = CircuitBreaker(
            fail_max=2, reset_timeout=0, state_storage=CircuitRedisStorage("closed", client, "guarded")
        )

        async def run() -> None:
            for function in (answer_later, fail_later, fail_later, answer_later, answer_later):
                with contextlib.suppress(Down, CircuitOpenError):
                    await breaker.acall(function)

        asyncio.run(run())
        assert users
        assert threading.get_ident() not in users
        assert breaker.current_state == "closed"

    @pytest.mark.parametrize("max_staleness", [0, 1.0])
    def test_task_may_call_within_its_probe(self, client: redis.Redis, max_staleness: float) -> None:
        """The probe belongs to the task, though other threads send its requests."""
        storage = CircuitRedisStorage("closed", client, "guarded", max_staleness=max_staleness)
        breaker = CircuitBreaker(reset_timeout=0, state_storage=storage)
        breaker.open()

        async def outer() -> str:
            return await breaker.acall(answer_later)

        assert asyncio.run(breaker.acall(outer)) == "answer"
        assert breaker.current_state == "closed"

    def test_coroutine_that_is_closed_during_its_claim_returns_the_probe(self, client: redis.Redis) -> None:
        """A loop that stops closes the coroutines that wait."""
        breaker = CircuitBreaker(reset_timeout=0, state_storage=CircuitRedisStorage("closed", client, "guarded"))
        breaker.open()

        async def run() -> None:
            waiting = breaker.acall(answer_later)
            waiting.send(None)
            waiting.close()

        asyncio.run(run())
        wait_for(lambda: client.hget("guarded:pybreaker:circuit", "generation") == b"2", "the claim")
        wait_for(lambda: client.hget("guarded:pybreaker:circuit", "probe_token") == b"", "the return of the probe")

    def test_request_after_the_end_of_the_threads_is_sent_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At the end of the interpreter no thread can be started, and a loop may go on."""

        def refuse(*_: Any) -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        async def run(function: Callable[[], Any]) -> Any:
            return await run_request(function)

        assert asyncio.run(run(up)) == "answer"
        monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
        assert asyncio.run(run(up)) == "answer"
        with pytest.raises(Down):
            asyncio.run(run(down))

    def test_excluded_error_of_a_task_is_a_success(self, make: Make) -> None:
        """As that of a call is."""
        breaker = make(fail_max=2, exclude=[KeyError])

        async def missing() -> None:
            raise KeyError

        async def run() -> None:
            for function in (fail_later, missing, fail_later):
                with contextlib.suppress(Down, KeyError):
                    await breaker.acall(function)

        asyncio.run(run())
        assert breaker.fail_counter == 1

    @pytest.mark.parametrize("function", ["answer", "fail"])
    def test_task_may_be_cancelled_at_any_request(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        """The request under way ends on its thread, and the circuit stays usable."""
        core: Any
        breaker = CircuitBreaker(
            fail_max=9, reset_timeout=0, state_storage=CircuitRedisStorage("closed", client, "guarded", max_staleness=0)
        )
        core = core_of(breaker)
        carry_out = core.carry_out
        done: list[Any] = []
        for number in range(3):
            begun, goes_on, requests = threading.Event(), threading.Event(), itertools.count()

            def slow(intent: Any, budget: Any = None) -> Any:
                if next(requests) == number:  # noqa: B023
                    begun.set()  # noqa: B023
                    assert goes_on.wait(20)  # noqa: B023
                reply = carry_out(intent, budget)
                done.append(intent)
                return reply

            async def run() -> None:
                task = asyncio.create_task(breaker.acall(answer_later if function == "answer" else fail_later))
                waited = asyncio.get_running_loop().run_in_executor(None, begun.wait, 20)  # noqa: B023
                await asyncio.wait([task, waited], return_when=asyncio.FIRST_COMPLETED)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Down):
                    await task
                begun.set()  # noqa: B023

            monkeypatch.setattr(core, "carry_out", slow)
            asyncio.run(run())
            monkeypatch.undo()
            before = len(done)
            goes_on.set()
            wait_for(lambda: len(done) > before or number == 2, "the end of the request")  # noqa: B023
        assert breaker.call(up) == "answer"
        assert breaker.current_state == "closed"

    def test_child_of_a_fork_has_request_threads_of_its_own(self) -> None:
        """The threads of the pool exist in the parent only."""

        async def sender() -> threading.Thread:
            return await run_request(threading.current_thread)

        # The objects, because the id of a thread that has ended is used again.
        before = {asyncio.run(sender()) for _ in range(2)}
        reset_in_child(REQUESTS)
        assert asyncio.run(sender()) not in before

    def test_request_of_a_cancelled_task_may_raise(self) -> None:
        """There is no result to pass on, as when a signal has interrupted the request."""
        begun, goes_on, results = threading.Event(), threading.Event(), []

        def interrupted() -> int:
            begun.set()
            assert goes_on.wait(20)
            raise Down

        async def run() -> None:
            task = asyncio.create_task(run_request(interrupted, when_abandoned=results.append))
            await asyncio.get_running_loop().run_in_executor(None, begun.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        goes_on.set()
        assert asyncio.run(run_request(lambda: "answer")) == "answer"
        assert results == []

    def test_coroutines_of_tornado(self, make: Make) -> None:
        """`call_async` and the decorator's argument, as in pybreaker."""
        breaker = make(fail_max=1)

        @breaker(__pybreaker_call_async=True)
        @gen.coroutine
        def work(error: Exception | None) -> Any:
            yield gen.moment
            if error:
                raise error
            raise gen.Return("answer")

        async def run(error: Exception | None) -> Any:
            return await work(error)

        assert asyncio.run(run(None)) == "answer"
        with pytest.raises(CircuitOpenError):
            asyncio.run(run(Down()))
        assert breaker.current_state == "open"


def hold_requests(core: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Hold the requests of a circuit, and return the events at their begin and for their end."""
    begun, goes_on = threading.Event(), threading.Event()
    carry_out = core.carry_out

    def slow(intent: Any, budget: Any = None) -> Any:
        begun.set()
        assert goes_on.wait(20)
        return carry_out(intent, budget)

    monkeypatch.setattr(core, "carry_out", slow)
    return begun, goes_on


def probe_token(breaker: CircuitBreaker) -> str:
    """Return the token of the present probe."""
    core: Any = core_of(breaker)
    token: str = core.read_without_request().circuit.probe_token if core.read_without_request() else "?"
    return token


async def answer_later() -> str:
    """Answer after other tasks had their turn."""
    await asyncio.sleep(0)
    return up()


async def fail_later() -> None:
    """Fail after other tasks had their turn."""
    await asyncio.sleep(0)
    down()


class TestForeignStorage:
    """A storage of another package."""

    def test_coroutines_of_tornado_are_guarded_by_pybreaker(self) -> None:
        """The method is that of pybreaker."""
        breaker = CircuitBreaker(state_storage=pybreaker.CircuitMemoryStorage("closed"))

        @gen.coroutine
        def work() -> Any:
            yield gen.moment
            raise gen.Return("answer")

        async def run() -> Any:
            return await breaker.call_async(work)

        assert asyncio.run(run()) == "answer"

    def test_breaker_behaves_as_pybreaker_does(self) -> None:
        """The migration may begin with the class."""
        breaker = CircuitBreaker(fail_max=2, reset_timeout=60, state_storage=pybreaker.CircuitMemoryStorage("closed"))
        assert breaker.call(up) == "answer"
        for _ in range(2):
            with pytest.raises((Down, CircuitBreakerError)):
                breaker.call(down)
        assert (breaker.current_state, breaker.state.name, breaker.fail_counter) == ("open", "open", 2)
        with pytest.raises(CircuitBreakerError, match="Timeout not elapsed yet"):
            breaker.call(up)
        breaker.half_open()
        with breaker.calling():
            pass
        assert (breaker.current_state, breaker.success_counter) == ("closed", 0)
        breaker.open()
        breaker.close()
        assert breaker(up)() == "answer"

    def test_what_needs_a_storage_of_this_package_says_so(self) -> None:
        """Coroutines and permits need a circuit that admits and settles."""
        breaker = CircuitBreaker(name="theirs", state_storage=pybreaker.CircuitMemoryStorage("closed"))
        with pytest.raises(TypeError, match="breaker 'theirs' has a storage of another package"):
            breaker.admit()
        with pytest.raises(TypeError, match="breaker 'theirs' has a storage of another package"):
            asyncio.run(breaker.acall(answer_later))
