"""How is a Redis or Valkey server run that nobody else uses?

Knows: a server's arguments, processes, signals.  Does not know: where binaries come from, circuits, acts.

The demo runs on such a server; the project's own tests use this module to kill, freeze and restart real ones.
"""

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

from pybreaker_redis.testing.binaries import find_servers, identify_binary  # noqa: F401 (tests/project/test_wheel.py has it from here)
from pybreaker_redis.testing.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

#: Seconds until a server must answer after its start.
SERVER_START_TIMEOUT_S = 10.0

#: Seconds that a server has to end after SIGTERM before it is killed.
SERVER_STOP_TIMEOUT_S = 3.0

# The kernel kills the server when its starter dies, however it dies: exit handlers do not run on SIGKILL.  Run in the
# child, by exec and not by `preexec_fn`: forking Python code is unsafe (3.12 warns) once this process has threads.
PARENT_DEATH_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)  # the starter died before the leash was on
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerDidNotStart(RuntimeError):
    """The server ended, or did not answer in time; the message carries the end of its log."""


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PrivateServer:
    """A Redis or Valkey server for one user: it stores nothing, and never outlives its starter.

    Usable as a context manager, which starts it, and stops it and removes what it left.

    On Linux the kernel ends the server together with the **thread** that started it, so start it from one that lasts.

    Args:
        binary: Path of a ``redis-server`` or ``valkey-server``.
        directory: Where it keeps its socket and log; a new temporary one, removed by :meth:`close`, if not given.
        port: Loopback port; ``None`` for a unix socket only.
        args: More arguments for the server; they win over ours.
    """

    def __init__(
        self, binary: str, *, directory: Path | None = None, port: int | None = None, args: Sequence[str] = ()
    ) -> None:
        self.binary = binary
        self.port = port
        self._scratch: Scratch | None = None
        if directory is None:
            # Not pytest's tmp_path: the path of a unix socket has at most 107 bytes.
            self._scratch = Scratch()
            directory = self._scratch.path
        self.directory = directory
        self.unix_socket = str(self.directory / "server.sock")
        self.args = tuple(args)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """As in ``8.2.3``; empty if the binary does not say."""
        found = identify_binary(self.binary, "")
        return found.version if found else ""

    @property
    def url(self) -> str:
        """For ``redis.Redis.from_url``."""
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.unix_socket}"

    @property
    def pid(self) -> int | None:
        """Of the server's process, if it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def log(self) -> str:
        """What the server has printed since it was first started."""
        return (self.directory / "server.log").read_text(errors="replace")

    def client(self, **kwargs: Any) -> redis.Redis:
        """A new client; the arguments are those of ``redis.Redis``."""
        if self.port:
            return redis.Redis(host="127.0.0.1", port=self.port, **kwargs)
        return redis.Redis(unix_socket_path=self.unix_socket, **kwargs)

    def start(self, *, wait: bool = True) -> PrivateServer:
        """Start the server, unless it runs.

        Args:
            wait: Return when the server answers, and not before.

        Raises:
            ServerDidNotStart: It ended, or did not answer within :data:`SERVER_START_TIMEOUT_S`.
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
            # In a session of its own: Ctrl-C in the terminal is for the starter, who ends the server in good order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Where the server outlives its starter (see above), the directory is in use as long.
                pass_fds=[self._scratch.lock.fileno()] if self._scratch else [],
            )
        deadline = time.monotonic() + SERVER_START_TIMEOUT_S
        while wait and not self._answers():
            if not self.pid or time.monotonic() > deadline:
                self.kill()
                raise ServerDidNotStart(f"{self.binary} did not start; the end of its log:\n{self.log[-2000:]}")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """End it as an operator would, by SIGTERM; does nothing if it does not run."""
        if self._process:
            self._process.terminate()
            self.resume()  # a frozen process does not hear SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SERVER_STOP_TIMEOUT_S)
            self.kill()

    def kill(self) -> None:
        """End it without warning, by SIGKILL, and wait until it is gone; does nothing if it does not run."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze it: its connections stay open and nothing answers any more."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # the signal alone would let a last answer through

    def resume(self) -> None:
        """Unfreeze it."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)

    def restart(self, *, keep_data: bool) -> None:
        """Stop it and start it at the same address; also after :meth:`kill`.

        Args:
            keep_data: Save before and load after, if it runs. ``False`` leaves an empty server.
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
        """Stop it for good and remove its directory if that is a temporary one of ours."""
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
        # Not a redis client: its retries, timeouts and errors differ from release to release.
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(self.unix_socket)
                connection.sendall(b"PING\r\n")
                answer = connection.recv(64)
        except OSError:
            return False
        return bool(answer) and not answer.startswith(b"-LOADING")
