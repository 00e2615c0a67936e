"""Faults of a real server and of the way to the server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.proxy import Proxy
from tests.support.servers import ONCE
from tests.support.wait import wait_for

#: User whose rights a test can withdraw.
USER = "app"


class Site:
    """A server, the proxy in front of it, and an administrator's client that bypasses the proxy.

    Args:
        server: Running server, restarted as often as needed.
        rights: Rights of the user without a fault.
    """

    def __init__(self, server: PrivateServer, rights: Sequence[str] = ("+@all",)) -> None:
        self.server = server
        self.rights = tuple(rights)
        self.proxy = Proxy(server.unix_socket)
        self.administrator = server.client(**ONCE)
        self.permit(*self.rights)

    def client(self, **settings: Any) -> redis.Redis:
        """Return a client of the user, through the proxy."""
        return redis.Redis(host="127.0.0.1", port=self.proxy.port, username=USER, password="any", **settings)

    def permit(self, *rights: str) -> None:
        """Give the user exactly these rights."""
        rules = ("reset", "on", "nopass", "~*", "&*", *rights)
        self.administrator.execute_command("ACL", "SETUSER", USER, *rules)

    def restart(self, *, keep_data: bool) -> None:
        """Start the server again, with its users."""
        self.server.restart(keep_data=keep_data)
        self.permit(*self.rights)

    def close(self) -> None:
        """Close the proxy with its connections, and the administrator's client."""
        self.proxy.close()
        self.administrator.close()


@dataclass(frozen=True)
class Fault:
    """A fault of Redis or of the way to Redis, and its end.

    Attributes:
        name: Name for test ids.
        during: Context in which the fault lasts.
        answers: Whether Redis can be read meanwhile.
        comes_back_empty: Whether the data is lost.
        flickers: Whether Redis works at times.
    """

    name: str
    during: Callable[[Site], contextlib.AbstractContextManager[None]]
    answers: bool = False
    comes_back_empty: bool = False
    flickers: bool = False

    def __str__(self) -> str:
        return self.name


def _down(end: Callable[[PrivateServer], None], *, keep_data: bool) -> Callable[[Site], Any]:
    @contextlib.contextmanager
    def during(site: Site) -> Iterator[None]:
        if keep_data:
            site.administrator.save()
        end(site.server)
        yield
        site.restart(keep_data=keep_data)

    return during


@contextlib.contextmanager
def _frozen(site: Site) -> Iterator[None]:
    site.server.pause()
    try:
        yield
    finally:
        site.server.resume()


@contextlib.contextmanager
def _kills_connections(site: Site) -> Iterator[None]:
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.002):
            with contextlib.suppress(redis.RedisError):
                site.administrator.execute_command("CLIENT", "KILL", "USER", USER)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _configured(during: dict[str, Any], after: dict[str, Any]) -> Callable[[Site], Any]:
    @contextlib.contextmanager
    def configured(site: Site) -> Iterator[None]:
        for name, value in during.items():
            site.administrator.config_set(name, value)
        yield
        for name, value in after.items():
            site.administrator.config_set(name, value)

    return configured


@contextlib.contextmanager
def _replica(site: Site) -> Iterator[None]:
    site.administrator.execute_command("REPLICAOF", "127.0.0.1", "1")
    yield
    site.administrator.execute_command("REPLICAOF", "NO", "ONE")


def _permitted(*rights: str) -> Callable[[Site], Any]:
    @contextlib.contextmanager
    def permitted(site: Site) -> Iterator[None]:
        site.permit(*rights)
        yield
        site.permit("+@all")

    return permitted


@contextlib.contextmanager
def _cannot_save(site: Site) -> Iterator[None]:
    """Let the last snapshot fail (MISCONF), because a directory is in its place."""
    in_the_way = site.server.directory / "dump.rdb"
    with contextlib.suppress(FileNotFoundError):
        in_the_way.unlink()
    in_the_way.mkdir()
    (in_the_way / "file").touch()
    site.administrator.config_set("save", "3600 1000000")
    with contextlib.suppress(redis.RedisError):
        site.administrator.bgsave()
    wait_for(lambda: site.administrator.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed snapshot")
    yield
    (in_the_way / "file").unlink()
    in_the_way.rmdir()
    site.administrator.config_set("save", "")


@contextlib.contextmanager
def _loading(site: Site) -> Iterator[None]:
    """Let the server read its data slowly, so that it accepts connections and refuses commands."""
    names = [f"ballast:{number}" for number in range(500)]
    site.administrator.mset(dict.fromkeys(names, "x" * 1024))
    site.administrator.save()
    site.server.stop()
    slow = ("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    usual, site.server.args = site.server.args, (*site.server.args, *slow)
    try:
        site.server.start(wait=False)
        wait_for(lambda: _refuses(site, "LOADING"), "the server loads")
        yield
        site.administrator.config_set("key-load-delay", 0)
        wait_for(lambda: not _refuses(site, "LOADING"), "the server has loaded")
    finally:
        site.server.args = usual
    site.permit("+@all")
    site.administrator.delete(*names)


def _refuses(site: Site, word: str) -> bool:
    try:
        site.administrator.get("anything")
    except redis.RedisError as error:
        return word.lower() in str(error).lower() or word in type(error).__name__.upper()
    return False


def _proxied(manner: Any, **settings: Any) -> Callable[[Site], Any]:
    @contextlib.contextmanager
    def proxied(site: Site) -> Iterator[None]:
        for name, value in settings.items():
            setattr(site.proxy, name, value)
        site.proxy.manner = manner
        try:
            yield
        finally:
            site.proxy.manner = "pass"

    return proxied


@contextlib.contextmanager
def _refused(site: Site) -> Iterator[None]:
    site.proxy.refuse()
    yield
    site.proxy.listen()


@contextlib.contextmanager
def _accepted_and_never_answered(site: Site) -> Iterator[None]:
    site.proxy.close_connections()
    with _proxied("silent")(site):
        yield


FAULTS = (
    Fault("killed", _down(PrivateServer.kill, keep_data=True)),
    Fault("killed, empty", _down(PrivateServer.kill, keep_data=False), comes_back_empty=True),
    Fault("terminated", _down(PrivateServer.stop, keep_data=True)),
    Fault("terminated, empty", _down(PrivateServer.stop, keep_data=False), comes_back_empty=True),
    Fault("frozen", _frozen),
    Fault("connections killed", _kills_connections, flickers=True),
    Fault("out of memory", _configured({"maxmemory": 1}, {"maxmemory": 0}), answers=True),
    Fault("read-only replica", _replica, answers=True),
    Fault("too few replicas", _configured({"min-replicas-to-write": 1}, {"min-replicas-to-write": 0}), answers=True),
    Fault("cannot save", _cannot_save, answers=True),
    Fault("may not write", _permitted("+@all", "-@write"), answers=True),
    Fault("may do nothing", _permitted("-@all")),
    Fault("loading", _loading),
    Fault("refused", _refused),
    Fault("never answered", _accepted_and_never_answered),
    Fault("silent", _proxied("silent")),
    Fault("half-written", _proxied("half")),
    Fault("byte by byte", _proxied("dribble")),
    Fault("slow", _proxied("slow", delay=(0.15, 0.35)), flickers=True),
)


@contextlib.contextmanager
def site_of(server: PrivateServer) -> Iterator[Site]:
    """Yield the server with a proxy in front."""
    with contextlib.closing(Site(server)) as site:
        yield site
