"""A cluster of three real primaries with replicas, with failovers and moves of slots."""

from __future__ import annotations

import contextlib
import inspect
import socket
from typing import Any

import redis

from pybreaker_redis._redis.keys import CLUSTER_SLOT_COUNT
from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.servers import ONCE
from tests.support.wait import wait_for

PRIMARIES = 3

#: Seconds of silence after which the other nodes count a node as dead.
NODE_TIMEOUT = 1.0

#: Distance of a node's port for the cluster bus from its port for clients.
BUS = 10000


def bus_port() -> int:
    """Return a free port with a free port for the cluster bus."""
    while True:
        port = free_port()
        if port + BUS > 65535:
            port -= 2 * BUS
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + BUS))
            return port


class Nodes:
    """Cluster of private servers, as a context manager.

    Args:
        binary: Path of the server's binary.
        replicas: Number of replicas of each primary.
    """

    def __init__(self, binary: str, *, replicas: int = 1) -> None:
        self.stack = contextlib.ExitStack()
        self.all = [
            self.stack.enter_context(PrivateServer(binary, port=bus_port(), args=_ARGUMENTS))
            for _ in range(PRIMARIES * (1 + replicas))
        ]
        self._of_port = {node.port: node for node in self.all}

    def __enter__(self) -> Nodes:
        with contextlib.ExitStack() as undo:
            undo.push(self.stack)
            self._join()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _join(self) -> None:
        for number, node in enumerate(self.all):
            self.run(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < PRIMARIES:
                first, last = number * CLUSTER_SLOT_COUNT // PRIMARIES, (number + 1) * CLUSTER_SLOT_COUNT // PRIMARIES
                self.run(node, "CLUSTER", "ADDSLOTS", *range(first, last))
            if number:
                self.run(node, "CLUSTER", "MEET", "127.0.0.1", self.all[0].port)
        node_ids = {self.id(node) for node in self.all}

        def sees_all_nodes(node: PrivateServer) -> bool:
            return node_ids == {line.split()[0] for line in self.text(node, "CLUSTER", "NODES").splitlines()}

        wait_for(lambda: all(sees_all_nodes(node) for node in self.all), "all nodes have met", within=30)
        for number, node in enumerate(self.all[PRIMARIES:]):
            self.run(node, "CLUSTER", "REPLICATE", self.id(self.all[number % PRIMARIES]))
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Wait until each running node reports a sound cluster and every replica is in sync."""

        def is_whole(node: PrivateServer) -> bool:
            if "cluster_state:ok" not in self.text(node, "CLUSTER", "INFO"):
                return False
            with contextlib.closing(node.client(**ONCE)) as client:
                role = client.info("replication")
            return role["role"] == "master" or role["master_link_status"] == "up"

        wait_for(lambda: all(is_whole(node) for node in self.all if node.pid), "the cluster is whole", within=60)

    def run(self, node: PrivateServer, *command: Any) -> Any:
        """Execute a command on one node."""
        with contextlib.closing(node.client(**ONCE)) as client:
            # Not `execute_command`, because its callbacks for names of commands differ between releases.
            connection = (
                client.connection_pool.get_connection("_") if _TAKES_NAME else client.connection_pool.get_connection()
            )
            try:
                connection.send_command(*command)
                return connection.read_response()
            finally:
                connection.disconnect()
                client.connection_pool.release(connection)

    def text(self, node: PrivateServer, *command: Any) -> str:
        """Execute a command on one node, and return its reply as text."""
        answer = self.run(node, *command)
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def id(self, node: PrivateServer) -> str:
        """Return the id of a node."""
        return self.text(node, "CLUSTER", "MYID")

    def primary_of(self, slot: int) -> PrivateServer:
        """Return the primary that serves a slot, according to a running node of the sound cluster."""
        for node in self.all:
            if not node.pid or "cluster_state:ok" not in self.text(node, "CLUSTER", "INFO"):
                continue
            for first, last, primary, *_ in self.run(node, "CLUSTER", "SLOTS"):
                if first <= slot <= last:
                    return self._of_port[int(primary[1])]
        raise LookupError(slot)

    def wait_until_replaced(self, killed: PrivateServer, slot: int) -> None:
        """Wait until another node serves a slot."""

        def is_replaced() -> bool:
            with contextlib.suppress(LookupError):
                return self.primary_of(slot) is not killed
            return False

        wait_for(is_replaced, "another node takes over", within=30)

    def replica_of(self, primary: PrivateServer) -> PrivateServer:
        """Return a replica of this primary."""
        own = self.id(primary)
        for line in self.text(primary, "CLUSTER", "NODES").splitlines():
            _, address, flags, master, *_ = line.split()
            if master == own and "slave" in flags and "fail" not in flags:
                return self._of_port[int(address.partition("@")[0].rpartition(":")[2])]
        raise LookupError(own)

    def fail_over(self, slot: int) -> PrivateServer:
        """Make a replica take over a slot, as an operator does, and return the new primary."""
        followers: list[PrivateServer] = []

        def is_followed() -> bool:
            with contextlib.suppress(LookupError):
                followers.append(self.replica_of(self.primary_of(slot)))
            return bool(followers)

        wait_for(is_followed, "the primary lists its replica", within=30)
        replica = followers[0]

        def has_taken_over(within: float) -> bool:
            self.run(replica, "CLUSTER", "FAILOVER")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: self.primary_of(slot) is replica, "the replica has taken over", within=within)
            return self.primary_of(slot) is replica

        # Soon after another failover the primaries refuse to vote, and the replica gives up after five seconds.
        wait_for(lambda: has_taken_over(6), "the replica has taken over", within=30)
        return replica

    def move(self, slot: int, *, pause: Any = lambda: None) -> PrivateServer:
        """Move a slot with its keys to another primary, as ``redis-cli --cluster reshard`` does.

        Args:
            slot: Number of the slot.
            pause: Called in the middle of the move, before any key has moved.

        Returns:
            The new primary.
        """
        source = self.primary_of(slot)
        target = next(
            node
            for node in map(self.primary_of, (0, CLUSTER_SLOT_COUNT // 2, CLUSTER_SLOT_COUNT - 1))
            if node is not source
        )
        self.run(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id(source))
        self.run(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id(target))
        pause()
        while keys := self.run(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.run(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            self.run(node, "CLUSTER", "SETSLOT", slot, "NODE", self.id(target))
        wait_for(lambda: self.primary_of(slot) is target, "the slot has moved", within=30)
        return target

    def restart(self, node: PrivateServer) -> None:
        """Restart a node that was killed, as a replica of the node that has taken its place."""
        node.start()
        self.wait_until_whole()


_ARGUMENTS = [
    *("--cluster-enabled", "yes", "--cluster-node-timeout", f"{NODE_TIMEOUT * 1000:.0f}"),
    *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
]

#: redis-py before 5.3 requires the name of a command for a connection.
_TAKES_NAME = (
    inspect.signature(redis.ConnectionPool.get_connection).parameters["command_name"].default is inspect.Parameter.empty
)
