"""Fast lane of the scripts that count calls: its conditions, and that it decides as the definition does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from pybreaker_redis._engines.lua import LANE_REPLY_LENGTH, LuaEngine
from pybreaker_redis._model.circuit import CLOSED, OPEN, Circuit
from pybreaker_redis._model.intents import Intent, RecordFailure, RecordSuccess
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.records import Ago, Paper, found, fresh_namespace, laid, lay

#: A closed record of generation 3 with a failure, noisy for another 900 ms.
NOISY: dict[str, Any] = {
    "state": b"closed",
    "fail_counter": b"1",
    "success_counter": b"0",
    "circuit": {
        "generation": b"3",
        "state": b"closed",
        "opened_at_ms": b"",
        "probe_token": b"",
        "probe_until_ms": b"0",
        "noisy_until_ms": Ago(-900, 1),
        "probe_lease_ms": b"0",
    },
}

#: The same circuit as a process knows it that has read no failure yet.
KNOWN = Circuit(generation=3)

#: One time in the past, in seconds and in milliseconds.
OPENED_AT, OPENED_AT_MS = Ago(70_000, 1000), Ago(70_000, 1)

FAILURE, SUCCESS = RecordFailure(3, "", 1000, 1, 5), RecordSuccess(3, "")


def record(**values: Any) -> dict[str, Any]:
    """Return `NOISY` with other values.  Names that are no keys are fields of the hash."""
    fields = {name: value for name, value in values.items() if name in NOISY["circuit"] and name != "state"}
    keys = {name: value for name, value in values.items() if name not in fields}
    return {**NOISY, "circuit": {**NOISY["circuit"], **fields}, **keys}


def opened_before(opened_at: Any = OPENED_AT, opened_at_ms: Any = OPENED_AT_MS) -> dict[str, Any]:
    """Return a record of a circuit that has been open before."""
    return record(opened_at=opened_at, opened_at_ms=opened_at_ms)


#: Record, known circuit, intent, TTL in milliseconds, and whether the lane decides.
Case = tuple[dict[str, Any], "Circuit | None", Intent, int, bool]

CASES: dict[str, Case] = {
    "failure": (NOISY, KNOWN, FAILURE, 0, True),
    "success": (NOISY, KNOWN, SUCCESS, 0, True),
    "success without failures": (record(fail_counter=b"0"), KNOWN, SUCCESS, 0, True),
    "success without noise": (record(noisy_until_ms=b"0"), KNOWN, SUCCESS, 0, True),
    "failure that is only counted": (NOISY, KNOWN, RecordFailure(3, "", 1000), 0, True),
    "failure without push": (record(noisy_until_ms=b"0"), KNOWN, RecordFailure(3, "", 0, 1, 5), 0, True),
    "last failure before the threshold": (record(fail_counter=b"3"), KNOWN, FAILURE, 0, True),
    "failure at the threshold": (record(fail_counter=b"4"), KNOWN, FAILURE, 0, False),
    "several failures": (NOISY, KNOWN, RecordFailure(3, "", 1000, 2, 5), 0, False),
    "first failure": (record(noisy_until_ms=b"0"), KNOWN, FAILURE, 0, False),
    "noise that ends within half its period": (record(noisy_until_ms=Ago(-400, 1)), KNOWN, FAILURE, 0, False),
    "noise of another clock": (record(noisy_until_ms=Ago(-70_000, 1)), KNOWN, FAILURE, 0, False),
    "circuit with a TTL": (NOISY, KNOWN, FAILURE, 60_000, False),
    "circuit that was never read": (NOISY, None, FAILURE, 0, False),
    "later generation in the process": (NOISY, Circuit(generation=4), FAILURE, 0, False),
    "later generation on the server": (record(generation=b"4"), KNOWN, FAILURE, 0, False),
    "call of an earlier generation": (NOISY, KNOWN, RecordFailure(2, "", 1000, 1, 5), 0, False),
    "probe": (NOISY, KNOWN, RecordFailure(3, "a0", 1000, 1, 5), 0, False),
    "report by hand": (NOISY, KNOWN, RecordFailure(None, "", 1000), 0, False),
    "open circuit": (record(state=b"open"), KNOWN, FAILURE, 0, False),
    "process that knows it open": (NOISY, Circuit(OPEN, generation=3, opened_at_ms=1.0), FAILURE, 0, False),
    "missing record": ({}, KNOWN, FAILURE, 0, False),
    "missing state": (record(state=None), KNOWN, FAILURE, 0, False),
    "missing counter": (record(fail_counter=None), KNOWN, FAILURE, 0, False),
    "damaged counter": (record(fail_counter=b"one"), KNOWN, FAILURE, 0, False),
    "counter below zero": (record(fail_counter=b"-4"), KNOWN, FAILURE, 0, False),
    "counter of another type": (record(fail_counter="list"), KNOWN, FAILURE, 0, False),
    "success and a damaged counter": (record(fail_counter=b"one"), KNOWN, SUCCESS, 0, False),
    "success and a missing counter": (record(fail_counter=None), KNOWN, SUCCESS, 0, False),
    "counter with a leading zero": (record(fail_counter=b"01"), KNOWN, FAILURE, 0, False),
    "counter beyond the limit": (record(fail_counter=b"9" * 12), KNOWN, FAILURE, 0, False),
    "damaged generation": (record(generation=b"three"), KNOWN, FAILURE, 0, False),
    "damaged noise": (record(noisy_until_ms=b"soon"), KNOWN, FAILURE, 0, False),
    "missing field": ({**NOISY, "circuit": {"generation": b"3", "state": b"closed"}}, KNOWN, FAILURE, 0, False),
    "hash of another type": ({**NOISY, "circuit": b"text"}, KNOWN, FAILURE, 0, False),
}


#: Records with values that the lane does not read, because counting does not need them.
UNREAD: dict[str, dict[str, Any]] = {
    "counted successes": record(success_counter=b"2"),
    "damaged successes": record(success_counter=b"two"),
    "token of a probe": record(probe_token=b"a0"),
    "lease of a probe": record(probe_until_ms=Ago(-9000, 1), probe_lease_ms=b"9000"),
    "opening time without a field": record(opened_at=Ago(70_000, 1000)),
    "opening time that the process does not know": record(opened_at=Ago(70_000, 1000), opened_at_ms=Ago(70_000, 1)),
}


class RecordingClient(redis.Redis):
    """Client that keeps the last reply of a script."""

    last: Any = None

    def evalsha(self, *arguments: Any) -> Any:
        """Execute a script by its digest."""
        self.last = super().evalsha(*arguments)
        return self.last

    def eval(self, *arguments: Any) -> Any:
        """Execute a script by its source."""
        self.last = super().eval(*arguments)
        return self.last


@pytest.fixture
def client(every_server: PrivateServer) -> Iterator[RecordingClient]:
    """Yield a client of each server."""
    plain = every_server.client()
    with RecordingClient(connection_pool=plain.connection_pool) as client:
        yield client
    plain.close()


def now_of(client: Any) -> int:
    """Return the time of the server, in milliseconds since the epoch."""
    seconds, microseconds = client.time()
    return int(seconds * 1000 + microseconds // 1000)


def decide(
    client: RecordingClient, content: dict[str, Any], known: Circuit | None, intent: Intent, ttl_ms: int = 0
) -> bool:
    """Execute an intent on a record, compare all with the definition, and return whether the lane has decided."""
    keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
    values = laid({name: value for name, value in content.items() if value is not None}, now_of(client))
    lay(client, keys, values)
    reply = LuaEngine(client, keys, ttl_ms=ttl_ms).execute(intent, known, CLOSED)
    paper = Paper(dict(values), reply.now_ms)
    assert reply == paper.execute(intent, known, CLOSED)
    assert found(client, keys) == paper.values
    return len(client.last) == LANE_REPLY_LENGTH


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lane_decides_as_the_definition_where_it_may(client: RecordingClient, case: Case) -> None:
    """The lane takes the common case, leaves every other one to the full script, and both write the same."""
    *arguments, is_lane = case
    assert decide(client, *arguments) is is_lane


@pytest.mark.parametrize("content", UNREAD.values(), ids=UNREAD)
def test_lane_leaves_what_counting_does_not_need(client: RecordingClient, content: dict[str, Any]) -> None:
    """The decision is the same as without the other values, and these values stay as they are."""
    keys = circuit_keys(fresh_namespace(), needs_one_slot=False)
    values = laid(content, now_of(client))
    lay(client, keys, values)
    reply = LuaEngine(client, keys).execute(FAILURE, KNOWN, CLOSED)
    assert len(client.last) == LANE_REPLY_LENGTH
    assert (reply.accepted, reply.circuit.state, reply.circuit.fail_counter) == (True, CLOSED, 2)
    assert found(client, keys) == {**values, "fail_counter": b"2"}


@pytest.mark.parametrize("intent", [FAILURE, SUCCESS], ids=["failure", "success"])
def test_lane_serves_a_circuit_that_was_open_before(client: RecordingClient, intent: Intent) -> None:
    """Most circuits have been open once.  The reply has the time that the process knows."""
    opened_ms = now_of(client) - 70_000
    known = Circuit(generation=3, opened_at_ms=opened_ms)
    sound = opened_before(f"{opened_ms // 1000}".encode(), f"{opened_ms}".encode())
    assert decide(client, sound, known, intent)
