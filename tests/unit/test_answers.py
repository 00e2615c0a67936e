"""Invalid replies of a server: each value is checked, and a wrong value is a fault of the server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from pybreaker import CircuitBreaker

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._circuits.bulk import read_all_circuits
from pybreaker_redis._engines.lua import LuaEngine, parse_script_reply
from pybreaker_redis._engines.reader import ReadRequest
from pybreaker_redis._engines.transaction import TransactionEngine
from pybreaker_redis._model.answers import checked_strings, server_time_ms
from pybreaker_redis._model.circuit import CLOSED, COUNT_LIMIT, HALF_OPEN, LEASE_MAX_MS, NOISE_MAX_MS, Circuit
from pybreaker_redis._model.intents import Load, Reply, Trip
from pybreaker_redis._redis.classify import ErrorKind, error_kind
from pybreaker_redis._redis.keys import circuit_keys
from pybreaker_redis.errors import UnusableReplyError

KEYS = circuit_keys("answers", needs_one_slot=False)

#: Valid reply of a script, in the order of its header.
VALID: list[Any] = [1, 1005, b"half-open", 2, 1, 1000, 3, b"a0", 2000, 1500, 1000, b"restored", b"NOPERM"]

#: Values that no script returns, by their index in the reply.
INVALID: dict[int, tuple[Any, ...]] = {
    0: (None, 2, -1, b"1", 1.0, True),
    1: (None, -1, 10**15, b"1005", 1005.5),
    2: (None, b"ajar", b"\xff", 1, [b"open"]),
    3: (None, -1, COUNT_LIMIT, b"2"),
    4: (None, -1, COUNT_LIMIT, b"1"),
    5: (None, -2, 1006, b"1000"),
    6: (None, -1, COUNT_LIMIT, b"3"),
    7: (None, b"A0", b"g", b"a" * 65, 7),
    8: (None, -1, 1006 + LEASE_MAX_MS, b"2000"),
    9: (None, -1, 1006 + NOISE_MAX_MS, b"1500"),
    10: (None, -1, LEASE_MAX_MS + 1, b"1000"),
    11: (None, 0),
    12: (None, 0),
}


@pytest.mark.parametrize("answer", [VALID, [item.decode() if isinstance(item, bytes) else item for item in VALID]])
def test_valid_reply_is_parsed_to_the_circuit(answer: list[Any]) -> None:
    """Clients with and without decoding give the same circuit."""
    circuit = Circuit(HALF_OPEN, 2, 1, 1000, 3, "a0", 2000, 1500, 1000)
    assert parse_script_reply(answer) == (Reply(True, circuit, 1005, "restored"), "NOPERM")


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in INVALID.items() for value in values])
def test_reply_with_an_invalid_value_is_a_fault(place: int, value: Any) -> None:
    """The circuit does not change, and the error contains the reply."""
    answer = [*VALID[:place], value, *VALID[place + 1 :]]
    with pytest.raises(UnusableReplyError, match="no server returns") as error:
        parse_script_reply(answer)
    assert error_kind(error.value) is ErrorKind.UNUSABLE


def test_open_circuit_without_a_time_is_a_fault() -> None:
    """Without an opening time, a probe would be admitted at once."""
    with pytest.raises(UnusableReplyError):
        parse_script_reply([1, 1005, b"open", 0, 0, -1, 3, b"", 0, 0, 0, b"", b""])


@pytest.mark.parametrize("answer", [None, [], VALID[:-1], [*VALID, b""], b"OK", 1, {1: 2}, "x" * 13])
def test_reply_that_is_no_list_of_its_length_is_a_fault(answer: Any) -> None:
    """A client that swallows errors returns None."""
    engine = LuaEngine(SimpleNamespace(evalsha=lambda *_: answer), KEYS)
    with pytest.raises(UnusableReplyError):
        engine.execute(Load(), None, CLOSED)


@pytest.mark.parametrize(
    "answer",
    [["1", 1, 0], [1000, None, 0], [1000, 1, 0.5], [-1, 1, 0], [10**15, 1, 0], [1000, -1, 0], [1000, 1, 10**9]],
)
def test_unsound_reply_of_the_fast_lane_is_a_fault(answer: Any) -> None:
    """The three values are checked like those of a whole record."""
    with pytest.raises(UnusableReplyError):
        parse_script_reply(answer, Circuit(generation=3))


@pytest.mark.parametrize("answer", [(1, 2_345), [b"1", b"2345"], ["1", "2345"]])
def test_time_is_read_from_any_client(answer: Any) -> None:
    """Parsed and unparsed, decoded and undecoded replies give the same time."""
    assert server_time_ms(answer) == 1002


@pytest.mark.parametrize(
    "answer", [None, [], [1], [1, 2, 3], [None, 2], [-1, 2], [b"x", 2], [10**12, 2], [1.5, 2], [b"\xd9\xa3", 2], "12"]
)
def test_invalid_time_is_a_fault(answer: Any) -> None:
    """A wrong time would make every comparison with it wrong."""
    with pytest.raises(UnusableReplyError):
        server_time_ms(answer)


@pytest.mark.parametrize("answer", [None, [], [b"x"], [b"x", 1], [b"x", [b"y"]], b"xy"])
def test_reply_without_the_requested_strings_is_a_fault(answer: Any) -> None:
    """A reply holds strings or None, and as many as were requested."""
    assert checked_strings("MGET", [b"x", None], 2) == [b"x", None]
    with pytest.raises(UnusableReplyError):
        checked_strings("MGET", answer, 2)


class Swallowing:
    """A pipeline that returns None instead of raising an error."""

    #: As of a pipeline that has sent nothing.
    connection = None

    def __init__(self, **_: Any) -> None:
        """Accept any arguments."""

    def __enter__(self) -> Swallowing:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("intent", [Load(), Trip(None, "")], ids=["load", "trip"])
@pytest.mark.parametrize("ttl_ms", [0, 60_000])
def test_transaction_without_an_answer_is_a_fault(intent: Any, ttl_ms: int) -> None:
    """A single round trip, a transaction under WATCH and a read of several circuits all fail."""
    client = SimpleNamespace(pipeline=Swallowing)
    with pytest.raises(UnusableReplyError):
        TransactionEngine(client, KEYS, ttl_ms).execute(intent, None, CLOSED)
    with pytest.raises(UnusableReplyError):
        read_all_circuits([ReadRequest(client, KEYS, None, CLOSED)])


def test_client_that_swallows_errors_causes_failover_to_the_local_circuit() -> None:
    """No guarded call fails because a reply is missing."""

    class Quiet(fakeredis.FakeStrictRedis):
        def execute_command(self, *args: Any, **options: Any) -> Any:
            return None

        def pipeline(self, *args: Any, **options: Any) -> Any:
            return Swallowing()

    storage = CircuitRedisStorage(CLOSED, Quiet(), "answers", timeout=None)
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    assert breaker.call(lambda: "answer") == "answer"
    assert storage.health().is_own
