"""Deadlines: no operation takes longer than its deadline, whatever the peer does.

Sockets are real, peers are scripted.
"""

from __future__ import annotations

import contextlib
import inspect
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import valkey

from pybreaker_redis._redis.connections import deadline as deadline_module
from pybreaker_redis._redis.connections.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.selection import but_for
from tests.support.servers import ONCE
from tests.support.tls import Certificates
from tests.support.wait import wait_for

#: Deadline of an operation, seconds.
TIMEOUT_S = 0.3

#: Timeout of a connection for each wait, seconds: much longer than any deadline here.
CONNECTION_TIMEOUT_S = 3.0

#: Seconds by which an operation may miss its deadline on a busy machine.
TOLERANCE_S = 0.6


@pytest.fixture(autouse=True)
def no_certificates_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the certificates of the system. Reading them takes tens of milliseconds of CPU for each connection."""
    monkeypatch.setattr(ssl, "create_default_context", lambda *_, **__: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


Script = Callable[[socket.socket], None]

#: Libraries with connections that can keep deadlines.
LIBRARIES = {"redis-py": redis, "valkey-py": valkey}

#: Arguments for a handshake with as many commands as possible: user, database, name.
HANDSHAKE_ARGUMENTS = {"username": "shop", "password": "secret", "db": 3, "client_name": "shop"}


class Peer:
    """Server that runs a script for each connection.

    Args:
        listening: Socket that is bound and listening.
        script: Function that is called with each accepted socket.
    """

    def __init__(self, listening: socket.socket, script: Script) -> None:
        self.listening = listening
        self._script = script
        self._ended = threading.Event()
        self._accepted: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        self.listening.settimeout(0.02)
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                accepted, _ = self.listening.accept()
                # TLS takes over the socket itself.
                self._accepted.append(accepted.dup())
                self._threads.append(threading.Thread(target=self._run, args=(accepted,)))
                self._threads[-1].start()

    def _run(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted:
            accepted.settimeout(None)
            self._script(accepted)
            # Stay silent until the other side closes the connection.
            while accepted.recv(65536):
                pass

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self._ended.set()
        self._threads[0].join()
        for accepted in self._accepted:
            with contextlib.suppress(OSError):
                accepted.shutdown(socket.SHUT_RDWR)
            accepted.close()
        for thread in self._threads:
            thread.join()
        self.listening.close()


def silent(peer: socket.socket) -> None:
    """Accept the connection, and never send anything."""
    del peer


def close_connection(peer: socket.socket) -> None:
    """Accept the connection, receive a command, and close the connection."""
    peer.recv(65536)
    peer.shutdown(socket.SHUT_RDWR)


def send_half_an_answer(peer: socket.socket) -> None:
    """Close the connection in the middle of an answer."""
    peer.recv(65536)
    peer.sendall(b"$100\r\nhalf")
    peer.shutdown(socket.SHUT_RDWR)


def send_slowly(peer: socket.socket) -> None:
    """Send a byte now and then: each byte is in time, and the answer is never complete."""
    peer.recv(65536)
    for byte in b"$1000\r\n" + b"x" * 1000:
        peer.sendall(bytes([byte]))
        time.sleep(TIMEOUT_S / 5)


def slow(peer: socket.socket) -> None:
    """Answer every command with a delay that is in time for the single command."""
    while True:
        received = peer.recv(65536)
        if not received:
            return
        for _ in range(received.count(b"*")):
            time.sleep(2 * TIMEOUT_S)
            peer.sendall(b"+OK\r\n")


def answer_at_once(peer: socket.socket) -> None:
    """Answer every command at once."""
    while True:
        received = peer.recv(65536)
        if not received:
            return
        peer.sendall(b"%0\r\n" if b"HELLO" in received else b"+OK\r\n" * received.count(b"*"))


def read_nothing(peer: socket.socket) -> None:
    """Read nothing, so that commands fill the buffers."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    time.sleep(10 * TIMEOUT_S)


@pytest.fixture
def unix_socket() -> Iterator[str]:
    """Yield the path of a socket, at most 107 bytes long. Paths of pytest are longer."""
    server = PrivateServer("none")
    yield str(server.directory / "peer.sock")
    server.close()


@pytest.fixture(params=but_for(("tcp",), ("tcp", "unix", "tls")))
def transport(request: pytest.FixtureRequest) -> str:
    """Return the transport to the peer."""
    chosen: str = request.param
    return chosen


Listen = Callable[[Script], tuple[str, dict[str, Any]]]


@pytest.fixture
def listen(request: pytest.FixtureRequest, transport: str) -> Iterator[Listen]:
    """Yield a function that starts a peer, and returns the connection class's name and its arguments."""

    def start(script: Script) -> tuple[str, dict[str, Any]]:
        if transport == "unix":
            path = request.getfixturevalue("unix_socket")
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(path)
            listening.listen()
            stack.enter_context(Peer(listening, script))
            return "UnixDomainSocketConnection", {"path": path}
        listening = socket.create_server(("127.0.0.1", 0))
        words = {"host": "127.0.0.1", "port": listening.getsockname()[1]}
        if transport == "tcp":
            stack.enter_context(Peer(listening, script))
            return "Connection", words
        certified = request.getfixturevalue("certified")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certified.server)

        def encrypted(accepted: socket.socket) -> None:
            with context.wrap_socket(accepted, server_side=True) as wrapped:
                script(wrapped)
                while wrapped.recv(65536):
                    pass

        stack.enter_context(Peer(listening, encrypted))
        return "SSLConnection", {**words, "ssl_ca_certs": str(certified.authority)}

    with contextlib.ExitStack() as stack:
        yield start


def connection(library: Any, name: str, longest: float | None = None, **words: Any) -> Any:
    """Return a connection that keeps deadlines, as the private pool creates connections."""
    kind = getattr(library, name)
    timeouts = {"socket_timeout": CONNECTION_TIMEOUT_S}
    if "path" not in words:
        timeouts["socket_connect_timeout"] = CONNECTION_TIMEOUT_S
    once = ONCE if library is redis else {"retry": None}
    return keep_deadlines(kind, longest)(**timeouts, **once, **words)


def query(made: Any, *command: Any) -> Any:
    """Send a command and return its answer, after a connect if necessary."""
    made.send_command(*(command or ("PING",)))
    return made.read_response()


@contextlib.contextmanager
def fails_within(seconds: float) -> Iterator[None]:
    """Assert that the block fails with an outage, within a number of seconds."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the class is checked below)
        yield
    seconds_taken = time.monotonic() - began
    names = {cls.__name__ for cls in type(caught.value).__mro__}
    assert names & {"ConnectionError", "TimeoutError"}, caught.value
    assert seconds_taken <= seconds + TOLERANCE_S, f"{seconds_taken:.3f} s"


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "script", [silent, send_slowly, slow, close_connection, send_half_an_answer], ids=lambda s: s.__name__
)
def test_operation_ends_with_its_deadline_whatever_the_peer_does(listen: Listen, library: str, script: Script) -> None:
    """Connect, handshake, command and answer take no longer than their common deadline."""
    name, words = listen(script)
    made = connection(LIBRARIES[library], name, **words, **HANDSHAKE_ARGUMENTS)
    with fails_within(TIMEOUT_S), deadline(TIMEOUT_S):
        query(made)
    made.disconnect()


@pytest.mark.full
def test_handshake_that_is_slow_at_every_step_ends_with_the_deadline(listen: Listen) -> None:
    """Without the deadline, each step is in time and all of them are late. So this test can fail."""
    name, words = listen(slow)
    plain = getattr(redis, name)(socket_timeout=CONNECTION_TIMEOUT_S, **ONCE, **words, **HANDSHAKE_ARGUMENTS)
    began = time.monotonic()
    query(plain)
    assert time.monotonic() - began > 2 * (TIMEOUT_S + TOLERANCE_S)
    plain.disconnect()
    made = connection(redis, name, **words, **HANDSHAKE_ARGUMENTS)
    with fails_within(TIMEOUT_S), deadline(TIMEOUT_S):
        query(made)
    made.disconnect()


def test_sending_ends_with_the_deadline(listen: Listen) -> None:
    """A peer that reads nothing fills the buffers."""
    name, words = listen(read_nothing)
    made, much = connection(redis, name, **words), b"x" * 50_000_000
    # Until the buffers are full, encryption needs time.
    with fails_within(4 * TIMEOUT_S), deadline(TIMEOUT_S):
        made._sock = made._connect()
        made._sock.sendall(much)
    made._sock.close()
    made._sock = None


def test_handshake_of_tls_ends_with_the_deadline(certified: Certificates) -> None:
    """A peer may accept a connection and have no TLS."""
    with Peer(socket.create_server(("127.0.0.1", 0)), silent) as peer:
        words = {"host": "127.0.0.1", "port": peer.listening.getsockname()[1], "ssl_ca_certs": str(certified.authority)}
        made = connection(redis, "SSLConnection", **words)
        with fails_within(TIMEOUT_S), deadline(TIMEOUT_S):
            query(made)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_refused_connection_is_reported_at_once(transport: str, unix_socket: str) -> None:
    """A refusal is an answer, so no call waits for the deadline."""
    if transport == "unix":
        made = connection(redis, "UnixDomainSocketConnection", path=unix_socket)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        made = connection(redis, "Connection", host="127.0.0.1", port=port)
    with fails_within(TIMEOUT_S / 3), deadline(60):
        query(made)


def unreachable() -> tuple[socket.socket, list[socket.socket]]:
    """Return an address at which a connect never ends. Its queue is full, as if packets were dropped."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    waiting = []
    for _ in range(8):
        one = socket.socket()
        one.settimeout(0.05)
        waiting.append(one)
        try:
            one.connect(listening.getsockname())
        except TimeoutError:
            return listening, waiting
    for one in (*waiting, listening):
        one.close()
    pytest.skip("this system's queues are never full")


def test_connecting_ends_with_the_deadline() -> None:
    """Packets to a host that is down get no answer."""
    listening, waiting = unreachable()
    host, port = listening.getsockname()
    made = connection(redis, "Connection", host=host, port=port)
    with fails_within(TIMEOUT_S), deadline(TIMEOUT_S):
        query(made)
    for one in (*waiting, listening):
        one.close()


def test_connecting_to_a_name_with_many_addresses_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have addresses of IPv6 and IPv4, or of several nodes. All addresses share one deadline."""
    listening, waiting = unreachable()
    host, port = listening.getsockname()
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found] * 4)
    made = connection(redis, "Connection", host="redis.example", port=port)
    with fails_within(TIMEOUT_S), deadline(TIMEOUT_S):
        query(made)
    for one in (*waiting, listening):
        one.close()


@pytest.mark.parametrize("encrypted", but_for([False], [False, True]), ids=["tcp", "tls"])
def test_slow_resolver_leaves_the_rest_of_the_deadline(
    monkeypatch: pytest.MonkeyPatch, certified: Certificates, encrypted: bool
) -> None:
    """The resolver has no deadline. Later steps have only the rest of the time."""
    listening, waiting = unreachable()
    with Peer(socket.create_server(("127.0.0.1", 0)), silent) as peer:
        address = peer.listening.getsockname() if encrypted else listening.getsockname()

        def lookup(*_: Any, **__: Any) -> list[Any]:
            time.sleep(3 * TOLERANCE_S)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        kind, words = ("SSLConnection", {"ssl_ca_certs": str(certified.authority)}) if encrypted else ("Connection", {})
        made = connection(redis, kind, host="redis.example", port=1, **words)
        with fails_within(4 * TOLERANCE_S), deadline(4 * TOLERANCE_S):
            query(made)
    for one in (*waiting, listening):
        one.close()


def test_dead_address_leaves_time_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first address refuses, the second one is tried."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        refused = listening.getsockname()
    with Peer(socket.create_server(("127.0.0.1", 0)), answer_at_once) as peer:
        addresses = [refused, peer.listening.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        made = connection(redis, "Connection", host="redis.example", port=1)
        with deadline(CONNECTION_TIMEOUT_S):
            made._sock = made._connect()
        made._sock.sendall(b"*1\r\n$4\r\nPING\r\n")
        assert made._sock.recv(100) == b"+OK\r\n"
        made._sock.close()
        made._sock = None


def test_no_step_waits_after_the_deadline(listen: Listen) -> None:
    """No step waits, not even for a moment."""
    name, words = listen(silent)
    made = connection(redis, name, **words)
    with deadline(10):
        made._sock = made._connect()
    with fails_within(0), deadline(-1):
        made._sock.recv(100)
    with fails_within(0), deadline(0):
        made._sock.recv_into(bytearray(100))
    made._sock.close()
    made._sock = None


def test_received_answer_is_used_after_the_deadline(server: PrivateServer) -> None:
    """The process was slow and not Redis, so the answer is used."""
    made = connection(redis, "UnixDomainSocketConnection", path=server.unix_socket)
    with deadline(10):
        made.connect()
    with deadline(TIMEOUT_S):
        made.send_command("ECHO", "said")
        wait_for(lambda: seconds_left() == 0, "the end of the deadline")
        assert select.select([made._sock], [], [], 10)[0]
        assert made.read_response() in (b"said", "said")
    made.disconnect()


def test_no_connect_starts_after_the_deadline(listen: Listen) -> None:
    """A timeout of zero would make the socket non-blocking, and end in another error."""
    name, words = listen(silent)
    made = connection(redis, name, **words)
    with fails_within(TIMEOUT_S / 3), deadline(-1):
        query(made)
    made.disconnect()


def test_answer_within_the_deadline_is_used(server: PrivateServer) -> None:
    """One connection serves many operations, each with its own deadline."""
    made = connection(redis, "UnixDomainSocketConnection", path=server.unix_socket)
    for _ in range(3):
        with deadline(2.0):
            assert query(made, "ECHO", "said") in (b"said", "said")
        # All operations together take longer than one deadline.
        time.sleep(0.75)
    made.disconnect()


def test_deadline_may_exceed_the_timeout_of_the_connection(listen: Listen) -> None:
    """A retry may wait longer than a call. Only the deadline counts."""

    def late(peer: socket.socket) -> None:
        peer.recv(65536)
        time.sleep(2 * TIMEOUT_S)
        peer.sendall(b"+LATE\r\n")

    name, words = listen(late)
    made = connection(redis, name, **words)
    with deadline(10 * TIMEOUT_S):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        assert made._sock.recv(100) == b"+LATE\r\n"
    made._sock.close()
    made._sock = None


def test_single_wait_may_have_its_own_limit(listen: Listen) -> None:
    """Where another peer can be queried, as with several Sentinels, the first one gets its share of the time only."""
    name, words = listen(silent)
    made = connection(redis, name, longest=TIMEOUT_S / 3, **words)
    # TLS starts with a handshake.
    with fails_within(2 * TIMEOUT_S / 3), deadline(10 * TIMEOUT_S):
        query(made)


def test_without_a_deadline_the_timeout_of_the_connection_holds(listen: Listen) -> None:
    """The connection's own timeout holds, whether it was connected within a deadline or not."""
    name, words = listen(send_slowly)
    made = connection(redis, name, **words)
    began = time.monotonic()
    with contextlib.suppress(redis.ConnectionError, redis.TimeoutError, OSError):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        while time.monotonic() < began + 2 * TIMEOUT_S:
            made._sock.recv(1)
    assert time.monotonic() - began >= 2 * TIMEOUT_S
    made._sock.close()
    made._sock = None


def test_rest_of_a_deadline_is_no_timeout_of_the_next_operation(listen: Listen) -> None:
    """Without a deadline, the connection's own timeouts hold."""

    def answer_second_late(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall(b"+1\r\n")
        peer.recv(65536)
        time.sleep(TIMEOUT_S)
        peer.sendall(b"+2\r\n")

    name, words = listen(answer_second_late)
    made = connection(redis, name, **words)
    with deadline(5 * TIMEOUT_S):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        # A tenth of a second is left.
        time.sleep(max(0.0, (seconds_left() or 0) - TIMEOUT_S / 3))
        assert made._sock.recv(100) == b"+1\r\n"
    made._sock.sendall(b"PING\r\n")
    assert made._sock.recv(100) == b"+2\r\n"
    made._sock.close()
    made._sock = None


def test_connection_keeps_its_own_timeouts(listen: Listen) -> None:
    """The deadline replaces the timeouts only during the connect, even if the connect fails."""
    name, words = listen(answer_at_once)
    made = connection(redis, name, **words)
    before = made.socket_timeout, getattr(made, "socket_connect_timeout", None)
    with deadline(10):
        made._sock = made._connect()
    assert (made.socket_timeout, getattr(made, "socket_connect_timeout", None)) == before
    made._sock.close()
    made._sock = None
    bad = connection(redis, "UnixDomainSocketConnection", path="/nowhere")
    with deadline(10), pytest.raises(OSError, match="No such file"):
        bad._connect()
    assert bad.socket_timeout == CONNECTION_TIMEOUT_S


def test_check_for_more_answers_does_not_wait(listen: Listen) -> None:
    """Pools check connections before use, within a deadline and without one."""

    def send_more(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall(b"+1\r\n")
        peer.recv(65536)
        peer.sendall(b"+2\r\n")

    name, words = listen(send_more)
    made = connection(redis, name, **words)
    if "protocol" in inspect.signature(redis.Connection).parameters or redis.VERSION >= (5, 0):
        made.protocol = 2
    for block in (deadline(10), contextlib.nullcontext()):
        with block:
            made._sock = made._connect()
            made._parser.on_connect(made)
            began = time.monotonic()
            for _ in range(3):
                assert not made.can_read(timeout=0)
            assert time.monotonic() - began < TIMEOUT_S + TOLERANCE_S
            made._sock.sendall(b"PING\r\n")
            until = time.monotonic() + 10
            while not made.can_read(timeout=0):
                assert time.monotonic() < until
            assert made.read_response() in (b"1", "1")
            made.send_packed_command([b"PING\r\n"], check_health=False)
            assert made.read_response() in (b"2", "2")
        made.disconnect()


class TestSecondsLeft:
    """The seconds left of a deadline."""

    @pytest.fixture(autouse=True)
    def now(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Return the time of a clock that stands still."""
        now = [100.0]
        monkeypatch.setattr(deadline_module, "monotonic", lambda: now[0])
        return now

    def test_without_a_deadline_there_are_no_seconds(self) -> None:
        """There is either no deadline, or one of None."""
        assert seconds_left() is None
        with deadline(None):
            assert seconds_left() is None

    def test_rest_shrinks_to_zero(self, now: list[float]) -> None:
        """The rest never becomes negative."""
        with deadline(2.0):
            assert seconds_left() == 2.0
            now[0] += 1.5
            assert seconds_left() == 0.5
            now[0] += 1.5
            assert seconds_left() == 0.0
        assert seconds_left() is None

    @pytest.mark.parametrize("inner", [1.0, 5.0, None])
    def test_inner_deadline_counts_until_it_ends(self, now: list[float], inner: float | None) -> None:
        """An inner operation has its own deadline. Afterwards, the outer one continues."""
        with deadline(2.0):
            with deadline(inner):
                assert seconds_left() == inner
                now[0] += 0.5
            assert seconds_left() == 1.5

    def test_error_ends_the_deadline(self) -> None:
        """The deadline does not affect the next operation."""
        with contextlib.suppress(KeyError), deadline(1.0):
            raise KeyError
        assert seconds_left() is None

    def test_deadline_is_of_one_thread(self) -> None:
        """Another thread has its own deadline, or none."""
        seen: list[float | None] = []
        with deadline(1.0):
            thread = threading.Thread(target=lambda: seen.append(seconds_left()))
            thread.start()
            thread.join()
        assert seen == [None]


class TestConnectionClass:
    """The class of connections that keep deadlines."""

    def test_class_is_created_once(self) -> None:
        """Pools of one server have equal arguments, so they are shared."""
        assert keep_deadlines(redis.Connection) is keep_deadlines(redis.Connection)
        assert keep_deadlines(redis.Connection) is not keep_deadlines(redis.Connection, 1.0)
        assert keep_deadlines(redis.Connection) is not keep_deadlines(redis.UnixDomainSocketConnection)

    def test_class_keeps_behaviour_and_name_of_its_base(self, tmp_path: Path) -> None:
        """A connection class of an application keeps its behaviour and its name."""
        seen = []

        class Traced(redis.UnixDomainSocketConnection):
            """Connection class of an application."""

            def on_connect(self) -> None:
                """Record the connect."""
                seen.append("connected")

            def _connect(self) -> Any:
                seen.append("connecting")
                return super()._connect()

        kind = keep_deadlines(Traced)
        assert issubclass(kind, Traced)
        assert kind.__name__ == "Traced"
        with pytest.raises(redis.ConnectionError), deadline(TIMEOUT_S):
            kind(path=str(tmp_path / "nobody"), socket_timeout=1, **ONCE).connect()
        assert seen == ["connecting"]


def test_no_command_is_sent_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that a call gave up must not be counted later. A command that is not sent is not executed."""
    now = [100.0]
    monkeypatch.setattr(deadline_module, "monotonic", lambda: now[0])
    near, far = socket.socketpair()
    with near, far:
        late = deadline_module.DeadlineSocket(near, None, None)
        far.setblocking(False)
        with deadline(1.0):
            now[0] += 1.0
            late.sendall(b"a little late")
            assert seconds_left() == pytest.approx(deadline_module.SEND_GRACE_S), (
                "the process was slow, so the command gets a grace"
            )
            assert far.recv(100) == b"a little late"
            now[0] += deadline_module.SEND_GRACE_S
            with pytest.raises(TimeoutError):
                late.sendall(b"EVALSHA")
        with pytest.raises(BlockingIOError):
            far.recv(1)


def test_connection_without_an_attribute_for_a_credential_gets_none(server: PrivateServer) -> None:
    """Older libraries have no providers, so each connection takes the credentials as arguments."""

    class OlderConnection(redis.UnixDomainSocketConnection):
        """Connection class without an attribute for one of the credentials."""

        def __getattribute__(self, name: str) -> Any:
            if name == "nickname":
                raise AttributeError
            return super().__getattribute__(name)

    class ProviderCredentials:
        """Credentials of a provider."""

        def read_credentials(self) -> dict[str, Any]:
            """Return the same credentials each time."""
            return {"nickname": "shop", "username": None}

    made = keep_deadlines(OlderConnection)(path=server.unix_socket, credentials=ProviderCredentials())
    made.connect()
    assert "nickname" not in vars(made)
    made.disconnect()
