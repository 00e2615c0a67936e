"""A guarded call waits for Redis for `timeout` seconds, however many of its questions go unanswered."""

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
from pybreaker_redis._engines import transaction
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.intents import ClaimProbe, Intent, Load, RecordFailure, Reply
from pybreaker_redis._redis.deadline import deadline, seconds_left
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import Down, down, up
from tests.support.clock import Stopwatch
from tests.support.servers import without_scripts

#: Seconds that a call may wait here, so many that a busy machine makes no difference.
TIMEOUT = 2.0

#: Seconds that a claim takes here.
SLOW = 0.6


class Looks(pybreaker.CircuitBreakerListener):
    """A listener that reads the circuit at each transition."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        """Read it."""
        self.seen.append(cb.current_state)


def note_time_left(storage: CircuitRedisStorage) -> list[tuple[type[Intent], float]]:
    """Return a list that gets what is sent to Redis, with the seconds that are left for the answer; claims are slow."""
    carriers = storage._core.shared.selector
    execute, sent = carriers.run_intent, []

    def timed(choice: Any, intent: Intent, *arguments: Any) -> Reply:
        left = seconds_left()
        assert left is not None
        sent.append((type(intent), left))
        if isinstance(intent, ClaimProbe):
            time.sleep(SLOW)
        return execute(choice, intent, *arguments)

    carriers.run_intent = timed  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("looks", [False, True], ids=["", "a listener looks"])
def test_call_that_claims_slowly_has_the_rest_of_its_time_for_what_follows(server: PrivateServer, looks: bool) -> None:
    """A breaker calls once more within a call that claims, and listeners read the circuit: the call is the same one."""
    with contextlib.closing(server.client()) as client:
        # Every look is sent.
        storage = CircuitRedisStorage("closed", client, "waits", timeout=TIMEOUT, max_staleness=0)
        listener = Looks()
        breaker = pybreaker.CircuitBreaker(
            fail_max=1, reset_timeout=0, state_storage=storage, listeners=[listener] if looks else []
        )
        with pytest.raises(pybreaker.CircuitBreakerError):
            breaker.call(down)
        sent = note_time_left(storage)
        assert breaker.call(up) == "answer"
        claim = next(index for index, (kind, _) in enumerate(sent) if kind is ClaimProbe)
        loads = [left for kind, left in sent[claim + 1 :] if kind is Load]
        # The listener's look comes first, and has a timeout of its own.
        assert loads[looks] <= TIMEOUT - SLOW
        assert not looks or loads[0] > TIMEOUT - SLOW
        # So has the next call.
        del sent[:]
        breaker.call(up)
        assert sent[0][1] > TIMEOUT - SLOW


@pytest.fixture
def scriptless(killable_server: PrivateServer) -> Iterator[redis.Redis]:
    """A client of a user who may not run scripts, on a server that may be frozen."""
    with without_scripts(killable_server) as client:
        yield client
    killable_server.resume()


@pytest.mark.parametrize(
    ("step", "intent"),
    [
        ("queue_reads", RecordFailure(None, "")),
        ("decide", ClaimProbe(99, "refused", 1000)),
        ("_queue_writes", RecordFailure(None, "")),
    ],
    ids=["while it reads", "after a refusal", "while it writes"],
)
def test_nothing_waits_for_a_server_that_freezes_under_watch_after_the_deadline(
    killable_server: PrivateServer,
    scriptless: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    intent: Intent,
) -> None:
    """redis-py's pipeline would connect again to end the watching, when the garbage collector frees it."""
    storage = CircuitRedisStorage("closed", scriptless, "watched", timeout=TIMEOUT)
    breaker = pybreaker.CircuitBreaker(fail_max=99, state_storage=storage)
    breaker.call(up)
    choice = storage._core.shared.selector.current
    assert choice is not None
    engine = TransactionEngine(choice.engine.client, choice.keys)
    home = TransactionEngine if step == "_queue_writes" else transaction
    original = getattr(home, step)

    def frozen(*arguments: Any) -> Any:
        killable_server.pause()
        return original(*arguments)

    monkeypatch.setattr(home, step, frozen)
    gc.collect()
    # So that garbage of other tests, whose servers have gone, is not collected in the measured time.
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
    """An error that is an answer leaves the connection as it is."""
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
