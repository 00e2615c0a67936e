"""Location of a circuit: its server or node, and its keys there.

A circuit moves when a cluster migrates its slot, when Sentinels promote another master, and when a client source
returns other credentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pybreaker_redis._redis.classify import (
    is_authentication_error,
    is_instance_of_named,
    is_moved_error,
    is_slot_unserved,
)
from pybreaker_redis._redis.cluster import ClusterTopology, topology_behind_node, topology_of
from pybreaker_redis._redis.connections.pool import credentials_switched_at, has_new_credentials, replace_credentials
from pybreaker_redis._redis.endpoint import Address, connection_arguments_of, endpoint_of
from pybreaker_redis._redis.keys import KEY_BASE, circuit_keys, plain_copy, server_key_names, slot_of, unwrap_client
from pybreaker_redis._redis.sentinel import is_demoted_master, sentinel_pool_of
from pybreaker_redis._runtime.clock import monotonic
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors


@dataclass(frozen=True, slots=True)
class Location:
    """Location of a circuit.

    Attributes:
        client: Client of the server or node.
        keys: Keys of the circuit, in the order of the scripts.
        needs_one_slot: Whether the server is, or may be, a cluster's node.  A command may not name keys of several
            circuits there.
    """

    client: Any
    keys: tuple[str, ...]
    needs_one_slot: bool


class CircuitLocator:
    """Locator of one circuit.

    Args:
        client_source: Function that returns the user's client, called at first use and when credentials are rejected.
        namespace: Namespace of the circuit (``None``: none).
        needs_one_slot: Whether a hash tag puts the keys into one slot for any client, and not only for a cluster's.
        base: Part of the keys between the namespace and the names of the values.
    """

    def __init__(
        self,
        client_source: Callable[[], Any],
        namespace: str | None,
        *,
        needs_one_slot: bool,
        base: str = KEY_BASE,
    ) -> None:
        self._client_source = client_source
        self._namespace = namespace
        self._base = base
        self._names: dict[bool, tuple[str, ...]] = {}
        self._needs_one_slot = needs_one_slot
        self._client: Any = None
        self._cluster: ClusterTopology | None = None
        self._address: Address | None = None
        #: Whether the user's client renames keys.
        self._is_renaming = False

    @property
    def _keys(self) -> tuple[str, ...]:
        """Names of the keys on the server, after the renaming by the user's client."""
        names = self._names.get(self._needs_one_slot)
        if names is None:
            asked = circuit_keys(self._namespace, needs_one_slot=self._needs_one_slot, base=self._base)
            names = self._names[self._needs_one_slot] = server_key_names(self._client, asked)
            self._is_renaming = self._is_renaming or names != asked
        return names

    @property
    def _slot(self) -> int:
        return slot_of(self._keys[0])

    def locate(self) -> Location:
        """Return the location of the circuit, as far as this process has found it.

        Errors of the client source are raised unchanged, and `error_kind` classifies them.

        Raises:
            ConnectionError: No node of the cluster reports any slots.
            LookupError: No node of the cluster serves the circuit's slot.
        """
        if self._client is None:
            client = unwrap_client(self._call_client_source())
            self._cluster = topology_of(client)
            self._needs_one_slot = self._needs_one_slot or self._cluster is not None
            self._client = client
        client = self._client
        if self._cluster is not None:
            self._address = self._cluster.primary_of(self._slot)
            client = self._cluster.client_of_node(self._address)
        keys = self._keys
        if self._cluster is None and self._is_renaming:
            # The user's client would rename the names once more.
            client = plain_copy(client)
        return Location(client, keys, self._needs_one_slot)

    @calls_user_code
    def _call_client_source(self) -> Any:
        return self._client_source()

    def relocate(self, error: Exception, client: Any) -> bool:
        """Follow an error that reports another location or other credentials.

        Args:
            error: Error of a command on the circuit.
            client: Client that sent the command.

        Returns:
            Whether the server executed nothing and `locate` returns another location, so that a retry is worthwhile.

        Raises:
            ConnectionError: No node of the cluster reports any slots.
            LookupError: No node serves the circuit's slot, which concerns only the circuits of that slot.
        """
        if not self._needs_one_slot and (
            is_instance_of_named(error, "ClusterCrossSlotError") or str(error).startswith("CROSSSLOT")
        ):
            # The client is a plain one, and its server is a cluster.
            self._needs_one_slot = True
            return True
        if is_moved_error(error):
            return self._follow_redirection(error)
        if is_authentication_error(error):
            return self._reload_credentials(client)
        if is_slot_unserved(error) and self._cluster is not None:
            if self.refresh_location():
                return True
            # The other nodes still report this node, but the node itself does not serve the slot.
            raise LookupError(str(error)) from error
        pool = sentinel_pool_of(client)
        if pool is None or not is_demoted_master(error):
            return False
        # New connections query the Sentinels.  Idle connections lead to the old master.
        pool.disconnect(inuse_connections=False)
        return True

    def refresh_location(self) -> bool:
        """Query the nodes of a cluster for the circuit's slot.

        Returns:
            Whether another node serves the slot, so that `locate` returns another location.

        Raises:
            ConnectionError: No node reports any slots.
            LookupError: No node serves the circuit's slot, though other slots are served.
        """
        if self._cluster is None:
            return False
        self._cluster.refresh(avoid=self._address)
        return self._cluster.primary_of(self._slot) != self._address

    def _reload_credentials(self, client: Any) -> bool:
        """Read the present credentials of the client source, and return whether a retry is worthwhile."""
        if has_new_credentials(client):
            # Several threads are rejected at the same time, and one call of the client source serves all of them.
            return True
        asked_at = monotonic()
        present = None
        # The client source may raise anything.  The next attempt calls it again.
        with suppress_errors():
            present = unwrap_client(self._call_client_source())
        if present is None:
            return False
        if credentials_switched_at(client) >= asked_at:
            # Another thread was faster.  What this one has read may be older.
            return True
        arguments = connection_arguments_of(present)
        if self._cluster is not None:
            self._cluster.update_node_credentials(arguments)
        return replace_credentials(client, arguments)

    def _follow_redirection(self, error: Exception) -> bool:
        cluster, address = self._cluster, self._address
        if cluster is None:
            # The client's address is one node's, or an endpoint of the whole cluster.
            cluster = topology_behind_node(self._client)
            endpoint = endpoint_of(self._client)
            address = endpoint.address if endpoint else None
        if cluster is None or address is None:
            return False
        target = cluster.redirection_target(error, address)
        if target is None:
            return False
        cluster.record_redirection(self._slot, target)
        self._cluster, self._needs_one_slot = cluster, True
        return True
