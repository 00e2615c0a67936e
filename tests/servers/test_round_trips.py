"""What each step of a circuit costs: round trips, counted at the server.

``python -m tests.servers.test_round_trips`` prints the table of the README.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pybreaker
import pytest
from pybreaker import CircuitBreaker, CircuitBreakerError

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._engines.scripts import compose_script
from pybreaker_redis._model.intents import INTENTS
from pybreaker_redis.testing.servers import PrivateServer
from tests.support import servers
from tests.support.breakers import settled
from tests.support.round_trips import Down, Meter, commands_sent

#: What somebody else's listener asks would be counted, too.
pytestmark = pytest.mark.usefixtures("nobody_listens")

README = Path(__file__).parents[2] / "README.rst"

#: In the README the table follows this line.
MARKER = ".. round-trips-table"

RESET_TIMEOUT = 0.05

#: Who is measured, as the table's columns say it.
PYBREAKER, OURS, WITHOUT_SCRIPTS = "pybreaker", "pybreaker_redis", "pybreaker_redis, no scripts"

#: Step → (stock, ours, ours where the server runs no scripts).
COSTS = {
    "success": (2, 0, 7),
    "failure": (3, 1, 7),
    "trip": (8, 2, 13),
    "rejected call": (2, 0, 1),
    "recovery": (11, 4, 26),
}


def up() -> None:
    """The dependency is well."""


def down() -> None:
    """The dependency is down."""
    raise Down


@contextlib.contextmanager
def storage_of(who: str, server: PrivateServer) -> Iterator[Any]:
    """A storage whose connection is open and whose scripts are known to the server."""
    user = {}
    with contextlib.closing(server.client()) as administrator:
        administrator.flushall()
        administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
        for intent in INTENTS:
            administrator.script_load(compose_script(intent.operation)[0])
    if who == WITHOUT_SCRIPTS:
        user = {"username": "noscript", "password": "any"}
    with contextlib.closing(server.client(**user)) as client:
        make = pybreaker.CircuitRedisStorage if who == PYBREAKER else CircuitRedisStorage
        words = {} if who == PYBREAKER else {"timeout": 10, "max_staleness": 60}
        yield make("closed", client, namespace="metered", **words)


def measured(server: PrivateServer, who: str) -> dict[str, int]:
    """Each step's round trips, in the life of one circuit."""
    listens = who == OURS
    with contextlib.closing(Meter(server, scripts=listens)) as meter, storage_of(who, server) as storage:
        breaker = CircuitBreaker(fail_max=3, reset_timeout=RESET_TIMEOUT, state_storage=storage)
        settled(breaker) if listens else breaker.call(up)
        costs = {"success": meter.cost(lambda: breaker.call(up)), "failure": meter.cost(lambda: breaker.call(down))}
        assert breaker.fail_counter == 1
        with contextlib.suppress(Down):
            breaker.call(down)
        costs["trip"] = meter.cost(lambda: breaker.call(down))
        # Stock cuts the opening time to whole seconds: its timeout may be over at once.
        breaker.reset_timeout = 60
        assert breaker.current_state == "open"
        costs["rejected call"] = meter.cost(lambda: breaker.call(up))
        breaker.reset_timeout = RESET_TIMEOUT
        time.sleep(RESET_TIMEOUT * 1.2)
        costs["recovery"] = meter.cost(lambda: breaker.call(up))
        assert breaker.current_state == "closed"
    return costs


@pytest.mark.parametrize(("column", "who"), list(enumerate([PYBREAKER, OURS, WITHOUT_SCRIPTS])))
def test_each_step_costs_exactly_what_the_table_says(every_server: PrivateServer, column: int, who: str) -> None:
    """A round trip more would be noticed, and so would one less, which the README should then be proud of."""
    assert measured(every_server, who) == {step: costs[column] for step, costs in COSTS.items()}


@pytest.mark.parametrize("step", COSTS)
def test_no_step_costs_more_than_on_stock(step: str) -> None:
    """Nobody pays for the move."""
    stock, ours, _ = COSTS[step]
    assert ours <= stock


def test_whatever_a_storage_sends_is_a_script(server: PrivateServer) -> None:
    """So to count the scripts is to count the round trips."""
    with contextlib.closing(server.client()) as client, commands_sent(client) as sent:
        storage = CircuitRedisStorage("closed", client, "sends")
        breaker = settled(CircuitBreaker(fail_max=2, reset_timeout=0, state_storage=storage))
        for action in (down, up, down, down, up):
            with contextlib.suppress(Down, CircuitBreakerError):
                breaker.call(action)
        breaker.open()
        breaker.half_open()
        breaker.close()
    assert set(sent) <= {"EVALSHA", "EVAL"}
    assert len(sent) > 10


def test_constructing_costs_no_round_trip(server: PrivateServer) -> None:
    """Neither the storage nor pybreaker's breaker, which reads the state, says anything to Redis."""
    with contextlib.closing(Meter(server)) as meter, contextlib.closing(server.client()) as client:
        client.script_load(compose_script("load")[0])
        made: list[Any] = []
        assert meter.cost(lambda: made.append(CircuitRedisStorage("closed", client, "another"))) == 0
        assert meter.cost(lambda: CircuitBreaker(state_storage=made[0])) == 0


def table() -> str:
    """The costs, as the README shows them."""
    head = (
        "step",
        *(f"``{who}``" if " " not in who else "without scripts" for who in (PYBREAKER, OURS, WITHOUT_SCRIPTS)),
    )
    rows = [head, *((step, *map(str, costs)) for step, costs in COSTS.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule]) + "\n"


def test_readme_shows_the_table_that_was_measured() -> None:
    """What the README says of costs is what the test above counts."""
    page = README.read_text(encoding="utf-8")
    assert page.partition(MARKER)[2].lstrip("\n").startswith(table())


if __name__ == "__main__":
    with PrivateServer(servers.at_hand()[0].binary) as private:
        for name in (PYBREAKER, OURS, WITHOUT_SCRIPTS):
            print(name, measured(private, name))
    print(table())
