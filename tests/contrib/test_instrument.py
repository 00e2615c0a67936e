"""Log lines and metrics of Prometheus: each transition once, whatever the number of processes."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pybreaker import CircuitBreaker, CircuitBreakerListener, CircuitClosedState

from pybreaker_redis.listeners import LogListener
from pybreaker_redis.registry import BreakerRegistry
from pybreaker_redis.testing.servers import PrivateServer
from tests.support.breakers import fails, up
from tests.support.wait import wait_for

prometheus_client = pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, Counter, generate_latest  # noqa: E402

from pybreaker_redis.instrument import prometheus  # noqa: E402
from pybreaker_redis.prometheus import BreakerCollector, PrometheusListener  # noqa: E402

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """Function that returns the log records of listeners."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    return lambda: [record for record in caplog.records if record.pybreaker_redis["event"] == "state_change"]  # type: ignore[attr-defined]


class TestLogListener:
    """The listener that logs transitions."""

    def test_each_transition_is_one_line(self, records: Callable[[], list[logging.LogRecord]]) -> None:
        """Each transition is one log line with `extra` data, and a warning if the circuit opens."""
        payments = BreakerRegistry(listeners=[LogListener()], fail_max=2, reset_timeout=0).get("payments")
        fails(payments, 2)
        payments.call(up)
        payments.call(up)
        assert [(record.levelname, record.getMessage()) for record in records()] == [
            ("WARNING", "breaker 'payments': closed → open"),
            ("INFO", "breaker 'payments': open → half-open"),
            ("INFO", "breaker 'payments': half-open → closed"),
        ]
        assert records()[0].pybreaker_redis == {  # type: ignore[attr-defined]
            "event": "state_change",
            "breaker": "payments",
            "old": "closed",
            "new": "open",
            "noticed": False,
            "reset_timeout": 0,
        }

    def test_transition_by_another_process_is_logged_as_noticed(
        self, client: redis.Redis, records: Callable[[], list[logging.LogRecord]]
    ) -> None:
        """A trip is a warning in the process that made it, and INFO in the others, so that a fleet alerts once."""
        breakers = [BreakerRegistry(client, listeners=[LogListener()]).get("payments") for _ in range(3)]
        for breaker in breakers:
            breaker.call(up)
        breakers[0].open()
        for breaker in breakers:
            # Repeated reads announce a transition once.
            wait_for(lambda breaker=breaker: breaker.state.name == "open", "the other processes notice")
            assert breaker.state.name == "open"
        assert [record.levelname for record in records()] == ["WARNING", "INFO", "INFO"]
        assert records()[1].getMessage() == "breaker 'payments': closed → open, changed by another process"
        assert [record.pybreaker_redis["noticed"] for record in records()] == [False, True, True]  # type: ignore[attr-defined]

    def test_transition_of_a_stock_storage_is_logged(self, records: Callable[[], list[logging.LogRecord]]) -> None:
        """The listener works with breakers on the stock storage."""
        CircuitBreaker(name="payments", listeners=[LogListener()]).open()
        assert [record.levelname for record in records()] == ["WARNING"]

    def test_line_goes_to_the_given_logger(self, caplog: pytest.LogCaptureFixture) -> None:
        """An application can pass its own logger."""
        listener = LogListener(logging.getLogger("shop.breakers"))
        CircuitBreaker(listeners=[listener], name="payments").open()
        assert [record.name for record in caplog.records] == ["shop.breakers"]

    def test_call_without_a_former_state_is_logged(self, records: Callable[[], list[logging.LogRecord]]) -> None:
        """A direct call of the listener without a former state is logged."""
        breaker = CircuitBreaker(name="payments")
        LogListener().state_change(breaker, None, CircuitClosedState(breaker))
        assert records()[0].getMessage() == "breaker 'payments': unknown → closed, changed by another process"


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Return the samples of a registry, without the creation times of counters."""
    return parsed(generate_latest(registry).decode())


def parsed(page: str) -> dict[str, float]:
    """Return the samples of a page."""
    lines = (line.rpartition(" ") for line in page.splitlines() if line and line[0] != "#" and "_created" not in line)
    return {name: float(value) for name, _, value in lines}


class TestPrometheus:
    """Metrics of Prometheus."""

    def test_calls_and_transitions_are_counted(self) -> None:
        """The names of metrics are fixed, and several registries of breakers count together."""
        metrics = CollectorRegistry()
        for name in ("payments", "stock"):
            breakers = BreakerRegistry(listeners=[PrometheusListener(metrics)], fail_max=2, reset_timeout=0)
            breaker = breakers.get(name)
            fails(breaker, 2)
            breaker.call(up)
            breaker.call(up)
        scraped = samples(metrics)
        for name in ("payments", "stock"):
            for result in ("success", "failure"):
                assert scraped.pop(f'pybreaker_calls_total{{breaker="{name}",result="{result}"}}') == 2
            for state in ("open", "half-open", "closed"):
                assert scraped.pop(f'pybreaker_transitions_total{{breaker="{name}",state="{state}"}}') == 1
        assert scraped == {}

    def test_rejections_are_counted(self) -> None:
        """A rejection is no result of the dependency, so it has a counter of its own."""
        metrics = CollectorRegistry()
        breaker = BreakerRegistry(listeners=[PrometheusListener(metrics)], fail_max=1).get("payments")
        fails(breaker, 4)
        assert samples(metrics) == {
            'pybreaker_calls_total{breaker="payments",result="failure"}': 1,
            'pybreaker_rejected_calls_total{breaker="payments"}': 3,
            'pybreaker_transitions_total{breaker="payments",state="open"}': 1,
        }

    def test_transition_by_another_process_is_not_counted(self, client: redis.Redis) -> None:
        """A transition counts in the process that made it, so the sum over all processes is right."""
        metrics = [CollectorRegistry() for _ in range(2)]
        first, second = (
            BreakerRegistry(client, listeners=[PrometheusListener(each)]).get("payments") for each in metrics
        )
        second.call(up)
        first.open()
        wait_for(lambda: second.state.name == "open", "the other process notices")
        assert samples(metrics[0])['pybreaker_transitions_total{breaker="payments",state="open"}'] == 1
        assert not [name for name in samples(metrics[1]) if name.startswith("pybreaker_transitions")]

    def test_simultaneous_trips_are_counted_once(self, client: redis.Redis) -> None:
        """If two processes reach *fail_max* at the same time, one trip is counted."""
        metrics = CollectorRegistry()
        listener = PrometheusListener(metrics)

        class TripsFirst(CircuitBreakerListener):
            def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
                fails(first)

        first, second = (
            BreakerRegistry(client, listeners=listeners, fail_max=1).get("payments")
            for listeners in ([listener], [TripsFirst(), listener])
        )
        fails(second)
        assert (first.current_state, second.current_state) == ("open", "open")
        assert samples(metrics)['pybreaker_transitions_total{breaker="payments",state="open"}'] == 1

    def test_open_of_an_open_circuit_is_not_counted(self) -> None:
        """An `open` of an open circuit is not counted."""
        metrics = CollectorRegistry()
        payments = BreakerRegistry(listeners=[PrometheusListener(metrics)]).get("payments")
        payments.open()
        payments.open()
        assert samples(metrics) == {'pybreaker_transitions_total{breaker="payments",state="open"}': 1}

    def test_scrape_reads_the_state_from_redis(self, server: PrivateServer) -> None:
        """A scrape reads the state from Redis, even in a process that has not used the circuit."""
        metrics = CollectorRegistry()
        with BreakerRegistry(server.url) as scraped, BreakerRegistry(server.url, fail_max=3) as used:
            scraped.configure("payments", reset_timeout=60)
            scraped.configure("stock")
            metrics.register(BreakerCollector(scraped))
            fails(used.get("payments"), 3)
            fails(used.get("stock"), 1)
            page = samples(metrics)
            assert 58 < page.pop('pybreaker_circuit_retry_after_seconds{breaker="payments"}') <= 60.1
            assert page == {
                "pybreaker_circuits_up": 1,
                'pybreaker_circuit_state{breaker="payments",state="closed"}': 0,
                'pybreaker_circuit_state{breaker="payments",state="open"}': 1,
                'pybreaker_circuit_state{breaker="payments",state="half-open"}': 0,
                'pybreaker_circuit_state{breaker="stock",state="closed"}': 1,
                'pybreaker_circuit_state{breaker="stock",state="open"}': 0,
                'pybreaker_circuit_state{breaker="stock",state="half-open"}': 0,
                'pybreaker_circuit_failures{breaker="payments"}': 3,
                'pybreaker_circuit_failures{breaker="stock"}': 1,
                'pybreaker_circuit_retry_after_seconds{breaker="stock"}': 0,
            }

    def test_scrape_works_without_redis(self, killable_server: PrivateServer) -> None:
        """Without Redis a scrape still returns the process's own metrics, and no outdated state."""
        metrics = CollectorRegistry()
        with BreakerRegistry(killable_server.url, listeners=[PrometheusListener(metrics)]) as breakers:
            metrics.register(BreakerCollector(breakers))
            breakers.get("payments").call(up)
            killable_server.kill()
            assert samples(metrics) == {
                "pybreaker_circuits_up": 0,
                'pybreaker_calls_total{breaker="payments",result="success"}': 1,
            }

    def test_registration_sends_nothing(self) -> None:
        """A collector sends nothing when it is registered, and a duplicate name is refused at once."""

        def never() -> None:
            pytest.fail("the client source was called")

        metrics = CollectorRegistry(auto_describe=True)
        breakers = BreakerRegistry(never)
        breakers.configure("payments")
        metrics.register(BreakerCollector(breakers))
        with pytest.raises(ValueError, match="pybreaker_circuit"):
            metrics.register(BreakerCollector(breakers))

    def test_listeners_created_at_the_same_time_share_counters(self) -> None:
        """Listeners that are created at the same time share their counters."""
        metrics, start, failed = CollectorRegistry(), threading.Barrier(8), []

        def make() -> None:
            start.wait()
            try:
                PrometheusListener(metrics)
            except ValueError as error:
                failed.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_child_forked_during_the_creation_of_a_listener_has_its_counters(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child forked during the creation of a listener neither blocks nor misses a counter."""
        metrics, first_made, forks = CollectorRegistry(), threading.Event(), threading.Event()

        class SlowCounter(Counter):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                if self._is_parent():
                    first_made.set()
                    assert forks.wait(10)

        monkeypatch.setattr(prometheus, "Counter", SlowCounter)
        thread = threading.Thread(target=PrometheusListener, args=[metrics])
        thread.start()
        assert first_made.wait(10)
        # Hooks that are registered last run first.
        os.register_at_fork(before=forks.set)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            status = 1
            try:
                PrometheusListener(metrics).success(CircuitBreaker(name="payments"))
                status = (
                    0 if samples(metrics) == {'pybreaker_calls_total{breaker="payments",result="success"}': 1} else 2
                )
            finally:
                os._exit(status)
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


#: One of several workers that are scraped together.  It makes calls on command and prints what it did.
WORKER = """
import contextlib, sys
from pybreaker import CircuitBreakerError
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pybreaker_redis.prometheus import BreakerCollector, PrometheusListener
from pybreaker_redis.registry import BreakerRegistry

number, url = int(sys.argv[1]), sys.argv[2]
breakers = BreakerRegistry(url, listeners=[PrometheusListener()], fail_max=1000, timeout=10)
payments, stock = breakers.get("payments", reset_timeout=60), breakers.get("stock", reset_timeout=60)

reached = 0

def down():
    global reached
    reached += 1
    raise KeyError

def reply(**values):
    print(repr(values), flush=True)

reply(ready=True)
for line in sys.stdin:
    if line == "call\\n":
        made = {"success": 0, "failure": 0}
        for _ in range(10 * (number + 1)):
            payments.call(int)
            made["success"] += 1
        for _ in range(number + 1):
            with contextlib.suppress(KeyError):
                payments.call(down)
            made["failure"] += 1
        reply(**made)
    elif line == "trip\\n":
        stock.fail_max = 3
        reached = 0
        for _ in range(2):
            with contextlib.suppress(CircuitBreakerError, KeyError):
                stock.call(down)
        reply(reached=reached)
    elif line == "scrape\\n":
        metrics = CollectorRegistry()
        MultiProcessCollector(metrics)
        metrics.register(BreakerCollector(breakers))
        reply(page=generate_latest(metrics).decode())
"""


class Worker:
    """Process that makes calls and can be scraped.

    Args:
        number: Number of the worker.
        url: URL of Redis.
        directory: Directory of the shared metrics.
    """

    def __init__(self, number: int, url: str, directory: Path) -> None:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
        command = [sys.executable, "-c", WORKER, str(number), url]
        self.process: Any = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, command: str) -> None:
        """Send a command to the worker."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the worker's reply to a command."""
        line = self.process.stdout.readline()
        assert line, f"worker ended with {self.process.wait()}"
        reply: dict[str, Any] = eval(line)
        return reply

    def end(self) -> None:
        """End the worker."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture
def workers(server: PrivateServer, tmp_path: Path) -> Iterator[list[Worker]]:
    """Four processes with shared metrics, as workers of gunicorn have them."""
    made = [Worker(number, server.url, tmp_path) for number in range(4)]
    try:
        assert all(worker.receive()["ready"] for worker in made)
        yield made
    finally:
        for worker in made:
            worker.end()


def test_page_of_any_process_shows_the_sum_over_all(workers: list[Worker], client: redis.Redis) -> None:
    """Any worker's page shows the sums of calls and transitions, and the state of each circuit once."""
    for worker in workers:
        worker.send("call")
    made = [worker.receive() for worker in workers]
    for worker in workers:
        worker.send("trip")
    tripped = [worker.receive() for worker in workers]
    # The circuit opens at the third failure, and calls that are in flight then still fail.
    reached = sum(each["reached"] for each in tripped)
    assert 3 <= reached <= 8
    assert client.get("stock:pybreaker:state") == b"open"
    # The calls of a worker that has ended still count.
    workers[3].end()
    pages = []
    for worker in workers[:3]:
        worker.send("scrape")
        pages.append(parsed(worker.receive()["page"]))
    for page in pages:
        for result in ("success", "failure"):
            expected = sum(each[result] for each in made)
            assert page[f'pybreaker_calls_total{{breaker="payments",result="{result}"}}'] == expected
        assert page['pybreaker_transitions_total{breaker="stock",state="open"}'] == 1
        assert page['pybreaker_calls_total{breaker="stock",result="failure"}'] == reached
        assert page['pybreaker_circuit_state{breaker="stock",state="open"}'] == 1
        assert page['pybreaker_circuit_state{breaker="payments",state="closed"}'] == 1
        assert page['pybreaker_circuit_failures{breaker="payments"}'] == int(
            client.get("payments:pybreaker:fail_counter")
        )
        assert page["pybreaker_circuits_up"] == 1


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("instrument.prometheus", "prometheus_client", "prometheus"),
        ("prometheus", "prometheus_client", "prometheus"),
        ("testing.fixtures", "pytest", "testing"),
        ("fixtures", "pytest", "testing"),
    ],
)
def test_module_without_its_extra_names_the_extra(
    module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its extra a module names the extra to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    for name in (module, f"instrument.{module}", f"testing.{module}"):
        monkeypatch.delitem(sys.modules, f"pybreaker_redis.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"the extra '{extra}' of pybreaker_redis"):
        importlib.import_module(f"pybreaker_redis.{module}")


def test_other_modules_need_no_extra() -> None:
    """The other modules work with pybreaker and redis alone."""
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['prometheus_client', 'pytest', 'freezegun', 'time_machine']))\n"
        "import pybreaker_redis.registry, pybreaker_redis.listeners, pybreaker_redis.testing\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
