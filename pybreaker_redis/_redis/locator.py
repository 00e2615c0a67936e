"""Where does a circuit lie, and where else if it has moved?

Knows: clusters, masters that Sentinels watch, which errors say that something has moved.  Does not know: what is asked
there, what to do while nobody answers.
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
from pybreaker_redis._redis.cluster import Address, ClusterTopology, topology_behind_node, topology_of
from pybreaker_redis._redis.endpoint import connection_arguments_of, endpoint_of
from pybreaker_redis._redis.keys import KEY_BASE, circuit_keys, plain_copy, server_key_names, slot_of, unwrap_client
from pybreaker_redis._redis.pool import replace_credentials
from pybreaker_redis._redis.sentinel import is_demoted_master, sentinel_pool_of
from pybreaker_redis._runtime.interruption import calls_user_code, suppress_errors


@dataclass(frozen=True, slots=True)
class Location:
    """Where a circuit lies.

    Attributes:
        client: Of that server or node.
        keys: Of the circuit, in the order of the scripts.
        needs_one_slot: Whether the server is, or may be, a cluster: then no command may name keys of several circuits.
    """

    client: Any
    keys: tuple[str, ...]
    needs_one_slot: bool


class CircuitLocator:
    """Where one circuit lies.

    Args:
        given: Returns the user's client; called at first use, and again whenever credentials are rejected.
        namespace: Of the circuit.
        needs_one_slot: Whether to put its keys into one slot in any case; for a cluster's client they are.
        base: Between the namespace and the names of its keys.
        settles: Called once, with the client and the keys, when it is known where it lies.
    """

    def __init__(
        self,
        given: Callable[[], Any],
        namespace: str | None,
        *,
        needs_one_slot: bool,
        settles: Callable[[Any, tuple[str, ...]], None],
        base: str = KEY_BASE,
    ) -> None:
        self._client_source = given
        self._namespace = namespace
        self._base = base
        self._names: dict[bool, tuple[str, ...]] = {}
        self._needs_one_slot = needs_one_slot
        self._settles: Callable[[Any, tuple[str, ...]], None] | None = settles
        self._client: Any = None
        self._cluster: ClusterTopology | None = None
        self._address: Address | None = None
        #: Whether the client that was given has other names for the keys.
        self._is_renaming = False

    @property
    def _keys(self) -> tuple[str, ...]:
        """The names that its keys have on the server, whatever the user's client makes of what it is given."""
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
        """Where it lies, as far as is known.

        Raises:
            Exception: Whatever the callable raises that returns the client.
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
            # It would rename them once more.
            client = plain_copy(client)
        if self._settles:
            settles, self._settles = self._settles, None
            settles(client, keys)
        return Location(client, keys, self._needs_one_slot)

    @calls_user_code
    def _call_client_source(self) -> Any:
        return self._client_source()

    def relocate(self, error: Exception, asked: Any) -> bool:
        """Whether an error says that the circuit lies elsewhere, so that nothing was done and `seat` says where.

        Args:
            error: What came instead of an answer.
            asked: The client that was asked with.

        Raises:
            ConnectionError: The node does not know, nor does anybody else.
            LookupError: Nobody serves its slot: that is its own trouble, not that of all who live there.
        """
        if not self._needs_one_slot and (
            is_instance_of_named(error, "ClusterCrossSlotError") or str(error).startswith("CROSSSLOT")
        ):
            # A plain client, and a cluster behind it.
            self._needs_one_slot = True
            return True
        if is_moved_error(error):
            return self._follow_redirection(error)
        if is_authentication_error(error):
            return self._reload_credentials(asked)
        if is_slot_unserved(error) and self._cluster is not None:
            if self.refresh_location():
                return True
            # Even if others still name this node: it knows best.
            raise LookupError(str(error)) from error
        pool = sentinel_pool_of(asked)
        if pool is None or not is_demoted_master(error):
            return False
        # The next connection asks the Sentinels; those that wait to be used lead to the old master.
        pool.disconnect(inuse_connections=False)
        return True

    def refresh_location(self) -> bool:
        """Ask the other nodes of a cluster; whether the circuit lies elsewhere by now, so that `seat` says where.

        Raises:
            ConnectionError: Nobody knows.
            LookupError: Nobody serves its slot, though others are served.
        """
        if self._cluster is None:
            return False
        self._cluster.refresh(avoid=self._address)
        return self._cluster.primary_of(self._slot) != self._address

    def _reload_credentials(self, asked: Any) -> bool:
        """Read the client's present credentials; return whether they differ, so that another attempt is worth it."""
        given = None
        # Whatever a callable raises: the next attempt calls it again.
        with suppress_errors():
            given = unwrap_client(self._call_client_source())
        if given is None:
            return False
        words = connection_arguments_of(given)
        if self._cluster is not None:
            self._cluster.update_node_credentials(words)
        return replace_credentials(asked, words)

    def _follow_redirection(self, error: Exception) -> bool:
        cluster, address = self._cluster, self._address
        if cluster is None:
            # The address that was given is one node's, or stands for all of them.
            cluster = topology_behind_node(self._client)
            endpoint = endpoint_of(self._client)
            address = endpoint.address if endpoint else None
        if cluster is None or address is None:
            return False
        there = cluster.redirection_target(error, address)
        if there is None:
            return False
        cluster.record_redirection(self._slot, there)
        self._cluster, self._needs_one_slot = cluster, True
        return True
