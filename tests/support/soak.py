"""Four outages of a dependency: the calls that reach it while it is down, and the transitions that listeners receive.

``python -m tests.support.soak`` prints the table for the stock storage and for this package's, side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fleet import Fleet, Make, Shared, Spec, Visits, flood, most_at_once
from tests.support.places import client_at

#: The storages, in the order of the table.
MAKES: tuple[Make, ...] = ("stock", "ours")


@dataclass(frozen=True)
class Soak:
    """Figures of one soak.

    Attributes:
        make: Origin of the storage.
        workers: Number of processes.
        per_outage: Calls that reached the dead dependency, by outage.
        trials_at_once: Most calls that were in the dead dependency at the same time once the circuit had opened.
        trials: Calls that reached the dead dependency once the circuit had opened, by outage.
        notifications: ``state_change`` calls of all listeners of all workers.
        authored: Those of them that are not known to be notices of another process's transition.
        transitions: Transitions of the circuit, for storages of this package.
    """

    make: Make
    workers: int
    per_outage: tuple[int, ...]
    trials_at_once: int
    trials: tuple[int, ...]
    notifications: int
    authored: int
    transitions: int


def soak(
    make: Make,
    unix_socket: str,
    directory: str | Path,
    *,
    workers: int = 12,
    outages: int = 4,
    outage: float = 3.0,
    pause: float = 1.5,
    reset_timeout: float = 1.0,
    dead_call: float = 0.1,
) -> Soak:
    """Run `workers` processes that make a call every 20 ms through `outages` outages.

    Args:
        make: Origin of the storage.
        unix_socket: Path of the server's unix socket.
        directory: Directory for the dependency's log.
        workers: Number of processes.
        outages: Number of outages.
        outage: Length of each outage, seconds.
        pause: Length of the healthy time before each outage and after the last, seconds.
        reset_timeout: Reset timeout of the breakers, seconds.
        dead_call: Length of a call to the dead dependency, seconds.
    """
    log = str(Path(directory) / f"soak-{make}")
    spec = Spec(make, str(unix_socket), log, namespace=f"soak-{make}", reset_timeout=reset_timeout)
    with Fleet([spec] * workers) as fleet:
        begin = time.monotonic() + 0.5
        dead = [(at, at + outage) for at in (begin + pause + (outage + pause) * number for number in range(outages))]
        end = dead[-1][1] + pause
        fleet.run(flood, end, every=0.02, dead=dead, seconds=dead_call, at=begin, within=end - begin + 30.0)
        notified = fleet.transitions()
    with contextlib.closing(client_at(f"unix:{unix_socket}")) as client:
        transitions = Shared(client, spec.namespace).generation
    visits = Visits(log)
    reached = [visits.since(*interval) for interval in dead]
    # Calls in flight at the dependency's death have ended, and the circuit is open, well within one reset_timeout.
    trials = [visits.since(down + reset_timeout * 0.8, up) for down, up in dead]
    return Soak(
        make,
        workers,
        tuple(len(calls) for calls in reached),
        max(most_at_once(calls) for calls in trials),
        tuple(len(calls) for calls in trials),
        len(notified),
        sum(item.noticed is not True for item in notified),
        transitions,
    )


def side_by_side(unix_socket: str, directory: str | Path, **settings: Any) -> list[Soak]:
    """Soak both storages at the same time on one server, so that a disturbance meets both."""
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(soak, make, unix_socket, directory, **settings) for make in MAKES]
        return [run.result() for run in runs]


def table(soaks: Sequence[Soak]) -> str:
    """Return the figures, one storage a line."""
    outages = len(soaks[0].per_outage)
    head = ["storage", *(f"outage {number}" for number in range(1, outages + 1)), "trials at once", "notifications"]
    rows = [
        [soak.make, *map(str, soak.per_outage), str(soak.trials_at_once), str(soak.notifications)] for soak in soaks
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    title = f"{soaks[0].workers} processes, {outages} outages: calls that reached the dead dependency"
    return "\n".join([title, *lines])


def main() -> None:
    """Run both storages on a private server and print the table."""
    from pybreaker_redis.testing.servers import PrivateServer
    from tests.support.servers import at_hand

    parser = argparse.ArgumentParser(prog="python -m tests.support.soak", description=__doc__)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--outages", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, PrivateServer(at_hand()[0].binary) as server:
        measured = side_by_side(server.unix_socket, directory, workers=options.workers, outages=options.outages)
    print(table(measured))


if __name__ == "__main__":
    main()
