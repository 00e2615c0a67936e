"""Private servers: they do what a test does to them, and never outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from pybreaker_redis.testing import binaries, scratch
from pybreaker_redis.testing.binaries import FoundServer
from pybreaker_redis.testing.scratch import Scratch
from pybreaker_redis.testing.servers import PrivateServer, ServerNotStartedError, free_port
from tests.support import servers
from tests.support.inspect import scratch_of

ROOT = Path(__file__).parents[2]

every_binary = pytest.mark.parametrize("found", servers.at_hand(), ids=servers.name_of)


@pytest.fixture
def private(found: servers.FoundServer) -> Iterator[PrivateServer]:
    """A server of this test alone."""
    with PrivateServer(found.binary) as server:
        yield server


def eventually(condition: Callable[[], bool], within: float = 5.0) -> bool:
    """Whether `condition` becomes true within so many seconds."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process is there and not just a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc").exists()


def pid_of(client: redis.Redis) -> int:
    """The server's own process."""
    return int(client.info("server")["process_id"])


def impatient(server: PrivateServer) -> redis.Redis:
    """A client that waits for two seconds and does not try again."""
    return server.client(socket_timeout=2.0, **servers.ONCE)


@pytest.mark.parametrize("package", servers.EXPECTED)
def test_known_server_is_at_hand(package):
    """In CI each known server takes part, wherever the platform can have it; elsewhere what is missing is said."""
    missing = servers.missing()
    if package not in missing:
        return
    reason = f"no server from the pip package {package}"
    if os.environ.get("CI") and missing[package]:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.usefixtures("preferred")
def test_given_list_of_servers_replaces_those_found(monkeypatch):
    """``PYBREAKER_REDIS_TEST_SERVERS`` is the whole list, in its order, and nothing is then missing."""
    binaries = [found.binary for found in servers.at_hand()]
    monkeypatch.setenv(servers.VARIABLE, ",".join(reversed(binaries)))
    assert [found.binary for found in servers.at_hand.__wrapped__()] == binaries[::-1]
    assert servers.missing() == {}


def test_given_path_that_is_no_server_is_refused(monkeypatch):
    """A wrong path is an error, not a smaller test run."""
    monkeypatch.setenv(servers.VARIABLE, sys.executable)
    with pytest.raises(LookupError, match=servers.VARIABLE):
        servers.at_hand.__wrapped__()


@every_binary
def test_server_answers_on_its_unix_socket_alone(private, found):
    """It is what its binary said it is, and nobody else on the machine can reach it by accident."""
    client = private.client()
    assert client.ping()
    info = client.info("server")
    assert found.version in (info.get("valkey_version"), info.get("redis_version"))
    assert info["tcp_port"] == 0


@every_binary
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_ended_server_is_gone_and_starts_again_empty(private, found, end):
    """Stopped or killed, it answers no more; started again, it is at the same address."""
    client = impatient(private)
    client.set("key", "value")
    pid = pid_of(client)
    getattr(private, end)()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    assert not alive(pid)
    private.start()
    assert client.get("key") is None


@every_binary
def test_paused_server_is_silent_until_resumed(private, found):
    """A frozen server takes connections and gives no answer; resumed, it knows everything."""
    client = impatient(private)
    client.set("key", "value")
    private.pause()
    with pytest.raises(redis.TimeoutError):
        client.get("key")
    private.resume()
    assert eventually(lambda: client.get("key") == b"value")


@every_binary
def test_paused_server_can_be_stopped(private, found):
    """A test that fails while the server is frozen leaves none behind."""
    pid = pid_of(private.client())
    private.pause()
    private.stop()
    assert not alive(pid)


@every_binary
@pytest.mark.parametrize("keep_data", [True, False])
def test_restarted_server_has_its_data_if_told_so(private, found, keep_data):
    """A restart with data is a deploy of the server, one without is a lost cache node."""
    client = impatient(private)
    client.set("key", "value")
    before = pid_of(client)
    private.restart(keep_data=keep_data)
    client = impatient(private)
    assert client.get("key") == (b"value" if keep_data else None)
    assert pid_of(client) != before
    assert not alive(before)


@every_binary
def test_two_servers_of_one_binary_share_nothing(private, found):
    """Each has its own directory and socket."""
    with PrivateServer(found.binary) as other:
        other.client().set("key", "value")
        assert private.client().get("key") is None


@every_binary
def test_server_leaves_no_directory_behind(found):
    """What it wrote goes with it."""
    with PrivateServer(found.binary) as server:
        directory = Path(server.unix_socket).parent
        assert directory.exists()
    assert not directory.exists()


@every_binary
def test_server_answers_on_a_given_port(found):
    """For clients that cannot use a unix socket: a port on the loopback interface."""
    with PrivateServer(found.binary, port=free_port()) as server:
        assert redis.Redis(port=server.port).ping()
        assert redis.Redis.from_url(server.url).ping()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a child together with its parent")
@every_binary
def test_server_of_a_killed_process_dies_with_it(found):
    """SIGKILL leaves no time to clean up, and still no server is left behind; the next one removes its files."""
    program = """
        import sys, time
        from pybreaker_redis.testing.servers import PrivateServer

        server = PrivateServer(sys.argv[1])
        server.start()
        print(server.client().info("server")["process_id"], server.unix_socket, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), found.binary], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert parent.stdout
        pid, unix_socket = parent.stdout.readline().split()
        assert alive(int(pid))
        parent.send_signal(signal.SIGKILL)
        parent.wait(5)
        assert eventually(lambda: not alive(int(pid)))
    finally:
        parent.kill()
        parent.communicate()
    with pytest.raises(redis.ConnectionError):
        redis.Redis(unix_socket_path=unix_socket, **servers.ONCE).ping()

    def is_swept() -> bool:
        # The kernel closes the last of a killed server's files a moment after the process is a zombie.
        with PrivateServer(found.binary):
            return not Path(unix_socket).parent.exists()

    assert eventually(is_swept)


@pytest.fixture
def no_scratch(tmp_path, monkeypatch) -> None:
    """A place for temporary directories in which there is none yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("no_scratch")
def test_directory_is_removed_by_the_next_one_unless_it_is_in_use():
    """What a killed process has left goes; what a living one uses stays."""
    living, killed = Scratch(), Scratch()
    killed.lock.close()  # as the kernel does it
    another = Scratch()
    assert not killed.path.exists()
    for scratch_directory in (living, another):
        assert scratch_directory.path.exists()
        scratch_directory.remove()
        assert not scratch_directory.path.exists()


@pytest.mark.usefixtures("no_scratch")
def test_directory_of_another_user_is_left_alone(monkeypatch):
    """We remove nothing that we have not made."""
    killed = Scratch()
    killed.lock.close()
    with monkeypatch.context() as patch:
        patch.setattr(scratch.os, "getuid", lambda: -1)
        Scratch().remove()
    assert killed.path.exists()
    Scratch().remove()
    assert not killed.path.exists()


def test_directory_is_in_use_while_its_server_runs(preferred):
    """Where the kernel does not end a server together with its starter, it keeps its files."""
    with PrivateServer(preferred.binary) as private:
        assert scratch_of(private)
        scratch_of(private).lock.close()
        Scratch().remove()
        assert private.client().ping()
        assert private.directory.exists()
        private.kill()
        Scratch().remove()
        assert not private.directory.exists()


def test_session_server_that_was_killed_is_started_again(running, server):
    """One test that ends the common server does not fail all others."""
    server.kill()
    again = running(servers.at_hand()[0])
    assert again is server
    assert again.client().ping()


def test_server_of_the_next_test_is_empty(server):
    """No test sees what another has written."""
    client = server.client()
    assert client.dbsize() == 0
    client.set("key", "value")


test_server_of_the_test_after_that_is_empty_too = test_server_of_the_next_test_is_empty


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH, and no pip package with a server in it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(binaries, "SERVER_PACKAGES", (("no_such_package", "redis-server"),))
    return tmp_path


def test_server_on_path_is_found(programs: Path, preferred: FoundServer):
    """Who has installed a server need not install another one."""
    (programs / "valkey-server").symlink_to(preferred.binary)
    (found,) = binaries.find_servers()
    assert found == FoundServer(str(programs / "valkey-server"), "PATH", preferred.product, preferred.version)
    assert str(found) == f"{preferred.product} {preferred.version} (PATH)"


@pytest.mark.parametrize("content", ["#!/bin/sh\necho Redis is not what this is", "\0 made for another machine"])
def test_program_that_is_no_server_is_not_found(content: str, programs: Path):
    """The name of a file proves nothing."""
    program = programs / "redis-server"
    program.write_text(content)
    program.chmod(0o755)
    assert binaries.find_servers() == []
    assert PrivateServer(str(program), directory=programs).version == ""


@pytest.mark.usefixtures("programs")
def test_server_behind_another_one_on_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A pip package that brings a server puts it before that of the system."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, version in ((first, "1.2.3"), (second, "4.5.6")):
        folder.mkdir()
        binary = folder / "redis-server"
        binary.write_text(f"#!{sys.executable}\nprint('Redis server v={version} sha=0')\n")
        binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{first}{os.pathsep}{second}")
    assert [found.version for found in binaries.find_servers()] == ["1.2.3", "4.5.6"]


def test_server_that_does_not_start_shows_its_log(tmp_path: Path, preferred: FoundServer):
    """The reason is in the error, not in a file that nobody knows of; a directory that was given is kept."""
    private = PrivateServer(preferred.binary, directory=tmp_path, args=["--no-such-option", "1"])
    with pytest.raises(ServerNotStartedError, match="no-such-option"), private:
        pytest.fail("started")
    private.close()
    assert tmp_path.is_dir()


def test_server_that_does_not_run_can_be_ended_and_frozen(tmp_path: Path, preferred: FoundServer):
    """A test that cleans up need not know how far it came."""
    private = PrivateServer(preferred.binary, directory=tmp_path)
    for act in (private.pause, private.resume, private.stop, private.kill, private.close):
        act()
    assert private.pid is None


def test_server_on_a_port_says_where_it_is(preferred: FoundServer):
    """Its address and its version are known without asking it."""
    with PrivateServer(preferred.binary, port=free_port()) as private, private.client() as client:
        assert private.url == f"redis://127.0.0.1:{private.port}/0"
        assert private.version == preferred.version
        assert client.ping()
        assert private.start().pid
