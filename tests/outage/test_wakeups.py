"""Wake-ups of the package's threads during an outage and after it: the threads wait and do not poll."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import ModuleType

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

#: Longest wait of the listener in production, seconds.  Other tests shorten the wait.
WAIT_S = 0.5

#: Wait of a thread that only another thread can end in time, seconds.
ENDLESS_S = 600.0

#: Seconds for which a test counts wake-ups.
COUNTED_S = 2.0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Availability]]:
    """Waits of threads so far: the name of the thread and the availability of the server."""
    begun: list[tuple[str, Availability]] = []
    wait_for_change = Availability.wait_for_change

    def recorded(availability: Availability, seen: int, timeout_s: float) -> None:
        begun.append((threading.current_thread().name, availability))
        wait_for_change(availability, seen, timeout_s)

    monkeypatch.setattr(Availability, "wait_for_change", recorded)
    return begun


@contextlib.contextmanager
def lost(site: Site) -> Iterator[None]:
    """Refuse all connections, and permit them again."""
    site.proxy.refuse()
    site.proxy.close_connections()
    yield
    site.proxy.listen()


@contextlib.contextmanager
def endless_waits(site: Site, module: ModuleType, name: str) -> Iterator[None]:
    """Have a thread wait until another thread wakes it, and wake the thread in the end."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, ENDLESS_S)
            yield
    finally:
        server_for(site.client()).availability.wake_waiters()


def count_waits(waits: list[tuple[str, Availability]], thread: str, availability: Availability) -> tuple[int, float]:
    """Count the waits that a thread begins in `COUNTED_S`, and return the number and the seconds."""
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
        wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
        wait_for(lambda: (LISTENER_THREAD_NAME, availability) in waits, "the listener waits")
        number, seconds = count_waits(waits, LISTENER_THREAD_NAME, availability)
        assert number <= seconds / WAIT_S + 2
    wait_for(lambda: is_back(breaker), "the shared circuit is in use again")


def test_end_of_an_outage_wakes_the_listener(site: Site) -> None:
    """The listener subscribes again at once, without polling for the end of the outage."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    with endless_waits(site, listener, "LISTENER_WAIT_MAX_S"):
        with lost(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
            time.sleep(2 * WAIT_S)  # The present wait ends, and one without an end begins.
        wait_for(lambda: is_back(breaker), "the shared circuit is in use again")
        wait_for(lambda: view_of(breaker).is_subscribed, "changes are received")


def test_retry_thread_wakes_twice_a_second_at_most_while_a_log_line_is_held(
    site: Site, waits: list[tuple[str, Availability]]
) -> None:
    """The second return within a minute is logged later, and the thread that logs it waits."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    availability = server_for(site.client()).availability
    for _ in range(2):
        with lost(site):
            wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
        wait_for(lambda: is_back(breaker), "the shared circuit is in use again")
    wait_for(lambda: (RETRY_THREAD_NAME, availability) in waits, "the thread waits")
    number, seconds = count_waits(waits, RETRY_THREAD_NAME, availability)
    assert 0 < number <= seconds / retry.RETRY_WAIT_MAX_S + 2


def test_outage_wakes_the_retry_thread_that_holds_a_log_line(site: Site) -> None:
    """In the next outage the thread retries at once, although it waits to log a held line."""
    breaker = settled(breaker_on(site.client(), timeout=5.0))
    with endless_waits(site, retry, "RETRY_WAIT_MAX_S"):
        for _ in range(3):
            with lost(site):
                wait_for(lambda: is_unreachable_for(breaker), "the outage is noticed")
            wait_for(lambda: is_back(breaker), "the shared circuit is in use again")
            wait_for(lambda: health_of(breaker).push != "none" or not is_back(breaker), "changes are received")
