"""Round trips of each step of a circuit, counted at the server.

``python -m tests.servers.test_round_trips`` prints the table of ``docs/numbers.rst``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
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
from tests.support.paths import ROOT
from tests.support.round_trips import Down, Meter, commands_sent
from tests.support.ways import is_breaker

#: Commands of listeners of other tests would be counted, too.
pytestmark = pytest.mark.usefixtures("no_listeners")

#: Page with the table, and the line before the table.
PAGE = ROOT / "docs" / "numbers.rst"
MARKER = ".. round-trips-table"

RESET_TIMEOUT = 0.05

#: Measured storages, by the titles of the table's columns.
PYBREAKER, OURS, WITHOUT_SCRIPTS = "pybreaker", "pybreaker_redis", "pybreaker_redis, no scripts"

#: Step → (stock, this package, this package on a server without scripts).
COSTS = {
    "success": (2, 0, 7),
    "failure": (3, 1, 7),
    "success after a failure": (2, 1, 7),
    "trip": (8, 2, 13),
    "rejected call": (2, 0, 1),
    "recovery": (11, 4, 26),
}

#: Steps that cost less with the breaker of this package: (this package, this package on a server without scripts).
COSTS_OF_BREAKER = {"trip": (1, 7), "recovery": (3, 19)}


def cost_of(step: str, column: int) -> int:
    """Return the cost of a step in a column, by the breaker that this run uses."""
    if is_breaker and column and step in COSTS_OF_BREAKER:
        return COSTS_OF_BREAKER[step][column - 1]
    return COSTS[step][column]


def up() -> None:
    """Return without an error, as a healthy dependency does."""


def down() -> None:
    """Raise the error of a failed dependency."""
    raise Down


@contextlib.contextmanager
def storage_of(column_name: str, server: PrivateServer) -> Iterator[Any]:
    """Yield a storage with an open connection, on a server that has loaded the scripts."""
    user = {}
    with contextlib.closing(server.client()) as administrator:
        administrator.flushall()
        administrator.execute_command("ACL", "SETUSER", "noscript", "on", "nopass", "~*", "&*", "+@all", "-@scripting")
        for intent in INTENTS:
            administrator.script_load(compose_script(intent.operation)[0])
    if column_name == WITHOUT_SCRIPTS:
        user = {"username": "noscript", "password": "any"}
    with contextlib.closing(server.client(**user)) as client:
        make = pybreaker.CircuitRedisStorage if column_name == PYBREAKER else CircuitRedisStorage
        words = {} if column_name == PYBREAKER else {"timeout": 10, "max_staleness": 60}
        yield make("closed", client, namespace="metered", **words)


def measured(server: PrivateServer, column_name: str) -> dict[str, int]:
    """Return the round trips of each step of one circuit."""
    has_listener = column_name == OURS
    with contextlib.closing(Meter(server, scripts=has_listener)) as meter, storage_of(column_name, server) as storage:
        breaker = CircuitBreaker(fail_max=3, reset_timeout=RESET_TIMEOUT, state_storage=storage)
        settled(breaker) if has_listener else breaker.call(up)
        costs = {"success": meter.cost(lambda: breaker.call(up)), "failure": meter.cost(lambda: breaker.call(down))}
        assert breaker.fail_counter == 1
        costs["success after a failure"] = meter.cost(lambda: breaker.call(up))
        for _ in range(2):
            with contextlib.suppress(Down):
                breaker.call(down)
        costs["trip"] = meter.cost(lambda: breaker.call(down))
        # Stock cuts the opening time to whole seconds, so its timeout may be over at once.
        breaker.reset_timeout = 60
        assert breaker.current_state == "open"
        costs["rejected call"] = meter.cost(lambda: breaker.call(up))
        breaker.reset_timeout = RESET_TIMEOUT
        time.sleep(RESET_TIMEOUT * 1.2)
        costs["recovery"] = meter.cost(lambda: breaker.call(up))
        assert breaker.current_state == "closed"
    return costs


@pytest.mark.parametrize(("column", "column_name"), list(enumerate([PYBREAKER, OURS, WITHOUT_SCRIPTS])))
def test_each_step_costs_the_round_trips_of_the_table(
    every_server: PrivateServer, column: int, column_name: str
) -> None:
    """One round trip more or less fails the test, so the page states the exact number."""
    assert measured(every_server, column_name) == {step: cost_of(step, column) for step in COSTS}


@pytest.mark.parametrize("step", COSTS)
def test_no_step_costs_more_than_on_stock(step: str) -> None:
    """The change of the import costs no further round trip."""
    assert cost_of(step, 1) <= cost_of(step, 0)
    if step in COSTS_OF_BREAKER:
        assert all(cost < others for cost, others in zip(COSTS_OF_BREAKER[step], COSTS[step][1:], strict=True))


def test_storage_sends_only_scripts(server: PrivateServer) -> None:
    """With only scripts sent, the number of scripts is the number of round trips."""
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
    """Neither the storage nor pybreaker's breaker, which reads the state, sends a command."""
    with contextlib.closing(Meter(server)) as meter, contextlib.closing(server.client()) as client:
        client.script_load(compose_script("load")[0])
        made: list[Any] = []
        assert meter.cost(lambda: made.append(CircuitRedisStorage("closed", client, "another"))) == 0
        assert meter.cost(lambda: CircuitBreaker(state_storage=made[0])) == 0


def table() -> str:
    """Return the costs in the format of the page."""
    head = ("step", "pybreaker", "our storage", "our breaker", "our storage, no scripts", "our breaker, no scripts")
    rows = [head]
    for step, (stock, *storage) in COSTS.items():
        breaker = COSTS_OF_BREAKER.get(step, storage)
        pairs = zip(storage, breaker, strict=True)
        rows.append((step, str(stock), *(str(cost) for pair in pairs for cost in pair)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule]) + "\n"


def test_page_shows_the_table_that_was_measured() -> None:
    """The table of ``docs/numbers.rst`` contains the numbers that are counted here."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(MARKER)[2].lstrip("\n").startswith(table())


if __name__ == "__main__":
    with PrivateServer(servers.at_hand()[0].binary) as private:
        for name in (PYBREAKER, OURS, WITHOUT_SCRIPTS):
            print(name, measured(private, name))
    print(table())
