"""Where does a circuit lie, and where else if it has moved?

Knows: clusters, masters that Sentinels watch, which errors say that something has moved.  Does not know: what is asked
there, what to do while nobody answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pybreaker_redis._client import origin_of, take_credentials, watched_pool, words_of
from pybreaker_redis._cluster import Address, Cluster, cluster_behind, cluster_of, has_moved, serves_no_more
from pybreaker_redis._guard import is_rejected
from pybreaker_redis._keys import BASE, circuit_keys, slot_of
from pybreaker_redis._names import behind, plain, real_names
from pybreaker_redis._outside import calls_users, suppressed
from pybreaker_redis.errors import is_a


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a circuit lies.

    Attributes:
        client: Of that server or node.
        keys: Of the circuit, in the order of the scripts.
        one_slot: Whether there is, or may be, a cluster: then keys of circuits cannot be asked for in one command.
    """

    client: Any
    keys: tuple[str, ...]
    one_slot: bool


class Whereabouts:
    """Where one circuit lies.

    Args:
        given: Returns the user's client; called at first use, and again whenever credentials are rejected.
        namespace: Of the circuit.
        one_slot: Whether to put its keys into one slot in any case; for a cluster's client they are.
        base: Between the namespace and the names of its keys.
        settles: Called once, with the client and the keys, when it is known where it lies.
    """

    def __init__(
        self,
        given: Callable[[], Any],
        namespace: str | None,
        *,
        one_slot: bool,
        settles: Callable[[Any, tuple[str, ...]], None],
        base: str = BASE,
    ) -> None:
        self._given = given
        self._namespace = namespace
        self._base = base
        self._names: dict[bool, tuple[str, ...]] = {}
        self._one_slot = one_slot
        self._settles: Callable[[Any, tuple[str, ...]], None] | None = settles
        self._client: Any = None
        self._cluster: Cluster | None = None
        self._address: Address | None = None
        #: Whether the client that was given has other names for the keys.
        self._renames = False

    @property
    def _keys(self) -> tuple[str, ...]:
        """The names that its keys have on the server, whatever the user's client makes of what it is given."""
        names = self._names.get(self._one_slot)
        if names is None:
            asked = circuit_keys(self._namespace, one_slot=self._one_slot, base=self._base)
            names = self._names[self._one_slot] = real_names(self._client, asked)
            self._renames = self._renames or names != asked
        return names

    @property
    def _slot(self) -> int:
        return slot_of(self._keys[0])

    def seat(self) -> Seat:
        """Where it lies, as far as is known.

        Raises:
            Exception: Whatever the callable raises that returns the client.
        """
        if self._client is None:
            client = behind(self._call_given())
            self._cluster = cluster_of(client)
            self._one_slot = self._one_slot or self._cluster is not None
            self._client = client
        client = self._client
        if self._cluster is not None:
            self._address = self._cluster.primary_of(self._slot)
            client = self._cluster.node(self._address)
        keys = self._keys
        if self._cluster is None and self._renames:
            # It would rename them once more.
            client = plain(client)
        if self._settles:
            settles, self._settles = self._settles, None
            settles(client, keys)
        return Seat(client, keys, self._one_slot)

    @calls_users
    def _call_given(self) -> Any:
        return self._given()

    def has_moved(self, error: Exception, asked: Any) -> bool:
        """Whether an error says that the circuit lies elsewhere, so that nothing was done and `seat` says where.

        Args:
            error: What came instead of an answer.
            asked: The client that was asked with.

        Raises:
            ConnectionError: The node does not know, nor does anybody else.
            LookupError: Nobody serves its slot: that is its own trouble, not that of all who live there.
        """
        if not self._one_slot and (is_a(error, "ClusterCrossSlotError") or str(error).startswith("CROSSSLOT")):
            # A plain client, and a cluster behind it.
            self._one_slot = True
            return True
        if has_moved(error):
            return self._follow(error)
        if is_rejected(error):
            return self._has_new_credentials(asked)
        if serves_no_more(error) and self._cluster is not None:
            if self.look_again():
                return True
            # Even if others still name this node: it knows best.
            raise LookupError(str(error)) from error
        pool = watched_pool(asked)
        if pool is None or not _is_demoted(error):
            return False
        # The next connection asks the Sentinels; those that wait to be used lead to the old master.
        pool.disconnect(inuse_connections=False)
        return True

    def look_again(self) -> bool:
        """Ask the other nodes of a cluster; whether the circuit lies elsewhere by now, so that `seat` says where.

        Raises:
            ConnectionError: Nobody knows.
            LookupError: Nobody serves its slot, though others are served.
        """
        if self._cluster is None:
            return False
        self._cluster.look_again(avoid=self._address)
        return self._cluster.primary_of(self._slot) != self._address

    def _has_new_credentials(self, asked: Any) -> bool:
        """Read the client's present credentials; return whether they differ, so that another attempt is worth it."""
        given = None
        # Whatever a callable raises: the next attempt calls it again.
        with suppressed():
            given = behind(self._call_given())
        if given is None:
            return False
        words = words_of(given)
        if self._cluster is not None:
            self._cluster.take_credentials(words)
        return take_credentials(asked, words)

    def _follow(self, error: Exception) -> bool:
        cluster, address = self._cluster, self._address
        if cluster is None:
            # The address that was given is one node's, or stands for all of them.
            cluster = cluster_behind(self._client)
            origin = origin_of(self._client)
            address = origin.address if origin else None
        if cluster is None or address is None:
            return False
        there = cluster.redirected(error, address)
        if there is None:
            return False
        cluster.moved(self._slot, there)
        self._cluster, self._one_slot = cluster, True
        return True


def _is_demoted(error: Exception) -> bool:
    """Whether a master says that it no longer is one; redis-py's Sentinel connections say it in their own words."""
    text = str(error)
    return is_a(error, "ReadOnlyError") or "READONLY" in text or "previous master is now a slave" in text
