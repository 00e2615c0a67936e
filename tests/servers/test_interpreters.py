"""Subinterpreters, as embedding servers use them: a clean end, and service where no thread can run."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pybreaker_redis.testing.servers import PrivateServer
from tests.support.paths import ROOT

_USE = """
    import sys
    sys.path[:] = {path!r}
    import threading, time
    import redis
    from pybreaker_redis.registry import BreakerRegistry

    breakers = BreakerRegistry(redis.Redis(unix_socket_path={socket!r}), timeout=10)
    assert breakers.get("payments").call(int) == 0
    until = time.monotonic() + 60
    def threads():
        assert time.monotonic() < until
        time.sleep(0.01)
        return [thread for thread in threading.enumerate() if thread.name.startswith("pybreaker_redis")]
"""


def run(code: str, server: PrivateServer, runner: str) -> None:
    """Run code in a subinterpreter of a new process."""
    path = [str(ROOT), *(entry for entry in sys.path if entry)]
    text = textwrap.dedent(_USE).format(path=path, socket=server.unix_socket) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", runner.format(code=text)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["used", "ended"], done.stderr


def test_interpreter_ends_after_the_registry_was_closed(server: PrivateServer) -> None:
    """Python aborts the process if a daemon thread still runs at the end.

    Closing the registry ends this package's threads.
    """
    pytest.importorskip("_testcapi")
    code = """
        while not threads():
            pass
        breakers.close()
        while threads():
            pass
        print("used", flush=True)
    """
    run(code, server, "import _testcapi; assert _testcapi.run_in_subinterp({code!r}) == 0; print('ended')")


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="Python 3.12 crashes there after `import ssl`")
def test_interpreter_without_threads_reads_through(server: PrivateServer) -> None:
    """Isolated interpreters permit no daemon threads, and circuits work without them."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    pytest.importorskip(name)
    code = """
        assert threads() == []
        breakers["payments"].open()
        assert breakers["payments"].current_state == "open"
        assert breakers["payments"]._state_storage.health().push == "none"
        print("used", flush=True)
    """
    runner = f"import {name} as module; one = module.create(); assert module.run_string(one, {{code!r}}) is None; "
    run(code, server, runner + "module.destroy(one); print('ended')")
