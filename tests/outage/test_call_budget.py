"""A guarded call waits for Redis for `timeout` seconds in all, however many of its commands get no answer."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.intents import ClaimProbe, Close, CountProbe, Intent, Load, RecordFailure, Reply
from pybreaker_redis._redis.connections.deadline import deadline, seconds_left
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.clock import Stopwatch
from tests.support.inspect import before_transaction_step, engine_of, keys_of, selector_of
from tests.support.servers import without_scripts
from tests.support.ways import settles_calls

#: Seconds that a call may wait in these tests: long compared with the delays of a busy machine.
TIMEOUT = 2.0

#: Seconds that a claim of a probe takes in these tests.
SLOW = 0.6


class ReadingListener(pybreaker.CircuitBreakerListener):
    """Listener that reads the circuit at each transition."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Read the state."""
        self.seen.append(cb.current_state)


def note_time_left(storage: CircuitRedisStorage) -> list[tuple[type[Intent], float]]:
    """Return a list that receives each intent sent to Redis, with the seconds left for the answer.  Claims are slow."""
    selector = selector_of(storage)
    execute, sent = selector.run_intent, []

    def timed(choice: Any, intent: Intent, *arguments: Any) -> Reply:
        left = seconds_left()
        assert left is not None
        sent.append((type(intent), left))
        if isinstance(intent, ClaimProbe):
            time.sleep(SLOW)
        return execute(choice, intent, *arguments)

    selector.run_intent = timed  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("listener_reads", [False, True], ids=["", "a listener reads"])
def test_slow_claim_leaves_the_rest_of_the_timeout_to_the_call(server: PrivateServer, listener_reads: bool) -> None:
    """A slow claim leaves the rest of the timeout to the breaker's nested call, while a listener's read has its own.

    Our breaker makes no nested call: the rest is for the report of the probe.
    """
    with contextlib.closing(server.client()) as client:
        # With a staleness of zero every load is sent.
        storage = CircuitRedisStorage("closed", client, "waits", timeout=TIMEOUT, max_staleness=0)
        listener = ReadingListener()
        breaker = pybreaker.CircuitBreaker(
            fail_max=1, reset_timeout=0, state_storage=storage, listeners=[listener] if listener_reads else []
        )
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(down)
        sent = note_time_left(storage)
        assert breaker.call(up) == "answer"
        claim = next(index for index, (kind, _) in enumerate(sent) if kind is ClaimProbe)
        loads = [left for kind, left in sent[claim + 1 :] if kind is Load]
        # The listener's load comes first, and has a full timeout.
        if settles_calls(breaker):
            reports = [(kind, left) for kind, left in sent[claim + 1 :] if kind is not Load]
            assert [kind for kind, _ in reports] == [CountProbe, Close]
            assert all(left <= TIMEOUT - SLOW for _, left in reports), reports
            assert len(loads) == 2 * listener_reads
        else:
            assert loads[listener_reads] <= TIMEOUT - SLOW
        assert not listener_reads or loads[0] > TIMEOUT - SLOW
        # The next call has a full timeout, too.
        del sent[:]
        breaker.call(up)
        assert sent[0][1] > TIMEOUT - SLOW


@pytest.fixture
def scriptless(killable_server: PrivateServer) -> Iterator[redis.Redis]:
    """A client of a user without the right to run scripts, on a server that a test may freeze."""
    with without_scripts(killable_server) as client:
        yield client
    killable_server.resume()


@pytest.mark.parametrize(
    ("step", "intent"),
    [
        ("reads", RecordFailure(None, "")),
        pytest.param("decides", ClaimProbe(99, "refused", 1000), marks=pytest.mark.full),
        pytest.param("writes", RecordFailure(None, ""), marks=pytest.mark.full),
    ],
    ids=["while it reads", "after a refusal", "while it writes"],
)
def test_freeze_under_watch_delays_a_call_for_its_timeout_only(
    killable_server: PrivateServer,
    scriptless: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    intent: Intent,
) -> None:
    """Freeing redis-py's pipeline must not connect again to end the WATCH, as redis-py would."""
    storage = CircuitRedisStorage("closed", scriptless, "watched", timeout=TIMEOUT)
    breaker = pybreaker.CircuitBreaker(fail_max=99, state_storage=storage)
    breaker.call(up)
    engine = TransactionEngine(engine_of(storage).client, keys_of(storage))
    before_transaction_step(monkeypatch, step, killable_server.pause)
    gc.collect()
    # Garbage of other tests and their servers must not be collected in the measured time.
    gc.freeze()
    try:
        with Stopwatch() as watch:
            # Not `pytest.raises`, which keeps the error, and with it the pipeline.
            with contextlib.suppress(redis.TimeoutError), deadline(TIMEOUT):
                engine.execute(intent, None, "closed")
            gc.collect()
    finally:
        gc.unfreeze()
    assert TIMEOUT * 0.9 < watch.seconds < TIMEOUT * 1.5


def test_refusal_under_watch_costs_no_connection(
    scriptless: redis.Redis, killable_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that Redis answers with leaves the connection open."""
    storage = CircuitRedisStorage("closed", scriptless, "refused", timeout=TIMEOUT)
    breaker = pybreaker.CircuitBreaker(fail_max=99, state_storage=storage)
    for _ in range(2):
        with contextlib.suppress(Down):
            breaker.call(down)
    with contextlib.closing(killable_server.client()) as administrator:
        made = administrator.info("stats")["total_connections_received"]
        user = scriptless.connection_pool.connection_kwargs["username"]
        administrator.execute_command("ACL", "SETUSER", user, "-@write")
        with contextlib.suppress(Down):
            breaker.call(down)
        assert storage.health().condition != "connected"
        assert administrator.info("stats")["total_connections_received"] == made
