"""The application servers that people run: each of their workers takes part, and none of them is disturbed."""

from __future__ import annotations

import functools
import operator
import os
import signal
from collections.abc import Callable

import pytest

from tests.contrib.hosts.kinds import KINDS, Kind
from tests.contrib.hosts.shop import AT_ONCE, Answer, Shop

pytestmark = pytest.mark.hosts

#: What the storage is told if nothing else is said, seconds.
MAX_STALENESS = 1.0

#: Seconds, the most there can be: no view ends as long as a test waits; what a worker knows in time, it was told.
LASTING = 60.0

#: Seconds after which a worker must have heard what was pushed, however busy the machine is.
PUSHED_WITHIN = 5.0

#: The name of the thread that listens.
LISTENER = "pybreaker_redis listener"


def on(condition: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """Run a test on every host that is like this."""
    return pytest.mark.parametrize("kind", [*filter(condition, KINDS)], ids=operator.attrgetter("name"))


on_every_host = on(lambda kind: True)


@pytest.fixture
def lasting_shop(open_shop: Callable[..., Shop], kind: Kind) -> Callable[..., Shop]:
    """As `open_shop`; where threads can run, workers know in time only what they were told."""
    return functools.partial(open_shop, max_staleness=LASTING) if kind.hears else open_shop


def assert_all_reject(shop: Shop, tripped: float, within: float) -> None:
    """All workers reject calls; none that begins so many seconds after the trip reaches the dependency."""
    # A worker that does not know would go on with success, and so never find out by itself.
    shop.set_dependency("up")
    answers = shop.call_all("rejected")
    assert {answer.outcome for answer in answers if answer.began > tripped + within} <= {"rejected"}
    assert not shop.visits(since=tripped + within)


def listeners(shop: Shop) -> set[int]:
    """How many threads listen in each worker: as one number, if that is the same in all."""
    return {sum(LISTENER in name for name in answer.threads) for answer in shop.look_all().values()}


@on_every_host
def test_trip_in_one_worker_is_rejection_in_all(open_shop):
    """When some calls have failed, whoever made them, every worker rejects calls within ``max_staleness``."""
    shop = open_shop()
    shop.call_all("ok")
    assert_all_reject(shop, shop.trip(), MAX_STALENESS)


@on(lambda kind: kind.hears)
def test_trip_is_told_to_workers_that_would_not_ask(lasting_shop):
    """Workers hear of a trip in another process at once, long before what they know gets too old."""
    shop = lasting_shop()
    shop.call_all("ok")
    assert_all_reject(shop, shop.trip_elsewhere(), PUSHED_WITHIN)


@on_every_host
def test_recovery_is_one_probe_and_then_closed_in_all(open_shop):
    """While one call tries the dependency no other reaches it, its own worker's included; then all may call."""
    shop = open_shop(reset_timeout=0.5)
    shop.call_all("ok")
    shop.trip()
    shop.call_all("rejected")
    held, probe = shop.hold_probe()

    def others_rejected(answers: list[Answer]) -> bool:
        rejected = [answer.pid for answer in answers if answer.began > probe.began and answer.outcome == "rejected"]
        return len(rejected) > 4 * AT_ONCE and shop.workers() - {probe.pid} <= set(rejected)

    shop.ask_until("call", others_rejected, leave=True)
    assert shop.visits(since=held) == [probe]
    shop.set_dependency("up")
    answers = shop.call_all("ok")
    closed = min(answer.ended for answer in answers if answer.outcome == "ok")
    assert {answer.outcome for answer in answers if answer.began > closed + MAX_STALENESS} <= {"ok"}
    assert {answer.state for answer in shop.look_all().values()} == {"closed"}


@on_every_host
def test_each_worker_has_one_listener_and_its_master_none(open_shop, kind, listening):
    """A worker starts one thread and one connection when it first calls, if threads can run; a master never does."""
    shop = open_shop()
    assert listeners(shop) == {0}
    assert listening() == 0
    for _ in range(2):  # however often it calls
        shop.call_all("ok")
        shop.wait_for("a connection for each listener", lambda: listening() == kind.workers * kind.hears)
        assert listeners(shop) == {int(kind.hears)}
    if kind.forks:
        assert [node.threads() for node in shop.nodes] == [1]


@on(lambda kind: kind.preloads)
def test_call_in_master_before_it_forks_disturbs_no_worker(lasting_shop, kind):
    """Its workers do not take a listener that is the master's for their own, nor believe what only the master hears."""
    shop = lasting_shop(call_at_import=True)
    shop.call_all("ok")
    assert listeners(shop) == {int(kind.hears)}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSHED_WITHIN)


@on_every_host
def test_sigterm_ends_host_and_its_connections(open_shop, kind, listening):
    """A host whose workers listen ends when it is told to, in good order, and the server is rid of it."""
    shop = open_shop()
    shop.call_all("ok")
    # A Celery that is told to end a moment earlier may wait half a minute for a child that waits for it.
    shop.wait_for("nothing left to do", shop.idle)
    for node in shop.nodes:
        node.signal(signal.SIGTERM)
    assert {node.wait(kind.ends_within) for node in shop.nodes} == {0}
    assert not any(node.group() for node in shop.nodes)
    shop.wait_for("no connection left", lambda: listening() == 0)


@on(lambda kind: kind.reloads)
def test_reload_under_traffic_fails_no_request(lasting_shop):
    """SIGHUP replaces the workers while they are busy: nobody outside notices, and the new ones hear of a trip."""
    shop = lasting_shop()
    shop.call_all("ok")
    before = shop.workers()
    (node,) = shop.nodes
    node.signal(signal.SIGHUP)
    answers = shop.ask_until("call", lambda _: not before & shop.workers()) + shop.call_all("ok")
    assert {answer.outcome for answer in answers} == {"ok"}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSHED_WITHIN)


@on(lambda kind: kind.forks)
def test_worker_that_replaces_a_killed_one_takes_part(lasting_shop, kind, listening):
    """A worker's death disturbs nobody, and whoever comes in its place hears of a trip."""
    shop = lasting_shop()
    shop.call_all("ok")
    victim = min(shop.workers())
    os.kill(victim, signal.SIGKILL)
    shop.wait_for("a worker in its place", lambda: victim not in shop.workers() and len(shop.workers()) == kind.workers)
    shop.call_all("ok")
    if kind.hears:
        shop.wait_for("one connection for each worker", lambda: listening() == kind.workers)
    assert_all_reject(shop, shop.trip_elsewhere(), PUSHED_WITHIN)


@on(lambda kind: bool(kind.recycle))
def test_recycling_under_traffic_fails_no_request(lasting_shop):
    """Workers that end after some requests do so unnoticed, and those after them hear of a trip."""
    shop = lasting_shop(recycle=True)
    before = shop.workers()
    answers = shop.ask_until("call", lambda _: not before & shop.workers())
    # Else the first of the new ones end before the last have started.
    shop.rest = 0.1
    answers += shop.call_all("ok")
    assert {answer.outcome for answer in answers} == {"ok"}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSHED_WITHIN)
