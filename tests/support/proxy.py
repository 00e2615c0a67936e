"""A proxy between a client and a server, which misbehaves on a test's order."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Literal

#: Treatment of what passes: unchanged, held back, replies cut in half with nothing after, replies byte by byte, late
#: replies, or no messages to subscribers.
Manner = Literal["pass", "silent", "half", "dribble", "slow", "mute"]

#: Seconds between two checks of the treatment.
TICK = 0.005

#: Seconds between two bytes.
BYTE = 0.03


class Proxy:
    """Proxy from a loopback port to a unix socket.

    Attributes:
        port: Port of the proxy.
        manner: Treatment of what passes from now on.
        delay: Shortest and longest delay for ``slow``, seconds.
        forbidden: Bytes that end the connection that sends them.  Empty bytes end none.
        closed_count: Number of connections that `forbidden` bytes ended.
        request_count: Number of pieces that clients sent.  Requests that are sent together make one piece, mostly.
        replaced: Replacements in replies.
        failing_requests: Number of further requests that end their connection instead of reaching the server.
    """

    def __init__(self, unix_socket: str) -> None:
        self.manner: Manner = "pass"
        self.delay = (0.0, 0.0)
        self.replaced: dict[bytes, bytes] = {}
        self.failing_requests = 0
        self.forbidden = b""
        self.closed_count = 0
        self.request_count = 0
        self._unix_socket = unix_socket
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._subscribed: set[tuple[socket.socket, ...]] = set()
        self._silenced: set[tuple[socket.socket, ...]] = set()
        self._reset: set[tuple[socket.socket, ...]] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listening: socket.socket | None = None
        self._open = True
        self.port = 0
        self.listen()

    def listen(self) -> None:
        """Accept connections, again on the same port."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        listening.listen(128)
        self.port = listening.getsockname()[1]
        self._listening = listening
        self._start(self._accept, listening)

    def refuse(self) -> None:
        """Close all connections and accept no more."""
        if self._listening:
            # Closing a socket does not wake a thread that waits for it.
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
        self._listening = None
        self.close_connections()

    def reset(self) -> None:
        """End all connections by a RST towards the client, as a crashed host or a firewall does."""
        with self._lock:
            pairs = list(self._pairs)
            self._reset |= self._pairs
        for near, far in pairs:
            with contextlib.suppress(OSError):
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # SHUT_RD sends nothing, but wakes the reading thread, because its last reference keeps the RST back.
                near.shutdown(socket.SHUT_RD)
            near.close()
            _close(far)

    def drop_silently(self) -> None:
        """Drop silently what is sent on the present connections.  New connections work."""
        with self._lock:
            self._silenced |= self._pairs

    def close_connections(self) -> None:
        """Close all connections."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _close(*pair)

    def serve(self, unix_socket: str) -> None:
        """Close all connections, and connect new ones to another server."""
        self._unix_socket = unix_socket
        self.close_connections()

    def close(self) -> None:
        """Close all connections and end all threads for good."""
        self._open = False
        self.refuse()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self._unix_socket)
            except OSError:
                _close(near, far)
                continue
            with self._lock:
                self._pairs.add((near, far))
            if self._listening is not listening:
                # The connection arrived while all others were being closed.
                _close(near, far)
            self._start(self._pass_on, near, far, near, far)
            self._start(self._answer, far, near, near, far)

    def _pass_on(self, source: socket.socket, target: socket.socket, *pair: socket.socket) -> None:
        with self._both_ending(*pair):
            while piece := source.recv(65536):
                with self._lock:
                    self.request_count += 1
                if self.failing_requests > 0:
                    self.failing_requests -= 1
                    return
                self._wait_while("silent")
                if pair in self._silenced:
                    continue
                if self.forbidden and self.forbidden in piece:
                    self.closed_count += 1
                    return
                if b"SUBSCRIBE" in piece:
                    self._subscribed.add(pair)
                target.sendall(piece)

    def _answer(self, source: socket.socket, target: socket.socket, *pair: socket.socket) -> None:
        with self._both_ending(*pair):
            while piece := source.recv(65536):
                self._wait_while("silent")
                if self.manner == "mute" and pair in self._subscribed:
                    continue
                if self.manner == "half":
                    target.sendall(piece[: len(piece) // 2])
                    self._wait_while("half")
                    return
                for found, put in self.replaced.items():
                    piece = piece.replace(found, put)
                if self.manner == "slow":
                    time.sleep(random.uniform(*self.delay))
                if self.manner == "dribble":
                    self._dribble(target, piece)
                else:
                    target.sendall(piece)

    def _dribble(self, target: socket.socket, piece: bytes) -> None:
        for number, byte in enumerate(piece):
            if self.manner != "dribble":
                target.sendall(piece[number:])
                return
            target.sendall(bytes([byte]))
            time.sleep(BYTE)

    @contextlib.contextmanager
    def _both_ending(self, near: socket.socket, far: socket.socket) -> Iterator[None]:
        """Close both sides when either is closed."""
        try:
            with contextlib.suppress(OSError):
                yield
        finally:
            with self._lock:
                self._pairs.discard((near, far))
                self._subscribed.discard((near, far))
                self._silenced.discard((near, far))
                reset = (near, far) in self._reset
            # A FIN before the RST would be another fault.
            _close(*((far,) if reset else (near, far)))

    def _wait_while(self, manner: Manner) -> None:
        while self.manner == manner and self._open:
            time.sleep(TICK)


def _close(*sockets: socket.socket) -> None:
    for item in sockets:
        with contextlib.suppress(OSError):
            item.shutdown(socket.SHUT_RDWR)
        item.close()
