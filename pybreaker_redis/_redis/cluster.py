"""Which node of a cluster serves a slot, and how does one get there?

Knows: cluster clients of redis-py and its kin and of redis-py-cluster, CLUSTER SLOTS, redirections.  Does not know:
what is asked of a node.

All keys of a circuit lie in one slot, so on a cluster a circuit lives on one node at a time, and that is a server like
any other: with connections of our own, deadlines, a guard, somebody who listens.  What a cluster adds is that the
circuit may move: a node says so when it is asked (MOVED), and of one that is gone the others know who has taken over.
The user's cluster client is looked at, and never asked: it would wait and try again as it likes.
"""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pybreaker_redis._redis.classify import is_moved_error
from pybreaker_redis._redis.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis._redis.endpoint import client_module_of, endpoint_of
from pybreaker_redis._redis.pool import client_on_pool, credentials_of
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import suppress_errors

#: Host and port.
Address = tuple[str, int]

#: Seconds to wait for a single node that is asked about the others, at most.
SURVEY_TIMEOUT_S = 1.0

#: Seconds until they are asked again: all circuits of a process that are looked for then are looked for at once.
SURVEY_PAUSE_S = 0.05

#: What a node says of a slot that it does not serve: its number, and where it is served.  In a pipeline redis-py puts
#: the command before it, with keys that may look alike.
_REDIRECTION = re.compile(r"(\d+) (\S*):(\d+)$")


class ClusterTopology:
    """A cluster, as this process knows it.

    Args:
        client: Of the cluster, or of one node of it and its pool: kept, because it is known by their ids.
        node: Returns a client of a node; connects to nobody.
        seeds: Nodes to begin with.
        found: Returns the node that serves a slot, as far as the client knows, or ``None``.
        remap: What an address is called from here.
    """

    def __init__(
        self,
        client: Any,
        node: Callable[[Address], Any],
        seeds: list[Address],
        found: Callable[[int], Address | None],
        remap: Callable[[Address], Address],
    ) -> None:
        #: As long as it lives nobody else has its id.
        self._client = client
        self._make = node
        self._found = found
        self._remap = remap
        self._seed_nodes = set(seeds)
        self._known_nodes = set(seeds)
        self._nodes: dict[Address, Any] = {}
        self._slot_ranges: list[tuple[range, Address]] = []
        self._redirections: dict[int, Address] = {}
        self._refreshed_at = -SURVEY_PAUSE_S

    def client_of_node(self, address: Address) -> Any:
        """A client of one node; always the same."""
        return self._nodes.get(address) or self._nodes.setdefault(address, self._make(address))

    def update_node_credentials(self, words: Mapping[str, Any]) -> None:
        """Have the clients of its nodes authenticate by other words from now on.

        Args:
            words: Of the cluster's client; credentials among them.
        """
        for node in tuple(self._nodes.values()):
            node.connection_pool.connection_kwargs.update(credentials_of(words))

    def primary_of(self, slot: int) -> Address:
        """The node that serves a slot; asks others only if nothing is known of it.

        Raises:
            ConnectionError: Nobody knows.
            LookupError: Nobody serves it, though others are served.
        """
        address = self._known_primary_of(slot)
        if address is None:
            self.refresh()
            address = self._known_primary_of(slot)
        if address is None:
            msg = f"no node of the cluster says who serves slot {slot}"
            raise LookupError(msg) if self._slot_ranges else ConnectionError(msg)
        return address

    def _known_primary_of(self, slot: int) -> Address | None:
        if slot in self._redirections:
            return self._redirections[slot]
        for slots, address in self._slot_ranges:
            if slot in slots:
                return address
        return None if self._slot_ranges else self._found(slot)

    def record_redirection(self, slot: int, address: Address) -> None:
        """A node has said that another one serves a slot."""
        self._redirections[slot] = address
        self._known_nodes.add(address)

    def refresh(self, avoid: Address | None = None) -> None:
        """Ask the nodes who serves which slot, until one answers.

        Args:
            avoid: The one that is asked last: it has failed, or may be cut off from the others.
        """
        if monotonic() < self._refreshed_at + SURVEY_PAUSE_S:
            return
        self._refreshed_at = monotonic()
        known = self._known_nodes - {avoid}
        # Not all processes the same one; and those last that had to begin with, but have been replaced since.
        others = [*_shuffled(known), *_shuffled(self._seed_nodes - known - {avoid})]
        left = seconds_left()
        # The other half of the time is for the node that is found.
        with deadline(None if left is None else left / 2):
            self._query_in_turn(others if avoid is None else [*others, avoid])
        # However long that took: the next circuit need not wait for the same.
        self._refreshed_at = monotonic()

    def _query_in_turn(self, asked: list[Address]) -> None:
        for address in asked:
            left = seconds_left()
            if left == 0:
                return
            slots = None
            # Whatever a library raises: the next one may know.  Who does not answer leaves time for that one.
            with suppress_errors(), deadline(SURVEY_TIMEOUT_S if left is None else left / min(len(asked), 2)):
                slots = self._query_slots(address)
            if slots:
                self._slot_ranges, self._redirections = slots, {}
                return

    def _query_slots(self, address: Address) -> list[tuple[range, Address]]:
        endpoint = endpoint_of(self.client_of_node(address))
        assert endpoint
        bounded = replace(endpoint, connection_class=keep_deadlines(endpoint.connection_class))
        connection = bounded.connect(timeout=SURVEY_TIMEOUT_S)
        try:
            connection.send_command("CLUSTER", "SLOTS")
            answer = connection.read_response()
        finally:
            connection.disconnect()
        slots, known = [], {address}
        for first, last, *nodes in answer:
            addresses = [self._address(node, address) for node in nodes]
            known.update(addresses)
            slots.append((range(int(first), int(last) + 1), addresses[0]))
        if slots:
            # Those that have been replaced by others, with new addresses, would be waited for in vain.
            self._known_nodes = known
            self._nodes = {there: node for there, node in self._nodes.items() if there in known | self._seed_nodes}
        return slots

    def _address(self, node: Any, asked: Address) -> Address:
        host, port = node[:2]
        host = host.decode() if isinstance(host, bytes) else host
        # A node that has not been told its own name says nothing.
        return self._remap((host if host and host != "?" else asked[0], int(port)))

    def redirection_target(self, error: BaseException, asked: Address) -> Address | None:
        """Where a node has sent whoever asked it for a slot; ``None`` if it has not.

        Args:
            error: What it answered.
            asked: The node.
        """
        if not is_moved_error(error):
            return None
        match = _REDIRECTION.search(str(error))
        return self._address((match[2], match[3]), asked) if match else None


def _shuffled(addresses: set[Address]) -> list[Address]:
    return random.sample(list(addresses), len(addresses))


def topology_of(client: Any) -> ClusterTopology | None:
    """The cluster behind a cluster's client; the same each time.  ``None`` for any other client."""
    for manager, adapter in (
        (getattr(client, "nodes_manager", None), _redis_py),
        (_nodes_of(client), _redis_py_cluster),
    ):
        if manager is not None:
            known = _clusters.get(id(manager))
            if known is None:
                known = _clusters[id(manager)] = adapter(client, manager)
            return known
    return None


def topology_behind_node(client: Any) -> ClusterTopology | None:
    """The cluster that a client of one node, or of an endpoint, leads to; the same each time.

    ``None`` if it is no such client.
    """
    endpoint, library = endpoint_of(client), client_module_of(client)
    if endpoint is None or library is None or endpoint.address is None:
        return None
    pool = client.connection_pool
    connection_class, words = endpoint.connection_class, pool.connection_kwargs

    def node(address: Address) -> Any:
        there = {**words, "host": address[0], "port": address[1]}
        return client_on_pool(client, library.ConnectionPool(connection_class=connection_class, **there))

    known = _clusters.get(id(pool))
    if known is None:
        cluster = ClusterTopology((client, pool), node, [endpoint.address], lambda _: None, lambda address: address)
        known = _clusters[id(pool)] = cluster
    return known


_clusters: weakref.WeakValueDictionary[int, ClusterTopology] = weakref.WeakValueDictionary()


def _nodes_of(client: Any) -> Any:
    """What redis-py-cluster's pool knows of its nodes."""
    pool = getattr(client, "connection_pool", None)
    return getattr(pool, "nodes", None) if type(pool).__module__.startswith("rediscluster") else None


def _redis_py(client: Any, manager: Any) -> ClusterTopology:
    # valkey-py has renamed what is called after Redis.
    create = getattr(manager, "create_redis_node", None) or manager.create_valkey_node

    def node(address: Address) -> Any:
        return create(*address, **manager.connection_kwargs)

    def found(slot: int) -> Address | None:
        nodes = manager.slots_cache.get(slot)
        return (nodes[0].host, nodes[0].port) if nodes else None

    def remap(address: Address) -> Address:
        return manager.remap_host_port(*address) if hasattr(manager, "remap_host_port") else address

    seeds = [*manager.startup_nodes.values(), *manager.nodes_cache.values()]
    return ClusterTopology(client, node, [(node.host, node.port) for node in seeds], found, remap)


def _redis_py_cluster(client: Any, manager: Any) -> ClusterTopology:
    def node(address: Address) -> Any:
        return manager.get_redis_link(*address)

    def found(slot: int) -> Address | None:
        nodes = manager.slots.get(slot)
        return (nodes[0]["host"], int(nodes[0]["port"])) if nodes else None

    def remap(address: Address) -> Address:
        host, port = manager.remap_internal_node_object(list(address))
        return host, int(port)

    seeds = [*manager.startup_nodes, *manager.nodes.values()]
    return ClusterTopology(client, node, [(node["host"], int(node["port"])) for node in seeds], found, remap)
