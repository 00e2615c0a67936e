"""Servers behind TLS, with new certificates."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trustme

from pybreaker_redis.testing.servers import PrivateServer, free_port

HOST = "localhost"


@dataclass(frozen=True)
class Certificates:
    """Certificates as PEM files.

    Attributes:
        authority: Authority that signed the others.
        server: Certificate of the server, with its key.
        client: Certificate of a client, with its key.
        stranger: Another authority, which signed none of them.
    """

    authority: Path
    server: Path
    client: Path
    stranger: Path


def certificates(folder: Path) -> Certificates:
    """Return new certificates."""
    authority = trustme.CA()
    made = Certificates(*(folder / f"{name}.pem" for name in ("authority", "server", "client", "stranger")))
    authority.cert_pem.write_to_path(made.authority)
    trustme.CA().cert_pem.write_to_path(made.stranger)
    for path, names in ((made.server, (HOST, "127.0.0.1")), (made.client, ("client",))):
        authority.issue_cert(*names).private_key_and_cert_chain_pem.write_to_path(path)
    return made


@dataclass(frozen=True)
class Secured:
    """A server with a TLS port.

    Attributes:
        server: Server, which also has a unix socket without TLS.
        port: TLS port at `HOST`.
        certificates: Certificates, which both sides have to show.
        is_native: Whether the server itself implements TLS.
    """

    server: PrivateServer
    port: int
    certificates: Certificates
    is_native: bool


@contextlib.contextmanager
def secured(binary: str, folder: Path) -> Iterator[Secured]:
    """Yield a server behind TLS, its own if it was built with TLS, and otherwise a terminator in Python."""
    made, port = certificates(folder), free_port()
    files = {"cert-file": made.server, "key-file": made.server, "ca-cert-file": made.authority}
    words = [word for name, path in files.items() for word in (f"--tls-{name}", str(path))]
    if has_tls(binary, words):
        with PrivateServer(binary, args=["--tls-port", str(port), *words]) as server:
            yield Secured(server, port, made, is_native=True)
        return
    with PrivateServer(binary) as server, contextlib.closing(Terminator(server.unix_socket, made, port)):
        yield Secured(server, port, made, is_native=False)


def has_tls(binary: str, words: list[str]) -> bool:
    """Return whether a binary starts with these arguments.  Without TLS in its build it ends at once."""
    command = [binary, "--port", "0", "--tls-port", str(free_port()), *words, "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            return any("Ready to accept" in line for line in process.stdout or ())
        finally:
            process.kill()


class Terminator:
    """TLS terminator in front of a unix socket.

    Args:
        unix_socket: Path of the server's unix socket.
        made: Certificates to show and to demand.
        port: Port of the terminator.
        requires_client_certificate: Whether clients have to show a certificate, too.
    """

    def __init__(
        self, unix_socket: str, made: Certificates, port: int, *, requires_client_certificate: bool = True
    ) -> None:
        self._unix_socket = unix_socket
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(made.authority))
        self._context.load_cert_chain(made.server)
        self._context.verify_mode = ssl.CERT_REQUIRED if requires_client_certificate else ssl.CERT_NONE
        self._listening = socket.create_server(("127.0.0.1", port))
        self._open: set[socket.socket] = set()
        self._ends = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Close all connections and end all threads."""
        self._ends = True
        for item in (self._listening, *self._open):
            # Closing a socket does not wake a thread that waits for it.
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._open.add(near)
                self._threads.append(threading.Thread(target=self._serve, args=(near,)))
                self._threads[-1].start()

    def _serve(self, plain: socket.socket) -> None:
        with plain, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as far:
            far.connect(self._unix_socket)
            with self._context.wrap_socket(plain, server_side=True) as near:
                self._open.add(near)
                # One thread for both directions, because two must not use a TLS socket at the same time.
                while not self._ends:
                    ready = [near] if near.pending() else select.select([near, far], [], [], 0.1)[0]
                    for source in ready:
                        piece = source.recv(65536)
                        if not piece:
                            return
                        (far if source is near else near).sendall(piece)
