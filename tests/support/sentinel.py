"""A real master with Sentinels that monitor it."""

from __future__ import annotations

import contextlib
from typing import Any

import redis
import redis.sentinel

from pybreaker_redis.testing.servers import PrivateServer, free_port
from tests.support.servers import ONCE
from tests.support.wait import wait_for


class _Sentinel(PrivateServer):
    """A Sentinel, which takes a configuration file in place of arguments."""

    def _arguments(self) -> list[str]:
        return [str(self.directory / "sentinel.conf"), "--sentinel"]


class Sentinels:
    """A master and its Sentinels.

    Args:
        binary: Path of the servers' binary.
        count: Number of Sentinels.
        down_after: Seconds of silence after which the Sentinels count the master as dead.
    """

    def __init__(self, binary: str, count: int, *, down_after: float = 60) -> None:
        self.master = PrivateServer(binary, port=free_port())
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(self.master)
        self.sentinels = []
        for _ in range(count):
            port = free_port()
            made = _Sentinel(binary, port=port)
            configuration = made.directory / "sentinel.conf"
            configuration.write_text(
                f"port {port}\nbind 127.0.0.1\nunixsocket {made.unix_socket}\ndir {made.directory}\n"
                f"sentinel monitor shop 127.0.0.1 {self.master.port} 1\n"
                f"sentinel down-after-milliseconds shop {down_after * 1000:.0f}\n"
                "sentinel failover-timeout shop 3000\n"
            )
            self.sentinels.append(self.stack.enter_context(made))

    def manager(self, **settings: Any) -> redis.sentinel.Sentinel:
        """Return a client of the Sentinels."""
        addresses = [("127.0.0.1", made.port) for made in self.sentinels]
        return redis.sentinel.Sentinel(addresses, sentinel_kwargs={**ONCE}, **settings)

    def add_replica(self) -> PrivateServer:
        """Start a replica that follows the master and can take its place."""
        replica = PrivateServer(
            self.master.binary, port=free_port(), args=["--replicaof", f"127.0.0.1 {self.master.port}"]
        )
        self.stack.enter_context(replica)
        with contextlib.closing(self.sentinels[0].client()) as sentinel, contextlib.closing(replica.client()) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows")
            wait_for(
                lambda: sentinel.execute_command("SENTINEL", "REPLICAS", "shop"),
                "the Sentinels list the replica",
                within=30,
            )
        return replica

    def master_port(self) -> int:
        """Return the master's port according to the Sentinels."""
        with contextlib.closing(self.sentinels[0].client()) as sentinel:
            return int(sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop")[1])

    def fail_over(self) -> None:
        """Make a replica take over, as an operator does."""

        def has_begun() -> bool:
            try:
                sentinel.execute_command("SENTINEL", "FAILOVER", "shop")
            except redis.ResponseError:
                # The Sentinels look at replicas every ten seconds, and none is good enough yet.
                return False
            return True

        with contextlib.closing(self.sentinels[0].client()) as sentinel:
            wait_for(has_begun, "a replica is good enough", within=30)
