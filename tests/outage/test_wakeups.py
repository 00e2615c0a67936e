"""Wake-ups of the threads of this process during an outage and after it: threads wait, and do not poll."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from pybreaker_redis._replica import listener
from pybreaker_redis._replica.listener import LISTENER_THREAD_NAME
from pybreaker_redis._servers import retry
from pybreaker_redis._servers.availability import Availability
from pybreaker_redis._servers.retry import RETRY_THREAD_NAME
from pybreaker_redis._servers.table import server_for
from tests.support.breakers import breaker_on, settled
from tests.support.faults import Site
from tests.support.inspect import view_of
from tests.support.outages import health_of, is_back, is_unreachable_for
from tests.support.wait import wait_for

#: Longest wait of the threads, seconds, as a user has it.  Other tests shorten the wait.
WAIT_S = 0.5

#: Wait of a thread that only another thread can end in time, seconds.
ENDLESS_S = 600.0

#: Seconds for which wake-ups are counted.
COUNTED_S = 2.0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Availability]]:
    """Name of the thread and availability of the server, for each wait that begins."""
    begun: list[tuple[str, Availability]] = []
    wait_for_change = Availability.wait_for_change

    def noted(availability: Availability, seen: int, timeout_s: float) -> None:
        begun.append((threading.current_thread().name, availability))
        wait_for_change(availability, seen, timeout_s)

    monkeypatch.setattr(Availability, "wait_for_change", noted)
    return begun


@contextlib.contextmanager
def lost(site: Site) -> Iterator[None]:
    """Refuse all connections, and permit them again."""
    site.proxy.refuse()
    site.proxy.close_connections()
    yield
    site.proxy.listen()


def counted(waits: list[tuple[str, Availability]], thread: str, availability: Availability) -> tuple[int, float]:
    """Return the number of waits that a thread has begun during some seconds, and those seconds."""
    waits.clear()
    began = time.monotonic()
    time.sleep(COUNTED_S)
    seconds = time.monotonic() - began
    return waits.count((thread, availability)), seconds


def test_listener_wakes_twice_a_second_at_most_in_an_outage(
    site: Site, monkeypatch: pytest.MonkeyPatch, waits: list[tuple[str, Availability]]
) -> None:
    """An outage costs no CPU time: the listener waits for the end of the outage."""
    monkeypatch.setattr(listener, "LISTENER_WAIT_MAX_S", WAIT_S)
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    availability = server_for(site.client()).availability
    with lost(site):
        wait_for(lambda: is_unreachable_for(breaker), "the outage is known")
        wait_for(lambda: (LISTENER_THREAD_NAME, availability) in waits, "the listener waits")
        number, seconds = counted(waits, LISTENER_THREAD_NAME, availability)
        assert number <= seconds / WAIT_S + 2
    wait_for(lambda: is_back(breaker), "the shared circuit is used again")


def test_end_of_an_outage_wakes_the_listener(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The circuit is subscribed again at once, without a look every now and then."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    with lost(site):
        wait_for(lambda: is_unreachable_for(breaker), "the outage is known")
        monkeypatch.setattr(listener, "LISTENER_WAIT_MAX_S", ENDLESS_S)
        time.sleep(2 * WAIT_S)  # The present wait ends, and one without an end begins.
    wait_for(lambda: is_back(breaker), "the shared circuit is used again")
    wait_for(lambda: view_of(breaker).is_subscribed, "changes are received")


def test_retry_thread_wakes_twice_a_second_at_most_while_a_log_line_is_held(
    site: Site, waits: list[tuple[str, Availability]]
) -> None:
    """The second return within a minute is logged later, and the thread that logs it waits."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    availability = server_for(site.client()).availability
    for _ in range(2):
        with lost(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is known")
        wait_for(lambda: is_back(breaker), "the shared circuit is used again")
    wait_for(lambda: (RETRY_THREAD_NAME, availability) in waits, "the thread waits")
    number, seconds = counted(waits, RETRY_THREAD_NAME, availability)
    assert 0 < number <= seconds / retry.RETRY_SLEEP_MAX_S + 2


def test_outage_wakes_the_retry_thread_that_holds_a_log_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next outage is retried at once, though the thread has nothing to do for a minute."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    monkeypatch.setattr(retry, "RETRY_SLEEP_MAX_S", ENDLESS_S)
    for _ in range(3):
        with lost(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is known")
        wait_for(lambda: is_back(breaker), "the shared circuit is used again")
        wait_for(lambda: health_of(breaker).push != "none" or not is_back(breaker), "changes are received")
