"""Topology of a cluster: the node that serves a slot, and clients of nodes.

All keys of a circuit are in one slot, so one node at a time serves a circuit on a cluster.  That node is a server like
any other, with this package's connections, deadlines, availability and listener.  In addition, the slot may move.  The
node then replies MOVED, and the other nodes report the successor of a node that is gone.

The user's cluster client is only a source of addresses and settings.  No command is sent by way of that client, because
it waits and retries by its own rules.
"""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pybreaker_redis._redis.classify import is_moved_error
from pybreaker_redis._redis.connections.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis._redis.connections.pool import client_on_pool, credentials_of
from pybreaker_redis._redis.endpoint import Address, client_module_of, endpoint_of
from pybreaker_redis._redis.legacy import nodes_of_redis_py_cluster, topology_of_redis_py_cluster
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import suppress_errors

#: Seconds to wait for CLUSTER SLOTS of one node, at most.
SLOT_QUERY_TIMEOUT_S = 1.0

#: Seconds between two surveys of a cluster.  One survey serves all circuits of a process that look for their node.
SLOT_QUERY_PAUSE_S = 0.05

#: End of a MOVED error: the slot, and the address of its node.  In a pipeline, redis-py puts the command before the
#: error, and the command has keys that may look alike.
_REDIRECTION = re.compile(r"(\d+) (\S*):(\d+)$")


class ClusterTopology:
    """Nodes and slots of a cluster, as far as this process has read them.

    Args:
        client: Client of the cluster, or a client of one node with its pool.  The object keeps them alive, because
            their ids identify the topology.
        make: Function that returns a client of a node, without a connection.
        seeds: Nodes to begin with.
        find: Function that returns the node of a slot by the client's own table (``None``: unknown).
        remap: Function that translates an address that a node reports.
    """

    def __init__(
        self,
        client: Any,
        make: Callable[[Address], Any],
        seeds: list[Address],
        find: Callable[[int], Address | None],
        remap: Callable[[Address], Address],
    ) -> None:
        #: No other object gets the id while the client is alive.
        self._client = client
        self._make = make
        self._find = find
        self._remap = remap
        self._seed_nodes = set(seeds)
        self._known_nodes = set(seeds)
        self._nodes: dict[Address, Any] = {}
        self._slot_ranges: list[tuple[range, Address]] = []
        self._redirections: dict[int, Address] = {}
        self._refreshed_at = -SLOT_QUERY_PAUSE_S

    def client_of_node(self, address: Address) -> Any:
        """Return the client of one node, the same one each time."""
        return self._nodes.get(address) or self._nodes.setdefault(address, self._make(address))

    def update_node_credentials(self, arguments: Mapping[str, Any]) -> None:
        """Replace the credentials of the clients of all nodes.

        Args:
            arguments: Arguments of the connections of the cluster's client.
        """
        for node in tuple(self._nodes.values()):
            node.connection_pool.connection_kwargs.update(credentials_of(arguments))

    def primary_of(self, slot: int) -> Address:
        """Return the address of the node that serves a slot, and query the nodes only if it is unknown.

        Args:
            slot: Number of the slot.

        Raises:
            ConnectionError: No node reports any slots.
            LookupError: No node serves the slot, though other slots are served.
        """
        address = self._known_primary_of(slot)
        if address is None:
            self.refresh()
            address = self._known_primary_of(slot)
        if address is None:
            msg = f"no node of the cluster reports the node of slot {slot}"
            raise LookupError(msg) if self._slot_ranges else ConnectionError(msg)
        return address

    def _known_primary_of(self, slot: int) -> Address | None:
        if slot in self._redirections:
            return self._redirections[slot]
        for slots, address in self._slot_ranges:
            if slot in slots:
                return address
        return None if self._slot_ranges else self._find(slot)

    def record_redirection(self, slot: int, address: Address) -> None:
        """Note the node of a slot, as another node has reported it."""
        self._redirections[slot] = address
        self._known_nodes.add(address)

    def refresh(self, avoid: Address | None = None) -> None:
        """Query the nodes for the slots until one answers, unless that was done less than `SLOT_QUERY_PAUSE_S` ago.

        Args:
            avoid: Node that is queried last, because the node has failed or may be cut off from the others.
        """
        if monotonic() < self._refreshed_at + SLOT_QUERY_PAUSE_S:
            return
        self._refreshed_at = monotonic()
        known = self._known_nodes - {avoid}
        # In random order, so that processes query different nodes.  Seed nodes that were replaced come last.
        others = [*_shuffled(known), *_shuffled(self._seed_nodes - known - {avoid})]
        left = seconds_left()
        # The other half of the time is for the command on the node that the survey finds.
        with deadline(None if left is None else left / 2):
            self._query_in_turn(others if avoid is None else [*others, avoid])
        # The pause begins after the survey, however long that took: the next circuit uses its result.
        self._refreshed_at = monotonic()

    def _query_in_turn(self, asked: list[Address]) -> None:
        for address in asked:
            left = seconds_left()
            if left == 0:
                return
            slots = None
            # After any error, the next node may answer.  A node that does not answer leaves half of the time.
            with suppress_errors(), deadline(SLOT_QUERY_TIMEOUT_S if left is None else left / min(len(asked), 2)):
                slots = self._query_slots(address)
            if slots:
                self._slot_ranges, self._redirections = slots, {}
                return

    def _query_slots(self, address: Address) -> list[tuple[range, Address]]:
        endpoint = endpoint_of(self.client_of_node(address))
        assert endpoint
        bounded = replace(endpoint, connection_class=keep_deadlines(endpoint.connection_class))
        connection = bounded.connect(timeout=SLOT_QUERY_TIMEOUT_S)
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
            # Drop nodes that were replaced: a query to their addresses would wait in vain.
            self._known_nodes = known
            self._nodes = {each: node for each, node in self._nodes.items() if each in known | self._seed_nodes}
        return slots

    def _address(self, node: Any, asked: Address) -> Address:
        host, port = node[:2]
        host = host.decode() if isinstance(host, bytes) else host
        # A node without a configured name reports no host.
        return self._remap((host if host and host != "?" else asked[0], int(port)))

    def redirection_target(self, error: BaseException, asked: Address) -> Address | None:
        """Return the address in a redirection (``None`` if the error is no redirection).

        Args:
            error: Error reply of a node.
            asked: Address of that node.
        """
        if not is_moved_error(error):
            return None
        match = _REDIRECTION.search(str(error))
        return self._address((match[2], match[3]), asked) if match else None


def _shuffled(addresses: set[Address]) -> list[Address]:
    return random.sample(list(addresses), len(addresses))


def topology_of(client: Any) -> ClusterTopology | None:
    """Return the topology of a cluster's client, the same one each time (``None`` for any other client)."""
    for manager, adapter in (
        (getattr(client, "nodes_manager", None), _topology_of_redis_py),
        (nodes_of_redis_py_cluster(client), topology_of_redis_py_cluster),
    ):
        if manager is not None:
            known = _topologies.get(id(manager))
            if known is None:
                known = _topologies[id(manager)] = ClusterTopology(client, *adapter(client, manager))
            return known
    return None


def topology_behind_node(client: Any) -> ClusterTopology | None:
    """Return the topology of the cluster behind a client of one node or of a cluster's endpoint.

    Args:
        client: Client of a single server.

    Returns:
        The topology, the same one each time (``None`` if the client has no single address).
    """
    endpoint, library = endpoint_of(client), client_module_of(client)
    if endpoint is None or library is None or endpoint.address is None:
        return None
    pool = client.connection_pool
    connection_class, arguments = endpoint.connection_class, pool.connection_kwargs

    def make(address: Address) -> Any:
        of_node = {**arguments, "host": address[0], "port": address[1]}
        return client_on_pool(client, library.ConnectionPool(connection_class=connection_class, **of_node))

    known = _topologies.get(id(pool))
    if known is None:
        seeds = [endpoint.address]
        topology = ClusterTopology((client, pool), make, seeds, lambda _: None, lambda address: address)
        known = _topologies[id(pool)] = topology
    return known


#: Topologies of this process, by the id of the client's node manager or pool.
_topologies: weakref.WeakValueDictionary[int, ClusterTopology] = weakref.WeakValueDictionary()


def _topology_of_redis_py(
    client: Any, manager: Any
) -> tuple[Callable[[Address], Any], list[Address], Callable[[int], Address | None], Callable[[Address], Address]]:
    # valkey-py has renamed the method.
    create = getattr(manager, "create_redis_node", None) or manager.create_valkey_node

    def make(address: Address) -> Any:
        return create(*address, **manager.connection_kwargs)

    def find(slot: int) -> Address | None:
        nodes = manager.slots_cache.get(slot)
        return (nodes[0].host, nodes[0].port) if nodes else None

    def remap(address: Address) -> Address:
        return manager.remap_host_port(*address) if hasattr(manager, "remap_host_port") else address

    seeds = [*manager.startup_nodes.values(), *manager.nodes_cache.values()]
    return make, [(node.host, node.port) for node in seeds], find, remap
