"""Application servers: each worker takes part in the circuit, and the server works as without the package."""

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

#: Default staleness of the storage, seconds.
MAX_STALENESS = 1.0

#: Longest staleness, seconds: no view expires during a test, so only a push explains a notice.
PUSH_ONLY_STALENESS_S = 60.0

#: Seconds within which a push must have arrived, on a machine of any speed.
PUSH_MAX_S = 5.0

#: Name of the listener's thread.
LISTENER = "pybreaker_redis listener"


def on(condition: Callable[[Kind], bool]) -> pytest.MarkDecorator:
    """Run a test on every host with this property."""
    return pytest.mark.parametrize("kind", [*filter(condition, KINDS)], ids=operator.attrgetter("name"))


on_every_host = on(lambda kind: True)


@pytest.fixture
def push_only_shop(open_shop: Callable[..., Shop], kind: Kind) -> Callable[..., Shop]:
    """As `open_shop`, but with pushes alone where background threads run."""
    return (
        functools.partial(open_shop, max_staleness=PUSH_ONLY_STALENESS_S) if kind.has_background_threads else open_shop
    )


def assert_all_reject(shop: Shop, tripped: float, within: float) -> None:
    """Assert that all workers reject calls, and that no call after this time reaches the dependency."""
    # A worker with an old view would continue with successes, and therefore not notice by itself.
    shop.set_dependency("up")
    answers = shop.call_all("rejected")
    assert {answer.outcome for answer in answers if answer.began > tripped + within} <= {"rejected"}
    assert not shop.visits(since=tripped + within)


def listeners(shop: Shop) -> set[int]:
    """Return the numbers of listener threads of the workers, as a set."""
    return {sum(LISTENER in name for name in answer.threads) for answer in shop.look_all().values()}


@on_every_host
def test_trip_in_one_worker_rejects_calls_in_all(open_shop):
    """After some failed calls of any workers, every worker rejects calls within ``max_staleness``."""
    shop = open_shop()
    shop.call_all("ok")
    assert_all_reject(shop, shop.trip(), MAX_STALENESS)


@on(lambda kind: kind.has_background_threads)
def test_trip_is_pushed_to_workers_that_do_not_poll(push_only_shop):
    """Workers notice a trip in another process by a push, long before their views expire."""
    shop = push_only_shop()
    shop.call_all("ok")
    assert_all_reject(shop, shop.trip_elsewhere(), PUSH_MAX_S)


@on_every_host
def test_recovery_takes_one_probe_and_closes_in_all(open_shop):
    """While one call probes, all others are rejected, also in the same worker.  Then all are admitted."""
    shop = open_shop(reset_timeout=0.5)
    shop.call_all("ok")
    shop.trip()
    shop.call_all("rejected")
    held, probe = shop.hold_probe()

    def others_rejected(answers: list[Answer]) -> bool:
        rejected = [answer.pid for answer in answers if answer.began > probe.began and answer.outcome == "rejected"]
        return len(rejected) > 4 * AT_ONCE and shop.workers() - {probe.pid} <= set(rejected)

    shop.request_until("call", others_rejected, leave=True)
    assert shop.visits(since=held) == [probe]
    shop.set_dependency("up")
    answers = shop.call_all("ok")
    closed = min(answer.ended for answer in answers if answer.outcome == "ok")
    assert {answer.outcome for answer in answers if answer.began > closed + MAX_STALENESS} <= {"ok"}
    assert {answer.state for answer in shop.look_all().values()} == {"closed"}


@on_every_host
def test_each_worker_has_one_listener_and_its_master_none(open_shop, kind, listening):
    """A worker starts one thread and one connection at its first call, if threads can run.  A master starts none."""
    shop = open_shop()
    assert listeners(shop) == {0}
    assert listening() == 0
    for _ in range(2):  # also after further calls
        shop.call_all("ok")
        shop.wait_for(
            "a connection for each listener", lambda: listening() == kind.workers * kind.has_background_threads
        )
        assert listeners(shop) == {int(kind.has_background_threads)}
    if kind.forks:
        assert [node.threads() for node in shop.nodes] == [1]


@on(lambda kind: kind.preloads)
def test_call_in_a_master_before_its_fork_disturbs_no_worker(push_only_shop, kind):
    """Workers neither use a listener of their master nor the view that the master had at the fork."""
    shop = push_only_shop(call_at_import=True)
    shop.call_all("ok")
    assert listeners(shop) == {int(kind.has_background_threads)}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSH_MAX_S)


@on_every_host
def test_sigterm_ends_host_and_its_connections(open_shop, kind, listening):
    """A host with listeners ends in order after SIGTERM, and its connections are closed."""
    shop = open_shop()
    shop.call_all("ok")
    # Celery may wait half a minute for a child if SIGTERM arrives a moment earlier.
    shop.wait_for("all requests are acknowledged", shop.idle)
    for node in shop.nodes:
        node.signal(signal.SIGTERM)
    assert {node.wait(kind.ends_within) for node in shop.nodes} == {0}
    assert not any(node.group() for node in shop.nodes)
    shop.wait_for("no connection left", lambda: listening() == 0)


@on(lambda kind: kind.reloads)
def test_reload_under_traffic_fails_no_request(push_only_shop):
    """SIGHUP replaces the workers during requests without an error, and the new ones notice a trip."""
    shop = push_only_shop()
    shop.call_all("ok")
    before = shop.workers()
    (node,) = shop.nodes
    node.signal(signal.SIGHUP)
    answers = shop.request_until("call", lambda _: not before & shop.workers()) + shop.call_all("ok")
    assert {answer.outcome for answer in answers} == {"ok"}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSH_MAX_S)


@on(lambda kind: kind.forks)
def test_replacement_of_a_killed_worker_takes_part(push_only_shop, kind, listening):
    """The death of a worker causes no error, and its replacement notices a trip."""
    shop = push_only_shop()
    shop.call_all("ok")
    victim = min(shop.workers())
    os.kill(victim, signal.SIGKILL)
    shop.wait_for("a worker in its place", lambda: victim not in shop.workers() and len(shop.workers()) == kind.workers)
    shop.call_all("ok")
    if kind.has_background_threads:
        shop.wait_for("one connection for each worker", lambda: listening() == kind.workers)
    assert_all_reject(shop, shop.trip_elsewhere(), PUSH_MAX_S)


@on(lambda kind: bool(kind.recycle))
def test_recycling_under_traffic_fails_no_request(push_only_shop):
    """Workers that end after some requests cause no error, and their replacements notice a trip."""
    shop = push_only_shop(recycle=True)
    before = shop.workers()
    answers = shop.request_until("call", lambda _: not before & shop.workers())
    # Without a rest the first of the new workers end before the last have started.
    shop.rest = 0.1
    answers += shop.call_all("ok")
    assert {answer.outcome for answer in answers} == {"ok"}
    assert_all_reject(shop, shop.trip_elsewhere(), PUSH_MAX_S)
