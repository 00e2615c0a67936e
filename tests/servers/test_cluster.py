"""Circuits on a cluster: each circuit lies on the node that serves its slot, and moves with the slot."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
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
from pybreaker_redis._redis.connections.deadline import deadline, seconds_left
from pybreaker_redis._redis.keys import circuit_keys, slot_of
from pybreaker_redis._replica import subscription
from pybreaker_redis._replica.listener import Listener, listener_for
from pybreaker_redis._servers.server import Server
from pybreaker_redis._servers.table import server_for
from tests.support import servers
from tests.support.breakers import breaker_on, fails, settled, up
from tests.support.cluster import Nodes
from tests.support.fleet import DependencyDown, Fleet, Spec, Worker
from tests.support.inspect import (
    core_of,
    expire_topology,
    fail_circuit,
    known_nodes,
    listener_of,
    listeners,
    locate,
    locator_of,
    lock_of,
    nodes_with_clients,
    pretend_fork,
    replace_retry_start,
    replace_slot_query,
    selector_of,
    set_located_client,
    set_seed_nodes,
    shared_of,
    topology_of_locator,
    view_of,
)
from tests.support.logs import lines_of
from tests.support.outages import calls, health_of, is_back, is_unreachable_for
from tests.support.places import cluster_client
from tests.support.rights import PAGE, rights_of_page
from tests.support.servers import ONCE, FoundServer, no_server
from tests.support.wait import wait_for

pytestmark = pytest.mark.usefixtures("no_listeners", "patient")

NAMESPACE = "shop"
SLOT = slot_of(circuit_keys(NAMESPACE, needs_one_slot=True)[0])


@pytest.fixture(
    scope="module", params=servers.at_hand() or [None], ids=lambda found: servers.name_of(found) if found else "none"
)
def every_cluster(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """Yield three primaries with a replica each, once for each server found."""
    if request.param is None:
        no_server()
    with Nodes(request.param.binary) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def _one_cluster(preferred: FoundServer) -> Iterator[Nodes]:
    with Nodes(preferred.binary) as nodes:
        yield nodes


def reset(nodes: Nodes) -> Nodes:
    """Start every node, delete all keys, and end listeners of earlier tests."""
    gc.collect()
    for node in nodes.all:
        node.start()
    nodes.wait_until_whole()
    for slot in (0, 8000, 16000):
        nodes.run(nodes.primary_of(slot), "FLUSHALL")
    return nodes


@pytest.fixture
def cluster(_one_cluster: Nodes) -> Nodes:
    """Return an empty cluster of the preferred server."""
    return reset(_one_cluster)


def client_of(nodes: Nodes, **words: Any) -> Any:
    """Return a client of the cluster, as applications create it."""
    return cluster_client(next(node.port for node in nodes.all if node.pid), **words)


def location_of(nodes: Nodes) -> str:
    """Return the location of the circuit in the form that health shows."""
    return f"127.0.0.1:{nodes.primary_of(SLOT).port}/0"


def stored(nodes: Nodes, name: str = "state") -> bytes | None:
    """Return a value of the circuit as stored in the cluster."""
    found: bytes | None = nodes.run(nodes.primary_of(SLOT), "GET", f"{{{NAMESPACE}}}:pybreaker:{name}")
    return found


@pytest.mark.parametrize("timeout", [10.0, None], ids=["bounded", "as it is"])
def test_circuit_in_a_cluster_behaves_as_on_one_server(every_cluster: Nodes, timeout: float | None):
    """The client shows that there is a cluster.

    Keys share a slot, storages receive pushes, and one caller gets the probe.
    """
    nodes = reset(every_cluster)
    words = {"fail_max": 3, "reset_timeout": 60, "timeout": timeout}
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, **words)) for _ in range(2))
    fails(one, 2)
    assert other.fail_counter == 2
    fails(other)
    assert other.current_state == "open"
    wait_for(lambda: one.current_state == "open", "the push of the trip")
    assert stored(nodes) == b"open"
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
    wait_for(lambda: other.current_state == "closed", "the push of the recovery")
    assert (health_of(one).server, health_of(one).mode) == (location_of(nodes), "lua")
    assert health_of(one).push == ("tracking" if _PROTOCOL_3 else "channel")


_PROTOCOL_3 = int(redis.__version__.split(".")[0]) >= 5


@pytest.mark.full
def test_foreign_write_is_noticed_in_a_cluster(every_cluster: Nodes):
    """An operator with redis-cli opens the circuit for every process."""
    nodes = reset(every_cluster)
    breaker = settled(breaker_on(client_of(nodes), NAMESPACE, max_staleness=0.5))
    nodes.run(nodes.primary_of(SLOT), "SET", f"{{{NAMESPACE}}}:pybreaker:state", "open")
    seconds = wait_for(lambda: breaker.current_state == "open", "a read of the foreign write")
    # A second to notice the write, on a machine that does other things, too.
    assert seconds < 0.5 + 1.0


@pytest.mark.full
def test_forged_push_changes_no_circuit_in_a_cluster(every_cluster: Nodes):
    """A node forwards messages that were published at any other node, whatever the rights of the publisher."""
    nodes = reset(every_cluster)
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, max_staleness=60)) for _ in range(2))
    channel = selector_of(one).current.channel
    topology = view_of(one).cached
    now_ms = int(time.time() * 1000)
    for _ in range(20):
        nodes.run(nodes.primary_of(SLOT), "PUBLISH", channel, f"{now_ms} 999999999999 open {now_ms}  0 0 0")
        assert one.call(up) == other.call(up) == "answer"
    other.open()
    wait_for(lambda: one.current_state == "open", "a read of the trip")
    assert view_of(one).cached.generation == topology.generation + 1


@pytest.mark.full
def test_tag_of_a_namespace_is_respected(cluster: Nodes):
    """An application that puts its keys into one slot finds the circuit in this slot, and so do stock workers."""
    breaker = breaker_on(client_of(cluster), "{shop}:payments")
    breaker.call(up)
    stock = pybreaker.CircuitRedisStorage("closed", client_of(cluster), "{shop}:payments", cluster_mode=True)
    breaker.open()
    assert stock.state == "open"


@pytest.mark.full
def test_tag_keeps_the_circuit_through_migration_and_rollback(cluster: Nodes):
    """With a tag, both storages find the same keys, so states and counts survive the deployment and the way back.

    Without a tag this package uses other keys, and the circuit begins closed.
    """

    def stock(namespace: str) -> pybreaker.CircuitBreaker:
        storage = pybreaker.CircuitRedisStorage("closed", client_of(cluster), namespace, cluster_mode=True)
        return pybreaker.CircuitBreaker(fail_max=3, state_storage=storage)

    before, untagged = stock(f"{{{NAMESPACE}}}"), stock(NAMESPACE)
    for breaker in (before, untagged):
        fails(breaker, 2)
    after = breaker_on(client_of(cluster), f"{{{NAMESPACE}}}", fail_max=3)
    assert (after.current_state, after.fail_counter) == ("closed", 2)
    assert stored(cluster, "fail_counter") == b"2"
    for breaker in (before, untagged):
        breaker.open()
    wait_for(lambda: after.current_state == "open", "a read of the trip by stock")
    assert untagged.current_state == "open"
    # The same circuit, because the namespace becomes the tag. The keys of stock without a tag are others.
    assert breaker_on(client_of(cluster), NAMESPACE).current_state == "open"
    after.close()
    fails(after)
    rolled_back = stock(f"{{{NAMESPACE}}}")
    assert (rolled_back.current_state, rolled_back.fail_counter) == ("closed", 1)
    assert untagged.current_state == "open"
    after.open()
    assert rolled_back.current_state == "open"
    with pytest.raises(pybreaker.CircuitBreakerError):
        rolled_back.call(up)


#: Right that the client of a cluster needs to connect.
_TO_CONNECT = "+command" if importlib.util.find_spec("redis.cluster") else "+config|get"


@pytest.mark.full
@pytest.mark.parametrize("is_of_cluster", [True, False], ids=["client of the cluster", "client of a node"])
def test_rights_of_the_page_suffice_on_a_cluster(cluster: Nodes, is_of_cluster: bool):
    """With the patterns for one circuit and the two additional rights, the circuit is shared, with push.

    The client of a cluster sends further commands when it connects.  A plain client of a node does not.
    """
    page = PAGE.read_text(encoding="utf-8")
    keys, channels = f"~{{{NAMESPACE}}}:pybreaker:*", f"&{{{NAMESPACE}}}:pybreaker:circuit@*"
    assert f"``{keys}``".replace(NAMESPACE, "payments") in page
    assert f"``{channels}``".replace(NAMESPACE, "payments") in page
    words = [{"~": keys, "&": channels}.get(word[0], word) for word in rights_of_page()]
    additional = ["+cluster|slots", *[_TO_CONNECT] * is_of_cluster]
    assert all(f"``{right}``" in page for right in additional)
    for node in cluster.all:
        cluster.run(node, "ACL", "SETUSER", "limited", "reset", "on", ">secret", *words, *additional)
    user = {"username": "limited", "password": "secret"}
    client: Any = client_of(cluster, **user) if is_of_cluster else redis.Redis(port=cluster.all[0].port, **ONCE, **user)
    breaker = settled(breaker_on(client, NAMESPACE, cluster_mode=not is_of_cluster, max_staleness=0.3))
    breaker.open()
    assert stored(cluster) == b"open"
    assert (health_of(breaker).condition, health_of(breaker).push != "none") == ("connected", True)


@pytest.mark.full
def test_circuits_of_all_nodes_are_polled_by_one_process(cluster: Nodes):
    """One thread and one connection serve each node, and one poll reads all its circuits, whatever their slots."""
    client = client_of(cluster)
    breakers = [settled(breaker_on(client, f"circuit {number}", max_staleness=0.3)) for number in range(30)]
    assert len({health_of(breaker).server for breaker in breakers}) == 3
    wait_for(lambda: len(listeners()) == 3, "only the listeners of three nodes run")
    for breaker in breakers[::7]:
        name = health_of(breaker).circuit
        key = f"{{{name}}}:pybreaker:state"
        cluster.run(cluster.primary_of(slot_of(key)), "SET", key, "open")
        wait_for(lambda breaker=breaker: breaker.current_state == "open", "a read of the foreign write")
    assert [breaker.current_state for breaker in breakers].count("open") == len(breakers[::7])


def moves(failover: Any) -> bool:
    """Move a circuit as the retry thread does. During a takeover, a slot may have no node."""
    try:
        return bool(failover.move_if_relocated())
    except (LookupError, ConnectionError, redis.RedisError):
        return False


@pytest.mark.full
def test_planned_failover_causes_no_outage(cluster: Nodes, caplog):
    """The old primary redirects to the new one, so the call waits for no outage and nothing is logged."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breakers = [settled(breaker_on(client_of(cluster), NAMESPACE, max_staleness=0.3)) for _ in range(2)]
    cluster.fail_over(SLOT)
    outcome = calls(breakers[0], 0.5, failing=0.2)
    assert outcome.unexpected == []
    settled(breakers[0]).open()
    wait_for(lambda: breakers[1].current_state == "open", "the push of the trip")
    assert stored(cluster) == b"open"
    assert {health_of(breaker).server for breaker in breakers} == {location_of(cluster)}
    wait_for(lambda: len(listeners()) == 1, "the end of the listener of the old primary")
    assert lines_of(caplog, cluster) == []


def test_killed_primary_is_replaced_without_an_error(cluster: Nodes, caplog, report):
    """Until the takeover, each process uses its local circuit. Then, the new primary gets the trip."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, fail_max=3, reset_timeout=60))
    killed = cluster.primary_of(SLOT)
    killed.kill()
    began = time.monotonic()
    outcome = calls(breaker, 0.5, failing=1.0)
    assert (outcome.unexpected, outcome.reached) == ([], 3)
    cluster.wait_until_replaced(killed, SLOT)
    took_over = time.monotonic()
    wait_for(lambda: is_back(breaker), "use of the shared circuit", within=30)
    report(
        f"cluster's primary killed: another one had taken over after {took_over - began:.1f} s, "
        f"the circuit was there {time.monotonic() - took_over:.2f} s later"
    )
    assert stored(cluster) == b"open"
    wait_for(lambda: len(lines_of(caplog, cluster)) == 2, "both lines")
    away, moved = lines_of(caplog, cluster)
    assert "is unreachable" in away
    assert "all circuits have moved to other nodes of the cluster" in moved


@pytest.mark.full
def test_dead_primary_is_no_outage_of_other_nodes(cluster: Nodes):
    """A third of the slots is unreachable. The circuits of all other slots stay shared."""
    client = client_of(cluster)
    mine = settled(breaker_on(client, NAMESPACE))
    names = (f"circuit {number}" for number in range(1000))
    elsewhere = next(
        name for name in names if cluster.primary_of(slot_of(f"{{{name}}}")) is not cluster.primary_of(SLOT)
    )
    others = settled(breaker_on(client, elsewhere))
    cluster.primary_of(SLOT).kill()
    wait_for(lambda: is_unreachable_for(mine), "the outage of the dead primary")
    assert not health_of(others).is_own
    fails(others)
    assert others.fail_counter == 1
    wait_for(lambda: is_back(mine), "the takeover by the replica", within=30)


def test_circuit_moves_with_its_slot(every_cluster: Nodes, caplog):
    """During the move, no node answers for all keys. Before and after the move, all processes share one circuit."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    nodes = reset(every_cluster)
    one, other = (settled(breaker_on(client_of(nodes), NAMESPACE, fail_max=3, max_staleness=0.3)) for _ in range(2))
    outcomes = []

    def go_on() -> None:
        outcomes.append(calls(one, 1.0, failing=1.0))
        assert health_of(one).is_own

    nodes.move(SLOT, pause=go_on)
    (outcome,) = outcomes
    assert outcome.unexpected == []
    # In this second, ten attempts check whether the move is over. On a busy machine, some may be slow.
    assert outcome.waits <= 2
    # The first failure that counts locally is either the one before or the one after the move is noticed.
    assert outcome.reached == 3
    wait_for(lambda: is_back(one), "use of the shared circuit")
    wait_for(lambda: other.current_state == "open", "the push of the local trip")
    assert stored(nodes) == b"open"
    assert (health_of(one).server, health_of(other).server) == (location_of(nodes), location_of(nodes))
    assert len([line for line in lines_of(caplog, nodes) if "no usable reply" in line]) <= 2


@pytest.mark.full
def test_slot_in_migration_causes_no_topology_refresh(cluster: Nodes, monkeypatch):
    """The answering node shows the circuit's location.

    Queries to silent nodes, ten times a second, would delay callers.
    """
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, fail_max=10**6))
    fails(breaker)
    looked: list[Any] = []
    monkeypatch.setattr(ClusterTopology, "refresh", lambda self, avoid=None: looked.append(avoid))
    cluster.move(SLOT, pause=lambda: calls(breaker, 0.5, failing=0.5))
    wait_for(lambda: is_back(breaker), "use of the shared circuit")
    assert looked == []


@pytest.mark.full
def test_open_circuit_survives_every_move(cluster: Nodes):
    """A failover and a reshard admit no call, and the opening time stays the same."""
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, reset_timeout=60))
    breaker.open()
    opened_at = stored(cluster, "opened_at")
    cluster.fail_over(SLOT)
    outcome = calls(breaker, 0.2, failing=0.0)
    cluster.move(SLOT)
    after = calls(breaker, 0.2, failing=0.0)
    assert (outcome.reached, after.reached, outcome.unexpected, after.unexpected) == (0, 0, [], [])
    wait_for(
        lambda: not health_of(breaker).is_own or calls(breaker, 0.05, failing=0.0).reached, "use of the shared circuit"
    )
    assert (stored(cluster), stored(cluster, "opened_at")) == (b"open", opened_at)


@pytest.mark.full
def test_slot_without_a_node_affects_only_its_circuits(cluster: Nodes, caplog):
    """In a cluster that runs without some of its slots, circuits of all other slots stay shared."""
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
    wait_for(lambda: is_back(mine), "use of the shared circuit")
    message = lines_of(caplog, cluster)
    assert not any("is unreachable" in line for line in message)


@pytest.mark.full
def test_circuit_leaves_a_node_that_was_removed_from_the_cluster(cluster: Nodes):
    """The removed node answers, but lists no node that serves a slot. Other nodes do."""
    breaker = breaker_on(client_of(cluster), NAMESPACE, max_staleness=0)
    breaker.call(up)
    old = cluster.primary_of(SLOT)
    new = cluster.fail_over(SLOT)
    wait_for(lambda: "myself,slave" in cluster.text(old, "CLUSTER", "NODES"), "the old primary as a replica")
    cluster.run(old, "CLUSTER", "RESET")
    try:
        fails(breaker)
        wait_for(lambda: is_back(breaker), "use of the shared circuit")
        assert health_of(breaker).server == f"127.0.0.1:{new.port}/0"
    finally:
        cluster.run(old, "CLUSTER", "MEET", "127.0.0.1", new.port)
        wait_for(
            lambda: cluster.id(new) in cluster.text(old, "CLUSTER", "NODES"), "both nodes in the table of the old one"
        )
        wait_for(
            lambda: "cluster_state:ok" in cluster.text(old, "CLUSTER", "INFO"),
            "a complete table of the old node",
            within=30,
        )
        cluster.run(old, "CLUSTER", "REPLICATE", cluster.id(new))
        cluster.wait_until_whole()


@pytest.mark.full
def test_callers_take_turns_without_a_retry_thread(cluster: Nodes, monkeypatch):
    """Under uWSGI without threads, the caller that retries also finds the node that took over."""
    breaker = breaker_on(client_of(cluster), NAMESPACE, fail_max=3, reset_timeout=60, max_staleness=0)
    breaker.call(up)

    def stay_without_thread(server: Server) -> bool:
        if server.availability.has_retry_thread:
            server.availability.set_retry_thread(False)
        return False

    replace_retry_start(monkeypatch, stay_without_thread)
    killed = cluster.primary_of(SLOT)
    killed.kill()
    assert calls(breaker, 0.2, failing=1.0).unexpected == []
    cluster.wait_until_replaced(killed, SLOT)
    wait_for(lambda: is_back(breaker), "a caller that has found the new primary", within=30)
    assert stored(cluster) == b"open"


@pytest.mark.full
def test_timeout_at_the_old_node_is_no_outage_of_the_new_one(cluster: Nodes, caplog):
    """A failover moved the circuit while the call waited. Circuits on the new node stay shared."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = breaker_on(client_of(cluster), NAMESPACE, max_staleness=0)
    breaker.call(up)
    failover = core_of(breaker)
    began = time.monotonic()
    waits = threading.Thread(target=lambda: fail_circuit(failover, TimeoutError("of the old one"), began))
    cluster.fail_over(SLOT)
    # As the retry thread of the old node does. Not every node lists the new one at once.
    wait_for(lambda: moves(failover), "the move to the new node")
    wait_for(lambda: is_back(breaker), "an answer of the new node")
    message = lines_of(caplog, cluster)
    waits.start()
    waits.join()
    assert health_of(breaker).condition == "connected"
    assert lines_of(caplog, cluster) == message


@pytest.mark.full
def test_subscription_during_a_move_is_removed(cluster: Nodes, monkeypatch):
    """One thread subscribes at the old node while another thread handles the move."""
    breaker = breaker_on(client_of(cluster), NAMESPACE)
    breaker.call(up)
    shared = shared_of(breaker)
    shared.forget_location()
    locate(breaker)
    started: list[Listener] = []

    leaves = threading.Thread(target=shared.forget_location)

    def late(*arguments: Any) -> Listener | None:
        leaves.start()
        leaves.join(0.1)
        started.append(listener_for(*arguments))
        return started[-1]

    monkeypatch.setattr(subscription, "listener_for", late)
    core_of(breaker).prepare_call(has_several_breakers=False)
    leaves.join()
    assert not any(item.view is view_of(breaker) for item in started[0].subscriber_table.snapshot())
    monkeypatch.undo()
    settled(breaker)


@pytest.mark.full
def test_move_in_a_child_of_a_fork_ignores_the_listener_of_the_parent(cluster: Nodes):
    """The parent's listener may hold its lock at the fork, and would never release the lock in the child."""
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE))
    shared, listener = shared_of(breaker), listener_of(breaker)
    pretend_fork()
    with lock_of(listener):
        leaves = threading.Thread(target=shared.forget_location, daemon=True)
        leaves.start()
        leaves.join(2)
        assert not leaves.is_alive()


@pytest.mark.full
def test_node_that_took_over_and_does_not_answer_is_unreachable(cluster: Nodes, caplog):
    """A redirected call uses the local circuit, and the retry thread queries the new node."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    breaker = settled(breaker_on(client_of(cluster), NAMESPACE, timeout=0.25))
    failover = core_of(breaker)
    old = cluster.primary_of(SLOT)
    there = cluster.replica_of(old)
    cluster.fail_over(SLOT)
    # Otherwise, the old primary would soon take over again.
    cluster.run(old, "CONFIG", "SET", "cluster-replica-no-failover", "yes")
    there.pause()
    try:
        # As the retry thread of the old node does. Not every node lists the new one at once.
        wait_for(lambda: moves(failover), "the move to the new node")
        assert health_of(breaker).condition == "unreachable"
        assert not moves(failover)
    finally:
        there.resume()
        cluster.run(old, "CONFIG", "SET", "cluster-replica-no-failover", "no")
    wait_for(lambda: is_back(breaker), "the end of the outage", within=30)


@pytest.mark.parametrize("cluster_mode", [True, False])
@pytest.mark.full
def test_plain_client_of_one_node_finds_the_others(cluster: Nodes, cluster_mode: bool):
    """A configuration endpoint is a node: its redirections are followed, and keys that the node refuses get a tag."""
    wrong = next(node for node in cluster.all[:3] if node is not cluster.primary_of(SLOT) and node.port)
    breaker = settled(breaker_on(redis.Redis(port=wrong.port, **ONCE), NAMESPACE, cluster_mode=cluster_mode))
    breaker.open()
    assert stored(cluster) == b"open"
    assert health_of(breaker).server == location_of(cluster)
    cluster.fail_over(SLOT)
    wait_for(
        lambda: health_of(breaker).server == location_of(cluster) or calls(breaker, 0.01, failing=0.0).unexpected,
        "the location after the failover",
    )


def test_poll_in_cluster_mode_reads_circuits_one_by_one(server):
    """A proxy that looks like one server may have a cluster behind it."""
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
    """Yield a function that returns the commands received meanwhile, from the slow log with a threshold of zero."""
    before = client.config_get("slowlog*")
    client.slowlog_reset()
    client.config_set("slowlog-max-len", 10000)
    client.config_set("slowlog-log-slower-than", 0)
    try:
        yield lambda: [entry["command"].decode() for entry in client.slowlog_get(10000)]
    finally:
        for name, value in before.items():
            client.config_set(name, value)


def topology(*seeds: tuple[str, int], node: Callable[..., Any] | None = None) -> ClusterTopology:
    """Return a topology without any knowledge but its seed nodes."""

    def plain(address: tuple[str, int]) -> redis.Redis:
        return redis.Redis(host=address[0], port=address[1], **ONCE)

    return ClusterTopology(object(), node or plain, list(seeds), lambda slot: None, lambda address: address)


def test_slot_without_a_known_node_raises_a_connection_error():
    """A slot without a node is an outage like any other."""
    with pytest.raises(ConnectionError, match="slot 17"):
        topology(("127.0.0.1", 1)).primary_of(17)


@pytest.mark.full
def test_nodes_that_do_not_answer_are_skipped(cluster: Nodes):
    """A node that failed is queried last. Other nodes return the slots, and further nodes."""
    dead, living = ("127.0.0.1", 1), ("127.0.0.1", cluster.all[4].port)
    found = topology(dead, living)
    found.refresh(avoid=living)
    assert found.primary_of(SLOT) == ("127.0.0.1", cluster.primary_of(SLOT).port)
    assert known_nodes(found) == {("127.0.0.1", node.port) for node in cluster.all}


@pytest.mark.full
def test_replaced_nodes_are_queried_last(cluster: Nodes, monkeypatch):
    """New nodes may have new addresses, year after year. Seed nodes may be names that stay valid."""
    gone, first = ("127.0.0.1", 1), ("127.0.0.1", cluster.all[0].port)
    found = topology(first)
    found.record_redirection(SLOT, gone)
    found.client_of_node(gone)
    while gone in known_nodes(found):
        expire_topology(found)
        found.refresh()
    assert gone not in nodes_with_clients(found), "no client of the replaced node is kept"
    set_seed_nodes(found, {gone})
    asked: list[Any] = []
    replace_slot_query(monkeypatch, lambda ask, self, address: asked.append(address))
    expire_topology(found)
    found.refresh(avoid=first)
    assert len(asked) == len(cluster.all) + 1
    assert asked[-2:] == [gone, first]


@pytest.mark.full
def test_circuits_of_one_node_client_share_a_topology(cluster: Nodes):
    """Otherwise, each of hundreds of circuits would query the cluster when their node fails."""
    client = redis.Redis(port=cluster.all[0].port, **ONCE)
    one, other = (breaker_on(client, f"circuit {number}", cluster_mode=True) for number in range(2))
    clusters = [locator_of(breaker) for breaker in (one, other)]
    assert topology_behind_node(client) is topology_behind_node(client)
    for locator in clusters:
        locator.locate()
        assert locator.relocate(redis.ResponseError("MOVED 1 127.0.0.1:1"), client)
    assert len({id(topology_of_locator(locator)) for locator in clusters}) == 1


@pytest.mark.full
def test_topology_is_queried_once_for_many_circuits(cluster: Nodes, monkeypatch):
    """Hundreds of circuits look for their nodes at the same moment."""
    monkeypatch.setattr(cluster_module, "SLOT_QUERY_PAUSE_S", 60)
    found = topology(("127.0.0.1", cluster.all[0].port))
    asked: list[Any] = []
    replace_slot_query(monkeypatch, lambda ask, self, address: asked.append(address) or ask(self, address))
    for _ in range(10):
        found.refresh()
    assert len(asked) == 1


@pytest.mark.full
def test_silent_node_uses_half_of_the_time_and_only_once(cluster: Nodes, monkeypatch):
    """Hundreds of circuits of one node look for it in turn, and the node that answers needs some time, too."""
    monkeypatch.setattr(cluster_module, "SLOT_QUERY_PAUSE_S", 60)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        found = topology(("127.0.0.1", silent.getsockname()[1]))
        with deadline(2.0):
            found.refresh()
            left = seconds_left()
        assert left is not None
        assert 0.5 < left <= 1.0
        began = time.monotonic()
        found.refresh()
        assert time.monotonic() < began + 0.5


def test_no_node_is_queried_after_the_deadline(monkeypatch):
    """When no time is left, the number of further nodes does not matter."""
    found = topology(*((f"10.0.0.{number}", 1) for number in range(5)))
    asked: list[Any] = []
    replace_slot_query(monkeypatch, lambda ask, self, address: asked.append(address))
    with deadline(0):
        found.refresh()
    assert asked == []


def test_node_without_slots_is_skipped(server, monkeypatch):
    """A node that was taken out of the cluster is skipped, too."""
    found = topology(("127.0.0.1", 1))
    replace_slot_query(monkeypatch, lambda ask, self, address: [])
    found.refresh()
    with pytest.raises(ConnectionError):
        found.primary_of(0)


def test_empty_slot_table_is_ignored():
    """A node that was taken out of its cluster still answers."""

    class Connection:
        def __init__(self, **words: Any) -> None:
            """Accept the arguments of redis-py."""

        def connect(self) -> None:
            """Do nothing."""

        def disconnect(self) -> None:
            """Do nothing."""

        def send_command(self, *command: str) -> None:
            """Accept any command."""

        def read_response(self) -> list[Any]:
            """Return a table without any node."""
            return []

    pool = SimpleNamespace(connection_class=Connection, connection_kwargs={"host": "there", "port": 1})
    found = topology(("there", 1), node=lambda address: SimpleNamespace(connection_pool=pool))
    with pytest.raises(ConnectionError, match="slot 17"):
        found.primary_of(17)
    assert known_nodes(found) == {("there", 1)}


def test_circuit_moved_to_an_unreachable_server_is_not_loaded(client: redis.Redis, monkeypatch):
    """The retry thread already queries that server."""
    breaker = breaker_on(client, NAMESPACE, max_staleness=0)
    breaker.call(up)
    failover = core_of(breaker)
    assert failover.server
    monkeypatch.setattr(locator_of(failover), "refresh_location", lambda: True)
    monkeypatch.setattr(failover, "load", lambda: pytest.fail("the circuit was loaded from an unreachable server"))
    with monkeypatch.context() as patched:
        patched.setattr(failover.server.availability, "outage", "there is one")
        assert failover.move_if_relocated()


def test_second_thread_that_finds_a_move_changes_nothing(client: redis.Redis):
    """Of two threads that find the move, the second one does not touch the new location."""
    breaker = breaker_on(client, NAMESPACE)
    breaker.call(up)
    selector = selector_of(breaker)
    present = selector.current
    shared_of(breaker).forget_location(replace(present))
    assert selector.current is present


@pytest.mark.parametrize(
    ("message", "address"),
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
def test_redirections_are_parsed(message: str, address: tuple[str, int] | None):
    """Redirections are parsed from every client library, in pipelines, and from nodes without their name."""
    error = type("MovedError", (Exception,), {})(message)
    assert topology().redirection_target(error, ("asked", 1)) == address
    assert topology().redirection_target(ValueError("other"), ("asked", 1)) is None


def test_client_of_no_cluster_is_not_relocated(tmp_path):
    """Neither a unix socket nor an object without a connection pool is the endpoint of a cluster."""
    assert topology_behind_node(redis.Redis(unix_socket_path=str(tmp_path / "nobody"))) is None
    assert topology_behind_node(SimpleNamespace(connection_pool=None)) is None
    locator = locator_of(CircuitRedisStorage("closed", redis.Redis(unix_socket_path="/nowhere")))
    moved = type("MovedError", (Exception,), {})
    for client, message in (
        (redis.Redis(unix_socket_path="/nowhere"), "1 there:1"),
        (redis.Redis(port=1), "no such thing"),
    ):
        set_located_client(locator, client)
        assert not locator.relocate(moved(message), client)


@pytest.mark.full
def test_node_that_does_not_serve_a_slot_overrides_the_topology(cluster: Nodes):
    """Other nodes may still list the node. A client of a single node has no other node to query."""
    error = redis.ResponseError("CLUSTERDOWN Hash slot not served")
    for client in (client_of(cluster), redis.Redis(port=cluster.primary_of(SLOT).port, **ONCE)):
        storage = CircuitRedisStorage("closed", client, NAMESPACE, cluster_mode=True)
        pybreaker.CircuitBreaker(state_storage=storage).call(up)
        locator = locator_of(storage)
        if topology_of(client):
            with pytest.raises(LookupError, match="not served"):
                locator.relocate(error, client)
        else:
            assert not locator.relocate(error, client)


def test_addresses_are_translated_by_the_client():
    """Behind an address translation, addresses inside the cluster are unreachable (`address_remap` of redis-py)."""
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


def test_redis_py_cluster_is_supported():
    """Applications on redis-py 3 use redis-py-cluster, which has its own address translation."""

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
    assert known_nodes(found) == {("a", 1), ("b", 2)}
    assert found.primary_of(5) == ("b", 2)
    assert found.client_of_node(("b", 2)) == ("b", 2)
    assert found.redirection_target(type("MovedError", (Exception,), {})("5 inside:7"), ("a", 1)) == ("outside", 7)
    with pytest.raises(ConnectionError):
        found.primary_of(6)


def test_cluster_without_address_translation_is_supported():
    """Some clients have no address translation, and name their nodes after Valkey."""
    words = {"startup_nodes": {}, "nodes_cache": {}, "slots_cache": {}, "connection_kwargs": {}}
    manager = SimpleNamespace(**words, create_valkey_node=lambda host, port: (host, port))
    found = topology_of(SimpleNamespace(nodes_manager=manager))
    assert found
    assert found.redirection_target(type("MovedError", (Exception,), {})("5 there:7"), ("a", 1)) == ("there", 7)
    assert found.client_of_node(("there", 7)) == ("there", 7)


@pytest.mark.full
def test_node_has_one_server_object_per_process(cluster: Nodes):
    """Two cluster clients of one process share the servers of the nodes, and each caches its client of a node."""
    one, other = (topology_of(client_of(cluster)) for _ in range(2))
    assert one
    assert other
    address = one.primary_of(SLOT)
    assert one.client_of_node(address) is one.client_of_node(address)
    server = server_for(one.client_of_node(address))
    assert server is server_for(other.client_of_node(address))


@dataclass(frozen=True)
class WorkerResult:
    """Result of one worker.

    Attributes:
        made: Number of calls.
        slowest: Duration of the slowest call, seconds.
        locations: Changes of the server in use, as monotonic seconds and server. An empty server stands for the local
            circuit.
    """

    made: int
    slowest: float
    locations: list[tuple[float, str]]


def call_until(worker: Worker, until: float, failing: float) -> WorkerResult:
    """Make calls as fast as possible. Only errors of the dependency and of the breaker are expected."""
    chance = random.Random(worker.index)
    made, slowest, locations = 0, 0.0, [(0.0, "")]

    def dependency() -> None:
        if chance.random() < failing:
            raise DependencyDown

    while not worker.dismissed and (
        time.monotonic() < until or (not locations[-1][1] and time.monotonic() < until + 20)
    ):
        for _ in range(50):
            began = time.monotonic()
            with contextlib.suppress(DependencyDown, pybreaker.CircuitBreakerError):
                worker.breaker.call(dependency)
            slowest = max(slowest, time.monotonic() - began)
            made += 1
        health = worker.storage.health()
        location = "" if health.is_own else health.server
        if location != locations[-1][1]:
            locations.append((time.monotonic(), location))
    return WorkerResult(made, slowest, locations)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["failover", "killed", "reshard"])
@pytest.mark.full
def test_8_workers_at_full_speed_get_no_error(cluster: Nodes, tmp_path, report, event: str):
    """The report shows 0 errors, the slowest call, and how long the workers need to find the new node."""
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
        results: list[WorkerResult] = []
        caller = threading.Thread(target=lambda: results.extend(fleet.run(call_until, until, 0.01)))
        caller.start()
        time.sleep(1)  # all workers run
        if event == "reshard":
            cluster.move(SLOT)
        elif event == "failover":
            cluster.fail_over(SLOT)
        else:
            killed = cluster.primary_of(SLOT)
            killed.kill()
            cluster.wait_until_replaced(killed, SLOT)
        done, location = time.monotonic(), location_of(cluster)
        caller.join(60)
    assert len(results) == 8
    assert {went.locations[-1][1] for went in results} == {location}
    agreed = max(went.locations[-1][0] for went in results) - done
    report(
        f"cluster, {event}: 8 workers, {sum(went.made for went in results)} calls, 0 errors, the slowest took "
        f"{max(went.slowest for went in results) * 1000:.0f} ms; all at the new node {max(agreed, 0):.2f} s later"
    )
    assert agreed < 10  # on an idle machine, less than one second
