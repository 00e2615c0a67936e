"""A circuit on a cluster lives on the node that serves its slot, and moves with it; nobody who calls notices."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis import CircuitRedisStorage
from pybreaker_redis._redis import cluster as cluster_module
from pybreaker_redis._redis.cluster import ClusterTopology, topology_behind_node, topology_of
from pybreaker_redis._redis.deadline import deadline, seconds_left
from pybreaker_redis._redis.keys import circuit_keys, slot_of
from pybreaker_redis._replica import subscription
from pybreaker_redis._replica.listener import Listener, listener_for
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.table import server_for
from tests.support import servers
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.cluster import Nodes
from tests.support.fleet import DependencyDown, Fleet, Spec, Worker
from tests.support.inspect import listeners, view_of
from tests.support.logs import lines_of
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.places import cluster_client
from tests.support.servers import ONCE, FoundServer, no_server
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("nobody_listens", "patient")

NAMESPACE = "shop"
SLOT = slot_of(circuit_keys(NAMESPACE, needs_one_slot=True)[0])


@pytest.fixture(
    scope="module", params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none"
)
def every_cluster(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """Three primaries with a replica each, of each server at hand in turn."""
    if request.param is None:
        no_server()
    with Nodes(request.param.binary) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def _one_cluster(preferred: FoundServer) -> Iterator[Nodes]:
    with Nodes(preferred.binary) as nodes:
        yield nodes


def emptied(nodes: Nodes) -> Nodes:
    """With nothing in it, and every node there; and nobody listens any more for tests that have ended."""
    gc.collect()
    for node in nodes.all:
        node.start()
    nodes.wait_until_whole()
    for slot in (0, 8000, 16000):
        nodes.run(nodes.primary_of(slot), "FLUSHALL")
    return nodes


@pytest.fixture
def cluster(_one_cluster: Nodes) -> Nodes:
    """The preferred server's, empty."""
    return emptied(_one_cluster)


def client_of(nodes: Nodes, **words: Any) -> Any:
    """As people make it."""
    return cluster_client(next(node.port for node in nodes.all if node.pid), **words)


def at(nodes: Nodes) -> str:
    """Where the circuit lies, as health says it."""
    return f"127.0.0.1:{nodes.primary_of(SLOT).port}/0"


def lies(nodes: Nodes, name: str = "state") -> bytes | None:
    """What lies in the cluster."""
    found: bytes | None = nodes.run(nodes.primary_of(SLOT), "GET", f"{{{NAMESPACE}}}:pybreaker:{name}")
    return found


# -- a whole life ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [10.0, None], ids=["bounded", "as it is"])
def test_circuit_lives_in_a_cluster_as_anywhere_else(every_cluster: Nodes, timeout: float | None):
    """Recognised by its client: one slot, pushes heard across processes' storages, one probe, one truth."""
    nodes = emptied(every_cluster)
    words = {"fail_max": 3, "reset_timeout": 60, "timeout": timeout}
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, **words)) for _ in range(2))
    fails(one, 2)
    assert other.fail_counter == 2
    fails(other)
    assert other.current_state == "open"
    wait_for(lambda: one.current_state == "open", "the trip is heard")
    assert lies(nodes) == b"open"
    with pytest.raises(pybreaker.CircuitBreakerError):
        one.call(up)
    admitted = []

    def probe() -> None:
        admitted.append("probe")
        with pytest.raises(pybreaker.CircuitBreakerError):
            other.call(up)

    def is_admitted() -> bool:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            one.call(probe)
        return bool(admitted)

    one.reset_timeout = 0.05
    wait_for(is_admitted, "the probe")
    wait_for(lambda: other.current_state == "closed", "the recovery is heard")
    assert (health_of(one).server, health_of(one).mode) == (at(nodes), "lua")
    assert health_of(one).push == ("tracking" if _PROTOCOL_3 else "channel")


_PROTOCOL_3 = int(redis.__version__.split(".")[0]) >= 5


def test_foreign_writer_is_noticed_in_a_cluster(every_cluster: Nodes):
    """An operator with redis-cli opens the circuit of all."""
    nodes = emptied(every_cluster)
    breaker = settled(breaker_on(client_of(nodes), NAMESPACE, max_staleness=0.5))
    nodes.run(nodes.primary_of(SLOT), "SET", f"{{{NAMESPACE}}}:pybreaker:state", "open")
    took = wait_for(lambda: breaker.current_state == "open", "it is noticed")
    # A second to notice, on a machine that does other things too.
    assert took < 0.5 + 1.0


def test_forged_push_changes_no_circuit_in_a_cluster(every_cluster: Nodes):
    """A node passes on what is published at any other, whatever the rights of the publisher."""
    nodes = emptied(every_cluster)
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, max_staleness=60)) for _ in range(2))
    channel = one._state_storage._core.shared.selector.current.channel
    known = view_of(one).cached
    now_ms = int(time.time() * 1000)
    for _ in range(20):
        nodes.run(nodes.primary_of(SLOT), "PUBLISH", channel, f"{now_ms} 999999999999 open {now_ms}  0 0 0")
        assert one.call(up) == other.call(up) == "answer"
    other.open()
    wait_for(lambda: one.current_state == "open", "the trip is read")
    assert view_of(one).cached.generation == known.generation + 1


def test_tag_of_a_namespace_is_respected(cluster: Nodes):
    """Whoever has put keys of an application into one slot finds the circuit there, and stock workers do, too."""
    breaker = breaker_on(client_of(cluster), "{shop}:payments")
    breaker.call(up)
    stock = pybreaker.CircuitRedisStorage("closed", client_of(cluster), "{shop}:payments", cluster_mode=True)
    breaker.open()
    assert stock.state == "open"


def test_circuits_of_all_nodes_are_kept_true_by_one_process(cluster: Nodes):
    """One thread and one line for each node, and one poll for all circuits there, whatever their slots."""
    client = client_of(cluster)
    breakers = [settled(breaker_on(client, f"circuit {number}", max_staleness=0.3)) for number in range(30)]
    assert len({health_of(breaker).server for breaker in breakers}) == 3
    wait_for(lambda: len(listeners()) == 3, "the listeners of earlier tests have ended, those of three nodes not")
    for breaker in breakers[::7]:
        name = health_of(breaker).circuit
        key = f"{{{name}}}:pybreaker:state"
        cluster.run(cluster.primary_of(slot_of(key)), "SET", key, "open")
        wait_for(lambda breaker=breaker: breaker.current_state == "open", "it is noticed")
    assert [breaker.current_state for breaker in breakers].count("open") == len(breakers[::7])


def has_moved(tenancy: Any) -> bool:
    """What the thread that asks again does: while a node takes over, there may be nobody who serves a slot."""
    try:
        return bool(tenancy.move_if_relocated())
    except (LookupError, ConnectionError, redis.RedisError):
        return False


# -- it moves ----------------------------------------------------------------------------------------------------------


def test_planned_failover_costs_a_call_a_round_trip(cluster: Nodes, caplog):
    """The old primary says who has taken over; there is nothing to wait for, and nothing to say."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breakers = [settled(breaker_on(client_of(cluster), NAMESPACE, max_staleness=0.3)) for _ in range(2)]
    cluster.fail_over(SLOT)
    spell = calls(breakers[0], 0.5, failing=0.2)
    assert spell.unexpected == []
    settled(breakers[0]).open()
    wait_for(lambda: breakers[1].current_state == "open", "the others hear it")
    assert lies(cluster) == b"open"
    assert {health_of(breaker).server for breaker in breakers} == {at(cluster)}
    wait_for(lambda: len(listeners()) == 1, "nobody listens to the old one any more")
    assert lines_of(caplog) == []


def test_killed_primary_is_replaced_without_an_error(cluster: Nodes, caplog, report):
    """Until another has taken over each process protects itself; what it has learned is shared there."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, fail_max=3, reset_timeout=60))
    killed = cluster.primary_of(SLOT)
    killed.kill()
    began = time.monotonic()
    spell = calls(breaker, 0.5, failing=1.0)
    assert (spell.unexpected, spell.reached) == ([], 3)
    cluster.wait_until_replaced(killed, SLOT)
    took_over = time.monotonic()
    wait_for(lambda: is_back(breaker), "it goes by the shared circuit again", within=30)
    report(
        f"cluster's primary killed: another one had taken over after {took_over - began:.1f} s, "
        f"the circuit was there {time.monotonic() - took_over:.2f} s later"
    )
    assert lies(cluster) == b"open"
    wait_for(lambda: len(lines_of(caplog)) == 2, "both lines")
    away, moved = lines_of(caplog)
    assert "is away" in away
    assert "its circuits live on other nodes of the cluster" in moved


def test_dead_primary_keeps_no_circuit_of_another_away(cluster: Nodes):
    """A third of the slots is out of reach; the others' circuits go on being shared."""
    client = client_of(cluster)
    mine = settled(breaker_on(client, NAMESPACE))
    names = (f"circuit {number}" for number in range(1000))
    elsewhere = next(
        name for name in names if cluster.primary_of(slot_of(f"{{{name}}}")) is not cluster.primary_of(SLOT)
    )
    others = settled(breaker_on(client, elsewhere))
    cluster.primary_of(SLOT).kill()
    wait_for(lambda: is_unreachable_for(mine), "it is away")
    assert not health_of(others).is_own
    fails(others)
    assert others.fail_counter == 1
    wait_for(lambda: is_back(mine), "another one has taken over", within=30)


def test_slot_that_moves_takes_its_circuit_along(every_cluster: Nodes, caplog):
    """While it is under way no node answers for all keys; before and after there is one truth."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    nodes = emptied(every_cluster)
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, fail_max=3, max_staleness=0.3)) for _ in range(2))
    spells = []

    def go_on() -> None:
        spells.append(calls(one, 1.0, failing=1.0))
        assert health_of(one).is_own

    nodes.move(SLOT, pause=go_on)
    (spell,) = spells
    assert spell.unexpected == []
    # Ten times in this second it is asked whether the move is over; a busy machine may be slow now and then.
    assert spell.waits <= 2
    # Whether the failure before or the one after the news of the move was the first to be counted alone.
    assert spell.reached == 3
    wait_for(lambda: is_back(one), "it is shared again")
    wait_for(lambda: other.current_state == "open", "what was learned meanwhile is the others', too")
    assert lies(nodes) == b"open"
    assert (health_of(one).server, health_of(other).server) == (at(nodes), at(nodes))
    assert len([line for line in lines_of(caplog) if "no usable answer" in line]) <= 2


def test_stuck_slot_makes_nobody_look_for_its_node(cluster: Nodes, monkeypatch):
    """The node that answers says where the circuit lies; to ask silent ones ten times a second makes callers wait."""
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, fail_max=10**6))
    fails(breaker)
    looked: list[Any] = []
    monkeypatch.setattr(ClusterTopology, "refresh", lambda self, avoid=None: looked.append(avoid))
    cluster.move(SLOT, pause=lambda: calls(breaker, 0.5, failing=0.5))
    wait_for(lambda: is_back(breaker), "it is shared again")
    assert looked == []


def test_open_circuit_survives_every_move(cluster: Nodes):
    """Failover and reshard: nothing is let through, and the opening time is the same."""
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, reset_timeout=60))
    breaker.open()
    opened_at = lies(cluster, "opened_at")
    cluster.fail_over(SLOT)
    spell = calls(breaker, 0.2, failing=0.0)
    cluster.move(SLOT)
    after = calls(breaker, 0.2, failing=0.0)
    assert (spell.reached, after.reached, spell.unexpected, after.unexpected) == (0, 0, [], [])
    wait_for(lambda: not health_of(breaker).is_own or calls(breaker, 0.05, failing=0.0).reached, "it is shared")
    assert (lies(cluster), lies(cluster, "opened_at")) == (b"open", opened_at)


def test_slot_that_nobody_serves_is_one_circuits_own_trouble(cluster: Nodes, caplog):
    """Where a cluster goes on without some of its slots, the others' circuits go on being shared."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    client, node = client_of(cluster), cluster.primary_of(SLOT)
    names = (f"circuit {number}" for number in range(1000))
    beside = next(name for name in names if cluster.primary_of(slot_of(f"{{{name}}}")) is node)
    mine, other = (breaker_on(client, name, max_staleness=0) for name in (NAMESPACE, beside))
    fresh = breaker_on(client_of(cluster), NAMESPACE, max_staleness=0)
    for one in cluster.all:
        cluster.run(one, "CONFIG", "SET", "cluster-require-full-coverage", "no")
    try:
        for one in cluster.all:
            cluster.run(one, "CLUSTER", "DELSLOTS", SLOT)
        fails(mine)
        fails(other, 3)
        assert (health_of(mine).condition, health_of(other).condition) == ("refused", "connected")
        fresh.call(up)
        assert health_of(fresh).is_own
    finally:
        cluster.run(node, "CLUSTER", "ADDSLOTS", SLOT)
        cluster.wait_until_whole()
        for one in cluster.all:
            cluster.run(one, "CONFIG", "SET", "cluster-require-full-coverage", "yes")
    assert other.fail_counter == 3
    wait_for(lambda: is_back(mine), "it is shared again")
    said = lines_of(caplog)
    assert not any("is away" in line for line in said)


def test_node_that_was_taken_out_of_the_cluster_is_left(cluster: Nodes):
    """It answers, and knows of nobody any more who serves a slot; the others do."""
    breaker = breaker_on(client_of(cluster), NAMESPACE, max_staleness=0)
    breaker.call(up)
    old = cluster.primary_of(SLOT)
    new = cluster.fail_over(SLOT)
    wait_for(lambda: "myself,slave" in cluster.text(old, "CLUSTER", "NODES"), "it follows")
    cluster.run(old, "CLUSTER", "RESET")
    try:
        fails(breaker)
        wait_for(lambda: is_back(breaker), "it is shared again")
        assert health_of(breaker).server == f"127.0.0.1:{new.port}/0"
    finally:
        cluster.run(old, "CLUSTER", "MEET", "127.0.0.1", new.port)
        wait_for(lambda: cluster.id(new) in cluster.text(old, "CLUSTER", "NODES"), "they know each other")
        wait_for(lambda: "cluster_state:ok" in cluster.text(old, "CLUSTER", "INFO"), "it knows the others", within=30)
        cluster.run(old, "CLUSTER", "REPLICATE", cluster.id(new))
        cluster.wait_until_whole()


def test_callers_take_turns_where_no_thread_may_be_started(cluster: Nodes, monkeypatch):
    """Under uWSGI without threads: whose turn it is to ask finds out who has taken over, too."""
    breaker = breaker_on(client_of(cluster), NAMESPACE, fail_max=3, reset_timeout=60, max_staleness=0)
    breaker.call(up)
    monkeypatch.setattr(
        Server,
        "_ensure_retry_thread",
        lambda self: bool(self.availability.has_retry_thread and self.availability.set_retry_thread(False)) and False,
    )
    killed = cluster.primary_of(SLOT)
    killed.kill()
    assert calls(breaker, 0.2, failing=1.0).unexpected == []
    cluster.wait_until_replaced(killed, SLOT)
    wait_for(lambda: is_back(breaker), "a caller has found it", within=30)
    assert lies(cluster) == b"open"


def test_call_that_the_old_node_never_answered_says_nothing_of_the_new_one(cluster: Nodes, caplog):
    """Somebody else has taken the circuit there while it waited: the other circuits there go on being shared."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = breaker_on(client_of(cluster), NAMESPACE, max_staleness=0)
    breaker.call(up)
    tenancy = breaker._state_storage._core
    began = time.monotonic()
    waits = threading.Thread(target=lambda: tenancy._note_failure(TimeoutError("of the old one"), began))
    cluster.fail_over(SLOT)
    # As the thread does that asks again for the old one's circuits; not every node knows at once who has taken over.
    wait_for(lambda: has_moved(tenancy), "it has moved")
    wait_for(lambda: is_back(breaker), "the new one answers")
    said = lines_of(caplog)
    waits.start()
    waits.join()
    assert health_of(breaker).condition == "connected"
    assert lines_of(caplog) == said


def test_nobody_listens_for_ever_where_a_circuit_was_left_that_moment(cluster: Nodes, monkeypatch):
    """One thread has begun to listen to the old node while another was told of the move."""
    breaker = breaker_on(client_of(cluster), NAMESPACE)
    breaker.call(up)
    shared = breaker._state_storage._core.shared
    shared.forget_location()
    breaker._state_storage._core._locate()
    heard: list[Listener] = []

    leaves = threading.Thread(target=shared.forget_location)

    def late(*arguments: Any) -> Listener | None:
        leaves.start()
        leaves.join(0.1)
        heard.append(listener_for(*arguments))
        return heard[-1]

    monkeypatch.setattr(subscription, "listener_for", late)
    breaker._state_storage._core.prepare_call(has_several_breakers=False)
    leaves.join()
    assert not any(item.view is shared._view for item in heard[0].subscriber_table.snapshot())
    monkeypatch.undo()
    settled(breaker)


def test_circuit_that_moves_in_a_child_waits_for_no_thread_of_the_parent(cluster: Nodes):
    """Its listener may have been forked in the middle of anything, its lock held for ever."""
    shared = settled(breaker_on(client_of(cluster), NAMESPACE))._state_storage._core.shared
    listener, shared._subscription._pid = shared._subscription._listener, os.getppid()
    with listener._lock:
        leaves = threading.Thread(target=shared.forget_location, daemon=True)
        leaves.start()
        leaves.join(2)
        assert not leaves.is_alive()


def test_node_that_has_taken_over_and_does_not_answer_is_away(cluster: Nodes, caplog):
    """Whoever is sent there goes on by himself, and somebody asks there again."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, timeout=0.25))
    tenancy = breaker._state_storage._core
    old = cluster.primary_of(SLOT)
    there = cluster.replica_of(old)
    cluster.fail_over(SLOT)
    # Else the old one would take over again soon.
    cluster.run(old, "CONFIG", "SET", "cluster-replica-no-failover", "yes")
    there.pause()
    try:
        # As the thread does that asks again for the old one; not every node knows of the new one at once.
        wait_for(lambda: has_moved(tenancy), "it has moved")
        assert health_of(breaker).condition == "unreachable"
        assert not has_moved(tenancy)
    finally:
        there.resume()
        cluster.run(old, "CONFIG", "SET", "cluster-replica-no-failover", "no")
    wait_for(lambda: is_back(breaker), "it is back", within=30)


# -- other ways in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_mode", [True, False])
def test_plain_client_of_one_node_finds_the_others(cluster: Nodes, cluster_mode: bool):
    """An endpoint for configuration is a node: its redirections are followed, and keys that it refuses get a tag."""
    wrong = next(node for node in cluster.all[:3] if node is not cluster.primary_of(SLOT) and node.port)
    breaker = settled(breaker_on(redis.Redis(port=wrong.port, **ONCE), NAMESPACE, cluster_mode=cluster_mode))
    breaker.open()
    assert lies(cluster) == b"open"
    assert health_of(breaker).server == at(cluster)
    cluster.fail_over(SLOT)
    wait_for(lambda: health_of(breaker).server == at(cluster) or calls(breaker, 0.01, failing=0.0).unexpected, "moved")


def test_plain_client_in_cluster_mode_asks_for_no_two_circuits_at_once(server):
    """Behind a proxy there may be a cluster, though it looks like one server."""
    breakers = [settled(breaker_on(server.client(), f"c{number}", cluster_mode=True)) for number in range(3)]
    with contextlib.closing(server.client()) as client, _commands_of(client) as seen:

        def are_polled() -> bool:
            for breaker in breakers:
                breaker.call(up)
            return sum("pybreaker:fail_counter" in command for command in seen()) >= 6

        wait_for(are_polled, "two polls")
        asked = [command for command in seen() if "pybreaker:" in command]
    assert all(len({part.split("}")[0] for part in command.split() if "{" in part}) == 1 for command in asked)


@contextlib.contextmanager
def _commands_of(client: redis.Redis) -> Iterator[Callable[[], list[str]]]:
    """What the server is asked meanwhile, as its slow log has it: for which nothing is too fast."""
    before = client.config_get("slowlog*")
    client.slowlog_reset()
    client.config_set("slowlog-max-len", 10000)
    client.config_set("slowlog-log-slower-than", 0)
    try:
        yield lambda: [entry["command"].decode() for entry in client.slowlog_get(10000)]
    finally:
        for name, value in before.items():
            client.config_set(name, value)


# -- what is known of a cluster ----------------------------------------------------------------------------------------


def known(*seeds: tuple[str, int], node: Callable[..., Any] | None = None) -> ClusterTopology:
    """A cluster of which nothing is known but where to ask."""

    def plain(address: tuple[str, int]) -> redis.Redis:
        return redis.Redis(host=address[0], port=address[1], **ONCE)

    return ClusterTopology(object(), node or plain, list(seeds), lambda slot: None, lambda address: address)


def test_nobody_knows_who_serves_a_slot():
    """That is an outage like any other."""
    with pytest.raises(ConnectionError, match="slot 17"):
        known(("127.0.0.1", 1)).primary_of(17)


def test_nodes_that_do_not_answer_are_passed_over(cluster: Nodes):
    """Whoever failed is asked last; the others say who serves what, and who else there is."""
    dead, living = ("127.0.0.1", 1), ("127.0.0.1", cluster.all[4].port)
    found = known(dead, living)
    found.refresh(avoid=living)
    assert found.primary_of(SLOT) == ("127.0.0.1", cluster.primary_of(SLOT).port)
    assert found._known_nodes == {("127.0.0.1", node.port) for node in cluster.all}


def test_nodes_that_have_been_replaced_are_asked_last(cluster: Nodes, monkeypatch):
    """New ones may come with new addresses, year after year; the ones to begin with may be names that stay."""
    gone, first = ("127.0.0.1", 1), ("127.0.0.1", cluster.all[0].port)
    found = known(first)
    found.record_redirection(SLOT, gone)
    found.client_of_node(gone)
    while gone in found._known_nodes:
        found._refreshed_at = 0
        found.refresh()
    assert gone not in found._nodes, "nothing is kept of it"
    found._seed_nodes = {gone}
    asked: list[Any] = []
    monkeypatch.setattr(ClusterTopology, "_query_slots", lambda self, address: asked.append(address))
    found._refreshed_at = 0
    found.refresh(avoid=first)
    assert len(asked) == len(cluster.all) + 1
    assert asked[-2:] == [gone, first]


def test_circuits_of_a_client_share_what_is_known_of_the_cluster_behind_it(cluster: Nodes):
    """Else each of hundreds would ask for itself when their node has gone."""
    client = redis.Redis(port=cluster.all[0].port, **ONCE)
    one, other = (breaker_on(client, f"circuit {number}", cluster_mode=True) for number in range(2))
    clusters = [breaker._state_storage._core._locator for breaker in (one, other)]
    assert topology_behind_node(client) is topology_behind_node(client)
    for whereabouts in clusters:
        whereabouts.locate()
        assert whereabouts.relocate(redis.ResponseError("MOVED 1 127.0.0.1:1"), client)
    assert len({id(whereabouts._cluster) for whereabouts in clusters}) == 1


def test_cluster_is_not_asked_once_for_each_circuit(cluster: Nodes, monkeypatch):
    """Hundreds of circuits are looked for at the same moment."""
    monkeypatch.setattr(cluster_module, "SURVEY_PAUSE_S", 60)
    found = known(("127.0.0.1", cluster.all[0].port))
    asked: list[Any] = []
    ask = ClusterTopology._query_slots
    monkeypatch.setattr(
        ClusterTopology, "_query_slots", lambda self, address: asked.append(address) or ask(self, address)
    )
    for _ in range(10):
        found.refresh()
    assert len(asked) == 1


def test_silent_nodes_are_waited_for_once_and_not_all_the_time(cluster: Nodes, monkeypatch):
    """Hundreds of circuits of one node are looked for one after the other; whoever answers needs some time, too."""
    monkeypatch.setattr(cluster_module, "SURVEY_PAUSE_S", 60)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        found = known(("127.0.0.1", silent.getsockname()[1]))
        with deadline(2.0):
            found.refresh()
            left = seconds_left()
        assert left is not None
        assert 0.5 < left <= 1.0
        began = time.monotonic()
        found.refresh()
        assert time.monotonic() < began + 0.5


def test_time_that_is_over_is_not_spent_on_further_nodes(monkeypatch):
    """However many they are."""
    found = known(*((f"10.0.0.{number}", 1) for number in range(5)))
    asked: list[Any] = []
    monkeypatch.setattr(ClusterTopology, "_query_slots", lambda self, address: asked.append(address))
    with deadline(0):
        found.refresh()
    assert asked == []


def test_node_without_slots_knows_nothing(server, monkeypatch):
    """One that has been taken out of the cluster is passed over as well."""
    found = known(("127.0.0.1", 1))
    monkeypatch.setattr(ClusterTopology, "_query_slots", lambda self, address: [])
    found.refresh()
    with pytest.raises(ConnectionError):
        found.primary_of(0)


def test_answer_without_slots_is_no_answer():
    """A node that was taken out of its cluster still talks."""

    class Connection:
        def __init__(self, **words: Any) -> None:
            """Like redis-py's."""

        def connect(self) -> None:
            """Nothing to do."""

        def disconnect(self) -> None:
            """Nothing to do."""

        def send_command(self, *command: str) -> None:
            """It is heard."""

        def read_response(self) -> list[Any]:
            """It serves nothing, and knows of nobody who does."""
            return []

    pool = SimpleNamespace(connection_class=Connection, connection_kwargs={"host": "there", "port": 1})
    found = known(("there", 1), node=lambda address: SimpleNamespace(connection_pool=pool))
    with pytest.raises(ConnectionError, match="slot 17"):
        found.primary_of(17)
    assert found._known_nodes == {("there", 1)}


def test_circuit_that_has_moved_to_a_server_that_is_away_waits_there(client: redis.Redis, monkeypatch):
    """Somebody asks there already."""
    breaker = breaker_on(client, NAMESPACE, max_staleness=0)
    breaker.call(up)
    tenancy = breaker._state_storage._core
    assert tenancy.server
    monkeypatch.setattr(tenancy._locator, "refresh_location", lambda: True)
    monkeypatch.setattr(tenancy, "load", lambda: pytest.fail("nobody has to ask"))
    with monkeypatch.context() as patched:
        patched.setattr(tenancy.server.availability, "outage", "there is one")
        assert tenancy.move_if_relocated()


def test_news_that_a_circuit_has_moved_are_news_once(client: redis.Redis):
    """Of two threads that find it out the later one leaves the new home alone."""
    breaker = breaker_on(client, NAMESPACE)
    breaker.call(up)
    selector = breaker._state_storage._core.shared.selector
    present = selector.current
    breaker._state_storage._core.shared.forget_location(replace(present))
    assert selector.current is present


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("3999 10.0.0.7:6381", ("10.0.0.7", 6381)),
        ("MOVED 3999 10.0.0.7:6381", ("10.0.0.7", 6381)),
        ("3999 :6381", ("asked", 6381)),
        ("3999 ?:6381", ("asked", 6381)),
        ("3999 2001:db8::7:6381", ("2001:db8::7", 6381)),
        ("Command # 1 (SET a:1 2) of pipeline caused error: 3999 node.example:6381", ("node.example", 6381)),
        (
            "Command # 1 (SET 5 eu:7:pybreaker:state open) of pipeline caused error: 3999 10.0.0.7:6381",
            ("10.0.0.7", 6381),
        ),
        ("no such thing", None),
    ],
)
def test_redirections_are_understood(said: str, address: tuple[str, int] | None):
    """Of every client library, in pipelines, and from nodes that do not know their own name."""
    error = type("MovedError", (Exception,), {})(said)
    assert known().redirection_target(error, ("asked", 1)) == address
    assert known().redirection_target(ValueError("other"), ("asked", 1)) is None


def test_client_that_leads_nowhere_else_is_not_followed(tmp_path):
    """A unix socket is not a cluster's endpoint, and what is no client of a server is not one either."""
    assert topology_behind_node(redis.Redis(unix_socket_path=str(tmp_path / "nobody"))) is None
    assert topology_behind_node(SimpleNamespace(connection_pool=None)) is None
    whereabouts = CircuitRedisStorage("closed", redis.Redis(unix_socket_path="/nowhere"))._core._locator
    whereabouts._client = redis.Redis(unix_socket_path="/nowhere")
    moved = type("MovedError", (Exception,), {})
    assert not whereabouts.relocate(moved("1 there:1"), whereabouts._client)
    whereabouts._client = redis.Redis(port=1)
    assert not whereabouts.relocate(moved("no such thing"), whereabouts._client)


def test_node_knows_best_what_it_does_not_serve(cluster: Nodes):
    """The others may name it for a while; a client of one node alone has nobody else to ask."""
    error = redis.ResponseError("CLUSTERDOWN Hash slot not served")
    for client in (client_of(cluster), redis.Redis(port=cluster.primary_of(SLOT).port, **ONCE)):
        storage = CircuitRedisStorage("closed", client, NAMESPACE, cluster_mode=True)
        pybreaker.CircuitBreaker(state_storage=storage).call(up)
        whereabouts = storage._core._locator
        if topology_of(client):
            with pytest.raises(LookupError, match="not served"):
                whereabouts.relocate(error, client)
        else:
            assert not whereabouts.relocate(error, client)


def test_addresses_are_those_by_which_they_are_reached_from_here():
    """Behind an address translation the cluster's own addresses lead nowhere (redis-py's `address_remap`)."""
    manager = SimpleNamespace(
        startup_nodes={"a": SimpleNamespace(host="a", port=1)},
        nodes_cache={},
        slots_cache={5: [SimpleNamespace(host="outside", port=2)]},
        remap_host_port=lambda host, port: ("outside", port),
        connection_kwargs={"password": "secret"},
        create_redis_node=lambda host, port, **words: (host, port, words),
    )
    found = topology_of(SimpleNamespace(nodes_manager=manager))
    assert found is topology_of(SimpleNamespace(nodes_manager=manager))
    assert found
    assert found.primary_of(5) == ("outside", 2)
    assert found.redirection_target(type("MovedError", (Exception,), {})("5 inside:7"), ("a", 1)) == ("outside", 7)
    assert found.client_of_node(("outside", 2)) == ("outside", 2, {"password": "secret"})
    with pytest.raises(ConnectionError):
        found.primary_of(6)


def test_redis_py_cluster_is_understood():
    """The client of those who stay with redis-py 3; with a translation of addresses of its own."""

    class Nodes3:
        startup_nodes = ({"host": "a", "port": "1"},)
        nodes = {"b:2": {"host": "b", "port": 2}}  # noqa: RUF012
        slots = {5: [{"host": "b", "port": 2}]}  # noqa: RUF012

        @staticmethod
        def remap_internal_node_object(node: list[Any]) -> list[Any]:
            return ["outside", node[1]]

        @staticmethod
        def get_redis_link(host: str, port: int) -> tuple[str, int]:
            return host, port

    pool = type("ClusterConnectionPool", (), {"__module__": "rediscluster.connection", "nodes": Nodes3()})()
    found = topology_of(SimpleNamespace(connection_pool=pool))
    assert found
    assert found._known_nodes == {("a", 1), ("b", 2)}
    assert found.primary_of(5) == ("b", 2)
    assert found.client_of_node(("b", 2)) == ("b", 2)
    assert found.redirection_target(type("MovedError", (Exception,), {})("5 inside:7"), ("a", 1)) == ("outside", 7)
    with pytest.raises(ConnectionError):
        found.primary_of(6)


def test_cluster_whose_nodes_have_no_translation():
    """A client that has none, and calls its nodes after Valkey."""
    words = {"startup_nodes": {}, "nodes_cache": {}, "slots_cache": {}, "connection_kwargs": {}}
    manager = SimpleNamespace(**words, create_valkey_node=lambda host, port: (host, port))
    found = topology_of(SimpleNamespace(nodes_manager=manager))
    assert found
    assert found.redirection_target(type("MovedError", (Exception,), {})("5 there:7"), ("a", 1)) == ("there", 7)
    assert found.client_of_node(("there", 7)) == ("there", 7)


def test_nodes_are_servers_like_any_other(cluster: Nodes):
    """Two cluster clients of one process share the guards of the nodes, and each keeps a client of a node."""
    one, other = (topology_of(client_of(cluster)) for _ in range(2))
    assert one
    assert other
    address = one.primary_of(SLOT)
    assert one.client_of_node(address) is one.client_of_node(address)
    kept = server_for(one.client_of_node(address))
    assert kept is server_for(other.client_of_node(address))


# -- a fleet -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ride:
    """What one worker went through.

    Attributes:
        made: Calls.
        slowest: Seconds that one took.
        homes: When the worker went by which server, or by itself (empty): monotonic seconds, and the server.
    """

    made: int
    slowest: float
    homes: list[tuple[float, str]]


def ride(worker: Worker, until: float, failing: float) -> Ride:
    """Calls as fast as possible; any error but the dependency's and the breaker's ends the test."""
    chance = random.Random(worker.index)
    made, slowest, homes = 0, 0.0, [(0.0, "")]

    def dependency() -> None:
        if chance.random() < failing:
            raise DependencyDown

    while not worker.dismissed and (time.monotonic() < until or (not homes[-1][1] and time.monotonic() < until + 20)):
        for _ in range(50):
            began = time.monotonic()
            with contextlib.suppress(DependencyDown, pybreaker.CircuitBreakerError):
                worker.breaker.call(dependency)
            slowest = max(slowest, time.monotonic() - began)
            made += 1
        health = worker.storage.health()
        home = "" if health.is_own else health.server
        if home != homes[-1][1]:
            homes.append((time.monotonic(), home))
    return Ride(made, slowest, homes)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["failover", "killed", "reshard"])
def test_8_workers_at_full_speed_meet_no_error(cluster: Nodes, tmp_path, report, event: str):
    """Must show: 0 errors, the slowest call, and how long it takes until all are where the circuit is."""
    spec = Spec(
        "ours",
        f"cluster:{cluster.all[0].port if cluster.all[0].pid else cluster.all[1].port}",
        str(tmp_path / "calls"),
        NAMESPACE,
        fail_max=10**6,
        max_staleness=0.5,
        timeout=2.0,
    )
    # A failover may need a second attempt.
    seconds = 3.0 if event == "reshard" else 8.0
    with Fleet([spec] * 8) as fleet:
        until = time.monotonic() + 1 + seconds
        rides: list[Ride] = []
        riding = threading.Thread(target=lambda: rides.extend(fleet.run(ride, until, 0.01)))
        riding.start()
        time.sleep(1)  # all are under way
        if event == "reshard":
            cluster.move(SLOT)
        elif event == "failover":
            cluster.fail_over(SLOT)
        else:
            killed = cluster.primary_of(SLOT)
            killed.kill()
            cluster.wait_until_replaced(killed, SLOT)
        done, home = time.monotonic(), at(cluster)
        riding.join(60)
    assert len(rides) == 8
    assert {went.homes[-1][1] for went in rides} == {home}
    agreed = max(went.homes[-1][0] for went in rides) - done
    report(
        f"cluster, {event}: 8 workers, {sum(went.made for went in rides)} calls, 0 errors, the slowest took "
        f"{max(went.slowest for went in rides) * 1000:.0f} ms; all at the new node {max(agreed, 0):.2f} s later"
    )
    assert agreed < 10  # on a machine that has nothing else to do it is less than one
