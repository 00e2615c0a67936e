"""No operation takes longer than it may, whatever the peer does: real sockets, peers that say what hurts."""

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

from pybreaker_redis._redis import deadline as deadline_module
from pybreaker_redis._redis.deadline import deadline, keep_deadlines, seconds_left
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.servers import ONCE
from tests.support.tls import Certificates
from tests.support.wait import wait_for

#: Seconds for an operation.
TIMEOUT = 0.3

#: Seconds that a connection would wait by itself, each time: much longer than any deadline here.
PATIENCE = 3.0

#: How much later than its deadline something may end on a machine that does other things, seconds.
MORE = 0.6


@pytest.fixture(autouse=True)
def no_certificates_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of them takes tens of milliseconds of this process's own time, for each connection anew."""
    monkeypatch.setattr(ssl, "create_default_context", lambda *_, **__: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


Script = Callable[[socket.socket], None]

#: Libraries whose connections are made to keep deadlines.
LIBRARIES = {"redis-py": redis, "valkey-py": valkey}

#: Words for a connection that asks its server for as much as it can: who it is, which database, its name.
TALKATIVE = {"username": "shop", "password": "secret", "db": 3, "client_name": "shop"}


# -- peers -------------------------------------------------------------------------------------------------------------


class Peer:
    """Listens, and does with each connection what a script says.

    Args:
        listening: Bound and listening.
        script: What is done.
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
                # TLS takes the socket itself over.
                self._accepted.append(accepted.dup())
                self._threads.append(threading.Thread(target=self._run, args=(accepted,)))
                self._threads[-1].start()

    def _run(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted:
            accepted.settimeout(None)
            self._script(accepted)
            # Stay silent until the other side hangs up.
            while accepted.recv(65536):
                pass

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
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
    """Takes the connection, and never says a word."""
    del peer


def hangs_up(peer: socket.socket) -> None:
    """Takes the connection, hears what is wanted, and hangs up."""
    peer.recv(65536)
    peer.shutdown(socket.SHUT_RDWR)


def half_an_answer(peer: socket.socket) -> None:
    """Hangs up in the middle of it."""
    peer.recv(65536)
    peer.sendall(b"$100\r\nhalf")
    peer.shutdown(socket.SHUT_RDWR)


def dribbles(peer: socket.socket) -> None:
    """Sends a byte now and then: each is in time, and the answer never comes."""
    peer.recv(65536)
    for byte in b"$1000\r\n" + b"x" * 1000:
        peer.sendall(bytes([byte]))
        time.sleep(TIMEOUT / 5)


def slow(peer: socket.socket) -> None:
    """Answers everything, each command after a while that is in time for itself."""
    while True:
        asked = peer.recv(65536)
        if not asked:
            return
        for _ in range(asked.count(b"*")):
            time.sleep(2 * TIMEOUT)
            peer.sendall(b"+OK\r\n")


def prompt(peer: socket.socket) -> None:
    """Answers everything at once."""
    while True:
        asked = peer.recv(65536)
        if not asked:
            return
        peer.sendall(b"%0\r\n" if b"HELLO" in asked else b"+OK\r\n" * asked.count(b"*"))


def deaf(peer: socket.socket) -> None:
    """Takes nothing in: what is sent to it fills the buffers."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    time.sleep(10 * TIMEOUT)


@pytest.fixture
def unix_socket() -> Iterator[str]:
    """Where a socket can be; the path of one has at most 107 bytes, which pytest's own exceed."""
    server = PrivateServer("none")
    yield str(server.directory / "peer.sock")
    server.close()


@pytest.fixture(params=["tcp", "unix", "tls"])
def transport(request: pytest.FixtureRequest) -> str:
    """By what way the peer is reached."""
    chosen: str = request.param
    return chosen


Listen = Callable[[Script], tuple[str, dict[str, Any]]]


@pytest.fixture
def listen(request: pytest.FixtureRequest, transport: str) -> Iterator[Listen]:
    """Have a peer; returns the name of the connection's class, and the words that lead there."""

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
    """A connection that keeps deadlines, as the private pool makes them."""
    kind = getattr(library, name)
    timeouts = {"socket_timeout": PATIENCE}
    if "path" not in words:
        timeouts["socket_connect_timeout"] = PATIENCE
    once = ONCE if library is redis else {"retry": None}
    return keep_deadlines(kind, longest)(**timeouts, **once, **words)


def ask(made: Any, *command: Any) -> Any:
    """One question and its answer, connecting if need be."""
    made.send_command(*(command or ("PING",)))
    return made.read_response()


@contextlib.contextmanager
def fails_within(seconds: float) -> Iterator[None]:
    """What is done meanwhile fails as if nobody was there, in no more than so many seconds."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which error is looked at below)
        yield
    took = time.monotonic() - began
    names = {cls.__name__ for cls in type(caught.value).__mro__}
    assert names & {"ConnectionError", "TimeoutError"}, caught.value
    assert took <= seconds + MORE, f"{took:.3f} s"


# -- what peers do -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("script", [silent, dribbles, slow, hangs_up, half_an_answer], ids=lambda s: s.__name__)
def test_operation_ends_with_its_deadline_whatever_the_peer_does(listen: Listen, library: str, script: Script) -> None:
    """Connecting, the handshake, the question and its answer take no longer than all of them may."""
    name, words = listen(script)
    made = connection(LIBRARIES[library], name, **words, **TALKATIVE)
    with fails_within(TIMEOUT), deadline(TIMEOUT):
        ask(made)
    made.disconnect()


def test_handshake_that_is_slow_at_every_step_takes_no_longer_in_all(listen: Listen) -> None:
    """Without the deadline each step would be in time, and all of them together late: so this test can fail."""
    name, words = listen(slow)
    plain = getattr(redis, name)(socket_timeout=PATIENCE, **ONCE, **words, **TALKATIVE)
    began = time.monotonic()
    ask(plain)
    assert time.monotonic() - began > 2 * (TIMEOUT + MORE)
    plain.disconnect()
    made = connection(redis, name, **words, **TALKATIVE)
    with fails_within(TIMEOUT), deadline(TIMEOUT):
        ask(made)
    made.disconnect()


def test_sending_ends_with_the_deadline(listen: Listen) -> None:
    """A peer that takes nothing in any more fills the buffers."""
    name, words = listen(deaf)
    made, much = connection(redis, name, **words), b"x" * 50_000_000
    # Until the buffers are full, encryption has something to do.
    with fails_within(4 * TIMEOUT), deadline(TIMEOUT):
        made._sock = made._connect()
        made._sock.sendall(much)
    made._sock.close()
    made._sock = None


def test_handshake_of_tls_ends_with_the_deadline(certified: Certificates) -> None:
    """A peer that accepts, and does not speak TLS."""
    with Peer(socket.create_server(("127.0.0.1", 0)), silent) as peer:
        words = {"host": "127.0.0.1", "port": peer.listening.getsockname()[1], "ssl_ca_certs": str(certified.authority)}
        made = connection(redis, "SSLConnection", **words)
        with fails_within(TIMEOUT), deadline(TIMEOUT):
            ask(made)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_nobody_there_is_told_at_once(transport: str, unix_socket: str) -> None:
    """A refusal is an answer: nobody waits for the deadline."""
    if transport == "unix":
        made = connection(redis, "UnixDomainSocketConnection", path=unix_socket)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        made = connection(redis, "Connection", host="127.0.0.1", port=port)
    with fails_within(TIMEOUT / 3), deadline(60):
        ask(made)


def unreachable() -> tuple[socket.socket, list[socket.socket]]:
    """An address at which connecting takes for ever: its queue is full, as if packets were dropped."""
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
    """A host that has gone drops what is sent to it, and nobody says so."""
    listening, waiting = unreachable()
    host, port = listening.getsockname()
    made = connection(redis, "Connection", host=host, port=port)
    with fails_within(TIMEOUT), deadline(TIMEOUT):
        ask(made)
    for one in (*waiting, listening):
        one.close()


def test_connecting_to_a_name_with_many_addresses_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv6 and IPv4, or the nodes behind one name: all of them together have the time of one."""
    listening, waiting = unreachable()
    host, port = listening.getsockname()
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found] * 4)
    made = connection(redis, "Connection", host="redis.example", port=port)
    with fails_within(TIMEOUT), deadline(TIMEOUT):
        ask(made)
    for one in (*waiting, listening):
        one.close()


@pytest.mark.parametrize("encrypted", [False, True], ids=["tcp", "tls"])
def test_slow_resolver_leaves_what_is_left(
    monkeypatch: pytest.MonkeyPatch, certified: Certificates, encrypted: bool
) -> None:
    """It takes no deadline; what comes after it has only the rest of the time, not all of it anew."""
    listening, waiting = unreachable()
    with Peer(socket.create_server(("127.0.0.1", 0)), silent) as peer:
        address = peer.listening.getsockname() if encrypted else listening.getsockname()

        def lookup(*_: Any, **__: Any) -> list[Any]:
            time.sleep(3 * MORE)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        kind, words = ("SSLConnection", {"ssl_ca_certs": str(certified.authority)}) if encrypted else ("Connection", {})
        made = connection(redis, kind, host="redis.example", port=1, **words)
        with fails_within(4 * MORE), deadline(4 * MORE):
            ask(made)
    for one in (*waiting, listening):
        one.close()


def test_dead_address_leaves_time_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first is refused, the second is tried."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        refused = listening.getsockname()
    with Peer(socket.create_server(("127.0.0.1", 0)), prompt) as peer:
        addresses = [refused, peer.listening.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        made = connection(redis, "Connection", host="redis.example", port=1)
        with deadline(PATIENCE):
            made._sock = made._connect()
        made._sock.sendall(b"*1\r\n$4\r\nPING\r\n")
        assert made._sock.recv(100) == b"+OK\r\n"
        made._sock.close()
        made._sock = None


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_deadline_that_has_passed_waits_for_nothing(listen: Listen) -> None:
    """Not even for a moment."""
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


def test_what_is_there_already_is_taken_though_the_time_is_over(server: PrivateServer) -> None:
    """Then it was this process that was slow, and not Redis: nobody has to do without it."""
    made = connection(redis, "UnixDomainSocketConnection", path=server.unix_socket)
    with deadline(10):
        made.connect()
    with deadline(TIMEOUT):
        made.send_command("ECHO", "said")
        wait_for(lambda: seconds_left() == 0, "the deadline passes")
        assert select.select([made._sock], [], [], 10)[0]
        assert made.read_response() in (b"said", "said")
    made.disconnect()


def test_deadline_that_has_passed_is_no_time_to_connect(listen: Listen) -> None:
    """A timeout of zero would mean not to wait, and end in another error."""
    name, words = listen(silent)
    made = connection(redis, name, **words)
    with fails_within(TIMEOUT / 3), deadline(-1):
        ask(made)
    made.disconnect()


def test_answer_within_the_deadline_is_taken(server: PrivateServer) -> None:
    """And one connection does for many operations, each with a deadline of its own."""
    made = connection(redis, "UnixDomainSocketConnection", path=server.unix_socket)
    for _ in range(3):
        with deadline(2.0):
            assert ask(made, "ECHO", "said") in (b"said", "said")
        # All of them together take longer than one may.
        time.sleep(0.75)
    made.disconnect()


def test_patience_exceeds_the_timeout_of_the_connection(listen: Listen) -> None:
    """An attempt may wait for longer than a call: what counts is the deadline."""

    def late(peer: socket.socket) -> None:
        peer.recv(65536)
        time.sleep(2 * TIMEOUT)
        peer.sendall(b"+LATE\r\n")

    name, words = listen(late)
    made = connection(redis, name, **words)
    with deadline(10 * TIMEOUT):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        assert made._sock.recv(100) == b"+LATE\r\n"
    made._sock.close()
    made._sock = None


def test_single_wait_may_have_a_limit_of_its_own(listen: Listen) -> None:
    """Where another one can be asked, as of many Sentinels, the first has its share only."""
    name, words = listen(silent)
    made = connection(redis, name, longest=TIMEOUT / 3, **words)
    # TLS shakes hands first.
    with fails_within(2 * TIMEOUT / 3), deadline(10 * TIMEOUT):
        ask(made)


def test_without_a_deadline_the_connection_waits_as_long_as_it_was_told(listen: Listen) -> None:
    """Whether it was connected in an operation with a deadline or not."""
    name, words = listen(dribbles)
    made = connection(redis, name, **words)
    began = time.monotonic()
    with contextlib.suppress(redis.ConnectionError, redis.TimeoutError, OSError):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        while time.monotonic() < began + 2 * TIMEOUT:
            made._sock.recv(1)
    assert time.monotonic() - began >= 2 * TIMEOUT
    made._sock.close()
    made._sock = None


def test_what_an_operation_had_left_is_no_timeout_of_the_next_without_a_deadline(listen: Listen) -> None:
    """That one has the connection's own timeouts, as was said to it."""

    def second_is_late(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall(b"+1\r\n")
        peer.recv(65536)
        time.sleep(TIMEOUT)
        peer.sendall(b"+2\r\n")

    name, words = listen(second_is_late)
    made = connection(redis, name, **words)
    with deadline(5 * TIMEOUT):
        made._sock = made._connect()
        made._sock.sendall(b"PING\r\n")
        # A tenth of a second is left.
        time.sleep(max(0.0, (seconds_left() or 0) - TIMEOUT / 3))
        assert made._sock.recv(100) == b"+1\r\n"
    made._sock.sendall(b"PING\r\n")
    assert made._sock.recv(100) == b"+2\r\n"
    made._sock.close()
    made._sock = None


def test_connection_keeps_its_own_timeouts(listen: Listen) -> None:
    """They are only lent to the deadline while it connects, also if that fails."""
    name, words = listen(prompt)
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
    assert bad.socket_timeout == PATIENCE


def test_looking_for_more_does_not_wait(listen: Listen) -> None:
    """Pools look whether a connection is in order before they give it away: within a deadline, and without one."""

    def says_more(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall(b"+1\r\n")
        peer.recv(65536)
        peer.sendall(b"+2\r\n")

    name, words = listen(says_more)
    made = connection(redis, name, **words)
    if "protocol" in inspect.signature(redis.Connection).parameters or redis.VERSION >= (5, 0):
        made.protocol = 2
    for meant in (deadline(10), contextlib.nullcontext()):
        with meant:
            made._sock = made._connect()
            made._parser.on_connect(made)
            began = time.monotonic()
            for _ in range(3):
                assert not made.can_read(timeout=0)
            assert time.monotonic() - began < TIMEOUT + MORE
            made._sock.sendall(b"PING\r\n")
            until = time.monotonic() + 10
            while not made.can_read(timeout=0):
                assert time.monotonic() < until
            assert made.read_response() in (b"1", "1")
            made.send_packed_command([b"PING\r\n"], check_health=False)
            assert made.read_response() in (b"2", "2")
        made.disconnect()


class TestSeconds:
    """How much is left."""

    @pytest.fixture(autouse=True)
    def now(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """A clock that stands still."""
        now = [100.0]
        monkeypatch.setattr(deadline_module, "monotonic", lambda: now[0])
        return now

    def test_without_a_deadline_nothing_is_said(self) -> None:
        """There is none, or none is wanted."""
        assert seconds_left() is None
        with deadline(None):
            assert seconds_left() is None

    def test_what_is_left_shrinks_to_nothing(self, now: list[float]) -> None:
        """And not below."""
        with deadline(2.0):
            assert seconds_left() == 2.0
            now[0] += 1.5
            assert seconds_left() == 0.5
            now[0] += 1.5
            assert seconds_left() == 0.0
        assert seconds_left() is None

    @pytest.mark.parametrize("inner", [1.0, 5.0, None])
    def test_inner_deadline_counts_until_it_ends(self, now: list[float], inner: float | None) -> None:
        """What is done within an operation says itself how long it may take; afterwards the outer one goes on."""
        with deadline(2.0):
            with deadline(inner):
                assert seconds_left() == inner
                now[0] += 0.5
            assert seconds_left() == 1.5

    def test_error_ends_the_deadline(self) -> None:
        """The next operation is not to be stopped by it."""
        with contextlib.suppress(KeyError), deadline(1.0):
            raise KeyError
        assert seconds_left() is None

    def test_deadline_is_of_one_thread(self) -> None:
        """Another one has its own, or none."""
        seen: list[float | None] = []
        with deadline(1.0):
            thread = threading.Thread(target=lambda: seen.append(seconds_left()))
            thread.start()
            thread.join()
        assert seen == [None]


class TestClass:
    """What kind of connection it is."""

    def test_class_is_made_once(self) -> None:
        """Pools of one server are equal, so that they count as one."""
        assert keep_deadlines(redis.Connection) is keep_deadlines(redis.Connection)
        assert keep_deadlines(redis.Connection) is not keep_deadlines(redis.Connection, 1.0)
        assert keep_deadlines(redis.Connection) is not keep_deadlines(redis.UnixDomainSocketConnection)

    def test_class_is_like_the_one_it_was_made_from(self, tmp_path: Path) -> None:
        """Somebody's own connection goes on doing what it does, and is called what it was called."""
        seen = []

        class Traced(redis.UnixDomainSocketConnection):
            """Somebody's own."""

            def on_connect(self) -> None:
                """Say so."""
                seen.append("connected")

            def _connect(self) -> Any:
                seen.append("connecting")
                return super()._connect()

        kind = keep_deadlines(Traced)
        assert issubclass(kind, Traced)
        assert kind.__name__ == "Traced"
        with pytest.raises(redis.ConnectionError), deadline(TIMEOUT):
            kind(path=str(tmp_path / "nobody"), socket_timeout=1, **ONCE).connect()
        assert seen == ["connecting"]


def test_nothing_is_sent_once_the_deadline_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has given up a failure must not find it counted: what is not sent is not done either."""
    now = [100.0]
    monkeypatch.setattr(deadline_module, "monotonic", lambda: now[0])
    near, far = socket.socketpair()
    with near, far:
        late = deadline_module.DeadlineSocket(near, None, None)
        far.setblocking(False)
        with deadline(1.0):
            now[0] += 1.0
            late.sendall(b"a little late")
            assert seconds_left() == pytest.approx(deadline_module.SEND_GRACE_S), "it was this process that was slow"
            assert far.recv(100) == b"a little late"
            now[0] += deadline_module.SEND_GRACE_S
            with pytest.raises(TimeoutError):
                late.sendall(b"EVALSHA")
        with pytest.raises(BlockingIOError):
            far.recv(1)


def test_connection_without_a_word_for_credentials_is_given_none(server: PrivateServer) -> None:
    """Older libraries have no providers; what they have is taken for each connection."""

    class Older(redis.UnixDomainSocketConnection):
        """Forgets what it does not know."""

        def __getattribute__(self, name: str) -> Any:
            if name == "nickname":
                raise AttributeError
            return super().__getattribute__(name)

    class Present:
        """As they are now."""

        def read_credentials(self) -> dict[str, Any]:
            """The same each time."""
            return {"nickname": "shop", "username": None}

    made = keep_deadlines(Older)(path=server.unix_socket, credentials=Present())
    made.connect()
    assert "nickname" not in vars(made)
    made.disconnect()
