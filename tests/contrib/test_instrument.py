"""What is logged, and what Prometheus sees: each transition once, whatever the number of processes."""

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
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """The lines of listeners."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    return lambda: [record for record in caplog.records if record.pybreaker_redis["event"] == "state_change"]  # type: ignore[attr-defined]


class TestLogListener:
    """One line for each change of state."""

    def test_each_change_is_a_line_and_no_call_is(self, said: Callable[[], list[logging.LogRecord]]) -> None:
        """What a person reads, and what a handler counts; the opening of a circuit is worth a warning."""
        payments = BreakerRegistry(listeners=[LogListener()], fail_max=2, reset_timeout=0).get("payments")
        fails(payments, 2)
        payments.call(up)
        payments.call(up)
        assert [(record.levelname, record.getMessage()) for record in said()] == [
            ("WARNING", "breaker 'payments': closed → open"),
            ("INFO", "breaker 'payments': open → half-open"),
            ("INFO", "breaker 'payments': half-open → closed"),
        ]
        assert said()[0].pybreaker_redis == {  # type: ignore[attr-defined]
            "event": "state_change",
            "breaker": "payments",
            "old": "closed",
            "new": "open",
            "noticed": False,
            "reset_timeout": 0,
        }

    def test_what_others_have_brought_about_is_noticed(
        self, client: redis.Redis, said: Callable[[], list[logging.LogRecord]]
    ) -> None:
        """A fleet of a hundred does not page anybody a hundred times."""
        breakers = [BreakerRegistry(client, listeners=[LogListener()]).get("payments") for _ in range(3)]
        for breaker in breakers:
            breaker.call(up)
        breakers[0].open()
        for breaker in breakers:
            # However often they look.
            wait_for(lambda breaker=breaker: breaker.state.name == "open", "the others hear of it")
            assert breaker.state.name == "open"
        assert [record.levelname for record in said()] == ["WARNING", "INFO", "INFO"]
        assert said()[1].getMessage() == "breaker 'payments': closed → open, changed by another process"
        assert [record.pybreaker_redis["noticed"] for record in said()] == [False, True, True]  # type: ignore[attr-defined]

    def test_stock_storage_is_told_of_alike(self, said: Callable[[], list[logging.LogRecord]]) -> None:
        """Listeners are the breaker's, whatever its storage."""
        CircuitBreaker(name="payments", listeners=[LogListener()]).open()
        assert [record.levelname for record in said()] == ["WARNING"]

    def test_goes_where_it_is_told_to(self, caplog: pytest.LogCaptureFixture) -> None:
        """An application has loggers of its own."""
        listener = LogListener(logging.getLogger("shop.breakers"))
        CircuitBreaker(listeners=[listener], name="payments").open()
        assert [record.name for record in caplog.records] == ["shop.breakers"]

    def test_told_by_nobody_in_particular(self, said: Callable[[], list[logging.LogRecord]]) -> None:
        """Somebody calls the listener by hand, without a state before."""
        breaker = CircuitBreaker(name="payments")
        LogListener().state_change(breaker, None, CircuitClosedState(breaker))
        assert said()[0].getMessage() == "breaker 'payments': unknown → closed, changed by another process"


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """What is scraped, without the times at which counters were made."""
    return parsed(generate_latest(registry).decode())


def parsed(page: str) -> dict[str, float]:
    """The samples of a page."""
    lines = (line.rpartition(" ") for line in page.splitlines() if line and line[0] != "#" and "_created" not in line)
    return {name: float(value) for name, _, value in lines}


class TestPrometheus:
    """What is scraped."""

    def test_calls_and_transitions_are_counted(self) -> None:
        """The names are what dashboards are made of; several registries of breakers count together."""
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

    def test_what_others_have_brought_about_is_not_counted_again(self, client: redis.Redis) -> None:
        """The sum over all processes is the number of transitions."""
        metrics = [CollectorRegistry() for _ in range(2)]
        first, second = (
            BreakerRegistry(client, listeners=[PrometheusListener(each)]).get("payments") for each in metrics
        )
        second.call(up)
        first.open()
        wait_for(lambda: second.state.name == "open", "the other one hears of it")
        assert samples(metrics[0])['pybreaker_transitions_total{breaker="payments",state="open"}'] == 1
        assert not [name for name in samples(metrics[1]) if name.startswith("pybreaker_transitions")]

    def test_of_two_that_trip_at_once_one_is_counted(self, client: redis.Redis) -> None:
        """Both have counted a failure of the closed circuit, and both compare it with *fail_max*."""
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

    def test_opened_anew_by_hand_is_no_transition(self) -> None:
        """It was open."""
        metrics = CollectorRegistry()
        payments = BreakerRegistry(listeners=[PrometheusListener(metrics)]).get("payments")
        payments.open()
        payments.open()
        assert samples(metrics) == {'pybreaker_transitions_total{breaker="payments",state="open"}': 1}

    def test_state_is_asked_for_at_the_scrape(self, server: PrivateServer) -> None:
        """By a process that has not used the circuit, and knows nothing but its name."""
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

    def test_scrape_goes_on_without_redis(self, killable_server: PrivateServer) -> None:
        """What the process itself has to tell must not be lost, and no state is better than an old one."""
        metrics = CollectorRegistry()
        with BreakerRegistry(killable_server.url, listeners=[PrometheusListener(metrics)]) as breakers:
            metrics.register(BreakerCollector(breakers))
            breakers.get("payments").call(up)
            killable_server.kill()
            assert samples(metrics) == {
                "pybreaker_circuits_up": 0,
                'pybreaker_calls_total{breaker="payments",result="success"}': 1,
            }

    def test_registering_asks_nobody(self) -> None:
        """It is done when modules are imported; and a name that is taken is refused then."""

        def never() -> None:
            pytest.fail("asked for a client")

        metrics = CollectorRegistry(auto_describe=True)
        breakers = BreakerRegistry(never)
        breakers.configure("payments")
        metrics.register(BreakerCollector(breakers))
        with pytest.raises(ValueError, match="pybreaker_circuit"):
            metrics.register(BreakerCollector(breakers))

    def test_listeners_made_at_once_count_together(self) -> None:
        """The first requests of a process come at the same time."""
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
    def test_child_that_is_forked_while_a_listener_is_made_has_it_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It neither waits for a thread that has stayed behind, nor finds a name taken by a counter that it lacks."""
        metrics, first_made, forks = CollectorRegistry(), threading.Event(), threading.Event()

        class SlowCounter(Counter):
            def __init__(self, *args: Any, **words: Any) -> None:
                super().__init__(*args, **words)
                if self._is_parent():
                    first_made.set()
                    assert forks.wait(10)

        monkeypatch.setattr(prometheus, "Counter", SlowCounter)
        thread = threading.Thread(target=PrometheusListener, args=[metrics])
        thread.start()
        assert first_made.wait(10)
        # What was registered last is called first.
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


#: One worker of several that are scraped as one: it makes some calls, says what it did, and stays for the scrape.
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

def say(**what):
    print(repr(what), flush=True)

say(ready=True)
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
        say(**made)
    elif line == "trip\\n":
        stock.fail_max = 3
        reached = 0
        for _ in range(2):
            with contextlib.suppress(CircuitBreakerError, KeyError):
                stock.call(down)
        say(reached=reached)
    elif line == "scrape\\n":
        metrics = CollectorRegistry()
        MultiProcessCollector(metrics)
        metrics.register(BreakerCollector(breakers))
        say(page=generate_latest(metrics).decode())
"""


class Worker:
    """A process that makes calls and is scraped.

    Args:
        number: Which of them.
        url: Of Redis.
        directory: Where all of them count.
    """

    def __init__(self, number: int, url: str, directory: Path) -> None:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
        command = [sys.executable, "-c", WORKER, str(number), url]
        self.process: Any = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, what: str) -> None:
        """Have it begin."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """What it says."""
        line = self.process.stdout.readline()
        assert line, f"worker ended with {self.process.wait()}"
        said: dict[str, Any] = eval(line)
        return said

    def end(self) -> None:
        """It has done its work."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture
def workers(server: PrivateServer, tmp_path: Path) -> Iterator[list[Worker]]:
    """Four processes that count in one place, as gunicorn's do."""
    made = [Worker(number, server.url, tmp_path) for number in range(4)]
    try:
        assert all(worker.hear()["ready"] for worker in made)
        yield made
    finally:
        for worker in made:
            worker.end()


def test_sum_over_four_processes_is_the_truth(workers: list[Worker], client: redis.Redis) -> None:
    """Whichever is scraped: calls and transitions are added up, the state of the circuits is not."""
    for worker in workers:
        worker.tell("call")
    made = [worker.hear() for worker in workers]
    for worker in workers:
        worker.tell("trip")
    tripped = [worker.hear() for worker in workers]
    # The circuit opens at the third failure; those that are under way then are made all the same.
    reached = sum(each["reached"] for each in tripped)
    assert 3 <= reached <= 8
    assert client.get("stock:pybreaker:state") == b"open"
    # One that has ended has counted all the same.
    workers[3].end()
    pages = []
    for worker in workers[:3]:
        worker.tell("scrape")
        pages.append(parsed(worker.hear()["page"]))
    for page in pages:
        for result in ("success", "failure"):
            truth = sum(each[result] for each in made)
            assert page[f'pybreaker_calls_total{{breaker="payments",result="{result}"}}'] == truth
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
    [("instrument.prometheus", "prometheus_client", "prometheus"), ("testing.fixtures", "pytest", "testing")],
)
def test_without_its_extra_a_module_says_what_to_install(
    module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not which of our lines has failed."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"pybreaker_redis.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'pybreaker_redis\[{extra}\]'"):
        importlib.import_module(f"pybreaker_redis.{module}")


def test_no_extra_is_needed_for_anything_else() -> None:
    """What has no extra of its own works with pybreaker and redis alone."""
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['prometheus_client', 'pytest', 'freezegun', 'time_machine']))\n"
        "import pybreaker_redis.registry, pybreaker_redis.listeners, pybreaker_redis.testing\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
