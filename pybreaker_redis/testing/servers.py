"""Private Redis or Valkey servers for the demo and for tests, which kill, freeze and restart them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import redis

from pybreaker_redis.testing.binaries import identify_binary
from pybreaker_redis.testing.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = ("CLIENT_ERRORS", "PrivateServer", "ServerNotStartedError", "client_at", "free_port")

#: Seconds until a server must answer after its start.
SERVER_START_TIMEOUT_S = 10.0

#: Seconds that a server has to end after SIGTERM before it is killed.
SERVER_STOP_TIMEOUT_S = 3.0

#: Exceptions of a client that has an invalid URL or gets no usable answer.
CLIENT_ERRORS = (redis.RedisError, ValueError, OSError)

#: Code that starts a program which ends with its starter: ``python -c CODE PARENT_PID PROGRAM ARGUMENTS``.
#: On Linux the kernel kills the program when its starter dies, because exit handlers do not run on SIGKILL.
#: A `preexec_fn` would run Python code between fork and exec, which is unsafe with threads: Python 3.12 warns.
PARENT_DEATH_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)  # the starter died before prctl
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerNotStartedError(RuntimeError):
    """Failure of a server's start: it ended, or did not answer in time.  The message has the end of its log."""


def free_port() -> int:
    """Return a port of the loopback interface that no process uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def client_at(url: str, **kwargs: Any) -> redis.Redis:
    """Return a new client for the server at a URL.

    Args:
        url: URL, as for ``redis.Redis.from_url``.
        kwargs: Keyword arguments of ``redis.Redis``.

    Raises:
        ValueError: The URL is invalid.
    """
    client: redis.Redis = redis.Redis.from_url(url, **kwargs)
    return client


class PrivateServer:
    """Redis or Valkey server of one process that saves nothing and ends with its starter.

    Usable as a context manager, which starts and stops the server and removes its files.

    On Linux the kernel ends the server together with the **thread** that started it.  Start it from a thread that
    lives as long as the server is needed.

    Args:
        binary: Path of a ``redis-server`` or ``valkey-server``.
        directory: Directory for the socket and the log.  The default is a temporary directory, which `close` removes.
        port: Loopback port, or ``None`` for a unix socket only.
        args: Further arguments of the server, which override the ones of this class.

    Attributes:
        args: Further arguments of the server.
        binary: Path of the executable.
        port: Loopback port, or ``None``.
        directory: Directory of the socket and the log.
        unix_socket: Path of the unix socket.
    """

    def __init__(
        self, binary: str, *, directory: Path | None = None, port: int | None = None, args: Sequence[str] = ()
    ) -> None:
        self.binary = binary
        self.port = port
        self._scratch: Scratch | None = None
        if directory is None:
            # A path of pytest's tmp_path is too long: unix sockets permit 107 bytes.
            self._scratch = Scratch()
            directory = self._scratch.path
        self.directory = directory
        self.unix_socket = str(self.directory / "server.sock")
        self.args = tuple(args)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """Version number of the binary, as ``8.2.3``, or an empty text if the binary prints none."""
        found = identify_binary(self.binary, "")
        return found.version if found else ""

    @property
    def url(self) -> str:
        """URL of the server, for ``redis.Redis.from_url``."""
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.unix_socket}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, or ``None`` if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def log(self) -> str:
        """Output of the server since its first start."""
        return (self.directory / "server.log").read_text(errors="replace")

    def client(self, **kwargs: Any) -> redis.Redis:
        """Return a new client for the server.

        Args:
            kwargs: Keyword arguments of ``redis.Redis``.
        """
        if self.port:
            return redis.Redis(host="127.0.0.1", port=self.port, **kwargs)
        return redis.Redis(unix_socket_path=self.unix_socket, **kwargs)

    def start(self, *, wait: bool = True) -> PrivateServer:
        """Start the server, unless it runs.

        Args:
            wait: Whether to wait until the server answers.

        Raises:
            ServerNotStartedError: The server ended, or did not answer within `SERVER_START_TIMEOUT_S`.
        """
        if self.pid:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            PARENT_DEATH_LAUNCHER,
            str(os.getpid()),
            self.binary,
            *self._arguments(),
        ]
        with (self.directory / "server.log").open("ab") as log:
            # A new session does not receive Ctrl-C of the terminal.  The starter ends the server.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A server that outlives its starter keeps the lock on the directory.
                pass_fds=[self._scratch.lock.fileno()] if self._scratch else [],
            )
        deadline = time.monotonic() + SERVER_START_TIMEOUT_S
        while wait and not self._answers():
            if not self.pid or time.monotonic() > deadline:
                self.kill()
                raise ServerNotStartedError(f"{self.binary} did not start; the end of its log:\n{self.log[-2000:]}")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop the server with SIGTERM, if it runs."""
        if self._process:
            self._process.terminate()
            # A frozen process handles no SIGTERM.
            self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SERVER_STOP_TIMEOUT_S)
            self.kill()

    def kill(self) -> None:
        """Kill the server with SIGKILL, if it runs, and wait for its end."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze the server: connections stay open, and requests get no answer."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)
            # Without this wait the server may still answer a request after the signal was sent.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Unfreeze the server."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)

    def restart(self, *, keep_data: bool) -> None:
        """Stop the server, if it runs, and start it at the same address.

        Args:
            keep_data: Whether a running server saves its data and loads them again.  With ``False`` it starts empty.
        """
        self.resume()
        if keep_data and self.pid:
            with contextlib.closing(self.client()) as client:
                client.save()
        self.stop()
        if not keep_data:
            (self.directory / "dump.rdb").unlink(missing_ok=True)
        self.start()

    def close(self) -> None:
        """Stop the server, and remove its directory if the constructor created one."""
        self.stop()
        if self._scratch:
            self._scratch.remove()

    def __enter__(self) -> PrivateServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _arguments(self) -> list[str]:
        return [
            *("--port", str(self.port or 0), "--bind", "127.0.0.1"),
            *("--unixsocket", self.unix_socket, "--unixsocketperm", "700"),
            *("--dir", str(self.directory), "--save", "", "--appendonly", "no"),
            *self.args,
        ]

    def _answers(self) -> bool:
        # A socket, because retries, timeouts and errors of redis clients differ between releases.
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(self.unix_socket)
                connection.sendall(b"PING\r\n")
                answer = connection.recv(64)
        except OSError:
            return False
        return bool(answer) and not answer.startswith(b"-LOADING")
