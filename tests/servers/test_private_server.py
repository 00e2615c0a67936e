"""Private servers: they do what a test requires, and never outlive the test."""

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
from tests.support.paths import ROOT

every_binary = pytest.mark.parametrize("found", servers.at_hand(), ids=servers.name_of)


@pytest.fixture
def private(found: servers.FoundServer) -> Iterator[PrivateServer]:
    """Yield a server of one test."""
    with PrivateServer(found.binary) as server:
        yield server


def becomes_true(condition: Callable[[], bool], within: float = 5.0) -> bool:
    """Return whether `condition` becomes true within a number of seconds."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie does not count."""
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
    """Return the process id of the server."""
    return int(client.info("server")["process_id"])


def short_client(server: PrivateServer) -> redis.Redis:
    """Return a client that waits for two seconds, without retries."""
    return server.client(socket_timeout=2.0, **servers.ONCE)


@pytest.mark.parametrize("package", servers.EXPECTED)
def test_known_server_is_found(package):
    """In CI, each known server of the platform takes part. Elsewhere, a missing server is reported as skipped."""
    missing = servers.missing()
    if package not in missing:
        return
    reason = f"no server from the pip package {package}"
    if os.environ.get("CI") and missing[package]:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.usefixtures("preferred")
def test_configured_servers_replace_those_found(monkeypatch):
    """The variable ``PYBREAKER_REDIS_TEST_SERVERS`` is the complete list, in its order, without missing servers."""
    binaries = [found.binary for found in servers.at_hand()]
    monkeypatch.setenv(servers.VARIABLE, ",".join(reversed(binaries)))
    assert [found.binary for found in servers.at_hand.__wrapped__()] == binaries[::-1]
    assert servers.missing() == {}


def test_configured_path_that_is_no_server_is_refused(monkeypatch):
    """A wrong path is an error and does not shorten the test run."""
    monkeypatch.setenv(servers.VARIABLE, sys.executable)
    with pytest.raises(LookupError, match=servers.VARIABLE):
        servers.at_hand.__wrapped__()


@every_binary
def test_server_answers_only_on_its_unix_socket(private, found):
    """The server has the version of its binary, and no other program on the machine can reach it by accident."""
    client = private.client()
    assert client.ping()
    info = client.info("server")
    assert found.version in (info.get("valkey_version"), info.get("redis_version"))
    assert info["tcp_port"] == 0


@every_binary
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_ended_server_starts_again_empty(private, found, end):
    """A stopped or killed server does not answer. After another start, the server has the same address."""
    client = short_client(private)
    client.set("key", "value")
    pid = pid_of(client)
    getattr(private, end)()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    assert not is_alive(pid)
    private.start()
    assert client.get("key") is None


@every_binary
def test_paused_server_is_silent_until_resumed(private, found):
    """A frozen server accepts connections and gives no answer. After the resume, its data is still there."""
    client = short_client(private)
    client.set("key", "value")
    private.pause()
    with pytest.raises(redis.TimeoutError):
        client.get("key")
    private.resume()
    assert becomes_true(lambda: client.get("key") == b"value")


@every_binary
def test_paused_server_can_be_stopped(private, found):
    """A test that fails while the server is frozen leaves no process behind."""
    pid = pid_of(private.client())
    private.pause()
    private.stop()
    assert not is_alive(pid)


@every_binary
@pytest.mark.parametrize("keep_data", [True, False])
def test_restarted_server_keeps_its_data_only_if_requested(private, found, keep_data):
    """A restart with data is a deployment of the server, and one without data is a lost cache node."""
    client = short_client(private)
    client.set("key", "value")
    before = pid_of(client)
    private.restart(keep_data=keep_data)
    client = short_client(private)
    assert client.get("key") == (b"value" if keep_data else None)
    assert pid_of(client) != before
    assert not is_alive(before)


@every_binary
def test_two_servers_of_one_binary_share_nothing(private, found):
    """Each server has its own directory and socket."""
    with PrivateServer(found.binary) as other:
        other.client().set("key", "value")
        assert private.client().get("key") is None


@every_binary
def test_server_leaves_no_directory_behind(found):
    """Files of the server are removed with the server."""
    with PrivateServer(found.binary) as server:
        directory = Path(server.unix_socket).parent
        assert directory.exists()
    assert not directory.exists()


@every_binary
def test_server_answers_on_a_given_port(found):
    """Clients that cannot use a unix socket get a port on the loopback interface."""
    with PrivateServer(found.binary, port=free_port()) as server:
        assert redis.Redis(port=server.port).ping()
        assert redis.Redis.from_url(server.url).ping()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a child together with its parent")
@every_binary
def test_server_of_a_killed_process_dies_with_it(found):
    """After SIGKILL of the starter, no server stays behind. The next server removes the files."""
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
        assert is_alive(int(pid))
        parent.send_signal(signal.SIGKILL)
        parent.wait(5)
        assert becomes_true(lambda: not is_alive(int(pid)))
    finally:
        parent.kill()
        parent.communicate()
    with pytest.raises(redis.ConnectionError):
        redis.Redis(unix_socket_path=unix_socket, **servers.ONCE).ping()

    def is_swept() -> bool:
        # The kernel closes the last file of a killed server a moment after the process has become a zombie.
        with PrivateServer(found.binary):
            return not Path(unix_socket).parent.exists()

    assert becomes_true(is_swept)


@pytest.fixture
def no_scratch(tmp_path, monkeypatch) -> None:
    """Use an empty folder for temporary directories."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("no_scratch")
def test_unused_directory_is_removed_with_the_next_one():
    """The directory of a killed process is removed, and that of a running process stays."""
    living, killed = Scratch(), Scratch()
    killed.lock.close()  # as the kernel does
    another = Scratch()
    assert not killed.path.exists()
    for scratch_directory in (living, another):
        assert scratch_directory.path.exists()
        scratch_directory.remove()
        assert not scratch_directory.path.exists()


@pytest.mark.usefixtures("no_scratch")
def test_directory_of_another_user_is_not_removed(monkeypatch):
    """No directory of another user is removed."""
    killed = Scratch()
    killed.lock.close()
    with monkeypatch.context() as patch:
        patch.setattr(scratch.os, "getuid", lambda: -1)
        Scratch().remove()
    assert killed.path.exists()
    Scratch().remove()
    assert not killed.path.exists()


def test_directory_is_in_use_while_its_server_runs(preferred):
    """Where the kernel does not end a server together with its starter, the server keeps its files."""
    with PrivateServer(preferred.binary) as private:
        assert scratch_of(private)
        scratch_of(private).lock.close()
        Scratch().remove()
        assert private.client().ping()
        assert private.directory.exists()
        private.kill()
        Scratch().remove()
        assert not private.directory.exists()


def test_killed_session_server_is_started_again(running, server):
    """A test that ends the common server does not fail the tests after it."""
    server.kill()
    restarted = running(servers.at_hand()[0])
    assert restarted is server
    assert restarted.client().ping()


def test_server_of_the_next_test_is_empty(server):
    """No test sees the keys of another."""
    client = server.client()
    assert client.dbsize() == 0
    client.set("key", "value")


test_server_of_the_test_after_the_next_is_empty = test_server_of_the_next_test_is_empty


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only directory on PATH, with no pip package that contains a server."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(binaries, "SERVER_PACKAGES", (("no_such_package", "redis-server"),))
    return tmp_path


def test_server_on_path_is_found(programs: Path, preferred: FoundServer):
    """An installed server is used, so no further one has to be installed."""
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
    """A pip package with a server comes before the server of the system."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, version in ((first, "1.2.3"), (second, "4.5.6")):
        folder.mkdir()
        binary = folder / "redis-server"
        binary.write_text(f"#!{sys.executable}\nprint('Redis server v={version} sha=0')\n")
        binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{first}{os.pathsep}{second}")
    assert [found.version for found in binaries.find_servers()] == ["1.2.3", "4.5.6"]


def test_server_that_does_not_start_shows_its_log(tmp_path: Path, preferred: FoundServer):
    """The error contains the cause, which would otherwise be in a hidden file. A given directory is kept."""
    private = PrivateServer(preferred.binary, directory=tmp_path, args=["--no-such-option", "1"])
    with pytest.raises(ServerNotStartedError, match="no-such-option"), private:
        pytest.fail("the server has started")
    private.close()
    assert tmp_path.is_dir()


def test_server_that_does_not_run_accepts_every_command(tmp_path: Path, preferred: FoundServer):
    """The clean-up of a test works whether the server runs or not."""
    private = PrivateServer(preferred.binary, directory=tmp_path)
    for act in (private.pause, private.resume, private.stop, private.kill, private.close):
        act()
    assert private.pid is None


def test_server_on_a_port_has_a_url(preferred: FoundServer):
    """Address and version are known without a query."""
    with PrivateServer(preferred.binary, port=free_port()) as private, private.client() as client:
        assert private.url == f"redis://127.0.0.1:{private.port}/0"
        assert private.version == preferred.version
        assert client.ping()
        assert private.start().pid
